"""Resume checkpoints of online training: tensors as safetensors, the rest as JSON, in the stage's scratch folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from springhead.errors import BadInput
from springhead.jsonio import canonical, read_json, write_json


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Writes a checkpoint; a kill at any moment leaves the former one or this one, never half of it.

    Args:
        folder: Where checkpoints of this run lie.
        step: Its number; must grow.
        tensors: Weights and other arrays.
        facts: JSON-able state beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"checkpoint-{step:06d}"
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    # The JSON is renamed into place last: tensors without it do not count as a checkpoint.
    write_json(folder / "writing.json", facts)
    (folder / "writing.json").replace(folder / f"{name}.json")
    for old in folder.glob("checkpoint-*"):
        if old.stem != name:
            old.unlink()


def load_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Loads the newest checkpoint.

    Args:
        folder: Where checkpoints of this run lie.
        config: Must equal the ``config`` among the checkpoint's facts, or the checkpoint is of another run.

    Returns:
        Tensors and facts, or None where there is no checkpoint of this configuration.

    Raises:
        BadInput: If the checkpoint is damaged.
    """
    found = sorted(folder.glob("checkpoint-*.json"))
    if not found:
        return None
    facts: dict[str, Any] = read_json(found[-1])
    if canonical(facts["config"]) != canonical(config):
        return None
    weights = found[-1].with_suffix(".safetensors")
    try:
        return load_file(weights), facts
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{weights}: damaged checkpoint ({error}); delete the folder {folder} to start over") from error


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name starts with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def optimiser_tensors(optimiser: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """An optimiser's running averages and step counts, by ``prefix``, number of the parameter, and name."""
    state = optimiser.state_dict()["state"]
    return {f"{prefix}{index}.{name}": value for index, slots in state.items() for name, value in slots.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what :func:`optimiser_tensors` returned, here without the prefix."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
