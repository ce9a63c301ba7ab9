"""COptiDICE: the safe policy from the ratio between its own visitation of states and actions and the data's.

Source: Lee, Paduraru, Mankowitz, Heess, Precup, Kim, Guez 2022, "COptiDICE: Offline Constrained Reinforcement Learning
via Stationary Distribution Correction Estimation" (ICLR). Its text was not at hand, so equations bear no numbers:
OSRL's code was followed, read and not copied, and mended where it misses what the method is for. With the advantage
e = r - lambda c + gamma nu(s') - nu(s), the ratio w = (f')^-1(e / alpha), the soft chi-square f, p0 the first
observations and D the data:

  nu      minimises (1 - gamma) E_p0[nu] + alpha E_D[f*(e / alpha)], whose slope in e is w
  chi,tau minimise tau log E[exp(l / tau)] + tau eps,  l = (1 - gamma) chi(s0) + w (c + gamma chi(s') - chi(s)),
          the cost of the worst distribution within eps (KL) of the data; its weights are softmax(l / tau)
  lambda  minimises lambda (threshold - C),  C the weighted mean of w c
  policy  maximises E_D[w log pi(a | s)], on states and actions with noise of 0.1 deviations

nu and chi are the smaller of two networks, lambda and tau softplus of a parameter. Deviations, with reasons in
``docs/methods/coptidice.md``; where OSRL's code does something else, a setting brings that back:
  1. The threshold is on the scale of C, a mean per step (``threshold``). OSRL's is a discounted sum, which never binds.
  2. The likelihood is that of a Gaussian around the action that acts, tanh of the mean (``likelihood``). A squashed
     one has no finite mean where data lie on the bounds, and clipped actions do: a third of them in BallCircle.
  3. Episodes cut by the horizon go on in nu and chi (``timeouts``).
  4. First observations are a batch of their own, paired with the transitions as in the paper (``initial``).
  5. chi's loss has no gradient through its softmax weights, as the exact slope demands (``chi_slope``).
  6. The policy is weighted by the w of the same step's forward pass, from before nu's own step; OSRL computes nu once
     more. All networks take their step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from springhead.bounds import above_zero, at_least, below_one
from springhead.rl.lagrangian import q_threshold
from springhead.rl.offline import dice
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Batch, Flat, Sampler, check_constraint
from springhead.rl.offline.contract import Generators, Member, Settings
from springhead.rl.offline.gaussian import SquashedGaussian, normal_log_prob
from springhead.rl.offline.least import least
from springhead.rl.offline.stacked import Values
from springhead.rl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class COptiDICESettings(Settings):
    """Hyper-parameters of COptiDICE."""

    alpha: float = 0.5
    """Weight of the divergence from the data."""
    discount: float = 0.99
    """Discount factor of rewards and costs, below 1: it is what the first states count by."""
    reward_scale: float = 0.1
    """Rewards are multiplied by this."""
    ensemble: int = 2
    """Networks for nu, and as many for chi; the smallest value counts."""
    bound_divergence: float = 0.01
    """Epsilon of the upper bound on the cost; 0 takes the plain estimate, without chi and tau."""
    first_observations: int = 128
    """Of those drawn for a batch, at most the batch's size; each is paired with several transitions."""
    noise: float = 0.1
    """Standard deviation of the noise in policy extraction, in deviations of each component in the data."""
    actor_learning_rate: float = 1e-4
    """Of Adam, for the policy."""
    critic_learning_rate: float = 1e-4
    """Of Adam, for nu and chi."""
    scalar_learning_rate: float = 1e-4
    """Of Adam, for the parameters of lambda and tau."""
    threshold: Literal["visitation", "released"] = "visitation"
    """What the mean cost of a step may be: the limit spread over the horizon, or the discounted sum of OSRL."""
    likelihood: Literal["bounded", "squashed", "released"] = "bounded"
    """Of the actions: under a Gaussian around tanh of the mean, under the squashed Gaussian, or under the Gaussian
    before tanh as in OSRL."""
    timeouts: Literal["bootstrap", "terminal"] = "bootstrap"
    """Whether a state after the horizon has a value, or none as in OSRL."""
    initial: Literal["drawn", "marked"] = "drawn"
    """First observations: a batch of their own, or those that happen to be in the batch, weighted up, as in OSRL."""
    chi_slope: Literal["exact", "released"] = "exact"
    """Gradient of chi: with the softmax weights fixed, or through them too as in OSRL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "alpha", "reward_scale", "actor_learning_rate", "critic_learning_rate", "scalar_learning_rate")
        at_least(1, self, "ensemble", "first_observations")
        at_least(0, self, "bound_divergence", "noise")
        below_one(self, "discount")


def step_threshold(limit: float, horizon: int, settings: COptiDICESettings) -> float:
    """The cost of a step that the ratio-weighted mean over the data is compared with.

    The ratios' mean is 1 where episodes go on after the horizon, so the limit spread over its steps is limit / horizon.
    Where they end there, the discounted visitation of an episode sums to 1 - gamma^horizon only.

    Args:
        limit: Episode cost limit.
        horizon: Steps of an episode.
        settings: Discount, and the readings of threshold and timeouts.
    """
    if settings.threshold == "released":
        return q_threshold(limit, horizon, settings.discount)
    if settings.timeouts == "bootstrap":
        return limit / horizon
    return (1 - settings.discount**horizon) * limit / horizon


class COptiDICE:
    """Ratio networks, multipliers and a policy for each member."""

    def __init__(
        self, name: str, data: Flat, task: Task, settings: COptiDICESettings, members: Sequence[Member]
    ) -> None:
        limits = [member.cost_limit or 0.0 for member in members]
        check_constraint(name, data, task, limits)
        self.members, self.task, self.settings = members, task, settings
        device, seeds = settings.device, [member.seed for member in members]
        weights = Generators(seeds)
        self.groups = 2 if settings.bound_divergence else 1
        self.values = Values(weights, [task.observation_dim, *settings.hidden], self.groups * settings.ensemble)
        self.actor = SquashedGaussian(weights, task.observation_dim, task.action_dim, settings.hidden)
        self.modules: nn.Module = nn.ModuleDict({"critics": self.values, "actor": self.actor})
        self.raw_lambda, self.raw_tau = nn.Parameter(torch.ones(len(seeds))), nn.Parameter(torch.ones(len(seeds)))
        self.modules.register_parameter("raw_lambda", self.raw_lambda)
        self.modules.register_parameter("raw_tau", self.raw_tau)
        self.modules.to(device)
        groups = [
            {"params": list(self.actor.parameters()), "lr": settings.actor_learning_rate},
            {"params": list(self.values.parameters()), "lr": settings.critic_learning_rate},
            {"params": [self.raw_lambda, self.raw_tau], "lr": settings.scalar_learning_rate},
        ]
        self.optimisers = {"adam": torch.optim.Adam(groups, fused=True)}
        self.generators = {
            "batches": Generators(seeds, device, stream=1),
            "noise": Generators(seeds, device, stream=2),
        }
        self.sampler = Sampler(data, self.generators["batches"], settings.batch_size, None, settings.reward_scale)
        self.limit = torch.tensor([step_threshold(limit, task.horizon, settings) for limit in limits], device=device)
        deviations = torch.cat([data.observations.std(0, correction=0), data.actions.std(0, correction=0)])
        self.noise = (settings.noise * deviations).to(device)
        self.start_share = len(data.starts) / len(data.rewards)

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of every network and multiplier."""
        adam, batch = self.optimisers["adam"], self.sampler.draw()
        loss, ratios, figures = self._ratio_loss(batch)
        actor_loss = self._actor_loss(batch, ratios)
        adam.zero_grad()
        (loss + actor_loss).sum().backward()
        adam.step()
        return {**figures, "policy_loss": actor_loss.detach()}

    def _ratio_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The losses of nu, chi, lambda and tau (members,), the ratios (members, batch) without gradient, figures."""
        settings, gamma = self.settings, self.settings.discount
        going_on = 1.0 - batch.terminals
        if settings.timeouts == "terminal":
            going_on = going_on - batch.timeouts
        first, now, following = self._evaluate(batch)
        weight, tau = F.softplus(self.raw_lambda), F.softplus(self.raw_tau)
        rewards = batch.rewards - weight.detach()[:, None] * batch.costs
        advantages = rewards + gamma * going_on * following[:, 0] - now[:, 0]
        slopes = advantages / settings.alpha
        nu_loss = (1 - gamma) * first[:, 0].mean(-1) + settings.alpha * dice.conjugate(slopes).mean(-1)
        with torch.no_grad():
            ratios = dice.ratio_of(slopes)
            weighted_costs = ratios * batch.costs
            figures = {"nu_loss": nu_loss.detach(), "divergence": dice.f_of_slope(slopes).mean(-1)}
        loss = nu_loss
        cost = weighted_costs.mean(-1)
        if settings.bound_divergence:
            excess = batch.costs + gamma * going_on * following[:, 1] - now[:, 1]
            bounds = (1 - gamma) * first[:, 1] + ratios * excess
            logs = (bounds / tau.detach()[:, None]).log_softmax(-1)
            worst = logs.exp() if settings.chi_slope == "released" else logs.detach().exp()
            chi_loss = (worst * bounds).sum(-1)
            worst, logs = worst.detach(), logs.detach()
            divergence = (worst * logs).sum(-1) + torch.tensor(float(logs.shape[-1])).log()
            loss = loss + chi_loss + tau * (settings.bound_divergence - divergence)
            cost = (worst * weighted_costs).sum(-1)
            figures |= {"chi_loss": chi_loss.detach(), "tau": tau.detach()}
        figures |= {"cost": cost, "multiplier": weight.detach()}
        return loss + weight * (self.limit - cost), ratios, figures

    def _evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nu and chi (members, 2, batch) at first observations, at observations and at those that follow."""
        rows = [batch.observations, batch.next_observations]
        drawn = self.settings.initial == "drawn"
        if drawn:
            rows.append(self.sampler.draw_initial()[:, : self.settings.first_observations])
        values = least(self.values, torch.cat(rows, dim=1), self.groups)
        now, following, *first = values.split(batch.rewards.shape[1], dim=-1)
        if drawn:
            pairs = -(-now.shape[-1] // first[0].shape[-1])
            return first[0].repeat(1, 1, pairs)[..., : now.shape[-1]], now, following
        return now * (batch.initial / self.start_share)[:, None], now, following

    def _actor_loss(self, batch: Batch, ratios: torch.Tensor) -> torch.Tensor:
        """The weighted negative log likelihood of the data's actions, (members,)."""
        noise = self.generators["noise"].normal(batch.rewards.shape[1], len(self.noise)) * self.noise
        moved, shaken = noise.split([self.task.observation_dim, self.task.action_dim], dim=-1)
        observations, actions = batch.observations + moved, batch.actions + shaken
        if self.settings.likelihood == "squashed":
            likelihood = self.actor.log_prob(observations, actions)
        else:
            mean, log_std = self.actor(observations)
            mean = mean.tanh() if self.settings.likelihood == "bounded" else mean
            likelihood = normal_log_prob(actions, mean, log_std).sum(-1)
        return -(ratios * likelihood).mean(-1)

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The mean network of one member's policy."""
        return self.actor.acting(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes its network."""
        return actor_config(self.task, self.settings.hidden)
