"""TRPO-Lagrangian: natural-gradient steps of a bounded divergence under a cost limit that may move.

Papers: Schulman et al. 2015, "Trust Region Policy Optimization", eq. 14 (surrogate under a KL bound) and appendix C
(conjugate gradients, step length, line search); Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by
PID Lagrangian Methods", algorithms 1 and 2. With it the DSRL data sets were made (Liu et al. 2023).

The objective is the combined surrogate mean(ratio (A_r - lambda A_c)) / (1 + lambda) over the whole batch; both
advantages are standardised over the batch. The step is s sqrt(2 delta / s'Hs) with s = H^-1 g, shortened until the
divergence is at most delta and the objective has risen.

Deviations, each on purpose, beside those of ``on_policy.py``:

1. Where no trial of the line search is accepted the old policy is kept. FSRL writes the last trial's parameters over
   it, which violate the bound or are worse.
2. The PID rule of the multiplier is FSRL's, as in PPO-Lag.
3. Critics are fitted after all policy steps, by minibatches. FSRL takes ``critic_steps`` full-batch steps after each
   of its policy steps, too few to follow the returns of a short run.

``released`` brings back FSRL: the failed trial is kept, and critics are fitted on the full batch within the repeats.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch.distributions import Normal

from springhead.bounds import above_zero, at_least, below_one
from springhead.rl.lagrangian import PIDLagrangian
from springhead.rl.online.advantages import Batch
from springhead.rl.online.on_policy import OnPolicy, OnPolicyConfig
from springhead.rl.online.trust_region import conjugate_gradients, fisher_product, gradient, line_search, mean_kl
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class TRPOLagConfig(OnPolicyConfig):
    """Hyper-parameters; defaults are FSRL's where they fit, see docs/methods/trpo_lag.md.

    Attributes:
        target_kl: Bound of the divergence of one step.
        repeats: Steps per iteration, each from where the last one ended.
        damping: Added to the diagonal of the divergence's Hessian.
        conjugate_steps: Products with the Hessian per step.
        backtracks: Trials of the line search.
        shrink: Factor from one trial to the next, between 0 and 1.
        critic_learning_rate: Step size of the critics' Adam.
        critic_epochs: The critics' passes over an iteration's transitions.
        critic_minibatch: Their transitions per gradient step.
        critic_steps: Only with ``released``: full-batch critic steps after each policy step.
        pid_kp: Gain of the multiplier on the cost excess.
        pid_ki: Gain on its integral.
        pid_kd: Gain on its rise.
    """

    target_kl: float = 0.001
    repeats: int = 4
    damping: float = 0.1
    conjugate_steps: int = 10
    backtracks: int = 10
    shrink: float = 0.8
    critic_learning_rate: float = 5e-4
    critic_epochs: int = 10
    critic_minibatch: int = 256
    critic_steps: int = 20
    pid_kp: float = 0.05
    pid_ki: float = 0.0005
    pid_kd: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            1, self, "repeats", "conjugate_steps", "backtracks", "critic_epochs", "critic_minibatch", "critic_steps"
        )
        above_zero(self, "target_kl", "shrink", "critic_learning_rate")
        below_one(self, "shrink")
        at_least(0, self, "damping", "pid_kp", "pid_ki", "pid_kd")


class TRPOLag(OnPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "trpo-lag"
    config: TRPOLagConfig

    def __init__(self, config: TRPOLagConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        critics = [*self.reward_critic.parameters(), *self.cost_critic.parameters()]
        self.optimisers["critics"] = torch.optim.Adam(critics, lr=config.critic_learning_rate)
        self.lagrangian = PIDLagrangian(config.pid_kp, config.pid_ki, config.pid_kd)

    def objective(self, batch: Batch, now: Normal) -> torch.Tensor:
        """The combined surrogate of a policy, given its distributions at the batch's observations."""
        ratio: torch.Tensor = (now.log_prob(batch.actions).sum(-1) - batch.log_probs).exp()
        multiplier = self.lagrangian.value
        advantages = (batch.reward_advantages - multiplier * batch.cost_advantages) / (1.0 + multiplier)
        return (ratio * advantages).mean()

    def policy_step(self, batch: Batch) -> tuple[float, float, float]:
        """One step within the trust region around the present policy.

        Args:
            batch: The transitions, advantages standardised.

        Returns:
            The accepted fraction of the step (0: none), the divergence it caused, and what the objective gained.
        """
        parameters = list(self.actor.parameters())
        now = self.actor(batch.observations)
        old = Normal(now.mean.detach(), now.stddev.detach(), validate_args=False)
        before = self.objective(batch, now)
        product = fisher_product(mean_kl(old, now), parameters, self.config.damping)
        slope = gradient(before, parameters)
        direction = conjugate_gradients(product, slope, self.config.conjugate_steps)
        curvature = float(direction @ product(direction))
        if curvature <= 0.0:  # a zero gradient: there is nowhere to go
            return 0.0, 0.0, 0.0
        step = direction * (2.0 * self.config.target_kl / curvature) ** 0.5

        def accept() -> bool:
            there = self.actor(batch.observations)
            inside = bool(mean_kl(old, there) <= self.config.target_kl)
            return inside and bool(self.objective(batch, there) > before)

        fraction = line_search(
            parameters, step, accept, self.config.shrink, self.config.backtracks, keep_failure=self.config.released
        )
        with torch.no_grad():
            there = self.actor(batch.observations)
            return fraction, float(mean_kl(old, there)), float(self.objective(batch, there) - before)

    def update(self, batch: Batch, cost_return: float, limit: float) -> tuple[float, dict[str, float]]:
        """Moves the multiplier, takes the policy steps, and fits the critics."""
        self.lagrangian.update(cost_return, limit)
        batch = batch.standardised()
        everything = torch.arange(len(batch.actions))
        generator, optimiser = self.generator(1), self.optimisers["critics"]
        taken = []
        reward_loss = cost_loss = 0.0
        for _ in range(self.config.repeats):
            taken.append(self.policy_step(batch))
            if self.config.released:
                full = [everything] * self.config.critic_steps
                reward_loss, cost_loss = self.fit_critics(batch, optimiser, full, 0.0)
        if not self.config.released:
            parts = [
                part
                for _ in range(self.config.critic_epochs)
                for part in self.minibatches(generator, len(everything), self.config.critic_minibatch)
            ]
            reward_loss, cost_loss = self.fit_critics(batch, optimiser, parts, 0.0)
        fractions, kls, gains = zip(*taken, strict=True)
        return self.lagrangian.value, {
            "gain": sum(gains),
            "reward_value_loss": reward_loss,
            "cost_value_loss": cost_loss,
            "kl": sum(kls),
            "step_fraction": sum(fractions) / len(fractions),
            "std": self.mean_std(),
        }

    def own_state(self) -> dict[str, Any]:
        """The multiplier's state."""
        return asdict(self.lagrangian)

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts it back."""
        self.lagrangian = PIDLagrangian(**facts)
