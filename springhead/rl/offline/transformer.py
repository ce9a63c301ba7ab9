"""The Constrained Decision Transformer's network: a causal transformer over (return, cost, state, action) tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

LOG_STD_RANGE = (-5.0, 2.0)
"""Bounds of the log standard deviation. The released code declares bounds and leaves them unused; without
any, a deterministic data set drives the likelihood to infinity."""


class Outputs(NamedTuple):
    """What the network predicts at each step.

    Attributes:
        mean: (batch, steps, action_dim), of the action.
        log_std: (batch, steps, action_dim).
        cost: (batch, steps, 2) logits of "this step costs", or (batch, steps, 1) the cost itself.
    """

    mean: torch.Tensor
    log_std: torch.Tensor
    cost: torch.Tensor


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a GELU layer of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length, width) to the same shape; position i sees positions up to i."""
        batch, length, width = tokens.shape
        qkv = self.qkv(self.norm_attention(tokens)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        drop = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        seen = self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        tokens = tokens + F.dropout(seen, self.dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.norm_mlp(tokens))))
        return tokens + F.dropout(hidden, self.dropout, self.training)


class Transformer(nn.Module):
    """Predicts actions from the targets, states and actions so far.

    Every step is four tokens in the order return-to-go, cost-to-go, state, action, all with the
    embedding of the time step added. The action is read off the state token, so it depends on the
    past and on this step's targets and state; the step's cost is read off the action token.
    Sequences are padded on the right, where causality keeps the padding unseen.

    Args:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        time_steps: Size of the table of time embeddings; later steps share its last entry.
        width: Token width, a multiple of ``heads``.
        layers: Number of blocks.
        heads: Attention heads.
        dropout: Probability, on the sequence, in attention and on residuals.
        cost_outputs: 2 for binary step costs (logits), 1 for continuous ones.
        generator: Source of the initial weights, N(0, 0.02²); biases start at 0.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        time_steps: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        cost_outputs: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.time = nn.utils.skip_init(nn.Embedding, time_steps, width)
        self.return_token = nn.Linear(1, width)
        self.cost_token = nn.Linear(1, width)
        self.state_token = nn.Linear(observation_dim, width)
        self.action_token = nn.Linear(action_dim, width)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.action_head = nn.Linear(width, 2 * action_dim)
        self.cost_head = nn.Linear(width, cost_outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        returns: torch.Tensor,
        costs: torch.Tensor,
        observations: torch.Tensor,
        actions: torch.Tensor,
        times: torch.Tensor,
    ) -> Outputs:
        """Predicts every step's action and cost.

        Args:
            returns: (batch, steps), return-to-go, scaled.
            costs: (batch, steps), cost-to-go, transformed.
            observations: (batch, steps, observation_dim).
            actions: (batch, steps, action_dim); the last may be anything if only its action is asked for.
            times: int64 (batch, steps), steps since the start of the episode.
        """
        batch, steps = returns.shape
        embedded = torch.stack(
            [
                self.return_token(returns[..., None]),
                self.cost_token(costs[..., None]),
                self.state_token(observations),
                self.action_token(actions),
            ],
            dim=2,
        )
        embedded = embedded + self.time(times.clamp(max=self.time.num_embeddings - 1))[:, :, None]
        tokens = F.dropout(self.norm_in(embedded.flatten(1, 2)), self.dropout, self.training)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm_out(tokens).view(batch, steps, 4, -1)
        mean, log_std = self.action_head(tokens[:, :, 2]).chunk(2, dim=-1)
        return Outputs(mean, log_std.clamp(*LOG_STD_RANGE), self.cost_head(tokens[:, :, 3]))
