"""Behavioural cloning from selected episodes: BC-All, -Safe, -Risky, -Boundary, -Frontier, -Multi-Task.

Source: the BC baselines of DSRL and OSRL (Liu et al. 2023, "Datasets and Benchmarks for Offline Safe
Reinforcement Learning", section 5): a deterministic tanh network, mean squared error on actions, Adam
with learning rate 1e-3. What differs between the six is only which episodes they imitate.

Deviations, with reasons in ``docs/methods/bc.md``:
  1. A model folder of a limit-dependent mode holds one network for each of the task's limits, trained
     together as one batched network; acting under a limit uses the largest trained limit not above it.
  2. ``safety_margin`` (0 as in the paper) imitates episodes of cost at most (1 - margin) x limit.
  3. ``decay`` lets the learning rate fall linearly to 0; short runs end closer to the optimum.
  4. BC-Multi-Task sees costs in units of the highest limit, not raw.
  5. BC-Frontier's polynomial cannot have more coefficients than distinct costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.offline import checkpoint
from springhead.rl.offline.batches import Flat, Trained, flatten
from springhead.rl.offline.frontier import fit_until, pareto
from springhead.rl.policy import read_config, read_tensors
from springhead.rl.tasks import Task

MODES = ("all", "safe", "risky", "boundary", "frontier", "multi-task")
"""The six selections; the algorithm's name is ``bc-<mode>``."""

_BY_LIMIT = ("safe", "risky", "boundary")


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the BC family."""

    steps: int = 100_000
    """Gradient steps."""
    batch_size: int = 512
    """Transitions per step and network."""
    hidden: tuple[int, ...] = (256, 256)
    """Sizes of the hidden layers (ReLU)."""
    learning_rate: float = 1e-3
    """Of Adam."""
    decay: bool = False
    """Let the learning rate fall linearly to 0."""
    safety_margin: float = 0.0
    """BC-Safe imitates episodes of cost at most (1 - margin) x limit."""
    checkpoint_every: int = 1000
    """Steps between resume checkpoints, and between points of the learning curve's file."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.checkpoint_every, *self.hidden) < 1 or self.learning_rate <= 0:
            raise ValueError("bc: steps, batch_size, hidden, checkpoint_every and learning_rate must be above 0")
        if not 0 <= self.safety_margin < 1:
            raise ValueError("bc: safety_margin must be at least 0 and below 1")


def select(
    mode: str, returns: npt.NDArray[np.float64], costs: npt.NDArray[np.float64], limit: float, margin: float = 0.0
) -> npt.NDArray[np.intp]:
    """Returns the positions of the episodes a mode imitates, in ascending order.

    all, multi-task: every episode. safe: C <= (1 - margin) limit. risky: C >= 2 limit. boundary:
    limit / 2 < C <= 3 limit / 2. frontier: |R - p(C)| at most a fifth of the range of returns, p the
    polynomial through the Pareto set, of the lowest degree up to 2 with R² of at least 0.9.

    Args:
        mode: One of ``MODES``.
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        limit: The episode cost limit, for the modes that depend on it.
        margin: The safety margin, for ``safe``.

    Raises:
        BadInput: If the mode is unknown or selects no episode.
    """
    if mode == "safe":
        chosen = costs <= (1 - margin) * limit
    elif mode == "risky":
        chosen = costs >= 2 * limit
    elif mode == "boundary":
        chosen = (costs > 0.5 * limit) & (costs <= 1.5 * limit)
    elif mode == "frontier":
        best = pareto(returns, costs)
        curve = fit_until(returns[best], costs[best])
        chosen = np.abs(returns - curve(costs)) <= (returns.max() - returns.min()) / 5
    elif mode in ("all", "multi-task"):
        chosen = np.ones(len(returns), dtype=bool)
    else:
        raise BadInput(f"unknown BC mode {mode!r}; known: {', '.join(MODES)}")
    if not chosen.any():
        raise BadInput(
            f"bc-{mode}: none of {len(returns)} episodes fits the limit {limit:g} "
            f"(costs from {costs.min():g} to {costs.max():g}); collect more or loosen the filters"
        )
    return np.flatnonzero(chosen)


class Networks(nn.Module):
    """Several networks of one shape, evaluated side by side by batched matrix products.

    Args:
        count: How many networks.
        sizes: Input size, hidden sizes, output size.
        generator: Source of the initial weights, uniform within ±1/sqrt(inputs).
    """

    def __init__(self, count: int, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            bound = inputs**-0.5
            self.weights.append(torch.empty(count, inputs, outputs).uniform_(-bound, bound, generator=generator))
            self.biases.append(torch.empty(count, 1, outputs).uniform_(-bound, bound, generator=generator))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps (count, batch, inputs) to actions (count, batch, outputs) in (-1, 1)."""
        layer = inputs
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            layer = torch.baddbmm(bias, layer, weight)
            layer = torch.tanh(layer) if number == len(self.weights) - 1 else torch.relu(layer)
        return layer

    def one(self, number: int) -> dict[str, torch.Tensor]:
        """Returns the tensors of one network."""
        return {name: value[number : number + 1] for name, value in self.state_dict().items()}


def _inputs(data: Flat, mode: str, scale: float) -> torch.Tensor:
    """Returns the networks' inputs (N, inputs): observations, for multi-task with the episode's cost."""
    if mode != "multi-task":
        return data.observations
    costs = torch.from_numpy(data.cost_returns / scale).float()
    return torch.cat([data.observations, costs.repeat_interleave(data.lengths)[:, None]], dim=1)


def train(
    mode: str,
    episodes: Sequence[Episode],
    task: Task,
    settings: Settings,
    seed: int,
    scratch: Path,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Trained:
    """Trains a policy, or resumes its training from a checkpoint.

    Args:
        mode: One of ``MODES``.
        episodes: The data set.
        task: The task; its three limits are those of the limit-dependent modes.
        settings: Hyper-parameters.
        seed: Seeds initial weights and batches.
        scratch: Folder for resume checkpoints.
        on_step: Called after every step with its number and losses, and once at once when resuming.

    Returns:
        The content of the model folder and the learning curve.

    Raises:
        BadInput: If the data do not fit, a limit selects no episode, or a loss is not finite.
    """
    data = flatten(episodes, task)
    limits = task.limits if mode in _BY_LIMIT else ()
    names = [f"limit-{limit:g}" for limit in limits] or ["policy"]
    pools = [
        data.transitions(select(mode, data.returns, data.cost_returns, limit, settings.safety_margin))
        for limit in limits or (task.limits[0],)
    ]
    scale = max(task.limits)
    inputs = _inputs(data, mode, scale)
    generator = torch.Generator().manual_seed(seed)
    networks = Networks(len(pools), (inputs.shape[1], *settings.hidden, task.action_dim), generator)
    history = _optimise(networks, inputs, data.actions, pools, names, settings, generator, scratch, on_step)
    config = {
        "algorithm": f"bc-{mode}",
        "task": task.name,
        "observation_dim": task.observation_dim,
        "action_dim": task.action_dim,
        "hidden": list(settings.hidden),
        "limits": list(limits),
        "cost_scale": scale if mode == "multi-task" else None,
        "seed": seed,
    }
    files = {f"{name}.safetensors": networks.one(number) for number, name in enumerate(names)}
    return Trained(config, files, history)


def _optimise(
    networks: Networks,
    inputs: torch.Tensor,
    actions: torch.Tensor,
    pools: Sequence[torch.Tensor],
    names: Sequence[str],
    settings: Settings,
    generator: torch.Generator,
    scratch: Path,
    on_step: Callable[[int, dict[str, float]], None],
) -> list[dict[str, float]]:
    """Minimises the squared error of every network on its own pool of transitions."""
    optimiser = torch.optim.Adam(networks.parameters(), lr=settings.learning_rate, fused=True)
    first = 0
    history: list[dict[str, float]] = []
    if (state := checkpoint.latest(scratch)) is not None:
        checkpoint.unpack(state.tensors, networks, optimiser)
        generator.set_state(state.tensors["generator"])
        first, history = state.step, state.facts["history"]
        on_step(first, {})
    for step in range(first + 1, settings.steps + 1):
        if settings.decay:
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
        rows = [pool[torch.randint(len(pool), (settings.batch_size,), generator=generator)] for pool in pools]
        batch = torch.stack(rows)
        errors = (networks(inputs[batch]) - actions[batch]).square().mean(dim=(1, 2))
        optimiser.zero_grad()
        errors.sum().backward()
        optimiser.step()
        figures = {f"loss-{name}": float(value) for name, value in zip(names, errors.detach(), strict=True)}
        if not np.isfinite(list(figures.values())).all():
            kept = max(step - 1 - (step - 1) % settings.checkpoint_every, 0)
            raise BadInput(
                f"bc: the loss is not finite at step {step}; the last good state, of step {kept}, is kept in "
                f"{scratch}. Lower rl.train.bc.learning_rate"
            )
        on_step(step, figures)
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            history.append({"step": step, **figures})
            tensors = {**checkpoint.pack(networks, optimiser), "generator": generator.get_state()}
            checkpoint.save(scratch, step, tensors, {"history": history})
    return history


class BcPolicy:
    """Acts by the network of the largest trained limit that is not above the limit asked for."""

    def __init__(self, config: dict[str, Any], networks: Networks) -> None:
        self.task: str = config["task"]
        self.algorithm: str = config["algorithm"]
        self.observation_dim: int = config["observation_dim"]
        self.action_dim: int = config["action_dim"]
        self.limits: tuple[float, ...] = tuple(config["limits"])
        self._scale: float | None = config["cost_scale"]
        self._networks = networks
        self._number = 0
        self._cost_limit = 0.0

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Chooses the network.

        Raises:
            BadInput: If every trained limit is above the one asked for: none of the networks was made to keep it.
        """
        below = [number for number, limit in enumerate(self.limits) if limit <= cost_limit]
        if self.limits and not below:
            known = ", ".join(f"{limit:g}" for limit in self.limits)
            raise BadInput(
                f"{self.algorithm} for {self.task} was trained for the cost limits {known}; "
                f"ask for at least {min(self.limits):g}, not {cost_limit:g}"
            )
        self._number = max(below, key=lambda number: self.limits[number]) if below else 0
        self._cost_limit = cost_limit

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Maps observations (n, observation_dim) to actions (n, action_dim)."""
        rows = torch.from_numpy(np.asarray(observations, dtype=np.float32))
        if self._scale is not None:
            rows = torch.cat([rows, torch.full((len(rows), 1), self._cost_limit / self._scale)], dim=1)
        layers = range(len(self._networks.weights))
        with torch.no_grad():
            for layer in layers:
                weight, bias = self._networks.weights[layer][self._number], self._networks.biases[layer][self._number]
                rows = rows @ weight + bias
                rows = torch.tanh(rows) if layer == layers[-1] else torch.relu(rows)
        actions: np.ndarray = rows.numpy()
        return actions

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Nothing to remember."""


def load(folder: Path) -> BcPolicy:
    """Loads a model folder of the BC family.

    Raises:
        BadInput: If a file is missing, damaged, or does not fit the configuration.
    """
    config = read_config(folder)
    try:
        limits, scale = config["limits"], config["cost_scale"]
        sizes = (config["observation_dim"] + (scale is not None), *config["hidden"], config["action_dim"])
        names = [f"limit-{limit:g}" for limit in limits] or ["policy"]
        networks = Networks(len(names), sizes, torch.Generator())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder / 'config.json'}: not a BC configuration ({error!r}); train it again") from None
    shapes = {name: value.shape for name, value in networks.one(0).items()}
    parts = [read_tensors(folder / f"{name}.safetensors", shapes) for name in names]
    networks.load_state_dict({key: torch.cat([part[key] for part in parts]) for key in shapes})
    return BcPolicy(config, networks)
