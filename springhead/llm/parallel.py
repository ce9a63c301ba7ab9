"""Training on several devices: one process each, as `torchrun` and `accelerate launch` start them.

Every process holds the whole model. The rows of an optimizer step are shared out by their tokens, each process adds up
the gradients of its own rows, already divided by the target tokens of the *whole* step, and the sum over processes is
the gradient of one process that had all rows. So the number of processes changes the speed, not the training.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from springhead.errors import BadInput, Finding

T = TypeVar("T")
_BUCKET = 16 * 2**20
"""Gradients are summed in buckets of so many numbers: few messages, and no second copy of all of them."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T], costs: Sequence[int]) -> list[T]:
        """This process's part of the items: dearest first, each to the process with the least so far.

        Every process computes the same shares. The order of the items is kept.
        """
        if self.size == 1:
            return list(items)
        spent, mine = [0] * self.size, []
        for index in sorted(range(len(items)), key=lambda i: (-costs[i], i)):
            rank = spent.index(min(spent))
            spent[rank] += costs[index]
            if rank == self.rank:
                mine.append(index)
        return [items[i] for i in sorted(mine)]

    def total(self, value: float, device: torch.device) -> float:
        """The sum of a number over the processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return float(tensor)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; a process without rows adds zeros."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        bucket: list[torch.Tensor] = []
        for index, gradient in enumerate(gradients):
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= _BUCKET or index + 1 == len(gradients):
                flat = torch.cat([g.reshape(-1) for g in bucket])
                dist.all_reduce(flat)
                for own, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    own.copy_(part.view_as(own))
                bucket = []

    def check_equal(self, value: float, what: str, device: torch.device) -> None:
        """Make sure that all processes have the same number.

        Raises:
            Finding: they do not, so the processes train different models.
        """
        if self.size == 1:
            return
        ends = torch.tensor([value, -value], dtype=torch.float64, device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if float(ends[0]) != -float(ends[1]):
            raise Finding(
                f"{what} differs between the processes ({-float(ends[1])} to {float(ends[0])}); stop and report"
            )

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that a launcher started, for the length of the block; without a launcher: `ALONE`.

    Args:
        device: cpu, or cuda, of which each process takes the one of its local rank.

    Raises:
        BadInput: there are fewer GPUs than local processes, or half of the launcher's variables are missing.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise BadInput(
            f"WORLD_SIZE is {size} but {', '.join(missing)} not set; start with torchrun or accelerate launch"
        )
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} has no GPU of its own ({torch.cuda.device_count()} found); start fewer")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
