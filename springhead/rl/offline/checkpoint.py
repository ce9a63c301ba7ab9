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

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.rl.offline.contract import Learner


class State(NamedTuple):
    """What a checkpoint holds after ``step`` finished steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Saves a checkpoint and removes the earlier ones."""
    target = folder / f"step-{step:08d}"
    for left in folder.glob(".tmp-*"):  # of a process that was killed while saving
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".tmp-{os.getpid()}"
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


def pack(learner: Learner) -> dict[str, torch.Tensor]:
    """Everything of a learner that changes: weights and buffers, optimisers' moments, generators' states."""
    tensors = {f"weight.{name}": value for name, value in learner.modules.state_dict().items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in learner.modules.named_parameters()}
    for optimiser in learner.optimisers.values():
        for parameter, moments in optimiser.state.items():
            for key, value in moments.items():
                tensors[f"moment.{names[parameter]}.{key}"] = torch.as_tensor(value)
    for name, generators in learner.generators.items():
        tensors[f"generator.{name}"] = generators.state()
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], learner: Learner) -> None:
    """Puts everything of :func:`pack` back.

    Raises:
        BadInput: If the checkpoint is of other networks.
    """
    try:
        learner.modules.load_state_dict(_below(tensors, "weight."))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise BadInput(
            f"the checkpoint is of other networks ({reason}); remove the scratch folder to train from the start"
        ) from None
    owners = {
        parameter: optimiser
        for optimiser in learner.optimisers.values()
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    for name, parameter in learner.modules.named_parameters():
        # Step counters stay where the optimiser keeps them; a fused one wants them beside the parameter.
        moments = {key: value.to(parameter.device) for key, value in _below(tensors, f"moment.{name}.").items()}
        if moments:
            owners[parameter].state[parameter] = moments
    for name, generators in learner.generators.items():
        generators.restore(tensors[f"generator.{name}"])


def _below(tensors: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
