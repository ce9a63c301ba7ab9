"""Expert policies as they act: NumPy arrays and a forward pass, so that a worker process needs no torch.

An expert is a small network of the observation. What it becomes depends on the policy's head:

| head | mean action | sampled action (n is standard normal noise) |
|---|---|---|
| ``gaussian`` | clip(m) | clip(m + s n) |
| ``bounded-gaussian`` | tanh(m) | clip(tanh(m) + s n) |
| ``squashed-gaussian`` | tanh(m) | tanh(m + s n) |

Here m is the network's output and s the deviation: a free parameter, or further outputs of the network. A
deterministic policy with exploration noise (DDPG) is a ``bounded-gaussian`` whose deviation is that noise's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.params import load

Floats = npt.NDArray[np.float32]
Head = Literal["gaussian", "bounded-gaussian", "squashed-gaussian"]
Activation = Literal["tanh", "relu"]

LOG_STD_RANGE = (-3.0, 0.5)
"""Usual bounds of the log deviation of actions; below -3 a Gaussian policy stops exploring for good."""

_NOISE_BLOCK = 64
"""Steps of noise drawn at once. The stream does not depend on it."""


@dataclass(frozen=True)
class ExpertConfig:
    """What ``policy.json`` holds: everything beside the weights that acting needs, and where it came from.

    Attributes:
        task: Task name.
        algorithm: The online algorithm, for instance ``ppo-lag``.
        cost_limit: The cost limit in force when the policy was saved.
        seed: The training run's seed.
        env_steps: Environment steps trained so far.
        observation_mean: Subtracted from observations, (observation_dim,).
        observation_std: Then divided by, (observation_dim,).
        hidden: Sizes of the network's hidden layers.
        action_dim: Length of an action.
        head: What the network's output becomes; see the module.
        activation: Between the layers.
        state_dependent_std: Whether the last layer gives log deviations too, after the means; otherwise they are the
            tensor ``log_std``.
        log_std_range: Bounds put on the log deviation.
    """

    task: str
    algorithm: str
    cost_limit: float
    seed: int
    env_steps: int
    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]
    hidden: tuple[int, ...]
    action_dim: int
    head: Head = "gaussian"
    activation: Activation = "tanh"
    state_dependent_std: bool = False
    log_std_range: tuple[float, float] = LOG_STD_RANGE

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights: layers ``net.0``, ``net.2``, ... and a free ``log_std``."""
        outputs = self.action_dim * (2 if self.state_dependent_std else 1)
        sizes = [len(self.observation_mean), *self.hidden, outputs]
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(len(sizes) - 1):
            shapes[f"net.{2 * layer}.weight"] = (sizes[layer + 1], sizes[layer])
            shapes[f"net.{2 * layer}.bias"] = (sizes[layer + 1],)
        if not self.state_dependent_std:
            shapes["log_std"] = (self.action_dim,)
        return shapes


def noise_generator(episode_seed: int) -> np.random.Generator:
    """The generator of one episode's action noise: a function of the episode's reset seed alone."""
    return np.random.default_rng([episode_seed, 1])


def episode_noise(episode_seed: int, steps: int, action_dim: int) -> Floats:
    """The standard normal noise (steps, action_dim) that a sampling policy used in an episode, to compute it again."""
    return noise_generator(episode_seed).standard_normal((steps, action_dim), dtype=np.float32)


class ExpertPolicy:
    """A trained online policy, for roll-outs; it can be pickled.

    Args:
        config: The policy's facts.
        weights: Its arrays, float32, as :meth:`ExpertConfig.weight_shapes` says. They are kept, not copied.
        episode_seeds: None acts by the mean. Otherwise actions are sampled, row i with the noise of
            ``episode_seeds[i]``, so that an episode does not depend on its neighbours in the batch.

    Raises:
        BadInput: If a weight is missing, unknown, misshaped, not float32 or not finite.
    """

    def __init__(
        self, config: ExpertConfig, weights: Mapping[str, Floats], episode_seeds: Sequence[int] | None = None
    ) -> None:
        _check(config, weights)
        self.config = config
        self.weights = dict(weights)
        self.task = config.task
        self.algorithm = config.algorithm
        self.observation_dim = len(config.observation_mean)
        self.action_dim = config.action_dim
        self._episode_seeds = None if episode_seeds is None else tuple(int(seed) for seed in episode_seeds)
        self._mean = np.asarray(config.observation_mean, dtype=np.float32)
        self._std = np.asarray(config.observation_std, dtype=np.float32)
        layers = range(0, 2 * len(config.hidden) + 1, 2)
        # Transposed once and laid out in rows: a product with a transposed view is slower for few rows.
        self._layers = [
            (np.ascontiguousarray(weights[f"net.{i}.weight"].T), np.asarray(weights[f"net.{i}.bias"])) for i in layers
        ]
        log_std = weights.get("log_std")
        self._free_std = None if log_std is None else np.exp(np.clip(log_std, *config.log_std_range))
        self._generators: list[np.random.Generator] = []
        self._noise: Floats = np.empty((0, 0, self.action_dim), dtype=np.float32)
        self._step = 0

    def with_seeds(self, episode_seeds: Sequence[int] | None) -> ExpertPolicy:
        """The same policy, sampling with these seeds, or acting by its mean if None."""
        return ExpertPolicy(self.config, self.weights, episode_seeds)

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Starts new episodes; an expert has one cost limit built in, so the one asked for is not used."""
        self._generators = [noise_generator(seed) for seed in (self._episode_seeds or ())[:num_envs]]
        self._step = 0

    def mean_and_std(self, observations: Floats) -> tuple[Floats, Floats]:
        """The distribution's parameters before a squashing head, at raw observations.

        Args:
            observations: (n, observation_dim).

        Returns:
            Means (n, action_dim), through tanh where the head is bounded, and deviations (n, action_dim).
        """
        rows: Floats = (observations - self._mean) / self._std
        for weight, bias in self._layers[:-1]:
            rows = rows @ weight
            rows += bias
            rows = np.tanh(rows, out=rows) if self.config.activation == "tanh" else np.maximum(rows, 0.0, out=rows)
        weight, bias = self._layers[-1]
        outputs = rows @ weight + bias
        mean: Floats = outputs[:, : self.action_dim]
        std: Floats
        if self._free_std is None:
            std = np.exp(np.clip(outputs[:, self.action_dim :], *self.config.log_std_range))
        else:
            std = np.broadcast_to(self._free_std, mean.shape)
        if self.config.head == "bounded-gaussian":
            mean = np.tanh(mean)
        return mean, std

    def act(self, observations: Floats) -> Floats:
        """Maps raw observations (num_envs, observation_dim) to actions (num_envs, action_dim) in [-1, 1]."""
        actions, std = self.mean_and_std(observations)
        if self._generators:
            rows = len(self._generators)
            actions[:rows] += std[:rows] * self._next_noise()
        if self.config.head == "squashed-gaussian":
            return np.tanh(actions)
        return actions.clip(-1.0, 1.0)

    def observe(self, rewards: Floats, costs: Floats) -> None:
        """Nothing to remember: the policy is memoryless."""

    def _next_noise(self) -> Floats:
        """The next step's noise (rows, action_dim), drawn for many steps at once because a draw has a fixed price."""
        at = self._step % _NOISE_BLOCK
        if at == 0:
            shape = (_NOISE_BLOCK, self.action_dim)
            blocks = [generator.standard_normal(shape, dtype=np.float32) for generator in self._generators]
            self._noise = np.stack(blocks, axis=1)
        self._step += 1
        noise: Floats = self._noise[at]
        return noise


def _check(config: ExpertConfig, weights: Mapping[str, Floats]) -> None:
    expected = config.weight_shapes()
    found = {name: value.shape for name, value in weights.items()}
    if found != expected:
        raise BadInput(f"weights of the shapes {found} where the policy's configuration asks for {expected}")
    for name, value in weights.items():
        if value.dtype != np.float32:
            raise BadInput(f"weight {name} is not float32 but {value.dtype}")
        if not np.isfinite(value).all():
            where = f"task {config.task}, algorithm {config.algorithm}, {config.env_steps} environment steps"
            raise BadInput(
                f"{where}: weight {name} holds a number that is not finite; the training has diverged. Lower the "
                "learning rates or the step size"
            )


def save_expert(folder: Path, policy: ExpertPolicy) -> None:
    """Writes ``policy.safetensors`` and ``policy.json`` into a new folder."""
    folder.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(value) for name, value in policy.weights.items()}, folder / _WEIGHTS)
    write_json(folder / _CONFIG, asdict(policy.config))


def load_expert(folder: Path, episode_seeds: Sequence[int] | None = None) -> ExpertPolicy:
    """Loads a policy saved by :func:`save_expert`.

    Args:
        folder: The policy folder.
        episode_seeds: As for :class:`ExpertPolicy`.

    Returns:
        The policy, ready for ``run_episodes``.

    Raises:
        BadInput: If the folder's files are missing, damaged or do not fit each other.
    """
    config = load(ExpertConfig, read_json(folder / _CONFIG), str(folder / _CONFIG))
    path = folder / _WEIGHTS
    try:
        return ExpertPolicy(config, load_file(path), episode_seeds)
    except (OSError, SafetensorError, BadInput) as error:
        raise BadInput(f"{path}: not this policy's weights ({error}); train the expert again") from error


_WEIGHTS = "policy.safetensors"
_CONFIG = "policy.json"
