"""Runs filters one after the other over a data set and keeps every decision.

The benchmark's order is density, outliers, inpaint, epsilon, noise; ``Settings.order`` may name another.
Falsified episodes (outliers) cannot be dropped by inpaint or epsilon, nor do they count as the best of a
side: they are a planted fault, and a fault that other filters remove would plant nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.filters import (
    Density,
    Floats,
    Judgement,
    Settings,
    density,
    epsilon,
    falsified,
    inpaint,
    noisy,
    observation_spread,
    outliers,
)
from springhead.rl.tasks import Task


class Decision(NamedTuple):
    """A row of the decisions table: what one rule decided about one episode, and why."""

    id: str
    rule: str
    kept: bool
    value: float
    threshold: float
    replaced_by: str | None


@dataclass(frozen=True)
class Filtered:
    """The outcome of all filters.

    Attributes:
        episodes: What is left, in the original order (changed episodes in the place of their source).
        sources: For each of them, the position of the episode it came from in the input.
        decisions: One row per rule and episode it looked at.
    """

    episodes: list[Episode]
    sources: list[int]
    decisions: list[Decision]


class _Run:
    """The state between two filters: which episodes are left, and the decisions so far."""

    def __init__(self, episodes: Sequence[Episode], settings: Settings, task: Task, rng: np.random.Generator) -> None:
        self.settings = settings
        self.task = task
        self.rng = rng
        self.episodes = list(episodes)
        self.sources = list(range(len(episodes)))
        self.false: list[bool] = [False] * len(episodes)
        self.total = len(episodes)
        self.decisions: list[Decision] = []

    def plane(self) -> tuple[Floats, Floats]:
        returns = np.array([episode.episode_return for episode in self.episodes])
        return returns, np.array([episode.cost_return for episode in self.episodes])

    def judge(self, judgement: Judgement, changed: dict[int, Episode] | None = None) -> None:
        """Records a judgement; drops or replaces episodes by it."""
        changed = changed or {}
        rows = zip(
            judgement.index.tolist(),
            judgement.kept.tolist(),
            judgement.value.tolist(),
            judgement.threshold.tolist(),
            strict=True,
        )
        for position, kept, value, threshold in rows:
            new = changed[position].id if position in changed else None
            self.decisions.append(Decision(self.episodes[position].id, judgement.rule, kept, value, threshold, new))
        gone = set(judgement.index[~judgement.kept].tolist()) - changed.keys()
        left = [i for i in range(len(self.episodes)) if i not in gone]
        if not left:
            raise BadInput(
                f"filter {judgement.rule}: none of its {len(self.episodes)} episodes is left "
                f"(of {self.total} at the start); loosen its settings in rl.filter"
            )
        self.episodes = [changed.get(i, self.episodes[i]) for i in left]
        self.false = [self.false[i] or (i in changed and judgement.rule == "outliers") for i in left]
        self.sources = [self.sources[i] for i in left]

    def honest(self) -> npt.NDArray[np.intp]:
        """Positions of the episodes that inpaint and epsilon may drop: falsified ones stay."""
        return np.flatnonzero(~np.array(self.false))

    def apply(self, name: str) -> None:
        settings, rng = self.settings, self.rng
        returns, costs = self.plane()
        if name == "density" and settings.density is not None:
            grid = _resolved(settings.density, self.task)
            sparse, crowded = density(
                returns, costs, grid, rng, self.task.return_range, self.task.cost_range, settings.released
            )
            kept = sparse.survivors().tolist()
            self.judge(sparse)
            moved = np.searchsorted(kept, crowded.index).astype(np.intp)
            self.judge(replace(crowded, index=moved))
        elif name == "outliers" and settings.outliers is not None:
            drawn = outliers(returns, costs, settings.outliers, rng)
            limit, chosen = settings.outliers.cost_limit, np.flatnonzero(~drawn.kept).tolist()
            self.judge(drawn, {i: falsified(self.episodes[i], limit, rng) for i in chosen})
        elif name == "inpaint":
            for number, rectangle in enumerate(settings.inpaint, start=1):
                returns, costs = self.plane()
                honest = self.honest()
                rule = f"inpaint-{number}"
                found = inpaint(returns[honest], costs[honest], rectangle, self.task.cost_range, rule)
                self.judge(replace(found, index=honest))
        elif name == "epsilon" and settings.epsilon is not None:
            honest = self.honest()
            self.judge(replace(epsilon(returns[honest], costs[honest], settings.epsilon), index=honest))
        elif name == "noise" and settings.noise is not None:
            deviation = settings.noise.scale * observation_spread(self.episodes)
            n = len(self.episodes)
            everything, size = np.arange(n), np.full(n, deviation)
            blurred = {i: noisy(self.episodes[i], deviation, rng, settings.released) for i in range(n)}
            self.judge(Judgement("noise", everything, np.zeros(n, dtype=bool), size, size), blurred)


def _resolved(settings: Density, task: Task) -> Density:
    """Returns the density settings with a preset replaced by the task's published numbers."""
    if settings.preset is None:
        return settings
    if settings.preset not in task.density:
        known = ", ".join(sorted(task.density)) or "none"
        raise BadInput(f"filter density: task {task.name} has no preset {settings.preset!r}; it has {known}")
    cost_bins, return_bins, most, least = task.density[settings.preset]
    return replace(
        settings, preset=None, cost_bins=cost_bins, return_bins=return_bins, max_per_cell=most, min_per_cell=least
    )


def apply(episodes: Sequence[Episode], settings: Settings, task: Task, seed: int) -> Filtered:
    """Runs the filters over a data set.

    Args:
        episodes: The data set, at least one episode.
        settings: Which filters run, and how.
        task: Gives the published ranges and presets.
        seed: Seeds one generator that all filters draw from, in order.

    Returns:
        The episodes left, where each came from, and every decision.

    Raises:
        BadInput: If there are no episodes, a filter leaves none, or its settings do not fit the data;
            the message names the filter.
    """
    if not episodes:
        raise BadInput("filter: the data set holds no episodes; collect some first")
    run = _Run(episodes, settings, task, np.random.default_rng(seed))
    for name in settings.order:
        run.apply(name)
    if not run.decisions:
        # No filter is switched on: say so for every episode, since lineage asks for a row each.
        run.judge(
            Judgement(
                "none",
                np.arange(len(episodes)),
                np.ones(len(episodes), dtype=bool),
                np.full(len(episodes), np.nan),
                np.full(len(episodes), np.nan),
            )
        )
    return Filtered(run.episodes, run.sources, run.decisions)
