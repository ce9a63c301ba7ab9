"""Networks of several members, or ensembles of them, evaluated side by side: one batched product per layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from springhead.rl.offline.contract import Generators

Activation = Literal["relu", "tanh"]
Output = Literal["none", "tanh"]


class MLP(nn.Module):
    """One multi-layer perceptron for each member, or ``ensemble`` of them.

    Args:
        generators: Source of the initial weights and biases, uniform within ±1/sqrt(inputs) as PyTorch's own layers.
        sizes: Input size, hidden sizes, output size.
        ensemble: Networks per member; more than 1 adds a dimension to the output.
        activation: Between the layers.
        output: After the last layer.
        last_bound: Bound of the last layer's weights and biases instead of 1/sqrt(inputs).
    """

    def __init__(
        self,
        generators: Generators,
        sizes: Sequence[int],
        ensemble: int = 1,
        activation: Activation = "relu",
        output: Output = "none",
        last_bound: float | None = None,
    ) -> None:
        super().__init__()
        self.members, self.ensemble, self.activation, self.output = len(generators), ensemble, activation, output
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        layers = list(itertools.pairwise(sizes))
        for layer, (inputs, outputs) in enumerate(layers):
            last = layer == len(layers) - 1
            bound = last_bound if last and last_bound is not None else inputs**-0.5
            drawn = generators.uniform(ensemble, inputs + 1, outputs, low=-bound, high=bound)
            self.weights.append(nn.Parameter(drawn[:, :, :-1].flatten(0, 1).contiguous()))
            self.biases.append(nn.Parameter(drawn[:, :, -1:].flatten(0, 1).contiguous()))

    def forward(self, inputs: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """Evaluates all networks.

        Args:
            inputs: (members, batch, input size).
            frozen: Lets gradients flow to the inputs, but not to the weights.

        Returns:
            (members, batch, output size), for an ensemble (members, ensemble, batch, output size).
        """
        rows, last = inputs, len(self.weights) - 1
        if self.ensemble > 1:
            rows = rows.unsqueeze(1).expand(-1, self.ensemble, -1, -1).flatten(0, 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            if weight.shape[-1] == 1:  # batched products are slow where there is one column, several times on CPUs
                # Not a product that autocast knows, so the types are made alike here.
                rows = torch.linalg.vecdot(rows, weight.mT.to(rows.dtype)).unsqueeze(-1) + bias
            else:
                rows = torch.baddbmm(bias, rows, weight)
            # In place: neither the product nor the activation needs its own input for the gradient.
            if layer < last:
                rows = rows.relu_() if self.activation == "relu" else rows.tanh_()
            elif self.output == "tanh":
                rows = rows.tanh_()
        return rows.unflatten(0, (self.members, self.ensemble)) if self.ensemble > 1 else rows

    def member(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of one member, with the leading dimension kept: ``weights.0``, ``biases.0`` and so on."""
        own = slice(number * self.ensemble, (number + 1) * self.ensemble)
        return {name: value[own] for name, value in self.state_dict().items()}


class Values(MLP):
    """An ensemble of networks of one output, for critics: values instead of rows.

    Args:
        generators: Source of the initial weights.
        sizes: Input size and hidden sizes.
        ensemble: Networks per member.
        activation: Between the layers.
        last_bound: As for :class:`MLP`.
    """

    def __init__(
        self,
        generators: Generators,
        sizes: Sequence[int],
        ensemble: int = 2,
        activation: Activation = "relu",
        last_bound: float | None = None,
    ) -> None:
        super().__init__(generators, [*sizes, 1], ensemble, activation, last_bound=last_bound)

    def forward(self, inputs: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """Maps (members, batch, input size) to values (members, ensemble, batch)."""
        values = super().forward(inputs, frozen).squeeze(-1)
        return values if self.ensemble > 1 else values.unsqueeze(1)


def polyak(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Moves a target network towards its source: target <- (1 - rate) target + rate source."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def frozen_copy(module: nn.Module, make: nn.Module) -> nn.Module:
    """Puts a module's weights into another of its shape that takes no gradients, for a target network.

    Args:
        module: Where the weights come from.
        make: A module of the same shape.

    Returns:
        ``make``.
    """
    make.load_state_dict(module.state_dict())
    return make.requires_grad_(False)


def clip_members(parameters: Iterable[nn.Parameter], members: int, largest: float) -> torch.Tensor:
    """Scales gradients so that no member's norm is above a bound.

    Args:
        parameters: Parameters with the members, or ensembles of them, as leading dimension.
        members: Number of members.
        largest: The bound.

    Returns:
        The norms before, (members,).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = [gradient.reshape(members, -1).square().sum(1) for gradient in gradients]
    norms = torch.stack(squares).sum(0).sqrt()
    scale = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        rows = gradient.view(members, -1)
        rows.mul_(scale[:, None])
    return norms


def pair(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Observations and actions side by side, the input of a critic."""
    return torch.cat([observations, actions], dim=-1)
