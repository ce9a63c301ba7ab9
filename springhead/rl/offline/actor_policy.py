"""How every algorithm acts whose policy is tanh of one network: BC, the actor-critic and the DICE methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from springhead.errors import BadInput
from springhead.rl.offline.contract import Generators
from springhead.rl.offline.stacked import MLP
from springhead.rl.policy import read_config, read_tensors
from springhead.rl.tasks import Task


def chosen_limit(limits: tuple[float, ...], cost_limit: float, what: str) -> int:
    """The position of the largest trained limit that is not above the one asked for; 0 if there are no limits.

    Raises:
        BadInput: If every trained limit is above it: none of the networks was made to keep it.
    """
    if not limits:
        return 0
    below = [number for number, limit in enumerate(limits) if limit <= cost_limit]
    if not below:
        known = ", ".join(f"{limit:g}" for limit in limits)
        raise BadInput(
            f"{what} was trained for the cost limits {known}; ask for at least {min(limits):g}, not {cost_limit:g}"
        )
    return max(below, key=lambda number: limits[number])


def actor_config(
    task: Task,
    hidden: tuple[int, ...],
    cost_scale: float | None = None,
    moments: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """The configuration of a policy of this kind.

    Args:
        task: The task.
        hidden: Sizes of the hidden layers.
        cost_scale: The network also sees the cost limit divided by this; None where it does not.
        moments: Subtracted from observations, and then divided by, (observation_dim,) each; None where they are raw.
    """
    return {
        "observation_dim": task.observation_dim,
        "action_dim": task.action_dim,
        "hidden": list(hidden),
        "cost_scale": cost_scale,
        "observation_shift": None if moments is None else moments[0].tolist(),
        "observation_scale": None if moments is None else moments[1].tolist(),
    }


class ActorPolicy:
    """Acts by the network of the largest trained limit that is not above the limit asked for."""

    def __init__(self, config: dict[str, Any], networks: MLP) -> None:
        self.task: str = config["task"]
        self.algorithm: str = config["algorithm"]
        self.observation_dim: int = config["observation_dim"]
        self.action_dim: int = config["action_dim"]
        self.limits: tuple[float, ...] = tuple(config["limits"])
        self._scale: float | None = config["cost_scale"]
        self._moments = None
        if config["observation_shift"] is not None:
            self._moments = torch.tensor(config["observation_shift"]), torch.tensor(config["observation_scale"])
        self._layers = [
            (weight.detach(), bias.detach()) for weight, bias in zip(networks.weights, networks.biases, strict=True)
        ]
        self._number = 0
        self._cost_limit = 0.0

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Chooses the network.

        Raises:
            BadInput: If every trained limit is above the one asked for.
        """
        self._number = chosen_limit(self.limits, cost_limit, f"{self.algorithm} for {self.task}")
        self._cost_limit = cost_limit

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Maps observations (n, observation_dim) to actions (n, action_dim)."""
        rows = torch.from_numpy(np.asarray(observations, dtype=np.float32))
        if self._moments is not None:
            rows = (rows - self._moments[0]) / self._moments[1]
        if self._scale is not None:
            rows = torch.cat([rows, torch.full((len(rows), 1), self._cost_limit / self._scale)], dim=1)
        last = len(self._layers) - 1
        for layer, (weight, bias) in enumerate(self._layers):
            rows = torch.addmm(bias[self._number], rows, weight[self._number])
            rows = rows.tanh_() if layer == last else rows.relu_()
        actions: np.ndarray = rows.numpy()
        return actions

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Nothing to remember."""


def load(folder: Path) -> ActorPolicy:
    """Loads a model folder.

    Raises:
        BadInput: If a file is missing, damaged, or does not fit the configuration.
    """
    config = read_config(folder)
    try:
        limits, scale, inputs = config["limits"], config["cost_scale"], config["observation_dim"]
        names = [f"limit-{limit:g}" for limit in limits] or ["policy"]
        sizes = (inputs + (scale is not None), *config["hidden"], config["action_dim"])
        networks = MLP(Generators([0] * len(names)), sizes)
        for key in ("observation_shift", "observation_scale"):
            if config[key] is not None and len(config[key]) != inputs:
                raise ValueError(f"{key} has {len(config[key])} components of {inputs}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder / 'config.json'}: not an actor's configuration ({error!r}); train it again") from None
    shapes = {name: value.shape for name, value in networks.member(0).items()}
    parts = [read_tensors(folder / f"{name}.safetensors", shapes) for name in names]
    networks.load_state_dict({key: torch.cat([part[key] for part in parts]) for key in shapes})
    return ActorPolicy(config, networks)
