"""Figures of the language branch; the same numbers always give the same bytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from springhead.llm.evaluation import TAU_BINS

ORDERS = ("topological", "random", "reversed")
COLOURS = {"base": "#8c8c8c", "sft": "#d1793a", "mend": "#2a6f97", "rc-aug": "#7b9e45", "paraphrase": "#8f6bb3"}
SHADES = {"all_right": "#2a6f97", "mixed": "#e9c46a", "all_wrong": "#c8553d"}


def _save(figure: Any, path: Path) -> None:
    # Without this the file would carry the version of matplotlib.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _finish(axis: Any, title: str, legend: str) -> None:
    """What the plots of accuracies share."""
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("accuracy")
    axis.set_title(title)
    axis.legend(frameon=False, loc=legend)
    axis.spines[["top", "right"]].set_visible(False)


def accuracy_by_order(path: Path, table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Bars of accuracy per statement order and method, whiskers one standard deviation over seeds; lines mark the
    worst case over the order variants.

    Args:
        path: the PNG file to write.
        table: {method: cell} of one split of `evaluation.side_by_side`.
        title: shown above.
    """
    orders = [name for name in ORDERS if all(name in cell["order"] for cell in table.values())]
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    width = 0.8 / len(table)
    for k, (method, cell) in enumerate(table.items()):
        at = [i + (k - (len(table) - 1) / 2) * width for i in range(len(orders))]
        means = [cell["order"][order]["mean"] for order in orders]
        stds = [cell["order"][order]["std"] for order in orders]
        colour = COLOURS.get(method, "#555555")
        axis.bar(at, means, width * 0.92, yerr=stds, color=colour, capsize=3, label=f"{method}")
        worst = cell["worst_case"]["mean"]
        axis.axhline(worst, color=colour, linestyle="--", linewidth=1)
        axis.text(len(orders) - 0.45, worst, f"{method} worst case {worst:.2f}", color=colour, va="bottom", fontsize=8)
    axis.set_xticks(range(len(orders)), orders)
    axis.set_xlim(-0.6, len(orders) + 0.35)
    axis.set_xlabel("order of the statements")
    _finish(axis, title, "upper right")
    _save(figure, path)


def accuracy_by_tau(path: Path, table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Lines of accuracy over bins of Kendall's tau per method, whiskers one standard deviation over seeds.

    Args:
        path: the PNG file to write.
        table: {method: cell} of one split of `evaluation.side_by_side`.
        title: shown above.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for method, cell in table.items():
        # Not a number where a bin is empty: no line is drawn across it.
        means, stds = ([cell["tau"].get(name, {}).get(key, math.nan) for name in TAU_BINS] for key in ("mean", "std"))
        colour = COLOURS.get(method, "#555555")
        axis.errorbar(range(len(TAU_BINS)), means, stds, color=colour, marker="o", capsize=3, label=method)
    axis.set_xticks(range(len(TAU_BINS)), TAU_BINS)
    axis.set_xlim(-0.4, len(TAU_BINS) - 0.6)
    axis.set_xlabel("Kendall's tau between the order of the statements and solving order")
    _finish(axis, title, "upper left")
    _save(figure, path)


def histogram(path: Path, table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Stacked bars per method: share of problems with all, some or none of their order variants right.

    Args:
        path: the PNG file to write.
        table: {method: cell} of one split of `evaluation.side_by_side`.
        title: shown above.
    """
    figure, axis = plt.subplots(figsize=(6.4, 0.6 * len(table) + 1.4), layout="constrained")
    methods: Sequence[str] = list(reversed(list(table)))
    left = [0.0] * len(methods)
    for name, colour in SHADES.items():
        shares = [table[method][name]["mean"] for method in methods]
        axis.barh(methods, shares, left=left, color=colour, label=name.replace("_", " "))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of problems")
    axis.set_title(title)
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
