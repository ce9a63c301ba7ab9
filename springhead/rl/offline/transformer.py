"""The Constrained Decision Transformer's network, for several members side by side.

A causal transformer over (return, cost, state, action) tokens. Every weight has a leading member dimension and every
layer is one batched product. Some things are arranged for speed and change nothing but rounding: the scale and shift of
a layer norm and the scale of dropout are multiplied into the weights that follow (``Transformer.prepare``, once for
all slices of a batch); the last block computes queries, and all that follows, only for the tokens that outputs are
read off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from springhead.rl.offline.contract import Generators

TOKENS = 4
"""Tokens of one step: return-to-go, cost-to-go, state, action."""
_STATE = slice(2, 3)
_STATE_ACTION = slice(2, 4)
"""The tokens that outputs are read off."""


@dataclass(frozen=True)
class Shape:
    """What shapes the network.

    Attributes:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        time_steps: Size of the table of time embeddings: the steps of the longest episode that is drawn, and a context
            for the padding behind it, whose embeddings no loss reaches.
        width: Token width, a multiple of ``heads``.
        layers: Number of blocks.
        heads: Attention heads.
        cost_outputs: 2 for the logits of "this step costs", 1 for the cost itself.
    """

    observation_dim: int
    action_dim: int
    time_steps: int
    width: int
    layers: int
    heads: int
    cost_outputs: int


class Outputs(NamedTuple):
    """What the network predicts at each step.

    Attributes:
        mean: (members, batch, steps, action_dim), of the action.
        log_std: (members, batch, steps, action_dim).
        cost: (members, batch, steps, cost_outputs), None where it was not asked for.
    """

    mean: torch.Tensor
    log_std: torch.Tensor
    cost: torch.Tensor | None


class Dropout:
    """Draws which entries dropout keeps, for each member from a generator that checkpoints hold.

    The kept entries must be multiplied by ``scale``; the network multiplies weights by it, which are fewer.

    Args:
        share: Probability that an entry is dropped, to 1/65536.
        generators: The members' random numbers.
    """

    def __init__(self, share: float, generators: Generators) -> None:
        self.generators = generators
        self._lowest = round(share * 2**16) - 2**15
        self.scale = 1.0 / (1.0 - (self._lowest + 2**15) / 2**16)

    def kept(self, shape: Sequence[int]) -> torch.Tensor:
        """Draws 0 for dropped entries and 1 for kept ones, (members, ...).

        One 64-bit number serves four entries, which is several times as fast as PyTorch's ``bernoulli_`` on a CPU.
        """
        own = math.prod(shape[1:])
        drawn = torch.empty(shape[0], (own + 3) // 4, dtype=torch.int64, device=self.generators.device)
        for row, generator in zip(drawn, self.generators.each, strict=True):
            row.random_(-(2**63), None, generator=generator)
        kept = torch.empty(shape[0], own, device=drawn.device)
        return torch.ge(drawn.view(torch.int16)[:, :own], self._lowest, out=kept).view(shape)


class Norm(nn.Module):
    """Scale and shift of a layer norm."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))


class Linear(nn.Module):
    """A linear layer for each member; weights start as N(0, 0.02²), biases at 0."""

    def __init__(self, generators: Generators, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * generators.normal(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, outputs))

    def after(self, norm: Norm) -> Affine:
        """This layer after a norm's scale and shift: (x g + b) W + c = x (g W) + (b W + c)."""
        return Affine(torch.baddbmm(self.bias, norm.bias, self.weight), norm.weight.mT * self.weight)

    def scaled(self, inputs: float, outputs: float) -> Affine:
        """This layer with its inputs and its outputs multiplied by numbers."""
        return Affine(self.bias * outputs, self.weight * (inputs * outputs))


class Affine(NamedTuple):
    """Bias (members, 1, outputs) and weight (members, inputs, outputs) of a layer as it is used."""

    bias: torch.Tensor
    weight: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Maps (members, rows, inputs) to (members, rows, outputs)."""
        return torch.baddbmm(self.bias, rows, self.weight)


class BlockWeights(NamedTuple):
    """A block's layers as they are used."""

    qkv: Affine
    mix: Affine
    up: Affine
    down: Affine


class Block(nn.Module):
    """The weights of a pre-norm transformer block: causal self-attention, then a GELU layer of four times the width."""

    def __init__(self, generators: Generators, width: int, xavier: bool) -> None:
        super().__init__()
        self.norm_attention = Norm(len(generators), width)
        self.qkv = Linear(generators, width, 3 * width)
        if xavier:
            bound = (6 / (4 * width)) ** 0.5
            self.qkv.weight = nn.Parameter(generators.uniform(width, 3 * width, low=-bound, high=bound))
        self.mix = Linear(generators, width, width)
        self.norm_mlp = Norm(len(generators), width)
        self.up = Linear(generators, width, 4 * width)
        self.down = Linear(generators, 4 * width, width)

    def prepare(self, scale: float) -> BlockWeights:
        """Multiplies the norms, and dropout's scale of attention and of both residuals, into the layers."""
        qkv, up = self.qkv.after(self.norm_attention), self.up.after(self.norm_mlp)
        return BlockWeights(qkv, self.mix.scaled(scale, scale), up, self.down.scaled(1.0, scale))


class Attention(torch.autograd.Function):
    """Attention with dropout: softmax(q kᵀ / sqrt(d) + hidden) ∘ kept · v.

    PyTorch's fused attention has no dropout on a CPU, no generator to draw it from, and a slow gradient for sequences
    as short as these. ``rows`` are keys and values side by side, or queries, keys and values where ``query`` is None,
    (sequences, length, parts x width). ``hidden`` (queries, length) is -inf where a query must not look, ``kept``
    (sequences x heads, queries, length) is 0 where dropout strikes, or None. The result is (sequences, queries, width).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor | None,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        kept: torch.Tensor | None,
        heads: int,
    ) -> torch.Tensor:
        """Computes it."""
        parts = [] if query is None else _heads(query, 1, heads)
        parts += _heads(rows, 3 if query is None else 2, heads)
        weights = torch.softmax(torch.baddbmm(hidden, parts[0], parts[1].mT, alpha=parts[0].shape[-1] ** -0.5), dim=-1)
        dropped = weights if kept is None else weights * kept
        ctx.save_for_backward(*parts, weights, dropped, kept)
        ctx.heads, ctx.apart = heads, query is not None
        return _merged((dropped @ parts[2])[None], heads)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients by queries and rows."""
        with torch.autocast(gradients[0].device.type, enabled=False):
            return Attention._gradients(ctx, gradients[0])

    @staticmethod
    def _gradients(ctx: Any, by_seen: torch.Tensor) -> Any:
        query, key, value, weights, dropped, kept = ctx.saved_tensors
        (gradient,) = _heads(by_seen, 1, ctx.heads)
        scores = torch.bmm(gradient, value.mT)
        if kept is not None:
            scores.mul_(kept)
        scores = torch.ops.aten._softmax_backward_data(scores, weights, -1, weights.dtype)
        scores.mul_(query.shape[-1] ** -0.5)
        by_rows = torch.empty(2 if ctx.apart else 3, *key.shape, dtype=key.dtype, device=key.device)
        torch.bmm(scores.mT, query, out=by_rows[-2])
        torch.bmm(dropped.mT, gradient, out=by_rows[-1])
        if ctx.apart:
            return _merged(torch.bmm(scores, key)[None], ctx.heads), _merged(by_rows, ctx.heads), None, None, None
        torch.bmm(scores, key, out=by_rows[0])
        return None, _merged(by_rows, ctx.heads), None, None, None


def _heads(rows: torch.Tensor, parts: int, heads: int) -> list[torch.Tensor]:
    """(sequences, length, parts x width) as ``parts`` tensors (sequences x heads, length, width / heads)."""
    split = rows.view(*rows.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).contiguous()
    return list(split.flatten(1, 2).unbind(0))


def _merged(parts: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`_heads`."""
    split = parts.view(len(parts), -1, heads, *parts.shape[2:]).permute(1, 3, 0, 2, 4)
    return split.reshape(*split.shape[:2], -1)


def attend(
    query: torch.Tensor | None, rows: torch.Tensor, hidden: torch.Tensor, heads: int, drop: Dropout | None, members: int
) -> torch.Tensor:
    """Attention over (sequences of all members, length, parts x width); see :class:`Attention`."""
    if drop is not None or (rows.requires_grad and not rows.is_cuda):
        shape = (members, len(rows) // members * heads, *hidden.shape)
        kept = None if drop is None else drop.kept(shape).flatten(0, 1)
        # In float32 under autocast too: the gradient is written out, and mixes no types.
        with torch.autocast(rows.device.type, enabled=False):
            whole = None if query is None else query.float()
            attended: torch.Tensor = Attention.apply(  # type: ignore[no-untyped-call]
                whole, rows.float(), hidden, kept, heads
            )
        return attended
    parts = rows.unflatten(-1, (3 if query is None else 2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if query is not None:
        parts = (query.unflatten(-1, (heads, -1)).transpose(1, 2), *parts)
    first, key, value = parts
    mask = None if query is None else hidden
    seen = F.scaled_dot_product_attention(first, key, value, mask, is_causal=mask is None)
    return seen.transpose(1, 2).flatten(2)


def _rows(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])


def _joined(tokens: torch.Tensor, rows: torch.Tensor, drop: Dropout | None) -> torch.Tensor:
    """The residual sum; ``rows`` already have dropout's scale."""
    rows = rows.view(tokens.shape)
    return tokens + rows if drop is None else torch.addcmul(tokens, rows, drop.kept(tokens.shape))


class Prepared(NamedTuple):
    """The network's weights as they are used: norms and dropout's scale are multiplied in."""

    time: torch.Tensor
    embed: Affine
    shift: torch.Tensor
    factor: torch.Tensor
    blocks: tuple[BlockWeights, ...]
    action: Affine
    cost: Affine

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in a fixed order."""
        return list(_tensors(self))

    def detached(self) -> Prepared:
        """The same numbers without history, for gradients of their own."""
        found: Prepared = _detached(self)
        return found


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    else:
        for inner in part:
            yield from _tensors(inner)


def _detached(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.detach().requires_grad_()
    parts = [_detached(inner) for inner in part]
    return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)


class Transformer(nn.Module):
    """Predicts actions from the targets, states and actions so far.

    Every step is four tokens in the order return-to-go, cost-to-go, state, action, all with the
    embedding of the time step added. The action is read off the state token, so it depends on the
    past and on this step's targets and state; the step's cost is read off the action token.
    Sequences are padded on the right, where causality keeps the padding unseen.

    Args:
        generators: Source of the initial weights, one generator for each member.
        shape: Sizes.
        log_std_range: Bounds of the log standard deviation, None for none.
        xavier: Whether queries, keys and values start Xavier-uniform, as in PyTorch's own attention.
    """

    def __init__(
        self,
        generators: Generators,
        shape: Shape,
        log_std_range: tuple[float, float] | None = None,
        xavier: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.log_std_range = shape, log_std_range
        width = shape.width
        self.time = nn.Parameter(0.02 * generators.normal(shape.time_steps, width))
        self.return_token = Linear(generators, 1, width)
        self.cost_token = Linear(generators, 1, width)
        self.state_token = Linear(generators, shape.observation_dim, width)
        self.action_token = Linear(generators, shape.action_dim, width)
        self.norm_in = Norm(len(generators), width)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(generators, width, xavier) for _ in range(shape.layers)
        )
        self.norm_out = Norm(len(generators), width)
        self.action_head = Linear(generators, width, 2 * shape.action_dim)
        self.cost_head = Linear(generators, width, shape.cost_outputs)

    def prepare(self, drop: Dropout | None = None) -> Prepared:
        """The weights as :meth:`forward` uses them; ``drop`` is what it will be given."""
        scale, width = (1.0 if drop is None else drop.scale), self.shape.width
        layers = (self.return_token, self.cost_token, self.state_token, self.action_token)
        blocks = [F.pad(layer.weight, (i * width, (3 - i) * width)) for i, layer in enumerate(layers)]
        return Prepared(
            time=self.time.flatten(0, 1),
            embed=Affine(torch.cat([layer.bias for layer in layers], dim=-1), torch.cat(blocks, dim=1)),
            shift=(self.norm_in.bias * scale)[:, None, None],
            factor=(self.norm_in.weight * scale)[:, None, None],
            blocks=tuple(block.prepare(scale) for block in self.blocks),
            action=self.action_head.after(self.norm_out),
            cost=self.cost_head.after(self.norm_out),
        )

    def forward(
        self,
        inputs: torch.Tensor,
        times: torch.Tensor,
        drop: Dropout | None = None,
        costs: bool = True,
        weights: Prepared | None = None,
    ) -> Outputs:
        """Predicts every step's action and cost.

        Args:
            inputs: (members, batch, steps, 2 + observation_dim + action_dim): scaled return-to-go, transformed
                cost-to-go, observation, action. The last action does not matter to its own prediction.
            times: int64 (members, batch, steps), steps since the start of the episode.
            drop: In training, on the sequence, in attention and on residuals.
            costs: Whether costs are asked for.
            weights: Of :meth:`prepare`, where they are there already.
        """
        weights = self.prepare(drop) if weights is None else weights
        batch, steps = times.shape[1:]
        tokens = self._embedded(inputs, times, drop, weights)
        place = torch.arange(TOKENS * steps, device=inputs.device)
        hidden = torch.zeros(len(place), len(place), device=inputs.device)
        hidden.masked_fill_(place > place[:, None], -math.inf)
        read = _STATE_ACTION if costs else _STATE
        for number, block in enumerate(weights.blocks, start=1):
            last = number == len(weights.blocks)
            tokens = self._block(tokens, block, read if last else None, hidden, drop)
        normed = F.layer_norm(tokens, (self.shape.width,))
        mean, log_std = weights.action(_rows(normed[..., 0, :])).unflatten(1, (batch, steps)).chunk(2, dim=-1)
        if self.log_std_range is not None:
            log_std = log_std.clamp(*self.log_std_range)
        cost = weights.cost(_rows(normed[..., 1, :])).unflatten(1, (batch, steps)) if costs else None
        return Outputs(mean, log_std, cost)

    def member(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of one member, with the leading dimension kept."""
        return {name: value[number : number + 1] for name, value in self.state_dict().items()}

    def _embedded(
        self, inputs: torch.Tensor, times: torch.Tensor, drop: Dropout | None, weights: Prepared
    ) -> torch.Tensor:
        """Tokens (members, batch, steps, 4, width), all four kinds by one product with a block-diagonal matrix."""
        width = self.shape.width
        first = torch.arange(len(inputs), device=times.device)[:, None, None] * self.shape.time_steps
        moments = F.embedding(times + first, weights.time)
        embedded = weights.embed(_rows(inputs)).view(*times.shape, TOKENS, width) + moments.unsqueeze(-2)
        tokens = torch.addcmul(weights.shift, F.layer_norm(embedded, (width,)), weights.factor)
        return tokens if drop is None else tokens * drop.kept(tokens.shape)

    def _block(
        self,
        tokens: torch.Tensor,
        weights: BlockWeights,
        read: slice | None,
        hidden: torch.Tensor,
        drop: Dropout | None,
    ) -> torch.Tensor:
        """Maps (members, batch, steps, 4, width) to the same shape, or of the 4 only those in ``read``."""
        members, batch, steps, _, width = tokens.shape
        normed = F.layer_norm(tokens, (width,))
        bias, weight = weights.qkv
        if read is None:
            query, rows = None, weights.qkv(_rows(normed))
        else:
            query = torch.baddbmm(bias[..., :width], _rows(normed[..., read, :]), weight[..., :width])
            query = query.view(members * batch, -1, width)
            rows = torch.baddbmm(bias[..., width:], _rows(normed), weight[..., width:])
            tokens = tokens[..., read, :]
            hidden = hidden.view(steps, TOKENS, -1)[:, read].flatten(0, 1)
        rows = rows.view(members * batch, TOKENS * steps, -1)
        seen = attend(query, rows, hidden, self.shape.heads, drop, members).reshape(members, -1, width)
        tokens = _joined(tokens, weights.mix(seen), drop)
        between = F.gelu(weights.up(_rows(F.layer_norm(tokens, (width,)))))
        return _joined(tokens, weights.down(between), drop)
