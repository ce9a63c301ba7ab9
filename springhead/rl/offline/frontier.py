"""The reward-cost frontier of a data set, and a polynomial through it.

BC-Frontier keeps the episodes near it, and the Constrained Decision Transformer takes its
infeasible targets from above it and its return targets from on it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.polynomial import Polynomial

from springhead.errors import BadInput

Floats = npt.NDArray[np.float64]


def pareto(returns: Floats, costs: Floats) -> npt.NDArray[np.intp]:
    """Returns the positions of the episodes that no other beats in both return and cost.

    Args:
        returns: (n,) episode returns.
        costs: (n,) episode costs.

    Returns:
        Positions in ascending cost, and so in ascending return; of equal episodes the first.
    """
    order = np.lexsort((-returns, costs))
    best = np.r_[-np.inf, np.maximum.accumulate(returns[order])[:-1]] if len(order) else np.empty(0)
    found: npt.NDArray[np.intp] = order[returns[order] > best]
    return found


def attainable(returns: Floats, costs: Floats, quantile: float) -> list[tuple[float, float]]:
    """The return that can be asked for under each cost: a quantile of the returns of all episodes that cost no more.

    At 1 it is the frontier itself, made of single, perhaps lucky, episodes. It never falls with the cost.

    Args:
        returns: (n,) episode returns, n at least 1.
        costs: (n,) episode costs.
        quantile: Between 0 and 1.

    Returns:
        (cost, return) pairs in ascending order of both: the costs from which on more can be asked for.
    """
    found: list[tuple[float, float]] = []
    for cost in np.unique(costs).tolist():
        value = float(np.quantile(returns[costs <= cost], quantile))
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


def fit(returns: Floats, costs: Floats, degree: int) -> Polynomial:
    """Fits return as a polynomial of cost by least squares.

    The degree is lowered to one less than the number of distinct costs: a higher one has no unique
    solution, which is how the released code crashes on small frontiers.

    Args:
        returns: (n,) returns, n at least 1.
        costs: (n,) costs.
        degree: The highest degree wanted.
    """
    if degree < 0 or not len(returns):
        raise BadInput(f"frontier: cannot fit degree {degree} to {len(returns)} episodes")
    allowed = min(degree, len(np.unique(costs)) - 1)
    if allowed == 0:
        return Polynomial([float(returns.mean())])
    return Polynomial.fit(costs, returns, allowed)


def fit_until(returns: Floats, costs: Floats, enough: float = 0.9, highest: int = 2) -> Polynomial:
    """Fits polynomials of rising degree until R² reaches ``enough`` or the degree ``highest``.

    Where all returns are equal a constant explains everything, and degree 0 is returned.
    """
    spread = float(((returns - returns.mean()) ** 2).sum())
    curve = fit(returns, costs, 0)
    for degree in range(1, highest + 1):
        if spread == 0 or 1 - float(((returns - curve(costs)) ** 2).sum()) / spread >= enough:
            break
        curve = fit(returns, costs, degree)
    return curve
