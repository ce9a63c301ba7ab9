"""Fine-tune a student on Rational's rows of one method, with one seed.

Methods: rational, the control refusal-sft, and the ablations rational-no-benign and rational-only-benign. All see the
same prompts, drawn by the seed, as far as they have rows for them, and share steps and tokens per step.

Writes `model/`, a Hugging Face folder in the number format of the student (LoRA merged in), `history.csv`, and
`samples.jsonl` if samples were asked for: how the model answered evaluation prompts while it was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from springhead.bounds import at_least
from springhead.errors import BadInput
from springhead.jsonio import read_jsonl, write_jsonl
from springhead.lineage.digests import json_digest
from springhead.llm import chat, generation, rational, sft, students
from springhead.llm.history import run_figures, write_history
from springhead.llm.packing import Overlong, encode_rows
from springhead.llm.textrows import Row, spread_evenly
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
    eval_groups: int = 0
    """How many groups of near-duplicate prompts of each kind to keep out of training at least, for the evaluation loss:
    the evaluation rows have no answers. A group of several kinds is kept out with all of them. Drawn by the seed, the
    same for every method; 0 for no evaluation loss."""
    sample_rows: int = 0
    """Evaluation prompts that the model answers every `sft.sample_every` steps and at the end; 0 for none."""
    sample_tokens: int = 128
    """Longest of these answers."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_length", "sample_tokens")
        at_least(0, self, "eval_groups", "sample_rows")


@dataclass(frozen=True)
class Params:
    """Parameters `llm.rational_finetune`."""

    students: dict[str, Tuning]
    """By student."""


def keep_back(rows: list[Row], bases: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those of at least `count` groups of near-duplicate prompts of each kind.

    Args:
        rows: of all methods, so that each keeps back the same prompts.
        bases: the base prompts, each with its group.
        count: groups drawn for each kind; one that was drawn for another kind and has this one too comes on top.
        seed: of the draw.
    """
    group = {base["id"]: base["group"] for base in bases}
    groups = {(row["kind"], group[row["parents"][0]]) for row in rows}
    drawn: dict[str, list[str]] = {}
    for kind, name in sorted(groups, key=lambda key: json_digest([seed, "evaluation loss", *key])):
        drawn.setdefault(kind, []).append(name)
    kept = {name for names in drawn.values() for name in names[:count]}
    training = [row for row in rows if group[row["parents"][0]] not in kept]
    return training, [row for row in rows if group[row["parents"][0]] in kept]


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
    ends = generation.end_texts(model, tokenizer)
    chat.check_template(tokenizer, ends)
    key = f"params.yaml: llm.rational_finetune.students.{student}.max_length"
    students.check_context(model, tuning.max_length, key)
    bases = list(read_jsonl(data / "bases.jsonl"))
    training, kept = keep_back(list(read_jsonl(data / "train.jsonl")), bases, tuning.eval_groups, int(seed))
    rows = rows_of(training, method, tuning.prompts, int(seed))
    how = (tokenizer, tuning.max_length, tuning.overlong, ends)
    examples, counts = encode_rows(rows, *how)
    held_out = [row for row in kept if row["method"] == method]
    held_out_examples, held_out_counts = encode_rows(held_out, *how, what="evaluation") if held_out else ([], None)
    asked = spread_evenly(list(read_jsonl(data / "eval.jsonl")), tuning.sample_rows) if tuning.sample_rows else []
    samples = sft.Samples(tokenizer, [row["prompt"] for row in asked], tuning.sample_tokens) if asked else None
    with stage.progress(tuning.sft.steps, f"{student} {method} seed {seed}", "step") as bar:
        trained, history = sft.train(
            model, examples, held_out_examples, tuning.sft, stage.seed, stage.scratch, bar, stage.log, samples=samples
        )
    students.save(trained, tokenizer, stage.out / "model", students.stored_dtype(source))
    write_history(stage.out / "history.csv", history)
    if samples is not None:
        facts = [{"row": row["id"], "prompt": row["prompt"]} for row in asked]
        write_jsonl(stage.out / "samples.jsonl", [{**s, **facts[s["conversation"]]} for s in samples.taken])
    refused = sum(row["answer"] == rational.REFUSE for row in rows) / len(rows)
    stage.metrics({**run_figures(history, counts, held_out_counts), "refuse_share": refused})
    stage.dataset(data / "train.jsonl", f"rows-{method}", counts["rows"], "training")
    stage.model(stage.out / "model", "language-model", student=student, method=method, seed=int(seed))


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
