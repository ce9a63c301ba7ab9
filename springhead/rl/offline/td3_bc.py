"""TD3+BC: TD3 with the behaviour's actions as a regulariser.

Source: Fujimoto and Gu 2021, "A Minimalist Approach to Offline Reinforcement Learning". Twin delayed critics of TD3
(equations 1 and 2); the actor (equation 3) maximises w Q(s, pi(s)) - (pi(s) - a)², where w = alpha / mean |Q| puts both
terms on one scale (equation 4). Observations are normalised by the data's mean and deviation (section 4).

An offline method without a constraint: it sees no costs. Here it is a baseline for CDE.

Deviations:
  1. An episode cut by its horizon is bootstrapped through (``timeouts``). The authors' loader leaves its last step out.
  2. ``reward_scale`` multiplies rewards (1: as they are); the weight w makes the actor indifferent to it.
  3. A constant component of the observations is left as large as it is; the authors add 1e-3 to each deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from springhead.bounds import above_zero, at_least, fraction
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Batch, Flat, Sampler, going_on, moments
from springhead.rl.offline.contract import Generators, Member, Settings
from springhead.rl.offline.stacked import MLP, Values, frozen_copy, pair, polyak
from springhead.rl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TD3BCSettings(Settings):
    """Hyper-parameters of TD3+BC; the paper's are the defaults (its table 3)."""

    batch_size: int = 256
    learning_rate: float = 3e-4
    """Of both Adams."""
    discount: float = 0.99
    tau: float = 0.005
    """How far the targets move at each update of the actor."""
    policy_noise: float = 0.2
    """Deviation of the noise on the target's actions."""
    noise_clip: float = 0.5
    """Where that noise is cut."""
    policy_delay: int = 2
    """Updates of the critics for each of the actor."""
    alpha: float = 2.5
    """Weight of the value against imitation."""
    normalise: bool = True
    """Normalise observations."""
    reward_scale: float = 1.0
    timeouts: Literal["bootstrap", "terminal"] = "bootstrap"
    """Whether a state after the horizon has a value, or the horizon ends an episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "learning_rate", "alpha", "tau", "reward_scale")
        at_least(1, self, "policy_delay")
        at_least(0, self, "policy_noise", "noise_clip")
        fraction(self, "discount", "tau")


class TD3BC:
    """Actor, twin critics and their targets of all members."""

    def __init__(self, name: str, data: Flat, task: Task, settings: TD3BCSettings, members: Sequence[Member]) -> None:
        self.members, self.task, self.settings = members, task, settings
        seeds = [member.seed for member in members]
        self.moments = moments(data) if settings.normalise else None

        def networks(weights: Generators) -> tuple[MLP, Values]:
            actor = MLP(weights, [task.observation_dim, *settings.hidden, task.action_dim], output="tanh")
            return actor, Values(weights, [task.observation_dim + task.action_dim, *settings.hidden])

        self.actor, self.critics = networks(Generators(seeds))
        target_actor, target_critics = networks(Generators(seeds))
        self.target_actor = frozen_copy(self.actor, target_actor)
        self.target_critics = frozen_copy(self.critics, target_critics)
        named = {"actor": self.actor, "critics": self.critics}
        targets = {"target_actor": self.target_actor, "target_critics": self.target_critics}
        self.modules: nn.Module = nn.ModuleDict({**named, **targets})
        self.modules.register_buffer("actor_loss", torch.zeros(len(members)))  # the last one, where a step has none
        self.modules.to(settings.device)
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

    def targets(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Targets of the critics, (members, batch): r + gamma min_i Q'_i(s', pi'(s') + clipped noise).

        Args:
            batch: Transitions.
            noise: Standard normal, (members, batch, action_dim).
        """
        settings = self.settings
        cut = (noise * settings.policy_noise).clamp(-settings.noise_clip, settings.noise_clip)
        actions = (self.target_actor(batch.next_observations) + cut).clamp(-1.0, 1.0)
        following: torch.Tensor = self.target_critics(pair(batch.next_observations, actions)).amin(1)
        return batch.rewards + settings.discount * going_on(batch, settings.timeouts) * following

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the critics and, every ``policy_delay`` steps, one of the actor and the targets."""
        settings = self.settings
        batch = self.sampler.draw()
        with torch.no_grad():
            noise = self.generators["batches"].normal(settings.batch_size, self.task.action_dim)
            wanted = self.targets(batch, noise)
        values = self.critics(pair(batch.observations, batch.actions))
        errors = (values - wanted.unsqueeze(1)).square().mean(2).sum(1)
        self.optimisers["critics"].zero_grad()
        errors.sum().backward()
        self.optimisers["critics"].step()
        if step % settings.policy_delay == 0:
            actions = self.actor(batch.observations)
            value = self.critics(pair(batch.observations, actions), frozen=True)[:, 0]
            weight = settings.alpha / value.detach().abs().mean(1)
            loss = -weight * value.mean(1) + (actions - batch.actions).square().mean(dim=(1, 2))
            self.optimisers["actor"].zero_grad()
            loss.sum().backward()
            self.optimisers["actor"].step()
            polyak(self.target_actor, self.actor, settings.tau)
            polyak(self.target_critics, self.critics, settings.tau)
            self.modules.get_buffer("actor_loss").copy_(loss.detach())
        return {
            "critic_loss": errors.detach(),
            "policy_loss": self.modules.get_buffer("actor_loss").clone(),
            "value": values.detach().mean(dim=(1, 2)),
        }

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The actor of one member."""
        return self.actor.member(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes the actor."""
        return actor_config(self.task, self.settings.hidden, moments=self.moments)
