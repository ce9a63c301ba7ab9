"""Networks of the online algorithms, in torch for training; :mod:`springhead.rl.acting` is how they act."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from springhead.rl.acting import (
    LOG_STD_RANGE,
    Activation,
    ExpertConfig,
    ExpertPolicy,
    Floats,
    Head,
    episode_noise,
    load_expert,
    save_expert,
)

__all__ = [
    "LOG_STD_RANGE",
    "Ensemble",
    "ExpertConfig",
    "ExpertPolicy",
    "GaussianActor",
    "Moments",
    "episode_noise",
    "load_expert",
    "mlp",
    "save_expert",
    "weights_of",
]

Doubles = npt.NDArray[np.float64]


def mlp(
    sizes: Sequence[int], generator: torch.Generator, output_gain: float, activation: Activation = "tanh"
) -> nn.Sequential:
    """Builds a multi-layer perceptron with orthogonal weights and zero biases.

    Args:
        sizes: Input size, hidden sizes, output size.
        generator: Source of the initial weights.
        output_gain: Gain of the last layer's weights; small for policies, 1 for values.
        activation: Between the layers.

    Returns:
        Linear layers with activations between them and none after the last.
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = index == len(sizes) - 2
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.orthogonal_(linear.weight, gain=output_gain if last else 2.0**0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers)


class GaussianActor(nn.Module):
    """A Gaussian policy: its mean is a network of the observation, its deviation a free parameter or the network's too.

    Args:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        hidden: Sizes of the hidden layers.
        generator: Source of the initial weights.
        head: ``bounded-gaussian`` puts the mean through tanh; a squashing head is the caller's affair.
        activation: Between the layers.
        state_dependent_std: Whether the deviation depends on the observation.
        log_std_range: Bounds put on the log deviation.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        head: Head = "gaussian",
        activation: Activation = "tanh",
        state_dependent_std: bool = False,
        log_std_range: tuple[float, float] = LOG_STD_RANGE,
    ) -> None:
        super().__init__()
        outputs = action_dim * (2 if state_dependent_std else 1)
        self.net = mlp([observation_dim, *hidden, outputs], generator, 0.01, activation)
        self.bounded = head == "bounded-gaussian"
        self.log_std_range = log_std_range
        self.log_std = None if state_dependent_std else nn.Parameter(torch.full((action_dim,), -0.5))

    def mean_and_std(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and deviations (batch, action_dim) at normalised observations (batch, observation_dim)."""
        outputs = self.net(observations)
        mean, log_std = outputs.chunk(2, -1) if self.log_std is None else (outputs, self.log_std)
        std = log_std.clamp(*self.log_std_range).exp().expand_as(mean)
        return mean.tanh() if self.bounded else mean, std

    def forward(self, observations: torch.Tensor) -> torch.distributions.Normal:
        """Returns the action distribution at normalised observations (batch, observation_dim)."""
        return torch.distributions.Normal(*self.mean_and_std(observations), validate_args=False)


def weights_of(actor: nn.Module) -> dict[str, Floats]:
    """Copies of a network's weights as NumPy arrays, for an :class:`ExpertPolicy`."""
    return {name: value.detach().numpy().copy() for name, value in actor.state_dict().items()}


@dataclass
class Moments:
    """Running mean and variance of vectors (parallel form of Chan et al. 1979), kept in float64."""

    mean: Doubles
    variance: Doubles
    count: float = 0.0

    @classmethod
    def of(cls, dim: int) -> Moments:
        """Mean 0 and variance 1 of vectors of length ``dim``, before any data."""
        return cls(np.zeros(dim), np.ones(dim))

    def update(self, rows: Doubles) -> None:
        """Takes the rows (n, dim) into account."""
        mean, variance, count = rows.mean(axis=0), rows.var(axis=0), float(len(rows))
        total = self.count + count
        shift = mean - self.mean
        between = shift**2 * self.count * count / total
        self.variance = (self.variance * self.count + variance * count + between) / total
        self.mean = self.mean + shift * count / total
        self.count = total

    @property
    def std(self) -> Doubles:
        """Standard deviation, at least 1e-3 so that a constant component cannot blow up."""
        return np.sqrt(np.maximum(self.variance, 1e-6))


class Ensemble(nn.Module):
    """Several equally shaped networks of one input, evaluated together: one product per layer for all of them.

    Args:
        members: How many networks.
        sizes: Input size, hidden sizes; each network has one output.
        generator: Source of the initial weights, orthogonal with zero biases.
        activation: Between the layers.
    """

    def __init__(
        self, members: int, sizes: Sequence[int], generator: torch.Generator, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.members = members
        self.activation = activation
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        shapes = list(itertools.pairwise([*sizes, 1]))
        for layer, (inputs, outputs) in enumerate(shapes):
            weight = torch.empty(members, outputs, inputs)
            for member in weight:
                nn.init.orthogonal_(member, 1.0 if layer == len(shapes) - 1 else 2.0**0.5, generator)
            self.weights.append(nn.Parameter(weight.transpose(1, 2).contiguous()))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, outputs)))

    def forward(self, inputs: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """Values of the inputs.

        Args:
            inputs: (batch, input size).
            frozen: Lets gradients flow to the inputs, but not to the weights.

        Returns:
            (members, batch).
        """
        weights = [weight.detach() if frozen else weight for weight in self.weights]
        biases = [bias.detach() if frozen else bias for bias in self.biases]
        rows = inputs.expand(self.members, *inputs.shape)
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if layer:
                rows = rows.relu_() if self.activation == "relu" else rows.tanh_()
            rows = torch.baddbmm(bias, rows, weight)
        return rows.squeeze(-1)
