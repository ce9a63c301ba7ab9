"""What every online algorithm is to the rest of the project: a configuration, a learner and its figures.

A learner trains in iterations. Each collects whole episodes from seeded resets and then updates the networks, so
between two iterations there is no simulator state and no generator state: everything that changes is in
:meth:`Learner.state`, and a run that was killed resumes to the same bytes (``training.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from springhead.bounds import OutOfRange, above_zero, at_least, fraction
from springhead.rl.lagrangian import ramp
from springhead.rl.networks import ExpertPolicy


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """What all online algorithms are told; each adds its own hyper-parameters. Fractions are of the whole training.

    Attributes:
        task: Task name.
        seed: Seeds networks, resets, actions and minibatches.
        iterations: How often the learner collects and updates.
        episodes_per_iteration: Whole episodes collected by one iteration.
        num_envs: Episodes stepped together (one group). A policy's arithmetic may round differently for another
            batch size, so this belongs to the result; the number of worker processes does not.
        cost_limit_start: Episode cost limit until the ramp begins.
        cost_limit_end: Episode cost limit from the ramp's end on.
        ramp_from: Fraction of the training at which the limit begins to move.
        ramp_until: Fraction of the training at which it arrives.
        hidden: Sizes of the hidden layers of all networks.
        discount: Discount factor of rewards and costs.
    """

    task: str
    seed: int
    iterations: int
    episodes_per_iteration: int = 20
    num_envs: int = 10
    cost_limit_start: float = 10.0
    cost_limit_end: float = 10.0
    ramp_from: float = 0.1
    ramp_until: float = 0.9
    hidden: tuple[int, ...] = (64, 64)
    discount: float = 0.99

    def __post_init__(self) -> None:
        at_least(1, self, "iterations", "episodes_per_iteration", "num_envs")
        at_least(0, self, "seed", "cost_limit_start", "cost_limit_end")
        above_zero(self, "discount")
        fraction(self, "discount")
        if not self.hidden or min(self.hidden) < 1:
            raise OutOfRange(f"hidden is {list(self.hidden)}; use one size or more, each at least 1")
        if not 0 <= self.ramp_from <= self.ramp_until <= 1:
            raise OutOfRange(f"the ramp [{self.ramp_from}, {self.ramp_until}] must lie within [0, 1]")

    def cost_limit(self, iteration: int) -> float:
        """The episode cost limit in force at an iteration, counted from 0."""
        done = iteration / max(self.iterations - 1, 1)
        return ramp(self.cost_limit_start, self.cost_limit_end, self.ramp_from, self.ramp_until, done)


@dataclass(frozen=True)
class Figures:
    """What one iteration reports.

    Attributes:
        env_steps: Environment steps of all iterations so far.
        episode_return: Mean undiscounted return of the iteration's episodes.
        cost_return: Their mean undiscounted cost.
        cost_limit: The limit in force.
        multiplier: The cost multiplier after its update (CPO: the dual variable of the cost; CVPO: likewise).
        losses: The algorithm's own figures by name, the same names in every iteration.
    """

    env_steps: int
    episode_return: float
    cost_return: float
    cost_limit: float
    multiplier: float
    losses: Mapping[str, float] = field(default_factory=dict)


class Learner(Protocol):
    """One training run of one algorithm."""

    algorithm: ClassVar[str]
    """The algorithm's name, for instance ``ppo-lag``."""
    iteration: int
    """Iterations done."""
    env_steps: int
    """Environment steps taken."""

    @property
    def config(self) -> OnlineConfig:
        """Its hyper-parameters."""

    def iterate(self) -> Figures:
        """Collects episodes, moves the multiplier, updates the networks, and counts the iteration."""

    def policy(self) -> ExpertPolicy:
        """The present policy with the limit of the last iteration; acts by its mean, picklable, savable."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that changes during training: tensors, and JSON-able facts."""

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Puts back what :meth:`state` returned."""
