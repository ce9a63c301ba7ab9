"""What every offline algorithm is to the rest of the project: settings, a learner of several members, and policies.

A *member* is one model to be: a seed, and for methods that are trained for one cost limit, that limit. A learner
trains all its members side by side: every parameter has a leading member dimension and every layer is one batched
product (``stacked.py``), because tables of benchmarks are made of seeds and limits. Members do not influence each
other: losses have the shape (members,) and are summed, Adam is element-wise, gradients are clipped per member, and
each member draws from a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from springhead.bounds import OutOfRange, at_least

OnStep = Callable[[int, dict[str, float]], None]
"""Told the number of finished steps and their figures; with no figures when a run resumes."""


@dataclass(frozen=True)
class Member:
    """One of the models trained side by side.

    Attributes:
        seed: Seeds its weights, batches and noise.
        cost_limit: The episode cost limit it is trained for, None where the method is not trained for one.
    """

    seed: int
    cost_limit: float | None = None

    @property
    def name(self) -> str:
        """What it is called in a model: its limit, or "policy"."""
        return "policy" if self.cost_limit is None else f"limit-{self.cost_limit:g}"

    @property
    def file(self) -> str:
        """Its file in a model folder."""
        return f"{self.name}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all offline algorithms are told; each adds its own hyper-parameters."""

    steps: int = 100_000
    """Gradient steps."""
    batch_size: int = 512
    """Transitions per step and member."""
    hidden: tuple[int, ...] = (256, 256)
    """Sizes of the hidden layers (ReLU)."""
    limits: tuple[float, ...] = ()
    """Episode cost limits that a limit-dependent method is trained for, and those that a conditioned one is asked for
    in evaluation; empty: the task's three."""
    device: str = "cpu"
    """A torch device; results are byte-identical between runs on "cpu" only."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products in training, on CUDA devices: rounded to 10 bits of 23, or to 7 and the layers' outputs too
    (torch.autocast). Weights, their moments and losses are float32 in each; no GPU was at hand to measure it."""
    checkpoint_every: int = 1000
    """Steps between resume checkpoints, and between points of the learning curve's file."""
    report_every: int = 10
    """Steps between figures for progress and tracking, and between checks that they are finite. Between them
    nothing is copied from the device."""
    policies: int = 0
    """Policies kept on the way, evenly spaced, beside the last one; ``evaluate`` chooses among them."""

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "checkpoint_every", "report_every")
        for name in whole:
            at_least(1, self, name)
        at_least(0, self, "policies")
        if not self.hidden or min(self.hidden) < 1:
            raise OutOfRange(f"hidden is {list(self.hidden)}; name at least one layer, of 1 or more units")
        if self.policies > self.steps:
            raise OutOfRange(f"policies is {self.policies} of {self.steps} steps; keep fewer")
        if self.precision != "float32" and not self.device.startswith("cuda"):
            raise OutOfRange(
                f"precision is {self.precision!r} on the device {self.device!r}; it is for CUDA devices, use 'float32'"
            )
        # Files are named by six digits.
        if not all(0 <= limit < math.inf for limit in self.limits) or len({f"{x:g}" for x in self.limits}) < len(
            self.limits
        ):
            raise OutOfRange(f"limits are {list(self.limits)}; name different limits of 0 or more, to six digits")

    def asked_limits(self) -> dict[str, Any]:
        """What the configuration of a conditioned policy adds: the limits to ask it for, where they are not the task's.

        Its ``limits`` are empty, since it has one network for all of them.
        """
        return {"asked_limits": sorted(self.limits)} if self.limits else {}


class Generators:
    """The members' random numbers, one generator each, so that a member does not depend on its companions.

    Members of one seed draw alike: their limits are compared on the same batches and noise.

    Args:
        seeds: One for each member.
        device: Where the numbers are drawn.
        stream: Tells apart generators of the same seeds, for instance initial weights from batches.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 0) -> None:
        self.device = torch.device(device)
        # Mixed, because a generator's first numbers at neighbouring small seeds are alike.
        self.each = [torch.Generator(self.device).manual_seed((seed * 0x9E3779B1 + stream) % 2**63) for seed in seeds]

    def __len__(self) -> int:
        """Number of members."""
        return len(self.each)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers (members, *shape)."""
        drawn = torch.empty(len(self.each), *shape, device=self.device)
        for row, generator in zip(drawn, self.each, strict=True):
            row.normal_(generator=generator)
        return drawn

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform numbers (members, *shape)."""
        drawn = torch.empty(len(self.each), *shape, device=self.device)
        for row, generator in zip(drawn, self.each, strict=True):
            row.uniform_(low, high, generator=generator)
        return drawn

    def integers(self, highs: Sequence[int], *shape: int) -> torch.Tensor:
        """Whole numbers (members, *shape), each member's from 0 to below its own bound."""
        drawn = torch.empty(len(self.each), *shape, dtype=torch.int64, device=self.device)
        for row, high, generator in zip(drawn, highs, self.each, strict=True):
            row.random_(0, high, generator=generator)
        return drawn

    def state(self) -> torch.Tensor:
        """All states, uint8 (members, bytes)."""
        return torch.stack([generator.get_state() for generator in self.each])

    def restore(self, state: torch.Tensor) -> None:
        """Puts :meth:`state` back."""
        for generator, own in zip(self.each, state, strict=True):
            generator.set_state(own.clone())  # a row in the middle of a tensor is not taken for a state


class Learner(Protocol):
    """All members' networks and one gradient step of all of them."""

    members: Sequence[Member]
    modules: nn.Module
    """Everything that changes by training, targets and multipliers included: its ``state_dict`` is checkpointed."""
    optimisers: Mapping[str, torch.optim.Optimizer]
    """By name; their parameters are parameters of ``modules``."""
    generators: Mapping[str, Generators]
    """By name; their states are checkpointed."""

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Draws a batch and takes one step of every network.

        Args:
            step: Its number, counted from 1.

        Returns:
            Figures by name, the same names in every step, each (members,) without gradient and still on the device.
        """

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The tensors by which a member acts."""

    def config(self, member: int) -> dict[str, Any]:
        """What else its policy must know, JSON-able: task, dimensions and all that shapes the networks."""
