"""Plots of the reward-cost plane, as PNG files whose bytes depend on the data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # safe for colour-blind readers
_MARKERS = "osD^vP"


def _figure(title: str) -> tuple[Figure, Axes]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas

    matplotlib.rcParams["svg.hashsalt"] = "springhead"
    figure = Canvas(figsize=(7.0, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("cost of an episode")
    axes.set_ylabel("return of an episode")
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    # No date and no version of the plotting library in the file: they would change its digest.
    figure.savefig(path, format="png", metadata={"Software": None, "Creation Time": None})


def scatter(
    path: Path, returns: Floats, costs: Floats, kept: npt.NDArray[np.bool_], limits: Sequence[float], title: str
) -> None:
    """Draws a data set before and after filtering.

    Args:
        path: The PNG file.
        returns: (n,) episode returns.
        costs: (n,) episode costs.
        kept: (n,) whether each episode is in the filtered data set.
        limits: Cost limits, drawn as vertical lines.
        title: Title of the plot.
    """
    figure, axes = _figure(title)
    axes.scatter(costs[~kept], returns[~kept], s=9, c="#BBBBBB", linewidths=0, label=f"dropped ({int((~kept).sum())})")
    axes.scatter(costs[kept], returns[kept], s=11, c=_COLOURS[0], linewidths=0, label=f"kept ({int(kept.sum())})")
    _limits(axes, limits)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)


def frontier(
    path: Path,
    returns: Floats,
    costs: Floats,
    points: Mapping[str, Sequence[tuple[float, float, float, float]]],
    limits: Sequence[float],
    title: str,
) -> None:
    """Draws where the policies ended up, over the episodes they learned from.

    Args:
        path: The PNG file.
        returns: (n,) returns of the data set's episodes.
        costs: (n,) costs of the data set's episodes.
        points: By algorithm, (cost, return, spread of cost, spread of return) for each limit, joined by a line.
        limits: Cost limits, drawn as vertical lines.
        title: Title of the plot.
    """
    figure, axes = _figure(title)
    axes.scatter(costs, returns, s=8, c="#CCCCCC", linewidths=0, label=f"data ({len(returns)} episodes)")
    for number, (algorithm, row) in enumerate(points.items()):
        cost, value, cost_spread, value_spread = (np.array(column) for column in zip(*row, strict=True))
        axes.errorbar(
            cost,
            value,
            value_spread,
            cost_spread,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=1.0,
            markersize=5,
            capsize=2,
            label=algorithm,
        )
    _limits(axes, limits)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)


def _limits(axes: Axes, limits: Sequence[float]) -> None:
    for limit in limits:
        axes.axvline(limit, color="#444444", linestyle=":", linewidth=0.9)
        axes.annotate(f"{limit:g}", (limit, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="left", va="top")
