"""Plots of the reward-cost plane, as PNG files whose bytes depend on the data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # safe for colour-blind readers
_MARKERS = "osD^vP"
_DROPPED = "#BBBBBB"
_RULES = ("#999999", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#8C564B")


def _canvas(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure as Canvas  # no pyplot: the user's backend and settings stay as they are

    return Canvas(figsize=size, dpi=110, layout="constrained")


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = _canvas((7.0, 4.6))
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
    path: Path,
    returns: Floats,
    costs: Floats,
    outcome: npt.NDArray[Any],
    rules: Sequence[str],
    limits: Sequence[float],
    title: str,
) -> None:
    """Draws a data set before and after filtering.

    Args:
        path: The PNG file.
        returns: (n,) episode returns, as collected.
        costs: (n,) episode costs, as collected.
        outcome: (n,) what became of each: ``kept``, ``changed``, or the name of the rule that dropped it.
        rules: The rules, in order.
        limits: Cost limits, drawn as vertical lines.
        title: Title of the plot.
    """
    figure, axes = _figure(title)
    for number, rule in enumerate(name for name in rules if (outcome == name).any()):
        chosen = outcome == rule
        colour = _RULES[number % len(_RULES)]
        label = f"dropped by {rule} ({int(chosen.sum())})"
        axes.scatter(costs[chosen], returns[chosen], s=13, c=colour, marker="x", linewidths=0.7, label=label)
    for name, colour in (("kept", _COLOURS[0]), ("changed", _COLOURS[1])):
        chosen = outcome == name
        if chosen.any():
            label = f"{name} ({int(chosen.sum())})"
            axes.scatter(costs[chosen], returns[chosen], s=11, c=colour, linewidths=0, label=label)
    _limits(axes, limits)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)


@dataclass(frozen=True)
class Panel:
    """The plane as one filter rule left it, m episodes.

    Attributes:
        title: The rule, as the picture names it.
        returns: (m,) returns of the episodes that it looked at.
        costs: (m,) their costs.
        outcome: (m,) 0 dropped, 1 kept, 2 replaced by a changed episode.
    """

    title: str
    returns: Floats
    costs: Floats
    outcome: npt.NDArray[np.int64]


def steps(path: Path, panels: Sequence[Panel], limits: Sequence[float], title: str) -> None:
    """Draws the plane before and after each filter rule: one small picture per rule, on the same axes.

    Below each stands how many of the episodes left keep each limit.

    Args:
        path: The PNG file.
        panels: What each rule found, in order.
        limits: Cost limits, drawn as vertical lines.
        title: Title of the whole.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _canvas((0.8 + 3.4 * columns, 0.9 + 3.0 * rows))
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    kinds = ((1, "kept", "#7FB2D6"), (0, "dropped", _COLOURS[1]), (2, "changed", "#5B2A86"))
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[number]
        for outcome, name, colour in kinds:  # what a rule touched lies on top
            chosen = panel.outcome == outcome
            axes.scatter(panel.costs[chosen], panel.returns[chosen], s=8, c=colour, linewidths=0, label=name)
        stays = panel.outcome > 0
        axes.set_title(f"{panel.title}: {len(stays):,} → {int(stays.sum()):,}", fontsize=9)
        within = ", ".join(f"{int((panel.costs[stays] <= limit).sum()):,} at most {limit:g}" for limit in limits)
        last = number + columns >= len(panels)
        axes.set_xlabel(f"{within}\ncost of an episode" if last else within, fontsize=7.5)
        axes.xaxis.set_tick_params(labelbottom=last, labelsize=7.5)
        axes.yaxis.set_tick_params(labelsize=7.5)
        axes.grid(alpha=0.25, linewidth=0.6)
        _limits(axes, limits)
        if number % columns == 0:
            axes.set_ylabel("return of an episode", fontsize=7.5)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False, markerscale=1.6)
    _save(figure, path)


def coverage(
    path: Path,
    before: tuple[Floats, Floats],
    after: tuple[Floats, Floats],
    limits: Sequence[float],
    title: str,
    bins: int = 20,
) -> None:
    """Draws how the plane is covered: how many episodes each cell of one grid holds before and after filtering.

    Args:
        path: The PNG file.
        before: (returns, costs) of the episodes collected, (n,) each.
        after: Likewise of those left.
        limits: Cost limits; a third picture counts the episodes that keep each.
        title: Title of the whole.
        bins: Cells a side.
    """
    from matplotlib.colors import LogNorm

    figure = _canvas((11.6, 3.9))
    figure.suptitle(title, fontsize=11)
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 0.62))
    edges = [_edges(np.concatenate([before[axis], after[axis]]), bins) for axis in (1, 0)]
    counts = [np.histogram2d(costs, returns, bins=edges)[0] for returns, costs in (before, after)]
    norm = LogNorm(1, max(2.0, *(float(count.max()) for count in counts)))
    for axes, count, name in ((first, counts[0], "collected"), (second, counts[1], "left")):
        shown = np.ma.masked_equal(count.T, 0)
        image = axes.pcolormesh(edges[0], edges[1], shown, norm=norm, cmap="viridis_r")
        axes.set_title(f"{name}: {int((count > 0).sum())} of {count.size} cells hold an episode", fontsize=9)
        axes.set_xlabel("cost of an episode", fontsize=8)
        axes.tick_params(labelsize=7.5)
        _limits(axes, limits)
    first.set_ylabel("return of an episode", fontsize=8)
    bar = figure.colorbar(image, ax=[first, second], fraction=0.035, pad=0.015)
    bar.set_label("episodes in a cell", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 5) if digit * 10**power <= norm.vmax]
    bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks], minor=False)
    bar.ax.minorticks_off()
    place = np.arange(len(limits))
    for offset, (_, costs), colour, name in ((-0.2, before, _DROPPED, "collected"), (0.2, after, _COLOURS[0], "left")):
        found = [int((costs <= limit).sum()) for limit in limits]
        third.bar_label(third.bar(place + offset, found, 0.38, color=colour, label=name), fontsize=7.5, padding=1)
    third.set_xticks(place, [f"{limit:g}" for limit in limits])
    third.set_title("episodes that keep a limit", fontsize=9)
    third.set_xlabel("cost limit", fontsize=8)
    third.tick_params(labelsize=7.5)
    third.margins(y=0.2)
    third.spines[["top", "right"]].set_visible(False)
    third.legend(loc="upper left", fontsize=7.5, frameon=False)
    _save(figure, path)


def _edges(values: Floats, bins: int) -> Floats:
    """Edges of a grid over the values; of width 1 where they are all equal."""
    low, high = float(values.min()), float(values.max())
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)


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
        axes.annotate(
            f"{limit:g}",
            (limit, 1),
            (-2, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7,
            rotation=90,
            ha="right",
            va="top",
        )
