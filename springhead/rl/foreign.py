"""Reads episodes from files that others wrote: DSRL's, D4RL-style HDF5, and Minari data sets.

Two of the formats are flat arrays in which episodes follow each other, the third has one group per episode. What
comes out are episodes as they are in the file; whether they are any good is the business of
:mod:`springhead.rl.importers`. Nothing is left out here: steps without an end are given out too, marked as such.

Published files differ from the schema in ways that lose nothing, and are read: rewards, costs and flags of shape
(N, 1), float64 numbers, and flags stored as uint8 or as 0.0 and 1.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.dsrl_file import BLOCK_ROWS
from springhead.rl.episodes import EPISODE_KEYS, WIDE_KEYS, Episode
from springhead.rl.minari_file import iter_raw
from springhead.rl.tasks import Task

Array = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]

FLOATS = ("observations", "next_observations", "actions", "rewards", "costs")


@dataclass(frozen=True)
class Found:
    """An episode of a foreign file.

    Attributes:
        index: Its position in the file.
        episode: Its arrays. Where it is not finished its last step has no end flag; where it has no successor states
            (``cut`` is 1 and it had one step) ``next_observations`` is empty.
        finished: Whether the file says where it ends.
        cut: Steps at its end that were taken away because the file does not have their successor state.
        terminal: Whether it ended with a terminal in the file, also where that step was taken away.
    """

    index: int
    episode: Episode
    finished: bool = True
    cut: int = 0
    terminal: bool = False


def dsrl_episodes(path: Path, of: Task) -> Iterator[Found]:
    """Reads a file of DSRL's schema.

    Args:
        path: The file.
        of: The task, whose dimensions it must have.

    Raises:
        BadInput: If it is damaged, lacks an array, or an array has another shape; names file and array.
    """
    return _flat(path, of, {key: key for key in EPISODE_KEYS}, at_horizon=False)


def d4rl_episodes(path: Path, of: Task, cost: str | None, at_horizon: bool) -> Iterator[Found]:
    """Reads a file as D4RL has them: flat arrays, no costs, often neither successor states nor time-outs.

    Without ``next_observations`` the successor of a step is the next step's observation; the last step of an episode
    has none (the next row belongs to another episode), so it is taken away. The episode then ends with a time-out,
    also if it had ended with a terminal: the step that ended it is gone.

    Args:
        path: The file.
        of: The task, whose dimensions and horizon count.
        cost: The array that holds the costs, for instance ``infos/cost``; None gives costs of 0.
        at_horizon: Whether an episode also ends after the task's horizon, for files without time-outs.

    Raises:
        BadInput: As :func:`dsrl_episodes`; also if there are no time-outs and ``at_horizon`` is not set.
    """
    names = {key: key for key in EPISODE_KEYS if key != "costs"} | ({"costs": cost} if cost is not None else {})
    with _opened(path) as file:
        for key in ("next_observations", "timeouts"):
            if key not in file:
                del names[key]
    if "timeouts" not in names and not at_horizon:
        raise BadInput(
            f"{path}: no array 'timeouts', so it does not say where episodes end; set timeouts: horizon to cut them "
            f"after {of.horizon} steps, if that is how they were collected"
        )
    return _flat(path, of, names, at_horizon)


def unread(path: Path, names: tuple[str, ...]) -> list[str]:
    """The arrays of a flat file that are not among the names, sorted."""
    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name not in names:
            found.append(name)

    with _opened(path) as file:
        file.visititems(visit)
    return sorted(found)


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise BadInput(f"{path}: damaged or not an HDF5 file ({error}); fetch it again") from error


def _flat(path: Path, of: Task, names: Mapping[str, str], at_horizon: bool) -> Iterator[Found]:
    """Reads flat arrays, a block of whole episodes at a time.

    Args:
        path: The file.
        of: The task.
        names: What each array of the schema is called in the file; costs, successors and time-outs may be missing.
        at_horizon: Whether episodes are also cut after the task's horizon.
    """
    with _opened(path) as file:
        arrays = {key: _array(file, path, key, name, of) for key, name in names.items()}
        rows = {names[key]: len(array) for key, array in arrays.items()}
        if len(set(rows.values())) != 1:
            listing = ", ".join(f"{name} {number}" for name, number in rows.items())
            raise BadInput(f"{path}: arrays differ in their number of steps ({listing}); the file is inconsistent")
        steps = len(arrays["rewards"])
        if not steps:
            raise BadInput(f"{path}: no steps in the file")
        terminals = _flags(path, names["terminals"], arrays["terminals"])
        timeouts = (
            _flags(path, names["timeouts"], arrays["timeouts"]) if "timeouts" in names else np.zeros(steps, np.bool_)
        )
        if at_horizon:
            _cut_at_horizon(terminals, timeouts, of.horizon)
        bounds = [0, *(np.flatnonzero(terminals | timeouts) + 1).tolist()]
        finished = bounds[-1] == steps
        if not finished:
            bounds.append(steps)
        floats = {key: array for key, array in arrays.items() if key in FLOATS}
        for first, last in _runs(bounds):
            begin, end = bounds[first], bounds[last]
            block: dict[str, Array] = {
                key: _numbers(path, names[key], array, begin, end, key in WIDE_KEYS) for key, array in floats.items()
            }
            block.setdefault("costs", np.zeros(end - begin, np.float32))
            block |= {"terminals": terminals[begin:end], "timeouts": timeouts[begin:end]}
            for number in range(first, last):
                part = slice(bounds[number] - begin, bounds[number + 1] - begin)
                arrays_of = {key: array[part] for key, array in block.items()}
                yield _episode(number, arrays_of, finished or number < len(bounds) - 2)


def _episode(index: int, arrays: dict[str, Array], finished: bool) -> Found:
    """Makes an episode of its arrays; rebuilds the successors if there are none."""
    terminal = bool(arrays["terminals"][-1])
    if "next_observations" in arrays:
        return Found(index, Episode(**arrays), finished, terminal=terminal)
    states = arrays["observations"]
    if len(states) == 1:
        return Found(index, Episode(**arrays, next_observations=states[:0]), finished, 1, terminal)
    shorter = {key: array[:-1] for key, array in arrays.items()}
    at_end = np.arange(len(states) - 1) == len(states) - 2
    shorter |= {"terminals": np.zeros_like(at_end), "timeouts": at_end & finished}
    return Found(index, Episode(**shorter, next_observations=states[1:]), finished, 1, terminal)


def _array(file: h5py.File, path: Path, key: str, name: str, of: Task) -> h5py.Dataset:
    """Returns an array after checking its kind and shape."""
    array = file.get(name)
    if not isinstance(array, h5py.Dataset):
        present = ", ".join(sorted(file.keys())) or "nothing"
        raise BadInput(f"{path}: no array '{name}' (found: {present}); it is needed for the {key}")
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{path}: array '{name}' holds {array.dtype}; expected numbers")
    if key in WIDE_KEYS:
        width = of.action_dim if key == "actions" else of.observation_dim
        if array.ndim != 2 or array.shape[1] != width:
            raise BadInput(
                f"{path}: array '{name}' has shape {array.shape}; task {of.name} needs (steps, {width}): "
                "is the file of another task?"
            )
    elif array.ndim != 1 and array.shape[1:] != (1,):
        raise BadInput(f"{path}: array '{name}' has shape {array.shape}; expected (steps,) or (steps, 1)")
    return array


def _stored(path: Path, name: str, array: h5py.Dataset, begin: int, end: int) -> Array:
    try:
        return np.asarray(array[begin:end])
    except OSError as error:
        raise BadInput(f"{path}: array '{name}' is damaged ({error}); fetch it again") from error


def _numbers(path: Path, name: str, array: h5py.Dataset, begin: int, end: int, wide: bool) -> Array:
    values = _stored(path, name, array, begin, end)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is a fault of the episode
        values = values.astype(np.float32)
    return values if wide else values.reshape(len(values))


def _flags(path: Path, name: str, array: h5py.Dataset) -> Flags:
    """Reads flags of any type; what is neither 0 nor 1 is no flag."""
    values = _stored(path, name, array, 0, len(array)).reshape(-1)
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise BadInput(
            f"{path}: array '{name}' holds {values[wrong[0]]} at step {wrong[0]}; flags are 0 or 1 "
            f"({len(wrong)} are not)"
        )
    return values.astype(np.bool_)


def _cut_at_horizon(terminals: Flags, timeouts: Flags, horizon: int) -> None:
    """Sets a time-out after every ``horizon`` steps that follow each other without an end, in place."""
    start = 0
    for end in [*(np.flatnonzero(terminals | timeouts) + 1).tolist(), len(terminals)]:
        timeouts[start + horizon - 1 : end : horizon] = True
        start = end
    timeouts &= ~terminals


def _runs(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of episodes that have at most ``BLOCK_ROWS`` steps together, or are one."""
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= BLOCK_ROWS:
            last += 1
        yield first, last
        first = last


def minari_episodes(folder: Path, of: Task, cost: str | None) -> Iterator[Found]:
    """Reads a Minari data set, in either of its formats.

    Observations that are made of parts (``Dict`` or ``Tuple``) are joined in Minari's order, parts of a mapping
    sorted by name, as ``gymnasium.spaces.flatten`` does.

    Args:
        folder: The data set's folder, which has the folder ``data`` in it.
        of: The task, whose dimensions it must have.
        cost: The key of ``infos`` that holds the cost of each step, with ``/`` between levels; None gives costs of 0.

    Raises:
        BadInput: If it cannot be read or does not fit; names folder, key and episode.
    """
    number = -1
    for number, raw in enumerate(iter_raw(folder)):
        where = f"{folder}: episode {number}"
        rewards = _vector(raw["rewards"], "rewards", where)
        steps = len(rewards)
        states = _joined(raw["observations"], "observations", where, of.observation_dim, of)
        actions = _joined(raw["actions"], "actions", where, of.action_dim, of)
        if steps < 1 or len(states) != steps + 1 or len(actions) != steps:
            raise BadInput(
                f"{where}: {len(states)} observations and {len(actions)} actions for {steps} rewards; expected one "
                "observation more, and as many actions"
            )
        ends = {}
        for key in ("terminations", "truncations"):
            flags = np.asarray(raw[key]).reshape(-1).astype(np.bool_)
            if len(flags) != steps or flags[:-1].any():
                raise BadInput(f"{where}: {key} has {len(flags)} flags for {steps} steps, or one before the last step")
            ends[key] = flags
        costs = np.zeros(steps, np.float32) if cost is None else _cost(raw["infos"] or {}, cost, steps, where)
        episode = Episode(
            states[:-1],
            states[1:],
            actions,
            rewards,
            costs,
            terminals=ends["terminations"],
            timeouts=ends["truncations"],
        )
        terminal = bool(ends["terminations"][-1])
        yield Found(number, episode, terminal or bool(ends["truncations"][-1]), terminal=terminal)
    if number < 0:
        raise BadInput(f"{folder}: no episodes in the data set")


def _vector(values: Any, key: str, where: str) -> Array:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise BadInput(f"{where}: {key} has shape {array.shape} of {array.dtype}; expected one number per step")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _joined(values: Any, key: str, where: str, width: int, of: Task) -> Array:
    """Joins the parts of an observation or action to one vector per step, and checks its width."""
    parts = [np.asarray(part) for part in _parts(values)]
    if any(part.ndim < 1 or part.dtype.kind not in "biuf" for part in parts):
        raise BadInput(f"{where}: {key} are not numbers")
    with np.errstate(over="ignore"):
        flat = [part.reshape(len(part), -1).astype(np.float32) for part in parts]
    if len({len(part) for part in flat}) != 1 or sum(part.shape[1] for part in flat) != width:
        shapes = " + ".join(str(part.shape) for part in parts) or "nothing"
        raise BadInput(
            f"{where}: {key} has shape {shapes}; task {of.name} needs (steps, {width}): is the data set of another "
            "task?"
        )
    return np.concatenate(flat, axis=1)


def _parts(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping):
        for key in sorted(values):
            yield from _parts(values[key])
    elif isinstance(values, tuple):
        for value in values:
            yield from _parts(value)
    else:
        yield values


def _cost(infos: Mapping[str, Any], key: str, steps: int, where: str) -> Array:
    """The cost of each step from the infos, which usually have one entry more, that of the reset."""
    found: Any = infos
    for part in key.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if found is None:
        raise BadInput(
            f"{where}: infos have no {key!r} (they have {', '.join(sorted(infos)) or 'nothing'}); set cost to another "
            "key, or to null if every step costs 0"
        )
    costs = _vector(found, f"infos/{key}", where)
    if len(costs) not in (steps, steps + 1):
        raise BadInput(f"{where}: infos/{key} has {len(costs)} entries for {steps} steps")
    return costs[len(costs) - steps :]
