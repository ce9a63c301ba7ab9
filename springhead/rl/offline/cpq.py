"""CPQ: constraints penalised Q-learning.

Source: Xu, Zhan, Zhu 2022, "Constraints Penalized Q-Learning for Safe Offline Reinforcement Learning" (AAAI). Its text
was not at hand, so equations bear no numbers: OSRL's code was followed, read and not copied, and mended where it misses
what the method is for. Actions that the data do not support count as unsafe, and unsafe actions are worth nothing. With
q the threshold of the episode limit, D(s, a) the divergence of an action model's latent variable from its prior, and
[.] 1 where true, else 0:

  cost critics    y_c = c + gamma Qc'(s', a'), a' of the policy; and where D(s, a) is high among ten actions of the
                  policy for each state, a gain alpha Qc(s, a)
  reward critics  y = r + gamma [Qc'(s', a') <= q] Q'(s', a')
  policy          maximises [Qc(s, a) <= q] Q(s, a)
  alpha           log alpha grows by rate alpha (1.5 q - mean Qc of those actions) and stays within [-5, 5]

Deviations, with reasons in ``docs/methods/cpq.md``; settings bring OSRL's behaviour back:
  1. The gain of unsupported actions has a gradient: it is of the live cost critics, on actions within bounds, and its
     mean is over those actions. Unsupported is a divergence above 95 % of those of the data's actions, at most a
     quarter of all; the quarter itself, as in OSRL, would be there still when the policy is the data's. y_c takes an
     action of the action model in place of an unsupported a', which counts as unsafe: the raised values do not come
     into those of supported actions, which would soon be as high (``unsupported``). In OSRL the gain has no gradient,
     so that nothing depends on it or alpha; it is not computed then.
  2. The indicator in the policy's objective has no gradient, so nothing moves an action that is judged unsafe. Here
     its cost value falls: the objective there is -w (Qc(s, a) - q), w = mean |Q| / max(q, 1), which is continuous in
     Qc and puts the cost's excess on the scale of what is lost by it (``actor_gradient``).
  3. Of the cost critics the highest counts (``cost_ensemble``).
  4. Episodes cut by the horizon go on (``timeouts``); costs end where the environment ends (``cost_terminals``).
  5. Reward and cost critics see the same next action; OSRL draws one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from springhead.bounds import above_zero, at_least, fraction
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Batch, Flat, Sampler, check_constraint
from springhead.rl.offline.candidates import CandidateSettings, each_with, evaluate, extremes, goes_on, thresholds
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.gaussian import SquashedGaussian
from springhead.rl.offline.stacked import Values, frozen_copy, pair, polyak
from springhead.rl.offline.vae import LOG_STD_RANGE, PRIOR_CLIP, ActionVAE, kl_from_prior
from springhead.rl.tasks import Task

LOG_ALPHA_RANGE = (-5.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class CPQSettings(CandidateSettings):
    """Hyper-parameters of CPQ; the defaults are those of OSRL's experiments."""

    critics: int = 2
    """Networks for rewards, and as many for costs."""
    actor_learning_rate: float = 1e-4
    """Of Adam, for the policy."""
    alpha_learning_rate: float = 1e-4
    """Of the weight of unsupported actions."""
    quantile: float = 0.95
    """Of the divergences of the data's actions: actions of the policy above it count as unsupported."""
    share: float = 0.25
    """Of the policy's drawn actions: at most so many, those of the highest divergence, count as unsupported."""
    margin: float = 1.5
    """What the cost value of unsupported actions shall be, in thresholds."""
    unsupported: Literal["penalised", "released"] = "penalised"
    """Whether the cost critics learn that unsupported actions are unsafe, or not, as in OSRL."""
    actor_gradient: Literal["penalty", "indicator"] = "penalty"
    """What moves an action that is judged unsafe: its cost value, or nothing, as in OSRL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "critics")
        at_least(0, self, "alpha_learning_rate")
        above_zero(self, "margin")
        fraction(self, "quantile", "share")


class CPQ:
    """Policy, action model and critics of all members."""

    def __init__(self, name: str, data: Flat, task: Task, settings: CPQSettings, members: Sequence[Member]) -> None:
        check_constraint(name, data, task, [member.cost_limit or 0.0 for member in members])
        self.members, self.task, self.settings = members, task, settings
        seeds, width = [member.seed for member in members], task.observation_dim + task.action_dim

        def critics(weights: Generators) -> Values:
            return Values(weights, [width, *settings.hidden], ensemble=settings.critics)

        weights = Generators(seeds)
        self.actor = SquashedGaussian(weights, task.observation_dim, task.action_dim, settings.hidden)
        self.critics, self.cost_critics = critics(weights), critics(weights)
        self.vae = ActionVAE(weights, task.observation_dim, task.action_dim, settings.vae_hidden)
        self.target_critics = critics(Generators(seeds))
        self.target_cost_critics = critics(Generators(seeds))
        self.modules: nn.Module = nn.ModuleDict(
            {
                "actor": self.actor,
                "critics": self.critics,
                "cost_critics": self.cost_critics,
                "vae": self.vae,
                "target_critics": frozen_copy(self.critics, self.target_critics),
                "target_cost_critics": frozen_copy(self.cost_critics, self.target_cost_critics),
            }
        )
        self.modules.register_buffer("log_alpha", torch.zeros(len(members)))
        self.modules.to(settings.device)
        self.threshold = thresholds(members, task, settings).to(settings.device)
        both = [*self.critics.parameters(), *self.cost_critics.parameters()]
        self.optimisers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=settings.actor_learning_rate, fused=True),
            "critics": torch.optim.Adam(both, lr=settings.critic_learning_rate, fused=True),
            "vae": torch.optim.Adam(self.vae.parameters(), lr=settings.vae_learning_rate, fused=True),
        }
        self.generators = {
            "batches": Generators(seeds, settings.device, stream=1),
            "noise": Generators(seeds, settings.device, stream=2),
        }
        self.sampler = Sampler(
            data, self.generators["batches"], settings.batch_size, reward_scale=settings.reward_scale
        )
        self.number = max(1, round(settings.share * settings.batch_size * settings.samples))

    def divergence(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Divergence of the latent variable from its prior without gradients, (members, rows)."""
        mean, log_std = evaluate(self.vae.encoder, pair(observations, actions))[:, 0].chunk(2, dim=-1)
        return kl_from_prior(mean, log_std.clamp(*LOG_STD_RANGE))

    @torch.no_grad()
    def targets(
        self, batch: Batch, noise: torch.Tensor, latent: torch.Tensor, bound: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets of reward critics and of cost critics, (members, batch) each.

        Args:
            batch: Transitions.
            noise: Standard normal, (members, batch, action_dim).
            latent: Of the action model's actions, (members, batch, latent_dim).
            bound: Divergence of the least unsupported action, (members, 1).
        """
        settings, states = self.settings, batch.next_observations
        mean, log_std = self.actor(states)
        actions = (mean + log_std.exp() * noise).tanh_()
        following = evaluate(self.target_critics, pair(states, actions)).squeeze(-1).amin(1)
        supported = torch.ones_like(batch.costs, dtype=torch.bool)
        if settings.unsupported == "penalised":
            supported = self.divergence(states, actions) < bound
            decoded = evaluate(self.vae.decoder, pair(states, latent))[:, 0].tanh_()
            actions = torch.where(supported.unsqueeze(-1), actions, decoded)
        costs = evaluate(self.target_cost_critics, pair(states, actions)).squeeze(-1)
        costly = costs.amin(1) if settings.cost_ensemble == "min" else costs.amax(1)
        rewards_go_on, costs_go_on = goes_on(batch, settings)
        safe = supported & (costly <= self.threshold[:, None])
        return (
            batch.rewards + settings.discount * rewards_go_on * safe * following,
            batch.costs + settings.discount * costs_go_on * costly,
        )

    @torch.no_grad()
    def suspects(
        self, observations: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States and actions of the policy in the highest part of the divergence, and their divergences.

        Args:
            observations: (members, batch, observation_dim).
            mean: Of the policy there, before tanh, (members, batch, action_dim).
            log_std: Likewise.
            noise: Standard normal, (members, batch, samples, action_dim).

        Returns:
            (members, suspects, width) and (members, suspects).
        """
        actions = (mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise).tanh_().flatten(1, 2)
        states = each_with(observations, noise.shape[2])
        highest, rows = self.divergence(states, actions).topk(self.number, dim=1, sorted=False)
        inputs = pair(states, actions)
        return inputs.gather(1, rows.unsqueeze(-1).expand(-1, -1, inputs.shape[-1])), highest

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the action model, the critics and alpha, and the policy, in this order."""
        settings, noise = self.settings, self.generators["noise"]
        rows, action_dim = settings.batch_size, self.task.action_dim
        batch = self.sampler.draw()
        latent_dim = self.vae.latent_dim
        vae_loss, known = self.vae.loss(
            batch.observations, batch.actions, noise.normal(rows, latent_dim), settings.vae_beta
        )
        self._descend("vae", vae_loss)

        mean, log_std = self.actor(batch.observations)
        bound = known.detach().quantile(settings.quantile, dim=1, keepdim=True)
        latent = noise.normal(rows, latent_dim).clamp_(-PRIOR_CLIP, PRIOR_CLIP)
        wanted, cost_wanted = self.targets(batch, noise.normal(rows, action_dim), latent, bound)
        inputs = pair(batch.observations, batch.actions)
        errors = (self.critics(inputs) - wanted.unsqueeze(1)).square().mean(2).sum(1)
        log_alpha = self.modules.get_buffer("log_alpha")
        alpha, excess, share = log_alpha.exp(), torch.zeros_like(log_alpha), torch.zeros_like(log_alpha)
        if settings.unsupported == "penalised":
            drawn = noise.normal(rows, settings.samples, action_dim)
            suspects, divergence = self.suspects(batch.observations, mean, log_std, drawn)
            unsupported = (divergence >= bound).float()
            share = unsupported.sum(1) / (rows * settings.samples)
            costs = self.cost_critics(torch.cat([inputs, suspects], dim=1))
            cost_errors = (costs[..., :rows] - cost_wanted.unsqueeze(1)).square().mean(2).sum(1)
            beyond = (costs[..., rows:] - settings.margin * self.threshold[:, None, None]) * unsupported.unsqueeze(1)
            excess = beyond.sum(2) / unsupported.sum(1, keepdim=True).clamp(min=1)
            self._descend("critics", errors + cost_errors - alpha * excess.sum(1))
            excess = excess.detach().mean(1)
            log_alpha.sub_(settings.alpha_learning_rate * alpha * excess).clamp_(*LOG_ALPHA_RANGE)
        else:
            cost_errors = (self.cost_critics(inputs) - cost_wanted.unsqueeze(1)).square().mean(2).sum(1)
            self._descend("critics", errors + cost_errors)

        actions = (mean + log_std.exp() * noise.normal(rows, action_dim)).tanh()
        value, cost, safe = self._judged(pair(batch.observations, actions))
        actor_loss = -(safe * value).mean(1)
        if settings.actor_gradient == "penalty":
            scale = value.detach().abs().mean(1) / self.threshold.clamp(min=1.0)
            actor_loss = actor_loss + scale * (cost - self.threshold[:, None]).clamp(min=0).mean(1)
        self._descend("actor", actor_loss)

        polyak(self.target_critics, self.critics, settings.tau)
        polyak(self.target_cost_critics, self.cost_critics, settings.tau)
        return {
            "vae_loss": vae_loss.detach(),
            "reward_critic_loss": errors.detach(),
            "cost_critic_loss": cost_errors.detach(),
            "policy_loss": actor_loss.detach(),
            "alpha": alpha,
            "unsupported": share,
            "unsupported_excess": excess,
            "cost_value": cost.detach().mean(1),
            "safe": safe.float().mean(1),
        }

    def _judged(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values, cost values and whether they keep the threshold, (members, batch) each."""
        number = self.settings.critics
        value = extremes(self.critics, inputs, [(0, number, False)])[:, 0]
        cost = extremes(self.cost_critics, inputs, [(0, number, self.settings.cost_ensemble == "max")])[:, 0]
        return value, cost, cost.detach() <= self.threshold[:, None]

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
