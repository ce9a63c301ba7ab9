"""CPO: constrained policy optimisation, a trust-region step that keeps a linearised cost limit.

Paper: Achiam, Held, Tamar and Abbeel 2017, "Constrained Policy Optimization": section 5.2 (surrogates of return and
cost within a trust region), 6.1 (objective and cost linearised, the divergence squared; its dual and the step), 6.2
(recovery from an infeasible policy), theorem 2 of the appendix (the dual's solution for one constraint), algorithm 1
(line search). Here the objective is maximised with gradient g; the theorem minimises, so its r has the other sign.

    maximise g'x   subject to   c + b'x <= 0   and   x'Hx / 2 <= delta

Where g and b are the gradients of the reward and the cost surrogate, H the divergence's Hessian, c the mean episode
cost less its limit. With q = g'H^-1 g, r = g'H^-1 b, s = b'H^-1 b, multipliers lambda (trust region) and nu (cost),
the step is x = (H^-1 g - nu H^-1 b) / lambda. Five cases:

| case | when | step |
|---|---|---|
| 4 | the cost has no gradient | along H^-1 g alone |
| 3 | c < 0 and the whole trust region keeps the limit | along H^-1 g alone |
| 2 | c < 0 and the limit cuts the trust region | both multipliers from the dual |
| 1 | c >= 0 and some of the trust region keeps the limit | both multipliers from the dual |
| 0 | nothing in the trust region keeps the limit | recovery: -sqrt(2 delta / s) H^-1 b, whatever the reward |

Deviations, each on purpose, beside those of ``on_policy.py``:

1. The step has the length of the trust region. FSRL scales every step to unit Euclidean norm before the line search,
   so that its length says nothing about the divergence or about how much cost has to be saved.
2. The limit is the one in force. FSRL's ``update_cost_limit`` sets an attribute that its CPO does not read.
3. The cost surrogate is in units of episode cost: mean episode length times mean((ratio - 1) A_c), A_c centred but
   not scaled, so that it can be added to c. FSRL adds a mean of standardised advantages per step to an episode cost.
4. Where the line search accepts nothing the old policy is kept; FSRL leaves the last trial.
5. Critics are fitted by minibatches instead of a few full-batch steps.

``released`` brings back FSRL in all five, with the divergence measured from the policy that collected the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributions import Normal

from springhead.bounds import above_zero, at_least, below_one
from springhead.rl.online.advantages import Batch, standardise
from springhead.rl.online.on_policy import OnPolicy, OnPolicyConfig
from springhead.rl.online.trust_region import conjugate_gradients, fisher_product, gradient, line_search, mean_kl
from springhead.rl.workers import EpisodeWorkers

_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class CPOConfig(OnPolicyConfig):
    """Hyper-parameters; defaults are FSRL's where they fit, see docs/methods/cpo.md.

    Attributes:
        target_kl: Radius of the trust region, delta.
        repeats: Steps per iteration, each from where the last one ended.
        damping: Added to the diagonal of the divergence's Hessian.
        conjugate_steps: Products with the Hessian per linear system.
        backtracks: Trials of the line search.
        shrink: Factor from one trial to the next, between 0 and 1.
        critic_learning_rate: Step size of the critics' Adam.
        critic_epochs: The critics' passes over an iteration's transitions.
        critic_minibatch: Their transitions per gradient step.
        critic_l2: Weight of the critics' squared parameters in their loss.
        critic_steps: Only with ``released``: full-batch critic steps before each policy step.
    """

    target_kl: float = 0.01
    repeats: int = 1
    damping: float = 0.1
    conjugate_steps: int = 10
    backtracks: int = 100
    shrink: float = 0.8
    critic_learning_rate: float = 1e-3
    critic_epochs: int = 10
    critic_minibatch: int = 256
    critic_l2: float = 1e-3
    critic_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            1, self, "repeats", "conjugate_steps", "backtracks", "critic_epochs", "critic_minibatch", "critic_steps"
        )
        above_zero(self, "target_kl", "shrink", "critic_learning_rate")
        below_one(self, "shrink")
        at_least(0, self, "damping", "critic_l2")


@dataclass(frozen=True)
class Dual:
    """Which case it is, and the multipliers of trust region and cost."""

    case: int
    lam: float
    nu: float

    def step(self, reward_step: torch.Tensor, cost_step: torch.Tensor) -> torch.Tensor:
        """The step x, given H^-1 g and H^-1 b; both of (n,)."""
        if self.case == 0:
            return -self.nu * cost_step
        return (reward_step - self.nu * cost_step) / max(self.lam, _TINY)


def solve_dual(q: float, r: float, s: float, c: float, delta: float) -> Dual:
    """Solves the dual of the step's problem (Achiam et al. 2017, theorem 2 of the appendix).

    Args:
        q: g'H^-1 g.
        r: g'H^-1 b.
        s: b'H^-1 b; 0 where the cost has no gradient.
        c: Mean episode cost less its limit.
        delta: Radius of the trust region.
    """
    unconstrained = math.sqrt(q / (2.0 * delta))
    if s <= _TINY:
        return Dual(4, unconstrained, 0.0)
    a = max(q - r * r / s, 0.0)  # Cauchy-Schwarz, up to rounding
    b = 2.0 * delta - c * c / s
    if b <= 0.0:
        return Dual(3, unconstrained, 0.0) if c < 0.0 else Dual(0, 0.0, math.sqrt(2.0 * delta / s))
    # The dual function of lambda has two branches: nu = (r + lambda c) / s where that is positive, else nu = 0. Each is
    # minimised where it holds; the better one is the solution.
    low, high = (0.0, -r / c) if c < 0.0 else (max(0.0, -r / c if c > 0.0 else 0.0), math.inf)
    candidates: list[tuple[float, float]] = []
    if high > low and (c != 0.0 or r > 0.0):
        lam = min(max(math.sqrt(a / b), low, _TINY), high)
        candidates.append((0.5 * (a / lam + b * lam) - r * c / s, lam))
    free = (max(0.0, -r / c), math.inf) if c < 0.0 else (0.0, -r / c if c > 0.0 else math.inf if r <= 0.0 else 0.0)
    if free[1] > free[0]:
        lam = min(max(unconstrained, free[0], _TINY), free[1])
        candidates.append((0.5 * (q / lam + 2.0 * delta * lam), lam))
    lam = min(candidates)[1]
    return Dual(2 if c < 0.0 else 1, lam, max(0.0, (r + lam * c) / s))


class CPO(OnPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "cpo"
    config: CPOConfig

    def __init__(self, config: CPOConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        critics = [*self.reward_critic.parameters(), *self.cost_critic.parameters()]
        self.optimisers["critics"] = torch.optim.Adam(critics, lr=config.critic_learning_rate)

    def surrogates(self, batch: Batch, now: Normal) -> tuple[torch.Tensor, torch.Tensor]:
        """The reward objective, and by how much the episode cost changes from the policy that collected.

        Args:
            batch: The transitions, reward advantages standardised.
            now: A policy's distributions at the batch's observations.
        """
        ratio = (now.log_prob(batch.actions).sum(-1) - batch.log_probs).exp()
        if self.config.released:
            scale, cost = 1.0, standardise(batch.cost_advantages)
        else:
            scale, cost = batch.mean_length, batch.cost_advantages - batch.cost_advantages.mean()
        return (ratio * batch.reward_advantages).mean(), scale * ((ratio - 1.0) * cost).mean()

    def policy_step(self, batch: Batch, excess: float) -> dict[str, float]:
        """One step within the trust region around the present policy.

        Args:
            batch: The transitions, reward advantages standardised.
            excess: Mean cost of the batch's episodes less the limit.

        Returns:
            Case, multipliers, the accepted fraction of the step (0: none) and the divergence it caused.
        """
        parameters = list(self.actor.parameters())
        now = self.actor(batch.observations)
        old = Normal(now.mean.detach(), now.stddev.detach(), validate_args=False)
        objective, change = self.surrogates(batch, now)
        c = excess + float(change.detach())
        product = fisher_product(mean_kl(old, now), parameters, self.config.damping)
        g, b = gradient(objective, parameters), gradient(change, parameters)
        reward_step = conjugate_gradients(product, g, self.config.conjugate_steps)
        cost_step = conjugate_gradients(product, b, self.config.conjugate_steps)
        image = product(cost_step)
        q, r, s = (float(x) for x in (reward_step @ product(reward_step), reward_step @ image, cost_step @ image))
        dual = solve_dual(max(q, 0.0), r, s, c, self.config.target_kl)
        step = dual.step(reward_step, cost_step)
        if self.config.released:
            step = step / (step.norm() + _TINY)
        centre = batch.old if self.config.released else old

        def accept() -> bool:
            there = self.actor(batch.observations)
            gain, rise = (new - before for new, before in zip(self.surrogates(batch, there), (objective, change)))
            inside = bool(mean_kl(centre, there) <= self.config.target_kl)
            # Cases 0 and 1 give up return to save cost; the others must not lose any.
            return inside and (dual.case <= 1 or float(gain) > 0.0) and float(rise) <= max(-c, 0.0)

        fraction = line_search(
            parameters, step, accept, self.config.shrink, self.config.backtracks, keep_failure=self.config.released
        )
        with torch.no_grad():
            kl = float(mean_kl(old, self.actor(batch.observations)))
        return {
            "case": float(dual.case),
            "lam": dual.lam,
            "nu": dual.nu,
            "step_fraction": fraction,
            "kl": kl,
            "excess": c,
        }

    def update(self, batch: Batch, cost_return: float, limit: float) -> tuple[float, dict[str, float]]:
        """Takes the policy steps and fits the critics; the multiplier reported is nu of the last step."""
        kept = self.config.cost_limit(0) if self.config.released else limit
        scaled = batch.standardised()
        # Only the reward's: the cost surrogate needs advantages in units of cost.
        scaled = Batch(**{**vars(scaled), "cost_advantages": batch.cost_advantages})
        optimiser, everything = self.optimisers["critics"], torch.arange(len(batch.actions))
        taken = []
        for _ in range(self.config.repeats):
            if self.config.released:
                full = [everything] * self.config.critic_steps
                losses = self.fit_critics(batch, optimiser, full, self.config.critic_l2)
            taken.append(self.policy_step(scaled, cost_return - kept))
        if not self.config.released:
            generator = self.generator(1)
            parts = [
                part
                for _ in range(self.config.critic_epochs)
                for part in self.minibatches(generator, len(everything), self.config.critic_minibatch)
            ]
            losses = self.fit_critics(batch, optimiser, parts, self.config.critic_l2)
        return taken[-1]["nu"], {
            "reward_value_loss": losses[0],
            "cost_value_loss": losses[1],
            **taken[-1],
            "std": self.mean_std(),
        }

    def own_state(self) -> dict[str, Any]:
        """Nothing: multipliers are solved for at every step."""
        return {}

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Nothing to put back."""
