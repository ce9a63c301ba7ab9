"""SAC-Lagrangian: soft actor-critic whose policy pays for predicted cost, at a price that follows the episodes' cost.

Papers: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", eq. 5-9 and 18 (soft targets, policy
loss, temperature); Fujimoto et al. 2018 (two critics, the smaller counts); Stooke et al. 2020, algorithm 1 (loss
divided by 1 + lambda) and 2 (multiplier). One gradient step, with Q_r and Q_c the cautious estimates of two critics
each, and a' ~ pi(s'):

    reward targets  R_n + w (Q_r'(s', a') - alpha log pi(a'|s'))                           (eq. 5, 6)
    cost targets    C_n + w Q_c'(s', a')
    policy          min E[alpha log pi(a|s) - Q_r(s, a) + lambda Q_c(s, a)] / (1 + lambda)  (eq. 9 and Stooke)
    temperature     min E[-log alpha (log pi(a|s) + target entropy)]                        (eq. 18)

Deviations, each on purpose, beside those of ``off_policy.py``:

1. No entropy in the cost targets. FSRL adds -alpha log pi to them as to the reward's, so its cost critic predicts
   cost plus entropy and the multiplier punishes noise.
2. n-step sums of an old policy's actions are not corrected for the new policy (as in FSRL; n is 2 or 3).
3. The temperature's loss is linear in log alpha, as everybody implements eq. 18; same fixed point.
4. The deviation's logarithm is kept in [-5, 2] (FSRL: -20 to 2): a deviation of e^-20 has no gradient to return by.

``released`` brings back FSRL: the entropy in the cost targets, the smaller of the two cost estimates in targets and
policy loss, raw observations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from springhead.bounds import above_zero, at_least, finite
from springhead.rl.acting import Head
from springhead.rl.lagrangian import PIDLagrangian
from springhead.rl.online.off_policy import OffPolicy, OffPolicyConfig
from springhead.rl.online.replay import Transitions
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class SACLagConfig(OffPolicyConfig):
    """Hyper-parameters; see docs/methods/sac_lag.md.

    Attributes:
        alpha: First temperature.
        alpha_lr: Adam's step size for its logarithm.
        target_entropy: What the temperature aims at, per component of an action; the paper's is -1. The lower, the
            less sampled episodes, whose cost moves the multiplier, differ from those of the mean action.
        pid_kp: Gain of the multiplier on the cost excess.
        pid_ki: Gain on its integral.
        pid_kd: Gain on its rise.
    """

    alpha: float = 0.2
    alpha_lr: float = 3e-4
    target_entropy: float = -1.0
    pid_kp: float = 0.05
    pid_ki: float = 0.0005
    pid_kd: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "alpha", "alpha_lr")
        finite(self, "target_entropy")
        at_least(0, self, "pid_kp", "pid_ki", "pid_kd")


class SACLag(OffPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "sac-lag"
    head: ClassVar[Head] = "squashed-gaussian"
    critics_per_signal: ClassVar[int] = 2
    state_dependent_std: ClassVar[bool] = True
    log_std_range: ClassVar[tuple[float, float]] = (-5.0, 2.0)
    config: SACLagConfig

    def __init__(self, config: SACLagConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        self.log_alpha = self.own["log_alpha"] = nn.Parameter(torch.tensor(math.log(config.alpha)))
        self.optimisers["alpha"] = self.adam([self.log_alpha], config.alpha_lr)
        self.lagrangian = PIDLagrangian(config.pid_kp, config.pid_ki, config.pid_kd)

    def update_multiplier(self, cost_return: float, limit: float) -> None:
        """One PID step."""
        self.lagrangian.update(cost_return, limit)

    def sample(self, observations: torch.Tensor, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (n, action_dim) of the policy with their log density (n,), differentiable in its weights."""
        mean, std = self.actor.mean_and_std(observations)
        draw = torch.randn(mean.shape, generator=noise)
        before = mean + std * draw
        # Appendix C: log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which is exact where tanh(u) rounds to 1.
        squash = 2.0 * (math.log(2.0) - before - nn.functional.softplus(-2.0 * before))
        gaussian = -0.5 * draw.square() - std.log() - 0.5 * math.log(2.0 * math.pi)
        return before.tanh(), (gaussian - squash).sum(1)

    def next_values(self, batch: Transitions, noise: torch.Generator) -> torch.Tensor:
        """The successors' values in reward and cost, (2, n), by the target critics."""
        with torch.no_grad():
            actions, log_probs = self.sample(batch.next_observations, noise)
            values = self.pessimistic(self.target_critics(torch.cat([batch.next_observations, actions], 1)))
            entropy = self.log_alpha.exp() * log_probs
            if self.config.released:
                return values - entropy
            values[0] -= entropy
            return values

    def step(self, batch: Transitions, noise: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step of critics, policy and temperature."""
        critic_losses = self.fit_critics(batch, self.next_values(batch, noise))
        actions, log_probs = self.sample(batch.observations, noise)
        reward, cost = self.pessimistic(self.critics(torch.cat([batch.observations, actions], 1), frozen=True))
        alpha = self.log_alpha.detach().exp()
        multiplier = self.lagrangian.value
        policy_loss = (alpha * log_probs - reward + multiplier * cost).mean() / (1.0 + multiplier)
        self.descend("actor", policy_loss)
        log_prob = log_probs.detach().mean()
        self.descend("alpha", -self.log_alpha * (log_prob + self.config.target_entropy * self.task.action_dim))
        return {
            "multiplier": torch.tensor(self.lagrangian.value),
            "reward_critic_loss": critic_losses[0],
            "cost_critic_loss": critic_losses[1],
            "policy_loss": policy_loss.detach(),
            "cost_value": cost.detach().mean(),
            "alpha": alpha,
            "log_prob": log_prob,
        }

    def own_state(self) -> dict[str, Any]:
        """The multiplier's state."""
        return asdict(self.lagrangian)

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts it back."""
        self.lagrangian = PIDLagrangian(**facts)
