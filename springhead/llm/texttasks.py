"""Text tasks as rows to train on, to answer and to score: public sets that are present, and documents and dialogues.

    python -m springhead.llm.texttasks e2e eval.jsonl --skip 400             # a row for each meaning representation
    python -m springhead.llm.texttasks e2e-pairs train.jsonl --take 400      # a row for each of their references
    python -m springhead.llm.texttasks gsm8k-test eval.jsonl
    python -m springhead.llm.texttasks summaries eval.jsonl --source news.jsonl --instruction "In one sentence:"
    python -m springhead.llm.texttasks dialogue eval.jsonl --source talks.jsonl

Every row has `id`, `prompt` or `messages`, and what its answer is compared with: `references` (ROUGE) or `answer` (the
final answer). `springhead.llm.tune` trains on such rows, `springhead.llm.answers` answers them, `springhead.llm.score`
scores the answers. `springhead.sources.obtain` finds the public files; a missing one is a `BadInput` that says where to
get it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from springhead.errors import BadInput, exit_code_of
from springhead.jsonio import read_jsonl, write_jsonl
from springhead.lineage.digests import json_digest
from springhead.llm import chat
from springhead.llm.mend import ANSWER_CUE
from springhead.llm.publicsets import table_rows
from springhead.sources import obtain

Row = dict[str, Any]
PUBLIC = ("e2e", "e2e-pairs", "gsm8k-train", "gsm8k-test")
OWN = ("summaries", "dialogue")


def e2e_groups(root: Path | None = None) -> list[Row]:
    """The 547 meaning representations of the E2E development set, each with its `references`, in file order."""
    groups: dict[str, list[str]] = {}
    for row in table_rows(obtain("e2e-devset", root), ("mr", "ref")):
        groups.setdefault(row["mr"].strip(), []).append(row["ref"].strip())
    return [
        {"id": json_digest(mr), "prompt": mr, "completion": texts[0], "references": texts}
        for mr, texts in groups.items()
    ]


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


def summary_rows(
    path: Path, document: str = "document", summary: str = "summary", instruction: str = "Summarise:"
) -> list[Row]:
    """Rows of a JSON-lines file of documents and their summaries.

    Args:
        path: the file.
        document: key of the text.
        summary: key of its summary, or of a list of several.
        instruction: what the prompt says before the text; nothing if empty.

    Raises:
        BadInput: naming file, line and key.
    """
    rows = []
    for number, line in enumerate(read_jsonl(path), start=1):
        where = f"{path}:{number}"
        text, written = line.get(document), line.get(summary)
        references = [written] if isinstance(written, str) else written
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{where}: {document!r} must be a text; name the key of the documents")
        if not isinstance(references, list) or not references or not all(_is_text(one) for one in references):
            raise BadInput(f"{where}: {summary!r} must be a text or a list of texts; name the key of the summaries")
        prompt = f"{instruction}\n\n{text.strip()}" if instruction else text.strip()
        name = str(line.get("id", f"{path.name}:{number}"))
        rows.append({"id": name, "prompt": prompt, "completion": references[0], "references": references})
    return rows


def dialogue_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file of conversations (`messages`); the last answer is the reference.

    Raises:
        BadInput: naming file and line, if it is no conversation or does not end with an answer to something.
    """
    rows = []
    for number, line in enumerate(read_jsonl(path), start=1):
        try:
            messages = chat.messages_of(line)
        except BadInput as error:
            raise BadInput(f"{path}:{number}: {error}") from error
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadInput(f"{path}:{number}: must end with an answer of the assistant, after at least one message")
        name = str(line.get("id", f"{path.name}:{number}"))
        rows.append({"id": name, "messages": messages, "references": [messages[-1]["content"]]})
    return rows


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def task_rows(task: str, skip: int = 0, take: int = 0, root: Path | None = None) -> list[Row]:
    """Rows of a public task.

    Args:
        task: one of `PUBLIC`.
        skip: leave out so many prompts from the first on. Of `e2e-pairs` a prompt is a meaning representation, so that
            what is skipped here and taken there shares none.
        take: at most so many prompts; 0 for all.
        root: the repository.
    """
    groups = e2e_groups(root) if task.startswith("e2e") else gsm8k_rows(task.removeprefix("gsm8k-"), root)
    chosen = groups[skip : skip + take if take else None]
    return e2e_rows(chosen) if task == "e2e-pairs" else chosen


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*PUBLIC, *OWN])
    parser.add_argument("out", type=Path, help="JSON lines to write")
    parser.add_argument("--source", type=Path, help="JSON lines to read, for summaries and dialogue")
    parser.add_argument("--document", default="document", help="key of the text to summarise")
    parser.add_argument("--summary", default="summary", help="key of its summary, or summaries")
    parser.add_argument("--instruction", default="Summarise:", help="what a prompt says before the text")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many prompts, from the first on")
    parser.add_argument("--take", type=int, default=0, help="at most so many prompts; 0 for all")
    return exit_code_of(lambda: _write(parser.parse_args(arguments)))


def _write(asked: argparse.Namespace) -> None:
    """Writes the rows that the command line asked for."""
    if min(asked.skip, asked.take) < 0:
        raise BadInput("--skip and --take must not be negative")
    if (asked.task in OWN) != (asked.source is not None):
        raise BadInput(f"--source is for {' and '.join(OWN)}, and they need it")
    if asked.task in PUBLIC:
        rows = task_rows(asked.task, asked.skip, asked.take)
    else:
        summaries = asked.task == "summaries"
        how = (asked.document, asked.summary, asked.instruction)
        rows = summary_rows(asked.source, *how) if summaries else dialogue_rows(asked.source)
        rows = rows[asked.skip : asked.skip + asked.take if asked.take else None]
    if not rows:
        raise BadInput(f"{asked.task}: no rows left; lower --skip")
    try:
        write_jsonl(asked.out, rows)
    except OSError as error:  # a folder, or a path through a file
        raise BadInput(f"{asked.out}: cannot be written ({error.strerror}); name another file") from error
    print(f"{asked.out}: {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
