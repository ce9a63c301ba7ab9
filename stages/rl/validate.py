"""Validate a task's filtered episodes: a verdict for this very data, the episodes at fault, and its drift.

Writes `verdict.json`, `suite.json` (what was expected), `quarantine.parquet`, `profile.json` (how the data are
distributed), `drift.json` (how far that is from the data set accepted last) and `data_docs/` (all of it to read in a
browser). A critical failure stops the pipeline, in the verdict as in drift; a warning does not. What is expected is in
`springhead.rl.suite`; accepting a data set changes `drift.json` and never `verdict.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

from springhead import expectations
from springhead.jsonio import write_json
from springhead.lineage.digests import tree_digest
from springhead.rl import drift, suite, suite_steps
from springhead.rl.dataset import read_dsrl
from springhead.rl.tasks import task
from springhead.stage import Stage, run_stage
from springhead.tables import read_table
from springhead.verdicts import verdict


@dataclass(frozen=True)
class Params(suite_steps.Settings):
    """Parameters `rl.validate`: the bounds of the suite, and of drift."""


def run(stage: Stage[Params]) -> None:
    """Read the data set, validate it, compare it with the accepted one, write both verdicts.

    Raises:
        BadInput: the data set or the accepted profile cannot be read.
        Finding: a critical expectation failed.
    """
    of, data = task(stage.item["task"]), stage.input("filter")
    dataset = read_dsrl(data / "dataset.hdf5")
    arrays = {key: getattr(dataset, key) for key in dataset.keys}
    rows = read_table(data / "rows.parquet")
    accepted = drift.read_accepted(drift.accepted_path(stage.root, of.name), of)

    frames = suite.frames(arrays, rows, of, stage.params)
    now = drift.profile(dataset, of, tree_digest(data))
    table = None if accepted is None else drift.compare(dataset, now, accepted)
    drifts = [] if table is None else [drift.frame(table, stage.params)]
    outcomes = expectations.judge(suite.SUITE, [*frames, *drifts], stage.out / "data_docs")
    of_drift = [outcome for outcome in outcomes if outcome.frame.name == "drift"]

    found = verdict(suite.SUITE, frames, outcomes[: len(outcomes) - len(of_drift)], data, rows.num_rows)
    drifted = verdict(drift.SUITE, drifts, of_drift, data, rows.num_rows)
    found.write(stage.out, frames)
    write_json(stage.out / "profile.json", now)
    drift.write(stage.out, accepted, table, drifted)
    found.refuse(stage.name)
    drift.refuse(drifted, stage.name)


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
