"""Keys and values of rows that are being generated, for batched decoding without padding.

`RaggedCache` is what the packed attention (`springhead.llm.attention`) attends to while generating. Rows have their
own lengths: prompts are read packed, end to end, and at each later step every live row brings one token. Room for keys
and values is allocated in blocks, not joined anew at each step, and heads that share keys (grouped queries) read them
where they lie. A finished row's place is taken by the last row, one copy of one row.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from springhead.llm.attention import Layout

_BLOCK = 64
"""Tokens by which the room of all rows grows."""


class RaggedCache:
    """The cache of one batch of rows; an `Attends`.

    Per layer, keys and values have shape (rows, kv_heads, room, head_dim); row i is filled up to `lengths[i]`.
    """

    def __init__(self, lengths: Sequence[int], prompt: Layout, device: torch.device) -> None:
        """Prepare for prompts of these lengths, laid out in one packed sequence as `prompt` says."""
        self._prompt: Layout | None = prompt
        self.lengths = torch.tensor(lengths, device=device)
        starts = [0, *accumulate(lengths)][:-1]
        self._row = torch.repeat_interleave(torch.arange(len(lengths), device=device), self.lengths)
        self._column = torch.arange(sum(lengths), device=device) - torch.tensor(starts, device=device)[self._row]
        self._longest = max(lengths)
        self._even = min(lengths) == self._longest
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows are live."""
        return len(self.lengths)

    def step(self) -> torch.Tensor:
        """Begin a step of one token for each row; returns their positions (1, rows)."""
        self._prompt = None
        positions = self.lengths[None].clone()
        self._column = self.lengths
        self.lengths = self.lengths + 1
        self._row = torch.arange(self.rows, device=self.lengths.device)
        self._longest += 1
        self._mask = None
        if not self._even:
            seen = torch.arange(self._longest, device=self.lengths.device)[None] < self.lengths[:, None]
            self._mask = seen[:, None, None]
        return positions

    def keep(self, live: Sequence[int]) -> list[int]:
        """Give up all rows but these; returns the order in which the kept rows now lie."""
        order = list(range(self.rows))
        gone = sorted(set(order) - set(live))
        for place in reversed(gone):
            last = len(order) - 1
            if place != last:
                for tensor in (*self._keys, *self._values):
                    tensor[place] = tensor[last]
                order[place] = order[last]
            order.pop()
        self.lengths = self.lengths[torch.tensor(order, device=self.lengths.device)]
        self._longest = int(self.lengths.max())
        self._even = bool((self.lengths == self._longest).all())
        return order

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
    ) -> torch.Tensor:
        """Store the keys and values of these tokens and attend to all of their rows; see `Attends`."""
        self._store(layer, key, value)
        if self._prompt is not None:
            return self._prompt.attend(layer, query, key, value, scale, window)
        heads, rows, dim = query.shape
        shared = key.shape[0]
        past_keys = self._keys[layer][:rows, :, : self._longest]
        past_values = self._values[layer][:rows, :, : self._longest]
        mask = self._mask
        if 0 < window < self._longest:
            columns = torch.arange(self._longest, device=query.device)[None]
            near = (columns < self.lengths[:, None]) & (columns >= self.lengths[:, None] - window)
            mask = near[:, None, None]
        # The heads of a group are taken for a sequence of queries to the same keys: nothing is repeated.
        grouped = query.view(shared, heads // shared, rows, dim).permute(2, 0, 1, 3)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, past_keys, past_values, attn_mask=mask, scale=scale
        )
        return out.reshape(rows, heads, dim)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the keys and values (kv_heads, tokens, head_dim) of the present tokens."""
        room = -(-self._longest // _BLOCK) * _BLOCK
        if layer == len(self._keys):
            shape = (self.rows, key.shape[0], room, key.shape[2])
            self._keys.append(key.new_zeros(shape))
            self._values.append(value.new_zeros((*shape[:3], value.shape[2])))
        elif self._keys[layer].shape[2] < room:
            for store in (self._keys, self._values):
                old = store[layer][: self.rows]
                store[layer] = old.new_zeros((*old.shape[:2], room, old.shape[3]))
                store[layer][:, :, : old.shape[2]] = old
        self._keys[layer][self._row, :, self._column] = key.transpose(0, 1)
        self._values[layer][self._row, :, self._column] = value.transpose(0, 1)
