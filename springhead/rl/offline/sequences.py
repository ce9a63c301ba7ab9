"""Sequences for the Constrained Decision Transformer, drawn from data that stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from springhead.errors import BadInput
from springhead.rl.offline.batches import Flat
from springhead.rl.offline.contract import Generators
from springhead.rl.offline.relabelling import Items


@dataclass(frozen=True)
class Scheme:
    """How sequences are drawn and scaled.

    Attributes:
        batch_size: Sequences per batch and member.
        context: Steps of a sequence.
        return_scale: Return tokens are the return-to-go times this.
        cost_scale: Cost tokens are multiplied by this.
        cost_reference: Cost tokens see this less the cost-to-go.
        sampling_cap: Items are drawn in proportion to this less their target cost.
    """

    batch_size: int
    context: int
    return_scale: float
    cost_scale: float
    cost_reference: float
    sampling_cap: float


class Batch(NamedTuple):
    """Sequences of ``context`` steps for each member.

    Attributes:
        inputs: (members, batch, steps, 2 + observation_dim + action_dim): return token, cost token, observation,
            action; 0 on the padding.
        actions: (members, batch, steps, action_dim), the last columns of ``inputs``.
        step_costs: (members, batch, steps).
        times: int64 (members, batch, steps), steps since the start of the episode.
        mask: (members, batch, steps), 1 where a step exists and 0 on the padding.
    """

    inputs: torch.Tensor
    actions: torch.Tensor
    step_costs: torch.Tensor
    times: torch.Tensor
    mask: torch.Tensor

    def slices(self, size: int) -> Iterator[Batch]:
        """The batch in parts of ``size`` sequences per member, the last one smaller where that must be."""
        for parts in zip(*(values.split(size, dim=1) for values in self), strict=True):
            yield Batch(*parts)


class Sampler:
    """Draws sequences from data that stay in memory on the device: one gather per batch.

    An item is drawn in proportion to max(0, cap - target cost), then a first step uniformly from its
    episode. Relabelling shifts an episode's whole return-to-go and cost-to-go so that they start at the
    item's targets; rewards and costs of the steps stay.

    Attributes:
        longest: Steps of the longest episode that is ever drawn.

    Args:
        data: The data set.
        items: What each member samples.
        scheme: See :class:`Scheme`.
        generators: The members' random numbers, on the device that shall hold the data.

    Raises:
        BadInput: If no item of a member costs less than the sampling cap.
    """

    def __init__(self, data: Flat, items: Sequence[Items], scheme: Scheme, generators: Generators) -> None:
        self.scheme, self.generators = scheme, generators
        self._split = (2 + data.observations.shape[1] + data.actions.shape[1], 1)
        self._action_dim = data.actions.shape[1]
        table = torch.cat(
            [
                to_go(data.rewards, data.lengths)[:, None] * scheme.return_scale,
                (scheme.cost_reference - to_go(data.costs, data.lengths)[:, None]) * scheme.cost_scale,
                data.observations,
                data.actions,
                data.costs[:, None],
            ],
            dim=1,
        )
        device = generators.device
        self._table = F.pad(table, (0, 0, 0, scheme.context)).to(device)
        # One row for each member; rows end with items that are never drawn.
        number = max(len(own.episode) for own in items)
        sums = np.ones((len(items), number))
        starts, lengths = np.zeros((2, len(items), number), dtype=np.int64)
        shifts = np.zeros((len(items), number, 2), dtype=np.float32)
        self.longest = 0
        for row, own in enumerate(items):
            weights = np.maximum(scheme.sampling_cap - own.target_cost, 0.0)
            if not weights.any():
                raise BadInput(
                    f"cdt: no episode costs less than the sampling cap {scheme.sampling_cap:g} (the cheapest costs "
                    f"{own.target_cost.min():g}); collect safer episodes or raise sampling_cap in rl.train"
                )
            some = slice(len(own.episode))
            sums[row, some] = np.cumsum(weights / weights.sum())
            starts[row, some] = data.starts.numpy()[own.episode]
            lengths[row, some] = data.lengths.numpy()[own.episode]
            self.longest = max(self.longest, int(lengths[row, some][weights > 0].max()))
            shifts[row, some, 0] = (own.target_return - data.returns[own.episode]) * scheme.return_scale
            shifts[row, some, 1] = (data.cost_returns[own.episode] - own.target_cost) * scheme.cost_scale
        self._last = torch.tensor([[len(own.episode) - 1] for own in items], device=device)
        self._sums, self._starts = torch.from_numpy(sums).to(device), torch.from_numpy(starts).to(device)
        self._lengths, self._shifts = torch.from_numpy(lengths).to(device), torch.from_numpy(shifts).to(device)
        self._steps = torch.arange(scheme.context, device=device)

    def draw(self) -> Batch:
        """Draws one batch for each member, with replacement."""
        first, second = self.generators.uniform(2, self.scheme.batch_size).double().unbind(1)
        item = torch.minimum(torch.searchsorted(self._sums, first.contiguous(), right=True), self._last)
        length = self._lengths.gather(1, item)
        start = torch.minimum((second * length).long(), length - 1)
        times = start[..., None] + self._steps
        mask = (times < length[..., None]).float()
        rows = self._table[self._starts.gather(1, item)[..., None] + times]
        rows[..., :2] += self._shifts[torch.arange(len(item), device=item.device)[:, None], item][:, :, None]
        inputs, costs = rows.mul_(mask[..., None]).split(self._split, dim=-1)
        return Batch(inputs, inputs[..., -self._action_dim :], costs.squeeze(-1), times, mask)


def to_go(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns, for each step, the sum of its episode's values from it on.

    Args:
        values: float32 (N,), episodes one after the other.
        lengths: int64 (episodes,).
    """
    spans = values.double().split(lengths.tolist())
    return torch.cat([span.flip(0).cumsum(0).flip(0) for span in spans]).float()
