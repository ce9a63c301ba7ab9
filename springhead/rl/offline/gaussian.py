"""Gaussian policies of several members, squashed by tanh onto the actions' range [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from springhead.rl.offline.contract import Generators
from springhead.rl.offline.stacked import MLP

LOG_STD_RANGE = (-20.0, 2.0)
"""Bounds of the log deviation, those of SAC's and OSRL's actors."""

_EDGE = 1.0 - 1e-6


class SquashedGaussian(nn.Module):
    """tanh of a Gaussian whose mean and deviation are a network's.

    Args:
        generators: Source of the initial weights.
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        hidden: Sizes of the hidden layers.
        log_std_range: Bounds of the log deviation.
        mean_bound: Bound of the mean before tanh; None for no bound.
        last_bound: As for :class:`~springhead.rl.offline.stacked.MLP`.
    """

    def __init__(
        self,
        generators: Generators,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        log_std_range: tuple[float, float] = LOG_STD_RANGE,
        mean_bound: float | None = None,
        last_bound: float | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(generators, [observation_dim, *hidden, 2 * action_dim], last_bound=last_bound)
        self.action_dim, self.log_std_range, self.mean_bound = action_dim, log_std_range, mean_bound

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log deviations before tanh, (members, batch, action_dim), at (members, batch, observation_dim)."""
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        if self.mean_bound is not None:
            mean = mean.clamp(-self.mean_bound, self.mean_bound)
        return mean, log_std.clamp(*self.log_std_range)

    def sample(
        self, observations: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws actions, with gradients to the network.

        Args:
            observations: (members, batch, observation_dim).
            noise: Standard normal, (members, batch, action_dim).

        Returns:
            Actions in [-1, 1], their values before tanh, and log densities of the actions (members, batch).
        """
        mean, log_std = self(observations)
        before = mean + log_std.exp() * noise
        return before.tanh(), before, (normal_log_prob(before, mean, log_std) - log_slope(before)).sum(-1)

    def log_prob(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log densities (members, batch) of actions in [-1, 1]; those on the border count as just inside it."""
        mean, log_std = self(observations)
        before = torch.atanh(actions.clamp(-_EDGE, _EDGE))
        return (normal_log_prob(before, mean, log_std) - log_slope(before)).sum(-1)

    def acting(self, member: int) -> dict[str, torch.Tensor]:
        """The tensors of the mean network of one member: tanh of it is the deterministic action."""
        tensors = self.net.member(member)
        last = len(self.net.weights) - 1
        for name in (f"weights.{last}", f"biases.{last}"):
            tensors[name] = tensors[name][..., : self.action_dim].contiguous()
        return tensors


def normal_log_prob(value: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log densities of independent normals, for each component."""
    return -0.5 * ((value - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)


def log_slope(before: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(x)²), the log derivative of tanh, without cancellation at large |x|."""
    return 2.0 * (math.log(2.0) - before - F.softplus(-2.0 * before))
