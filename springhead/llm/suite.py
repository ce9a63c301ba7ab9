"""What is expected of generated text rows: the frames and their expectations, as data.

One row per text row (schema, identity, lineage, text, language, personal data, form, answer, leakage), one per
evaluation problem's set of variants, one per group of rows (size, balance of the answers) and one per expected
operator. Nothing is shared with the filters: a mistake there must show up here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm import language, mend, personal, solver
from springhead.llm.families import LABELLED, READERS
from springhead.sources import SourceError
from springhead.verdicts import ROW, Check, Frame

SUITE = "llm-rows"
TRAIN_FILE, EVAL_FILE = "train.jsonl", "eval.jsonl"
TRAIN = "train"
_TYPES: Mapping[str, type] = {
    **dict.fromkeys(("id", "method", "operator", "prompt", "completion", "answer", "split", "family"), str),
    **dict.fromkeys(("variant", "ops", "depth"), int),
    **dict.fromkeys(("parents", "order"), list),
}
"""The fields every row must have; a row may have more."""
_PLAIN_OPERATORS = ("identity", "chain-order", "paraphrase")
_COMMON = language.COMMON | set(
    re.findall(
        r"\w+", "has have carries carry owns own makes make many more fewer than times together every true false"
    )
)
"""Common words of English and of the sentences of our problems."""
_CONTROL = re.compile(r"<\|[^|<>]*\|>|</?s>|<(?:pad|eos|unk|answer)>|\[/?INST\]")
"""What the chat templates of the students, and of models like them, put between messages."""
_DEVIATIONS = 3.0  # standard errors by which a share must exceed its bound before it counts as too large


@dataclass(frozen=True)
class Settings:
    """Bounds of the suite; the parameters ``llm.validate``."""

    min_prompt_chars: int
    """Shortest prompt."""
    max_prompt_chars: int
    """Longest prompt."""
    min_completion_chars: int
    """Shortest completion."""
    max_completion_chars: int
    """Longest completion."""
    methods: tuple[str, ...]
    """Training methods that must have rows."""
    operators: tuple[str, ...]
    """MEND operators that must have training rows; no others may occur."""
    min_group_rows: int
    """Fewest rows of each training method and of each evaluation split."""
    max_label_share: float
    """Largest share of one answer among a group's problems whose answers are True and False."""
    max_answer_share: float
    """Largest share of one answer among a group's problems whose answers are numbers."""

    def __post_init__(self) -> None:
        for kind in ("prompt", "completion"):
            if not 0 < getattr(self, f"min_{kind}_chars") <= getattr(self, f"max_{kind}_chars"):
                raise BadInput(f"llm.validate: min_{kind}_chars must be in 1..max_{kind}_chars")
        for name in ("max_label_share", "max_answer_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise BadInput(f"llm.validate.{name} must be above 0 and at most 1")
        if self.min_group_rows < 1:
            raise BadInput("llm.validate.min_group_rows must be at least 1")


def frames(
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    listed: Iterable[tuple[str, int, str]],
    problems: Mapping[str, str],
    settings: Settings,
) -> list[Frame]:
    """The frames of one set of rows.

    Args:
        files: The rows of ``train.jsonl`` and ``eval.jsonl`` in order.
        listed: File, index and id of each entry of the row table.
        problems: Split of every problem by id.
        settings: The bounds.
    """
    rows = [(file, index, row) for file in (TRAIN_FILE, EVAL_FILE) for index, row in enumerate(files[file])]
    table = text_table(rows, list(listed), problems, settings)
    # A row without an id is named by its place.
    names = [id_of(row) or f"{file}:{index + 1}" for file, index, row in rows]
    sound = [row for (_, _, row), error in zip(rows, table["schema_error"], strict=True) if pd.isna(error)]
    return [
        text_frame(table, names, settings),
        variant_frame(sound),
        group_frame(sound, problems, settings),
        operator_frame(sound, settings),
    ]


# -- rows -----------------------------------------------------------------------------------------


def text_table(
    rows: Sequence[tuple[str, int, Mapping[str, Any]]],
    listed: Sequence[tuple[str, int, str]],
    problems: Mapping[str, str],
    settings: Settings,
) -> pd.DataFrame:
    """One row per text row; what a malformed row cannot be asked is null and not held against it twice."""
    training = _TrainingSide(row for file, _, row in rows if file == TRAIN_FILE and _schema_error(row) is None)
    known = {(file, index): row_id for file, index, row_id in listed}
    allowed = {*_PLAIN_OPERATORS, *settings.operators}
    columns: dict[str, list[Any]] = defaultdict(list)
    for file, index, row in rows:
        error = _schema_error(row)
        row_id = id_of(row)
        facts = {"file": file, "line": index + 1, "schema_error": error, "id": row_id}
        facts["in_row_table"] = row_id is not None and known.get((file, index)) == row_id
        facts["id_is_content"] = row_id is not None and row_id == content_digest(row)
        facts |= _facts(row, file, problems, allowed, training) if error is None else _NOTHING
        for name, value in facts.items():
            columns[name].append(value)
    table = pd.DataFrame({ROW: np.arange(len(rows)), **{name: columns[name] for name in (*_OWN, *_NOTHING)}})
    for name in ("prompt_chars", "completion_chars", "not_printable"):
        table[name] = table[name].astype(float)
    return table


_OWN = ("file", "line", "schema_error", "id", "in_row_table", "id_is_content")
_NOTHING: Mapping[str, Any] = {
    "parent_known": True,
    "split_of_parent": True,
    "split_of_file": True,
    "operator_known": True,
    "prompt_chars": np.nan,
    "completion_chars": np.nan,
    "not_printable": np.nan,
    "foreign_text": None,
    "personal_data": None,
    "form_error": None,
    "answer_error": None,
    "chain_error": None,
    "prompt_in_train": False,
    "parent_in_train": False,
    "expression_in_train": False,
    "repeats": None,
}


class _TrainingSide:
    """What the training rows contain, so that evaluation rows can be looked up in it."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.prompts: set[str] = set()
        self.parents: set[str] = set()
        self.expressions: set[str] = set()
        self.texts: dict[tuple[str, str, str], str] = {}
        for row in rows:
            self.prompts.add(row["prompt"])
            self.parents.update(row["parents"])
            self.expressions.update(filter(None, [_expression(row)]))

    def repeats(self, row: Mapping[str, Any]) -> str | None:
        """The id of an earlier row of this method with the same text; remembers the row."""
        key = (row["method"], row["prompt"], row["completion"])
        first = self.texts.setdefault(key, row["id"])
        return None if first == row["id"] else first


def id_of(row: Mapping[str, Any]) -> str | None:
    """A row's id, if it has one that can be written."""
    found = row.get("id")
    return found if isinstance(found, str) and found and is_text(found) else None


def is_text(value: str) -> bool:
    """Whether a string can be written at all: JSON can smuggle in half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def content_digest(row: Mapping[str, Any]) -> str | None:
    """The id that the row's content asks for; None for content that has no canonical form (NaN, half characters)."""
    try:
        return json_digest({key: value for key, value in row.items() if key != "id"})
    except (BadInput, UnicodeEncodeError):
        return None


def _schema_error(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's fields, or None."""
    for name, kind in _TYPES.items():
        if name not in row:
            return f"{name} is missing"
        if not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
            return f"{name} is {type(row[name]).__name__}, expected {kind.__name__}"
        if kind is str and not is_text(row[name]):
            return f"{name} is not valid Unicode"
    if not all(isinstance(parent, str) for parent in row["parents"]):
        return "parents holds something that is no text"
    if row["family"] not in READERS:
        return f"family {row['family']!r} is unknown; known: {', '.join(READERS)}"
    return None


def _facts(
    row: Mapping[str, Any], file: str, problems: Mapping[str, str], allowed: set[str], training: _TrainingSide
) -> dict[str, Any]:
    """Everything the suite asks of one well-formed row."""
    prompt, completion = row["prompt"], row["completion"]
    splits = {problems.get(parent) for parent in row["parents"]}
    held_out = file == EVAL_FILE
    answer_error, chain_error = _solve(row)
    return {
        "parent_known": bool(splits) and None not in splits,
        "split_of_parent": not splits or None in splits or splits == {row["split"]},
        "split_of_file": (row["split"] == TRAIN) != held_out,
        "operator_known": row["operator"] in allowed or held_out,
        "prompt_chars": len(prompt.strip()),
        "completion_chars": len(completion.strip()),
        "not_printable": sum(
            not (c.isprintable() or c == "\n") for text in (prompt, completion, row["answer"]) for c in text
        ),
        "foreign_text": language.foreign(prompt, _COMMON) or _foreign_completion(prompt, completion),
        "personal_data": next(
            (f"{kind}: {hit}" for s in (prompt, completion) for kind, hit in personal.found(s)), None
        ),
        "form_error": _form_error(prompt, completion),
        "answer_error": answer_error,
        "chain_error": chain_error,
        "prompt_in_train": held_out and prompt in training.prompts,
        "parent_in_train": held_out and not training.parents.isdisjoint(row["parents"]),
        "expression_in_train": held_out and _expression(row) in training.expressions,
        "repeats": None if held_out else training.repeats(row),
    }


def _foreign_completion(prompt: str, completion: str) -> str | None:
    """Why a completion does not look English, or None; names and kinds that it has from the prompt do not count."""
    known = {*language.words_of(prompt)}
    return language.foreign(" ".join(word for word in language.words_of(completion) if word not in known), _COMMON)


def _form_error(prompt: str, completion: str) -> str | None:
    """What is wrong with the delimiters of a row: the sign between messages, and the cue before the one answer."""
    control = _CONTROL.search(prompt) or _CONTROL.search(completion)
    if control:
        return f"the text holds {control[0]!r}, which delimits messages"
    if mend.ANSWER_CUE in prompt:
        return f"the prompt holds {mend.ANSWER_CUE!r}"
    _, *answers = completion.split(mend.ANSWER_CUE)
    if len(answers) != 1:
        return f"the completion has {mend.ANSWER_CUE!r} {len(answers)} times, expected once"
    _, *rest = answers[0].split()
    return f"the completion goes on after its answer: {' '.join(rest)[:80]!r}" if rest else None


def _solve(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What is wrong with a row's answer and with its chain, recomputed from the text a model is shown."""
    reader = READERS[row["family"]]
    try:
        statements, question = solver.split_text(row["prompt"])
        truth = reader.solve(statements, question)
        given = mend.final_answer(row["completion"])
        if row["answer"] != truth:
            return f"answer {row['answer']!r}, the text gives {truth!r}", None
        if given != truth:
            return f"the completion ends with {given!r}, the text gives {truth!r}", None
        return None, reader.chain_error(statements, question, mend.steps_of(row["completion"]))
    except SourceError:
        raise
    except BadInput as error:
        return str(error), None


def _expression(row: Mapping[str, Any]) -> str | None:
    """Digest of what the row asks for without its names; None for a text that cannot be read."""
    try:
        statements, question = solver.split_text(row["prompt"])
        return str(READERS[row["family"]].signature(statements, question))
    except BadInput:
        return None


def text_frame(table: pd.DataFrame, names: Sequence[str], settings: Settings) -> Frame:
    """The expectations on single rows."""
    prompt = {"min_value": settings.min_prompt_chars, "max_value": settings.max_prompt_chars}
    completion = {"min_value": settings.min_completion_chars, "max_value": settings.max_completion_chars}
    none, no = {"min_value": 0, "max_value": 0}, {"value_set": [False]}
    leak = "no evaluation row shares its {} with a training row"
    checks = (
        Check("ExpectRows", "row_count", "", "there are rows", {"min_value": 1}),
        Check("ExpectRowSchema", "null", "schema_error", "a row has all fields, each of its type"),
        Check("ExpectRowIds", "not_null", "id", "a row has an id"),
        Check("ExpectRowIdsUnique", "unique", "id", "no id occurs twice"),
        Check("ExpectRowIdsOfContent", "true", "id_is_content", "an id is the digest of its row"),
        Check("ExpectRowsListed", "true", "in_row_table", "the row table has each row at its place"),
        Check("ExpectParentsExist", "true", "parent_known", "a row has a parent, and it is one of the problems"),
        Check("ExpectSplitOfParent", "true", "split_of_parent", "a row is in its parent's split"),
        Check("ExpectSplitOfFile", "true", "split_of_file", "training rows are in one file, all others in the other"),
        Check("ExpectKnownOperators", "true", "operator_known", "training rows have an operator of the list"),
        Check("ExpectPromptLength", "between", "prompt_chars", "a prompt is neither empty nor over-long", prompt),
        Check("ExpectCompletionLength", "between", "completion_chars", "nor is a completion", completion),
        Check("ExpectPrintableText", "between", "not_printable", "texts have printable characters only", none),
        Check("ExpectEnglish", "null", "foreign_text", "prompts and completions are English"),
        Check("ExpectNoPersonalData", "null", "personal_data", "no e-mail, telephone, card or account number"),
        Check("ExpectWholeForm", "null", "form_error", "a completion ends with its one answer, and no text delimits"),
        Check("ExpectRightAnswers", "null", "answer_error", "the answer is the one that the text gives"),
        Check("ExpectValidChains", "null", "chain_error", "each step of the solution follows from the text"),
        Check("ExpectNoPromptLeak", "in_set", "prompt_in_train", leak.format("prompt"), no),
        Check("ExpectNoParentLeak", "in_set", "parent_in_train", leak.format("parent problem"), no),
        Check("ExpectNoExpressionLeak", "in_set", "expression_in_train", leak.format("expression"), no),
        Check("ExpectNoRepeatedText", "null", "repeats", "no method has a training text twice", severity="warning"),
    )
    return Frame("rows", "row", table, checks, names, ("file", "line"))


# -- variants, groups, operators ------------------------------------------------------------------


def variant_frame(rows: Sequence[Mapping[str, Any]]) -> Frame:
    """One row per problem and method: its variants.

    An evaluation split is scored by the worst case over variants, so its problems must all have the same set. In
    training a variant may be missing (the filters drop repetitions), but none may occur twice.
    """
    variants: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in rows:
        if row["parents"]:
            variants[(row["split"], row["method"], row["parents"][0])].append(row["variant"])
    full: dict[str, set[int]] = defaultdict(set)
    for (split, _, _), found in variants.items():
        full[split].update(found)
    lines = [
        {
            "split": split,
            "method": method,
            "problem": problem,
            "variants": len(found),
            "repeated": len(found) - len(set(found)),
            "missing": 0 if split == TRAIN else len(full[split] - set(found)),
        }
        for (split, method, problem), found in variants.items()
    ]
    none = {"min_value": 0, "max_value": 0}
    complete = "all evaluation problems of a split have the same variants"
    checks = (
        Check("ExpectNoRepeatedVariants", "between", "repeated", "a problem has each variant of a method once", none),
        Check("ExpectCompleteVariants", "between", "missing", complete, none, "warning"),
    )
    columns = ("split", "method", "problem", "variants", "repeated", "missing")
    ids = [str(line["problem"]) for line in lines]
    return Frame("variants", "problem", frame_table(lines, columns), checks, ids, ("split", "method", "problem"), False)


def group_frame(rows: Sequence[Mapping[str, Any]], problems: Mapping[str, str], settings: Settings) -> Frame:
    """One row per split, method and family: how many rows, and how balanced the answers of its problems are.

    The training methods and the evaluation splits that must be there have a row for all families together, too.
    """
    answers: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    sizes: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = (row["split"], row["method"], row["family"])
        sizes[key] += 1
        sizes[(row["split"], row["method"], "all")] += 1
        answers[key][row["parents"][0] if row["parents"] else row["id"]] = row["answer"]
    required = [(TRAIN, method, "all") for method in settings.methods]
    required += [(split, "eval", "all") for split in sorted({*problems.values()} - {TRAIN})]
    lines = []
    for key in sorted({*sizes, *required}):
        given = Counter(answers.get(key, {}).values())
        count = sum(given.values())
        top = min(given.items(), key=lambda item: (-item[1], item[0])) if given else ("", 0)
        share = share_at_least(top[1], count)
        line: dict[str, Any] = dict(zip(("split", "method", "family"), key, strict=True))
        line |= {"rows": float(sizes[key]) if key in required else float("nan"), "top_answer": top[0]}
        line["top_share"] = top[1] / count if count else float("nan")
        line["label_share_at_least"] = share if key[2] in LABELLED else float("nan")
        line["answer_share_at_least"] = share if key[2] in READERS and key[2] not in LABELLED else float("nan")
        lines.append(line)
    label, answer = {"max_value": settings.max_label_share}, {"max_value": settings.max_answer_share}
    checks = (
        Check(
            "ExpectEnoughRows",
            "between",
            "rows",
            f"each method and each evaluation split has at least {settings.min_group_rows} rows",
            {"min_value": settings.min_group_rows},
        ),
        Check("ExpectBalancedLabels", "between", "label_share_at_least", "True and False are balanced", label),
        Check("ExpectVariedAnswers", "between", "answer_share_at_least", "no number is the usual answer", answer),
    )
    shares = ("top_share", "label_share_at_least", "answer_share_at_least")
    columns = ("split", "method", "family", "rows", "top_answer", *shares)
    ids = ["/".join((line["split"], line["method"], line["family"])) for line in lines]
    keys = ("split", "method", "family", "top_answer", "top_share")
    return Frame("groups", "group", frame_table(lines, columns), checks, ids, keys, False)


def share_at_least(hits: int, count: int) -> float:
    """How large a share is at least, given the size of the sample (Wilson's lower bound): ten problems prove little."""
    if not count:
        return float("nan")
    share, spread = hits / count, _DEVIATIONS**2 / count
    margin = _DEVIATIONS * float(np.sqrt(share * (1.0 - share) / count + spread / (4.0 * count)))
    return (share + spread / 2.0 - margin) / (1.0 + spread)


def operator_frame(rows: Sequence[Mapping[str, Any]], settings: Settings) -> Frame:
    """One row per expected MEND operator: how many training rows it made."""
    counts = Counter(row["operator"] for row in rows if row["split"] == TRAIN and row["method"] == "mend")
    lines = [{"operator": name, "rows": counts[name]} for name in settings.operators]
    checks = (Check("ExpectOperatorRows", "between", "rows", "each operator made training rows", {"min_value": 1}),)
    frame = frame_table(lines, ("operator", "rows"))
    return Frame("operators", "operator", frame, checks, list(settings.operators), ("operator",), False)


def frame_table(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Lines as a table whose first column counts them."""
    table = pd.DataFrame(list(lines), columns=list(columns))
    table.insert(0, ROW, np.arange(len(table)))
    return table
