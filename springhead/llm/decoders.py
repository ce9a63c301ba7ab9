"""Two ways to run a model one token after another: from our ragged cache, or from the library's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from springhead.llm.attention import PACKED
from springhead.llm.kvcache import RaggedCache
from springhead.llm.packing import Example, pack, packs, split_by_tokens

_PROMPT_TOKENS = {"cpu": 2048}
"""Tokens of prompts that are read in one pass: on a CPU as many as its caches hold the activations of."""


class Decoder(Protocol):
    """A batch of rows that are being generated. Logits have shape (live rows, words)."""

    def prefill(self) -> torch.Tensor:
        """Read the prompts; returns the logits of each row's first token."""

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each live row; returns the logits of the next."""

    def keep(self, live: Sequence[int]) -> list[int]:
        """Give up all rows but these places; returns the places in the order in which the rows now lie."""


class Ragged:
    """Decoding without padding; the model must be set to the attention `PACKED`."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._device = model, model.device
        self._rows = [Example(tuple(prompt), (False,) * len(prompt)) for prompt in prompts]
        self._cache = RaggedCache([len(prompt) for prompt in prompts], self._device)

    def prefill(self) -> torch.Tensor:
        """See `Decoder`."""
        logits, first = [], 0
        for rows in split_by_tokens(self._rows, _PROMPT_TOKENS.get(self._device.type, 2**16)):
            packed = pack(rows).to(self._device)
            last = torch.from_numpy(np.cumsum([len(row.ids) for row in rows]) - 1).to(self._device)
            self._cache.read(packed.layout, first)
            logits.append(self._run(packed.input_ids, packed.position_ids, last))
            first += len(rows)
        return torch.cat(logits)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder`."""
        positions = self._cache.step()
        return self._run(torch.tensor([list(tokens)], device=self._device), positions, 0)

    def keep(self, live: Sequence[int]) -> list[int]:
        """See `Decoder`."""
        return self._cache.keep(live)

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, which: torch.Tensor | int) -> torch.Tensor:
        given = {"input_ids": ids, "position_ids": positions, "layout": self._cache}
        return self._model(**given, logits_to_keep=which, use_cache=False).logits[0]  # type: ignore[no-any-return]


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
