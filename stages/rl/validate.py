"""Validate a task's filtered episodes: a verdict for this very data, and the episodes at fault by id.

Writes `verdict.json`, `suite.json` (what was expected), `quarantine.parquet` and `data_docs/` (the same to read in a
browser). A critical failure stops the pipeline; a warning does not. What is expected is in `springhead.rl.suite`.
"""

from __future__ import annotations

from dataclasses import dataclass

from springhead import expectations
from springhead.rl import suite
from springhead.rl.dataset import EPISODE_KEYS, read_dsrl
from springhead.rl.tasks import task
from springhead.stage import Stage, run_stage
from springhead.tables import read_table
from springhead.verdicts import verdict


@dataclass(frozen=True)
class Params(suite.Settings):
    """Parameters `rl.validate`: the bounds of the suite."""


def run(stage: Stage[Params]) -> None:
    """Read the data set, validate it, write the verdict.

    Raises:
        BadInput: the data set cannot be read.
        Finding: a critical expectation failed.
    """
    data = stage.input("filter")
    dataset = read_dsrl(data / "dataset.hdf5")
    arrays = {key: getattr(dataset, key) for key in EPISODE_KEYS}
    rows = read_table(data / "rows.parquet")
    frames = suite.frames(arrays, rows, task(stage.item["task"]), stage.params)
    outcomes = expectations.judge(suite.SUITE, frames, stage.out / "data_docs")
    found = verdict(suite.SUITE, frames, outcomes, data, rows.num_rows)
    found.write(stage.out, frames)
    found.refuse(stage.name)


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
