"""Turn problems into training and evaluation rows: plain fine-tuning, MEND, optionally RC-Aug and paraphrases.

Writes `train.jsonl` with the rows of every method (field `method`), `eval.jsonl` with every order and redundancy
variant of each evaluation problem (method "eval", the same for all methods), and `rows.parquet`.

The control for MEND. Plain SFT has one row per problem, MEND 1 + variants, so the two must be compared at the same
number of optimizer steps, not epochs; the finetune stage does that. With `mend_problems` = m, MEND sees only the
first m problems, while SFT keeps all: at m = problems / (1 + variants) both have the same number of rows and SFT
even sees more different problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.llm import mend, paraphrase
from springhead.llm.families import STORIES
from springhead.llm.problems import Problem
from springhead.llm.textrows import Row, read_rows, write_rows
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Params:
    """Parameters `llm.generate`."""

    variants: int
    """MEND rows per problem beside the original."""
    operators: tuple[str, ...]
    """MEND operators, taken in turn: order, redundancy, order+redundancy."""
    redundant_max: int
    """A redundancy row shows 1..redundant_max redundant statements."""
    mend_problems: int
    """How many training problems MEND uses; 0 for all."""
    rc_variants: int
    """RC-Aug rows per problem beside the original; 0 leaves the method out."""
    eval_random_orders: int
    """Random orders per evaluation problem, beside topological and reversed."""
    eval_redundant: int
    """Redundant statements of the evaluation variants with redundancy; 0 leaves them out."""
    paraphrase_variants: int = 0
    """Reworded rows per generated problem beside the original; 0 leaves the method out."""

    def __post_init__(self) -> None:
        counts = ("variants", "mend_problems", "rc_variants", "eval_random_orders", "eval_redundant")
        low = [name for name in (*counts, "paraphrase_variants") if getattr(self, name) < 0]
        if low:
            raise BadInput(f"llm.generate: {', '.join(low)} must not be negative")
        if self.redundant_max < 1:
            raise BadInput("llm.generate.redundant_max must be at least 1; leave redundancy out of operators instead")


def load_problems(path: Path) -> list[Problem]:
    """The problems of a file; see `read_rows` for the errors."""
    return [Problem.from_row(row) for row in read_rows(path, {"id": str})]


def operators_for(problem: Problem, params: Params) -> tuple[str, ...]:
    """The operators that a problem allows: natural text comes without redundant statements.

    Raises:
        BadInput: it allows none of those asked for.
    """
    if problem.family not in STORIES:
        return params.operators
    found = tuple(name for name in params.operators if "redundancy" not in name)
    if not found:
        raise BadInput(
            f"llm.generate.operators: problems of {problem.family} have no redundant statements; add 'order', or leave "
            "them out of train"
        )
    return found


def train_rows(problem: Problem, index: int, params: Params, seed: int) -> list[Row]:
    """Rows of all methods for the training problem at `index`.

    Raises:
        BadInput: an operator is unknown or the problem has too few redundant statements.
    """
    rows = [mend.sft_row(problem)]
    if not params.mend_problems or index < params.mend_problems:
        rows += mend.mend_rows(problem, params.variants, operators_for(problem, params), params.redundant_max, seed)
    if params.rc_variants and problem.family == "dag":
        rows += mend.rc_rows(problem, params.rc_variants, seed)
    if params.paraphrase_variants and problem.family in paraphrase.FAMILIES:
        rows += paraphrase.rows(problem, params.paraphrase_variants, seed)
    return rows


def figures(train: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, Any]:
    """Row counts by method and operator, and MEND's mean Kendall tau over its re-ordered rows."""
    counts = Counter((row["method"], row["operator"]) for row in train)
    table: dict[str, Any] = {"train": {}, "eval": dict(sorted(Counter(r["split"] for r in evaluation).items()))}
    for (method, operator), count in sorted(counts.items()):
        table["train"].setdefault(method, {})[operator] = count
    taus = [row["kendall_tau"] for row in train if row["method"] == "mend" and "order" in row["operator"]]
    table["mend_order_kendall_tau_mean"] = sum(taus) / len(taus) if taus else 1.0
    return table


def run(stage: Stage[Params]) -> None:
    """Read the problems, write their rows."""
    params, folder = stage.params, stage.input("problems")
    training, held_out = (load_problems(folder / name) for name in ("train.jsonl", "eval.jsonl"))
    train: list[Row] = []
    evaluation: list[Row] = []
    with stage.progress(len(training) + len(held_out), unit="problems") as bar:
        for index, problem in enumerate(training):
            train += train_rows(problem, index, params, stage.seed)
            bar.advance()
        for problem in held_out:
            redundant = 0 if problem.family in STORIES else params.eval_redundant
            evaluation += mend.eval_rows(problem, params.eval_random_orders, redundant, stage.seed)
            bar.advance()
    write_rows(stage.out, {"train.jsonl": train, "eval.jsonl": evaluation})
    stage.dataset(stage.out / "train.jsonl", "rows-train", len(train), "output")
    stage.dataset(stage.out / "eval.jsonl", "rows-eval", len(evaluation), "output")
    stage.metrics(figures(train, evaluation))


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
