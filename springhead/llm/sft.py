"""Supervised fine-tuning: packed batches, loss on the completion, full or LoRA, exact resume.

The loss of a step is the sum of token losses over the sum of token weights of the whole step, however many
micro-batches it is cut into: a mean of means would weigh short answers more. Logits are computed for target
tokens only, which for a 49,152-word vocabulary is the larger part of the work saved.

Methods are compared at equal steps and equal `batch_tokens`, so at equal compute, whatever the length of rows.

A checkpoint (safetensors + JSON) holds the trained tensors, the optimizer's state and the history; order and
batches follow from seed and step alone. Killed and resumed equals uninterrupted, byte for byte on a CPU. It also holds
the digest of base model, settings, seed and rows: a checkpoint of another run is refused, not continued.

Methods whose rows come from the model itself (`springhead.llm.bash`, `springhead.llm.rac`) bring a `Source`: it makes
the batches of the next steps from the model as it is. What is left of them is part of the checkpoint.

Several processes (see `springhead.llm.parallel`) train as one would: same losses, up to the order of sums.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.bounds import OutOfRange, above_zero, at_least, fraction
from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json_atomic
from springhead.llm import generation
from springhead.llm.adapters import merged, plain, save_adapter, with_lora
from springhead.llm.attention import PACKED
from springhead.llm.checkpoints import STATE, as_tensors, being_written, checkpoint_of, from_tensors, run_identity
from springhead.llm.history import History
from springhead.llm.packing import Batch, Example, batches, pack, packs, pad, split_by_tokens
from springhead.llm.parallel import ALONE, World
from springhead.progress import Progress


@dataclass(frozen=True)
class SftConfig:
    """How to train. Defaults suit a small model trained from scratch on a CPU."""

    steps: int
    """Optimizer steps."""
    batch_tokens: int
    """Tokens per optimizer step, prompt and completion together; whole rows, so at most this many."""
    learning_rate: float
    """Peak learning rate."""
    micro_tokens: int = 0
    """Tokens per forward pass; a step is accumulated over several. 0: one pass."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes on after the warm-up: half a cosine or a line down to `final_rate`, or unchanged."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly; above 0 it is one step at least."""
    final_rate: float = 0.05
    """Share of the peak rate that cosine and line end at."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices (never of norms)."""
    beta2: float = 0.98
    """AdamW's second-moment decay; beta1 is 0.9."""
    clip: float = 1.0
    """Largest gradient norm; 0: gradients are not clipped."""
    prompt_loss_weight: float = 0.0
    """Loss weight of prompt tokens; 0 trains on completions only, 1 is plain language modelling."""
    lora_rank: int = 0
    """Rank of LoRA on all linear layers; 0 trains every parameter."""
    lora_alpha: float = 32.0
    """LoRA's scale: updates are multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that LoRA adapts, such as q_proj; empty: all but the output layer."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrix products compute in. Weights and optimizer are float32 in any case; auto: bfloat16 on a GPU."""
    packing: bool = True
    """Lay the rows of a batch end to end, each attending to itself alone; false: pad them to one length. The loss is
    the same. Needed false for models whose attention is not the usual one; they are told apart by a trial."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of keeping them: less memory, a third slower."""
    sample_every: int = 0
    """Steps between answers to the sample prompts, where there are any; 0: only after the last step."""
    eval_every: int = 0
    """Steps between evaluations of the loss; 0: only after the last step."""
    checkpoint_every: int = 0
    """Steps between resume checkpoints; 0: none."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_tokens")
        at_least(0, self, "micro_tokens", "weight_decay", "clip", "lora_rank")
        at_least(0, self, "sample_every", "eval_every", "checkpoint_every")
        above_zero(self, "learning_rate", "lora_alpha")
        fraction(self, "warmup", "final_rate", "prompt_loss_weight")
        if not 0 <= self.beta2 < 1:
            raise OutOfRange(f"beta2 is {self.beta2}; use at least 0 and less than 1")
        if self.lora_targets and not self.lora_rank:
            raise OutOfRange("lora_targets needs a lora_rank; set it, or leave the targets out")


def learning_rate(config: SftConfig, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then down to `final_rate` of the peak as `schedule` says."""
    warm = max(1, round(config.warmup * config.steps)) if config.warmup else 0
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * left)


def loss_sum(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted sum of the token losses (nats) of a batch."""
    losses = torch.nn.functional.cross_entropy(batch.logits(model).float(), batch.labels, reduction="none")
    return (losses * batch.weights).sum()


@contextmanager
def packed_attention_on(model: torch.nn.Module) -> Iterator[None]:
    """Let the model read packed batches inside the block, and restore its attention afterwards."""
    inner = plain(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@torch.no_grad()
def evaluation_loss(trainer: "Trainer", examples: Sequence[Example]) -> float:
    """Mean loss per completion token (nats), computed as precisely as training does."""
    model, world, config = trainer.model, trainer.world, trainer.config
    was_training = model.training
    model.eval()
    total = weight = 0.0
    mine = world.share(examples, [len(e.ids) for e in examples])
    for part in split_by_tokens(mine, config.micro_tokens or config.batch_tokens):
        batch = trainer.lay(part).to(trainer.device)
        with trainer.precision():
            total += float(loss_sum(model, batch))
        weight += float(batch.weights.sum())
    model.train(was_training)
    return world.total(total, trainer.device) / world.total(weight, trainer.device)


@dataclass
class Samples:
    """Conversations that the model answers, greedily, while it trains: what a loss does not show."""

    tokenizer: PreTrainedTokenizerBase
    conversations: Sequence[generation.Conversation]
    max_new_tokens: int = 128
    taken: list[dict[str, Any]] = field(default_factory=list)
    """The answers so far: step, number of the conversation, text."""

    @property
    def decoding(self) -> generation.Decoding:
        """How they are answered."""
        return generation.Decoding(max_new_tokens=self.max_new_tokens)

    def check(self, model: PreTrainedModel) -> None:
        """Make sure that all can be answered, before the model is trained.

        Raises:
            BadInput: one leaves no room for an answer in the model's context.
        """
        prompts = [generation.prompt_ids(self.tokenizer, conversation) for conversation in self.conversations]
        names = [f"samples[{i}]" for i in range(len(prompts))]
        generation.room_of(generation.context_of(model.config), prompts, self.decoding, names)

    def take(self, model: torch.nn.Module, step: int) -> None:
        """Answer all conversations with the model as it is."""
        texts = generation.generate(plain(model), self.tokenizer, self.conversations, self.decoding)
        self.taken += [{"step": step, "conversation": i, "text": text} for i, text in enumerate(texts)]


class Source(Protocol):
    """Batches that are made from the model as it is, those of some steps at a time."""

    state: dict[str, int]
    """What it remembers from call to call (places, counts); a checkpoint holds it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What it is determined by, beside the rows, the seed and the weights."""

    def next_batches(self, model: PreTrainedModel, step: int) -> list[list[Example]]:
        """The batches of `step` and of as many steps after it as share its snapshot of the model.

        A function of weights, step and state alone: every process of a run makes the same.
        """


class Trainer:
    """One training run: model, optimizer, step counter and history; everything a checkpoint must hold."""

    def __init__(
        self, model: torch.nn.Module, config: SftConfig, seed: int, world: World = ALONE, identity: str = ""
    ) -> None:
        self.model, self.config, self.seed, self.world, self.identity = model, config, seed, world, identity
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in self.named.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.named.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, config.beta2), fused=True
        )
        self.device = next(model.parameters()).device
        self.step = 0
        self.tokens = 0
        self.history: History = []
        self.taken: list[dict[str, Any]] = []
        self.queue: list[list[Example]] = []
        self.source_state: dict[str, int] = {}

    def train_step(self, examples: Sequence[Example]) -> float:
        """One optimizer step on these rows; returns the mean loss per unit of weight before the update.

        With several processes every one is given all rows of the step, and takes its share.

        Raises:
            Finding: the loss or the gradient is not a finite number. Nothing is updated then.
        """
        config = self.config
        weight = sum(target_weight(example, config.prompt_loss_weight) for example in examples)
        mine = self.world.share(examples, [len(e.ids) for e in examples])
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for part in split_by_tokens(mine, config.micro_tokens or config.batch_tokens):
            batch = self.lay(part, config.prompt_loss_weight).to(self.device)
            with self.precision():
                loss = loss_sum(self.model, batch) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        parameters = list(self.named.values())
        self.world.sum_gradients(parameters)
        total = self.world.total(total, self.device)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise Finding(
                f"step {self.step + 1}: loss {total}, gradient norm {norm}: training diverged and no model is "
                "kept; lower learning_rate or look at the rows of this step"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.step += 1
        self.tokens += sum(len(e.ids) for e in examples)
        return total

    def lay(self, examples: Sequence[Example], prompt_loss_weight: float = 0.0) -> Batch:
        """Rows as a batch, packed or padded."""
        return pack(examples, prompt_loss_weight) if self.config.packing else pad(examples, prompt_loss_weight)

    def precision(self) -> Any:
        """The context of a forward pass, in training and in evaluation."""
        wanted = self.config.precision
        half = wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    def save(self, folder: Path) -> None:
        """Write a checkpoint; an earlier one is replaced only when this one is complete."""
        fresh, old = being_written(folder), folder.with_name(folder.name + ".old")
        if checkpoint_of(folder) == fresh:  # an earlier save was killed between its two renamings
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in self.named.items()}, fresh / "weights.safetensors")
        moments = {
            f"{name}/{key}": state[key].contiguous()
            for name, p in self.named.items()
            for state in [self.optimizer.state[p]]
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        save_file(moments, fresh / "optimizer.safetensors")
        save_file(as_tensors(self.queue), fresh / "queue.safetensors")
        names = ("identity", "step", "tokens", "history", "taken", "source_state")
        # The last file, and written at once: a folder that has it is whole.
        write_json_atomic(fresh / STATE, {name: getattr(self, name) for name in names})
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint that `save` wrote.

        Raises:
            BadInput: it is of another model, or of a run with another base model, other settings, seed or rows.
        """
        state_json: dict[str, Any] = read_json(folder / STATE)
        weights = load_file(folder / "weights.safetensors", device=str(self.device))
        moments = load_file(folder / "optimizer.safetensors", device=str(self.device))
        same = set(weights) == set(self.named) and all(weights[n].shape == p.shape for n, p in self.named.items())
        if not same:
            raise BadInput(f"{folder}: checkpoint of another model; delete the folder and run again")
        if state_json["identity"] != self.identity:
            raise BadInput(
                f"{folder}: checkpoint of a run with other settings or rows, or from another base model; "
                "delete the folder and run again"
            )
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(weights[name])
                self.optimizer.state[p] = {key: moments[f"{name}/{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        self.step, self.tokens, self.history = state_json["step"], state_json["tokens"], state_json["history"]
        self.taken, self.source_state = state_json["taken"], state_json["source_state"]
        self.queue = from_tensors(load_file(folder / "queue.safetensors"))


def target_weight(example: Example, prompt_loss_weight: float) -> float:
    """The weight of a row in the loss of its step."""
    targets = sum(example.completion_mask[1:])
    return example.weight * (targets + prompt_loss_weight * (len(example.ids) - 1 - targets))


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: SftConfig,
    seed: int,
    scratch: Path | None = None,
    progress: Progress | None = None,
    log: Callable[..., None] | None = None,
    *,
    samples: Samples | None = None,
    world: World = ALONE,
    adapter: Path | None = None,
    source: Source | None = None,
) -> tuple[PreTrainedModel, History]:
    """Train a model on examples.

    Args:
        model: in float32 on the device to use; it is changed in place.
        examples: the rows to train on.
        held_out: rows for the evaluation loss; may be empty.
        config: the training run.
        seed: order of the rows and initial LoRA weights.
        scratch: folder for resume checkpoints; a run with the same arguments goes on from the one it finds.
        progress: told about finished steps.
        log: called as log(step, train_loss=..., ...) for training curves.
        samples: conversations to answer while training; the answers are left in it.
        world: the processes that train together. The first alone writes, reports and samples.
        adapter: a folder to write the LoRA weights into before they are merged.
        source: makes the batches, of `examples` or from them; by default they are the examples in shuffled order.

    Returns:
        The trained model (LoRA merged) and the history: step, tokens, train_loss, learning_rate, and eval_loss
        where it was measured (-1 where not).

    Raises:
        BadInput: the checkpoint in `scratch` is of another run, or the settings ask for evaluations or samples and
            there is nothing to take them of.
        Finding: training diverged.
    """
    asked = (("eval_every", config.eval_every, held_out), ("sample_every", config.sample_every, samples))
    for key, every, given in asked:
        if every and not given:
            raise BadInput(f"sft.{key} is {every}, but no rows or prompts were named for it; name some, or set it to 0")
    if samples is not None:
        samples.check(model)
    facts = {"config": asdict(config), "seed": seed} | ({} if source is None else {"source": source.identity})
    identity = "" if scratch is None else run_identity(model, examples, facts)
    wrapped: torch.nn.Module = (
        with_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets, seed) if config.lora_rank else model
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = Trainer(wrapped, config, seed, world, identity)
    checkpoint = scratch / "checkpoint" if scratch is not None else None
    _go_on(trainer, checkpoint, progress, samples, source)
    wrapped.train()
    batches_of_rows = _batches_of_rows(trainer, examples, source)
    if config.packing and not packs(model):
        raise BadInput(f"{type(model).__name__}: rows of a packed batch would see each other; set packing to false")
    with packed_attention_on(wrapped) if config.packing else nullcontext():
        while trainer.step < config.steps:
            rate = learning_rate(config, trainer.step)
            loss = trainer.train_step(next(batches_of_rows))
            _record(trainer, loss, rate, held_out, samples, log)
            if progress is not None:
                progress.advance(1, loss=loss)
            if checkpoint is not None and _due(trainer.step, config.checkpoint_every) and trainer.step < config.steps:
                if world.first:
                    trainer.save(checkpoint)
                world.wait()
    total = sum(float(p.detach().double().sum()) for p in trainer.named.values()) if world.size > 1 else 0.0
    world.check_equal(total, "the sum of the trained weights", trainer.device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if adapter is not None and config.lora_rank and world.first:
        save_adapter(wrapped, adapter)
    model.eval()
    return merged(wrapped), trainer.history


def _go_on(
    trainer: Trainer, checkpoint: Path | None, progress: Progress | None, samples: Samples | None, source: Source | None
) -> None:
    """Goes on from the checkpoint, if there is one: the trainer and all that is told about it."""
    found = checkpoint_of(checkpoint) if checkpoint is not None else None
    if found is not None:
        trainer.restore(found)
        if progress is not None:
            progress.resume(trainer.step)
    if samples is not None:
        samples.taken = trainer.taken
    if source is not None:
        source.state.update(trainer.source_state)


def _batches_of_rows(trainer: Trainer, examples: Sequence[Example], source: Source | None) -> Iterator[list[Example]]:
    """The batch of each step, from the trainer's step on."""
    if source is None:
        order = batches([len(e.ids) for e in examples], trainer.config.batch_tokens, trainer.seed)
        for _ in range(trainer.step):
            next(order)
        for rows in order:
            yield [examples[i] for i in rows]
        return
    while True:
        if not trainer.queue:
            trainer.queue = source.next_batches(plain(trainer.model), trainer.step)
            trainer.source_state = source.state
            drawn = sum(hash(row.read) % 2**20 for batch in trainer.queue for row in batch)
            trainer.world.check_equal(drawn, "what the model's own rows are", trainer.device)
        yield trainer.queue.pop(0)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _record(
    trainer: Trainer,
    loss: float,
    rate: float,
    held_out: Sequence[Example],
    samples: Samples | None,
    log: Callable[..., None] | None,
) -> None:
    """Append one line of history after a step; measure the held-out loss and take samples where they are due."""
    config, step = trainer.config, trainer.step
    line = {"step": step, "tokens": trainer.tokens, "train_loss": loss, "learning_rate": rate, "eval_loss": -1.0}
    if held_out and (step == config.steps or _due(step, config.eval_every)):
        line["eval_loss"] = evaluation_loss(trainer, held_out)
    if samples is not None and trainer.world.first and (step == config.steps or _due(step, config.sample_every)):
        samples.take(trainer.model, step)
    trainer.history.append(line)
    if log is not None:
        log(step, **{name: value for name, value in line.items() if name != "step" and value != -1.0})
