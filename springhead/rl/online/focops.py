"""FOCOPS: first-order constrained optimisation in policy space.

Paper: Zhang, Vuong and Ross 2020, "First Order Constrained Optimization in Policy Space": theorem 1 (the optimal
policy under a divergence and a cost bound is pi_old exp((A_r - nu A_c) / lambda) up to a factor), the loss KL(pi ||
that policy) whose gradient is taken per state where the divergence is at most eta, the projected gradient step on nu,
and algorithm 1.

    loss = mean[ (KL(pi || pi_old) - ratio (A_r - nu A_c) / lambda) 1(KL(pi || pi_old) <= eta) ]
    nu <- clip(nu + nu_learning_rate (J_c - limit), 0, nu_max)

Deviations, each on purpose, beside those of ``on_policy.py``:

1. The temperature lambda is 1.5, as in the authors' own code. FSRL's default .95 is the value of the advantages'
   lambda, and the code of Liu et al. 2023 on robustness passes that very variable.
2. Advantages are standardised once per iteration, over the whole batch, not per minibatch (see ``ppo_lag.py``).
3. The policy stops within an epoch, at the first minibatch whose divergence exceeds ``target_kl``; critics go on.

``released`` brings back FSRL: advantages standardised per minibatch, temperature .95 whatever is configured, and
after an epoch whose mean divergence is too high everything stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from springhead.bounds import above_zero, at_least
from springhead.rl.online.advantages import Batch, standardise
from springhead.rl.online.on_policy import OnPolicy, OnPolicyConfig
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class FOCOPSConfig(OnPolicyConfig):
    """Hyper-parameters; defaults are the paper's or FSRL's where they fit, see docs/methods/focops.md.

    Attributes:
        temperature: lambda: how strongly the divergence holds against the advantage.
        eta: States whose divergence exceeds this take no part in a gradient.
        target_kl: The policy stops learning in an iteration once its mean divergence exceeds this.
        nu_learning_rate: Step size of the cost multiplier, per unit of episode cost.
        nu_max: Its upper bound.
        learning_rate: Step size of the policy's Adam.
        critic_learning_rate: Step size of the critics' Adam.
        critic_l2: Weight of the critics' squared parameters in their loss.
        epochs: Passes over an iteration's transitions.
        minibatch: Transitions per gradient step.
        max_gradient_norm: The policy's gradients are scaled down to this norm.
    """

    temperature: float = 1.5
    eta: float = 0.02
    target_kl: float = 0.02
    nu_learning_rate: float = 0.01
    nu_max: float = 2.0
    learning_rate: float = 5e-4
    critic_learning_rate: float = 1e-3
    critic_l2: float = 1e-3
    epochs: int = 4
    minibatch: int = 256
    max_gradient_norm: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "epochs", "minibatch")
        above_zero(
            self, "temperature", "eta", "target_kl", "learning_rate", "critic_learning_rate", "max_gradient_norm"
        )
        at_least(0, self, "nu_learning_rate", "nu_max", "critic_l2")


class FOCOPS(OnPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "focops"
    config: FOCOPSConfig

    def __init__(self, config: FOCOPSConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        critics = [*self.reward_critic.parameters(), *self.cost_critic.parameters()]
        self.optimisers["actor"] = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)
        self.optimisers["critics"] = torch.optim.Adam(critics, lr=config.critic_learning_rate)
        self.nu = 0.0

    def policy_loss(self, batch: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The loss of some rows of a batch, and their mean divergence.

        Args:
            batch: The transitions; advantages are used as they are.
            rows: Indices.
        """
        now = self.actor(batch.observations[rows])
        old = Normal(batch.means[rows], batch.stds[rows], validate_args=False)
        ratio = (now.log_prob(batch.actions[rows]).sum(-1) - batch.log_probs[rows]).exp()
        kl = kl_divergence(now, old).sum(-1)
        reward, cost = batch.reward_advantages[rows], batch.cost_advantages[rows]
        temperature = self.config.temperature
        if self.config.released:
            temperature, reward, cost = 0.95, standardise(reward), standardise(cost)
        near = kl.detach() <= self.config.eta
        loss = ((kl - ratio * (reward - self.nu * cost) / temperature) * near).mean()
        return loss, float(kl.mean().detach())

    def update(self, batch: Batch, cost_return: float, limit: float) -> tuple[float, dict[str, float]]:
        """Moves nu, then takes several epochs of minibatch steps."""
        released = self.config.released
        self.nu += self.config.nu_learning_rate * (cost_return - limit)
        self.nu = min(max(self.nu, 0.0), self.config.nu_max)
        if not released:
            batch = batch.standardised()
        generator, learns = self.generator(1), True
        losses, critic_losses, kl = [], [], 0.0
        for _ in range(self.config.epochs):
            kls = []
            for rows in self.minibatches(generator, len(batch.actions), self.config.minibatch):
                critic_losses.append(self.fit_critics(batch, self.optimisers["critics"], [rows], self.config.critic_l2))
                if not learns:
                    continue
                loss, kl = self.policy_loss(batch, rows)
                kls.append(kl)
                learns = released or kl <= self.config.target_kl
                if learns:
                    self._step(loss)
                    losses.append(loss.item())
            if released and np.mean(kls) > self.config.target_kl:
                break
        reward_mean, cost_mean = (float(x) for x in np.mean(critic_losses, axis=0))
        return self.nu, {
            "policy_loss": float(np.mean(losses)),
            "reward_value_loss": reward_mean,
            "cost_value_loss": cost_mean,
            "kl": kl,
            "std": self.mean_std(),
        }

    def own_state(self) -> dict[str, Any]:
        """The multiplier."""
        return {"nu": self.nu}

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts it back."""
        self.nu = facts["nu"]

    def _step(self, loss: torch.Tensor) -> None:
        optimiser = self.optimisers["actor"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.config.max_gradient_norm)
        optimiser.step()
