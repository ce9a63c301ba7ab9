"""Fine-tune a student by one method, with one seed.

The methods sft, mend and rc-aug take their own rows of the data. bash, bash-sequential, noise, scheduled and rac take
the rows of sft and mix the model's own words into them while it is trained (`springhead.llm.bash`, `.rac`).

Writes `model/`, a Hugging Face folder in the number format of the student (LoRA merged in), `history.csv`,
`samples.jsonl` if samples were asked for: how the model answered while it was trained, and `own_words.json` for a
method that used them: its settings and counts.
All methods of a student share steps and tokens per step: they differ in the rows alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.bounds import at_least
from springhead.errors import BadInput
from springhead.jsonio import read_jsonl, write_json, write_jsonl
from springhead.llm import bash, chat, generation, rac, sft, students
from springhead.llm.history import run_figures, write_history
from springhead.llm.packing import Example, Overlong, encode_rows
from springhead.llm.textrows import spread_evenly
from springhead.stage import Stage, run_stage

OWN_WORDS = (*bash.METHODS, rac.METHOD)
"""Methods that mix the model's own words into the rows of `sft`."""


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune one student."""

    sft: sft.SftConfig
    """The training run."""
    max_length: int
    """Longest row in tokens."""
    overlong: Overlong
    """What to do with a longer one: drop, truncate or error. Drops and cuts are counted in the metrics."""
    max_rows: int
    """Use only the first rows of the method; 0 for all."""
    eval_rows: int
    """Evaluation rows that the evaluation loss is measured on, spread evenly over the file; 0 for none. Drops and cuts
    of these are counted in the metrics as well."""
    device: students.Device
    """cpu, cuda or auto. Only the CPU promises equal bytes."""
    sample_rows: int = 0
    """Evaluation prompts that the model answers every `sft.sample_every` steps and at the end; 0 for none."""
    sample_tokens: int = 128
    """Longest of these answers."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_length", "sample_tokens")
        at_least(0, self, "max_rows", "eval_rows", "sample_rows")


@dataclass(frozen=True)
class Params:
    """Parameters `llm.finetune`."""

    students: dict[str, Tuning]
    """By student."""
    bash: bash.BashConfig
    """How the methods bash, bash-sequential, noise and scheduled mix contexts."""
    rac: rac.RacConfig
    """How the method rac makes corrections; its cue must consist of words that every student knows."""


Row = Mapping[str, Any]


def rows_of(path: Path, method: str, limit: int) -> list[Row]:
    """The rows of a method in file order.

    Raises:
        BadInput: the file has none (the message names the methods it has).
    """
    rows: list[Row] = list(read_jsonl(path))
    chosen = [row for row in rows if row.get("method") == method]
    if not chosen:
        known = ", ".join(sorted({str(row.get("method")) for row in rows})) or "none"
        raise BadInput(f"{path}: no rows of method {method!r}; methods in the file: {known}")
    return chosen[:limit] if limit else chosen


def source_of(
    method: str,
    params: Params,
    tuning: Tuning,
    examples: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> bash.Bash | rac.Rac | None:
    """What makes the batches of a method of `OWN_WORDS`; None for the others, whose rows are trained as they are."""
    if method in bash.METHODS:
        return bash.source(bash.of_method(method, params.bash), examples, model, tokenizer, tuning.sft, seed)
    if method == rac.METHOD:
        return rac.source(params.rac, examples, model, tokenizer, tuning.sft, tuning.max_length, seed)
    return None


def run(stage: Stage[Params]) -> None:
    """Read the rows, train, save the model."""
    student, method, seed = (stage.item[name] for name in ("student", "method", "seed"))
    if student not in stage.params.students:
        raise BadInput(f"params.yaml: llm.finetune.students: no settings for {student!r}; add a block")
    tuning = stage.params.students[student]
    base, data = stage.input("students"), stage.input("filter")
    model, tokenizer = students.load(base, tuning.device)
    ends = generation.end_texts(model, tokenizer)
    chat.check_template(tokenizer, ends)
    students.check_context(model, tuning.max_length, f"params.yaml: llm.finetune.students.{student}.max_length")
    rows_method = "sft" if method in OWN_WORDS else method
    rows = rows_of(data / "train.jsonl", rows_method, tuning.max_rows)
    how = (tokenizer, tuning.max_length, tuning.overlong, ends)
    examples, counts = encode_rows(rows, *how)
    held_out = spread_evenly(list(read_jsonl(data / "eval.jsonl")), tuning.eval_rows)
    held_out_examples, held_out_counts = encode_rows(held_out, *how, what="evaluation") if held_out else ([], None)
    asked = spread_evenly(list(read_jsonl(data / "eval.jsonl")), tuning.sample_rows) if tuning.sample_rows else []
    samples = sft.Samples(tokenizer, [row["prompt"] for row in asked], tuning.sample_tokens) if asked else None
    source = source_of(method, stage.params, tuning, examples, model, tokenizer, stage.seed)
    with stage.progress(tuning.sft.steps, f"{student} {method} seed {seed}", "step") as bar:
        trained, history = sft.train(
            model, examples, held_out_examples, tuning.sft, stage.seed, stage.scratch, bar, stage.log,
            samples=samples, source=source,
        )  # fmt: skip
    students.save(trained, tokenizer, stage.out / "model", students.stored_dtype(base))
    write_history(stage.out / "history.csv", history)
    if samples is not None:
        facts = [{"row": row["id"], "prompt": row["prompt"]} for row in asked]
        write_jsonl(stage.out / "samples.jsonl", [{**s, **facts[s["conversation"]]} for s in samples.taken])
    if source is not None:
        write_json(stage.out / "own_words.json", {"settings": source.identity, "counts": source.state})
    stage.metrics(run_figures(history, counts, held_out_counts))
    stage.dataset(data / "train.jsonl", f"rows-{rows_method}", counts["rows"], "training")
    stage.model(
        stage.out / "model", "language-model", student=student, method=method, rows_of=rows_method, seed=int(seed)
    )


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
