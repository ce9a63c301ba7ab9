"""What is expected of Rational's text rows: the frames and their expectations, as data.

One row per text row (schema, identity, lineage, text, language, personal data, form, decision, leakage), one per group
of rows (size, balance of refusals) and one per form of a prompt. What rows are compared with (base prompts and their
splits) comes from the stage that made them; the checks share no code with it but the reading of an answer's two parts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from springhead.errors import BadInput
from springhead.llm import language, personal, rationale
from springhead.llm.judges.refusal import RefusalJudge
from springhead.llm.similarity import closest, ngrams
from springhead.llm.suite import EVAL_FILE, TRAIN, TRAIN_FILE, content_digest, frame_table, id_of, is_text
from springhead.verdicts import ROW, Check, Frame

SUITE = "safety-rows"
_TYPES: Mapping[str, type] = {
    **dict.fromkeys(("id", "method", "operator", "prompt", "completion", "answer", "split", "family"), str),
    **dict.fromkeys(("kind", "category", "source", "group", "goal"), str),
    "variant": int,
    "parents": list,
    "made_by": dict,
}
_ANSWERS = {"adversarial": "refuse", "contrast": "refuse", "benign": "comply"}
_WITH_RATIONALE = "rational"
"""Methods that begin so have completions of two parts."""


@dataclass(frozen=True)
class Settings:
    """Bounds of the suite."""

    min_prompt_chars: int
    """Shortest prompt."""
    max_prompt_chars: int
    """Longest prompt."""
    min_completion_chars: int
    """Shortest completion of a training row."""
    max_completion_chars: int
    """Longest completion of a training row."""
    methods: tuple[str, ...]
    """Training methods that must have rows, refusals and answers balanced."""
    forms: tuple[str, ...]
    """Forms of prompts that must have training rows; no others may occur in training."""
    eval_forms: tuple[str, ...]
    """Forms that must have evaluation rows."""
    min_group_rows: int
    """Fewest rows of each training method, and of each kind in evaluation."""
    max_refuse_share: float
    """Largest share of a method's rows that refuse; a method of all refusals teaches nothing else."""
    leakage_similarity: float
    """A training prompt this similar to an evaluation prompt is a leak (Jaccard of words, 0..1)."""

    def __post_init__(self) -> None:
        for kind in ("prompt", "completion"):
            if not 0 < getattr(self, f"min_{kind}_chars") <= getattr(self, f"max_{kind}_chars"):
                raise BadInput(f"safety suite: min_{kind}_chars must be in 1..max_{kind}_chars")
        for name in ("max_refuse_share", "leakage_similarity"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise BadInput(f"safety suite: {name} must be above 0 and at most 1")
        if self.min_group_rows < 1:
            raise BadInput("safety suite: min_group_rows must be at least 1")


def frames(
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    listed: Iterable[tuple[str, int, str]],
    bases: Mapping[str, str],
    settings: Settings,
    judge: RefusalJudge,
) -> list[Frame]:
    """The frames of one set of rows.

    Args:
        files: The rows of ``train.jsonl`` and ``eval.jsonl`` in order.
        listed: File, index and id of each entry of the row table.
        bases: Split of every base prompt by id.
        settings: The bounds.
        judge: Says whether the response of a completion refuses.
    """
    rows = [(file, index, row) for file in (TRAIN_FILE, EVAL_FILE) for index, row in enumerate(files[file])]
    table = _text_table(rows, list(listed), bases, settings, judge)
    names = [id_of(row) or f"{file}:{index + 1}" for file, index, row in rows]
    sound = [(file, row) for (file, _, row), error in zip(rows, table["schema_error"], strict=True) if pd.isna(error)]
    return [_text_frame(table, names, settings), _group_frame(sound, settings), _form_frame(sound, settings)]


# -- rows -----------------------------------------------------------------------------------------


def _schema_error(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's fields, or None."""
    for name, kind in _TYPES.items():
        if name not in row:
            return f"{name} is missing"
        if not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
            return f"{name} is {type(row[name]).__name__}, expected {kind.__name__}"
        if kind is str and not is_text(row[name]):
            return f"{name} is not valid Unicode"
    if not row["parents"] or not all(isinstance(parent, str) for parent in row["parents"]):
        return "parents is empty or holds something that is no text"
    if row["kind"] not in _ANSWERS:
        return f"kind {row['kind']!r} is unknown; known: {', '.join(_ANSWERS)}"
    return None


_NOTHING: Mapping[str, Any] = {
    "parent_known": True,
    "split_of_parent": True,
    "split_of_file": True,
    "form_known": True,
    "answer_of_kind": True,
    "prompt_chars": np.nan,
    "completion_chars": np.nan,
    "not_printable": np.nan,
    "foreign_text": None,
    "personal_data": None,
    "form_error": None,
    "decision_error": None,
    "leak": None,
    "repeats": None,
}


def _text_table(
    rows: Sequence[tuple[str, int, Mapping[str, Any]]],
    listed: Sequence[tuple[str, int, str]],
    bases: Mapping[str, str],
    settings: Settings,
    judge: RefusalJudge,
) -> pd.DataFrame:
    """One row per text row; what a malformed row cannot be asked is null and not held against it twice."""
    errors = [_schema_error(row) for _, _, row in rows]
    sound = [(file, row) for (file, _, row), error in zip(rows, errors, strict=True) if error is None]
    leaks = _leaks(sound, settings.leakage_similarity)
    known = {(file, index): row_id for file, index, row_id in listed}
    seen: dict[tuple[str, str, str], str] = {}
    columns: dict[str, list[Any]] = defaultdict(list)
    for (file, index, row), error in zip(rows, errors, strict=True):
        row_id = id_of(row)
        facts: dict[str, Any] = {"file": file, "line": index + 1, "schema_error": error, "id": row_id}
        facts["in_row_table"] = row_id is not None and known.get((file, index)) == row_id
        facts["id_is_content"] = row_id is not None and row_id == content_digest(row)
        if error is None:
            facts |= _facts(row, file, bases, settings, judge)
            key = (row["method"], row["prompt"], row["completion"])
            first = seen.setdefault(key, row["id"])
            facts["repeats"] = None if first == row["id"] or file == EVAL_FILE else first
            facts["leak"] = leaks.get((row["goal"], row["prompt"], row["group"])) if file == TRAIN_FILE else None
        else:
            facts |= _NOTHING
        for name, value in facts.items():
            columns[name].append(value)
    order = ("file", "line", "schema_error", "id", "in_row_table", "id_is_content", *_NOTHING)
    table = pd.DataFrame({ROW: np.arange(len(rows)), **{name: columns[name] for name in order}})
    for name in ("prompt_chars", "completion_chars", "not_printable"):
        table[name] = table[name].astype(float)
    return table


def _facts(
    row: Mapping[str, Any], file: str, bases: Mapping[str, str], settings: Settings, judge: RefusalJudge
) -> dict[str, Any]:
    """Everything the suite asks of one well-formed row by itself."""
    splits = {bases.get(parent) for parent in row["parents"]}
    training = file == TRAIN_FILE
    forms = settings.forms if training else settings.eval_forms
    texts = (row["goal"], row["prompt"], row["completion"])
    form_error, decision_error = _completion_errors(row, judge) if training else (None, None)
    return {
        "parent_known": None not in splits,
        "split_of_parent": None in splits or splits == {row["split"]},
        "split_of_file": (row["split"] == TRAIN) == training,
        "form_known": row["operator"] in forms,
        "answer_of_kind": row["answer"] == _ANSWERS[row["kind"]],
        "prompt_chars": len(row["prompt"].strip()),
        "completion_chars": len(row["completion"].strip()) if training else np.nan,
        "not_printable": sum(not (c.isprintable() or c in "\n\t") for text in texts for c in text),
        # A disguise may be dialect on purpose, so the language is looked for in the goal and the completion.
        "foreign_text": language.foreign(row["goal"]) or language.foreign(row["completion"]),
        "personal_data": next((f"{kind}: {hit}" for text in texts for kind, hit in personal.found(text)), None),
        "form_error": form_error,
        "decision_error": decision_error,
    }


def _completion_errors(row: Mapping[str, Any], judge: RefusalJudge) -> tuple[str | None, str | None]:
    """What is wrong with the form of a training row's completion, and with what it decides."""
    parts = rationale.split(row["completion"])
    wanted = row["answer"]
    if row["method"].startswith(_WITH_RATIONALE):
        if parts.fault is not None:
            return parts.fault, None
        decided = rationale.verdict(parts.rationale)
        if decided != wanted:
            return None, f"the rationale decides {decided}, the answer is {wanted}"
    elif parts.fault != "no cue":
        return "a completion without rationale has a cue in it", None
    refused = judge.refuses(row["goal"], parts.response)
    if refused != (wanted == "refuse"):
        return None, f"the response {'refuses' if refused else 'does not refuse'}, the answer is {wanted}"
    return None, None


def _leaks(sound: Sequence[tuple[str, Mapping[str, Any]]], threshold: float) -> dict[tuple[str, str, str], str]:
    """For training rows that give an evaluation row away, by goal, prompt and group: how."""
    training = {(r["goal"], r["prompt"], r["group"]) for file, r in sound if file == TRAIN_FILE}
    held = [r for file, r in sound if file == EVAL_FILE]
    prompts = {r["prompt"]: r["id"] for r in held}
    groups = {r["group"]: r["id"] for r in held}
    goals = list(dict.fromkeys(r["goal"] for r in held))
    asked = sorted({goal for goal, _, _ in training})
    near = closest(
        [ngrams([goal.lower()], 1) for goal in asked], [ngrams([goal.lower()], 1) for goal in goals], threshold
    )
    close = {g: (s, goals[i]) for g, (s, i) in zip(asked, near, strict=True) if s >= threshold}
    found = {}
    for key in sorted(training):
        goal, prompt, group = key
        if prompt in prompts:
            found[key] = f"the prompt of evaluation row {prompts[prompt]}"
        elif group in groups:
            found[key] = f"the near-duplicate group of evaluation row {groups[group]}"
        elif goal in close:
            found[key] = f"{close[goal][0]:.2f} like the evaluation prompt {close[goal][1][:80]!r}"
    return found


def _text_frame(table: pd.DataFrame, names: Sequence[str], settings: Settings) -> Frame:
    prompt = {"min_value": settings.min_prompt_chars, "max_value": settings.max_prompt_chars}
    completion = {"min_value": settings.min_completion_chars, "max_value": settings.max_completion_chars}
    none = {"min_value": 0, "max_value": 0}
    checks = (
        Check("ExpectRows", "row_count", "", "there are rows", {"min_value": 1}),
        Check("ExpectRowSchema", "null", "schema_error", "a row has all fields, each of its type"),
        Check("ExpectRowIds", "not_null", "id", "a row has an id"),
        Check("ExpectRowIdsUnique", "unique", "id", "no id occurs twice"),
        Check("ExpectRowIdsOfContent", "true", "id_is_content", "an id is the digest of its row"),
        Check("ExpectRowsListed", "true", "in_row_table", "the row table has each row at its place"),
        Check("ExpectParentsExist", "true", "parent_known", "a row's parents are base prompts"),
        Check("ExpectSplitOfParent", "true", "split_of_parent", "a row is in its parent's split"),
        Check("ExpectSplitOfFile", "true", "split_of_file", "training rows are in one file, all others in the other"),
        Check("ExpectKnownForms", "true", "form_known", "rows have a form that their file may have"),
        Check("ExpectAnswerOfKind", "true", "answer_of_kind", "benign rows comply, all others refuse"),
        Check("ExpectPromptLength", "between", "prompt_chars", "a prompt is neither empty nor over-long", prompt),
        Check("ExpectCompletionLength", "between", "completion_chars", "nor is a training completion", completion),
        Check("ExpectPrintableText", "between", "not_printable", "texts have printable characters only", none),
        Check("ExpectEnglish", "null", "foreign_text", "goals and completions are English"),
        Check("ExpectNoPersonalData", "null", "personal_data", "no e-mail, telephone, card or account number"),
        Check("ExpectWholeForm", "null", "form_error", "a completion has its two parts, or no cue where it has one"),
        Check("ExpectRightDecision", "null", "decision_error", "rationale and response decide as the answer says"),
        Check("ExpectNoLeak", "null", "leak", "no training row gives an evaluation prompt away"),
        Check("ExpectNoRepeatedText", "null", "repeats", "no method has a training text twice", severity="warning"),
    )
    return Frame("rows", "row", table, checks, names, ("file", "line"))


# -- groups and forms -----------------------------------------------------------------------------


def _group_frame(sound: Sequence[tuple[str, Mapping[str, Any]]], settings: Settings) -> Frame:
    """One row per training method and per kind in evaluation: how many rows, and how many of them refuse."""
    sizes: Counter[tuple[str, str]] = Counter()
    refusals: Counter[tuple[str, str]] = Counter()
    for file, row in sound:
        key = ("train", row["method"]) if file == TRAIN_FILE else ("eval", row["kind"])
        sizes[key] += 1
        refusals[key] += row["answer"] == "refuse"
    required = [*(("train", m) for m in settings.methods), ("eval", "adversarial"), ("eval", "benign")]
    lines = []
    for key in sorted({*sizes, *required}):
        balanced = key in required and key[0] == "train" and sizes[key]
        line: dict[str, Any] = {"side": key[0], "name": key[1], "rows": float(sizes[key])}
        lines.append(line | {"refuse_share": refusals[key] / sizes[key] if balanced else float("nan")})
    rows = {"min_value": settings.min_group_rows}
    shares = {"min_value": 1.0 - settings.max_refuse_share, "max_value": settings.max_refuse_share}
    enough = "each method, and each kind in evaluation, has enough rows"
    checks = (
        Check("ExpectEnoughRows", "between", "rows", enough, rows),
        Check("ExpectBalancedAnswers", "between", "refuse_share", "refusals and answers are balanced", shares),
    )
    columns = ("side", "name", "rows", "refuse_share")
    ids = [f"{line['side']}/{line['name']}" for line in lines]
    return Frame("groups", "group", frame_table(lines, columns), checks, ids, ("side", "name"), False)


def _form_frame(sound: Sequence[tuple[str, Mapping[str, Any]]], settings: Settings) -> Frame:
    """One row per form of a prompt that must be there: how many rows it has."""
    counts = Counter((file, row["operator"]) for file, row in sound)
    wanted = [(TRAIN_FILE, form) for form in settings.forms] + [(EVAL_FILE, form) for form in settings.eval_forms]
    lines = [{"file": file, "form": form, "rows": counts[(file, form)]} for file, form in wanted]
    checks = (Check("ExpectFormRows", "between", "rows", "each form of a prompt has rows", {"min_value": 1}),)
    ids = [f"{file}/{form}" for file, form in wanted]
    frame = frame_table(lines, ("file", "form", "rows"))
    return Frame("forms", "form", frame, checks, ids, ("file", "form"), False)
