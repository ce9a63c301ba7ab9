"""What the Lagrangian algorithms share: the multiplier's PID rule and the moving cost limit."""

from __future__ import annotations

from dataclasses import dataclass


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
    """The multiplier of the cost, driven by how far the mean episode cost is from its limit (Stooke et al. 2020).

    Attributes:
        kp: Gain of the signed error.
        ki: Gain of the integral, which is never negative.
        kd: Gain of the error's rise since the last update; falls do not count.
        integral: State: the sum of errors, cut at 0.
        previous_error: State: the last error.
        value: State: the multiplier, at least 0.
    """

    kp: float
    ki: float
    kd: float
    integral: float = 0.0
    previous_error: float = 0.0
    value: float = 0.0

    def update(self, cost_return: float, cost_limit: float) -> float:
        """Takes one step and returns the new multiplier.

        Args:
            cost_return: Mean undiscounted episode cost of the newest episodes.
            cost_limit: The limit it should keep.
        """
        error = cost_return - cost_limit
        self.integral = max(0.0, self.integral + error)
        rise = max(0.0, error - self.previous_error)
        self.value = max(0.0, self.kp * error + self.ki * self.integral + self.kd * rise)
        self.previous_error = error
        return self.value
