"""The tables of ``benchmarks/offline_parity.py``, from its result files and nothing else."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from springhead.jsonio import read_json
from springhead.rl.lagrangian import q_threshold
from springhead.rl.tasks import task

SIDES = ("osrl", "released", "intended")


@dataclass(frozen=True)
class Cell:
    """One side's figures of an algorithm on a task under a limit: lists over seeds, normalised as DSRL does."""

    returns: list[float]
    costs: list[float]

    def text(self) -> str:
        """Two table cells: mean and standard deviation over seeds of reward and cost."""
        return " | ".join(f"{statistics.mean(x):.2f} ± {spread(x):.2f}" for x in (self.returns, self.costs))

    @property
    def safe(self) -> bool:
        """Whether the mean cost keeps the limit."""
        return statistics.mean(self.costs) <= 1

    def leads(self, other: Cell) -> bool:
        """Whether it is at least as good as another cell, by DSRL's order, seeds' spread allowed for.

        Safe beats unsafe; of two safe ones the higher reward wins, of two unsafe ones the lower cost.
        """
        if self.safe != other.safe:
            return self.safe
        if self.safe:
            return t_value(self.returns, other.returns) > -bound(self, other)
        return t_value(self.costs, other.costs) < bound(self, other)


def bound(a: Cell, b: Cell) -> float:
    """Up to what size of Student's t two cells are not told apart: 5 %, two-sided, all seeds less two."""
    return float(stats.t.ppf(0.975, len(a.returns) + len(b.returns) - 2))


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def t_value(a: list[float], b: list[float]) -> float:
    """Student's t of the difference of two means. Spreads below 0.005 count as that: the figures have two digits."""
    error = (max(spread(a), 0.005) ** 2 / len(a) + max(spread(b), 0.005) ** 2 / len(b)) ** 0.5
    return float((statistics.mean(a) - statistics.mean(b)) / error)


def cells(results: list[dict[str, Any]]) -> dict[tuple[str, str, float, str], Cell]:
    """Task, algorithm, limit, side → its figures."""
    found: dict[tuple[str, str, float, str], Cell] = {}
    for result in sorted(results, key=lambda one: one["seed"]):
        of = task(result["task"])
        for one in result["evaluations"]:
            key = (of.name, result["algorithm"], one["limit"], result["side"])
            cell = found.setdefault(key, Cell([], []))
            cell.returns.append(of.normalised_return(statistics.mean(one["returns"])))
            cell.costs.append(of.normalised_cost(statistics.mean(one["costs"]), one["limit"]))
    return found


def tables(folder: Path, settings: dict[str, Any]) -> str:
    """The Markdown tables: one per task, and the courses of the constraints."""
    every = [read_json(path) for path in sorted(folder.glob("*.json"))]
    results = [one for one in every if one["data_sha256"] == settings["data_sha256"][one["task"]]]
    if len(results) < len(every):
        print(f"{len(every) - len(results)} result files are of other data and left out", file=sys.stderr)
    found = cells(results)
    lines: list[str] = []
    counts = {"agrees": [0, 0], "at least as good": [0, 0]}
    for name in settings["tasks"]:
        lines += [
            "", f"### {name}", "",
            "| algorithm | limit | OSRL: reward | cost | released: reward | cost | t: reward | cost | agrees "
            "| intended: reward | cost | at least as good |",
            "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|---|",
        ]  # fmt: skip
        for algorithm in settings["ours"]:
            for limit in settings["limits"]:
                osrl, released, intended = (found.get((name, algorithm, limit, side)) for side in SIDES)
                parts = [algorithm, f"{limit:g}", osrl.text() if osrl else "– | –"]
                parts.append(released.text() if released else "– | –")
                if osrl and len(osrl.returns) < 2:
                    osrl = None  # no spread to judge by
                if osrl and released:
                    t = [t_value(a, b) for a, b in ((released.returns, osrl.returns), (released.costs, osrl.costs))]
                    agrees = max(map(abs, t)) < bound(osrl, released)
                    parts.append(f"{t[0]:+.1f} | {t[1]:+.1f} | {_mark(agrees, counts['agrees'])}")
                else:
                    parts.append("– | – | –")
                parts.append(intended.text() if intended else "– | –")
                leads = intended.leads(osrl) if osrl and intended else None
                parts.append("–" if leads is None else _mark(leads, counts["at least as good"]))
                lines.append(f"| {' | '.join(parts)} |")
    lines += [""] + [f"{name}: {yes} of {total} rows" for name, (yes, total) in counts.items()]
    return "\n".join([*lines, "", *constraints(results, settings)])


def _mark(holds: bool, count: list[int]) -> str:
    count[0] += holds
    count[1] += 1
    return "yes" if holds else "**no**"


def constraints(results: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Whether the constraints of CPQ and COptiDICE bind: what holds the cost down, under each limit."""
    lines = [
        "### The constraints of COptiDICE and CPQ", "",
        "| algorithm | task | limit | side | multiplier: first | last | constrained cost, last | its threshold "
        "| cost critic: data's actions | uniform actions |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    rows: dict[tuple[str, str, float, str], list[list[float]]] = {}
    for result in results:
        if result["algorithm"] in ("coptidice", "cpq"):
            for limit, values in _constraint(result):
                rows.setdefault((result["algorithm"], result["task"], limit, result["side"]), []).append(values)
    order = sorted(rows, key=lambda key: (*key[:3], SIDES.index(key[3])))
    for key in order:
        means = [statistics.mean(column) for column in zip(*rows[key], strict=True)]
        texts = ["–" if value != value else f"{value:.3g}" for value in means]
        algorithm, name, limit, side = key
        lines.append(f"| {algorithm} | {name} | {limit:g} | {side} | {' | '.join(texts)} |")
    return lines


def _constraint(result: dict[str, Any]) -> list[tuple[float, list[float]]]:
    """By limit: first and last multiplier, what is constrained and its threshold, the probes of CPQ's cost critic."""
    of, courses, nan = task(result["task"]), result["courses"], float("nan")
    found = []
    for one in result["evaluations"]:
        limit = one["limit"]
        probe = result["probe"]
        values = [probe.get(f"cost_value_{key}", nan) for key in ("data", "uniform")]
        sum_threshold = q_threshold(limit, of.horizon, 0.99)
        if result["algorithm"] == "cpq":
            multiplier = _course(courses, "alpha_value" if result["side"] == "osrl" else "alpha")
            found.append((limit, [*_ends(multiplier), nan, sum_threshold, *values]))
            continue
        if result["side"] == "osrl":  # its loss is multiplier x (threshold - cost)
            multiplier, loss = _course(courses, "lmbda"), _course(courses, "lmbda_loss")
            cost = sum_threshold - statistics.mean(a / b for a, b in zip(loss[-5:], multiplier[-5:], strict=True))
        else:
            multiplier = _course(courses, "multiplier")
            cost = statistics.mean(_course(courses, "cost")[-5:])
        threshold = limit / of.horizon if result["side"] == "intended" else sum_threshold
        found.append((limit, [*_ends(multiplier), cost, threshold, *values]))
    return found


def _course(courses: dict[str, list[list[float]]], name: str) -> list[float]:
    return [value for _, value in courses[name]]


def _ends(course: list[float]) -> list[float]:
    return [course[0], course[-1]]
