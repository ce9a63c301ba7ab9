"""Rules that filter a data set of episodes, each with a reason for every episode it looked at.

Source: Liu et al. 2023, "Datasets and Benchmarks for Offline Safe Reinforcement Learning" (DSRL), the filters of its
section 4 and of ``pre_process_data`` in the released package (density, outliers, inpaint, epsilon, noise); the
rejection by range and the thinning over a grid are those by which its episodes were collected (FSRL's trajectory
buffer and ``process_dataset``). The rules here have the semantics they were meant to have;
``docs/methods/filters.md`` lists each difference from the released code, which ``filters_released.py`` reproduces.

A rule is a function of the episodes' returns and costs, both (n,) arrays, and perhaps a generator, that gives a
:class:`Judgement`: for each episode it looked at, a value, a threshold and what followed from comparing the two.
Nothing is dropped without such a row. ``filter_chain.apply`` runs several rules in order.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from springhead.bounds import at_least, finite
from springhead.errors import BadInput

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.intp]
Box = Literal["data", "task"]
"""Where a range of returns or costs comes from: the data at hand, or the task's published range."""


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
    index: Positions
    kept: Flags
    value: Floats
    threshold: Floats

    def survivors(self) -> Positions:
        """Positions of the episodes that were kept."""
        return self.index[self.kept]

    def fallen(self) -> Positions:
        """Positions of the episodes that were dropped or are replaced."""
        return self.index[~self.kept]


@dataclass(frozen=True)
class Ranges:
    """Settings of the range filter: a box of the (cost, return) plane; null leaves a side open."""

    cost_min: float | None = None
    cost_max: float | None = None
    return_min: float | None = None
    return_max: float | None = None

    def __post_init__(self) -> None:
        bounds = (self.cost_min, self.cost_max, self.return_min, self.return_max)
        if all(bound is None for bound in bounds):
            raise ValueError("needs at least one of cost_min, cost_max, return_min and return_max")
        finite(self, "cost_min", "cost_max", "return_min", "return_max")
        for name, low, high in (("cost", *bounds[:2]), ("return", *bounds[2:])):
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name}_min {low:g} is above {name}_max {high:g}")


@dataclass(frozen=True)
class Thin:
    """Settings of the thinning over a grid: at most so many episodes, spread over the plane."""

    max_episodes: int

    def __post_init__(self) -> None:
        if self.max_episodes < 1:
            raise ValueError("max_episodes must be at least 1")


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
    box: Box = "data"
    """What the grid covers: the range of the data, or its overlap with the task's published range."""

    def __post_init__(self) -> None:
        if self.cost_bins < 1 or self.return_bins < 1:
            raise ValueError("cost_bins and return_bins must be at least 1")
        if self.max_per_cell < 1 or self.min_per_cell < 0 or self.max_per_cell < self.min_per_cell:
            raise ValueError("needs max_per_cell >= 1 and 0 <= min_per_cell <= max_per_cell")


@dataclass(frozen=True)
class Outliers:
    """Settings of the outlier filter: good-looking episodes that lie about their cost."""

    fraction: float
    """Share of all episodes to falsify, above 0 and below 1; at least one episode is."""
    cost_limit: float
    """Falsified episodes report a cost below this limit; at least 1."""
    box: Box = "data"
    """Whose highest cost and return the candidates must reach half of."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1 or self.cost_limit < 1:
            raise ValueError("needs 0 < fraction < 1 and cost_limit >= 1")
        finite(self, "cost_limit")


@dataclass(frozen=True)
class Inpaint:
    """One rectangle of the (cost, return) plane to empty, in fractions of the ranges."""

    cost_from: float
    cost_to: float
    return_from: float
    return_to: float
    box: Box = "data"
    """Whose range of costs ``cost_from`` and ``cost_to`` are fractions of."""

    def __post_init__(self) -> None:
        if not (0 <= self.cost_from <= self.cost_to <= 1 and 0 <= self.return_from <= self.return_to <= 1):
            raise ValueError("each range must satisfy 0 <= from <= to <= 1")


@dataclass(frozen=True)
class Epsilon:
    """Settings of the epsilon filter: cut the best episodes off one side of the limit."""

    epsilon: float
    """Above 0: drop safe episodes within epsilon of the best safe return (harder). Below 0: drop
    unsafe ones within its size of the best unsafe return (easier)."""
    cost_limit: float
    """Episodes of this cost or less are the safe ones; at least 0."""

    def __post_init__(self) -> None:
        if self.epsilon == 0:
            raise ValueError("epsilon: 0 names neither side; leave the step out to switch the filter off")
        finite(self, "epsilon")
        at_least(0, self, "cost_limit")


@dataclass(frozen=True)
class Noise:
    """Settings of the noise filter: Gaussian noise on observations."""

    scale: float
    """Standard deviation as a multiple of that of all observation entries together; above 0."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError("scale must be above 0; leave the step out to switch the filter off")
        finite(self, "scale")


@dataclass(frozen=True)
class Subsample:
    """Settings of the subsampling: scarce data of the same kind."""

    ratio: float
    """Share of the steps to keep, above 0 and at most 1; whole episodes in random order until it is reached."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio:g}; it must be above 0 and at most 1")


def ranges(returns: Floats, costs: Floats, settings: Ranges) -> list[Judgement]:
    """Rejects episodes outside a box of the plane: one judgement per bound that is set.

    Value is the episode's cost or return, threshold the bound; the bounds themselves are inside. Each judgement
    looks at what the ones before it have left.

    Args:
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        settings: The box.
    """
    left = np.arange(len(returns))
    found = []
    for name, values, bound, sign in (
        ("range-cost-min", costs, settings.cost_min, -1),
        ("range-cost-max", costs, settings.cost_max, 1),
        ("range-return-min", returns, settings.return_min, -1),
        ("range-return-max", returns, settings.return_max, 1),
    ):
        if bound is not None:
            value = values[left]
            found.append(Judgement(name, left, sign * value <= sign * bound, value, np.full(len(left), float(bound))))
            left = found[-1].survivors()
    return found


def cells(values: Floats, low: float, high: float, bins: int) -> npt.NDArray[np.int64]:
    """Returns the grid cell of each value, 0 … bins - 1, or -1 outside [low, high].

    The highest value belongs to the last cell. Where all values are equal the grid has no width, and they share
    cell 0.
    """
    outside = (values < low) | (values > high)
    if not high > low:
        return np.where(outside, -1, 0)
    found = np.minimum(np.floor((values - low) / ((high - low) / bins)), bins - 1)
    return np.where(outside, -1, found.astype(np.int64))


def thin(returns: Floats, costs: Floats, settings: Thin, rng: np.random.Generator) -> Judgement:
    """Keeps at most ``max_episodes`` of the episodes, spread over a grid on the plane.

    The grid has ceil(sqrt(max_episodes)) cells a side over the range of the data. The last episode of every
    non-empty cell is kept; what room is left is filled by drawing a non-empty cell, each as likely as another, and
    keeping its last episode that is not kept yet. Where there are more non-empty cells than room, cells that are
    kept are drawn at random too. Value is an episode's place in that order, from 1, threshold ``max_episodes``.

    The draws are made without a loop: every cell is a clock that strikes after exponential waiting times of mean 1,
    and of several such clocks each is as likely as another to strike next.
    """
    n = len(returns)
    side = int(np.ceil(np.sqrt(settings.max_episodes)))
    across, up = (cells(x, float(x.min()), float(x.max()), side) for x in (costs, returns))
    cell = across * side + up
    order = np.lexsort((-np.arange(n), cell))  # by cell, the last episode first
    first = np.r_[True, cell[order][1:] != cell[order][:-1]]
    waits = rng.exponential(size=n)
    clock = np.cumsum(waits)
    since = clock - clock[np.maximum.accumulate(np.where(first, np.arange(n), 0))]
    # The first of each cell come before all others, in random order; then whose cell's clock strikes earlier.
    place = np.empty(n)
    place[order[np.lexsort((np.where(first, waits, since), ~first))]] = np.arange(1.0, n + 1)
    threshold = np.full(n, float(settings.max_episodes))
    return Judgement("thin", np.arange(n), place <= threshold, place, threshold)


def box(values: Floats, published: tuple[float, float] | None, which: Box, rule: str) -> tuple[float, float]:
    """Returns the range a rule works on: that of the values, or the published one.

    Raises:
        BadInput: If the published range is asked for and there is none.
    """
    if which == "data":
        return float(values.min()), float(values.max())
    if published is None:
        raise BadInput(f"filter {rule}: box 'task' needs the task's published ranges; use box 'data'")
    return published


def density(
    returns: Floats,
    costs: Floats,
    settings: Density,
    rng: np.random.Generator,
    return_range: tuple[float, float] | None = None,
    cost_range: tuple[float, float] | None = None,
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
    """
    placed = []
    for values, published, bins in (
        (costs, cost_range, settings.cost_bins),
        (returns, return_range, settings.return_bins),
    ):
        low, high = box(values, None, "data", "density")
        if settings.box == "task":
            least, most = box(values, published, "task", "density")
            low, high = max(low, least), min(high, most)
        placed.append(cells(values, low, high, bins))
    across, up = placed
    cell = np.where((across < 0) | (up < 0), -1, across * settings.return_bins + up)
    count = np.where(cell < 0, 0, np.bincount(cell + 1)[cell + 1]).astype(np.float64)
    sparse = Judgement(
        "density-sparse",
        np.arange(len(returns)),
        (count > settings.min_per_cell) & (cell >= 0),
        count,
        np.full(len(returns), float(settings.min_per_cell)),
    )
    left = sparse.survivors()
    place = _places(cell[left], rng)
    most_allowed = np.full(len(left), float(settings.max_per_cell))
    return [sparse, Judgement("density-crowded", left, place <= most_allowed, place, most_allowed)]


def released_cells(
    costs: npt.NDArray[np.floating[Any]],
    returns: npt.NDArray[np.floating[Any]],
    settings: Density,
    published: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> list[list[int]]:
    """Positions by cell as DSRL's and OSRL's released code have them, cells in the order in which they are first met.

    The highest value has a cell of its own beyond the grid; where all values are equal, every position has one. Here
    beside :func:`cells`, since CDT's augmentation has the same grid as the density filter.

    Args:
        costs: (n,) episode costs.
        returns: (n,) episode returns.
        settings: The grid.
        published: Ranges of costs and of returns; what lies outside is in no cell. None for those of the values.
    """
    keys: list[Any] = []
    inside = np.ones(len(returns), dtype=bool)
    for number, (values, bins) in enumerate(((costs, settings.cost_bins), (returns, settings.return_bins))):
        low: Any = values.min()
        high: Any = values.max()
        if published is not None:
            low, high = max(low, published[number][0]), min(high, published[number][1])
        inside &= (values >= low) & (values <= high)
        with np.errstate(invalid="ignore", divide="ignore"):
            keys.append((values - low) // ((high - low) / bins))
    members: dict[Any, list[int]] = defaultdict(list)
    for position in np.flatnonzero(inside).tolist():
        key = (float(keys[0][position]), float(keys[1][position]))
        members[position if np.isnan(key).any() else key].append(position)
    return list(members.values())


def thinned(cell: list[int], settings: Density, rng: random.Random) -> list[int]:
    """At most ``max_per_cell`` of a cell, drawn at random where it has more."""
    return rng.sample(cell, settings.max_per_cell) if len(cell) > settings.max_per_cell else cell


def _places(group: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Returns each element's place, from 1, in a random order of its own group."""
    shuffled = rng.permutation(len(group))
    ordered = shuffled[np.argsort(group[shuffled], kind="stable")]
    starts = np.r_[True, group[ordered][1:] != group[ordered][:-1]] if len(group) else np.empty(0, dtype=bool)
    run = np.arange(len(group)) - np.maximum.accumulate(np.where(starts, np.arange(len(group)), 0))
    places = np.empty(len(group))
    places[ordered] = run + 1
    return places


def outliers(
    returns: Floats, costs: Floats, settings: Outliers, rng: np.random.Generator, highest: tuple[float, float]
) -> Judgement:
    """Draws the episodes to falsify among those with high cost and high return.

    Candidates have at least half the highest cost and half the highest return. Value is a
    candidate's place in a random draw, from 1, threshold the number to falsify; those up to the
    threshold are replaced (``kept`` is False), see ``filter_chain``.

    Args:
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        settings: How many, and the limit they claim to respect.
        rng: Draws the order of the candidates.
        highest: Highest (cost, return), of the data or as published.

    Raises:
        BadInput: If there are fewer candidates than episodes to falsify.
    """
    number = max(1, int(len(returns) * settings.fraction))
    candidates = np.flatnonzero((costs >= highest[0] / 2) & (returns >= highest[1] / 2))
    check_candidates(len(candidates), number, len(returns), highest)
    value = np.full(len(returns), np.nan)
    value[candidates] = rng.permutation(len(candidates)) + 1.0
    threshold = np.full(len(returns), float(number))
    return Judgement("outliers", np.arange(len(returns)), ~(value <= number), value, threshold)


def check_candidates(candidates: int, number: int, total: int, highest: tuple[float, float]) -> None:
    """Raises BadInput where fewer episodes can be falsified than are to be, given the highest (cost, return)."""
    if candidates < number:
        raise BadInput(
            f"filter outliers: {number} of {total} episodes are to be falsified, but only {candidates} have at least "
            f"half of the highest cost, {highest[0]:g}, and of the highest return, {highest[1]:g}; in rl.filter.steps "
            f"{'lower its fraction, ' if candidates else ''}use another box or leave the step out"
        )


def inpaint(
    returns: Floats, costs: Floats, settings: Inpaint, cost_range: tuple[float, float], name: str = "inpaint"
) -> Judgement:
    """Empties a rectangle of the plane.

    The strip of costs is a fraction of a cost range. Within it, value is where the return
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


def subsample(lengths: npt.NDArray[np.int64], settings: Subsample, rng: np.random.Generator) -> Judgement:
    """Keeps whole episodes, in random order, until a share of all steps is reached.

    Source: Cen et al. 2024, "Learning from Sparse Offline Datasets via Conservative Density Estimation", its data
    ratios. The last episode taken may go beyond the share. Of one generator's state a smaller share keeps a part of
    what a greater one keeps.

    Value is the share of the steps of the episodes before this one in the random order, threshold the ratio; episodes
    below it are kept.

    Args:
        lengths: (n,) numbers of steps.
        settings: The share.
        rng: Draws the order.
    """
    order = rng.permutation(len(lengths))
    before = np.zeros(len(lengths))
    before[order[1:]] = np.cumsum(lengths[order], dtype=np.float64)[:-1] / float(lengths.sum())
    threshold = np.full(len(lengths), settings.ratio)
    return Judgement("subsample", np.arange(len(lengths)), before < settings.ratio, before, threshold)
