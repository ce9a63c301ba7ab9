"""BEAR-Lag: a policy within the support of the data, with a multiplier for the cost.

Source: Kumar, Fu, Soh, Tucker, Levine 2019, "Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction"
(BEAR: algorithm 1; the dual step on alpha and the sampled MMD of section 5), with the PID multiplier of Stooke et al.
2020 and critics of the cost, as the baseline of Liu et al. 2023 (DSRL) in OSRL, whose code was read, not copied. With
ten actions of an action model and ten of the policy, both before tanh, and k(x, y) = exp(-|x - y|² / (2 sigma)):

  critics  y = r + gamma mix(Q')(s', a'),  y_c = c + gamma mix(Qc')(s', a'),  mix = 0.75 low + 0.25 high of two groups
  policy   maximises Q(s, a) - lambda (Qc(s, a) - q) - alpha (MMD - 0.05),  Q the lowest, Qc the most pessimistic critic
  alpha    log alpha grows by rate alpha (MMD - 0.05) and stays within [-5, 5]
  lambda   rectified PID (0.1, 0.003, 0.001) on the batch's mean of Qc(s, a) - q; q the threshold of the episode limit

Deviations, with reasons in ``docs/methods/bear_lag.md``; settings bring OSRL's behaviour back:
  1. a' is one action of the target policy (``target_action``): what is evaluated is the policy that acts. BEAR takes
     the highest mix of ten, since its policy acts by the best of several samples; OSRL too, for the cost as well.
  2. Of the cost critics the highest counts (``cost_ensemble``).
  3. Episodes cut by the horizon go on (``timeouts``); costs end where the environment ends (``cost_terminals``).
  4. The policy acts by the tanh of its mean, as in OSRL, not by the best of several samples.
  5. Reward and cost critics see the same next actions. They are independent otherwise, so OSRL's second draw of its own
     changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from springhead.bounds import above_zero, at_least, fraction
from springhead.rl.lagrangian import PIDLagrangian
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Batch, Flat, Sampler, check_constraint
from springhead.rl.offline.candidates import (
    CandidateSettings,
    each_with,
    evaluate,
    extremes,
    goes_on,
    mixed,
    thresholds,
)
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.gaussian import SquashedGaussian
from springhead.rl.offline.multipliers import Multipliers
from springhead.rl.offline.stacked import Values, frozen_copy, pair, polyak
from springhead.rl.offline.vae import PRIOR_CLIP, ActionVAE
from springhead.rl.tasks import Task

LOG_ALPHA_RANGE = (-5.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class BEARLagSettings(CandidateSettings):
    """Hyper-parameters of BEAR-Lag; the defaults are those of OSRL's experiments."""

    steps: int = 300_000
    """Gradient steps."""
    critics: int = 2
    """Networks in each of the two groups, for rewards and again for costs."""
    low_weight: float = 0.75
    """Weight of the pessimistic group in the critics' targets."""
    kernel: Literal["gaussian", "laplacian"] = "gaussian"
    """Of the distance between samples: squared and summed over components, or absolute and summed."""
    sigma: float = 50.0
    """Width of the kernel."""
    divergence: float = 0.05
    """How far the policy may be from the action model (MMD)."""
    alpha_learning_rate: float = 1e-3
    """Of the weight of that bound."""
    imitation_steps: int = 0
    """First steps in which the policy keeps its bounds without maximising rewards."""
    kp: float = 0.1
    """Proportional gain of the multiplier."""
    ki: float = 0.003
    """Integral gain of the multiplier."""
    kd: float = 0.001
    """Derivative gain of the multiplier."""
    target_action: Literal["policy", "extremes"] = "policy"
    """Next action of the targets: one of the policy's, or for each kind the highest of several, as in OSRL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "critics")
        at_least(0, self, "kp", "ki", "kd", "divergence", "imitation_steps", "alpha_learning_rate")
        above_zero(self, "sigma")
        fraction(self, "low_weight")


def mmd(
    modelled: torch.Tensor, drawn: torch.Tensor, kernel: Literal["gaussian", "laplacian"], sigma: float
) -> torch.Tensor:
    """Maximum mean discrepancy between two sets of samples, from their sums of kernels, own pairs included.

    Args:
        modelled: One set (..., n, components).
        drawn: The other (..., m, components).
        kernel: exp(-d / (2 sigma)) of the summed squared, or absolute, differences d.
        sigma: Its width.

    Returns:
        sqrt(mean k(x, x') + mean k(y, y') - 2 mean k(x, y) + 1e-6), (...).
    """

    def mean(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        difference = one.unsqueeze(-2) - other.unsqueeze(-3)
        distance = (difference.square() if kernel == "gaussian" else difference.abs()).sum(-1)
        return (distance * (-0.5 / sigma)).exp().mean(dim=(-2, -1))

    return (mean(modelled, modelled) + mean(drawn, drawn) - 2.0 * mean(modelled, drawn) + 1e-6).sqrt()


class BEARLag:
    """Policy, action model, critics and multipliers of all members."""

    def __init__(self, name: str, data: Flat, task: Task, settings: BEARLagSettings, members: Sequence[Member]) -> None:
        check_constraint(name, data, task, [member.cost_limit or 0.0 for member in members])
        self.members, self.task, self.settings = members, task, settings
        seeds, width = [member.seed for member in members], task.observation_dim + task.action_dim
        # The first half of the critics is of rewards, the second of costs: one product for both.
        self.half = 2 * settings.critics

        def networks(weights: Generators) -> tuple[SquashedGaussian, Values]:
            actor = SquashedGaussian(weights, task.observation_dim, task.action_dim, settings.hidden)
            return actor, Values(weights, [width, *settings.hidden], ensemble=2 * self.half)

        weights = Generators(seeds)
        self.actor, self.critics = networks(weights)
        self.vae = ActionVAE(weights, task.observation_dim, task.action_dim, settings.vae_hidden)
        self.target_actor, self.target_critics = networks(Generators(seeds))
        self.multipliers = Multipliers(
            len(members), PIDLagrangian(settings.kp, settings.ki, settings.kd, variant="rectified")
        )
        self.modules: nn.Module = nn.ModuleDict(
            {
                "actor": self.actor,
                "critics": self.critics,
                "vae": self.vae,
                "target_actor": frozen_copy(self.actor, self.target_actor),
                "target_critics": frozen_copy(self.critics, self.target_critics),
                "multipliers": self.multipliers,
            }
        )
        self.modules.register_buffer("log_alpha", torch.zeros(len(members)))
        self.modules.to(settings.device)
        self.threshold = thresholds(members, task, settings).to(settings.device)
        self.optimisers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=settings.actor_learning_rate, fused=True),
            "critics": torch.optim.Adam(self.critics.parameters(), lr=settings.critic_learning_rate, fused=True),
            "vae": torch.optim.Adam(self.vae.parameters(), lr=settings.vae_learning_rate, fused=True),
        }
        self.generators = {
            "batches": Generators(seeds, settings.device, stream=1),
            "noise": Generators(seeds, settings.device, stream=2),
        }
        self.sampler = Sampler(
            data, self.generators["batches"], settings.batch_size, reward_scale=settings.reward_scale
        )

    @torch.no_grad()
    def targets(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Targets of reward and cost critics, (members, 2, batch).

        Args:
            batch: Transitions.
            noise: Standard normal, (members, batch, candidates, action_dim).
        """
        settings = self.settings
        mean, log_std = self.target_actor(batch.next_observations)
        actions = (mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise).tanh_().flatten(1, 2)
        states = each_with(batch.next_observations, noise.shape[2])
        rewards, costs = evaluate(self.target_critics, pair(states, actions)).squeeze(-1).split(self.half, dim=1)
        hopeful = settings.cost_ensemble == "min"
        mixes = (
            mixed(rewards, settings.low_weight, "min"),
            mixed(costs, settings.low_weight, "min" if hopeful else "max"),
        )
        following, costly = (value.unflatten(1, noise.shape[1:3]).amax(2) for value in mixes)
        rewards_go_on, costs_go_on = goes_on(batch, settings)
        return torch.stack(
            [
                batch.rewards + settings.discount * rewards_go_on * following,
                batch.costs + settings.discount * costs_go_on * costly,
            ],
            dim=1,
        )

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the action model, the critics, the policy and both multipliers, in this order."""
        settings, noise, half = self.settings, self.generators["noise"], self.half
        rows, number, action_dim, latent_dim = (
            settings.batch_size, settings.samples, self.task.action_dim, self.vae.latent_dim,
        )  # fmt: skip
        batch = self.sampler.draw()
        vae_loss, _ = self.vae.loss(
            batch.observations, batch.actions, noise.normal(rows, latent_dim), settings.vae_beta
        )
        self._descend("vae", vae_loss)

        candidates = number if settings.target_action == "extremes" else 1
        wanted = self.targets(batch, noise.normal(rows, candidates, action_dim))
        values = self.critics(pair(batch.observations, batch.actions)).unflatten(1, (2, half))
        errors = (values - wanted.unsqueeze(2)).square().mean(3).sum(2)
        self._descend("critics", errors.sum(1))

        latent = noise.normal(rows * number, latent_dim).clamp_(-PRIOR_CLIP, PRIOR_CLIP)
        inputs = pair(each_with(batch.observations, number), latent)
        modelled = evaluate(self.vae.decoder, inputs)[:, 0].unflatten(1, (rows, number))
        mean, log_std = self.actor(batch.observations)
        drawn = mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise.normal(rows, number, action_dim)
        distance = mmd(modelled, drawn, settings.kernel, settings.sigma).mean(1)
        parts = [(0, half, False), (half, 2 * half, settings.cost_ensemble == "max")]
        inputs = pair(batch.observations, drawn[:, :, 0].tanh())
        value, cost = extremes(self.critics, inputs, parts).mean(2).unbind(1)
        multiplier = self.multipliers.update(cost.detach(), self.threshold)
        log_alpha = self.modules.get_buffer("log_alpha")
        alpha, excess = log_alpha.exp(), distance - settings.divergence
        actor_loss = alpha * excess + multiplier * (cost - self.threshold)
        if step > settings.imitation_steps:
            actor_loss = actor_loss - value
        self._descend("actor", actor_loss)
        log_alpha.add_(settings.alpha_learning_rate * alpha * excess.detach()).clamp_(*LOG_ALPHA_RANGE)

        polyak(self.target_critics, self.critics, settings.tau)
        polyak(self.target_actor, self.actor, settings.tau)
        return {
            "vae_loss": vae_loss.detach(),
            "reward_critic_loss": errors[:, 0].detach(),
            "cost_critic_loss": errors[:, 1].detach(),
            "policy_loss": actor_loss.detach(),
            "mmd": distance.detach(),
            "alpha": alpha,
            "cost_value": cost.detach(),
            "multiplier": multiplier.clone(),
        }

    def _descend(self, name: str, losses: torch.Tensor) -> None:
        self.optimisers[name].zero_grad()
        losses.sum().backward()
        self.optimisers[name].step()

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The mean network of one member."""
        return self.actor.acting(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes it."""
        return actor_config(self.task, self.settings.hidden)
