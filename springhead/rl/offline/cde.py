"""CDE: conservative density estimation, OptiDICE with a bound on how often unseen actions may be visited.

Source: Cen, Liu, Wang, Yao, Lam, Zhao 2024, "Learning from Sparse Offline Datasets via Conservative Density
Estimation" (ICLR). Its text was not at hand, so equations bear no numbers: the authors' released code was followed,
read and not copied. The visitation d maximises
E_d[r] - alpha D_f(d, D) under d(s, a) <= eps mu(s, a) for actions mu that the data do not have. With
A = r + gamma v(s') - v(s), the soft chi-square f, w(x; eta) = (f')^-1((x - eta) / alpha), its conjugate f*, unseen
actions a~ and the share zeta of the data:

  v       minimises (1 - gamma) E_p0[v] + alpha E_D[f*((A - eta_v) / alpha)]
  eta_v   minimises eta_v (1 - E_D[w(A; eta_v)]), and eta_e likewise with e: the ratios' mean is 1
  e       minimises zeta E_D[(e(s, a) - A)^2] + (1 - zeta) E_a~[relu(e(s, a~) - eta_e - alpha f'(eps))^2]: the bound's
          multiplier is max(0, A - eta - alpha f'(eps)), so advantages of unseen actions end where the ratio is eps
  policy  minimises E_{s~D, a~pi}[log pi(a|s) - zeta log pi_D(a|s) - log w(e(s, a); eta_e)] (information projection),
          or -E_D[w(e(s, a); eta_e) log pi(a|s)] (weighted imitation)

Unseen actions are uniform, except near the data's action: in each component at least Delta away, the mean deviation of
the behaviour policy's components, at most 0.1. Deviations, with reasons in ``docs/methods/cde.md``:
  1. Unseen actions come from the inverse of their distribution function; the released code redraws at most ten times.
  2. The states of the projection are all of the data's; the released code takes those of episodes whose last reward is
     above 0 (``policy_data``).
  3. Weighted imitation multiplies each action's weight and likelihood; the released code's shapes do not fit and
     multiply the two means, which is plain imitation (``weighting``).
  4. Policies are squashed in every setting; the released code's are not for Adroit with human data. There is no switch.
  5. All networks take their step together, from one forward pass; the released code's policy sees e after its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from springhead.bounds import OutOfRange, above_zero, at_least
from springhead.rl.offline import dice
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Batch, Flat
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.density import DensitySettings, Extraction, flow, prepare
from springhead.rl.offline.mixture import Mixture
from springhead.rl.offline.stacked import Values, pair
from springhead.rl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class CDESettings(DensitySettings):
    """Hyper-parameters of CDE."""

    zeta: float = 0.9
    """Share of the data in the mixed distribution, the rest are unseen actions; 1 is no pessimism."""
    bound: float = 0.3
    """Largest ratio (eps, tilde epsilon in the paper) of an unseen action."""
    unseen: int = 5
    """Unseen actions for each state."""
    distance: float = 0.1
    """Largest Delta, how far unseen actions are from the data's in each component."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "bound")
        at_least(1, self, "unseen")
        if not 0 < self.zeta <= 1:
            raise OutOfRange(f"zeta is {self.zeta}; use a number above 0 and at most 1")
        if not 0 <= self.distance < 1:
            raise OutOfRange(f"distance is {self.distance}; use a number of 0 or more and below 1")


def apart(uniform: torch.Tensor, actions: torch.Tensor, distance: torch.Tensor | float) -> torch.Tensor:
    """Maps uniform numbers onto what [-1, 1] has at least a distance from an action.

    Args:
        uniform: In [0, 1).
        actions: In [-1, 1], of a shape that fits.
        distance: Below 1.

    Returns:
        Values in [-1, 1], uniformly distributed over (-1, a - distance) and (a + distance, 1).
    """
    below = (actions - distance + 1.0).clamp(min=0.0)
    above = (1.0 - actions - distance).clamp(min=0.0)
    along = uniform * (below + above)
    return torch.where(along < below, along - 1.0, 1.0 - above + along - below)


class CDE:
    """Value, advantage, normalisers and policy of each member."""

    def __init__(self, name: str, data: Flat, task: Task, settings: CDESettings, members: Sequence[Member]) -> None:
        self.members, self.task, self.settings = members, task, settings
        device, seeds = settings.device, [member.seed for member in members]
        self.generators = {
            "batches": Generators(seeds, device, stream=1),
            "noise": Generators(seeds, device, stream=2),
            "unseen": Generators(seeds, device, stream=3),
        }
        self.sampler, self.moments = prepare(name, data, settings, self.generators["batches"])
        weights = Generators(seeds)
        self.value = Values(weights, [task.observation_dim, *settings.hidden], 1, last_bound=3e-3)
        self.advantage = Values(weights, [task.observation_dim + task.action_dim, *settings.hidden], 1, last_bound=3e-3)
        self.extraction = Extraction(weights, task, settings, self.generators["noise"])
        parts = {"value": self.value, "advantage": self.advantage, "extraction": self.extraction}
        self.modules: nn.Module = nn.ModuleDict(parts)
        self.eta_v, self.eta_e = nn.Parameter(torch.zeros(len(seeds))), nn.Parameter(torch.zeros(len(seeds)))
        self.modules.register_parameter("eta_v", self.eta_v)
        self.modules.register_parameter("eta_e", self.eta_e)
        self.modules.to(device)
        adam = torch.optim.Adam(self.modules.parameters(), lr=settings.learning_rate, fused=True)
        self.optimisers = {"adam": adam}
        self.first_policy_step = 1 + settings.warm_up_steps
        self.ceiling = settings.alpha * float(dice.f_slope(torch.tensor(settings.bound)))

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of every network; the policy joins after the warm-up."""
        settings, adam, batch = self.settings, self.optimisers["adam"], self.sampler.draw()
        advantages, value_loss = self._value_loss(batch)
        imitation, mixture = self.extraction.imitate(batch)
        estimates, errors, excess = self._advantage_loss(batch, advantages.detach(), mixture)
        with torch.no_grad():
            eta = self.eta_e.clone()[:, None]
            ratios = dice.ratio_of((estimates - eta) / settings.alpha)
            mean_v = dice.ratio_of((advantages - self.eta_v[:, None]) / settings.alpha).mean(-1)
            mean_e = ratios.mean(-1)
            figures = {"mean_ratio": mean_e, "eta_v": self.eta_v.clone(), "eta_e": self.eta_e.clone()}
        loss = value_loss + self.eta_v * (1 - mean_v) + self.eta_e * (1 - mean_e) + imitation
        loss = loss + (settings.zeta * errors + (1 - settings.zeta) * excess if settings.zeta < 1 else errors)
        policy_loss = entropy = torch.zeros_like(mean_e)
        if step >= self.first_policy_step:

            def log_ratio(actions: torch.Tensor) -> torch.Tensor:
                known = self.advantage(pair(batch.observations, actions), frozen=True)[:, 0]
                return dice.log_ratio_of((known - eta) / settings.alpha)

            policy_loss, entropy = self.extraction.project(batch, ratios, log_ratio, mixture, settings.zeta)
        adam.zero_grad()
        (loss + policy_loss).sum().backward()
        adam.step()
        losses = {"value_loss": value_loss, "advantage_error": errors, "excess": excess, "behaviour_loss": imitation}
        losses["policy_loss"] = policy_loss
        return {**{name: each.detach() for name, each in losses.items()}, **figures, "entropy": entropy}

    def _value_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages (members, batch) and the loss of v (members,)."""
        settings = self.settings
        rows = torch.cat([batch.observations, batch.next_observations, self.sampler.draw_initial()], dim=1)
        *along, start = self.value(rows)[:, 0].split(settings.batch_size, dim=-1)
        advantages = flow(batch.rewards, 1.0 - batch.terminals, along, settings.discount)
        slopes = (advantages - self.eta_v.detach()[:, None]) / settings.alpha
        loss = settings.alpha * dice.conjugate(slopes).mean(-1)
        return advantages, loss + (1 - settings.discount) * start.mean(-1)

    def _advantage_loss(
        self, batch: Batch, advantages: torch.Tensor, mixture: Mixture | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Estimates of e (members, batch), their squared error and the unseen actions' squared excess, (members,)."""
        settings, size = self.settings, self.settings.batch_size
        rows = pair(batch.observations, batch.actions)
        if settings.zeta < 1:
            unseen = self._unseen(batch.actions, mixture)
            rows = torch.cat([rows, pair(batch.observations.repeat(1, settings.unseen, 1), unseen)], dim=1)
        values = self.advantage(rows)[:, 0]
        estimates, others = values[:, :size], values[:, size:]
        errors = (estimates - advantages).square().mean(-1)
        if settings.zeta == 1:
            return estimates, errors, torch.zeros_like(errors)
        excess = (others - self.eta_e.detach()[:, None] - self.ceiling).relu().square().mean(-1)
        return estimates, errors, excess

    def _unseen(self, actions: torch.Tensor, mixture: Mixture | None) -> torch.Tensor:
        """Actions (members, unseen x batch, action_dim), away from the data's; anywhere without a behaviour policy."""
        count, (_, size, width) = self.settings.unseen, actions.shape
        uniform = self.generators["unseen"].uniform(count, size, width)
        distance = 0.0 if mixture is None else mixture.spread().clamp(max=self.settings.distance).unsqueeze(1)
        return apart(uniform, actions.unsqueeze(1), distance).flatten(1, 2)

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The mean network of one member's policy."""
        return self.extraction.actor.acting(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes its network."""
        return actor_config(self.task, self.settings.hidden, moments=self.moments)
