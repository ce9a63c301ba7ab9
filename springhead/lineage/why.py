"""Why a stage will run again: its last receipt against the checkout as it is now."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.declared import Declared, is_data, read_stages
from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.lineage.digests import dependency_digest, file_digest
from springhead.lineage.receipts import read_receipts
from springhead.params import lookup, read_params


@dataclass(frozen=True)
class Change:
    """One difference between what a stage last used and what is there now."""

    kind: str
    """``parameter``, ``data``, ``code``, ``lock``, ``output`` or ``receipt``."""
    name: str
    """The key or path."""
    what: str
    runs: bool
    """Whether DVC will run the stage because of it."""


def why(root: Path, stage: str) -> list[Change]:
    """Returns what has changed since a stage last ran, most telling first; empty means nothing.

    Raises:
        BadInput: if ``dvc.yaml`` has no such stage.
    """
    declared = read_stages(root, state_folder(root) / "declared")
    if stage not in declared:
        close = [name for name in declared if name.partition("@")[0] == stage.partition("@")[0]]
        some = ", ".join((close or list(declared))[:6])
        raise BadInput(f"{stage}: no such stage in dvc.yaml; there are {some} …" if some else f"{stage}: no stages")
    return changes(root, declared[stage], read_receipts(root).get(stage), {})


def changes(
    root: Path, declared: Declared, receipt: Mapping[str, Any] | None, digests: dict[str, str | None]
) -> list[Change]:
    """Compares one receipt with the checkout.

    Args:
        root: the repository root.
        declared: the stage as ``dvc.yaml`` has it.
        receipt: its last receipt, or None if it never ran.
        digests: digests by path that were computed already; more are added.
    """
    if receipt is None:
        return [Change("receipt", declared.receipt, "the stage has not run in this checkout", True)]
    found = _parameters(root, declared, receipt)
    for path in sorted(set(declared.dependencies) | set(receipt["dependencies"])):
        kind = "data" if is_data(path) else "lock" if path.startswith("locks/") else "code"
        before = receipt["dependencies"].get(path, {}).get("sha256")
        if path not in declared.dependencies:
            found.append(Change(kind, path, "is no dependency any more", True))
        elif before is None:
            found.append(Change(kind, path, "is a new dependency", True))
        elif (now := _digest(root, path, digests)) != before:
            found.append(Change(kind, path, "is missing" if now is None else "has changed", True))
    for path, facts in receipt["outputs"].items():
        now = _digest(root, path, digests)
        if now != facts["sha256"]:
            found.append(Change("output", path, "is missing" if now is None else "is not what the stage made", True))
    covered = tuple(f"{path}/" for path in declared.dependencies)
    for path, before in receipt["code"]["files"].items():
        if path in declared.dependencies or path.startswith(covered):
            continue
        if not (root / path).is_file() or file_digest(root / path) != before:
            found.append(Change("code", path, "has changed (harness: does not make the stage run again)", False))
    return found


def _parameters(root: Path, declared: Declared, receipt: Mapping[str, Any]) -> list[Change]:
    values = read_params(root / "params.yaml")
    found = []
    for key in declared.parameters:
        now = lookup(values, key, "params.yaml")
        if key not in receipt["params"]:
            found.append(Change("parameter", key, "is a new parameter", True))
            continue
        before = receipt["params"][key]
        flat_before, flat_now = _flat(key, before), _flat(key, now)
        for name in sorted(flat_before.keys() | flat_now.keys()):
            old, new = flat_before.get(name, "(absent)"), flat_now.get(name, "(absent)")
            if old != new:
                found.append(Change("parameter", name, f"{old} → {new}", True))
    return found


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {name: v for part, inner in value.items() for name, v in _flat(f"{key}.{part}", inner).items()}
    return {key: value}


def _digest(root: Path, path: str, known: dict[str, str | None]) -> str | None:
    if path not in known:
        known[path] = dependency_digest(root, path) if (root / path).exists() else None
    return known[path]
