"""The smallest value of ensembles of networks, with gradients that cost half as much for two networks.

The gradient of a minimum reaches only the network that attains it. Automatic differentiation takes the other rows
through every layer as zeros; here each network goes backward over its own rows. The rows are found by looking at the
values, which on a GPU would make the host wait, so there the plain way is taken.
"""

from __future__ import annotations

from typing import Any

import torch

from springhead.rl.offline.stacked import Values


def least(networks: Values, inputs: torch.Tensor, groups: int) -> torch.Tensor:
    """Smallest values within groups of an ensemble.

    Args:
        networks: With ReLU between the layers; the ensemble is ``groups`` groups of equal size.
        inputs: (members, batch, input size), without gradient.
        groups: How many.

    Returns:
        (members, groups, batch).
    """
    if inputs.device.type != "cpu":
        every: torch.Tensor = networks(inputs).unflatten(1, (groups, -1)).amin(2)
        return every
    found: torch.Tensor = _Least.apply(inputs, groups, networks.ensemble, *networks.weights, *networks.biases)
    return found


class _Least(torch.autograd.Function):
    """:func:`least` with the gradient for weights and biases written out."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, groups: int, ensemble: int, *tensors: torch.Tensor) -> torch.Tensor:
        """Evaluates one network after the other; their activations then stay in the cache."""
        layers = len(tensors) // 2
        weights, biases = tensors[:layers], tensors[layers:]
        hidden: list[list[torch.Tensor]] = []
        values = inputs.new_empty(len(inputs) * ensemble, inputs.shape[1])
        for network in range(len(values)):
            rows, kept = inputs[network // ensemble], []
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                rows = torch.addmm(bias[network], rows, weight[network]).relu_()
                kept.append(rows)
            values[network] = torch.addmv(biases[-1][network, 0], rows, weights[-1][network, :, 0])
            hidden.append(kept)
        smallest, which = values.view(len(inputs), groups, -1, inputs.shape[1]).min(2)
        ctx.inputs, ctx.weights, ctx.hidden, ctx.which, ctx.ensemble = inputs, weights, hidden, which, ensemble
        return smallest

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Takes each network's own rows back through its layers."""
        (slope,) = slopes
        weights, ensemble = ctx.weights, ctx.ensemble
        size = ensemble // slope.shape[1]
        of_weights = [torch.empty_like(weight) for weight in weights]
        of_biases = [weight.new_empty(len(weight), 1, weight.shape[2]) for weight in weights]
        for network, hidden in enumerate(ctx.hidden):
            member, group, place = network // ensemble, network % ensemble // size, network % size
            own = (ctx.which[member, group] == place).nonzero().squeeze(1)
            part = slope[member, group].index_select(0, own)[:, None]
            into = [each.index_select(0, own) for each in (ctx.inputs[member], *hidden)]
            for layer in range(len(weights) - 1, -1, -1):
                torch.mm(into[layer].t(), part, out=of_weights[layer][network])
                torch.sum(part, 0, keepdim=True, out=of_biases[layer][network])
                if layer:
                    # Where ReLU let nothing through, its output is 0.
                    part = torch.mm(part, weights[layer][network].t())
                    part = torch.ops.aten.threshold_backward(part, into[layer], 0.0)
        return None, None, None, *of_weights, *of_biases
