"""Lagrange multipliers of several members as tensors."""

from __future__ import annotations

import torch
from torch import nn

from springhead.rl.lagrangian import PIDLagrangian


class Multipliers(nn.Module):
    """One multiplier for each member, moved by the rule of :class:`~springhead.rl.lagrangian.PIDLagrangian`.

    Everything stays on the device: an update needs no copy to the host.

    Args:
        members: How many.
        rule: Gains, variant and cap; its state is not used.
    """

    integral: torch.Tensor
    previous_error: torch.Tensor
    value: torch.Tensor

    def __init__(self, members: int, rule: PIDLagrangian) -> None:
        super().__init__()
        self.rule = rule
        for name in ("integral", "previous_error", "value"):
            self.register_buffer(name, torch.zeros(members))

    @torch.no_grad()
    def update(self, cost: torch.Tensor, limit: torch.Tensor | float) -> torch.Tensor:
        """Takes one step.

        Args:
            cost: What is to be limited, (members,).
            limit: The limits it should keep, (members,) or one for all.

        Returns:
            The new multipliers (members,), at least 0.
        """
        rule, error = self.rule, cost - limit
        floor = -0.3 / rule.ki if rule.variant == "memory" and rule.ki > 0 else 0.0
        self.integral.copy_((self.integral + error).clamp(min=floor))
        proportional = error.clamp(min=0) if rule.variant == "rectified" else error
        rise = (error - self.previous_error).clamp(min=0)
        value = rule.kp * proportional + rule.ki * self.integral + rule.kd * rise
        self.value.copy_(value.clamp(min=0, max=rule.cap))
        self.previous_error.copy_(error)
        return self.value
