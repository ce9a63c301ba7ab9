"""DDPG-Lagrangian: a deterministic policy that climbs its reward critic and pays for what its cost critic predicts.

Papers: Lillicrap et al. 2016, "Continuous control with deep reinforcement learning", algorithm 1 and eq. 6 (target
networks of actor and critics, deterministic policy gradient, exploration noise); Stooke et al. 2020, algorithm 1
(loss divided by 1 + lambda) and 2 (multiplier). One gradient step, with a' = mu'(s'):

    targets   R_n + w Q_r'(s', a')   and   C_n + w Q_c'(s', a')
    policy    min E[-Q_r(s, mu(s)) + lambda Q_c(s, mu(s))] / (1 + lambda)

Deviations, each on purpose, beside those of ``off_policy.py`` (of which 1 is void: there is one critic per signal):

1. Exploration noise is independent from step to step and Gaussian, as in FSRL; the paper's is an
   Ornstein-Uhlenbeck process.
2. n-step targets, as in FSRL; the paper's are of one step.
3. The noise may begin wider and narrow down (``exploration_start``). From its first gradient steps on little-explored
   data the policy of a robot with many joints often saturates, and with a narrow noise it never learns otherwise.

``released`` brings back FSRL's raw observations; nothing else differs.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from springhead.bounds import OutOfRange, at_least, fraction
from springhead.rl.acting import ExpertPolicy, Head
from springhead.rl.lagrangian import PIDLagrangian, ramp
from springhead.rl.online.off_policy import OffPolicy, OffPolicyConfig
from springhead.rl.online.replay import Transitions
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class DDPGLagConfig(OffPolicyConfig):
    """Hyper-parameters; see docs/methods/ddpg_lag.md.

    Attributes:
        exploration: Deviation of the noise added to actions while collecting, e^-5 to e^2; saved with the policy.
        exploration_start: The same at the beginning; it moves to ``exploration`` linearly.
        exploration_until: Fraction of the training at which it arrives.
        pid_kp: Gain of the multiplier on the cost excess.
        pid_ki: Gain on its integral.
        pid_kd: Gain on its rise.
    """

    exploration: float = 0.1
    exploration_start: float = 0.1
    exploration_until: float = 0.2
    pid_kp: float = 0.05
    pid_ki: float = 0.0005
    pid_kd: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("exploration", "exploration_start"):
            if not math.exp(-5.0) <= getattr(self, name) <= math.exp(2.0):
                raise OutOfRange(f"{name} is {getattr(self, name)}; use a deviation between 0.0068 and 7.3")
        fraction(self, "exploration_until")
        at_least(0, self, "pid_kp", "pid_ki", "pid_kd")


class DDPGLag(OffPolicy):
    """The learner."""

    algorithm: ClassVar[str] = "ddpg-lag"
    head: ClassVar[Head] = "bounded-gaussian"  # its mean is mu(s); its deviation is the exploration's
    critics_per_signal: ClassVar[int] = 1
    state_dependent_std: ClassVar[bool] = False
    log_std_range: ClassVar[tuple[float, float]] = (-5.0, 2.0)
    config: DDPGLagConfig

    def __init__(self, config: DDPGLagConfig, workers: EpisodeWorkers) -> None:
        super().__init__(config, workers)
        assert self.actor.log_std is not None
        self.log_std = self.actor.log_std.requires_grad_(False)  # not learned
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.targets["actor"] = self.target_actor
        self.lagrangian = PIDLagrangian(config.pid_kp, config.pid_ki, config.pid_kd)

    def policy(self) -> ExpertPolicy:
        """The present policy; sampled, it explores as far as it shall at this iteration."""
        config, done = self.config, self.iteration / self.config.iterations
        deviation = ramp(config.exploration_start, config.exploration, 0.0, config.exploration_until, done)
        self.log_std.fill_(math.log(deviation))
        return super().policy()

    def update_multiplier(self, cost_return: float, limit: float) -> None:
        """One PID step."""
        self.lagrangian.update(cost_return, limit)

    def step(self, batch: Transitions, noise: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step of critics and policy."""
        with torch.no_grad():
            next_actions, _ = self.target_actor.mean_and_std(batch.next_observations)
            next_values = self.target_critics(torch.cat([batch.next_observations, next_actions], 1))
        critic_losses = self.fit_critics(batch, next_values)
        actions, _ = self.actor.mean_and_std(batch.observations)
        reward, cost = self.critics(torch.cat([batch.observations, actions], 1), frozen=True)
        multiplier = self.lagrangian.value
        policy_loss = (multiplier * cost - reward).mean() / (1.0 + multiplier)
        self.descend("actor", policy_loss)
        return {
            "multiplier": torch.tensor(self.lagrangian.value),
            "reward_critic_loss": critic_losses[0],
            "cost_critic_loss": critic_losses[1],
            "policy_loss": policy_loss.detach(),
            "cost_value": cost.detach().mean(),
        }

    def own_state(self) -> dict[str, Any]:
        """The multiplier's state."""
        return asdict(self.lagrangian)

    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts it back."""
        self.lagrangian = PIDLagrangian(**facts)
