"""Keys and values of rows that are being generated, for batched decoding without padding.

`RaggedCache` is what the packed attention (`springhead.llm.attention`) attends to while generating. Rows have their
own lengths: prompts are read packed, end to end, some rows at a time, and at each later step every live row brings one
token. Room for keys
and values is allocated in blocks, not joined anew at each step, and heads that share keys (grouped queries) read them
where they lie. A finished row's place is taken by the last row, one copy of one row.
"""

from collections.abc import Sequence

import torch

from springhead.llm.attention import Layout

_BLOCK = 64
"""Tokens by which the room of all rows grows."""


class RaggedCache:
    """The cache of one batch of rows; an `Attends`.

    Per layer, keys and values have shape (rows, kv_heads, room, head_dim); row i is filled up to `lengths[i]`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """Prepare for prompts of these lengths."""
        self._prompt: Layout | None = None
        self._first = 0
        self.lengths = torch.tensor(lengths, device=device)
        self._column = self.lengths
        self._longest = max(lengths)
        self._even = min(lengths) == self._longest
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows are live."""
        return len(self.lengths)

    def read(self, prompts: Layout, first: int) -> None:
        """Begin to read the prompts of some rows, from the row `first` on, which lie packed as `prompts` says."""
        self._prompt, self._first = prompts, first

    def step(self) -> torch.Tensor:
        """Begin a step of one token for each row; returns their positions (1, rows)."""
        self._prompt = None
        positions = self.lengths[None].clone()
        self._column = self.lengths
        self.lengths = self.lengths + 1
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
        if self._prompt is not None:
            keys, values = self._prompt.spread(key), self._prompt.spread(value)
            for store, read in ((self._keys, keys), (self._values, values)):
                if layer == len(store):
                    store.append(read.new_zeros((self.rows, read.shape[1], self._room(), read.shape[3])))
                store[layer][self._first : self._first + len(read), :, : read.shape[2]] = read
            return self._prompt.attend_spread(query, keys, values, scale, window)
        self._store(layer, key, value)
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

    def _room(self) -> int:
        """Tokens to make room for: the present and the next, rounded up. What is not filled is zero: it has no weight
        in any sum, and must not be NaN.
        """
        return -(-(self._longest + 1) // _BLOCK) * _BLOCK

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the keys and values (kv_heads, rows, head_dim) of one token for each row."""
        if self._keys[layer].shape[2] < self._longest:
            for store in (self._keys, self._values):
                old = store[layer][: self.rows]
                store[layer] = old.new_zeros((*old.shape[:2], self._room(), old.shape[3]))
                store[layer][:, :, : old.shape[2]] = old
        place = torch.arange(self.rows, device=key.device)
        self._keys[layer][place, :, self._column] = key.transpose(0, 1)
        self._values[layer][place, :, self._column] = value.transpose(0, 1)
