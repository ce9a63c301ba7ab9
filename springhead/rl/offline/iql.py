"""Implicit Q-learning (IQL).

Source: Kostrikov, Nair and Levine 2021, "Offline Reinforcement Learning with Implicit Q-Learning". A state value is
fitted to the upper expectile of the critics' values of the data's own actions (equation 5), the critics to
r + gamma V(s') (equation 6), and the policy imitates the data's actions weighted by exp(beta (Q - V)), cut at 100
(equation 7): no action outside the data is ever evaluated.

An offline method without a constraint: it sees no costs. Here it is a baseline for CDE.

Deviations:
  1. The likelihood is that of a tanh-squashed Gaussian by default; ``squashed: false`` is the authors' Gaussian whose
     mean is bounded by tanh. Its deviation depends on the state in both; the authors' does not.
  2. An episode cut by its horizon is bootstrapped through (``timeouts``). The authors' loader leaves its last step out.
  3. Critics and policy see V from before its step of the same batch, so that one pass backwards serves all; in the
     authors' code V takes its step first.
  4. Without ``normalise`` and ``reward_scale`` observations and rewards are the data's; the authors scale the rewards
     of each suite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from springhead.bounds import OutOfRange, above_zero, fraction
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Flat, Sampler, going_on, moments
from springhead.rl.offline.contract import Generators, Member, Settings
from springhead.rl.offline.gaussian import SquashedGaussian, normal_log_prob
from springhead.rl.offline.stacked import Values, frozen_copy, pair, polyak
from springhead.rl.tasks import Task

WEIGHT_CAP = 100.0
"""Largest weight of an action in the policy's loss."""


@dataclass(frozen=True, kw_only=True)
class IQLSettings(Settings):
    """Hyper-parameters of IQL; the paper's for locomotion are the defaults."""

    batch_size: int = 256
    learning_rate: float = 3e-4
    """Of all Adams; the policy's falls to 0 along a cosine."""
    discount: float = 0.99
    tau: float = 0.005
    """How far the target critics move at each step."""
    expectile: float = 0.7
    """Of the state value; 0.9 in AntMaze."""
    beta: float = 3.0
    """Inverse temperature of the policy's weights; 10 in AntMaze."""
    normalise: bool = False
    """Normalise observations."""
    reward_scale: float = 1.0
    timeouts: Literal["bootstrap", "terminal"] = "bootstrap"
    """Whether a state after the horizon has a value, or the horizon ends an episode."""
    squashed: bool = True
    """Whether the policy's likelihood is that of the squashed Gaussian."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "learning_rate", "beta", "tau", "reward_scale")
        fraction(self, "discount", "tau")
        if not 0.5 <= self.expectile < 1:
            raise OutOfRange(f"expectile is {self.expectile}; use at least 0.5 and below 1")


def expectile_loss(error: torch.Tensor, expectile: float) -> torch.Tensor:
    """|expectile - 1[u < 0]| u², element by element (equation 4)."""
    return torch.where(error < 0, 1 - expectile, expectile) * error.square()


class IQL:
    """Policy, state value, twin critics and their targets of all members."""

    def __init__(self, name: str, data: Flat, task: Task, settings: IQLSettings, members: Sequence[Member]) -> None:
        self.members, self.task, self.settings = members, task, settings
        seeds = [member.seed for member in members]
        self.moments = moments(data) if settings.normalise else None
        states, both, weights = task.observation_dim, task.observation_dim + task.action_dim, Generators(seeds)
        self.actor = SquashedGaussian(weights, states, task.action_dim, settings.hidden, log_std_range=(-5.0, 2.0))
        self.value = Values(weights, [states, *settings.hidden], ensemble=1)
        self.critics = Values(weights, [both, *settings.hidden])
        self.target = frozen_copy(self.critics, Values(Generators(seeds), [both, *settings.hidden]))
        named = {"actor": self.actor, "value": self.value, "critics": self.critics}
        self.modules: nn.Module = nn.ModuleDict({**named, "target": self.target}).to(settings.device)
        self.optimisers = {
            key: torch.optim.Adam(module.parameters(), lr=settings.learning_rate, fused=True)
            for key, module in named.items()
        }
        self.generators = {"batches": Generators(seeds, settings.device, stream=1)}
        self.sampler = Sampler(
            data,
            self.generators["batches"],
            settings.batch_size,
            reward_scale=settings.reward_scale,
            moments=self.moments,
        )

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the state value, the critics, the policy and the target."""
        settings = self.settings
        batch = self.sampler.draw()
        inputs = pair(batch.observations, batch.actions)
        with torch.no_grad():
            wanted_value = self.target(inputs).amin(1)
            following = self.value(batch.next_observations)[:, 0]
            wanted = batch.rewards + settings.discount * going_on(batch, settings.timeouts) * following
        value = self.value(batch.observations)[:, 0]
        advantage = wanted_value - value
        value_loss = expectile_loss(advantage, settings.expectile).mean(1)
        critic_loss = (self.critics(inputs) - wanted.unsqueeze(1)).square().mean(2).sum(1)
        weight = (settings.beta * advantage.detach()).exp().clamp(max=WEIGHT_CAP)
        actor_loss = -(weight * self._log_prob(batch.observations, batch.actions)).mean(1)
        for group in self.optimisers["actor"].param_groups:
            group["lr"] = settings.learning_rate * cosine(step, settings.steps)
        # The three losses share no parameter, so one pass backwards serves all.
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
        (value_loss + critic_loss + actor_loss).sum().backward()
        for optimiser in self.optimisers.values():
            optimiser.step()
        polyak(self.target, self.critics, settings.tau)
        return {
            "value_loss": value_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "policy_loss": actor_loss.detach(),
            "value": value.detach().mean(1),
        }

    def _log_prob(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        if self.settings.squashed:
            return self.actor.log_prob(observations, actions)
        mean, log_std = self.actor(observations)
        return normal_log_prob(actions, mean.tanh(), log_std).sum(-1)

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The policy's mean network of one member."""
        return self.actor.acting(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes the policy."""
        return actor_config(self.task, self.settings.hidden, moments=self.moments)


def cosine(step: int, steps: int) -> float:
    """A factor on the learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
