"""Filters one task's episodes by the benchmark's rules, and writes down why each was kept, dropped or changed.

Reads the collected data set and its row table. Writes the filtered ``dataset.hdf5`` and ``rows.parquet``, the
decisions table (one row per rule and episode it looked at), and a plot of the plane before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from springhead.errors import BadInput
from springhead.rl import filters, plots
from springhead.rl.dataset import Episode, read_dsrl, write_dsrl
from springhead.rl.filter_chain import Decision, Filtered, apply
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage
from springhead.tables import read_table, write_table


@dataclass(frozen=True)
class Params(filters.Settings):
    """Parameters of ``rl.filter``: the settings of each filter and their order."""


DECISIONS = pa.schema(
    [
        ("id", pa.string()),
        ("rule", pa.string()),
        ("kept", pa.bool_()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("replaced_by", pa.string()),
    ]
)
"""The decisions table. ``value`` and ``threshold`` are null where a rule does not apply to the episode;
``replaced_by`` is the id of the changed episode that took the place of this one."""


def write_decisions(path: Path, decisions: Sequence[Decision]) -> None:
    """Writes the decisions table."""
    columns = {name: [getattr(decision, name) for decision in decisions] for name in Decision._fields}
    for name in ("value", "threshold"):
        columns[name] = [None if math.isnan(value) else value for value in columns[name]]
    write_table(path, columns, DECISIONS)


def filtered_rows(rows: pa.Table, filtered: Filtered) -> dict[str, list[object]]:
    """Returns the columns of the row table of what is left.

    A changed episode gets its own id, with the id of its source as its parent, and its own sums.
    """
    columns: dict[str, list[object]] = rows.take(pa.array(filtered.sources, pa.int64())).to_pydict()
    for number, episode in enumerate(filtered.episodes):
        source = columns["id"][number]
        if episode.id != source:
            columns["parents"][number] = [source]
        columns["id"][number] = episode.id
        columns["episode_return"][number] = episode.episode_return
        columns["cost_return"][number] = episode.cost_return
        columns["length"][number] = episode.length
        columns["index"][number] = number
    return columns


def read_collected(folder: Path) -> tuple[list[Episode], pa.Table]:
    """Reads the collected episodes and their row table.

    Raises:
        BadInput: If the two do not describe the same episodes.
    """
    episodes = read_dsrl(folder / "dataset.hdf5").episodes()
    rows = read_table(folder / "rows.parquet")
    if rows["id"].to_pylist() != [episode.id for episode in episodes]:
        raise BadInput(f"{folder}: rows.parquet and dataset.hdf5 name different episodes; collect them again")
    return episodes, rows


def draw(out: Path, episodes: Sequence[Episode], filtered: Filtered, of: Task) -> None:
    """Writes ``scatter.csv`` and ``scatter.png``: every collected episode, and whether it is left unchanged."""
    returns = np.array([episode.episode_return for episode in episodes])
    costs = np.array([episode.cost_return for episode in episodes])
    kept = np.zeros(len(episodes), dtype=bool)
    kept[filtered.sources] = True
    lines = ["cost_return,episode_return,outcome"]
    for cost, value, stays in zip(costs.tolist(), returns.tolist(), kept.tolist(), strict=True):
        lines.append(f"{cost:.6g},{value:.6g},{'kept' if stays else 'dropped'}")
    (out / "scatter.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plots.scatter(
        out / "scatter.png", returns, costs, kept, of.limits, f"{of.name}: episodes before and after filtering"
    )


def run(stage: Stage[Params]) -> None:
    """Filters the task's episodes."""
    of = task(stage.item["task"])
    episodes, rows = read_collected(stage.input("collect"))
    filtered = apply(episodes, stage.params, of, stage.seed)
    write_dsrl(stage.out / "dataset.hdf5", filtered.episodes)
    write_table(stage.out / "rows.parquet", filtered_rows(rows, filtered), rows.schema)
    write_decisions(stage.out / "decisions.parquet", filtered.decisions)
    draw(stage.out, episodes, filtered, of)
    stage.dataset(stage.out / "dataset.hdf5", f"{of.name} filtered episodes", len(filtered.episodes), role="output")
    costs = np.array([episode.cost_return for episode in filtered.episodes])
    stage.metrics(
        {
            "episodes": len(episodes),
            "left": len(filtered.episodes),
            "changed": sum(decision.replaced_by is not None for decision in filtered.decisions),
            **{f"within_limit_{limit:g}": int((costs <= limit).sum()) for limit in of.limits},
        }
    )


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
