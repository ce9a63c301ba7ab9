"""Resume checkpoints: killed and resumed training equals uninterrupted training, byte for byte.

A checkpoint is a folder ``step-<n>`` with the tensors (weights, optimiser moments, generator
states) in ``state.safetensors`` and everything else in ``state.json``. It appears by one rename,
so a reader sees a whole checkpoint or none; the one before it is removed afterwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json


class State(NamedTuple):
    """What a checkpoint holds after ``step`` finished steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Saves a checkpoint and removes the earlier ones."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary / "state.safetensors")
    write_json(temporary / "state.json", {"step": step, "facts": dict(facts)})
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in sorted(folder.glob("step-*")):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> State | None:
    """Returns the last checkpoint in a folder, or None if there is none.

    Raises:
        BadInput: If it is damaged.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    try:
        tensors = load_file(found[-1] / "state.safetensors")
        state = read_json(found[-1] / "state.json")
        return State(int(state["step"]), tensors, state["facts"])
    except (BadInput, SafetensorError, OSError, KeyError) as error:
        raise BadInput(
            f"{found[-1]}: damaged checkpoint ({error}); remove the folder to train from the start"
        ) from None


def pack(module: nn.Module, optimiser: torch.optim.Optimizer, prefix: str = "") -> dict[str, torch.Tensor]:
    """Returns a module's weights and its optimiser's moments as named tensors."""
    tensors = {f"{prefix}weight.{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{prefix}moment.{name}.{key}"] = torch.as_tensor(value)
    return tensors


def unpack(
    tensors: Mapping[str, torch.Tensor], module: nn.Module, optimiser: torch.optim.Optimizer, prefix: str = ""
) -> None:
    """Puts weights and moments of :func:`pack` back; the inverse of it."""
    start = f"{prefix}weight."
    module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    for name, parameter in module.named_parameters():
        start = f"{prefix}moment.{name}."
        moments = {k.removeprefix(start): v.to(parameter.device) for k, v in tensors.items() if k.startswith(start)}
        if moments:
            optimiser.state[parameter] = moments
