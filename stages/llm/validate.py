"""Validate the filtered text rows: a verdict for these very rows, and the rows at fault by id.

Writes `verdict.json`, `suite.json` (what was expected), `quarantine.parquet` and `data_docs/` (the same to read in a
browser). A critical failure stops the pipeline; a warning does not. What is expected is in `springhead.llm.suite`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from springhead import expectations
from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.llm import families, suite
from springhead.stage import Stage, run_stage
from springhead.tables import read_table
from springhead.verdicts import verdict


@dataclass(frozen=True)
class Params(suite.Settings):
    """Parameters `llm.validate`: the bounds of the suite."""


def problem_splits(folder: Path) -> dict[str, str]:
    """The split of every problem by id.

    Raises:
        BadInput: a problem has no id or no split.
    """
    splits: dict[str, str] = {}
    for name in (suite.TRAIN_FILE, suite.EVAL_FILE):
        for number, row in enumerate(read_jsonl(folder / name), start=1):
            if not isinstance(row.get("id"), str) or not isinstance(row.get("split"), str):
                raise BadInput(f"{folder / name}:{number}: a problem needs an id and a split; re-run llm-problems")
            splits[row["id"]] = row["split"]
    return splits


def problem_origins(folder: Path) -> list[tuple[str, list[str]]]:
    """Family and parents of every problem."""
    rows = (row for name in (suite.TRAIN_FILE, suite.EVAL_FILE) for row in read_jsonl(folder / name))
    return [(str(row.get("family")), list(map(str, row.get("parents") or ()))) for row in rows]


def row_places(path: Path) -> list[tuple[str, int, str]]:
    """File, index and id of each entry of a row table.

    Raises:
        BadInput: the table lacks one of the columns.
    """
    table = read_table(path)
    missing = sorted({"file", "index", "id"} - set(table.column_names))
    if missing:
        raise BadInput(f"{path} lacks the columns {', '.join(missing)}; re-run the stage that makes it")
    columns = [table.column(name).to_pylist() for name in ("file", "index", "id")]
    return list(zip(*columns, strict=True))


def run(stage: Stage[Params]) -> None:
    """Read the rows, validate them, write the verdict.

    Raises:
        BadInput: a file is missing or is not JSON lines, or a public file that answers are looked up in cannot be had.
        Finding: a critical expectation failed.
    """
    data = stage.input("filter")
    files = {name: list(read_jsonl(data / name)) for name in (suite.TRAIN_FILE, suite.EVAL_FILE)}
    listed = row_places(data / "rows.parquet")
    families.obtain_sources(problem_origins(stage.input("problems")))
    frames = suite.frames(files, listed, problem_splits(stage.input("problems")), stage.params)
    outcomes = expectations.judge(suite.SUITE, frames, stage.out / "data_docs")
    found = verdict(suite.SUITE, frames, outcomes, data, sum(map(len, files.values())))
    found.write(stage.out, frames)
    found.refuse(stage.name)


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
