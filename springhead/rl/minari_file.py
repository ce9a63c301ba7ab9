"""Minari's file format: a folder with one HDF5 group per episode, and a JSON description.

Minari's own writer keeps all episodes in memory, ends the process on a full disk and writes no checksums, so the
format is written here, in one pass; ``tests/rl/test_minari_file.py`` holds it to what Minari itself writes and reads.
Reading is Minari's, so that every data set it knows can be read; a whole data set in its HDF5 format is read at
once, which is three times as fast.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.rl import hdf5
from springhead.rl.episodes import Dataset, Episode
from springhead.rl.tasks import Task

Array = npt.NDArray[Any]

_PACKAGES = {
    "bullet-safety-gym": ("bullet-safety-gym", "pybullet"),
    "safety-gymnasium": ("safety-gymnasium", "mujoco"),
    "metadrive": ("metadrive-simulator",),
    "gymnasium-robotics": ("gymnasium-robotics", "mujoco"),
    "sparse": ("safety-gymnasium", "mujoco"),
}
"""What the environments of a family need beside this package."""
_BOUNDS = {"bullet-safety-gym": 1000.0, "metadrive": 1.0}
"""Bounds of the observation spaces of the families' environments; the others have none."""


@dataclass(frozen=True)
class About:
    """Who made a data set, in Minari's terms."""

    author: tuple[str, ...] = ()
    """Names of the authors."""
    author_email: tuple[str, ...] = ()
    """How to reach them."""
    code_permalink: str | None = None
    """An address of the code that made it, of one version."""


def write_minari(
    root: Path,
    dataset_id: str,
    episodes: Iterable[Episode],
    task: Task,
    about: About | None = None,
    facts: Sequence[Mapping[str, Any]] = (),
    algorithms: Sequence[str] = (),
) -> None:
    """Writes episodes as a Minari data set that ``minari.load_dataset`` finds with ``MINARI_DATASETS_PATH=root``.

    Costs lie in ``infos["cost"]``, sub-costs in ``infos["cost_<name>"]``; Minari keeps T+1 observations and infos per
    episode, and the costs of the reset are 0. Each array has a Fletcher-32 checksum.

    Args:
        root: The folder that becomes the root; created, must not hold the data set yet.
        dataset_id: For instance ``springhead/BallCircle-v0``.
        episodes: At least one.
        task: The task; its environment is named in the description, so ``recover_environment`` works, and its
            ``return_range`` are Minari's reference scores.
        about: Who made it and how.
        facts: For each episode what its metadata shall hold, such as ``seed``, ``policy`` or ``cost_limit``; entries
            that are None are left out.
        algorithms: The algorithms whose policies acted.

    Raises:
        BadInput: If there are no episodes or the data set exists already.
        OSError: If the disk is full.
    """
    folder = root / dataset_id / "data"
    if folder.parent.exists():
        raise BadInput(f"{folder.parent}: exists already; remove it first")
    folder.mkdir(parents=True)
    count = steps = 0
    with hdf5.create(folder / "main_data.hdf5") as (file, check):
        for episode in episodes:
            _write_episode(file, count, episode, task, facts[count] if facts else {})
            check()
            count += 1
            steps += episode.length
        if not count:
            raise BadInput(f"Minari data set {dataset_id}: no episodes to write")
    for space in Path(dataset_id).parents[:-1]:
        write_json(root / space / "namespace_metadata.json", {})
    size = (folder / "main_data.hdf5").stat().st_size / 1e6
    totals = {"total_episodes": count, "total_steps": steps, "dataset_size": round(size, 1)}
    write_json(folder / "metadata.json", _description(dataset_id, task, about or About(), algorithms) | totals)


def _write_episode(file: h5py.File, number: int, episode: Episode, task: Task, facts: Mapping[str, Any]) -> None:
    group = file.create_group(f"episode_{number}")
    group.attrs["id"] = number
    group.attrs["total_steps"] = episode.length
    known = {
        "episode_id": episode.id,
        "episode_return": episode.episode_return,
        "cost_return": episode.cost_return,
        **{key: value for key, value in facts.items() if value is not None},
    }
    for key, value in sorted(known.items()):
        group.attrs[key] = value

    def add(name: str, array: Array) -> None:
        # Chunked, although it is one chunk, because only chunks have checksums.
        group.create_dataset(name, data=array, chunks=array.shape, fletcher32=True, track_times=False)

    add("observations", np.concatenate([episode.observations, episode.next_observations[-1:]]))
    add("actions", episode.actions)
    add("rewards", episode.rewards)
    add("terminations", episode.terminals)
    add("truncations", episode.timeouts)
    add("infos/cost", _after_reset(episode.costs))
    if episode.sub_costs is not None:
        for name, values in zip(task.sub_costs, episode.sub_costs.T, strict=True):
            add(f"infos/cost_{name}", _after_reset(values))


def _after_reset(values: Array) -> Array:
    return np.concatenate([np.zeros(1, dtype=np.float32), values])


def _description(dataset_id: str, task: Task, about: About, algorithms: Sequence[str]) -> dict[str, Any]:
    """``metadata.json`` without the totals: every field that Minari knows and that is known."""
    import gymnasium
    from minari.serialization import serialize_space

    from springhead.rl.envs import env_name

    bound = np.full(task.observation_dim, _BOUNDS.get(task.family, np.inf), dtype=np.float32)
    limit = np.ones(task.action_dim, dtype=np.float32)
    spec = gymnasium.spec(env_name(task.name)).to_json()
    named = {
        "author": sorted(about.author),
        "author_email": sorted(about.author_email),
        "code_permalink": about.code_permalink,
        "algorithm_name": ", ".join(algorithms),
    }
    needed = ("springhead", *_PACKAGES.get(task.family, ()))
    scores = "the reference scores are the lowest and the highest return of the published DSRL data set of the task"
    meaning = f"infos['cost'] is the cost of every step{f'; {scores}' if task.data_file else ''}."
    return {
        "dataset_id": dataset_id,
        "data_format": "hdf5",
        "jpeg_encoding": True,
        "minari_version": metadata.version("minari"),
        "observation_space": serialize_space(gymnasium.spaces.Box(-bound, bound, dtype=np.float32)),
        "action_space": serialize_space(gymnasium.spaces.Box(-limit, limit, dtype=np.float32)),
        "env_spec": spec,
        "eval_env_spec": spec,
        "description": f"Episodes of {task.name} over a range of cost limits. {meaning}",
        "requirements": [f"{name}=={version}" for name in needed if (version := _version(name))],
        "ref_min_score": task.return_range[0],
        "ref_max_score": task.return_range[1],
        "cost_limits": list(task.limits),
        "horizon": task.horizon,
        **{key: value for key, value in named.items() if value},
    }


def _version(package: str) -> str | None:
    """The installed version; imported episodes may be of a simulator that is not installed here."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def iter_raw(folder: Path) -> Iterator[dict[str, Any]]:
    """Reads a Minari data set episode by episode, as Minari itself does, in either of its formats.

    Args:
        folder: The data set's folder, which has the folder ``data`` in it.

    Yields:
        ``id``, ``observations``, ``actions``, ``rewards``, ``terminations``, ``truncations`` and ``infos`` of each.

    Raises:
        BadInput: If it is no Minari data set, or damaged; the message names folder and episode.
    """
    description = folder / "data" / "metadata.json"
    if not description.is_file():
        raise BadInput(
            f"{folder}: no Minari data set (no data/metadata.json); name the folder with the version, as in X-v0"
        )
    total = _total_episodes(folder, description)
    from minari.dataset.minari_storage import MinariStorage

    at = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage = MinariStorage.read(folder / "data")
        for episode in storage.get_episodes(range(total)):
            yield episode
            at += 1
    except (OSError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        why = str(error) or type(error).__name__  # Minari's assertions say nothing
        raise BadInput(f"{folder}: episode {at} or a later one cannot be read ({why}); fetch it again") from error


def _total_episodes(folder: Path, description: Path) -> int:
    """How many episodes ``metadata.json`` states, made sure of in a file of Minari's HDF5 format.

    Raises:
        BadInput: If it states no number, or another one than the file has.
    """
    stated = read_json(description)
    total = stated.get("total_episodes") if isinstance(stated, dict) else None
    if not isinstance(stated, dict) or type(total) is not int or total < 0:
        what = f"total_episodes is {total!r}" if isinstance(stated, dict) else "is no mapping"
        raise BadInput(f"{description}: {what}; Minari writes the number of episodes there, fetch the data set again")
    path = folder / "data" / "main_data.hdf5"
    if path.is_file():
        found = total
        with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r") as file:  # damage is told by the reading
            found = sum(name.startswith("episode_") for name in file)
        if found != total:
            raise BadInput(f"{description}: total_episodes is {total}, but {path.name} has {found}; fetch both again")
    return total


def iter_minari(folder: Path, cost: str | None = "cost", sub_costs: Sequence[str] = ()) -> Iterator[Episode]:
    """Reads a Minari data set of vectors episode by episode.

    Args:
        folder: The data set's folder.
        cost: The key of ``infos`` that holds the cost of each step; None gives costs of 0.
        sub_costs: The names behind ``infos["cost_<name>"]``, where there are such.

    Yields:
        The episodes. One that ended without a flag, because whoever collected it stopped there, has a time-out.

    Raises:
        BadInput: If the data set is damaged, holds no vectors, or lacks the cost.
    """
    for raw in iter_raw(folder):
        where = f"{folder}: episode {raw['id']}"
        for key in ("observations", "actions"):
            if not isinstance(raw[key], np.ndarray) or raw[key].ndim != 2 or raw[key].dtype.kind not in "biuf":
                raise BadInput(f"{where}: {key} are not vectors of numbers, which an episode here needs")
        if np.asarray(raw["rewards"]).ndim != 1 or np.asarray(raw["rewards"]).dtype.kind not in "biuf":
            raise BadInput(f"{where}: rewards are not a number per step, which an episode here needs")
        steps = len(raw["rewards"])
        flags = np.asarray(raw["terminations"])
        if flags.shape != (steps,) or flags.dtype.kind not in "biuf":
            raise BadInput(f"{where}: terminations are not a flag per step, which an episode here needs")
        states = np.asarray(raw["observations"], dtype=np.float32)
        if steps < 1 or len(states) != steps + 1 or len(raw["actions"]) != steps:
            raise BadInput(f"{where}: {len(states)} observations and {len(raw['actions'])} actions for {steps} steps")
        infos = raw["infos"] or {}
        columns = [_signal(infos, f"cost_{name}", steps, where) for name in sub_costs]
        ends = np.arange(steps) == steps - 1
        terminated = bool(flags[-1])
        yield Episode(
            observations=states[:-1],
            next_observations=states[1:],
            actions=np.asarray(raw["actions"], dtype=np.float32),
            rewards=np.asarray(raw["rewards"], dtype=np.float32),
            costs=np.zeros(steps, np.float32) if cost is None else _signal(infos, cost, steps, where),
            terminals=ends & terminated,
            timeouts=ends & (not terminated),
            sub_costs=np.stack(columns, axis=1) if columns else None,
        )


def _signal(infos: Mapping[str, Any], key: str, steps: int, where: str) -> npt.NDArray[np.float32]:
    """A number per step from the infos, which may have one more, that of the reset."""
    values: Any = infos
    for part in key.split("/"):
        values = values.get(part) if isinstance(values, Mapping) else None
    if values is None:
        raise BadInput(f"{where}: infos have no {key!r} (they have {', '.join(sorted(infos)) or 'nothing'})")
    array = np.asarray(values)
    if not array.ndim or array.dtype.kind not in "biuf":
        found = f"a single {array.dtype}" if not array.ndim else f"of type {array.dtype}"
        raise BadInput(f"{where}: infos[{key!r}] is {found}; expected a number per step")
    array = array.astype(np.float32).reshape(len(array), -1)
    if array.shape[1] != 1 or len(array) not in (steps, steps + 1):
        raise BadInput(f"{where}: infos[{key!r}] has shape {array.shape} for {steps} steps; expected a number per step")
    return array[len(array) - steps :, 0]


def read_minari(folder: Path, cost: str | None = "cost", sub_costs: Sequence[str] = ()) -> Dataset:
    """Reads a whole Minari data set of vectors; see :func:`iter_minari`.

    Minari's own reader spends most of its time on h5py's objects, several for each array of each episode. This one
    asks HDF5 itself, straight into arrays of all steps, and leaves whatever surprises it to :func:`iter_minari`.
    """
    at_once = _read_at_once(folder, cost, sub_costs)
    return Dataset.of(list(iter_minari(folder, cost, sub_costs))) if at_once is None else at_once


class _UnusualError(Exception):
    """Something that :func:`iter_minari` has to judge."""


def _read_at_once(folder: Path, cost: str | None, sub_costs: Sequence[str]) -> Dataset | None:
    """Reads a data set of Minari's HDF5 format, or returns None where it is damaged or otherwise unusual."""
    path = folder / "data" / "main_data.hdf5"
    try:
        description = json.loads((folder / "data" / "metadata.json").read_text(encoding="utf-8"))
        episodes, steps = description["total_episodes"], int(description["total_steps"])
        if type(episodes) is not int:
            raise _UnusualError
        with h5py.File(path, "r") as file:
            return _joined(file, episodes, steps, cost, sub_costs) if episodes and steps else None
    except (_UnusualError, OSError, LookupError, ValueError, TypeError):
        return None


def _joined(file: h5py.File, episodes: int, steps: int, cost: str | None, sub_costs: Sequence[str]) -> Dataset:
    if len(file) != episodes:
        raise _UnusualError
    states_of = h5py.h5d.open(file.id, b"episode_0/observations")
    actions_of = h5py.h5d.open(file.id, b"episode_0/actions")
    if len(states_of.shape) != 2 or len(actions_of.shape) != 2:
        raise _UnusualError
    signals = [f"infos/{key}".encode() for key in ([cost] if cost else []) + [f"cost_{name}" for name in sub_costs]]
    rows = steps + episodes  # each episode has one state more than steps, and its signals one for the reset
    states = np.empty((rows, states_of.shape[1]), np.float32)
    actions = np.empty((steps, actions_of.shape[1]), np.float32)
    rewards, terminated = np.empty(steps, np.float32), np.empty(steps, np.bool_)
    told = np.empty((len(signals), rows), np.float32)
    ends = np.empty(episodes, np.int64)
    begin = 0
    for number in range(episodes):
        group = h5py.h5g.open(file.id, f"episode_{number}".encode())
        length = h5py.h5d.open(group, b"rewards").shape[0]
        end, shifted = begin + length, slice(begin + number, begin + length + number + 1)
        _fill(group, b"observations", states[shifted])
        _fill(group, b"actions", actions[begin:end])
        _fill(group, b"rewards", rewards[begin:end])
        _fill(group, b"terminations", terminated[begin:end])
        for key, values in zip(signals, told, strict=True):
            _fill(group, key, values[shifted])
        ends[number] = begin = end
    if begin != steps or not np.diff(ends, prepend=0).all():
        raise _UnusualError
    lasts = ends + np.arange(episodes)  # where the last state of each episode lies among all states
    before, after = np.ones(rows, np.bool_), np.ones(rows, np.bool_)
    before[lasts], after[np.concatenate([[0], lasts[:-1] + 1])] = False, False
    at_end = np.zeros(steps, np.bool_)
    at_end[ends - 1] = True
    per_step = told[:, after]
    return Dataset(
        observations=states[before],
        next_observations=states[after],
        actions=actions,
        rewards=rewards,
        costs=per_step[0] if cost else np.zeros(steps, np.float32),
        terminals=at_end & terminated,
        timeouts=at_end & ~terminated,
        sub_costs=np.ascontiguousarray(per_step[-len(sub_costs) :].T) if sub_costs else None,
        starts=np.concatenate([np.zeros(1, np.int64), ends[:-1]]),
        ends=ends,
    )


def _fill(group: h5py.h5g.GroupID, key: bytes, array: Array) -> None:
    """Reads one array of an episode into its place."""
    stored = h5py.h5d.open(group, key)
    if stored.shape != array.shape:
        raise _UnusualError
    stored.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
