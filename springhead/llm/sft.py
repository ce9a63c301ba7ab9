"""Supervised fine-tuning: packed batches, loss on the completion, full or LoRA, exact resume.

The loss of a step is the sum of token losses over the sum of token weights of the whole step, however many
micro-batches it is cut into: a mean of means would weigh short answers more. Logits are computed for target
tokens only, which for a 49,152-word vocabulary is the larger part of the work saved.

Methods are compared at equal steps and equal `batch_tokens`, so at equal compute, whatever the length of rows.

A checkpoint (safetensors + JSON) holds the trained tensors, the optimizer's state and the history; order and
batches follow from seed and step alone. Killed and resumed equals uninterrupted, byte for byte on a CPU.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json
from springhead.llm.packing import PACKED, Example, Packed, batches, pack, split_by_tokens
from springhead.progress import Progress

History = list[dict[str, float]]


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
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly."""
    final_rate: float = 0.05
    """Share of the peak rate that the cosine ends at."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices (never of norms)."""
    beta2: float = 0.98
    """AdamW's second-moment decay; beta1 is 0.9."""
    clip: float = 1.0
    """Largest gradient norm."""
    prompt_loss_weight: float = 0.0
    """Loss weight of prompt tokens; 0 trains on completions only, 1 is plain language modelling."""
    lora_rank: int = 0
    """Rank of LoRA on all linear layers; 0 trains every parameter."""
    lora_alpha: float = 32.0
    """LoRA's scale: updates are multiplied by lora_alpha / lora_rank."""
    eval_every: int = 0
    """Steps between evaluations of the loss; 0: only after the last step."""
    checkpoint_every: int = 0
    """Steps between resume checkpoints; 0: none."""

    def __post_init__(self) -> None:
        checks = {
            "steps must be at least 1": self.steps >= 1,
            "batch_tokens must be at least 1": self.batch_tokens >= 1,
            "learning_rate must be positive": self.learning_rate > 0,
            "warmup must be in 0..1": 0 <= self.warmup <= 1,
            "final_rate must be in 0..1": 0 <= self.final_rate <= 1,
            "prompt_loss_weight must be in 0..1": 0 <= self.prompt_loss_weight <= 1,
            "lora_rank must not be negative": self.lora_rank >= 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(rule)


def learning_rate(config: SftConfig, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then half a cosine down to `final_rate` of the peak."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


def with_lora(model: PreTrainedModel, config: SftConfig, seed: int) -> torch.nn.Module:
    """Wrap a model with fresh LoRA layers (Hu et al., arXiv 2106.09685); everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft divides by the rank, any number will do
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: torch.nn.Module = get_peft_model(model, lora)
        return adapted


def merged(model: torch.nn.Module) -> PreTrainedModel:
    """The plain model with its LoRA updates added into the weights; a model without LoRA comes back as it is."""
    if isinstance(model, PreTrainedModel):
        return model
    return model.merge_and_unload()  # type: ignore[operator,no-any-return]


def loss_sum(model: torch.nn.Module, batch: Packed) -> torch.Tensor:
    """Weighted sum of the token losses (nats) of a packed batch."""
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        layout=batch.layout,
        logits_to_keep=batch.predictors,
        use_cache=False,
    ).logits[0]
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.labels, reduction="none")
    return (losses * batch.weights).sum()


@contextmanager
def packed_attention_on(model: torch.nn.Module) -> Iterator[None]:
    """Let the model read packed batches inside the block, and restore its attention afterwards."""
    inner: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    before = inner.config._attn_implementation
    inner.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@torch.no_grad()
def evaluation_loss(model: torch.nn.Module, examples: Sequence[Example], batch_tokens: int) -> float:
    """Mean loss per completion token (nats); the model must have packed attention on."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = weight = 0.0
    for part in split_by_tokens(examples, batch_tokens):
        batch = pack(part).to(device)
        total += float(loss_sum(model, batch))
        weight += float(batch.weights.sum())
    model.train(was_training)
    return total / weight


class Trainer:
    """One training run: model, optimizer, step counter and history; everything a checkpoint must hold."""

    def __init__(self, model: torch.nn.Module, config: SftConfig, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in self.named.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.named.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, config.beta2)
        )
        self.device = next(model.parameters()).device
        self.step = 0
        self.tokens = 0
        self.history: History = []

    def train_step(self, examples: Sequence[Example]) -> float:
        """One optimizer step on these rows; returns the mean loss per unit of weight before the update.

        Raises:
            Finding: the loss or the gradient is not a finite number. Nothing is updated then.
        """
        config = self.config
        parts = split_by_tokens(examples, config.micro_tokens or config.batch_tokens)
        packed = [pack(part, config.prompt_loss_weight).to(self.device) for part in parts]
        weight = sum(float(batch.weights.sum()) for batch in packed)
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        half = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        for batch in packed:
            with half:
                loss = loss_sum(self.model, batch) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.named.values()), config.clip))
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

    def save(self, folder: Path) -> None:
        """Write a checkpoint; an earlier one is replaced only when this one is complete."""
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in self.named.items()}, fresh / "weights.safetensors")
        moments = {
            f"{name}/{key}": state[key].contiguous()
            for name, p in self.named.items()
            for state in [self.optimizer.state[p]]
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        save_file(moments, fresh / "optimizer.safetensors")
        write_json(fresh / "state.json", {"step": self.step, "tokens": self.tokens, "history": self.history})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint that `save` wrote."""
        weights = load_file(folder / "weights.safetensors", device=str(self.device))
        moments = load_file(folder / "optimizer.safetensors", device=str(self.device))
        if set(weights) != set(self.named):
            raise BadInput(f"{folder}: checkpoint of another model; delete the folder and run again")
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(weights[name])
                state = {key: moments[f"{name}/{key}"] for key in ("exp_avg", "exp_avg_sq")}
                # AdamW keeps its step counters on the CPU.
                self.optimizer.state[p] = {**state, "step": moments[f"{name}/step"].cpu()}
        state_json: dict[str, Any] = read_json(folder / "state.json")
        self.step, self.tokens, self.history = state_json["step"], state_json["tokens"], state_json["history"]


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: SftConfig,
    seed: int,
    scratch: Path | None = None,
    progress: Progress | None = None,
    log: Callable[..., None] | None = None,
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

    Returns:
        The trained model (LoRA merged) and the history: step, tokens, train_loss, learning_rate, and eval_loss
        where it was measured (-1 where not).

    Raises:
        Finding: training diverged.
    """
    wrapped: torch.nn.Module = with_lora(model, config, seed) if config.lora_rank else model
    trainer = Trainer(wrapped, config, seed)
    checkpoint = scratch / "checkpoint" if scratch is not None else None
    if checkpoint is not None and (checkpoint / "state.json").exists():
        trainer.restore(checkpoint)
        if progress is not None:
            progress.resume(trainer.step)
    wrapped.train()
    order = batches([len(e.ids) for e in examples], config.batch_tokens, seed)
    for _ in range(trainer.step):
        next(order)
    with packed_attention_on(wrapped):
        while trainer.step < config.steps:
            rows = next(order)
            rate = learning_rate(config, trainer.step)
            loss = trainer.train_step([examples[i] for i in rows])
            _record(trainer, loss, rate, held_out, log)
            if progress is not None:
                progress.advance(1, loss=loss)
            due = config.checkpoint_every and trainer.step % config.checkpoint_every == 0
            if checkpoint is not None and due and trainer.step < config.steps:
                trainer.save(checkpoint)
    model.eval()
    return merged(wrapped), trainer.history


def _record(
    trainer: Trainer, loss: float, rate: float, held_out: Sequence[Example], log: Callable[..., None] | None
) -> None:
    """Append one line of history after a step; measure the held-out loss where it is due."""
    config, step = trainer.config, trainer.step
    line = {"step": step, "tokens": trainer.tokens, "train_loss": loss, "learning_rate": rate, "eval_loss": -1.0}
    due = step == config.steps or (config.eval_every > 0 and step % config.eval_every == 0)
    if held_out and due:
        line["eval_loss"] = evaluation_loss(trainer.model, held_out, config.micro_tokens or config.batch_tokens)
    trainer.history.append(line)
    if log is not None:
        log(step, **{name: value for name, value in line.items() if name != "step" and value != -1.0})
