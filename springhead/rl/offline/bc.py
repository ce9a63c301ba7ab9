"""Behavioural cloning from selected episodes: BC-All, -Safe, -Risky, -Boundary, -Frontier, -Multi-Task.

Source: the BC baselines of DSRL and OSRL (Liu et al. 2023, "Datasets and Benchmarks for Offline Safe
Reinforcement Learning", section 5): a deterministic tanh network, mean squared error on actions, Adam
with learning rate 1e-3. What differs between the six is only which episodes they imitate.

Deviations, with reasons in ``docs/methods/bc.md``:
  1. A model folder of a limit-dependent mode holds one network for each of the task's limits, trained
     together; acting under a limit uses the largest trained limit not above it.
  2. ``safety_margin`` (0 as in the paper) imitates episodes of cost at most (1 - margin) x limit.
  3. ``decay`` lets the learning rate fall linearly to 0; short runs end closer to the optimum.
  4. BC-Multi-Task sees costs in units of the highest limit, not raw (``cost_input``).
  5. BC-Frontier's polynomial cannot have more coefficients than distinct costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from springhead.bounds import OutOfRange, above_zero
from springhead.errors import BadInput
from springhead.rl.offline.actor_policy import actor_config
from springhead.rl.offline.batches import Flat, Sampler, check_constraint
from springhead.rl.offline.contract import Generators, Member, Settings
from springhead.rl.offline.frontier import fit_until, pareto
from springhead.rl.offline.stacked import MLP
from springhead.rl.tasks import Task

MODES = ("all", "safe", "risky", "boundary", "frontier", "multi-task")
"""The six selections; the algorithm's name is ``bc-<mode>``."""


@dataclass(frozen=True, kw_only=True)
class BCSettings(Settings):
    """Hyper-parameters of the BC family."""

    learning_rate: float = 1e-3
    """Of Adam."""
    decay: bool = False
    """Let the learning rate fall linearly to 0."""
    safety_margin: float = 0.0
    """BC-Safe imitates episodes of cost at most (1 - margin) x limit."""
    cost_input: Literal["scaled", "raw"] = "scaled"
    """What BC-Multi-Task sees: an episode's cost divided by the highest limit, or the cost itself as in OSRL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "learning_rate")
        if not 0 <= self.safety_margin < 1:
            raise OutOfRange(f"safety_margin is {self.safety_margin}; use a number of 0 or more and below 1")


def select(
    mode: str, returns: npt.NDArray[np.float64], costs: npt.NDArray[np.float64], limit: float, margin: float = 0.0
) -> npt.NDArray[np.intp]:
    """Returns the positions of the episodes a mode imitates, in ascending order.

    all, multi-task: every episode. safe: C <= (1 - margin) limit. risky: C >= 2 limit. boundary:
    limit / 2 < C <= 3 limit / 2. frontier: |R - p(C)| at most a fifth of the range of returns, p the
    polynomial through the Pareto set, of the lowest degree up to 2 with R² of at least 0.9.

    Args:
        mode: One of ``MODES``.
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        limit: The episode cost limit, for the modes that depend on it.
        margin: The safety margin, for ``safe``.

    Raises:
        BadInput: If the mode is unknown or selects no episode.
    """
    if mode == "safe":
        chosen = costs <= (1 - margin) * limit
    elif mode == "risky":
        chosen = costs >= 2 * limit
    elif mode == "boundary":
        chosen = (costs > 0.5 * limit) & (costs <= 1.5 * limit)
    elif mode == "frontier":
        best = pareto(returns, costs)
        curve = fit_until(returns[best], costs[best])
        chosen = np.abs(returns - curve(costs)) <= (returns.max() - returns.min()) / 5
    elif mode in ("all", "multi-task"):
        chosen = np.ones(len(returns), dtype=bool)
    else:
        raise BadInput(f"unknown BC mode {mode!r}; known: {', '.join(MODES)}")
    if not chosen.any():
        wanted = {
            "safe": f"at most {(1 - margin) * limit:g}",
            "risky": f"at least {2 * limit:g}",
            "boundary": f"between {0.5 * limit:g} and {1.5 * limit:g}",
        }
        raise BadInput(
            f"bc-{mode}: none of {len(returns)} episodes costs {wanted.get(mode, 'what its curve asks for')} "
            f"(costs from {costs.min():g} to {costs.max():g}); collect more or loosen the filters"
        )
    return np.flatnonzero(chosen)


class BC:
    """One network for each member, each imitating its own episodes."""

    def __init__(self, name: str, data: Flat, task: Task, settings: BCSettings, members: Sequence[Member]) -> None:
        self.members, self.task, self.settings = members, task, settings
        self.mode = name.removeprefix("bc-")
        self.cost_scale: float | None = None
        if self.mode == "multi-task":
            limits = settings.limits or task.limits
            if settings.cost_input == "scaled" and not max(limits):
                raise BadInput(f"{name}: limits are all 0, and costs are scaled by the highest; name one above 0")
            check_constraint(name, data, task, limits)
            self.cost_scale = max(limits) if settings.cost_input == "scaled" else 1.0
        elif self.mode in ("safe", "risky", "boundary") and len(data.returns) == 1:
            raise BadInput(f"{name} on {task.name}: one episode only; there is nothing to select from, collect more")
        seeds = [member.seed for member in members]
        chosen = {
            limit: data.transitions(select(self.mode, data.returns, data.cost_returns, limit, settings.safety_margin))
            for limit in {member.cost_limit or 0.0 for member in members}
        }
        inputs = task.observation_dim + (self.cost_scale is not None)
        net = MLP(Generators(seeds), [inputs, *settings.hidden, task.action_dim], output="tanh").to(settings.device)
        self.modules: nn.Module = net
        self.net = net
        self.optimisers = {"adam": torch.optim.Adam(net.parameters(), lr=settings.learning_rate, fused=True)}
        self.generators = {"batches": Generators(seeds, settings.device, stream=1)}
        self.sampler = Sampler(
            data if self.cost_scale is None else _with_costs(data, self.cost_scale),
            self.generators["batches"],
            settings.batch_size,
            [chosen[member.cost_limit or 0.0] for member in members],
        )

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step down the squared error of the actions."""
        settings, adam = self.settings, self.optimisers["adam"]
        if settings.decay:
            for group in adam.param_groups:
                group["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
        batch = self.sampler.draw()
        errors = (self.net(batch.observations) - batch.actions).square().mean(dim=(1, 2))
        adam.zero_grad()
        errors.sum().backward()
        adam.step()
        return {"loss": errors.detach()}

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The tensors of one member's network."""
        return self.net.member(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes its network."""
        asked = self.settings.asked_limits() if self.mode == "multi-task" else {}
        return {**actor_config(self.task, self.settings.hidden, self.cost_scale), **asked}


def _with_costs(data: Flat, scale: float) -> Flat:
    """The data with each episode's cost, in units of ``scale``, at the end of its observations."""
    costs = torch.from_numpy(data.cost_returns / scale).float().repeat_interleave(data.lengths)[:, None]
    return replace(
        data,
        observations=torch.cat([data.observations, costs], dim=1),
        next_observations=torch.cat([data.next_observations, costs], dim=1),
    )
