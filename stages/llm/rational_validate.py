"""Validate Rational's rows: a verdict for these very rows, and the rows at fault by id.

Writes `verdict.json`, `suite.json` (what was expected), `quarantine.parquet` and `data_docs/` (the same to read in a
browser). A critical failure stops the pipeline; a warning does not. What is expected is in
`springhead.llm.safety_suite`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from springhead import expectations
from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.llm import safety_suite
from springhead.llm.judges import refusal
from springhead.llm.suite import EVAL_FILE, TRAIN_FILE
from springhead.stage import Stage, run_stage
from springhead.verdicts import verdict
from stages.llm.validate import row_places


@dataclass(frozen=True)
class Params(safety_suite.Settings):
    """Parameters `llm.rational_validate`: the bounds of the suite."""


def base_splits(path: Path) -> dict[str, str]:
    """The split of every base prompt by id.

    Raises:
        BadInput: a base prompt has no id or no split.
    """
    splits: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("split"), str):
            raise BadInput(f"{path}:{number}: a base prompt needs an id and a split; re-run llm-rational")
        splits[row["id"]] = row["split"]
    return splits


def run(stage: Stage[Params]) -> None:
    """Read the rows, validate them, write the verdict.

    Raises:
        BadInput: a file is missing or is not JSON lines.
        Finding: a critical expectation failed.
    """
    data = stage.input("rational")
    files = {name: list(read_jsonl(data / name)) for name in (TRAIN_FILE, EVAL_FILE)}
    listed, splits = row_places(data / "rows.parquet"), base_splits(data / "bases.jsonl")
    frames = safety_suite.frames(files, listed, splits, stage.params, refusal.shipped())
    outcomes = expectations.judge(safety_suite.SUITE, frames, stage.out / "data_docs")
    found = verdict(safety_suite.SUITE, frames, outcomes, data, sum(map(len, files.values())))
    found.write(stage.out, frames)
    found.refuse(stage.name)


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
