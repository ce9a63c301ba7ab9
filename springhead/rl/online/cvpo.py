"""CVPO: constrained variational policy optimisation, an expectation-maximisation with a constraint on predicted cost.

Papers: Liu et al. 2022, "Constrained Variational Policy Optimization for Safe Reinforcement Learning" (both steps);
Abdolmaleki et al. 2018, "Maximum a Posteriori Policy Optimisation" (the M-step with its KL divided into one of the
means and one of the deviations). One gradient step on a minibatch of states s, with K actions a_k ~ pi_old(.|s), and
Q_r and Q_c the cautious estimates of two critics each:

    E-step  the distribution q over the K actions that maximises E_q Q_r subject to E_q Q_c <= threshold and
            KL(q, pi_old) <= kl is q_k = softmax_k((Q_r - lambda Q_c) / eta), where (eta, lambda) minimise the dual
                eta kl + lambda threshold + eta mean_s log mean_k exp((Q_r - lambda Q_c) / eta)
    M-step  min -E_q[log N(a; mu, sigma_old) + log N(a; mu_old, sigma)]
                + alpha_mu (KL_mu - kl_mean) + alpha_sigma (KL_sigma - kl_std),
            with the multipliers alpha by gradient ascent, kept between 0 and alpha_max

The threshold is the episode limit spread over the episode's steps and discounted,
:func:`~springhead.rl.lagrangian.q_threshold`.

Deviations, each on purpose, beside those of ``off_policy.py``:

1. The dual is solved at every step, by a projected Newton method that starts from the last solution (it is convex in
   two variables and its Hessian is a covariance). FSRL takes one Adam step, so its multiplier runs behind.
2. The weights use Q_r - lambda Q_c. In FSRL the penalty is applied in place twice, with the old and the new lambda.
3. pi_old is a moving average of the policy, like the target critics; FSRL copies the policy once per collection. A
   copy renewed at every gradient step would make both KL terms vacuous, since they and their gradients are 0 there.
4. Critics see the executed, clipped actions; likelihoods are of the sampled ones, since clipping piles probability
   up at the bounds. FSRL shows its critics the sampled ones in the E-step.
5. The likelihood is the expectation under q, a sum over the K actions; FSRL divides it by K once more, which makes
   the divergences' multipliers K times stronger beside it.
6. alpha goes on from one collection to the next, by plain steps; FSRL begins at 0 after each, by Adam's.

``released`` brings back FSRL in 1 and 2, the smaller of the two cost estimates, raw observations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from springhead.bounds import OutOfRange, above_zero, at_least
from springhead.rl.acting import Head
from springhead.rl.lagrangian import q_threshold
from springhead.rl.online.off_policy import OffPolicy, OffPolicyConfig
from springhead.rl.online.replay import Transitions
from springhead.rl.workers import EpisodeWorkers

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CVPOConfig(OffPolicyConfig):
    """Hyper-parameters; see docs/methods/cvpo.md.

    Attributes:
        actions: K, sampled per state in the E-step.
        states: States of the minibatch that E-step and M-step use; the critics use all.
        kl: Bound on the E-step's divergence from the old policy.
        eta_max: Largest temperature of the E-step (``released``: at most 20).
        multiplier_max: Largest cost multiplier of the E-step.
        dual_lr: Adam's step size for (eta, lambda), with ``released`` only.
        kl_mean: Bound on the M-step's divergence of the means.
        kl_std: Bound on the M-step's divergence of the deviations.
        alpha_lr: Step size of the M-step's multipliers.
        alpha_max: Their largest value.
    """

    actions: int = 16
    states: int = 256
    kl: float = 0.02
    eta_max: float = 1000.0
    multiplier_max: float = 20.0
    dual_lr: float = 0.02
    kl_mean: float = 0.005
    kl_std: float = 0.0005
    alpha_lr: float = 0.1
    alpha_max: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actions < 2 or not 1 <= self.states <= self.batch_size:
            raise OutOfRange(f"actions ({self.actions}) must be 2 or more, states ({self.states}) 1 to the batch size")
        above_zero(self, "kl", "eta_max", "multiplier_max", "dual_lr", "kl_mean", "kl_std")
        at_least(0, self, "alpha_lr", "alpha_max")


def dual(point: Doubles, reward: Doubles, cost: Doubles, threshold: float, kl: float) -> tuple[float, Doubles, Doubles]:
    """The E-step's dual function with its derivatives.

    Args:
        point: (eta, lambda).
        reward: Q_r of K actions in each state, (states, K).
        cost: Q_c, (states, K).
        threshold: Bound on the mean of E_q Q_c.
        kl: Bound on the mean divergence.

    Returns:
        Its value, gradient (2,) and Hessian (2, 2) in (eta, lambda).
    """
    eta, multiplier = point
    scaled = (reward - multiplier * cost) / eta
    top = scaled.max(1, keepdims=True)
    exponentials = np.exp(scaled - top)
    sums = exponentials.sum(1, keepdims=True)
    weights = exponentials / sums
    log_mean = (top + np.log(sums / scaled.shape[1])).mean()
    # Per state the mean and centred values of the two things whose covariance is the Hessian.
    mean_scaled, mean_cost = (weights * scaled).sum(1, keepdims=True), (weights * cost).sum(1, keepdims=True)
    centred_scaled, centred_cost = scaled - mean_scaled, cost - mean_cost
    states = len(reward)
    within = (weights * centred_scaled * centred_cost).sum() / states
    hessian = np.array(
        [
            [(weights * centred_scaled**2).sum() / states, within],
            [within, (weights * centred_cost**2).sum() / states],
        ]
    )
    gradient = np.array([kl + log_mean - mean_scaled.mean(), threshold - mean_cost.mean()])
    return float(eta * (kl + log_mean) + multiplier * threshold), gradient, hessian / eta


def solve_dual(
    start: Doubles, reward: Doubles, cost: Doubles, threshold: float, kl: float, low: Doubles, high: Doubles
) -> Doubles:
    """Minimises :func:`dual` over a box by Newton steps in the variables that are not held at a bound.

    Args:
        start: First (eta, lambda).
        reward: As for :func:`dual`.
        cost: As for :func:`dual`.
        threshold: As for :func:`dual`.
        kl: As for :func:`dual`.
        low: Lower bounds.
        high: Upper bounds.

    Returns:
        The minimiser. Where no distribution near the old policy keeps the threshold, lambda is at its bound.
    """
    point = np.clip(start, low, high)
    value, gradient, hessian = dual(point, reward, cost, threshold, kl)
    for _ in range(50):
        free = ~(((point <= low) & (gradient > 0)) | ((point >= high) & (gradient < 0)))
        # The gradient in eta is a divergence and that in lambda a cost: both are of order 1.
        if not free.any() or np.abs(gradient[free]).max() < 1e-6:
            break
        step = np.zeros(2)
        damped = hessian[np.ix_(free, free)] + 1e-8 * np.eye(int(free.sum()))
        step[free] = -np.linalg.solve(damped, gradient[free])
        for shrink in 0.5 ** np.arange(30):
            moved = np.clip(point + shrink * step, low, high)
            found = dual(moved, reward, cost, threshold, kl)
            if found[0] <= value + 1e-4 * gradient @ (moved - point):
                break
        else:
            break  # no progress in floating point: this is the minimum
        point, (value, gradient, hessian) = moved, found
    return point


class CVPO(OffPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "cvpo"
    head: ClassVar[Head] = "bounded-gaussian"
    critics_per_signal: ClassVar[int] = 2
    state_dependent_std: ClassVar[bool] = True
    log_std_range: ClassVar[tuple[float, float]] = (-4.0, 0.5)
    config: CVPOConfig

    def __init__(self, config: CVPOConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.targets["actor"] = self.target_actor
        # (eta, lambda) and (alpha_mu, alpha_sigma).
        start = torch.tensor([1.0, 0.0 if config.released else 1.0], dtype=torch.float64)
        self.own["dual"] = nn.Parameter(start, requires_grad=config.released)
        self.own["alpha"] = nn.Parameter(torch.zeros(2), requires_grad=False)
        if config.released:
            self.optimisers["dual"] = self.adam([self.own["dual"]], config.dual_lr)
        self.threshold = 0.0

    def update_multiplier(self, cost_return: float, limit: float) -> None:
        """Only the limit counts: the multiplier follows from the critics, not from the episodes' cost."""
        self.threshold = q_threshold(limit, self.task.horizon, self.config.discount)

    def expectation(
        self, observations: torch.Tensor, noise: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The E-step.

        Args:
            observations: (states, observation_dim).
            noise: Draws the actions.

        Returns:
            Sampled actions and their weights in q, (K, states, action_dim) and (K, states), and the old policy's
            means and deviations (states, action_dim).
        """
        number, (states, dim) = self.config.actions, observations.shape
        with torch.no_grad():
            mean, std = self.target_actor.mean_and_std(observations)
            sampled = mean + std * torch.randn((number, *mean.shape), generator=noise)
            repeated = observations.expand(number, states, dim)
            inputs = torch.cat([repeated, sampled.clamp(-1.0, 1.0)], 2).view(number * states, -1)
            reward, cost = self.pessimistic(self.critics(inputs)).view(2, number, states)
        if self.config.released:
            return sampled, self._released_weights(reward, cost), mean, std
        low = np.array([1e-3, 0.0])
        high = np.array([self.config.eta_max, self.config.multiplier_max])
        solution = solve_dual(
            self.own["dual"].numpy(), reward.T.double().numpy(), cost.T.double().numpy(), self.threshold,
            self.config.kl, low, high,
        )  # fmt: skip
        eta, multiplier = self.own["dual"].copy_(torch.from_numpy(solution)).tolist()
        return sampled, torch.softmax((reward - multiplier * cost) / eta, 0), mean, std

    def _released_weights(self, reward: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
        """One Adam step on the dual, and the cost subtracted twice: with the multiplier before and after it."""
        eta, multiplier = self.own["dual"]
        penalised = reward - multiplier.detach() * cost
        log_mean = torch.logsumexp((reward - multiplier * cost) / eta, 0) - np.log(len(reward))
        self.descend("dual", eta * (self.config.kl + log_mean.mean()) + multiplier * self.threshold)
        with torch.no_grad():
            eta, multiplier = self.own["dual"].clamp_(1.2e-6, min(20.0, self.config.multiplier_max))
            return torch.softmax((penalised - multiplier * cost) / eta, 0).float()

    def maximisation(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        weights: torch.Tensor,
        old_mean: torch.Tensor,
        old_std: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The M-step's loss, and the divergences (2,) of means and deviations, without gradient.

        Args:
            observations: (states, observation_dim).
            actions: (K, states, action_dim).
            weights: (K, states), summing to 1 over K.
            old_mean: (states, action_dim).
            old_std: (states, action_dim).
        """
        mean, std = self.actor.mean_and_std(observations)
        # sum_k w_k (a_k - m)^2 = (sum_k w_k a_k - m)^2 + what does not depend on m: the K actions are summed up first.
        centre = (weights[..., None] * actions).sum(0)
        spread = (weights[..., None] * (actions - old_mean).square()).sum(0)
        fit_mean = 0.5 * ((centre - mean) / old_std).square()
        fit_std = 0.5 * spread / std.square() + std.log()
        kl_mean = 0.5 * ((mean - old_mean) / old_std).square()
        kl_std = (std / old_std).log() + 0.5 * (old_std / std).square() - 0.5
        divergences = torch.stack([kl_mean.sum(1).mean(), kl_std.sum(1).mean()])
        return (fit_mean + fit_std).sum(1).mean() + self.own["alpha"] @ divergences, divergences.detach()

    def step(self, batch: Transitions, noise: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step of the critics, one E-step and one M-step."""
        with torch.no_grad():
            mean, std = self.target_actor.mean_and_std(batch.next_observations)
            next_actions = (mean + std * torch.randn(mean.shape, generator=noise)).clamp(-1.0, 1.0)
            values = self.target_critics(torch.cat([batch.next_observations, next_actions], 1))
        critic_losses = self.fit_critics(batch, self.pessimistic(values))
        observations = batch.observations[: self.config.states]
        actions, weights, old_mean, old_std = self.expectation(observations, noise)
        policy_loss, divergences = self.maximisation(observations, actions, weights, old_mean, old_std)
        self.descend("actor", policy_loss)
        bounds = torch.tensor([self.config.kl_mean, self.config.kl_std])
        self.own["alpha"].add_(self.config.alpha_lr * (divergences - bounds)).clamp_(0.0, self.config.alpha_max)
        return {
            "multiplier": self.own["dual"][1].detach().clone(),
            "reward_critic_loss": critic_losses[0],
            "cost_critic_loss": critic_losses[1],
            "policy_loss": policy_loss.detach(),
            "eta": self.own["dual"][0].detach().clone(),
            "kl_mean": divergences[0],
            "kl_std": divergences[1],
            "std": old_std.mean(),
        }

    def own_state(self) -> dict[str, Any]:
        """Nothing beside the tensors in :attr:`own`."""
        return {}

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Nothing to put back."""
