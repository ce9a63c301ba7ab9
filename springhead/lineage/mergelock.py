"""Merges ``dvc.lock`` stage by stage: a merge driver for git.

Git merges lines, and two branches that ran different stages then conflict inside YAML. An entry of
``dvc.lock`` is one claim: this stage, with these inputs, made these outputs. So whole entries are
merged. Where both branches ran a stage, either claim may be kept: DVC compares it with the merged
inputs and, if it does not hold, takes the result from the run cache or runs the stage again.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from springhead.errors import BadInput


def merge(base: Path, ours: Path, theirs: Path) -> list[str]:
    """Merges two versions of a lock file into ``ours``, which git takes as the result.

    Args:
        base: the common ancestor; an empty file if there is none.
        ours: this branch's version.
        theirs: the other branch's version.

    Returns:
        The stages that both branches changed, whose entry is ours.

    Raises:
        BadInput: naming the file that is no lock file. ``ours`` is then as it was.
    """
    from dvc.utils.serialize import dump_yaml

    before, one, other = _stages(base, may_be_empty=True), _stages(ours), _stages(theirs)
    merged, both = merge_stages(before, one, other)
    temporary = ours.with_name(f".{ours.name}.tmp-{os.getpid()}")
    dump_yaml(str(temporary), {"schema": "2.0", "stages": merged})
    os.replace(temporary, ours)
    return both


def merge_stages(
    base: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Merges the stages of three versions; returns them with the names that both sides changed."""
    merged: dict[str, Any] = {}
    both = []
    for name in dict.fromkeys((*ours, *theirs)):
        before, one, other = base.get(name), ours.get(name), theirs.get(name)
        if one == other or other == before:
            entry = one
        elif one == before:
            entry = other
        else:
            both.append(name)
            entry = one if one is not None else other
        if entry is not None:
            merged[name] = entry
    return merged, both


def _stages(path: Path, may_be_empty: bool = False) -> dict[str, Any]:
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import load_yaml

    try:
        content = load_yaml(str(path))  # DVC's own reader: YAML 1.2, where 1e-05 is a number
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except DvcException:
        content = None
    if not content and may_be_empty:
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("stages", {}), dict) or not content:
        raise BadInput(f"{path}: not a lock file; merge by hand, or `git checkout --ours dvc.lock` and `dvc repro`")
    return dict(content.get("stages", {}))
