"""Networks of the online algorithms, and the policy folder that an expert is saved as."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.params import load

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

LOG_STD_RANGE = (-3.0, 0.5)
"""Bounds of the log standard deviation of actions; below -3 a Gaussian policy stops exploring for good."""


def mlp(sizes: Sequence[int], generator: torch.Generator, output_gain: float) -> nn.Sequential:
    """Builds a tanh multi-layer perceptron with orthogonal weights and zero biases.

    Args:
        sizes: Input size, hidden sizes, output size.
        generator: Source of the initial weights.
        output_gain: Gain of the last layer's weights; small for policies, 1 for values.

    Returns:
        Linear layers with tanh between them and none after the last.
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = index == len(sizes) - 2
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.orthogonal_(linear.weight, gain=output_gain if last else 2.0**0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class GaussianActor(nn.Module):
    """A Gaussian policy: its mean is a network of the observation, its deviation a free parameter.

    Args:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        hidden: Sizes of the hidden layers.
        generator: Source of the initial weights.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.net = mlp([observation_dim, *hidden, action_dim], generator, output_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), -0.5))

    def forward(self, observations: torch.Tensor) -> torch.distributions.Normal:
        """Returns the action distribution at normalised observations (batch, observation_dim)."""
        mean = self.net(observations)
        std = self.log_std.clamp(*LOG_STD_RANGE).exp().expand_as(mean)
        return torch.distributions.Normal(mean, std, validate_args=False)


@dataclass
class Moments:
    """Running mean and variance of vectors (parallel form of Chan et al. 1979), kept in float64."""

    mean: Doubles
    variance: Doubles
    count: float = 0.0

    @classmethod
    def of(cls, dim: int) -> Moments:
        """Mean 0 and variance 1 of vectors of length ``dim``, before any data."""
        return cls(np.zeros(dim), np.ones(dim))

    def update(self, rows: Doubles) -> None:
        """Takes the rows (n, dim) into account."""
        mean, variance, count = rows.mean(axis=0), rows.var(axis=0), float(len(rows))
        total = self.count + count
        shift = mean - self.mean
        between = shift**2 * self.count * count / total
        self.variance = (self.variance * self.count + variance * count + between) / total
        self.mean = self.mean + shift * count / total
        self.count = total

    @property
    def std(self) -> Doubles:
        """Standard deviation, at least 1e-3 so that a constant component cannot blow up."""
        return np.sqrt(np.maximum(self.variance, 1e-6))


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
        hidden: Sizes of the actor's hidden layers.
        action_dim: Length of an action.
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


class ExpertPolicy:
    """A trained online policy, for roll-outs.

    Args:
        config: The policy's facts.
        actor: Its network.
        episode_seeds: None acts by the mean. Otherwise actions are sampled, row i from a generator of its own
            seeded with ``episode_seeds[i]``, so that an episode does not depend on its neighbours in the batch.
    """

    def __init__(self, config: ExpertConfig, actor: GaussianActor, episode_seeds: Sequence[int] | None = None) -> None:
        self.config = config
        self.task = config.task
        self.algorithm = config.algorithm
        self.observation_dim = len(config.observation_mean)
        self.action_dim = config.action_dim
        self._actor = actor
        self._mean = np.asarray(config.observation_mean, dtype=np.float32)
        self._std = np.asarray(config.observation_std, dtype=np.float32)
        self._episode_seeds = episode_seeds
        self._generators: list[np.random.Generator] = []

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Starts new episodes; an expert has one cost limit built in, so the one asked for is not used."""
        seeds = self._episode_seeds or []
        self._generators = [np.random.default_rng([seed, 1]) for seed in seeds[:num_envs]]

    def act(self, observations: Floats) -> Floats:
        """Maps raw observations (num_envs, observation_dim) to actions (num_envs, action_dim) in [-1, 1]."""
        normalised = torch.from_numpy((observations - self._mean) / self._std)
        with torch.no_grad():
            distribution = self._actor(normalised)
        actions = distribution.mean.numpy()
        std = distribution.stddev.numpy()
        for row, generator in enumerate(self._generators):
            actions[row] += std[row] * generator.standard_normal(actions.shape[1], dtype=np.float32)
        return np.asarray(actions.clip(-1.0, 1.0), dtype=np.float32)

    def observe(self, rewards: Floats, costs: Floats) -> None:
        """Nothing to remember: the policy is memoryless."""


def save_expert(folder: Path, config: ExpertConfig, actor: GaussianActor) -> None:
    """Writes ``policy.safetensors`` and ``policy.json`` into a new folder."""
    folder.mkdir(parents=True)
    tensors = {name: value.detach().contiguous() for name, value in actor.state_dict().items()}
    save_file(tensors, str(folder / "policy.safetensors"))
    write_json(folder / "policy.json", {key: getattr(config, key) for key in ExpertConfig.__dataclass_fields__})


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
    path = folder / "policy.json"
    config = load(ExpertConfig, read_json(path), str(path))
    actor = GaussianActor(len(config.observation_mean), config.action_dim, config.hidden, torch.Generator())
    weights = folder / "policy.safetensors"
    try:
        actor.load_state_dict(load_file(str(weights)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BadInput(f"{weights}: not this policy's weights ({error}); train the expert again") from error
    return ExpertPolicy(config, actor, episode_seeds)
