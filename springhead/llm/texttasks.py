"""Public text tasks as prompts and completions: E2E data-to-text and GSM8K, used when they are present.

`springhead.sources.obtain` finds the files; a missing one is a `BadInput` that says where to get it.
"""

import re
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.lineage.digests import json_digest
from springhead.llm.mend import ANSWER_CUE
from springhead.llm.publicsets import table_rows
from springhead.sources import obtain

Row = dict[str, Any]


def e2e_groups(root: Path | None = None) -> list[Row]:
    """The 547 meaning representations of the E2E development set, each with its `references`, in file order."""
    groups: dict[str, list[str]] = {}
    for row in table_rows(obtain("e2e-devset", root), ("mr", "ref")):
        groups.setdefault(row["mr"].strip(), []).append(row["ref"].strip())
    return [{"id": json_digest(mr), "prompt": mr, "references": texts} for mr, texts in groups.items()]


def e2e_rows(groups: list[Row]) -> list[Row]:
    """A training row for each reference."""
    return [
        {
            "id": json_digest([group["prompt"], text]),
            "parents": [group["id"]],
            "prompt": group["prompt"],
            "completion": text,
        }
        for group in groups
        for text in group["references"]
    ]


def gsm8k_rows(part: str, root: Path | None = None) -> list[Row]:
    """GSM8K's questions; completions are the solutions without calculator notes, ended by "Answer: N".

    Args:
        part: train or test.
        root: the repository.

    Raises:
        BadInput: a solution has no final answer.
    """
    rows = []
    for number, row in enumerate(read_jsonl(obtain(f"gsm8k-{part}", root))):
        solution, sign, answer = str(row["answer"]).rpartition("#### ")
        if not sign:
            raise BadInput(f"gsm8k {part}: row {number} has no final answer; replace the file")
        answer = answer.strip().replace(",", "")
        steps = re.sub("<<[^>]*>>", "", solution).strip()
        row_id = f"gsm8k-{part}-{number}"
        completion = f"{steps}\n{ANSWER_CUE} {answer}"
        rows.append({"id": row_id, "prompt": row["question"].strip(), "completion": completion, "answer": answer})
    return rows
