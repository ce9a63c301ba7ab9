"""Score the answers of `springhead.llm.answers`: final answers, ROUGE, and the free-running gap.

    python -m springhead.llm.score score.yaml [seed=1 ...]        # --help lists the keys

Each row that was answered has `answer` (compared exactly with what follows "Answer:" in the text), `references`
(ROUGE-1, -2 and -L, the best over them), or both. Writes, under `out`, `summary.json` (means over the rows with 95 %
bootstrap intervals) and `rows.csv` (the figures of every answer).
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.bounds import at_least
from springhead.errors import BadInput, exit_code_of
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import file_digest, json_digest, tree_digest
from springhead.llm import chat, freerunning, generation, rouge, students
from springhead.llm.answers import Row, asked_of, check_out, conversation_of, read_answers, read_rows
from springhead.llm.evaluation import bootstrap
from springhead.llm.mend import final_answer
from springhead.llm.packing import encode
from springhead.params import from_command
from springhead.tables import write_csv

_ASKED = ("model", "template", "decoding", "backend", "samples")
_NUMERICS = ("device", "dtype")
"""Part of a run since they are recorded."""


@dataclass(frozen=True)
class Settings:
    """What to score."""

    answers: str
    """Folder that `springhead.llm.answers` wrote."""
    rows: str
    """The rows that were answered, JSON lines, each with `references`, `answer` or both."""
    out: str
    """Folder to write."""
    model: str = ""
    """Folder of the model that answered; for the free-running gap alone."""
    gap_rows: int = 0
    """Rows that the gap is measured on, from the first on; 0 for none."""
    chat_template: str = "own"
    """The template that was answered with, as for `answers`; for the gap alone."""
    device: students.Device = "auto"
    """cpu, cuda or auto; for the gap alone."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        at_least(0, self, "gap_rows", "seed")
        if bool(self.gap_rows) != bool(self.model):
            raise ValueError("the free-running gap needs both model and gap_rows; give both or none")


def figures(row: Row, text: str) -> dict[str, float]:
    """The figures of one answer, each in 0..1; a null is taken as absent, because exported tables have nulls in gaps.

    Raises:
        BadInput: the row has nothing to compare with.
    """
    found: dict[str, float] = {}
    if row.get("answer") is not None:
        found["exact_match"] = float(final_answer(text) == str(row["answer"]))
    references = [] if row.get("references") is None else row["references"]
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise BadInput(f"row {row['id']}: 'references' must be a list of texts")
    if references:
        found |= rouge.rouge(references, text)
    if not found:
        raise BadInput(f"row {row['id']}: needs 'references' or 'answer' to be scored")
    return found


def means(lines: Sequence[tuple[str, Mapping[str, float]]], seed: int) -> dict[str, dict[str, float]]:
    """The mean of each figure over the rows that have it, several answers to a row counting as their mean.

    Args:
        lines: row and figures of each answer.
        seed: of the bootstrap, which draws rows.

    Returns:
        By figure: mean, low and high (95 %), rows.
    """
    by_row: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, found in lines:
        for key, value in found.items():
            by_row[key][name].append(value)
    table = {}
    for key, groups in by_row.items():
        values = [sum(group) / len(group) for group in groups.values()]
        low, high = bootstrap(values, seed)
        table[key] = {"mean": sum(values) / len(values), "low": low, "high": high, "rows": len(values)}
    return table


def free_running(settings: Settings, rows: Sequence[Row], run: Mapping[str, Any]) -> dict[str, Any]:
    """The free-running gap of the model on the first rows, each with the answer that `with_reference` finds.

    Raises:
        BadInput: another model, template, device or number format than answered; or a row has no reference text, or
            one that does not fit the model's context.
    """
    folder = Path(settings.model)
    if tree_digest(folder) != run["model"]:
        raise BadInput(f"{folder}: not the model of {settings.answers}; name the folder that answered")
    now, then = students.numerics(settings.device), {name: run[name] for name in _NUMERICS if name in run}
    if run["backend"] == "torch" and now | then != now:
        raise BadInput(
            f"device {settings.device!r}: here it is {now['dtype']} on {now['device']}, but {settings.answers} was "
            f"answered in {then['dtype']} on {then['device']}; set device to {then['device']}, where there is one"
        )
    model, tokenizer = students.load_to_ask(folder, settings.device)
    chat.use_template(tokenizer, settings.chat_template)
    if chat.template_digest(tokenizer) != run["template"]:
        raise BadInput(
            f"chat_template {settings.chat_template!r}: {settings.answers} was answered with another; set "
            "chat_template to the one in the answers' settings"
        )
    chosen = [with_reference(row) for row in rows[: settings.gap_rows]]
    context = generation.context_of(model.config) or tokenizer.model_max_length
    ends = generation.end_texts(model, tokenizer)
    examples = [encode(row, tokenizer, ends) for row in chosen]
    for row, example in zip(chosen, examples, strict=True):
        if len(example.ids) > context:
            raise BadInput(
                f"row {row['id']}: {len(example.ids)} tokens with its reference, the model's context is {context}; "
                "shorten the reference, or lower gap_rows"
            )
    asked = {**run["decoding"], "stop": tuple(run["decoding"]["stop"])}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end_ids = generation.end_ids(model, tokenizer)
    keys = [f"{row['id']}/0" for row in chosen]  # the draws of the first sample
    found = freerunning.runs(model, examples, generation.Decoding(**asked), end_ids, int(pad), keys, tokenizer)
    return freerunning.summary(found, settings.seed)


def with_reference(row: Row) -> Row:
    """What was asked, followed by the answer it is to be compared with.

    That is the assistant's message which its conversation ends with, else its completion, else its first reference.

    Raises:
        BadInput: it has none of them.
    """
    asked = generation.as_messages(conversation_of(row))
    given = asked_of(row)
    answer = given[len(asked) :] if isinstance(given, list) else []
    answer = answer or row.get("completion") or [*(row.get("references") or []), ""][0]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}] if answer else []
    if not answer or answer[-1]["role"] != "assistant":
        raise BadInput(
            f"row {row['id']}: the free-running gap needs an answer to compare with; give it a 'completion' or "
            "'references', or end its messages with the assistant's"
        )
    return {"id": row["id"], "messages": [*asked, *answer]}


def score(settings: Settings) -> dict[str, Any]:
    """Score as the settings say, write, and return the summary.

    Raises:
        BadInput: the answers are incomplete, changed or of other rows, or a row has nothing to compare with.
    """
    path, folder, out = Path(settings.rows), Path(settings.answers), Path(settings.out)
    check_out(out)
    rows = read_rows(path)
    run = read_json(folder / "run.json")
    if json_digest([{"id": row["id"], "asked": conversation_of(row)} for row in rows]) != run.get("rows"):
        raise BadInput(f"{path}: not the rows that {folder} answers; name the file that was answered, unchanged")
    if not (folder / "answers.jsonl").exists():
        raise BadInput(f"{folder}: its answers are not complete; run springhead.llm.answers again, it goes on")
    by_id = {str(row["id"]): row for row in rows}
    answers = list(read_answers(folder / "answers.jsonl"))
    lines = [(str(a["parents"][0]), figures(by_id[a["parents"][0]], a["text"])) for a in answers]
    summary: dict[str, Any] = {name: run[name] for name in (*_ASKED, *_NUMERICS) if name in run}
    summary |= {"answers": len(answers), "cut": sum(a["finish"] == "length" for a in answers) / len(answers)}
    summary["rows"] = file_digest(path)
    summary["scores"] = means(lines, settings.seed)
    if settings.gap_rows:
        summary["free_running"] = free_running(settings, rows, run)
    write_json(out / "summary.json", summary)
    names = list(summary["scores"])
    table = [
        {"row": name, "sample": a["sample"], **{key: found.get(key, "") for key in names}}
        for a, (name, found) in zip(answers, lines, strict=True)
    ]
    write_csv(out / "rows.csv", table)
    return summary


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        summary = score(from_command(Settings, "springhead.llm.score", str(__doc__), arguments))
        for name, found in summary["scores"].items():
            print(f"{name} {found['mean']:.4f} ({found['low']:.4f} to {found['high']:.4f}, {found['rows']} rows)")

    return exit_code_of(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
