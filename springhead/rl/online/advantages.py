"""Advantage estimates, and an iteration's transitions laid out for the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.distributions import Normal

Doubles = npt.NDArray[np.float64]


def gae(
    signals: Doubles,
    values: Doubles,
    next_values: Doubles,
    terminals: npt.NDArray[np.bool_],
    discount: float,
    lam: float,
) -> Doubles:
    """Generalised advantage estimates of one whole episode (Schulman et al. 2016, eq. 16).

    Args:
        signals: Rewards or costs, (T,).
        values: Value of each observation, (T,).
        next_values: Value of each successor, (T,); at a truncated end this is the bootstrap value.
        terminals: (T,); True removes the successor's value, because nothing follows.
        discount: Discount factor.
        lam: Weight decay of longer-horizon errors.

    Returns:
        Advantages (T,). Adding ``values`` gives the value targets.
    """
    errors = signals + discount * np.where(terminals, 0.0, next_values) - values
    advantages = np.empty_like(errors)
    carry = 0.0
    for step in range(len(errors) - 1, -1, -1):
        carry = errors[step] + discount * lam * carry
        advantages[step] = carry
    return advantages


def standardise(values: torch.Tensor) -> torch.Tensor:
    """Values with mean 0 and standard deviation 1; constant ones become 0."""
    return (values - values.mean()) / (values.std(correction=0) + 1e-8)


@dataclass(frozen=True)
class Batch:
    """One iteration's transitions, ready for the update; float32 tensors of n rows, in the order of the episodes.

    Attributes:
        observations: Normalised, (n, observation_dim).
        actions: As sampled, not yet clipped, (n, action_dim).
        means: Mean of the policy that acted, (n, action_dim).
        stds: Its standard deviation, (n, action_dim).
        log_probs: Log density of the actions under it, (n,).
        reward_advantages: In units of reward, (n,).
        cost_advantages: In units of cost, (n,).
        reward_targets: For the reward critic, in its own standardised units, (n,).
        cost_targets: For the cost critic, likewise, (n,).
        mean_length: Mean length of the episodes.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor
    log_probs: torch.Tensor
    reward_advantages: torch.Tensor
    cost_advantages: torch.Tensor
    reward_targets: torch.Tensor
    cost_targets: torch.Tensor
    mean_length: float

    def standardised(self) -> Batch:
        """The batch with both advantages standardised over all rows."""
        return replace(
            self,
            reward_advantages=standardise(self.reward_advantages),
            cost_advantages=standardise(self.cost_advantages),
        )

    @property
    def old(self) -> Normal:
        """The distributions of the policy that acted."""
        return Normal(self.means, self.stds, validate_args=False)
