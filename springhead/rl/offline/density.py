"""What OptiDICE and CDE share: the data's preparation, and the policy from ratios of visitations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from springhead.bounds import OutOfRange, above_zero, at_least, below_one
from springhead.errors import BadInput
from springhead.rl.offline.batches import Batch, Flat, Sampler, moments
from springhead.rl.offline.contract import Generators, Settings
from springhead.rl.offline.gaussian import SquashedGaussian, log_slope
from springhead.rl.offline.mixture import Mixture, MixturePolicy
from springhead.rl.tasks import Task

MEAN_BOUND = 7.24
"""Of the policy's mean before tanh; tanh of it is 1 - 1e-6."""
POLICY_LOG_STD = (-5.0, 2.0)
"""Bounds of the log deviations of the policy and of the behaviour policy."""

LogRatio = Callable[[torch.Tensor], torch.Tensor]
"""From actions (members, batch, action_dim) at the batch's observations to log ratios (members, batch)."""


@dataclass(frozen=True, kw_only=True)
class DensitySettings(Settings):
    """Hyper-parameters that both methods have."""

    alpha: float = 0.001
    """Weight of the divergence from the data."""
    discount: float = 0.99
    """Discount factor, below 1: the first states count by what it lacks to 1."""
    reward_scale: float = 0.1
    """Standardised rewards are multiplied by this."""
    learning_rate: float = 3e-4
    """Of Adam, for all networks and multipliers."""
    warm_up: float = 0.2
    """Fraction of the steps in which ratios and behaviour policy are learned, but no policy yet; some must be left."""
    extraction: Literal["info-projection", "weighted-bc"] = "info-projection"
    """How the policy is made from the ratios."""
    components: int = 3
    """Gaussians in the behaviour policy's mixture."""
    entropy: bool = True
    """Keep the policy's entropy near -|A| by a temperature that adapts."""
    weighting: Literal["each", "released"] = "each"
    """Weighted imitation: a weight for each action, or the mean of all, as the released CDE has it."""
    policy_data: Literal["all", "successes"] = "all"
    """States that the policy is projected at: all, or those of episodes whose last reward is above 0."""

    starts: Literal["episodes", "states"] = "episodes"
    """What stands for the distribution of initial states: the first states of the episodes, or all states of the data.
    Take all where a few long episodes start at few places and the policy may start anywhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "alpha", "reward_scale", "learning_rate")
        at_least(1, self, "components")
        below_one(self, "discount", "warm_up")
        if self.warm_up_steps >= self.steps:
            raise OutOfRange(
                f"warm_up is {self.warm_up} of {self.steps} steps, which leaves none for the policy; use less"
            )
        if self.policy_data == "successes" and self.extraction == "weighted-bc":
            raise OutOfRange(
                "policy_data is 'successes', which chooses states of the projection; weighted-bc has none: use "
                "policy_data 'all', or extraction 'info-projection'"
            )

    @property
    def warm_up_steps(self) -> int:
        """The steps before the first one of the policy."""
        return round(self.warm_up * self.steps)


class Prepared(NamedTuple):
    """Data as the two methods see them."""

    sampler: Sampler
    """Without the transitions at the horizon. The methods know no costs: that column holds the weight of a
    transition's state in policy extraction, of mean 1 over the episodes it is made for."""
    moments: tuple[torch.Tensor, torch.Tensor]
    """Mean and deviation of each component of the observations, by which they are standardised."""


def prepare(name: str, data: Flat, settings: DensitySettings, generators: Generators) -> Prepared:
    """Standardises observations and rewards and leaves out what happened at the horizon.

    Args:
        name: The algorithm, for messages.
        data: The data set.
        settings: Batch size, reward scale and choices of states.
        generators: Draw the batches.

    Raises:
        BadInput: If every episode is a single step that was cut by the horizon.
    """
    kept = ((data.terminals > 0) | (data.timeouts == 0)).nonzero().squeeze(1)
    if not len(kept):
        raise BadInput(
            f"{name}: every transition is cut by the horizon, none shows what follows; collect longer episodes"
        )
    rewards = data.rewards[kept]
    spread = rewards.std(correction=0)
    # Rewards that are all equal say nothing, whatever their unit.
    standard = (data.rewards - rewards.mean()) / (spread if spread > 0 else 1.0)
    weights = torch.ones_like(data.rewards)
    if settings.policy_data == "successes":
        succeeded = (data.rewards[data.starts + data.lengths - 1] > 0).repeat_interleave(data.lengths)
        # As in the released code, almost no success counts as none: then every state counts.
        if succeeded.sum() >= 10:
            weights = succeeded.float()
    standardised = replace(data, rewards=standard, costs=weights)
    pools, scaling = [kept] * len(generators), moments(data)
    starts = kept if settings.starts == "states" else None
    sampler = Sampler(
        standardised, generators, settings.batch_size, pools, settings.reward_scale, moments=scaling, starts=starts
    )
    return Prepared(sampler, scaling)


class Extraction(nn.Module):
    """Policy, behaviour policy and temperature of each member.

    Args:
        generators: Source of the initial weights.
        task: Dimensions.
        settings: Sizes, and how the policy is made.
        noise: Draws the policy's actions.
    """

    def __init__(self, generators: Generators, task: Task, settings: DensitySettings, noise: Generators) -> None:
        super().__init__()
        sizes = (task.observation_dim, task.action_dim, settings.hidden)
        self.actor = SquashedGaussian(generators, *sizes, POLICY_LOG_STD, MEAN_BOUND)
        self.projects = settings.extraction == "info-projection"
        self.behaviour: MixturePolicy | None = None
        if self.projects:
            self.behaviour = MixturePolicy(generators, *sizes, settings.components, POLICY_LOG_STD)
        self.log_temperature = nn.Parameter(torch.zeros(len(generators)))
        self.settings, self._noise, self._target = settings, noise, -float(task.action_dim)

    def imitate(self, batch: Batch) -> tuple[torch.Tensor, Mixture | None]:
        """The behaviour policy's loss (members,), 0 without one, and its mixtures without gradient."""
        if self.behaviour is None:
            return batch.rewards.new_zeros(len(batch.rewards)), None
        mixture = self.behaviour(batch.observations)
        return -mixture.log_prob(batch.actions).mean(-1), mixture.detached()

    def project(
        self, batch: Batch, ratios: torch.Tensor, log_ratio: LogRatio, mixture: Mixture | None, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of policy and temperature.

        Args:
            batch: Observations, and the weight of each in ``costs``.
            ratios: Of the batch's own actions (members, batch), for weighted imitation.
            log_ratio: Of any actions at the batch's observations.
            mixture: The behaviour policy at the observations, for projection.
            share: Weight of the behaviour policy in the mixed data distribution.

        Returns:
            The loss and the policy's entropy without gradient, each (members,).
        """
        noise = self._noise.normal(*batch.actions.shape[1:])
        actions, before, log_prob = self.actor.sample(batch.observations, noise)
        if mixture is None:
            if self.settings.weighting == "released":
                ratios = ratios.mean(-1, keepdim=True)
            loss = -(ratios * self.actor.log_prob(batch.observations, batch.actions)).mean(-1)
        else:
            own = log_prob + log_slope(before).sum(-1)
            divergence = own - share * mixture.log_prob_before(before)
            loss = -(batch.costs * (log_ratio(actions) - divergence)).mean(-1)
        entropy = -log_prob.mean(-1)
        if self.settings.entropy:
            loss = loss - self.log_temperature.detach().exp() * entropy
            loss = loss + self.log_temperature * (entropy.detach() - self._target)
        return loss, entropy.detach()


def flow(
    rewards: torch.Tensor, going_on: torch.Tensor, values: Sequence[torch.Tensor], discount: float
) -> torch.Tensor:
    """Advantages r + gamma v(s') - v(s), (members, batch), from ``values`` at s and s'."""
    now, following = values
    return rewards + discount * going_on * following - now
