"""Filter the generated rows: edited ids, lineage, length, answers, leakage, near-duplicates, duplicates.

Writes the kept rows as `train.jsonl` and `eval.jsonl` with their `rows.parquet`, and `decisions.parquet`: one line
per rule and row, up to the rule that dropped the row. The rules run in the order above, each on what the ones
before it kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.llm import families, textfilters
from springhead.llm.problems import TRAIN, Problem
from springhead.llm.textfilters import DECISIONS_SCHEMA, Decision
from springhead.llm.textrows import Row, read_rows, write_rows
from springhead.progress import Progress
from springhead.stage import Stage, run_stage
from springhead.tables import write_table

FIELDS: dict[str, type] = {
    **dict.fromkeys(("id", "method", "operator", "prompt", "completion", "answer", "split", "family"), str),
    **dict.fromkeys(("variant", "ops", "depth"), int),
    **dict.fromkeys(("parents", "order"), list),
    "kendall_tau": float,
}


@dataclass(frozen=True)
class Params:
    """Parameters `llm.filter`."""

    min_words: int
    """Fewest words and signs of prompt and completion together."""
    max_words: int
    """Most words and signs."""
    ngram: int
    """Words per n-gram of the similarity rules."""
    leakage_similarity: float
    """A training row this similar to an evaluation problem is dropped (Jaccard, 0..1)."""
    duplicate_similarity: float
    """A problem this similar to an earlier one of its split is dropped (Jaccard, 0..1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise BadInput("llm.filter: min_words must be in 0..max_words")
        if self.ngram < 1:
            raise BadInput("llm.filter.ngram must be at least 1")
        for name in ("leakage_similarity", "duplicate_similarity"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise BadInput(f"llm.filter.{name} must be above 0 and at most 1")


def rules(params: Params, problems: Sequence[Problem]) -> list[Callable[[Sequence[Row]], list[Decision]]]:
    """The rules in the order they run."""
    by_id = {problem.id: problem for problem in problems}
    leak, twin = params.leakage_similarity, params.duplicate_similarity
    return [
        textfilters.content_id,
        lambda rows: textfilters.parent(rows, by_id),
        lambda rows: textfilters.length(rows, params.min_words, params.max_words),
        textfilters.answer,
        lambda rows: textfilters.leakage(rows, problems, leak, params.ngram),
        lambda rows: textfilters.near_duplicate(rows, problems, twin, params.ngram),
        textfilters.duplicate_row,
    ]


def apply(
    rows: list[Row], params: Params, problems: Sequence[Problem], bar: Progress
) -> tuple[list[Row], list[Decision]]:
    """Run all rules; the kept rows in their old order, and every decision."""
    decisions: list[Decision] = []
    for rule in rules(params, problems):
        made = rule(rows)
        decisions += made
        rows = textfilters.kept(rows, made)
        bar.advance(rows=len(rows))
    return rows, decisions


def check_not_empty(kept: Sequence[Row], before: Sequence[Row], decisions: Sequence[Decision]) -> None:
    """Every split and method that came in must still have rows.

    Raises:
        BadInput: naming what is empty and how many rows each rule dropped.
    """
    groups = {(row["split"], row["method"]) for row in before}
    lost = sorted(groups - {(row["split"], row["method"]) for row in kept})
    if lost:
        dropped = Counter(d.rule for d in decisions if not d.kept)
        names = ", ".join(f"{method} rows of split {split!r}" for split, method in lost)
        counts = ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items()))
        raise BadInput(f"llm.filter: nothing left of the {names}; dropped by rule: {counts}; loosen llm.filter")


def write_decisions(path: Path, decisions: Sequence[Decision]) -> None:
    """The decisions as Parquet, in the order they were taken."""
    columns = {name: [getattr(d, name) for d in decisions] for name in DECISIONS_SCHEMA.names}
    write_table(path, columns, DECISIONS_SCHEMA)


def figures(before: Sequence[Row], kept: Sequence[Row], decisions: Sequence[Decision]) -> dict[str, Any]:
    """Rows in and out by file, and rows dropped by rule (a rule that dropped nothing is listed with 0)."""
    dropped = Counter(d.rule for d in decisions if not d.kept)
    return {
        "rows_in": {
            "train": sum(r["split"] == TRAIN for r in before),
            "eval": sum(r["split"] != TRAIN for r in before),
        },
        "rows_out": {"train": sum(r["split"] == TRAIN for r in kept), "eval": sum(r["split"] != TRAIN for r in kept)},
        "dropped": {rule: dropped[rule] for rule in sorted({d.rule for d in decisions})},
    }


def run(stage: Stage[Params]) -> None:
    """Read rows and problems, apply the rules, write what is left.

    Raises:
        BadInput: a file is missing or damaged, a public file that the problems are checked against cannot be had, or
            nothing is left.
    """
    sources = [stage.input("problems") / name for name in ("train.jsonl", "eval.jsonl")]
    problems = [Problem.from_row(row) for path in sources for row in read_rows(path, {"id": str})]
    # First, because a rule cannot tell a wrong answer from one that it cannot look up.
    families.obtain_sources((problem.family, problem.parents) for problem in problems)
    folder = stage.input("generate")
    before = [row for name in ("train.jsonl", "eval.jsonl") for row in read_rows(folder / name, FIELDS)]
    with stage.progress(len(rules(stage.params, problems)), unit="rules") as bar:
        kept, decisions = apply(before, stage.params, problems, bar)
    check_not_empty(kept, before, decisions)
    files = {
        "train.jsonl": [row for row in kept if row["split"] == TRAIN],
        "eval.jsonl": [row for row in kept if row["split"] != TRAIN],
    }
    write_rows(stage.out, files)
    write_decisions(stage.out / "decisions.parquet", decisions)
    for name, rows in files.items():
        stage.dataset(stage.out / name, f"rows-filtered-{name.partition('.')[0]}", len(rows), "output")
    stage.metrics(figures(before, kept, decisions))


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
