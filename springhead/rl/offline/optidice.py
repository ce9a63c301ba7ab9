"""OptiDICE: the policy whose visitation is best and close to the data's, from the ratio of the two visitations.

Source: Lee, Jeon, Lee, Pineau, Kim 2021, "OptiDICE: Offline Policy Optimization via Stationary Distribution Correction
Estimation" (ICML). Its text was not at hand, so equations bear no numbers: the CDE authors' code, which contains it,
was followed, read and not copied. With the advantage
A = r + gamma v(s') - v(s), the soft chi-square f, w(x) = (f')^-1((x - eta) / alpha) and its conjugate f*:

  v       minimises (1 - gamma) E_p0[v] + alpha E_D[f*((A - eta) / alpha)]
  eta     minimises eta (1 - E_D[w(A)]): the ratios' mean is 1
  e       minimises E_D[(e(s, a) - A)^2], which averages over s'
  policy  minimises E_{s~D, a~pi}[log pi(a|s) - log pi_D(a|s) - log w(e(s, a))]   (information projection), or
          -E_D[w(e(s, a)) log pi(a|s)]                                            (weighted imitation)

pi_D is a squashed mixture of Gaussians that imitates the data. Deviations, reasons in ``docs/methods/optidice.md``:
  1. Data are prepared as for CDE: standardised observations and rewards, transitions at the horizon left out, so that a
     comparison of the two shows what pessimism does.
  2. No gradient penalty on v and e.
  3. All networks take their step together, from one forward pass.
  4. The policy's entropy is kept near -|A|, as in CDE's code (``entropy``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from springhead.rl.offline import dice
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Flat
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.density import DensitySettings, Extraction, flow, prepare
from springhead.rl.offline.stacked import Values, pair
from springhead.rl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class OptiDICESettings(DensitySettings):
    """Hyper-parameters of OptiDICE."""


class OptiDICE:
    """Value, advantage, normaliser and policy of each member."""

    def __init__(
        self, name: str, data: Flat, task: Task, settings: OptiDICESettings, members: Sequence[Member]
    ) -> None:
        self.members, self.task, self.settings = members, task, settings
        device, seeds = settings.device, [member.seed for member in members]
        self.generators = {
            "batches": Generators(seeds, device, stream=1),
            "noise": Generators(seeds, device, stream=2),
        }
        self.sampler, self.moments = prepare(name, data, settings, self.generators["batches"])
        weights = Generators(seeds)
        self.value = Values(weights, [task.observation_dim, *settings.hidden], 1, last_bound=3e-3)
        self.advantage = Values(weights, [task.observation_dim + task.action_dim, *settings.hidden], 1, last_bound=3e-3)
        self.extraction = Extraction(weights, task, settings, self.generators["noise"])
        parts = {"value": self.value, "advantage": self.advantage, "extraction": self.extraction}
        self.modules: nn.Module = nn.ModuleDict(parts)
        self.eta = nn.Parameter(torch.zeros(len(seeds)))
        self.modules.register_parameter("eta", self.eta)
        self.modules.to(device)
        adam = torch.optim.Adam(self.modules.parameters(), lr=settings.learning_rate, fused=True)
        self.optimisers = {"adam": adam}
        self.first_policy_step = 1 + settings.warm_up_steps

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of every network; the policy joins after the warm-up."""
        settings, adam = self.settings, self.optimisers["adam"]
        batch, first = self.sampler.draw(), self.sampler.draw_initial()
        values = self.value(torch.cat([batch.observations, batch.next_observations, first], dim=1))[:, 0]
        *along, start = values.split(settings.batch_size, dim=-1)
        advantages = flow(batch.rewards, 1.0 - batch.terminals, along, settings.discount)
        eta = self.eta.detach()[:, None]
        slopes = (advantages - eta) / settings.alpha
        value_loss = (1 - settings.discount) * start.mean(-1) + settings.alpha * dice.conjugate(slopes).mean(-1)
        mean_ratio = dice.ratio_of(slopes.detach()).mean(-1)
        estimates = self.advantage(pair(batch.observations, batch.actions))[:, 0]
        errors = (estimates - advantages.detach()).square().mean(-1)
        imitation, mixture = self.extraction.imitate(batch)
        loss = value_loss + self.eta * (1 - mean_ratio) + errors + imitation
        figures = {"value_loss": value_loss, "advantage_error": errors, "mean_ratio": mean_ratio, "eta": self.eta}
        policy_loss = entropy = torch.zeros_like(loss)
        if step >= self.first_policy_step:

            def log_ratio(actions: torch.Tensor) -> torch.Tensor:
                known = self.advantage(pair(batch.observations, actions), frozen=True)[:, 0]
                return dice.log_ratio_of((known - eta) / settings.alpha)

            ratios = dice.ratio_of((estimates.detach() - eta) / settings.alpha)
            policy_loss, entropy = self.extraction.project(batch, ratios, log_ratio, mixture)
        adam.zero_grad()
        (loss + policy_loss).sum().backward()
        found = {name: figure.detach().clone() for name, figure in figures.items()}
        adam.step()
        return {**found, "behaviour_loss": imitation.detach(), "policy_loss": policy_loss.detach(), "entropy": entropy}

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The mean network of one member's policy."""
        return self.extraction.actor.acting(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes its network."""
        return actor_config(self.task, self.settings.hidden, moments=self.moments)
