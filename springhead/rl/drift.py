"""Drift of a data set against the last one that a person accepted.

A profile says how a data set is distributed: returns, costs and lengths of episodes, every observation and action
entry over all steps, how often a step costs anything, how many episodes there are. It is small enough to be kept in
git. The drift of a quantity is the Kolmogorov-Smirnov distance between the two distributions, the largest difference
between their shares at or below a value, taken at the values the profile has shares for: 0 for equal distributions,
1 for ones that do not overlap. For the two plain numbers it is the relative change, 1 - smaller / larger. So all
drifts lie in [0, 1], and one pair of bounds serves them.

The verdict does not depend on what was accepted, so accepting a data set trains nothing anew; drift has a verdict of
its own, ``drift.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from springhead.declared import ACCEPTED
from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json
from springhead.rl.dataset import Dataset
from springhead.rl.suite_steps import Settings, span
from springhead.rl.tasks import Task
from springhead.verdicts import ROW, Check, Frame, Verdict, plain

SUITE = "rl-drift"
_SHARES = np.linspace(0.0, 1.0, 21)
_STEPS = 200_000
_FORMAT = 1

Profile = dict[str, Any]
Floats = npt.NDArray[np.float64]


def accepted_path(root: Path, task_name: str) -> Path:
    """Where the accepted profile of a task is, whether there is one or not."""
    return root / ACCEPTED / "rl" / f"{task_name}.json"


def profile(data: Dataset, task: Task, data_digest: str) -> Profile:
    """Describes a data set.

    Args:
        data: At least one episode.
        task: Its task.
        data_digest: Digest of the folder it was read from.

    Returns:
        ``{"format", "task", "data_digest", "episodes", "steps", "cost_rate", "quantities": {name: {"mean", "std",
        "values", "below", "up_to"}}}``: these shares of a quantity's entries are below, and at or below, ``values``,
        which are its quantiles at every twentieth. Of more than 200,000 steps every k-th is looked at. Numbers are
        cut to nine digits.
    """
    quantities = {name: _distribution(values) for name, values in _quantities(data)}
    found: Profile = plain(
        {
            "format": _FORMAT,
            "task": task.name,
            "data_digest": data_digest,
            "episodes": len(data),
            "steps": data.num_steps,
            "cost_rate": float((data.costs > 0).mean()),
            "quantities": quantities,
        }
    )
    return found


def _quantities(data: Dataset) -> Iterator[tuple[str, npt.NDArray]]:
    yield "episode_return", data.episode_returns
    yield "cost_return", data.cost_returns
    yield "length", data.ends - data.starts
    for name, array in (("observation", data.observations), ("action", data.actions)):
        for entry in range(array.shape[1]):
            yield f"{name}[{entry}]", array[:: 1 + len(array) // _STEPS, entry]


def _distribution(values: npt.NDArray) -> dict[str, Any]:
    """Mean, deviation, quantiles, and the shares of entries below and up to each of them."""
    known = np.sort(values[np.isfinite(values)].astype(np.float64))
    if not len(known):
        return {"mean": None, "std": None, "values": [], "below": [], "up_to": []}
    quantiles = known[np.minimum((_SHARES * len(known)).astype(np.int64), len(known) - 1)]
    points = np.unique([float(f"{value:.9g}") for value in quantiles])
    below, up_to = _shares(known, points)
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "values": points.tolist(),
        "below": below.tolist(),
        "up_to": up_to.tolist(),
    }


def _shares(ordered: Floats, points: Floats) -> tuple[Floats, Floats]:
    """Shares of the entries below, and at or below, each point; equal in eight digits counts as equal."""
    slack = np.abs(points) * 1e-8  # points were cut to nine digits, perhaps just below the entries they stand for
    below = np.searchsorted(ordered, points - slack, "left") / len(ordered)
    up_to = np.searchsorted(ordered, points + slack, "right") / len(ordered)
    return below, up_to


def read_accepted(path: Path, task: Task) -> Profile | None:
    """Reads an accepted profile; None if none was accepted.

    Raises:
        BadInput: If the file is damaged or another task's.
    """
    if not path.is_file():
        return None
    found: Profile = read_json(path)
    if not _is_profile(found):
        raise BadInput(f"{path}: not a profile of format {_FORMAT}; restore it with `git checkout`, or remove it")
    if found.get("task") != task.name:
        raise BadInput(f"{path}: is the profile of {found.get('task')}, not of {task.name}; restore it from git")
    return found


def _is_profile(found: Any) -> bool:
    """Whether a value has all that :func:`compare` reads."""
    try:
        lists = [[entry[key] for key in ("values", "below", "up_to")] for entry in found["quantities"].values()]
        numbers = [found["episodes"], found["cost_rate"], *(x for three in lists for one in three for x in one)]
        whole = all(len(values) == len(below) == len(up_to) for values, below, up_to in lists)
    except (KeyError, TypeError, AttributeError):
        return False
    sound = all(isinstance(number, int | float) for number in numbers) and isinstance(found.get("data_digest"), str)
    return whole and sound and found.get("format") == _FORMAT


def compare(data: Dataset, now: Profile, before: Profile) -> pd.DataFrame:
    """Measures the drift of every quantity.

    Args:
        data: The new data set.
        now: Its profile.
        before: The accepted profile.

    Returns:
        One row per quantity: ``quantity``, ``drift`` in [0, 1], ``accepted`` and ``now`` (means, or the numbers).
    """
    rows: list[tuple[str, float, float | None, float | None]] = []
    for name in ("episodes", "cost_rate"):
        small, large = sorted((before[name], now[name]))
        rows.append((name, 1.0 - small / large if large else 0.0, before[name], now[name]))
    old: Mapping[str, Any] = before["quantities"]
    values = dict(_quantities(data))
    for name in [*values, *(name for name in old if name not in values)]:
        first, second = old.get(name, {}), now["quantities"].get(name, {})
        drift = _distance(values[name], first) if name in values and name in old else 1.0
        rows.append((name, drift, first.get("mean"), second.get("mean")))
    table = pd.DataFrame(rows, columns=["quantity", "drift", "accepted", "now"])
    table.insert(0, ROW, np.arange(len(table)))
    return table


def _distance(values: npt.NDArray, before: Mapping[str, Any]) -> float:
    known = np.sort(values[np.isfinite(values)].astype(np.float64))
    points = np.array(before["values"], dtype=np.float64)
    if not len(known) or not len(points):
        return 0.0 if len(known) == len(points) else 1.0
    below, up_to = _shares(known, points)
    # Both sides of each point: where many entries are equal, as costs of 0 are, a shift shows on one side only.
    largest = max(np.abs(below - before["below"]).max(), np.abs(up_to - before["up_to"]).max())
    return round(float(largest), 6)  # the profile's shares are cut to nine digits


def frame(table: pd.DataFrame, settings: Settings) -> Frame:
    """One row per quantity, and how far it may have drifted."""
    checks = (
        Check(
            "ExpectSmallDrift",
            "between",
            "drift",
            f"no quantity has drifted by more than {settings.drift_warning:g} from the accepted data set",
            span(0.0, settings.drift_warning),
            "warning",
        ),
        Check(
            "ExpectBoundedDrift",
            "between",
            "drift",
            f"no quantity has drifted by more than {settings.drift_critical:g}: this is other data than was accepted",
            span(0.0, settings.drift_critical),
        ),
    )
    names = table["quantity"].tolist()
    return Frame("drift", "quantity", table, checks, names, ("quantity", "accepted", "now"), quarantines=False)


def write(out: Path, before: Profile | None, table: pd.DataFrame | None, judged: Verdict) -> None:
    """Writes ``drift.json``: the verdict on drift with all quantities, or that nothing was accepted yet."""
    content = {**judged.to_json(), "accepted": None, "quantities": []}
    if before is not None and table is not None:
        content["accepted"] = {"data_digest": before["data_digest"], "episodes": before["episodes"]}
        content["quantities"] = plain(table[["quantity", "drift", "accepted", "now"]].to_dict("records"))
    write_json(out / "drift.json", content)


def refuse(judged: Verdict, stage: str) -> None:
    """Raises if a quantity drifted too far.

    Raises:
        Finding: Naming the quantities, and what to do if the new data are meant to differ.
    """
    try:
        judged.refuse(stage)
    except Finding as finding:
        raise Finding(f"{finding}. If the new data are meant to differ: `springhead accept {stage}`") from None
