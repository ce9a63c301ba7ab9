"""Looks at a file or folder that might be imported: its digest, what is in it, and the block for ``params.yaml``."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from springhead.errors import BadInput
from springhead.home import home
from springhead.lineage.digests import tree_digest
from springhead.rl.episodes import EPISODE_KEYS, WIDE_KEYS
from springhead.rl.import_rules import judge
from springhead.rl.importers import D4rl, Dsrl, Minari, episodes_of, minari_folder
from springhead.rl.tasks import Task

Settings = Dsrl | Minari | D4rl


def settings_for(path: Path, cost: str | None, timeouts: Literal["file", "horizon"]) -> Settings:
    """Guesses the format: a folder is Minari's, a file with all seven arrays is DSRL's, any other is D4RL's.

    Raises:
        BadInput: If there is nothing, or the file is no HDF5.
    """
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    digest, name = tree_digest(path), path.name
    if path.is_dir():
        name = path_in_params(path, [*folders(), minari_folder()]) or name
        return Minari(path=name, sha256=digest, cost=cost, unfinished="drop", faulty="drop")
    try:
        with h5py.File(path, "r") as file:
            all_there = all(key in file for key in EPISODE_KEYS)
    except OSError as error:
        raise BadInput(f"{path}: damaged or not an HDF5 file ({error}); fetch it again") from error
    if all_there and cost is None and timeouts == "file":
        name = path_in_params(path, [folder / "dsrl" for folder in folders()]) or name
        return Dsrl(file=name, sha256=digest, unfinished="drop", faulty="drop")
    name = path_in_params(path, folders()) or name
    return D4rl(path=name, sha256=digest, cost=cost, timeouts=timeouts, unfinished="drop", faulty="drop")


def folders() -> list[Path]:
    """Where ``importers.obtain`` looks for sources of every format."""
    found = [Path(mirror)] if (mirror := os.environ.get("SPRINGHEAD_SOURCES")) else []
    with contextlib.suppress(BadInput):  # outside of any checkout
        found.append(home() / "sources")
    return found


def path_in_params(path: Path, below: Sequence[Path]) -> str | None:
    """Returns a path as the parameters name it: relative to the first of some folders that it is in; None in none."""
    for folder in below:
        if folder.resolve() in path.resolve().parents:
            return path.resolve().relative_to(folder.resolve()).as_posix()
    return None


def to_move(path: Path, settings: Settings) -> Path | None:
    """Where a file has to be put for its entry to be found; None where it lies right already."""
    places = [*folders(), minari_folder()] if isinstance(settings, Minari) else folders()
    if isinstance(settings, Dsrl):
        places = [folder / "dsrl" for folder in places]
    if path_in_params(path, places) is not None:
        return None
    # Outside of any checkout nobody can say where its state folder will be.
    folder = places[0] if folders() else Path(".springhead/sources") / ("dsrl" if isinstance(settings, Dsrl) else "")
    return folder / path.name


def summary(path: Path, settings: Settings, of: Task) -> dict[str, Any]:
    """Judges every episode and sums up.

    Args:
        path: The file or folder.
        settings: As what it is read.
        of: The task it is held to.

    Returns:
        Numbers of episodes and steps, ranges of length, return, cost, observations and actions over the episodes that
        would be imported, and for each rule how many it would leave out and the first of them.

    Raises:
        BadInput: If it cannot be read as data of this task at all.
    """
    episodes, cut, left_out = 0, 0, dict[str, dict[str, Any]]()
    ranges = dict.fromkeys(("length", "return", "cost", "observation", "action"), (math.inf, -math.inf))
    steps = 0
    for found in episodes_of(path, settings, of):
        decision = judge(found, of, path.name)
        if not decision.kept:
            left_out.setdefault(decision.rule, {"episodes": 0, "first": decision.why})["episodes"] += 1
            continue
        episode = found.episode
        episodes, steps, cut = episodes + 1, steps + episode.length, cut + found.cut
        seen: tuple[list[float], ...] = (
            [episode.length],
            [episode.episode_return],
            [episode.cost_return],
            [float(episode.observations.min()), float(episode.observations.max())],
            [float(episode.actions.min()), float(episode.actions.max())],
        )
        for name, values in zip(ranges, seen, strict=True):
            low, high = ranges[name]
            ranges[name] = (min(low, *values), max(high, *values))
    return {
        "sha256": settings.sha256,
        "format": type(settings).__name__.lower(),
        "episodes": episodes,
        "steps": steps,
        "ranges": {name: list(pair) for name, pair in ranges.items()} if episodes else {},
        "left_out": left_out,
        "steps_cut": cut,
        "quirks": [] if isinstance(settings, Minari) else quirks(path),
        "params": params(settings, of, left_out, to_move(path, settings)),
    }


def quirks(path: Path) -> list[str]:
    """What of a flat file differs from DSRL's schema, in words."""
    found = []
    with h5py.File(path, "r") as file:
        for key in EPISODE_KEYS:
            array = file.get(key)
            if not isinstance(array, h5py.Dataset):
                found.append(f"no {key}")
                continue
            wanted = np.dtype(np.bool_ if key in ("terminals", "timeouts") else np.float32)
            if array.dtype != wanted:
                found.append(f"{key} are {array.dtype}")
            if key not in WIDE_KEYS and array.ndim != 1:
                found.append(f"{key} have shape {array.shape}")
    return found


def params(settings: Settings, of: Task, left_out: dict[str, Any], place: Path | None) -> str:
    """The entry of ``rl.imports.sources``; what would be left out is allowed in it only where there is such.

    Args:
        settings: As what the file is read.
        of: The task.
        left_out: By rule, what would be left out.
        place: Where the file has to be put first, for a comment; None where it lies there.
    """
    fields = [f"sha256: {settings.sha256}"]
    if isinstance(settings, Dsrl):
        if settings.file != of.data_file:
            fields.insert(0, f"file: {_quoted(settings.file)}")
    else:
        fields.insert(0, f"path: {_quoted(settings.path)}")
        fields.append(f"cost: {_quoted(settings.cost or None)}")
    if isinstance(settings, D4rl) and settings.timeouts != "file":
        fields.append(f"timeouts: {settings.timeouts}")
    if "unfinished" in left_out:
        fields.append("unfinished: drop")
    if set(left_out) - {"unfinished"}:
        fields.append("faulty: drop")
    first = f"  # first put it at {place}" if place else ""
    return f"- {{task: {of.name}, {type(settings).__name__.lower()}: {{{', '.join(fields)}}}}}{first}"


def _quoted(name: str | None) -> str:
    """A name as YAML, whatever is in it; null for none. JSON's form is YAML's too."""
    return json.dumps(name, ensure_ascii=False)
