"""Behaviour policies of several members: mixtures of Gaussians, squashed by tanh onto the actions' range [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from springhead.rl.offline.contract import Generators
from springhead.rl.offline.gaussian import log_slope, normal_log_prob
from springhead.rl.offline.stacked import MLP

_EDGE = 1.0 - 1e-6


class Mixture(NamedTuple):
    """Mixtures at a batch of observations: of K components over actions of A components, before tanh."""

    log_weights: torch.Tensor
    """(members, batch, K), normalised."""
    means: torch.Tensor
    """(members, batch, K, A)."""
    log_stds: torch.Tensor
    """(members, batch, K, A)."""

    def detached(self) -> Mixture:
        """The same without gradient."""
        return Mixture(*(part.detach() for part in self))

    def log_prob_before(self, before: torch.Tensor) -> torch.Tensor:
        """Log densities (members, batch) of values before tanh, (members, batch, A)."""
        each = normal_log_prob(before.unsqueeze(2), self.means, self.log_stds).sum(-1)
        return (self.log_weights + each).logsumexp(-1)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log densities (members, batch) of actions in [-1, 1]; those on the border count as just inside it."""
        before = torch.atanh(actions.clamp(-_EDGE, _EDGE))
        return self.log_prob_before(before) - log_slope(before).sum(-1)

    def spread(self) -> torch.Tensor:
        """Mean over the components of their standard deviations before tanh, (members, batch, A)."""
        return self.log_stds.exp().mean(2)


class MixturePolicy(nn.Module):
    """A network from observations to mixtures.

    Args:
        generators: Source of the initial weights.
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        hidden: Sizes of the hidden layers.
        components: Gaussians in a mixture.
        log_std_range: Bounds of their log deviations.
    """

    def __init__(
        self,
        generators: Generators,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        components: int,
        log_std_range: tuple[float, float],
    ) -> None:
        super().__init__()
        self.net = MLP(generators, [observation_dim, *hidden, components * (2 * action_dim + 1)])
        self.components, self.action_dim, self.log_std_range = components, action_dim, log_std_range

    def forward(self, observations: torch.Tensor) -> Mixture:
        """The mixtures at observations (members, batch, observation_dim)."""
        width = self.components * self.action_dim
        weights, means, log_stds = self.net(observations).split([self.components, width, width], dim=-1)
        shape = (self.components, self.action_dim)
        return Mixture(
            weights.log_softmax(-1),
            means.unflatten(-1, shape),
            log_stds.unflatten(-1, shape).clamp(*self.log_std_range),
        )
