"""Checkpoints of fine-tuning: whose they are, which of a folder's is whole, and rows as tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from springhead.lineage.digests import json_digest
from springhead.llm.packing import Example

STATE = "state.json"
"""The file of a checkpoint that is written last."""


def model_digest(model: PreTrainedModel) -> str:
    """The digest of a model's weights and configuration as they are in memory, whatever folder they came from."""
    config = model.config.to_dict()
    facts = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_identity(model: PreTrainedModel, examples: Sequence[Example], facts: Mapping[str, Any]) -> str:
    """The digest of what a run is determined by: the base model, the rows, and what else is given (settings, seed)."""
    rows = hashlib.sha256()
    for example in examples:
        rows.update(np.array(example.ids, np.int64).tobytes() + bytes(example.completion_mask))
        if example.context or example.weight != 1.0:
            rows.update(np.array([*example.context, example.weight], np.float64).tobytes())
    return json_digest({"base": model_digest(model), "rows": rows.hexdigest(), **facts})


def being_written(folder: Path) -> Path:
    """Where the next checkpoint is written before it takes the place of `folder`."""
    return folder.with_name(folder.name + ".new")


def checkpoint_of(folder: Path) -> Path | None:
    """The last whole checkpoint: `folder`, or what a save that was killed had not yet renamed to it; None without."""
    return next((place for place in (folder, being_written(folder)) if (place / STATE).exists()), None)


def as_tensors(queue: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """Batches of rows as flat tensors; `from_tensors` reads them back."""
    rows = [example for batch in queue for example in batch]
    return {
        "batches": torch.tensor([len(batch) for batch in queue], dtype=torch.int64),
        "lengths": torch.tensor([len(row.ids) for row in rows], dtype=torch.int64),
        "weights": torch.tensor([row.weight for row in rows], dtype=torch.float64),
        "ids": torch.tensor([token for row in rows for token in row.ids], dtype=torch.int64),
        "mask": torch.tensor([flag for row in rows for flag in row.completion_mask], dtype=torch.bool),
        "read": torch.tensor([token for row in rows for token in row.read], dtype=torch.int64),
    }


def from_tensors(stored: dict[str, torch.Tensor]) -> list[list[Example]]:
    """The batches that `as_tensors` was given."""
    lengths = stored["lengths"].tolist()
    parts = [stored[name].split(lengths) for name in ("ids", "mask", "read")]
    rows = []
    for ids, mask, read, weight in zip(*parts, stored["weights"].tolist(), strict=True):
        context = () if torch.equal(ids, read) else tuple(read.tolist())
        rows.append(Example(tuple(ids.tolist()), tuple(mask.tolist()), context, weight))
    left = iter(rows)
    return [[next(left) for _ in range(count)] for count in stored["batches"].tolist()]
