"""Sequences for the Constrained Decision Transformer, drawn from data that stay in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from springhead.errors import BadInput
from springhead.rl.offline.batches import Flat
from springhead.rl.offline.relabelling import Items


@dataclass(frozen=True)
class Scheme:
    """How sequences are drawn and scaled.

    Attributes:
        batch_size: Sequences per batch.
        context: Steps of a sequence.
        return_scale: Return tokens are the return-to-go times this.
        cost_scale: Cost tokens are multiplied by this.
        cost_reference: Cost tokens see this less the cost-to-go.
        sampling_cap: Items are drawn in proportion to this less their target cost.
        device: The torch device that holds the data.
    """

    batch_size: int
    context: int
    return_scale: float
    cost_scale: float
    cost_reference: float
    sampling_cap: float
    device: str


class Batch(NamedTuple):
    """Sequences of ``context`` steps; ``mask`` is 1 where a step exists and 0 on the padding."""

    returns: torch.Tensor
    costs: torch.Tensor
    observations: torch.Tensor
    actions: torch.Tensor
    times: torch.Tensor
    step_costs: torch.Tensor
    mask: torch.Tensor


class Sampler:
    """Draws sequences from data that stay in memory on the device.

    An item is drawn in proportion to max(0, cap - target cost), then a first step uniformly from its
    episode. Relabelling shifts an episode's whole return-to-go and cost-to-go so that they start at the
    item's targets; rewards and costs of the steps stay.
    """

    def __init__(self, data: Flat, items: Items, scheme: Scheme) -> None:
        cap, reference, to = scheme.sampling_cap, scheme.cost_reference, torch.device(scheme.device)
        weights = np.maximum(cap - items.target_cost, 0.0)
        if not weights.any():
            raise BadInput(
                f"cdt: no episode costs less than the sampling cap {cap:g} (the cheapest costs "
                f"{items.target_cost.min():g}); collect safer episodes or raise rl.train.cdt.sampling_cap"
            )
        self.scheme, self.device = scheme, to
        self.weights = torch.from_numpy(np.cumsum(weights / weights.sum()))
        self.episode = torch.from_numpy(items.episode)
        self.starts, self.lengths = data.starts, data.lengths
        self.return_shift = torch.from_numpy(items.target_return - data.returns[items.episode]).float()
        self.cost_shift = torch.from_numpy(items.target_cost - data.cost_returns[items.episode]).float()
        pad = scheme.context
        returns_to_go = to_go(data.rewards, data.lengths) * scheme.return_scale
        self.returns = F.pad(returns_to_go, (0, pad)).to(to)
        self.costs = F.pad((reference - to_go(data.costs, data.lengths)) * scheme.cost_scale, (0, pad)).to(to)
        self.observations = F.pad(data.observations, (0, 0, 0, pad)).to(to)
        self.actions = F.pad(data.actions, (0, 0, 0, pad)).to(to)
        self.step_costs = F.pad(data.costs, (0, pad)).to(to)

    def draw(self, generator: torch.Generator) -> Batch:
        """Draws one batch; ``generator`` is a CPU generator on every device."""
        scheme = self.scheme
        size, context = scheme.batch_size, scheme.context
        uniform = torch.rand(2, size, generator=generator, dtype=torch.float64)
        item = torch.searchsorted(self.weights, uniform[0], right=True).clamp(max=len(self.weights) - 1)
        episode = self.episode[item]
        first = (uniform[1] * self.lengths[episode]).long()
        steps = torch.arange(context)
        times = first[:, None] + steps
        mask = (times < self.lengths[episode][:, None]).float().to(self.device)
        rows = (self.starts[episode][:, None] + times).to(self.device)
        up = (self.return_shift[item] * scheme.return_scale)[:, None].to(self.device)
        less = (self.cost_shift[item] * scheme.cost_scale)[:, None].to(self.device)
        return Batch(
            returns=(self.returns[rows] + up) * mask,
            costs=(self.costs[rows] - less) * mask,
            observations=self.observations[rows] * mask[..., None],
            actions=self.actions[rows] * mask[..., None],
            times=times.to(self.device),
            step_costs=self.step_costs[rows],
            mask=mask,
        )


def to_go(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns, for each step, the sum of its episode's values from it on.

    Args:
        values: float32 (N,), episodes one after the other.
        lengths: int64 (episodes,).
    """
    spans = values.double().split(lengths.tolist())
    return torch.cat([span.flip(0).cumsum(0).flip(0) for span in spans]).float()
