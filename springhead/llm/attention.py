"""Attention over packed sequences, through transformers' attention interface.

The model hands what it is called with down to its attention: with `layout=` it is told which token attends to which.
So every model of the library that uses the interface (Llama, Qwen, Mistral, ...) reads packed rows, and generates
from a cache of our own, without a change.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from springhead.errors import BadInput

PACKED = "springhead_packed"
"""Name of the attention implementation a model must be set to while it reads packed batches."""

_UNKNOWN_TO_US = ("softcap", "s_aux", "position_bias")
"""What some models hand to their attention and ours does not have: it would be left out without a word."""


class Attends(Protocol):
    """How the tokens of a packed sequence attend: rows of a batch, or a cache of keys and values."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
    ) -> torch.Tensor:
        """Attention of packed tokens.

        Args:
            layer: index of the layer.
            query: (heads, tokens, head_dim).
            key: (kv_heads, tokens, head_dim).
            value: like the key.
            scale: factor of the scores; None for 1 / sqrt(head_dim).
            window: how many tokens back one sees, itself included; 0 for all.

        Returns:
            (tokens, heads, head_dim).
        """


@dataclass(frozen=True)
class Layout:
    """Where the rows of a packed sequence lie.

    `gather` has shape (rows, longest): the packed index of each token of each row, 0 beyond a row's end.
    `scatter` has shape (tokens,): the index of each packed token in the flattened (rows, longest) grid.
    """

    gather: torch.Tensor
    scatter: torch.Tensor

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
    ) -> torch.Tensor:
        """Causal attention inside each row; see `Attends`."""
        return self.attend_spread(query, self.spread(key), self.spread(value), scale, window)

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Packed tokens (heads, tokens, head_dim) as rows, (rows, heads, longest, head_dim); beyond a row's end lies
        some token of the batch.
        """
        grid = tensor.transpose(0, 1).index_select(0, self.gather.reshape(-1))
        return grid.view(*self.gather.shape, *grid.shape[1:]).transpose(1, 2)

    def attend_spread(
        self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int
    ) -> torch.Tensor:
        """`attend` with keys and values that are spread already; they may begin before the queries.

        Rows are a grid for the attention alone. Padding is on the right, so the causal mask already keeps it away
        from real tokens and no mask tensor is needed.
        """
        rows, longest = self.gather.shape
        q, groups = self.spread(query), query.shape[0] // k.shape[1]
        # A CPU reads shared keys where they lie; elsewhere only some kernels do, and float32 would fall to the slowest.
        # In half precision a CPU would round the sums of the heads' gradients.
        shared = groups > 1 and q.device.type == "cpu" and q.dtype == torch.float32
        if groups > 1 and not shared:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        near, before = None, k.shape[2] - longest
        if before or 0 < window < longest:
            near = torch.ones(longest, k.shape[2], dtype=torch.bool, device=q.device).tril(before)
            near = near.triu(before + 1 - window) if window > 0 else near
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=near, is_causal=near is None, scale=scale, enable_gqa=shared
        )
        out = out.transpose(1, 2).reshape(rows * longest, query.shape[0], query.shape[2])
        return out.index_select(0, self.scatter)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Attends | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of packed sequences, for transformers' attention interface.

    Args:
        module: the attention layer that asks.
        query: (1, heads, tokens, head_dim).
        key: like the query, perhaps with fewer heads (grouped queries).
        value: like the key.
        attention_mask: always None; the layout says what attends to what.
        scaling: factor of the scores; None for 1 / sqrt(head_dim).
        dropout: share of attention weights dropped in training; must be 0.
        layout: what attends to what; the model hands it down from its own arguments.
        sliding_window: how many tokens back the layer sees; None for all.
        **others: what else the model hands to its attention.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights, as the attention interface wants.

    Raises:
        BadInput: without a layout, or where the model wants something of its attention that this one has not.
    """
    if layout is None:
        raise BadInput(f"attention {PACKED!r} needs the batch's layout; pass layout=packed.layout to the model")
    asked = [name for name in _UNKNOWN_TO_US if others.get(name) is not None] + ["dropout"] * (dropout > 0)
    if asked:
        raise BadInput(f"packed attention has no {', '.join(asked)}, which this model asks for; set packing to false")
    out = layout.attend(
        int(getattr(module, "layer_idx", 0)), query[0], key[0], value[0], scaling, int(sliding_window or 0)
    )
    return out[None], None


AttentionInterface.register(PACKED, packed_attention)
