"""Batched decoding with a key-value cache, greedy or sampled.

What a row becomes does not depend on the rows beside it: padding has no attention and no position, a finished row
leaves the batch, and a sampled row draws from a generator of its own, seeded by (seed, key of the row).
In float32, batch shape still changes the last bits of a logit; a greedy tie closer than that is not decided here, nor
is a draw that falls that close to a border.

Models that read packed rows (`springhead.llm.packing.packs`) decode from a ragged cache; all others by padding on the
left and the library's own cache.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.llm import chat
from springhead.llm.decoders import Decoder, decoder_for
from springhead.progress import Progress

Conversation = str | Sequence[Mapping[str, Any]]
"""What is answered: a user's prompt, or messages."""
Key = int | str
"""What a row is seeded by: its number, or its id."""
_ARGMAX_BLOCK = 512
"""Words among which the largest is found at once."""


@dataclass(frozen=True)
class Decoding:
    """How to decode. Temperature 0 is greedy; `top_p` and `top_k` cut the tail of the distribution when sampling."""

    max_new_tokens: int = 128
    """Longest answer."""
    batch_rows: int = 256
    """Rows that are decoded together."""
    temperature: float = 0.0
    """What logits are divided by; 0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this much of the probability."""
    seed: int = 0
    """Of the draws."""
    top_k: int = 0
    """Draw from the so many likeliest tokens; 0 for all."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; the first of them and what follows is cut off."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_rows < 1:
            raise ValueError("max_new_tokens and batch_rows must be at least 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature and top_k must not be negative, top_p must be above 0 and at most 1")
        if self.seed < 0:
            raise ValueError("seed must not be negative")
        if not all(self.stop):
            raise ValueError("a stop text must not be empty")


@dataclass
class Answer:
    """One answer: its tokens without end sign, its text, and what ended it."""

    ids: list[int]
    text: str = ""
    finish: Literal["end", "stop", "length"] = "length"


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end sign and those of the model's generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({int(t) for t in (tokenizer.eos_token_id, *listed) if t is not None})


def end_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The end signs as the chat template writes them."""
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in end_ids(model, tokenizer)]


def as_messages(conversation: Conversation) -> list[Mapping[str, Any]]:
    """A prompt as a conversation of one message; messages as they are."""
    return [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """A conversation in tokens, up to where the answer begins: the same context that training used."""
    return chat.prompt_ids(tokenizer, as_messages(conversation))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    decoding: Decoding,
) -> list[str]:
    """Answer prompts, in their order; the texts of `answer`."""
    return [given.text for given in answer(model, tokenizer, prompts, decoding)]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    decoding: Decoding,
    keys: Sequence[Key] | None = None,
) -> list[Answer]:
    """Answer prompts, in their order.

    Args:
        model: in evaluation or training mode; left as it is.
        tokenizer: with a chat template.
        prompts: what to answer.
        decoding: how.
        keys: what each row's draws are seeded by, beside `decoding.seed`; their place in `prompts` if not given.

    Raises:
        BadInput: there is no prompt, or one leaves no room for an answer in the model's context.
    """
    if not prompts:
        raise BadInput("no prompts to answer; the evaluation rows are empty")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = answer_ids(model, ids, decoding, ends, int(pad), keys, tokenizer)
    for given in answers:
        text = str(tokenizer.decode(given.ids, skip_special_tokens=True))
        cuts = [text.index(stop) for stop in decoding.stop if stop in text] if given.finish == "stop" else []
        given.text = text[: min(cuts, default=len(text))].strip()
    return answers


@torch.no_grad()
def answer_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: Sequence[int],
    pad: int,
    keys: Sequence[Key] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Token version of `answer`; `tokenizer` is needed for stop texts alone. The answers have no `text` yet.

    `progress` is told about finished rows.
    """
    room = room_of(context_of(model.config), prompts, decoding, keys)
    was_training = model.training
    model.eval()
    answers = [Answer([]) for _ in prompts]
    # Longest first: the batch that needs most memory comes first, and the rows of a batch have much the same length.
    # The same prompt asked several times lies together: it is read once.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), list(prompts[i]), i))
    try:
        for start in range(0, len(order), decoding.batch_rows):
            chosen = order[start : start + decoding.batch_rows]
            generators = {i: _generator(decoding.seed, i if keys is None else keys[i]) for i in chosen}
            with decoder_for(model, [prompts[i] for i in chosen], pad) as decoder:
                _decode(decoder, chosen, answers, room, decoding, set(ends), generators, tokenizer)
            if progress is not None:
                progress.advance(len(chosen))
    finally:
        model.train(was_training)
    return answers


def context_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model reads and writes together, if there is a limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def room_of(
    context: int | None, prompts: Sequence[Sequence[int]], decoding: Decoding, keys: Sequence[Key] | None
) -> list[int]:
    """How many tokens each answer may have: `max_new_tokens`, or what the context leaves.

    Raises:
        BadInput: it leaves none to a row, which is named by its key.
    """
    if context is None:
        return [decoding.max_new_tokens] * len(prompts)
    for number, prompt in enumerate(prompts):
        if len(prompt) >= context:
            who = f"prompt {number}" if keys is None else f"row {keys[number]}"
            raise BadInput(
                f"{who}: {len(prompt)} tokens leave no room in the model's context of {context} for an answer; shorten "
                "or remove it, or use a model with a longer context"
            )
    return [min(decoding.max_new_tokens, context - len(prompt)) for prompt in prompts]


def _generator(seed: int, key: Key) -> np.random.Generator:
    """A row's own generator."""
    number = key if isinstance(key, int) else int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, number])


def _decode(
    decoder: Decoder,
    chosen: Sequence[int],
    answers: list[Answer],
    room: Sequence[int],
    decoding: Decoding,
    ends: set[int],
    generators: Mapping[int, np.random.Generator],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Decode the rows `chosen` together, appending to their answers."""
    live = list(chosen)
    logits = decoder.prefill()
    while True:
        tokens = choose(logits.float(), decoding, [generators[row] for row in live])
        kept = []
        for place, (row, token) in enumerate(zip(live, tokens, strict=True)):
            given = answers[row]
            if token in ends:
                given.finish = "end"
                continue
            given.ids.append(token)
            if decoding.stop and tokenizer is not None and _stopped(given.ids, tokenizer, decoding.stop):
                given.finish = "stop"
            elif len(given.ids) < room[row]:
                kept.append(place)
        if not kept:
            return
        if len(kept) < len(live):
            order = decoder.keep(kept)
            live, tokens = [live[k] for k in order], [tokens[k] for k in order]
        logits = decoder.step(tokens)


def _stopped(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> bool:
    """Whether the last token completed one of the stop texts."""
    # A token is at least one byte, and a character at most four: so many tokens hold the longest text.
    tail = ids[-(4 * max(map(len, stop)) + 4) :]
    text = str(tokenizer.decode(list(tail), skip_special_tokens=True))
    return any(end in text for end in stop)


def choose(logits: torch.Tensor, decoding: Decoding, generators: Sequence[np.random.Generator]) -> list[int]:
    """Next token of each row: the arg-max, or a draw by inverse distribution from the row's own generator.

    The distribution is softmax(logits / temperature), cut to the `top_k` likeliest tokens, and of those to the fewest
    whose mass reaches `top_p` of theirs; the likeliest is always among them.

    Args:
        logits: (rows, words).
        decoding: temperature, top_k and top_p.
        generators: one for each row; each is asked for one number.
    """
    if decoding.temperature == 0:
        return [int(token) for token in likeliest(logits).tolist()]
    draws = torch.tensor([g.random() for g in generators], dtype=torch.float64, device=logits.device)[:, None]
    probabilities = torch.softmax(logits.float() / decoding.temperature, dim=-1)
    words = probabilities.shape[1]
    if decoding.top_p == 1 and not decoding.top_k:
        cumulative = probabilities.double().cumsum(dim=-1)
        picks = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        return [int(token) for token in picks.clamp(max=words - 1)[:, 0].tolist()]
    size = min(decoding.top_k or 1024, words)
    values, indices = ranked(probabilities, size)
    chosen = _drawn(values, indices, draws, decoding)
    if not decoding.top_k and size < words:
        # Only rows whose mass lies beyond need the whole order: what a row draws is a matter of its own.
        flat = (values.sum(dim=-1) < decoding.top_p).nonzero()[:, 0]
        if len(flat):
            chosen[flat] = _drawn(*ranked(probabilities[flat], words), draws[flat], decoding)
    return [int(token) for token in chosen.tolist()]


def ranked(probabilities: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest of each row (rows, words) of float32 probabilities, largest first, equal ones by index.

    Returns:
        The values in float64, and their indices, each (rows, size).
    """
    words = probabilities.shape[1]
    # Bits of floats that are not negative order as the floats do. With the index below them no two keys are equal, and
    # no library's choice among equal ones counts.
    backwards = torch.arange(words - 1, -1, -1, device=probabilities.device)
    keys = (probabilities.view(torch.int32).long() << 32) | backwards
    indices = words - 1 - (keys.topk(size, dim=-1).values & 0xFFFFFFFF)
    return probabilities.gather(1, indices).double(), indices


def _drawn(values: torch.Tensor, indices: torch.Tensor, draws: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """One index of each row, drawn from the likeliest tokens whose mass reaches `top_p`; see `ranked`."""
    cumulative = values.cumsum(dim=-1)
    whole = cumulative[:, -1:] if decoding.top_k else torch.ones_like(draws)
    # The first place at which the mass reaches top_p is the last that may be drawn.
    last = torch.searchsorted(cumulative, decoding.top_p * whole).clamp(max=cumulative.shape[1] - 1)
    picks = torch.searchsorted(cumulative, draws * cumulative.gather(1, last), right=True)
    return indices.gather(1, torch.minimum(picks, last))[:, 0]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest of each row (rows, words), the first where there are several, a NaN before all.

    On a CPU `argmax` looks at one number after another; the largest of each block is found five times as fast.
    """
    words = logits.shape[-1]
    whole = words - words % _ARGMAX_BLOCK
    if logits.device.type != "cpu" or whole <= _ARGMAX_BLOCK:
        return logits.argmax(dim=-1)
    blocks = logits[:, :whole].unflatten(-1, (-1, _ARGMAX_BLOCK))
    rows, block = torch.arange(len(logits)), blocks.amax(dim=-1).argmax(dim=-1)
    found: torch.Tensor = block * _ARGMAX_BLOCK + blocks[rows, block].argmax(dim=-1)
    if whole == words:
        return found
    rest = whole + logits[:, whole:].argmax(dim=-1)
    best, tail = logits[rows, found], logits[rows, rest]
    return torch.where((tail > best) | (tail.isnan() & ~best.isnan()), rest, found)
