"""Episodes, data sets of episodes, and their two file formats.

DSRL's schema (Liu et al. 2023): one HDF5 file with seven flat arrays in which whole episodes follow each other in time
order; an episode ends where ``terminals`` or ``timeouts`` is True. Minari's: a folder with one HDF5 group per episode
and a JSON description. Both writers give the same bytes for the same episodes, so a digest of the file is a digest
of the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.jsonio import write_json
from springhead.lineage.digests import arrays_digest
from springhead.rl.tasks import Task

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

FLOAT_KEYS = ("observations", "next_observations", "actions", "rewards", "costs")
FLAG_KEYS = ("terminals", "timeouts")
EPISODE_KEYS = FLOAT_KEYS + FLAG_KEYS
"""The seven arrays of DSRL's schema."""

_CHUNK_ROWS = 4096  # about 100 kB of a wide array: one checksum and one decompression each


@dataclass(frozen=True)
class Episode:
    """One whole episode of T steps.

    Attributes:
        observations: float32 (T, observation_dim), raw.
        next_observations: float32 (T, observation_dim), the true successors.
        actions: float32 (T, action_dim), as executed, in [-1, 1].
        rewards: float32 (T,), unscaled.
        costs: float32 (T,), at least 0.
        terminals: bool (T,), True at the last step where the environment ended the episode.
        timeouts: bool (T,), True at the last step where the horizon ended it.
        sub_costs: float32 (T, K), the separate constraint signals behind ``costs``, where the task has several.
    """

    observations: Floats
    next_observations: Floats
    actions: Floats
    rewards: Floats
    costs: Floats
    terminals: Flags
    timeouts: Flags
    sub_costs: Floats | None = None

    @property
    def length(self) -> int:
        """Number of steps."""
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards, added in float64."""
        return float(self.rewards.sum(dtype=np.float64))

    @property
    def cost_return(self) -> float:
        """Undiscounted sum of the costs, added in float64."""
        return float(self.costs.sum(dtype=np.float64))

    @cached_property
    def id(self) -> str:
        """SHA-256 over the seven arrays, and the sub-costs where there are any: its identity in every row table."""
        arrays = {key: getattr(self, key) for key in EPISODE_KEYS}
        return arrays_digest(arrays if self.sub_costs is None else {**arrays, "sub_costs": self.sub_costs})


@dataclass(frozen=True)
class Dataset:
    """Episodes laid end to end, N steps in all.

    Attributes:
        observations: float32 (N, observation_dim).
        next_observations: float32 (N, observation_dim).
        actions: float32 (N, action_dim).
        rewards: float32 (N,).
        costs: float32 (N,).
        terminals: bool (N,).
        timeouts: bool (N,).
        starts: int64 (episodes,), index of each episode's first step.
        ends: int64 (episodes,), index after each episode's last step.
    """

    observations: Floats
    next_observations: Floats
    actions: Floats
    rewards: Floats
    costs: Floats
    terminals: Flags
    timeouts: Flags
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Dataset:
        """Lays episodes end to end.

        Raises:
            BadInput: If there are no episodes.
        """
        if not episodes:
            raise BadInput("a data set needs at least one episode, got none")
        ends = np.cumsum([episode.length for episode in episodes], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        arrays = {key: np.concatenate([getattr(episode, key) for episode in episodes]) for key in EPISODE_KEYS}
        return cls(**arrays, starts=starts, ends=ends)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.starts)

    @property
    def num_steps(self) -> int:
        """Number of steps of all episodes."""
        return len(self.rewards)

    def episode(self, index: int) -> Episode:
        """The episode at a position; its arrays are views into the data set."""
        rows = slice(int(self.starts[index]), int(self.ends[index]))
        return Episode(**{key: getattr(self, key)[rows] for key in EPISODE_KEYS})

    def episodes(self) -> list[Episode]:
        """All episodes, in order."""
        return [self.episode(index) for index in range(len(self))]

    @cached_property
    def episode_returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted return of every episode, (episodes,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    @cached_property
    def cost_returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted cost return of every episode, (episodes,)."""
        return np.add.reduceat(self.costs.astype(np.float64), self.starts)


def write_dsrl(path: Path, episodes: Sequence[Episode]) -> None:
    """Writes episodes as a DSRL HDF5 file: gzip, a Fletcher-32 checksum per chunk, no times.

    Args:
        path: The file to write; an existing one is replaced.
        episodes: At least one.

    Raises:
        BadInput: If there are no episodes.
    """
    data = Dataset.of(episodes)
    # In memory first: on a full disk HDF5 reports nothing to Python, it crashes (SIGSEGV on closing).
    with h5py.File(path.name, "w", libver="earliest", driver="core", backing_store=False) as file:
        for key in EPISODE_KEYS:
            array = getattr(data, key)
            array = array.astype(np.float32 if key in FLOAT_KEYS else np.bool_, copy=False)
            chunks = (min(_CHUNK_ROWS, len(array)), *array.shape[1:])
            file.create_dataset(key, data=array, chunks=chunks, compression="gzip", fletcher32=True, track_times=False)
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


def read_dsrl(path: Path) -> Dataset:
    """Reads a DSRL HDF5 file, ours or a published one.

    Structure is checked here (keys, shapes, numbers of rows, whole episodes, checksums); values are the business of
    validation. Rewards, costs and flags may have the shape (N, 1), which some published files use.

    Args:
        path: The file.

    Returns:
        The data set.

    Raises:
        BadInput: If the file is missing, damaged or incomplete; the message names the file and the array.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; produce it with the collect stage or restore it with `dvc checkout`")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise BadInput(f"{path}: damaged or not an HDF5 file ({error}); restore it with `dvc checkout`") from error
    with file:
        arrays = {key: _read_array(file, path, key) for key in EPISODE_KEYS}
    _check_shapes(arrays, path)
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    steps = len(arrays["rewards"])
    last = int(ends[-1]) if len(ends) else 0
    if last != steps:
        raise BadInput(
            f"{path}: steps {last} to {steps - 1} belong to an episode without an end (no terminal or timeout); "
            "the file is cut short, so collect it again or cut those steps off knowingly"
        )
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    return Dataset(**arrays, starts=starts, ends=ends.astype(np.int64))


def _read_array(file: h5py.File, path: Path, key: str) -> npt.NDArray[Any]:
    """Reads one array as float32 or bool, 2-d for observations and actions, else 1-d."""
    if not isinstance(file.get(key), h5py.Dataset):
        present = ", ".join(sorted(file.keys())) or "nothing"
        raise BadInput(f"{path}: no array '{key}' (found: {present}); DSRL files have {', '.join(EPISODE_KEYS)}")
    try:
        array = np.asarray(file[key][()])
    except OSError as error:
        raise BadInput(f"{path}: array '{key}' is damaged ({error}); restore it with `dvc checkout`") from error
    wide = key in ("observations", "next_observations", "actions")
    if not wide and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != (2 if wide else 1):
        expected = "(steps, width)" if wide else "(steps,)"
        raise BadInput(f"{path}: array '{key}' has shape {array.shape}; expected {expected}")
    kinds = "biuf" if key in FLOAT_KEYS else "biu"
    if array.dtype.kind not in kinds:
        raise BadInput(f"{path}: array '{key}' holds {array.dtype}; expected {'numbers' if 'f' in kinds else 'flags'}")
    return array.astype(np.float32 if key in FLOAT_KEYS else np.bool_)


def _check_shapes(arrays: dict[str, npt.NDArray[Any]], path: Path) -> None:
    """Checks that all arrays have the same, positive number of rows and both observations the same width."""
    rows = {key: len(array) for key, array in arrays.items()}
    if len(set(rows.values())) != 1:
        listing = ", ".join(f"{key} {number}" for key, number in rows.items())
        raise BadInput(f"{path}: arrays differ in their number of steps ({listing}); the file is inconsistent")
    if rows["rewards"] == 0:
        raise BadInput(f"{path}: no steps in the file; collect episodes, or loosen the filter that removed them all")
    before, after = arrays["observations"].shape, arrays["next_observations"].shape
    if before != after:
        raise BadInput(f"{path}: observations {before} and next_observations {after} differ in shape")


def write_minari(root: Path, dataset_id: str, episodes: Sequence[Episode], task: Task) -> None:
    """Writes episodes as a Minari data set that ``minari.load_dataset`` finds with ``MINARI_DATASETS_PATH=root``.

    Costs lie in ``infos["cost"]``; Minari keeps T+1 observations and infos per episode, and the cost of the reset is 0.

    Args:
        root: The folder that becomes the root; created, must not hold the data set yet.
        dataset_id: For instance ``springhead/BallCircle-v0``.
        episodes: At least one.
        task: The task; its environment is named in the description, so ``recover_environment`` works.

    Raises:
        BadInput: If there are no episodes or the data set exists already.
    """
    if not episodes:
        raise BadInput(f"Minari data set {dataset_id}: no episodes to write")
    if (root / dataset_id).exists():
        raise BadInput(f"{root / dataset_id}: exists already; remove it first")
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    from springhead.rl.envs import env_name

    root.mkdir(parents=True, exist_ok=True)
    buffers = [
        EpisodeBuffer(
            id=index,
            observations=np.concatenate([episode.observations, episode.next_observations[-1:]]),
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=episode.terminals,
            truncations=episode.timeouts,
            infos={"cost": np.concatenate([np.zeros(1, dtype=np.float32), episode.costs])},
        )
        for index, episode in enumerate(episodes)
    ]
    bound = np.full(task.observation_dim, 1000.0, dtype=np.float32)
    limit = np.ones(task.action_dim, dtype=np.float32)
    with _minari_root(root), warnings.catch_warnings():
        # Minari warns about every optional author field that is left out.
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id,
            buffer=buffers,
            env=gymnasium.spec(env_name(task.name)),
            observation_space=gymnasium.spaces.Box(-bound, bound, dtype=np.float32),
            action_space=gymnasium.spaces.Box(-limit, limit, dtype=np.float32),
            algorithm_name="ppo-lag",
            description=f"Episodes of {task.name} over a range of cost limits; infos hold the cost of every step.",
            data_format="hdf5",
        )
    description = root / dataset_id / "data" / "metadata.json"
    write_json(description, json.loads(description.read_text(encoding="utf-8")))


@contextlib.contextmanager
def _minari_root(root: Path) -> Iterator[None]:
    """Points Minari at a folder: an environment variable is the only way it can be told."""
    saved = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root.resolve())
    try:
        yield
    finally:
        if saved is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = saved
