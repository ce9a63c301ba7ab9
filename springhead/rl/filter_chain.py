"""Runs filter steps one after the other over a data set and keeps every decision.

A step is one rule with its settings; steps run in the order in which they are listed, a rule as often as it is
listed. Falsified episodes (outliers) cannot be dropped by inpaint or epsilon, nor do they count as the best of a
side: they are a planted fault, and a fault that other filters remove would plant nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from springhead.errors import BadInput
from springhead.rl import filters, filters_released
from springhead.rl.dataset import Dataset
from springhead.rl.filter_arrays import with_noise
from springhead.rl.filter_state import Filtered, State, falsify, noisy
from springhead.rl.filters import Judgement, Positions
from springhead.rl.tasks import Task

ORDER = ("range", "thin", "density", "outliers", "inpaint", "epsilon", "noise")
"""The names of the released rules in the released order: that of collection (range, thin), then that
of the benchmark's ``pre_process_data``."""
RULES = (*ORDER, "subsample")
"""The names of all rules."""


Rule = (
    filters.Ranges
    | filters.Thin
    | filters.Density
    | filters.Outliers
    | filters.Inpaint
    | filters.Epsilon
    | filters.Noise
    | filters.Subsample
)


@dataclass(frozen=True)
class Step:
    """One step: a mapping of one key, the rule, to the rule's settings."""

    range: filters.Ranges | None = None
    thin: filters.Thin | None = None
    density: filters.Density | None = None
    outliers: filters.Outliers | None = None
    inpaint: filters.Inpaint | None = None
    epsilon: filters.Epsilon | None = None
    noise: filters.Noise | None = None
    subsample: filters.Subsample | None = None

    def __post_init__(self) -> None:
        named = [key for key in RULES if getattr(self, key) is not None]
        if len(named) != 1:
            found = f"found {' and '.join(named)}" if named else "found none"
            raise ValueError(f"a step names exactly one of {', '.join(RULES)}; {found}")

    @property
    def rule(self) -> str:
        """The rule's name."""
        return next(key for key in RULES if getattr(self, key) is not None)

    @property
    def settings(self) -> Rule:
        """The rule's settings."""
        found: Rule = getattr(self, self.rule)
        return found


@dataclass(frozen=True)
class Settings:
    """Which rules run, and in which order; none leaves the data as they are."""

    steps: tuple[Step, ...] = ()
    released: bool = False
    """Do as the released code does, its faults included (``docs/methods/filters.md``)."""

    def __post_init__(self) -> None:
        rules = [step.rule for step in self.steps]
        if self.released and (ours := set(rules) - set(ORDER)):
            raise ValueError(f"steps: the released code has no {min(ours)}; leave it out or set released: false")
        for before, after in pairwise(rules):
            again = before == after != "inpaint"
            if self.released and (again or ORDER.index(before) > ORDER.index(after)):
                raise ValueError(
                    f"steps: the released code cannot run {after} after {before}; its order is {', '.join(ORDER)}, "
                    "each once (several rectangles of inpaint), so reorder the steps or set released: false"
                )


def resolved(settings: Rule, task: Task) -> Rule:
    """Returns settings of which density's preset is replaced by the task's published numbers.

    Raises:
        BadInput: If the task has no such preset.
    """
    if not isinstance(settings, filters.Density) or settings.preset is None:
        return settings
    if settings.preset not in task.density:
        known = ", ".join(sorted(task.density)) or "none"
        raise BadInput(f"filter density: task {task.name} has no preset {settings.preset!r}; it has {known}")
    cost_bins, return_bins, most, least = task.density[settings.preset]
    return filters.Density(cost_bins, return_bins, most, least, box=settings.box)


def _run(state: State, settings: Rule, rng: np.random.Generator, rectangle: str) -> None:
    """Runs one rule on what is left."""
    task, returns, costs = state.task, state.returns, state.costs
    match settings:
        case filters.Ranges():
            _judge(state, filters.ranges(returns, costs, settings))
        case filters.Thin():
            state.judge(filters.thin(returns, costs, settings, rng))
        case filters.Density():
            _judge(state, filters.density(returns, costs, settings, rng, task.return_range, task.cost_range))
        case filters.Outliers():
            published = settings.box == "task"
            highest = (
                task.cost_range[1] if published else float(costs.max()),
                task.return_range[1] if published else float(returns.max()),
            )
            falsify(state, *_claims(state, filters.outliers(returns, costs, settings, rng, highest), settings, rng))
        case filters.Inpaint():
            honest = np.flatnonzero(~state.planted)
            # Where every episode is falsified there is nothing to judge, and no range to measure.
            known = len(honest) > 0
            width = filters.box(costs[honest], task.cost_range, settings.box, "inpaint") if known else (0.0, 0.0)
            found = filters.inpaint(returns[honest], costs[honest], settings, width, rectangle)
            state.judge(replace(found, index=honest))
        case filters.Epsilon():
            honest = np.flatnonzero(~state.planted)
            state.judge(replace(filters.epsilon(returns[honest], costs[honest], settings), index=honest))
        case filters.Noise():
            noisy(state, *with_noise(state.data, state.at, settings.scale, rng))
        case filters.Subsample():
            lengths = (state.data.ends - state.data.starts)[state.at]
            state.judge(filters.subsample(lengths, settings, rng))


def _judge(state: State, judgements: list[Judgement]) -> None:
    """Records judgements of one rule, each on what the ones before it left."""
    for judgement in judgements:
        state.judge(replace(judgement, index=np.arange(len(state.at))))


def _claims(
    state: State, drawn: Judgement, settings: filters.Outliers, rng: np.random.Generator
) -> tuple[Judgement, list[tuple[int, Positions]]]:
    """Draws what falsified episodes claim: k ~ U{0, …, floor(limit) - 1}, as a cost of 1 at k random steps."""
    chosen = drawn.fallen()
    lengths = (state.data.ends - state.data.starts)[state.at[chosen]]
    numbers = np.minimum(rng.integers(int(settings.cost_limit), size=len(chosen)), lengths)
    pairs = zip(chosen.tolist(), numbers.tolist(), lengths.tolist(), strict=True)
    return drawn, [(i, rng.choice(length, size=k, replace=False)) for i, k, length in pairs]


def apply(data: Dataset, settings: Settings, task: Task, seed: int) -> Filtered:
    """Runs the steps over a data set.

    Args:
        data: The data set, at least one episode; left as it is.
        settings: Which rules run, and how.
        task: Gives the published ranges and presets.
        seed: Seeds one generator that all rules draw from, in order. The released code seeds its own for all rules
            but density and thin, which draw from Python's ``random``, seeded by this.

    Returns:
        The episodes left, where each came from, and every decision.

    Raises:
        BadInput: If there are no episodes, a rule leaves none, or its settings do not fit the data; the message
            names the rule.
    """
    if not len(data):
        raise BadInput("filter: the data set holds no episodes; collect some first")
    state = State(data, task)
    steps = [resolved(step.settings, task) for step in settings.steps]
    if settings.released:
        filters_released.run(state, steps, seed)
    else:
        rng = np.random.default_rng(seed)
        for number, step in enumerate(steps):
            rectangle = 1 + sum(isinstance(before, filters.Inpaint) for before in steps[:number])
            _run(state, step, rng, f"inpaint-{rectangle}")
    return state.outcome()
