"""Filters of text rows. Each is a function from rows to decisions and changes nothing.

What counts as a duplicate needs care here, since MEND makes many texts of one problem on purpose:

- near-duplicates are looked for between *problems* (their needed facts and question, in any order), never between
  the variants of one problem; dropping a problem drops all its rows;
- a row is a duplicate only if another row of the same method shows the same prompt and the same completion, and
  evaluation rows are exempt, so that every evaluation problem keeps all its variants;
- leakage is looked for between a training row and the evaluation problems, by three signs: a shared parent, the same
  expression (numbers and operations without names, so permuted and renamed copies count), and n-gram overlap, with
  reworded sentences back in the generator's own words.

Similarity is the Jaccard index of word n-grams taken inside sentences, so that statement order plays no part
(`similarity.py`): MinHash decides which pairs are compared, never what is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from springhead.errors import BadInput
from springhead.llm import mend, solver
from springhead.llm.families import own_words, reader
from springhead.llm.problems import TRAIN, Problem
from springhead.llm.similarity import closest, earlier_twins, ngrams
from springhead.llm.textrows import Row, row_id
from springhead.sources import SourceError

DECISIONS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("rule", pa.string()),
        ("kept", pa.bool_()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("replaced_by", pa.string()),
    ]
)


@dataclass(frozen=True)
class Decision:
    """What one rule said about one row.

    `value` is what the rule measured and `threshold` what it was compared with. `replaced_by` is set where
    something else stands for a dropped row: the kept row of a duplicate, the kept problem of a near-duplicate, the
    evaluation problem of a leak.
    """

    id: str
    rule: str
    kept: bool
    value: float
    threshold: float
    replaced_by: str | None = None


def kept(rows: Sequence[Row], decisions: Sequence[Decision]) -> list[Row]:
    """The rows whose decision (same order) keeps them."""
    return [row for row, decision in zip(rows, decisions, strict=True) if decision.kept]


def content_id(rows: Sequence[Row]) -> list[Decision]:
    """Drop a row whose id is not the digest of its content: it was edited after it was made."""
    return [Decision(row["id"], "content-id", ok := _intact(row), float(ok), 1.0) for row in rows]


def _intact(row: Row) -> bool:
    try:
        return bool(row_id(row) == row["id"])
    except BadInput:  # a NaN, which no row of ours has
        return False


def parent(rows: Sequence[Row], problems: Mapping[str, Problem]) -> list[Decision]:
    """Drop a row without exactly one known parent problem, or with another split than its parent's."""

    def good(row: Row) -> bool:
        origin = problems.get(row["parents"][0]) if len(row["parents"]) == 1 else None
        return origin is not None and origin.split == row["split"]

    return [Decision(row["id"], "parent", ok := good(row), float(ok), 1.0) for row in rows]


def count_words(text: str) -> int:
    """Words and signs in a text; about the number of tokens of a word-level tokenizer."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def length(rows: Sequence[Row], min_words: int, max_words: int) -> list[Decision]:
    """Drop a row whose prompt and completion have fewer than `min_words` or more than `max_words` words and signs."""
    decisions = []
    for row in rows:
        words = count_words(row["prompt"]) + count_words(row["completion"])
        bound = min_words if words < min_words else max_words
        decisions.append(Decision(row["id"], "length", min_words <= words <= max_words, float(words), float(bound)))
    return decisions


def answer(rows: Sequence[Row]) -> list[Decision]:
    """Drop a row whose answer or chain is wrong for its text, recomputed by an independent solver.

    The value is 1 for a right answer with a valid chain, .5 for a right answer whose chain is invalid, 0 for a
    wrong answer, a text that cannot be read, and a completion that has several answers or goes on after its answer.

    Raises:
        SourceError: the answers of a family are looked up in a file that is not at hand.
    """
    return [Decision(row["id"], "answer", (v := _grade(row)) >= 1.0, v, 1.0) for row in rows]


def _grade(row: Row) -> float:
    module = reader(row["family"])
    try:
        statements, question = solver.split_text(row["prompt"])
        truth = module.solve(statements, question)
        if row["answer"] != truth or not mend.ends_with_answer(row["completion"], truth):
            return 0.0
        fault = module.chain_error(statements, question, mend.steps_of(row["completion"]))
    except SourceError:
        raise
    except BadInput:
        return 0.0
    return 1.0 if fault is None else 0.5


def leakage(rows: Sequence[Row], problems: Sequence[Problem], threshold: float, ngram: int) -> list[Decision]:
    """Drop a training row that gives an evaluation problem away; rows of other splits are kept.

    The value is 1 for a shared parent or expression, else the largest n-gram similarity found to an
    evaluation problem (0 when no candidate came up); a row is dropped from `threshold` on.
    """
    held_out = [problem for problem in problems if problem.split != TRAIN]
    ids = {problem.id for problem in held_out}
    expressions = {reader(p.family).signature(p.statements, p.question): p.id for p in reversed(held_out)}
    training = [row for row in rows if row["split"] == TRAIN]
    # The variants of one problem need the same sentences: look at each such core once.
    core_of = {row["id"]: _core(row) for row in training}
    cores = list(dict.fromkeys(core_of.values()))
    own = {core: _expression(core) for core in cores}
    references = [ngrams((*p.statements, p.question), ngram) for p in held_out]
    close = closest([ngrams(core[1:], ngram) for core in cores], references, threshold)
    nearest = dict(zip(cores, close, strict=True))
    decisions = []
    for row in rows:
        if row["split"] != TRAIN:
            decisions.append(Decision(row["id"], "leakage", True, 0.0, threshold))
            continue
        core = core_of[row["id"]]
        similarity, where = nearest[core]
        source = next((p for p in row["parents"] if p in ids), None) or expressions.get(own[core] or "")
        if source is not None:
            decisions.append(Decision(row["id"], "leakage", False, 1.0, threshold, source))
        elif similarity >= threshold:
            decisions.append(Decision(row["id"], "leakage", False, similarity, threshold, held_out[where].id))
        else:
            decisions.append(Decision(row["id"], "leakage", True, similarity, threshold))
    return decisions


def _core(row: Row) -> tuple[str, ...]:
    """The family, then the sentences the question needs and the question; all sentences of an unreadable text.

    Reworded sentences are put back into the generator's words, which the evaluation problems have.
    """
    family = row["family"]
    try:
        statements, question = solver.split_text(row["prompt"])
        sentences = [*reader(family).needed_statements(statements, question), question]
    except BadInput:
        sentences = [sentence.strip() for sentence in re.findall(r"[^.?]+[.?]?", row["prompt"])]
    return (family, *(own_words(family, sentence) for sentence in sentences))


def _expression(core: tuple[str, ...]) -> str | None:
    """The signature of a core; None where it cannot be read."""
    family, *sentences = core
    try:
        return str(reader(family).signature(sentences[:-1], sentences[-1])) if sentences else None
    except BadInput:
        return None


def near_duplicate(rows: Sequence[Row], problems: Sequence[Problem], threshold: float, ngram: int) -> list[Decision]:
    """Drop all rows of a problem that is at least `threshold` similar to an earlier kept problem of its split.

    The value is the largest similarity to a kept problem among the candidates (0 without one).
    """
    present = {p for row in rows for p in row["parents"]}
    verdicts: dict[str, tuple[float, str | None]] = {}
    for split in sorted({problem.split for problem in problems}):
        group = [p for p in problems if p.split == split and p.id in present]
        twins = earlier_twins([ngrams((*p.statements, p.question), ngram) for p in group], threshold)
        for index, (similarity, other) in twins.items():
            verdicts[group[index].id] = (similarity, group[other].id)
    decisions = []
    for row in rows:
        similarity, other_id = verdicts.get(row["parents"][0], (0.0, None))
        ok = similarity < threshold
        decisions.append(Decision(row["id"], "near-duplicate", ok, similarity, threshold, None if ok else other_id))
    return decisions


def duplicate_row(rows: Sequence[Row]) -> list[Decision]:
    """Drop a training row that repeats an earlier row of its method word for word (value: copies before it)."""
    first: dict[tuple[str, ...], str] = {}
    copies: dict[tuple[str, ...], int] = {}
    decisions = []
    for row in rows:
        key = (row["method"], row["prompt"], row["completion"])
        before = copies.get(key, 0) if row["split"] == TRAIN else 0
        copies[key] = copies.get(key, 0) + 1
        first.setdefault(key, row["id"])
        decisions.append(
            Decision(row["id"], "duplicate-row", before == 0, float(before), 1.0, first[key] if before else None)
        )
    return decisions
