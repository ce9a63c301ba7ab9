"""What BCQ-Lag, BEAR-Lag and CPQ share: settings, critics over many candidate actions, and how an action is chosen.

These methods evaluate ten actions for each state, and that is where their time goes. So nothing here is computed that
is not used: no gradients where none flow, no networks whose value is not asked for, and on CPUs one network after the
other in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from springhead.bounds import OutOfRange, above_zero, at_least, fraction
from springhead.rl.lagrangian import q_threshold
from springhead.rl.offline.batches import Batch, going_on
from springhead.rl.offline.contract import Member, Settings
from springhead.rl.offline.stacked import MLP, Values, pair
from springhead.rl.tasks import Task

BLOCK_SIZE = 131_072
"""Numbers per block of rows on CPUs; a layer's inputs and outputs then stay in the cache of one core."""


@dataclass(frozen=True, kw_only=True)
class CandidateSettings(Settings):
    """Hyper-parameters of the three methods; the defaults are those of OSRL's experiments."""

    discount: float = 0.99
    """Discount factor of rewards and costs."""
    tau: float = 0.005
    """How far the targets move at each step."""
    reward_scale: float = 0.1
    """Rewards are multiplied by this."""
    samples: int = 10
    """Actions evaluated for each state."""
    vae_hidden: tuple[int, ...] = (400, 400)
    """Sizes of the hidden layers of the action model."""
    vae_beta: float = 0.5
    """Weight of the divergence in the action model's loss."""
    actor_learning_rate: float = 1e-3
    """Of Adam, for the policy."""
    critic_learning_rate: float = 1e-3
    """Of Adam, for the critics of rewards and costs."""
    vae_learning_rate: float = 1e-3
    """Of Adam, for the action model."""
    timeouts: Literal["bootstrap", "terminal"] = "bootstrap"
    """Whether rewards go on after the horizon, or end there as in OSRL."""
    cost_terminals: Literal["end", "ignored"] = "end"
    """Whether costs end where the environment ended an episode, or never as in OSRL."""
    cost_ensemble: Literal["max", "min"] = "max"
    """Which cost critic counts: the most pessimistic, or the most hopeful as in OSRL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "tau", "reward_scale", "actor_learning_rate", "critic_learning_rate", "vae_learning_rate")
        at_least(1, self, "samples")
        at_least(0, self, "vae_beta")
        fraction(self, "discount", "tau")
        if not self.vae_hidden or min(self.vae_hidden) < 1:
            raise OutOfRange(f"vae_hidden is {list(self.vae_hidden)}; name at least one layer, of 1 or more units")


def thresholds(members: Sequence[Member], task: Task, settings: CandidateSettings) -> torch.Tensor:
    """The mean cost to go that each member's episode limit allows, (members,)."""
    limits = [member.cost_limit or 0.0 for member in members]
    return torch.tensor([q_threshold(limit, task.horizon, settings.discount) for limit in limits])


def goes_on(batch: Batch, settings: CandidateSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where rewards, and where costs, go on after a transition, and 0 where they end: (members, batch) each."""
    over = batch.terminals
    costs = torch.ones_like(over) if settings.cost_terminals == "ignored" else 1 - over
    return going_on(batch, settings.timeouts), costs


def each_with(observations: torch.Tensor, samples: int) -> torch.Tensor:
    """Repeats each observation for its candidates: (members, batch, width) to (members, batch * samples, width)."""
    return observations.unsqueeze(2).expand(-1, -1, samples, -1).flatten(1, 2)


@torch.no_grad()
def evaluate(net: MLP, inputs: torch.Tensor, only: Sequence[int] | None = None) -> torch.Tensor:
    """Evaluates networks without gradients, for many rows.

    Args:
        net: Networks of all members.
        inputs: (members, batch, input size).
        only: Positions in each member's ensemble; None for all.

    Returns:
        (members, networks, batch, output size).
    """
    chosen = list(range(net.ensemble)) if only is None else list(only)
    if inputs.device.type != "cpu":
        rows = inputs.unsqueeze(1).expand(-1, len(chosen), -1, -1).flatten(0, 1)
        for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            if len(chosen) < net.ensemble:
                weight, bias = (picked(value, net.ensemble, chosen) for value in (weight, bias))
            rows = _activate(net, layer, torch.baddbmm(bias, rows, weight))
        return rows.view(net.members, len(chosen), *rows.shape[1:])
    size, last = net.weights[-1].shape[-1], len(net.weights) - 1
    found = torch.empty(net.members, len(chosen), inputs.shape[1], size)
    step = max(BLOCK_SIZE // max(bias.shape[-1] for bias in net.biases), 1)
    for member in range(net.members):
        networks = [
            [(weight[number], bias[number, 0]) for weight, bias in zip(net.weights, net.biases, strict=True)]
            for number in (member * net.ensemble + position for position in chosen)
        ]
        for first in range(0, inputs.shape[1], step):
            block = inputs[member, first : first + step]
            for layers, ends in zip(networks, found[member, :, first : first + step].unbind(0), strict=True):
                rows = block
                for layer, (weight, bias) in enumerate(layers[:-1]):
                    rows = _activate(net, layer, torch.addmm(bias, rows, weight))
                weight, bias = layers[-1]
                if size == 1:
                    torch.addmv(bias, rows, weight[:, 0], out=ends[:, 0])
                else:
                    _activate(net, last, torch.addmm(bias, rows, weight, out=ends))
    return found


def picked(values: torch.Tensor, ensemble: int, chosen: Sequence[int]) -> torch.Tensor:
    """Some networks of each member's ensemble: (members * ensemble, ...) to (members * chosen, ...).

    By slices: indexing with a list copies it to the device, and the host waits.
    """
    return torch.stack([values[position::ensemble] for position in chosen], dim=1).flatten(0, 1)


def _activate(net: MLP, layer: int, rows: torch.Tensor) -> torch.Tensor:
    if layer == len(net.weights) - 1:
        return rows.tanh_() if net.output == "tanh" else rows
    return rows.relu_() if net.activation == "relu" else rows.tanh_()


def choose(rewards: torch.Tensor, costs: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """The candidate to take: of those whose cost value keeps the threshold the best, else the one that costs least.

    Args:
        rewards: Values of rewards (..., candidates).
        costs: Values of costs, likewise.
        threshold: What costs may be, broadcast to them.

    Returns:
        Positions (...,), int64.
    """
    keeps = costs <= threshold
    best = rewards.masked_fill(~keeps, -torch.inf).argmax(-1)
    return torch.where(keeps.any(-1), best, costs.argmin(-1))


def mixed(values: torch.Tensor, weight: float, pessimistic: Literal["min", "max"], groups: int = 2) -> torch.Tensor:
    """The soft minimum of clipped double Q-learning (Fujimoto et al. 2019, equation 13) over groups of networks.

    Args:
        values: (members, networks, batch), the groups one after the other.
        weight: Of the lower group against the higher.
        pessimistic: Which value of a group's networks counts. "max" mirrors all: then the weight is of the higher.
        groups: How many.

    Returns:
        (members, batch).
    """
    parts = values.unflatten(1, (groups, -1))
    low, high = (parts.amin(2) if pessimistic == "min" else parts.amax(2)).aminmax(dim=1)
    mix: torch.Tensor = low.lerp(high, 1 - weight if pessimistic == "min" else weight)
    return mix


def extremes(net: Values, inputs: torch.Tensor, parts: Sequence[tuple[int, int, bool]]) -> torch.Tensor:
    """Smallest or largest values among some networks of each ensemble, with gradients to the inputs alone.

    The gradient of an extreme reaches only the network that attains it. On CPUs each network goes backward over its own
    rows; elsewhere finding those rows would make the host wait, and all go backward over all rows.

    Args:
        net: With ReLU between the layers.
        inputs: (members, batch, input size).
        parts: For each wanted value: first network, one after the last, and whether the largest counts.

    Returns:
        (members, parts, batch).
    """
    if inputs.device.type != "cpu":
        values = net(inputs, frozen=True)
        return torch.stack([values[:, a:b].amax(1) if top else values[:, a:b].amin(1) for a, b, top in parts], dim=1)
    layers = [value.detach() for value in (*net.weights, *net.biases)]
    found: torch.Tensor = _Extremes.apply(inputs, net.ensemble, tuple(parts), *layers)
    return found


class _Extremes(torch.autograd.Function):
    """:func:`extremes` with its gradient written out."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, ensemble: int, parts: tuple[tuple[int, int, bool], ...], *layers: torch.Tensor
    ) -> torch.Tensor:
        """Evaluates each network that is asked for."""
        depth = len(layers) // 2
        hidden: dict[int, list[torch.Tensor]] = {}
        values = torch.zeros(len(inputs), ensemble, inputs.shape[1])
        for member in range(len(inputs)):
            for number in sorted({number for a, b, _ in parts for number in range(a, b)}):
                network, rows = member * ensemble + number, inputs[member]
                kept = hidden[network] = []
                for layer in range(depth - 1):
                    rows = torch.addmm(layers[depth + layer][network], rows, layers[layer][network]).relu_()
                    kept.append(rows)
                bias = layers[-1][network][0]
                values[member, number] = torch.addmv(bias, rows, layers[depth - 1][network][:, 0])
        ends = [values[:, a:b].max(1) if top else values[:, a:b].min(1) for a, b, top in parts]
        ctx.ensemble, ctx.parts, ctx.hidden, ctx.layers, ctx.shape = (
            ensemble,
            parts,
            hidden,
            layers[:depth],
            inputs.shape,
        )
        ctx.owners = [end.indices + a for end, (a, _, _) in zip(ends, parts, strict=True)]
        return torch.stack([end.values for end in ends], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Each network goes backward over the rows where it is the extreme."""
        found = torch.zeros(ctx.shape)
        for (part, (a, b, _)), (network, kept) in itertools.product(enumerate(ctx.parts), ctx.hidden.items()):
            member, number = divmod(network, ctx.ensemble)
            if a <= number < b:
                rows = (ctx.owners[part][member] == number).nonzero().squeeze(1)
                slope = torch.outer(gradient[member, part, rows], ctx.layers[-1][network][:, 0])
                for weights, active in zip(ctx.layers[-2::-1], reversed(kept), strict=True):
                    slope = torch.mm(slope.mul_(active[rows] > 0), weights[network].T)
                found[member].index_add_(0, rows, slope)
        return found, None, None, *([None] * (2 * len(ctx.layers)))


def with_actions(observations: torch.Tensor, actions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Observations beside the chosen of their candidates, the input of a critic.

    Args:
        observations: (members, batch, observation_dim).
        actions: (members, batch * candidates, action_dim).
        chosen: Positions among the candidates, (members, batch).
    """
    each = actions.unflatten(1, (observations.shape[1], -1))
    index = chosen[..., None, None].expand(-1, -1, 1, each.shape[-1])
    return pair(observations, each.gather(2, index).squeeze(2))
