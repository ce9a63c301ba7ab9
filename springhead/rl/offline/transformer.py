"""The Constrained Decision Transformer's network, for several members side by side.

A causal transformer over (return, cost, state, action) tokens. Every weight has a leading member dimension and every
layer is one batched product. Two things are arranged for speed and change nothing but rounding: the scale and shift of
a layer norm are multiplied into the layer that follows it, and the last block computes queries, and all that follows,
only for the state and action tokens: nothing is read off the other two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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
        time_steps: Size of the table of time embeddings; later steps share its last entry.
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
    """Dropout of which each member draws its own, from generators that checkpoints hold.

    Args:
        share: Probability that an entry is dropped.
        generators: The members' random numbers.
    """

    def __init__(self, share: float, generators: Generators) -> None:
        self.share, self.generators = share, generators

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Drops entries of (members, ...) and scales up the others."""
        kept = torch.empty_like(values)
        for own, generator in zip(kept, self.generators.each, strict=True):
            own.bernoulli_(1.0 - self.share, generator=generator)
        return values * kept.div_(1.0 - self.share)


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

    def after(self, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias and weight of this layer after a norm's scale and shift: (x g + b) W + c = x (g W) + (b W + c)."""
        return torch.baddbmm(self.bias, norm.bias, self.weight), norm.weight.mT * self.weight


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a GELU layer of four times the width."""

    def __init__(self, generators: Generators, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = Norm(len(generators), width)
        self.qkv = Linear(generators, width, 3 * width)
        self.mix = Linear(generators, width, width)
        self.norm_mlp = Norm(len(generators), width)
        self.up = Linear(generators, width, 4 * width)
        self.down = Linear(generators, 4 * width, width)

    def forward(self, tokens: torch.Tensor, read: slice | None, drop: Dropout | None) -> torch.Tensor:
        """Maps (members, batch, steps, 4, width) to the same shape, or of the 4 only those in ``read``."""
        members, batch, steps, _, width = tokens.shape
        normed = F.layer_norm(tokens, (width,))
        bias, weight = self.qkv.after(self.norm_attention)
        if read is not None:
            query = torch.baddbmm(bias[..., :width], _rows(normed[..., read, :]), weight[..., :width])
            key, value = torch.baddbmm(bias[..., width:], _rows(normed), weight[..., width:]).chunk(2, dim=-1)
            tokens = tokens[..., read, :]
        else:
            query, key, value = torch.baddbmm(bias, _rows(normed), weight).chunk(3, dim=-1)
        split = (members * batch, -1, self.heads, width // self.heads)
        query, key, value = (rows.reshape(split).transpose(1, 2) for rows in (query, key, value))
        seen = _attention(query, key, value, steps, read, members, drop)
        seen = seen.transpose(1, 2).reshape(members, -1, width)
        mixed = torch.baddbmm(self.mix.bias, seen, self.mix.weight).view(tokens.shape)
        tokens = tokens + (mixed if drop is None else drop(mixed))
        bias, weight = self.up.after(self.norm_mlp)
        hidden = F.gelu(torch.baddbmm(bias, _rows(F.layer_norm(tokens, (width,))), weight))
        down = torch.baddbmm(self.down.bias, hidden, self.down.weight).view(tokens.shape)
        return tokens + (down if drop is None else drop(down))


def _rows(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    steps: int,
    read: slice | None,
    members: int,
    drop: Dropout | None,
) -> torch.Tensor:
    """Causal attention, (members x batch, heads, length, width / heads); queries may be of some tokens alone."""
    if drop is None and read is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    place = torch.arange(TOKENS * steps, device=query.device)
    later = place > place.view(steps, TOKENS)[:, read or slice(TOKENS)].reshape(-1, 1)
    hidden = torch.zeros(later.shape, device=query.device).masked_fill_(later, -math.inf)
    if drop is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=hidden)
    scores = torch.softmax(query @ key.mT * (query.shape[-1] ** -0.5) + hidden, dim=-1)
    return drop(scores.unflatten(0, (members, -1))).flatten(0, 1) @ value


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
    """

    def __init__(self, generators: Generators, shape: Shape, log_std_range: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.shape, self.log_std_range = shape, log_std_range
        width = shape.width
        self.time = nn.Parameter(0.02 * generators.normal(shape.time_steps, width))
        self.return_token = Linear(generators, 1, width)
        self.cost_token = Linear(generators, 1, width)
        self.state_token = Linear(generators, shape.observation_dim, width)
        self.action_token = Linear(generators, shape.action_dim, width)
        self.norm_in = Norm(len(generators), width)
        self.blocks = nn.ModuleList(Block(generators, width, shape.heads) for _ in range(shape.layers))
        self.norm_out = Norm(len(generators), width)
        self.action_head = Linear(generators, width, 2 * shape.action_dim)
        self.cost_head = Linear(generators, width, shape.cost_outputs)

    def forward(
        self, inputs: torch.Tensor, times: torch.Tensor, drop: Dropout | None = None, costs: bool = True
    ) -> Outputs:
        """Predicts every step's action and cost.

        Args:
            inputs: (members, batch, steps, 2 + observation_dim + action_dim): scaled return-to-go, transformed
                cost-to-go, observation, action. The last action does not matter to its own prediction.
            times: int64 (members, batch, steps), steps since the start of the episode.
            drop: In training, on the sequence, in attention and on residuals.
            costs: Whether costs are asked for.
        """
        read, heads = (_STATE_ACTION, (self.action_head, self.cost_head)) if costs else (_STATE, (self.action_head,))
        tokens = self._embedded(inputs, times)
        if drop is not None:
            tokens = drop(tokens)
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, read if number == len(self.blocks) else None, drop)
        normed = F.layer_norm(tokens, (self.shape.width,))
        outputs = []
        for place, head in enumerate(heads):
            bias, weight = head.after(self.norm_out)
            outputs.append(torch.baddbmm(bias, _rows(normed[..., place, :]), weight).unflatten(1, inputs.shape[1:3]))
        mean, log_std = outputs[0].chunk(2, dim=-1)
        if self.log_std_range is not None:
            log_std = log_std.clamp(*self.log_std_range)
        return Outputs(mean, log_std, outputs[1] if costs else None)

    def member(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of one member, with the leading dimension kept."""
        return {name: value[number : number + 1] for name, value in self.state_dict().items()}

    def _embedded(self, inputs: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Tokens (members, batch, steps, 4, width), all four kinds by one product with a block-diagonal matrix."""
        members, width = len(inputs), self.shape.width
        layers = (self.return_token, self.cost_token, self.state_token, self.action_token)
        blocks = [F.pad(layer.weight, (i * width, (3 - i) * width)) for i, layer in enumerate(layers)]
        bias = torch.cat([layer.bias for layer in layers], dim=-1)
        embedded = torch.baddbmm(bias, _rows(inputs), torch.cat(blocks, dim=1)).view(*inputs.shape[:3], TOKENS, width)
        last = self.shape.time_steps - 1
        first = torch.arange(members, device=times.device)[:, None, None] * (last + 1)
        moments = F.embedding(times.clamp(max=last) + first, self.time.flatten(0, 1))
        normed = F.layer_norm(embedded + moments.unsqueeze(-2), (width,))
        return torch.addcmul(self.norm_in.bias[:, None, None], normed, self.norm_in.weight[:, None, None])
