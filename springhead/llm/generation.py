"""Batched decoding with a key-value cache, greedy or sampled.

What a row becomes does not depend on the rows beside it: rows are batched with others of their length where
possible and padded on the left otherwise, padding has no attention and no position, a finished row leaves the
batch, and a sampled row draws from a generator of its own, seeded by (seed, row index).
In float32, batch shape still changes the last bits of a logit; a greedy tie closer than that is not decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.progress import Progress


@dataclass(frozen=True)
class Decoding:
    """How to decode. Temperature 0 is greedy; `top_p` cuts the tail of the distribution when sampling."""

    max_new_tokens: int = 128
    batch_rows: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_rows < 1:
            raise ValueError("max_new_tokens and batch_rows must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must not be negative, top_p must be above 0 and at most 1")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A user's prompt in tokens, up to where the answer begins: the same context that training used."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    return list(encoded["input_ids"])


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    progress: Progress | None = None,
) -> list[str]:
    """Answer prompts, in their order, without end sign.

    Raises:
        BadInput: there is no prompt.
    """
    if not prompts:
        raise BadInput("no prompts to answer; the evaluation rows are empty")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    answers = generate_ids(model, ids, decoding, int(tokenizer.eos_token_id), int(tokenizer.pad_token_id), progress)
    return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    eos: int,
    pad: int,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Token version of `generate`; the answers are without `eos`."""
    was_training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    # Longest first: the batch that needs most memory comes first, and batches are nearly free of padding.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for start in range(0, len(order), decoding.batch_rows):
        chosen = order[start : start + decoding.batch_rows]
        _decode_batch(model, prompts, chosen, answers, decoding, eos, pad)
        if progress is not None:
            progress.advance(len(chosen))
    model.train(was_training)
    return answers


def _decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[int],
    answers: list[list[int]],
    decoding: Decoding,
    eos: int,
    pad: int,
) -> None:
    """Decode the rows `chosen` together, appending to their answers."""
    device = next(model.parameters()).device
    longest = max(len(prompts[i]) for i in chosen)
    inputs = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen], device=device)
    lengths = torch.tensor([len(prompts[i]) for i in chosen], device=device)
    mask = torch.arange(longest, device=device)[None] >= longest - lengths[:, None]
    # Positions count real tokens only; padding gets 0, where nothing attends to it.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Without padding no mask is needed, and attention takes its fast causal path.
    padded = not bool(mask.all())
    live = list(chosen)
    generators = [np.random.default_rng([decoding.seed, i]) for i in live]
    cache = DynamicCache(config=model.config)
    for step in range(decoding.max_new_tokens):
        logits = model(
            input_ids=inputs,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = _choose(logits.float(), decoding, generators)
        kept = [k for k, token in enumerate(tokens) if token != eos]
        for k in kept:
            answers[live[k]].append(tokens[k])
        if not kept or step + 1 == decoding.max_new_tokens:
            return
        if len(kept) < len(live):
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            mask, positions = mask[index], positions[index]
            live, generators = [live[k] for k in kept], [generators[k] for k in kept]
        inputs = torch.tensor([[tokens[k]] for k in kept], device=device)
        mask = torch.cat([mask, torch.ones(len(kept), 1, dtype=torch.bool, device=device)], dim=1)
        positions = positions[:, -1:] + 1


def _choose(logits: torch.Tensor, decoding: Decoding, generators: Sequence[np.random.Generator]) -> list[int]:
    """Next token of each row: the arg-max, or a draw by inverse distribution from the row's own generator."""
    if decoding.temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    probabilities = torch.softmax(logits.double() / decoding.temperature, dim=-1).cpu().numpy()
    chosen = []
    for row, generator in zip(probabilities, generators, strict=True):
        ranked = np.argsort(-row, kind="stable")
        cumulative = np.cumsum(row[ranked])
        # The smallest set of tokens whose mass reaches top_p; the first token is always in it.
        size = int(np.searchsorted(cumulative, decoding.top_p * cumulative[-1])) + 1
        size = min(size, len(ranked))
        draw = generator.random() * cumulative[size - 1]
        chosen.append(int(ranked[min(int(np.searchsorted(cumulative[:size], draw, side="right")), size - 1)]))
    return chosen
