"""Imports one task's episodes from files that others wrote, by digest.

Most tasks import nothing and get an empty index. Where there are sources, writes DSRL's flat HDF5, the row table that
ties each episode to the file it came from, and the decisions table with one row per episode of every source.
"""

from __future__ import annotations

from dataclasses import dataclass

from springhead.rl.importers import Source, import_sources
from springhead.rl.tasks import task
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.imports``."""

    sources: tuple[Source, ...]
    """What to import, of all tasks; see ``docs/guide/importing-data.md``."""


def run(stage: Stage[Params]) -> None:
    """Imports the task's sources."""
    of = task(stage.item["task"])
    named = [(task(source.task), source) for source in stage.params.sources]  # a name that is wrong is told at once
    index = import_sources(of, [source for its, source in named if its == of], stage.out, stage.root)
    if index:
        episodes = sum(entry["episodes"] for entry in index)
        stage.dataset(stage.out / "dataset.hdf5", f"{of.name} imported episodes", episodes, role="output")
        stage.metrics({"episodes": episodes, "left_out": sum(sum(entry["left_out"].values()) for entry in index)})


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
