"""The Constrained Decision Transformer's augmentation: infeasible targets, safe answers.

Liu et al. 2023, "Constrained Decision Transformer for Offline Safe Reinforcement Learning",
section 4.2 and Algorithm 1. A policy conditioned on a return and a cost target does not know which
of the two to give up when both cannot be had. So a share of the training set pairs targets above
the frontier with the nearest episode that keeps the cost target: the cost wins.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from springhead.bounds import OutOfRange, above_zero, at_least, fraction
from springhead.errors import BadInput
from springhead.rl.filters import Density, density, released_cells, thinned
from springhead.rl.offline.frontier import fit, pareto

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation. Numbers left at null are derived from the data."""

    share: float = 0.2
    """Relabelled items, as a share of the episodes; 0 switches augmentation off."""
    degree: int = 2
    """Degree of the frontier polynomial, at most one less than its distinct costs."""
    max_return: float | None = None
    """Highest return target; derived: the data's highest return and a tenth of their range."""
    min_return: float = 0.0
    """Return targets begin this much above the frontier; the released code's tasks have 1."""
    max_return_decrease: float | None = None
    """How much less than its nearest episode's return a substitute may have; derived: a fifth of the range."""
    distance_offset: float = 1.0
    """Substitutes are drawn with probability 1 / (distance + offset)."""
    pairs: Literal["own", "grouped"] = "own"
    """Each target keeps the episode that answers it, or, as in the released code, answers are put in the order of the
    episodes they stand for before they meet the targets again."""
    extrapolate: bool = False
    """Use the polynomial beyond the frontier's costs, and draw from a reversed interval where it exceeds the highest
    return target, as in the released code."""
    cost_bins: int = 10
    return_bins: int = 50
    max_per_cell: int = 10
    min_per_cell: int = 2
    """The grid that evens out the plane first, see ``filters.Density``."""
    grid: Literal["clamped", "released"] = "clamped"
    """Whether the highest cost and the highest return belong to the last cells, or, as in the released code, to cells
    of their own beyond them, which are soon too sparse to be kept."""

    def __post_init__(self) -> None:
        fraction(self, "share")
        above_zero(self, "distance_offset")
        at_least(0, self, "degree", "min_per_cell", "min_return")
        at_least(1, self, "cost_bins", "return_bins", "max_per_cell")
        if self.max_per_cell < self.min_per_cell:
            raise OutOfRange(
                f"max_per_cell is {self.max_per_cell}, below min_per_cell, {self.min_per_cell}; raise it or lower that"
            )
        if self.max_return_decrease is not None:
            at_least(0, self, "max_return_decrease")
        for name in ("min_return", "max_return"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise OutOfRange(f"{name} is {value}; use a finite number, or leave it out")


@dataclass(frozen=True)
class Items:
    """What is sampled in training: episodes, each under a pair of targets.

    Attributes:
        episode: int (m,), position of the episode.
        target_return: float (m,), the return-to-go at its first step.
        target_cost: float (m,), the cost-to-go at its first step.
    """

    episode: npt.NDArray[np.intp]
    target_return: Floats
    target_cost: Floats


def plain(returns: Floats, costs: Floats) -> Items:
    """Every episode under what it achieved."""
    return Items(np.arange(len(returns)), returns.copy(), costs.copy())


def infeasible_targets(
    returns: Floats, costs: Floats, number: int, settings: Augmentation, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Draws targets above the frontier: costs evenly from least to most, returns uniformly above p(C).

    The polynomial p is fitted to the Pareto set, and is held constant beyond its costs: there it
    would be an extrapolation. Where p reaches the highest return, that return is the target. Returns
    begin ``min_return`` above p.

    Returns:
        Target returns (number,) and target costs (number,).
    """
    best = pareto(returns, costs)
    curve = fit(returns[best], costs[best], settings.degree)
    spread = float(returns.max() - returns.min())
    most = settings.max_return if settings.max_return is not None else float(returns.max()) + 0.1 * spread
    target_costs = np.linspace(costs.min(), costs.max(), number)
    if settings.extrapolate:
        low = curve(target_costs) + settings.min_return
    else:
        held = curve(np.clip(target_costs, costs[best].min(), costs[best].max()))
        low = np.minimum(held + settings.min_return, most)
    return low + (most - low) * rng.random(number), target_costs


def safe_answers(
    returns: Floats,
    costs: Floats,
    target_returns: Floats,
    target_costs: Floats,
    settings: Augmentation,
    rng: np.random.Generator,
) -> npt.NDArray[np.intp]:
    """Chooses for each target an episode that keeps its cost.

    The nearest episode with C <= target cost answers the first target it is nearest to. For further
    targets a substitute is drawn among the episodes that cost no more and return at most
    ``max_return_decrease`` less. Each target keeps its own episode unless ``pairs`` is "grouped".

    Returns:
        Positions (number,), one for each target, in the targets' order.
    """
    spread = float(returns.max() - returns.min())
    decrease = settings.max_return_decrease if settings.max_return_decrease is not None else 0.2 * spread
    answered: dict[int, int] = {}
    answers, turns = np.empty((2, len(target_costs)), dtype=np.intp)
    for number, (target_return, target_cost) in enumerate(zip(target_returns, target_costs, strict=True)):
        distance = np.hypot(returns - target_return, costs - target_cost)
        nearest = int(np.argmin(np.where(costs <= target_cost, distance, np.inf)))
        if nearest in answered:
            like = np.flatnonzero((costs <= costs[nearest]) & (returns >= returns[nearest] - decrease))
            away = np.hypot(returns[like] - returns[nearest], costs[like] - costs[nearest])
            weights = 1.0 / (away + settings.distance_offset)
            answers[number] = rng.choice(like, p=weights / weights.sum())
        else:
            answers[number] = nearest
        turns[number] = answered.setdefault(nearest, number)
    return answers[np.argsort(turns, kind="stable")] if settings.pairs == "grouped" else answers


def evened_out(
    returns: Floats, costs: Floats, settings: Augmentation, rng: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Positions of the episodes that the grid keeps; the released one's in the order of its cells.

    The released code keeps a cell that it thins, whatever ``min_per_cell``; the same, since that is at most
    ``max_per_cell``.
    """
    grid = Density(settings.cost_bins, settings.return_bins, settings.max_per_cell, settings.min_per_cell)
    if settings.grid == "clamped":
        return density(returns, costs, grid, rng)[1].survivors()
    draws = random.Random(int(rng.integers(2**63)))
    members = [cell for cell in released_cells(costs, returns, grid) if len(cell) > grid.min_per_cell]
    return np.array([position for cell in members for position in thinned(cell, grid, draws)], dtype=np.intp)


def relabelled(returns: Floats, costs: Floats, settings: Augmentation, rng: np.random.Generator) -> Items:
    """Returns the augmented items: episodes under infeasible targets.

    Args:
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        settings: See :class:`Augmentation`.
        rng: Draws the grid's subset, the targets and the substitutes.

    Raises:
        BadInput: If the grid leaves no episode to take the frontier from.
    """
    kept = evened_out(returns, costs, settings, rng)
    number = int(settings.share * len(kept))
    if not len(kept):
        raise BadInput(
            f"cdt augmentation: its grid leaves none of {len(returns)} episodes (cells with "
            f"{settings.min_per_cell} or fewer are emptied); lower rl.train.algorithms.cdt.augmentation.min_per_cell"
        )
    target_returns, target_costs = infeasible_targets(returns[kept], costs[kept], number, settings, rng)
    answers = safe_answers(returns[kept], costs[kept], target_returns, target_costs, settings, rng)
    return Items(kept[answers], target_returns, target_costs)


def joined(first: Items, second: Items) -> Items:
    """Both sets of items, one after the other."""
    return Items(
        np.concatenate([first.episode, second.episode]),
        np.concatenate([first.target_return, second.target_return]),
        np.concatenate([first.target_cost, second.target_cost]),
    )
