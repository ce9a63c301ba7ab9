"""Keys and values of rows that are being generated, for batched decoding without padding.

`RaggedCache` is what the packed attention (`springhead.llm.attention`) attends to while generating. Rows have their
own lengths: prompts are read packed, end to end, some rows at a time, and at each later step every live row brings one
token. Room for keys and values is allocated in blocks, not joined anew at each step, and heads that share keys (grouped
queries) read them where they lie. A finished row's place is taken by the last row, one copy of one row.

On a CPU a step spends a quarter of its time on reading keys and values from memory, so neighbouring rows attend in
groups, each as far as its own longest row. The groups cost nothing in order: rows come longest first, and a row that
takes a finished one's place is the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from springhead.llm.attention import Layout

_BLOCK = 128
"""Tokens by which the room of all rows grows."""
_GROUP_ROWS = {"cpu": 32}
"""Rows that attend together, for each thread; elsewhere all, for there a call costs more than what it reads."""


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows, of which the longest has `longest` tokens; `mask` (rows, 1, 1, longest) where they differ."""

    rows: slice
    longest: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Prompt:
    """Prompts that are being read; see `RaggedCache.read`."""

    layout: Layout
    rows: slice
    of: torch.Tensor
    start: int


class RaggedCache:
    """The cache of one batch of rows; an `Attends`.

    Per layer, keys and values have shape (rows, kv_heads, room, head_dim); row i is filled up to `lengths[i]`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """Prepare for prompts of these lengths."""
        self._prompt: _Prompt | None = None
        self.lengths = torch.tensor(lengths, device=device)
        self._sizes = list(lengths)  # the same on the host: a look at it stops no device
        self._column = self.lengths
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._groups: list[_Group] = []

    @property
    def rows(self) -> int:
        """How many rows are live."""
        return len(self.lengths)

    def read(self, prompts: Layout, rows: slice, of: torch.Tensor, start: int = 0) -> None:
        """Begin to read prompts, which lie packed as `prompts` says.

        Args:
            prompts: where they lie; those that several rows share lie there once.
            rows: the rows of the cache that they are for.
            of: (rows,) which of the prompts each of these rows has.
            start: at which token of the row they begin. What precedes is read already, and the same in all rows.
        """
        self._prompt = _Prompt(prompts, rows, of, start)

    def step(self) -> torch.Tensor:
        """Begin a step of one token for each row; returns their positions (1, rows)."""
        self._prompt = None
        positions = self.lengths[None].clone()
        self._column = self.lengths
        self.lengths = self.lengths + 1
        self._sizes = [size + 1 for size in self._sizes]
        self._groups = self._grouped()
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
        self._sizes = [self._sizes[place] for place in order]
        return order

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
    ) -> torch.Tensor:
        """Store the keys and values of these tokens and attend to all of their rows; see `Attends`."""
        if self._prompt is not None:
            return self._attend_prompt(self._prompt, layer, query, key, value, scale, window)
        self._store(layer, key, value)
        heads, rows, dim = query.shape
        shared = key.shape[0]
        # The heads of a group are taken for a sequence of queries to the same keys: nothing is repeated.
        grouped = query.view(shared, heads // shared, rows, dim).permute(2, 0, 1, 3)
        out = [
            torch.nn.functional.scaled_dot_product_attention(
                grouped[group.rows],
                self._keys[layer][group.rows, :, : group.longest],
                self._values[layer][group.rows, :, : group.longest],
                attn_mask=group.mask if not 0 < window < group.longest else self._near(group, window),
                scale=scale,
            )
            for group in self._groups
        ]
        return (out[0] if len(out) == 1 else torch.cat(out)).reshape(rows, heads, dim)

    def _attend_prompt(
        self,
        prompt: _Prompt,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int,
    ) -> torch.Tensor:
        """`attend` while prompts are read."""
        seen, each = [], len(prompt.of)
        for store, new in ((self._keys, key), (self._values, value)):
            read = prompt.layout.spread(new)
            if layer == len(store):
                store.append(read.new_zeros((self.rows, read.shape[1], self._room(), read.shape[3])))
            mine, stop = store[layer][prompt.rows], prompt.start + read.shape[2]
            mine[:, :, prompt.start : stop] = read if len(read) in (1, each) else read.index_select(0, prompt.of)
            if prompt.start and len(read) == each:
                read = mine[:, :, :stop]
            elif prompt.start:
                read = torch.cat([mine[:1, :, : prompt.start].expand(len(read), -1, -1, -1), read], dim=2)
            seen.append(read)
        return prompt.layout.attend_spread(query, seen[0], seen[1], scale, window)

    def _grouped(self) -> list[_Group]:
        """The live rows in groups."""
        device = self.lengths.device
        size = _GROUP_ROWS.get(device.type, self.rows) * (torch.get_num_threads() if device.type == "cpu" else 1)
        groups = []
        for first in range(0, self.rows, size):
            rows = slice(first, min(first + size, self.rows))
            longest, mask = max(self._sizes[rows]), None
            if min(self._sizes[rows]) < longest:
                mask = (torch.arange(longest, device=device) < self.lengths[rows, None])[:, None, None]
            groups.append(_Group(rows, longest, mask))
        return groups

    def _near(self, group: _Group, window: int) -> torch.Tensor:
        """A group's mask where a row sees only so many tokens back."""
        lengths = self.lengths[group.rows, None]
        columns = torch.arange(group.longest, device=lengths.device)
        return ((columns < lengths) & (columns >= lengths - window))[:, None, None]

    def _room(self) -> int:
        """Tokens to make room for: the present and the next, rounded up. What is not filled is zero: it has no weight
        in any sum, and must not be NaN.
        """
        return -(-(max(self._sizes) + 1) // _BLOCK) * _BLOCK

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the keys and values (kv_heads, rows, head_dim) of one token for each row."""
        if self._keys[layer].shape[2] < max(self._sizes):
            for store in (self._keys, self._values):
                old = store[layer][: self.rows]
                store[layer] = old.new_zeros((*old.shape[:2], self._room(), old.shape[3]))
                store[layer][:, :, : old.shape[2]] = old
        place = torch.arange(self.rows, device=key.device)
        self._keys[layer][place, :, self._column] = key.transpose(0, 1)
        self._values[layer][place, :, self._column] = value.transpose(0, 1)
