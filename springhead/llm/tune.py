"""Fine-tune any model on any conversations, outside the pipeline.

    python -m springhead.llm.tune tune.yaml [sft.learning_rate=1e-4 ...]       # --help lists the keys
    torchrun --nproc-per-node 2 -m springhead.llm.tune tune.yaml

Needs a model folder (safetensors), or a pinned model of the hub, and rows as JSON lines, with `messages`, or `prompt`
and `completion`. Writes, under `out`: `model/`, with LoRA `adapter/` as well, `history.csv`, `samples.jsonl`, and
`run.json` with settings, digests and versions. A killed run started again goes on from its last checkpoint.
docs/guide/fine-tuning.md has an example.
"""

import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from springhead.bounds import above_zero, at_least, fraction
from springhead.errors import BadInput, exit_code_of
from springhead.jsonio import write_json, write_jsonl
from springhead.lineage.digests import file_digest, tree_digest
from springhead.llm import bash, chat, generation, parallel, rac, sft, students
from springhead.llm.answers import check_out
from springhead.llm.bash import BashConfig
from springhead.llm.history import write_history
from springhead.llm.overlap import Overlap, Policy, overlaps, refuse
from springhead.llm.packing import Example, Overlong, encode_rows, read_conversations
from springhead.llm.rac import RacConfig
from springhead.params import from_command
from springhead.progress import Progress

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors")


@dataclass(frozen=True)
class Settings:
    """What to do; the keys of the YAML file."""

    model: students.Pin | str
    """Folder of the model to start from; or repository, commit and sha256 of one, which are checked."""
    train: str
    """Rows to train on, JSON lines."""
    out: str
    """Folder to write."""
    sft: sft.SftConfig
    """The training run."""
    eval: str = ""
    """Rows for the evaluation loss; none if empty."""
    overlap: Policy = "error"
    """What to do if rows of `eval` are among those of `train`, or nearly (`springhead.llm.overlap`): error names them;
    report trains, and lists them in run.json; ignore does not look."""
    overlap_similarity: float = 0.9
    """From where on two rows are nearly the same: the Jaccard index of their words' 3-grams."""
    chat_template: str = "own"
    """own, a name of `springhead.llm.chat.TEMPLATES`, or a .jinja file."""
    max_length: int = 1024
    """Longest row in tokens."""
    overlong: Overlong = "error"
    """What to do with a longer one: drop, truncate or error."""
    samples: tuple[str, ...] = ()
    """Prompts that the model answers while it trains, every `sft.sample_every` steps and at the end."""
    sample_tokens: int = 128
    """Longest of these answers."""
    seed: int = 0
    """Order of the rows and initial LoRA weights."""
    device: students.Device = "auto"
    """cpu, cuda or auto."""
    bash: BashConfig | None = None
    """Mix the model's own words into what it reads (docs/methods/bash.md)."""
    rac: RacConfig | None = None
    """Let the model learn to correct its own answers (docs/methods/rac.md)."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_length", "sample_tokens")
        at_least(0, self, "seed")
        above_zero(self, "overlap_similarity")
        fraction(self, "overlap_similarity")
        if self.bash is not None and self.rac is not None:
            raise ValueError("bash and rac are two methods; choose one")


@dataclass(frozen=True)
class Rows:
    """The rows of a run in tokens, and what there is to say of them."""

    train: list[Example]
    held_out: list[Example]
    counts: dict[str, int]
    overlap: list[dict[str, Any]]


def read_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]) -> Rows:
    """Read, compare and tokenize the rows of a run.

    Raises:
        BadInput: rows cannot be used, or evaluation rows are among the training rows and may not be.
    """
    how = (tokenizer, settings.max_length, settings.overlong, ends)
    rows = read_conversations(Path(settings.train))
    examples, counts = encode_rows(rows, *how)
    if not settings.eval:
        return Rows(examples, [], counts, [])
    held_out = read_conversations(Path(settings.eval))
    found: list[Overlap] = []
    if settings.overlap != "ignore":
        found = overlaps(rows, held_out, settings.overlap_similarity)
    if settings.overlap == "error":
        refuse(found, settings.eval)
    held_out_examples, of_them = encode_rows(held_out, *how, what="evaluation")
    counts |= {f"eval_{name}": of_them[name] for name in ("rows", "dropped", "truncated")}
    return Rows(examples, held_out_examples, counts, [asdict(one) for one in found])


def tune(settings: Settings, world: parallel.World, device: torch.device) -> None:
    """Train and write; see the module.

    Raises:
        BadInput: model, rows, template, settings or folder cannot be used.
        Finding: training diverged.
    """
    out = Path(settings.out)
    if (out / "run.json").exists():
        raise BadInput(f"{out}: holds a finished run; choose another folder or remove it")
    check_out(out)
    base = Path(settings.model) if isinstance(settings.model, str) else students.pinned("model", settings.model)
    model, tokenizer = students.load(base, "cpu")
    parent = tree_digest(base)
    model.to(device)
    chat.use_template(tokenizer, settings.chat_template)
    ends = generation.end_texts(model, tokenizer)
    chat.check_template(tokenizer, ends)
    students.check_context(model, settings.max_length)
    rows = read_rows(settings, tokenizer, ends)
    samples = sft.Samples(tokenizer, settings.samples, settings.sample_tokens) if settings.samples else None
    bar = Progress(settings.sft.steps, "fine-tuning", "step") if world.first else None
    adapter = out / "adapter" if settings.sft.lora_rank else None
    source: sft.Source | None = None
    if settings.bash is not None:
        source = bash.source(settings.bash, rows.train, model, tokenizer, settings.sft, settings.seed)
    if settings.rac is not None:
        how_long = settings.max_length
        source = rac.source(settings.rac, rows.train, model, tokenizer, settings.sft, how_long, settings.seed)
    trained, history = sft.train(
        model, rows.train, rows.held_out, settings.sft, settings.seed, out / ".scratch", bar,
        samples=samples, world=world, adapter=adapter, source=source,
    )  # fmt: skip
    if not world.first:
        return
    students.save(trained, tokenizer, out / "model", students.stored_dtype(base))
    write_history(out / "history.csv", history)
    if samples is not None:
        write_jsonl(
            out / "samples.jsonl", [{**s, "prompt": settings.samples[s["conversation"]]} for s in samples.taken]
        )
    files = {name: file_digest(path) for name in ("train", "eval") if (path := getattr(settings, name))}
    versions = {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    facts: dict[str, Any] = {
        "parent": parent,
        "rows": files,
        "counts": rows.counts,
        "overlap": rows.overlap,
        "model": tree_digest(out / "model"),
        "own_words": source.state if source is not None else {},
    }
    facts |= {"settings": asdict(settings), "processes": world.size, "device": device.type, "versions": versions}
    write_json(out / "run.json", facts)
    shutil.rmtree(out / ".scratch", ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        settings = from_command(Settings, "springhead.llm.tune", str(__doc__), arguments)
        with parallel.joined(students.pick_device(settings.device)) as (world, device):
            tune(settings, world, device)

    return exit_code_of(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
