"""Filters that shape a data set of episodes, with a reason recorded for every episode.

These are the five "difficulty" filters of the DSRL benchmark (Liu et al. 2023, "Datasets and
Benchmarks for Offline Safe Reinforcement Learning", section 4 and its ``pre_process_data``), with
the semantics they were meant to have; ``docs/methods/filters.md`` lists each difference from the
released code, and ``released=True`` brings back those that change results.

Every rule is a pure function of episode returns and costs (and a generator) that gives a
:class:`Judgement`: for each episode it looked at, a value, a threshold and what followed from
comparing the two. Nothing is dropped without such a row. ``filter_chain.apply`` runs several in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.dataset import Episode

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Judgement:
    """What one rule decided, for each episode it looked at.

    Attributes:
        rule: The rule's name, as it appears in the decisions table.
        index: int (m,), positions of the episodes in the arrays the rule was given.
        kept: bool (m,), False where the episode is dropped or replaced by a changed one.
        value: float (m,), what was compared; NaN where the rule does not apply to the episode.
        threshold: float (m,), what it was compared with; NaN likewise.
    """

    rule: str
    index: npt.NDArray[np.intp]
    kept: Flags
    value: Floats
    threshold: Floats

    def survivors(self) -> npt.NDArray[np.intp]:
        """Positions of the episodes that were kept."""
        return self.index[self.kept]


@dataclass(frozen=True)
class Density:
    """Settings of the density filter: a grid over the (cost, return) plane."""

    cost_bins: int = 10
    return_bins: int = 20
    max_per_cell: int = 5
    """Cells with more episodes are thinned to this many, at random."""
    min_per_cell: int = 0
    """Cells with this many episodes or fewer are emptied."""
    preset: str | None = None
    """Use the benchmark's four numbers for the task instead, by their name ("0.5", "0.75")."""
    box: Literal["data", "task"] = "data"
    """What the grid covers: the range of the data, or its overlap with the task's published range."""

    def __post_init__(self) -> None:
        if self.cost_bins < 1 or self.return_bins < 1:
            raise ValueError("density: cost_bins and return_bins must be at least 1")
        if self.max_per_cell < 1 or self.min_per_cell < 0 or self.max_per_cell < self.min_per_cell:
            raise ValueError("density: needs max_per_cell >= 1 and 0 <= min_per_cell <= max_per_cell")


@dataclass(frozen=True)
class Outliers:
    """Settings of the outlier filter: good-looking episodes that lie about their cost."""

    fraction: float
    """Share of all episodes to falsify, above 0 and below 1; at least one episode is."""
    cost_limit: float
    """Falsified episodes report a cost below this limit; at least 1."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1 or self.cost_limit < 1:
            raise ValueError("outliers: needs 0 < fraction < 1 and cost_limit >= 1")


@dataclass(frozen=True)
class Inpaint:
    """One rectangle of the (cost, return) plane to empty, in fractions of the ranges."""

    cost_from: float
    cost_to: float
    return_from: float
    return_to: float

    def __post_init__(self) -> None:
        if not (0 <= self.cost_from <= self.cost_to <= 1 and 0 <= self.return_from <= self.return_to <= 1):
            raise ValueError("inpaint: each range must satisfy 0 <= from <= to <= 1")


@dataclass(frozen=True)
class Epsilon:
    """Settings of the epsilon filter: cut the best episodes off one side of the limit."""

    epsilon: float
    """Above 0: drop safe episodes within epsilon of the best safe return (harder). Below 0: drop
    unsafe ones within its size of the best unsafe return (easier)."""
    cost_limit: float

    def __post_init__(self) -> None:
        if self.epsilon == 0:
            raise ValueError("epsilon: 0 names neither side; use null to switch the filter off")


@dataclass(frozen=True)
class Noise:
    """Settings of the noise filter: Gaussian noise on observations."""

    scale: float
    """Standard deviation as a multiple of that of all observation entries together; above 0."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError("noise: scale must be above 0; use null to switch the filter off")


ORDER = ("density", "outliers", "inpaint", "epsilon", "noise")
"""The benchmark's order of the filters."""


@dataclass(frozen=True)
class Settings:
    """Which filters run, in which order. A filter whose settings are null does not run."""

    density: Density | None = None
    outliers: Outliers | None = None
    inpaint: tuple[Inpaint, ...] = ()
    epsilon: Epsilon | None = None
    noise: Noise | None = None
    order: tuple[str, ...] = ORDER
    released: bool = False
    """Bring back what the released code does differently (``docs/methods/filters.md``)."""

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(ORDER):
            raise ValueError(f"order: must name each of {', '.join(ORDER)} once, got {', '.join(self.order)}")


def cells(values: Floats, low: float, high: float, bins: int, released: bool = False) -> npt.NDArray[np.int64]:
    """Returns the grid cell of each value, 0 … bins − 1, or −1 outside [low, high].

    The highest value belongs to the last cell; the released code gave it a cell of its own, number
    ``bins``. Where all values are equal the grid has no width, and they share cell 0.
    """
    outside = (values < low) | (values > high)
    if high > low:
        found = np.floor((values - low) / ((high - low) / bins)).astype(np.int64)
        if not released:
            found = np.minimum(found, bins - 1)
    else:
        found = np.zeros(len(values), dtype=np.int64)
    return np.where(outside, -1, found)


def density(
    returns: Floats,
    costs: Floats,
    settings: Density,
    rng: np.random.Generator,
    return_range: tuple[float, float] | None = None,
    cost_range: tuple[float, float] | None = None,
    released: bool = False,
) -> list[Judgement]:
    """Evens out the (cost, return) plane: empties sparse cells, then thins crowded ones.

    Two judgements. ``density-sparse``: value is the number of episodes in the cell, kept if it is
    above ``min_per_cell``. ``density-crowded``, over the rest: value is the episode's place in a
    random order of its cell, from 1, kept if it is at most ``max_per_cell``. Episodes outside the
    grid's box have the count 0 and are dropped as sparse.

    Args:
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        settings: The grid and the two bounds.
        rng: Draws the random order.
        return_range: The published range, for ``box="task"``.
        cost_range: Likewise.
        released: Give the highest value a cell of its own.
    """
    boxes = [(float(x.min()), float(x.max())) for x in (costs, returns)]
    if settings.box == "task":
        if return_range is None or cost_range is None:
            raise BadInput("filter density: box 'task' needs the task's published ranges; use box 'data'")
        published = (cost_range, return_range)
        boxes = [(max(b[0], p[0]), min(b[1], p[1])) for b, p in zip(boxes, published, strict=True)]
    across = cells(costs, *boxes[0], settings.cost_bins, released)
    up = cells(returns, *boxes[1], settings.return_bins, released)
    cell = np.where((across < 0) | (up < 0), -1, across * (settings.return_bins + 1) + up)
    _, member, number = np.unique(cell, return_inverse=True, return_counts=True)
    count = np.where(cell < 0, 0, number[member]).astype(np.float64)
    everything = np.arange(len(returns))
    sparse = Judgement(
        "density-sparse",
        everything,
        (count > settings.min_per_cell) & (cell >= 0),
        count,
        np.full(len(returns), float(settings.min_per_cell)),
    )
    left = sparse.survivors()
    place = _places(cell[left], rng)
    crowded = Judgement(
        "density-crowded",
        left,
        place <= settings.max_per_cell,
        place,
        np.full(len(left), float(settings.max_per_cell)),
    )
    return [sparse, crowded]


def _places(group: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Returns each element's place, from 1, in a random order of its own group."""
    shuffled = rng.permutation(len(group))
    ordered = shuffled[np.argsort(group[shuffled], kind="stable")]
    starts = np.r_[True, group[ordered][1:] != group[ordered][:-1]] if len(group) else np.empty(0, dtype=bool)
    run = np.arange(len(group)) - np.maximum.accumulate(np.where(starts, np.arange(len(group)), 0))
    places = np.empty(len(group))
    places[ordered] = run + 1
    return places


def outliers(returns: Floats, costs: Floats, settings: Outliers, rng: np.random.Generator) -> Judgement:
    """Draws the episodes to falsify among those with high cost and high return.

    Candidates have at least half the highest cost and half the highest return. Value is a
    candidate's place in a random draw, from 1, threshold the number to falsify; those up to the
    threshold are replaced (``kept`` is False), see :func:`falsified`.

    Raises:
        BadInput: If there are fewer candidates than episodes to falsify.
    """
    number = max(1, int(len(returns) * settings.fraction))
    candidates = np.flatnonzero((costs >= costs.max() / 2) & (returns >= returns.max() / 2))
    if len(candidates) < number:
        raise BadInput(
            f"filter outliers: {number} of {len(returns)} episodes are to be falsified, but only {len(candidates)} "
            "have high cost and high return; lower rl.filter.outliers.fraction"
        )
    value = np.full(len(returns), np.nan)
    value[candidates] = rng.permutation(len(candidates)) + 1.0
    threshold = np.full(len(returns), float(number))
    return Judgement("outliers", np.arange(len(returns)), ~(value <= number), value, threshold)


def falsified(episode: Episode, cost_limit: float, rng: np.random.Generator) -> Episode:
    """Returns an episode that claims half again its rewards and a cost below the limit.

    The cost is k ~ U{0, …, ⌊limit⌋ − 1}, as 1 at k random steps and 0 elsewhere.
    """
    claimed = min(int(rng.integers(int(cost_limit))), episode.length)
    costs = np.zeros_like(episode.costs)
    costs[rng.choice(episode.length, size=claimed, replace=False)] = 1.0
    return replace(episode, rewards=(episode.rewards * np.float32(1.5)).astype(np.float32), costs=costs)


def inpaint(
    returns: Floats, costs: Floats, settings: Inpaint, cost_range: tuple[float, float], name: str = "inpaint"
) -> Judgement:
    """Empties a rectangle of the plane.

    The strip of costs is a fraction of the task's cost range. Within it, value is where the return
    lies between the strip's lowest (0) and highest (1) return, threshold the rectangle's upper end;
    episodes from ``return_from`` to ``return_to`` are dropped. Outside the strip value is NaN.
    """
    least_cost, width = cost_range[0], cost_range[1] - cost_range[0]
    low, high = least_cost + settings.cost_from * width, least_cost + settings.cost_to * width
    strip = (costs >= low) & (costs <= high)
    value = np.full(len(returns), np.nan)
    if strip.any():
        least, most = returns[strip].min(), returns[strip].max()
        value[strip] = (returns[strip] - least) / (most - least) if most > least else 0.0
    inside = (value >= settings.return_from) & (value <= settings.return_to)
    return Judgement(name, np.arange(len(returns)), ~inside, value, np.where(strip, settings.return_to, np.nan))


def epsilon(returns: Floats, costs: Floats, settings: Epsilon) -> Judgement:
    """Drops the best episodes on one side of the cost limit.

    The side is safe (C <= limit) for epsilon > 0 and unsafe for epsilon < 0. Value is the return,
    threshold the side's best return less |epsilon|; episodes at or above it are dropped. On the
    other side both are NaN.
    """
    side = (costs <= settings.cost_limit) == (settings.epsilon > 0)
    value = np.where(side, returns, np.nan)
    bound = returns[side].max() - abs(settings.epsilon) if side.any() else np.nan
    threshold = np.where(side, bound, np.nan)
    return Judgement("epsilon", np.arange(len(returns)), ~(value >= threshold), value, threshold)


def observation_spread(episodes: Sequence[Episode]) -> float:
    """Returns the one standard deviation of all observation entries of all episodes."""
    count = sum(episode.observations.size for episode in episodes)
    total = sum(float(episode.observations.sum(dtype=np.float64)) for episode in episodes)
    mean = total / count
    square = sum(float(((episode.observations - mean) ** 2).sum(dtype=np.float64)) for episode in episodes)
    return float(np.sqrt(square / count))


def noisy(episode: Episode, deviation: float, rng: np.random.Generator, released: bool = False) -> Episode:
    """Returns an episode whose states carry Gaussian noise.

    Each state gets one noise vector, also where it appears as a successor, so that
    next_observations[t] stays observations[t + 1]. The released code draws the two independently.
    """
    width = episode.observations.shape[1]
    if released:
        draws = rng.normal(0.0, deviation, (2, episode.length, width))
        before, after = draws[0], draws[1]
    else:
        draws = rng.normal(0.0, deviation, (episode.length + 1, width))
        before, after = draws[:-1], draws[1:]
    return replace(
        episode,
        observations=(episode.observations + before).astype(np.float32),
        next_observations=(episode.next_observations + after).astype(np.float32),
    )
