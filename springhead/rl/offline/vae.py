"""The conditional variational auto-encoder of actions of BCQ, BEAR and CPQ (Fujimoto et al. 2019, appendix D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from springhead.rl.offline.contract import Generators
from springhead.rl.offline.stacked import MLP, pair

LOG_STD_RANGE = (-4.0, 15.0)
PRIOR_CLIP = 0.5
"""Latent variables drawn for decoding are cut here, so that decoded actions stay likely."""


class ActionVAE(nn.Module):
    """Encodes an action given the observation, and decodes it; one for each member.

    Args:
        generators: Source of the initial weights.
        observation_dim: Length of an observation.
        action_dim: Length of an action; the latent variable has twice its length.
        hidden: Sizes of the hidden layers of both networks.
    """

    def __init__(
        self, generators: Generators, observation_dim: int, action_dim: int, hidden: Sequence[int] = (400, 400)
    ) -> None:
        super().__init__()
        self.latent_dim = 2 * action_dim
        self.encoder = MLP(generators, [observation_dim + action_dim, *hidden, 2 * self.latent_dim])
        self.decoder = MLP(generators, [observation_dim + self.latent_dim, *hidden, action_dim])

    def encode(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log deviations of the latent variable, (members, batch, latent_dim)."""
        mean, log_std = self.encoder(pair(observations, actions)).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    def decode_raw(self, observations: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Actions before tanh, (members, batch, action_dim); ``latent`` is (members, batch, latent_dim)."""
        raw: torch.Tensor = self.decoder(pair(observations, latent))
        return raw

    def decode(self, observations: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Actions in (-1, 1)."""
        return self.decode_raw(observations, latent).tanh()

    def loss(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor, beta: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the decoded actions and beta times the divergence from the prior, both means over all.

        Args:
            observations: (members, batch, observation_dim).
            actions: (members, batch, action_dim).
            noise: Standard normal, (members, batch, latent_dim).
            beta: Weight of the divergence.

        Returns:
            The loss and the divergence of each transition, (members,) and (members, batch).
        """
        mean, log_std = self.encode(observations, actions)
        decoded = self.decode(observations, mean + log_std.exp() * noise)
        divergence = kl_from_prior(mean, log_std)
        return (decoded - actions).square().mean(dim=(1, 2)) + beta * divergence.mean(dim=1), divergence


def kl_from_prior(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Divergence of N(mean, std) from N(0, 1), averaged over the latent dimensions: (members, batch)."""
    return -0.5 * (1.0 + 2.0 * log_std - mean.square() - (2.0 * log_std).exp()).mean(dim=-1)
