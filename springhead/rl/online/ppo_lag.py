"""PPO-Lagrangian: proximal policy optimisation with a cost limit that may move during training.

Papers: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7 (clipped surrogate); Stooke et al.
2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", algorithm 1 (the loss divided by
1 + lambda) and 2 (the multiplier); Liu et al. 2023, DSRL, appendix on data collection (the moving cost limit).

Deviations, each on purpose, beside those of ``on_policy.py``:

1. One clipped surrogate of the combined advantage (A_r - lambda A_c) / (1 + lambda). FSRL, whose experts made the
   DSRL data, clips the reward part only, so that a large multiplier can carry the policy far outside the trust region.
2. The multiplier's rule is FSRL's: the D term follows the rise of the error, so a falling limit counts, too; the code
   of Stooke et al. takes the rise of the cost, and smooths P and D. The P term is signed in both: it lets go of the
   multiplier as soon as the policy is safer than its limit. There is no cap.
3. Advantages are standardised once per iteration, over the whole batch: the few rows of a minibatch have a mean and
   a scale of their own, and where cost is rare a minibatch without any would be scaled up to noise.
4. The policy stops within an epoch, at the first minibatch that it has moved too far on; critics go on learning.

``released`` brings back FSRL: the cost part un-clipped, advantages standardised per minibatch, the critics' loss
weighted 0.25 each, and after an epoch whose mean divergence is too high everything stops. What is not brought back
is that FSRL forgets the multiplier's state on resume: here a run may not depend on whether it was interrupted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from springhead.bounds import above_zero, at_least
from springhead.rl.lagrangian import PIDLagrangian
from springhead.rl.online.advantages import Batch, standardise
from springhead.rl.online.on_policy import OnPolicy, OnPolicyConfig
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class PPOLagConfig(OnPolicyConfig):
    """Hyper-parameters; defaults are FSRL's where they fit, see docs/methods/ppo_lag.md.

    Attributes:
        learning_rate: Step size of Adam, for all networks.
        epochs: Passes over an iteration's transitions.
        minibatch: Transitions per gradient step.
        clip: Half width of the interval that the density ratio is clipped to.
        target_kl: The policy stops learning in an iteration once its divergence exceeds 1.5 times this.
        max_gradient_norm: Gradients are scaled down to this norm.
        pid_kp: Gain of the multiplier on the cost excess.
        pid_ki: Gain on its integral.
        pid_kd: Gain on its rise.
    """

    learning_rate: float = 5e-4
    epochs: int = 4
    minibatch: int = 256
    clip: float = 0.2
    target_kl: float = 0.02
    max_gradient_norm: float = 0.5
    pid_kp: float = 0.05
    pid_ki: float = 0.0005
    pid_kd: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "epochs", "minibatch")
        above_zero(self, "learning_rate", "clip", "target_kl", "max_gradient_norm")
        at_least(0, self, "pid_kp", "pid_ki", "pid_kd")


class PPOLag(OnPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "ppo-lag"
    config: PPOLagConfig

    def __init__(self, config: PPOLagConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        self.optimiser = torch.optim.Adam(self.modules.parameters(), lr=config.learning_rate, eps=1e-5)
        self.optimisers["all"] = self.optimiser
        self.lagrangian = PIDLagrangian(config.pid_kp, config.pid_ki, config.pid_kd)

    def policy_loss(self, batch: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The negative surrogate of some rows of a batch, and the divergence estimated on them.

        Args:
            batch: The transitions; advantages are used as they are.
            rows: Indices.
        """
        log_ratio = self.actor(batch.observations[rows]).log_prob(batch.actions[rows]).sum(-1) - batch.log_probs[rows]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - self.config.clip, 1.0 + self.config.clip)
        reward, cost = batch.reward_advantages[rows], batch.cost_advantages[rows]
        multiplier = self.lagrangian.value
        if self.config.released:
            reward, cost = standardise(reward), standardise(cost)
            surrogate = torch.minimum(ratio * reward, clipped * reward) - multiplier * ratio * cost
            kl = float(-log_ratio.mean().detach())
            return -surrogate.mean() / (1.0 + multiplier), kl
        advantages = (reward - multiplier * cost) / (1.0 + multiplier)
        # k3 of Schulman's note on approximating KL: unbiased and never negative.
        kl = float((ratio - 1.0 - log_ratio).mean().detach())
        return -torch.minimum(ratio * advantages, clipped * advantages).mean(), kl

    def update(self, batch: Batch, cost_return: float, limit: float) -> tuple[float, dict[str, float]]:
        """Moves the multiplier, then takes several epochs of minibatch steps."""
        self.lagrangian.update(cost_return, limit)
        if not self.config.released:
            batch = batch.standardised()
        generator = self.generator(1)
        policy_losses: list[float] = []
        critic_losses: list[tuple[float, float]] = []
        kl, policy_learns = 0.0, True
        for _ in range(self.config.epochs):
            kls = []
            for rows in self.minibatches(generator, len(batch.actions), self.config.minibatch):
                reward_loss, cost_loss = self.critic_losses(batch, rows)
                loss = (0.25 if self.config.released else 0.5) * (reward_loss + cost_loss)
                if policy_learns:
                    policy_loss, kl = self.policy_loss(batch, rows)
                    kls.append(kl)
                    policy_learns = self.config.released or kl <= 1.5 * self.config.target_kl
                if policy_learns:
                    loss = loss + policy_loss
                    policy_losses.append(policy_loss.item())
                self._step(loss)
                critic_losses.append((reward_loss.item(), cost_loss.item()))
            if self.config.released and np.mean(kls) > 1.5 * self.config.target_kl:
                break
        reward_mean, cost_mean = (float(x) for x in np.mean(critic_losses, axis=0))
        return self.lagrangian.value, {
            "policy_loss": float(np.mean(policy_losses)),
            "reward_value_loss": reward_mean,
            "cost_value_loss": cost_mean,
            "kl": kl,
            "std": self.mean_std(),
        }

    def own_state(self) -> dict[str, Any]:
        """The multiplier's state."""
        return asdict(self.lagrangian)

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts it back."""
        self.lagrangian = PIDLagrangian(**facts)

    def _step(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), self.config.max_gradient_norm)
        self.optimiser.step()
