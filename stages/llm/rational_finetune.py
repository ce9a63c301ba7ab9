"""Fine-tune a student on Rational's rows of one method, with one seed.

Methods: rational, the control refusal-sft, and the ablations rational-no-benign and rational-only-benign. All see the
same prompts, drawn by the seed, as far as they have rows for them, and share steps and tokens per step.

Writes `model/`, a Hugging Face folder in the number format of the student (LoRA merged in), and `history.csv`.
"""

from dataclasses import dataclass

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.llm import chat, generation, rational, sft, students
from springhead.llm.history import run_figures, write_history
from springhead.llm.packing import Overlong, encode_rows
from springhead.llm.textrows import Row
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune one student."""

    sft: sft.SftConfig
    """The training run."""
    max_length: int
    """Longest row in tokens."""
    overlong: Overlong
    """What to do with a longer one: drop, truncate or error. Drops and cuts are counted in the metrics."""
    prompts: dict[str, int]
    """How many training prompts of each kind (adversarial, contrast, benign) to draw; of a kind that is not named, all.
    Their shares decide between attack success and over-refusal."""
    device: students.Device
    """cpu, cuda or auto. Only the CPU promises equal bytes."""


@dataclass(frozen=True)
class Params:
    """Parameters `llm.rational_finetune`."""

    students: dict[str, Tuning]
    """By student."""


def rows_of(rows: list[Row], method: str, prompts: dict[str, int], seed: int) -> list[Row]:
    """The rows of a method of the prompts that the seed draws.

    Raises:
        BadInput: there are none (the message names the methods there are).
    """
    # Drawn from the rows of all methods, so that an ablation sees the prompts that the whole method sees.
    chosen = [row for row in rational.sample_prompts(rows, prompts, seed) if row["method"] == method]
    if not chosen:
        known = ", ".join(sorted({str(row["method"]) for row in rows})) or "none"
        raise BadInput(f"data/llm/rational: no rows of method {method!r} drawn; methods in the file: {known}")
    return chosen


def run(stage: Stage[Params]) -> None:
    """Read the rows, train, save the model."""
    student, method, seed = (stage.item[name] for name in ("student", "method", "seed"))
    if student not in stage.params.students:
        raise BadInput(f"params.yaml: llm.rational_finetune.students: no settings for {student!r}; add a block")
    tuning = stage.params.students[student]
    source, data = stage.input("students"), stage.input("rational")
    model, tokenizer = students.load(source, tuning.device)
    chat.check_template(tokenizer, generation.end_texts(model, tokenizer))
    rows = rows_of(list(read_jsonl(data / "train.jsonl")), method, tuning.prompts, int(seed))
    examples, counts = encode_rows(rows, tokenizer, tuning.max_length, tuning.overlong)
    with stage.progress(tuning.sft.steps, f"{student} {method} seed {seed}", "step") as bar:
        trained, history = sft.train(model, examples, [], tuning.sft, stage.seed, stage.scratch, bar, stage.log)
    students.save(trained, tokenizer, stage.out / "model", students.stored_dtype(source))
    write_history(stage.out / "history.csv", history)
    refused = sum(row["answer"] == rational.REFUSE for row in rows) / len(rows)
    stage.metrics({**run_figures(history, counts), "refuse_share": refused})
    stage.dataset(data / "train.jsonl", f"rows-{method}", counts["rows"], "training")
    stage.model(stage.out / "model", "language-model", student=student, method=method, seed=int(seed))


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
