"""Conservative Q-learning (CQL) on soft actor-critic.

Source: Kumar, Zhou, Tucker and Levine 2020, "Conservative Q-Learning for Offline Reinforcement Learning", CQL(H) of
equation 4: beside the squared Bellman error, each critic minimises alpha (log sum_a exp Q(s, a) - Q(s, a_data)). The
sum is estimated by importance sampling from uniform actions and from the policy's at s and at s' (appendix F),
``samples`` of each.
The actor and its temperature are those of SAC (Haarnoja et al. 2018, equation 18 for the temperature).

An offline method without a constraint: it sees no costs. Here it is a baseline for CDE.

Deviations:
  1. The weight alpha is fixed; the Lagrangian version with its threshold is ``threshold`` (None: off).
  2. The Bellman targets have no entropy term, as in the authors' code; ``entropy_in_target`` adds it.
  3. The squared Bellman error has no factor of one half, as in the authors' code; equation 4 has one, so an alpha here
     weighs half as much as the paper's.
  4. An episode cut by its horizon is bootstrapped through (``timeouts``). The authors' loader leaves its last step out.
  5. All networks and multipliers take their step together, from one pass backwards; in the authors' code the
     temperature takes its step first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from springhead.bounds import OutOfRange, above_zero, at_least, finite, fraction
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Batch, Flat, Sampler, going_on, moments
from springhead.rl.offline.contract import Generators, Member, Settings
from springhead.rl.offline.gaussian import SquashedGaussian
from springhead.rl.offline.stacked import Values, frozen_copy, pair, polyak
from springhead.rl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class CQLSettings(Settings):
    """Hyper-parameters of CQL; those of the paper's appendix F for the gym tasks are the defaults."""

    batch_size: int = 256
    hidden: tuple[int, ...] = (256, 256, 256)
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005
    """How far the target critics move at each step."""
    alpha: float = 5.0
    """Weight of the conservative term, 0 for none; where ``threshold`` is given, its start, above 0."""
    threshold: float | None = None
    """The conservative gap that a learned weight keeps (the Lagrangian version)."""
    samples: int = 10
    """Actions of each of the three kinds by which the sum over actions is estimated."""
    entropy_in_target: bool = False
    imitation_steps: int = 0
    """Steps at first in which the actor maximises the likelihood of the data's actions instead of their value."""
    normalise: bool = False
    """Normalise observations."""
    reward_scale: float = 1.0
    timeouts: Literal["bootstrap", "terminal"] = "bootstrap"
    """Whether a state after the horizon has a value, or the horizon ends an episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "actor_learning_rate", "critic_learning_rate", "tau", "reward_scale")
        at_least(1, self, "samples")
        at_least(0, self, "alpha", "imitation_steps")
        finite(self, "threshold")
        fraction(self, "discount", "tau")
        if self.threshold is not None and not self.alpha:
            raise OutOfRange("alpha is 0, from which no weight can be learned; use more than 0, or no threshold")


class CQL:
    """Actor, temperature, twin critics and their targets of all members."""

    def __init__(self, name: str, data: Flat, task: Task, settings: CQLSettings, members: Sequence[Member]) -> None:
        self.members, self.task, self.settings = members, task, settings
        seeds, count = [member.seed for member in members], len(members)
        self.moments = moments(data) if settings.normalise else None
        both, weights = [task.observation_dim + task.action_dim, *settings.hidden], Generators(seeds)
        self.actor = SquashedGaussian(weights, task.observation_dim, task.action_dim, settings.hidden)
        self.critics = Values(weights, both)
        self.target = frozen_copy(self.critics, Values(Generators(seeds), both))
        self.log_temperature = nn.Parameter(torch.zeros(count))
        # Without any weight its logarithm is not used.
        self.log_alpha = nn.Parameter(torch.full((count,), math.log(settings.alpha or 1.0)))
        multipliers = nn.ParameterDict({"temperature": self.log_temperature, "alpha": self.log_alpha})
        self.modules: nn.Module = nn.ModuleDict(
            {"actor": self.actor, "critics": self.critics, "target": self.target, "multipliers": multipliers}
        ).to(settings.device)
        slow, fast = settings.actor_learning_rate, settings.critic_learning_rate
        self.optimisers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=slow, fused=True),
            "temperature": torch.optim.Adam([multipliers["temperature"]], lr=slow, fused=True),
            "critics": torch.optim.Adam(self.critics.parameters(), lr=fast, fused=True),
            "alpha": torch.optim.Adam([multipliers["alpha"]], lr=fast, fused=True),
        }
        self.generators = {"batches": Generators(seeds, settings.device, stream=1)}
        self.sampler = Sampler(
            data,
            self.generators["batches"],
            settings.batch_size,
            reward_scale=settings.reward_scale,
            moments=self.moments,
        )

    def gap(self, batch: Batch, values: torch.Tensor, random: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The conservative term without its weight, (members, ensemble): log sum_a exp Q(s, a) - Q(s, a_data).

        Args:
            batch: Transitions.
            values: The critics' values of the data's actions, (members, ensemble, batch).
            random: Uniform actions, (members, samples x batch, action_dim).
            noise: Standard normal for the policy's actions at s and s', (members, 2 x samples x batch, action_dim).
        """
        samples, half = self.settings.samples, random.shape[1]
        with torch.no_grad():
            here = batch.observations.repeat(1, samples, 1)
            there = batch.next_observations.repeat(1, samples, 1)
            now, _, log_now = self.actor.sample(here, noise[:, :half])
            then, _, log_then = self.actor.sample(there, noise[:, half:])
            log_density = torch.cat(
                [torch.full_like(log_now, -self.task.action_dim * math.log(2.0)), log_now, log_then], dim=1
            )
        actions = torch.cat([random, now, then], dim=1)
        seen = self.critics(pair(here.repeat(1, 3, 1), actions)) - log_density.unsqueeze(1)
        # (members, ensemble, 3 x samples, batch); the mean under the proposals, hence minus the log of their number.
        spread: torch.Tensor = seen.unflatten(2, (3 * samples, -1)).logsumexp(2) - math.log(3 * samples)
        return (spread - values).mean(2)

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the actor, the temperature, the critics, their weight and the target."""
        settings, draw = self.settings, self.generators["batches"]
        size, dim = settings.batch_size, self.task.action_dim
        batch = self.sampler.draw()
        noise = draw.normal(2 * size, dim)
        temperature = self.log_temperature.exp()
        actions, _, log_prob = self.actor.sample(batch.observations, noise[:, :size])
        if step <= settings.imitation_steps:
            gain = self.actor.log_prob(batch.observations, batch.actions)
        else:
            gain = self.critics(pair(batch.observations, actions), frozen=True).amin(1)
        actor_loss = (temperature.detach()[:, None] * log_prob - gain).mean(1)
        temperature_loss = -self.log_temperature.exp() * (log_prob.detach().mean(1) - dim)
        with torch.no_grad():
            following, _, log_following = self.actor.sample(batch.next_observations, noise[:, size:])
            value = self.target(pair(batch.next_observations, following)).amin(1)
            if settings.entropy_in_target:
                value = value - temperature[:, None] * log_following
            wanted = batch.rewards + settings.discount * going_on(batch, settings.timeouts) * value
        values = self.critics(pair(batch.observations, batch.actions))
        bellman = (values - wanted.unsqueeze(1)).square().mean(2)
        random = draw.uniform(settings.samples * size, dim, low=-1.0, high=1.0)
        gaps = self.gap(batch, values, random, draw.normal(2 * settings.samples * size, dim))
        alpha = self.log_alpha.exp().clamp(max=1e6) * (settings.alpha > 0)
        threshold = settings.threshold or 0.0
        critic_loss = (bellman + alpha.detach()[:, None] * (gaps - threshold)).sum(1)
        alpha_loss = -alpha * (gaps.detach() - threshold).sum(1)
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
        # The losses share no parameter that both change, so one pass backwards serves all.
        (actor_loss + temperature_loss + critic_loss + alpha_loss).sum().backward()
        for name, optimiser in self.optimisers.items():
            if name != "alpha" or settings.threshold is not None:
                optimiser.step()
        polyak(self.target, self.critics, settings.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "policy_loss": actor_loss.detach(),
            "gap": gaps.detach().mean(1),
            "value": values.detach().mean(dim=(1, 2)),
            "temperature": temperature.detach(),
        }

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The policy's mean network of one member."""
        return self.actor.acting(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes the policy."""
        return actor_config(self.task, self.settings.hidden, moments=self.moments)
