"""Filters one task's episodes step by step, and writes down why each was kept, dropped or changed.

Reads the collected data set and its row table. Writes the filtered ``dataset.hdf5`` and ``rows.parquet``, the
decisions table (one row per rule and episode it looked at), and the plane before and after, as numbers and pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from springhead.errors import BadInput
from springhead.rl import filter_chain, plots
from springhead.rl.dataset import Dataset, read_dsrl, write_dsrl
from springhead.rl.filter_chain import apply
from springhead.rl.filter_state import Filtered
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage
from springhead.tables import read_table, write_table


@dataclass(frozen=True)
class Params(filter_chain.Settings):
    """Parameters of ``rl.filter``: the steps in their order, and whether to do as the released code does."""


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


def write_decisions(path: Path, columns: dict[str, npt.NDArray[Any]]) -> None:
    """Writes the decisions table."""
    numbers = {name: pa.array(columns[name], from_pandas=True) for name in ("value", "threshold")}
    write_table(path, {**columns, **numbers}, DECISIONS)


def filtered_rows(rows: pa.Table, filtered: Filtered, ids: npt.NDArray[np.object_]) -> dict[str, list[object]]:
    """Returns the columns of the row table of what is left.

    A changed episode gets its own id, with the id of its source as its parent, and its own sums.

    Args:
        rows: The row table of the input.
        filtered: What is left.
        ids: The id of every version, see ``Filtered.ids``.
    """
    columns: dict[str, list[object]] = rows.take(pa.array(filtered.sources, pa.int64())).to_pydict()
    left = filtered.left(ids)
    for number in np.flatnonzero(filtered.changed).tolist():
        episode = filtered.episode(number)
        columns["parents"][number] = [columns["id"][number]]
        columns["id"][number] = left[number]
        columns["episode_return"][number] = episode.episode_return
        columns["cost_return"][number] = episode.cost_return
        columns["sub_cost_returns"][number] = episode.sub_cost_returns
        columns["length"][number] = episode.length
    columns["index"] = list(range(len(left)))
    return columns


def read_collected(folder: Path) -> tuple[Dataset, pa.Table]:
    """Reads the collected episodes and their row table.

    Raises:
        BadInput: If the two do not describe the same episodes.
    """
    data = read_dsrl(folder / "dataset.hdf5")
    rows = read_table(folder / "rows.parquet")
    if rows["id"].to_pylist() != [episode.id for episode in data.episodes()]:
        raise BadInput(f"{folder}: rows.parquet and dataset.hdf5 name different episodes; collect them again")
    return data, rows


def outcomes(number: int, filtered: Filtered) -> npt.NDArray[np.object_]:
    """What became of each collected episode: ``kept``, ``changed``, or the rule that dropped it, (number,)."""
    found = np.full(number, "", dtype=object)
    found[filtered.sources] = np.where(filtered.changed, "changed", "kept")
    for look in filtered.looks:
        if not look.changed:
            found[look.sources[look.judgement.fallen()]] = look.judgement.rule
    return found


def panels(filtered: Filtered) -> list[plots.Panel]:
    """The plane as each rule found it; the kept are drawn where a rule leaves them, the changed where they were."""
    found = []
    for look in filtered.looks:
        outcome = np.ones(len(look.returns), dtype=np.int64)
        outcome[look.judgement.fallen()] = 2 if look.changed else 0
        found.append(plots.Panel(look.judgement.rule, look.returns, look.costs, outcome))
    return found


def draw(out: Path, data: Dataset, filtered: Filtered, of: Task) -> None:
    """Writes the plane as numbers (``scatter.csv``) and as pictures.

    ``scatter.png`` has every collected episode and what became of it, ``steps.png`` each rule's before and after,
    ``coverage.png`` how much of the plane is covered.
    """
    became = outcomes(len(data), filtered)
    lines = ["cost_return,episode_return,outcome"]
    for cost, value, name in zip(
        data.cost_returns.tolist(), data.episode_returns.tolist(), became.tolist(), strict=True
    ):
        lines.append(f"{cost:.6g},{value:.6g},{name}")
    (out / "scatter.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    before, after = (data.episode_returns, data.cost_returns), (filtered.episode_returns, filtered.cost_returns)
    title = f"{of.name}: what became of {len(data):,} episodes"
    rules = list(dict.fromkeys(look.judgement.rule for look in filtered.looks))
    plots.scatter(out / "scatter.png", *before, became, rules, of.limits, title)
    plots.steps(out / "steps.png", panels(filtered), of.limits, f"{of.name}: before and after each rule")
    plots.coverage(out / "coverage.png", before, after, of.limits, f"{of.name}: coverage of the plane")


def run(stage: Stage[Params]) -> None:
    """Filters the task's episodes."""
    of = task(stage.item["task"])
    data, rows = read_collected(stage.input("collect"))
    filtered = apply(data, stage.params, of, stage.seed)
    ids = filtered.ids(rows["id"].to_pylist())
    write_dsrl(stage.out / "dataset.hdf5", filtered.episodes(), of.sub_costs)
    write_table(stage.out / "rows.parquet", filtered_rows(rows, filtered, ids), rows.schema)
    write_decisions(stage.out / "decisions.parquet", filtered.decisions(ids))
    draw(stage.out, data, filtered, of)
    stage.dataset(stage.out / "dataset.hdf5", f"{of.name} filtered episodes", len(filtered), role="output")
    stage.metrics(
        {
            "episodes": len(data),
            "left": len(filtered),
            "changed": int(filtered.changed.sum()),
            **{f"within_limit_{limit:g}": int((filtered.cost_returns <= limit).sum()) for limit in of.limits},
        }
    )


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
