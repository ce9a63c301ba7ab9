"""Two ways to run a model one token after another: from our ragged cache, or from the library's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice, takewhile
from typing import Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from springhead.llm.attention import PACKED
from springhead.llm.kvcache import RaggedCache
from springhead.llm.packing import Example, pack, packs, split_by_tokens

_PROMPT_TOKENS = {"cpu": 2048}
"""Tokens of prompts that are read in one pass: on a CPU as many as its caches hold the activations of."""
_SPARED, _PART = 512, 4
"""When a common beginning is read apart, which costs a pass of its own and, in each row, attention with a mask: it
spares so many tokens in all, and its length times `_PART` is at least that of the longest rest.
"""
_ROPE_BY_LENGTH = ("longrope", "dynamic")
"""Kinds of rotary positions whose angles depend on how far a pass reaches: a prompt must be read in one."""


class Decoder(Protocol):
    """A batch of rows that are being generated. Logits have shape (live rows, words)."""

    def prefill(self) -> torch.Tensor:
        """Read the prompts; returns the logits of each row's first token."""

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each live row; returns the logits of the next."""

    def keep(self, live: Sequence[int]) -> list[int]:
        """Give up all rows but these places; returns the places in the order in which the rows now lie."""


class Ragged:
    """Decoding without padding; the model must be set to the attention `PACKED`.

    Neighbours with the same prompt have it read once (several answers to each prompt), and so is what all prompts begin
    with (a system message, worked examples).
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._device = model, model.device
        self._prompts = [list(prompt) for prompt, _ in groupby(prompts, key=list)]
        self._copies = [len(list(same)) for _, same in groupby(prompts, key=list)]
        self._cache = RaggedCache([len(prompt) for prompt in prompts], self._device)

    def prefill(self) -> torch.Tensor:
        """See `Decoder`."""
        logits, first, copies, common = [], 0, iter(self._copies), self._common()
        if common:
            self._read([self._prompts[0][:common]], slice(0, self._cache.rows), [self._cache.rows], 0)
        # What a pass holds on a CPU is the activations of what it reads; elsewhere keys and values count more.
        counted = common if self._device.type == "cpu" else 0
        parts = [Example(tuple(p[counted:]), (False,) * (len(p) - counted)) for p in self._prompts]
        for part in split_by_tokens(parts, _PROMPT_TOKENS.get(self._device.type, 2**16)):
            counts = list(islice(copies, len(part)))
            rows = slice(first, first + sum(counts))
            found = self._read([row.ids[common - counted :] for row in part], rows, counts, common)
            logits.append(found.repeat_interleave(torch.tensor(counts, device=self._device), dim=0))
            first = rows.stop
        return torch.cat(logits)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder`."""
        positions = self._cache.step()
        return self._run(torch.tensor([list(tokens)], device=self._device), positions, 0)

    def keep(self, live: Sequence[int]) -> list[int]:
        """See `Decoder`."""
        return self._cache.keep(live)

    def _common(self) -> int:
        """How many tokens to read once for all prompts; each keeps one of its own, whose logits are wanted."""
        if len(self._prompts) == 1 or _rope_kinds(self._model) & set(_ROPE_BY_LENGTH):
            return 0
        low, high = min(self._prompts), max(self._prompts)  # what these two share, all between them share
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
        lengths = [len(prompt) for prompt in self._prompts]
        shared = min(shared, min(lengths) - 1)
        worth = shared * (len(lengths) - 1) >= _SPARED and shared * _PART >= max(lengths) - shared
        return shared if worth else 0

    def _read(self, prompts: Sequence[Sequence[int]], rows: slice, copies: Sequence[int], start: int) -> torch.Tensor:
        """Read prompts from their token `start` on, each for so many of the rows; the logits of each prompt."""
        packed = pack([Example(tuple(ids), (False,) * len(ids)) for ids in prompts]).to(self._device)
        last = torch.from_numpy(np.cumsum([len(ids) for ids in prompts]) - 1).to(self._device)
        of = torch.from_numpy(np.repeat(np.arange(len(prompts)), copies)).to(self._device)
        self._cache.read(packed.layout, rows, of, start)
        return self._run(packed.input_ids, packed.position_ids + start, last)

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, which: torch.Tensor | int) -> torch.Tensor:
        given = {"input_ids": ids, "position_ids": positions, "layout": self._cache}
        return self._model(**given, logits_to_keep=which, use_cache=False).logits[0]  # type: ignore[no-any-return]


def _rope_kinds(model: PreTrainedModel) -> set[str]:
    """The kinds of rotary positions a model has; some models have one for each kind of layer."""
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]
    return {str(part["rope_type"]) for part in parts if "rope_type" in part}


class Library:
    """Decoding with the model's own attention and cache; prompts are padded on the left."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> None:
        self._model, device = model, model.device
        longest = max(map(len, prompts))
        self._ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self._mask = torch.arange(longest, device=device)[None] >= longest - lengths[:, None]
        # Positions count real tokens only; padding gets 0, where nothing attends to it.
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)

    def prefill(self) -> torch.Tensor:
        """See `Decoder`."""
        return self._model(  # type: ignore[no-any-return]
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder`."""
        device = self._mask.device
        self._ids = torch.tensor(list(tokens), device=device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones(len(tokens), 1, dtype=torch.bool, device=device)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        return self.prefill()

    def keep(self, live: Sequence[int]) -> list[int]:
        """See `Decoder`."""
        index = torch.tensor(list(live), device=self._mask.device)
        self._cache.batch_select_indices(index)
        self._mask, self._positions = self._mask[index], self._positions[index]
        return list(live)


@contextmanager
def decoder_for(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> Iterator[Decoder]:
    """The faster decoder that this model allows, for these prompts; `pad` is a token to pad with."""
    if not packs(model):
        yield Library(model, prompts, pad)
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    try:
        yield Ragged(model, prompts)
    finally:
        model.set_attn_implementation(before)
