"""What the Lagrangian algorithms share: the PID rule, the moving cost limit, the threshold of a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def ramp(start: float, end: float, ramp_from: float, ramp_until: float, fraction: float) -> float:
    """A value that is constant, then moves linearly, then is constant again.

    Args:
        start: Value before the ramp.
        end: Value after it.
        ramp_from: Fraction of the training at which it begins to move.
        ramp_until: Fraction at which it arrives.
        fraction: How far the training is, in [0, 1].
    """
    width = max(ramp_until - ramp_from, 1e-9)
    progress = min(max((fraction - ramp_from) / width, 0.0), 1.0)
    return start + progress * (end - start)


@dataclass
class PIDLagrangian:
    """The multiplier of the cost, driven by how far the cost is from its limit (Stooke et al. 2020, algorithm 2).

    Three variants are in use; none is quite that of the authors' own code, which smooths P and D and takes D from the
    cost's rise, not the error's. With e the error, I its integral and e_old the last error:

    ========= ==================================== ==============================================================
    variant   integral                             multiplier
    ========= ==================================== ==============================================================
    signed    max(0, I + e)                        max(0, kp e + ki I + kd max(0, e - e_old)): FSRL
    rectified max(0, I + e)                        max(0, kp max(0, e) + ki I + kd max(0, e - e_old)): OSRL
    memory    max(-0.3 / ki, I + e)                clip(kp e + ki I + kd max(0, e - e_old), 0, cap): FCSRL
    ========= ==================================== ==============================================================

    Attributes:
        kp: Gain of the error.
        ki: Gain of the integral.
        kd: Gain of the error's rise since the last update; falls do not count.
        variant: See above.
        cap: Largest multiplier; None for no bound.
        integral: State: the sum of errors, cut from below.
        previous_error: State: the last error.
        value: State: the multiplier, at least 0.
    """

    kp: float
    ki: float
    kd: float
    variant: Literal["signed", "rectified", "memory"] = "signed"
    cap: float | None = None
    integral: float = 0.0
    previous_error: float = 0.0
    value: float = 0.0

    def update(self, cost: float, limit: float) -> float:
        """Takes one step and returns the new multiplier.

        Args:
            cost: What is to be limited, for instance the mean undiscounted cost of the newest episodes.
            limit: The limit it should keep.
        """
        error = cost - limit
        # Below zero the integral would remember how safe the policy was, and let it sin for as long.
        floor = -0.3 / self.ki if self.variant == "memory" and self.ki > 0 else 0.0
        self.integral = max(floor, self.integral + error)
        proportional = max(0.0, error) if self.variant == "rectified" else error
        rise = max(0.0, error - self.previous_error)
        self.value = max(0.0, self.kp * proportional + self.ki * self.integral + self.kd * rise)
        if self.cap is not None:
            self.value = min(self.value, self.cap)
        self.previous_error = error
        return self.value


def q_threshold(limit: float, horizon: int, discount: float) -> float:
    """The mean discounted cost to go that corresponds to an episode cost (OSRL, FSRL's CVPO, FCSRL).

    Args:
        limit: Undiscounted episode cost, thought to be spread evenly over the steps.
        horizon: Steps of an episode.
        discount: Discount factor.

    Returns:
        limit (1 - discount^horizon) / ((1 - discount) horizon); ``limit`` itself without discount.
    """
    return limit if discount == 1.0 else limit * (1.0 - discount**horizon) / ((1.0 - discount) * horizon)
