"""The public sets of the language branch that are used when they are present: what is read from each, and for what.

| set | read | may be used for |
|---|---|---|
| XSTest prompts, responses | prompt and type; response and two labels | training (prompts), the judge (responses) |
| CoCoNot preferences | prompt, chosen, rejected | training, the judge |
| CoCoNot contrast | prompt | evaluation only |
| AdvBench | goal; its target column is never read | training |
| HarmBench validation | standard behaviours | evaluation only |

`springhead.sources.obtain` finds the files; a missing one is a `BadInput` that says where to get it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.sources import obtain

XSTEST_MODELS = ("llama2orig", "mistralinstruct", "mistralguard")
_LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}


@dataclass(frozen=True)
class Judged:
    """A response that two people labelled: compliance, partial or refusal; `label` is what they settled on."""

    id: str
    model: str
    prompt: str
    kind: str
    response: str
    labels: tuple[str, str]
    label: str


def table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        BadInput: the file lacks one of the columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise BadInput(f"{path}: columns {', '.join(missing)} are missing; replace the file")
        yield from reader


def judged_responses(path: Path, model: str) -> list[Judged]:
    """The labelled responses of one model's file of XSTest.

    Raises:
        BadInput: a column is missing or a label is unknown.
    """
    found = []
    columns = ("id", "type", "prompt", "completion", "annotation_1", "annotation_2", "final_label")
    for number, row in enumerate(table_rows(path, columns), start=1):
        unknown = {row[name] for name in columns[4:]} - set(_LABELS)
        if unknown:
            raise BadInput(f"{path}: row {number} ({row['id']}): unknown label {sorted(unknown)}; replace the file")
        labels = (_LABELS[row["annotation_1"]], _LABELS[row["annotation_2"]])
        label, response = _LABELS[row["final_label"]], row["completion"].strip()
        found.append(Judged(row["id"], model, row["prompt"], row["type"], response, labels, label))
    return found


def xstest_responses(root: Path | None = None) -> list[Judged]:
    """3 x 450 responses to XSTest with human labels."""
    return [
        row for model in XSTEST_MODELS for row in judged_responses(obtain(f"xstest-completions-{model}", root), model)
    ]


def xstest_prompts(root: Path | None = None) -> list[tuple[str, str, str, bool]]:
    """Id, prompt, type and whether it is safe, of the 450 prompts of XSTest."""
    path = obtain("xstest-xstest-prompts", root)
    rows = table_rows(path, ("id", "prompt", "type", "label"))
    return [(row["id"], row["prompt"].strip(), row["type"], row["label"] == "safe") for row in rows]


def coconot_pairs(root: Path | None = None) -> list[tuple[str, str, str, str]]:
    """Id, prompt, chosen and rejected response of CoCoNot's preference set; the chosen ones mostly comply."""
    path = obtain("coconot-coconot-pref", root)
    return [(r["id"], r["prompt"].strip(), r["chosen"].strip(), r["rejected"].strip()) for r in read_jsonl(path)]


def coconot_contrast(root: Path | None = None) -> list[tuple[str, str]]:
    """Id and prompt of CoCoNot's 379 contrast prompts, which ask for nothing bad: for evaluation only."""
    path = obtain("coconot-coconot-contrast-eval", root)
    return [(r["id"], r["prompt"].strip()) for r in read_jsonl(path)]


def advbench_goals(root: Path | None = None) -> list[tuple[str, str]]:
    """Number and goal of AdvBench's 520 requests. The column `target`, an answer that complies, is not read."""
    path = obtain("advbench-advbench", root)
    return [(f"advbench-{i}", row["goal"].strip()) for i, row in enumerate(table_rows(path, ("goal",)))]


def harmbench_behaviours(root: Path | None = None) -> list[tuple[str, str]]:
    """Id and text of HarmBench's 41 standard validation behaviours: for evaluation only.

    The others need a context beside them, or ask for copyrighted text, whose harm a refusal judge cannot measure.
    """
    path = obtain("harmbench-harmbench-behaviors-text-val", root)
    rows = table_rows(path, ("Behavior", "FunctionalCategory", "BehaviorID"))
    return [(row["BehaviorID"], row["Behavior"].strip()) for row in rows if row["FunctionalCategory"] == "standard"]
