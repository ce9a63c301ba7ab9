"""DSRL's file format (Liu et al. 2023): one HDF5 file with seven flat arrays, whole episodes one after the other.

An episode ends where ``terminals`` or ``timeouts`` is True. Tasks with several constraints have one more array,
``sub_costs`` (steps, K), whose attribute ``names`` says what its columns are; readers of the schema overlook it. The
same episodes give the same bytes, so a digest of the file is a digest of the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl import hdf5
from springhead.rl.episodes import (
    EPISODE_KEYS,
    FLAG_KEYS,
    SUB_COSTS,
    WIDE_KEYS,
    Dataset,
    Episode,
    common_keys,
)

Array = npt.NDArray[Any]

CHUNK_ROWS = 4096
"""Steps in a chunk; about 100 kB of a wide array: one checksum and one decompression each."""
BLOCK_ROWS = 16 * CHUNK_ROWS
"""Steps that reading and writing in pieces hold at a time."""


def write_dsrl(path: Path, episodes: Sequence[Episode], sub_costs: Sequence[str] = ()) -> None:
    """Writes episodes as a DSRL HDF5 file: gzip, a Fletcher-32 checksum per chunk, no times.

    Beside the episodes themselves at most two blocks of ``BLOCK_ROWS`` steps are held.

    Args:
        path: The file to write; an existing one is replaced.
        episodes: At least one.
        sub_costs: Names of the columns of ``sub_costs``, where the episodes have them.

    Raises:
        BadInput: If there are no episodes, or only some of them have sub-costs.
        OSError: If the disk is full; nothing is left of the file then.
    """
    keys = common_keys(episodes)
    write_stream(path, episodes, sum(episode.length for episode in episodes), keys, sub_costs)


def write_stream(
    path: Path, episodes: Iterable[Episode], steps: int, keys: Sequence[str], sub_costs: Sequence[str] = ()
) -> None:
    """Writes episodes that come one after the other, as :func:`write_dsrl` does.

    Args:
        path: The file to write; an existing one is replaced.
        episodes: They have ``steps`` steps in all.
        steps: That number, at least 1.
        keys: The arrays to write, in order.
        sub_costs: Names of the columns of ``sub_costs``.
    """
    with hdf5.create(path) as (file, check):
        at = 0
        for block in _blocks(episodes, keys):
            for key in keys:
                array = block[key].astype(np.bool_ if key in FLAG_KEYS else np.float32, copy=False)
                if key not in file:
                    _create(file, key, steps, array, sub_costs)
                file[key][at : at + len(array)] = array
                check()
            at += len(array)
        if at != steps:
            raise BadInput(f"{path}: {at} steps came where {steps} were announced")


def _create(file: h5py.File, key: str, steps: int, array: Array, sub_costs: Sequence[str]) -> None:
    shape, chunks = (steps, *array.shape[1:]), (min(CHUNK_ROWS, steps), *array.shape[1:])
    made = file.create_dataset(
        key, shape, array.dtype, chunks=chunks, compression="gzip", fletcher32=True, track_times=False
    )
    if key == SUB_COSTS:
        made.attrs["names"] = [str(name) for name in sub_costs]


def _blocks(episodes: Iterable[Episode], keys: Sequence[str]) -> Iterator[dict[str, Array]]:
    """Joins episodes to blocks of ``BLOCK_ROWS`` steps; the last one may be shorter."""
    waiting: list[Episode] = []
    rows = 0

    def joined(size: int) -> dict[str, Array]:
        return {key: np.concatenate([getattr(e, key) for e in waiting])[:size] for key in keys}

    for episode in episodes:
        waiting.append(episode)
        rows += episode.length
        while rows >= BLOCK_ROWS:
            yield joined(BLOCK_ROWS)
            # What is left is the tail of the last episode; it begins the next block.
            tail = rows - BLOCK_ROWS
            last = waiting[-1]
            waiting = [Episode(**{key: getattr(last, key)[last.length - tail :] for key in last.keys})] if tail else []
            rows = tail
    if rows:
        yield joined(rows)


def read_dsrl(path: Path, cut_tail: bool = False) -> Dataset:
    """Reads a whole DSRL HDF5 file, ours or a published one, with all cores.

    Structure is checked here (keys, shapes, numbers of rows, whole episodes, checksums); values are the business of
    validation. Rewards, costs and flags may have the shape (N, 1), which some published files use.

    Args:
        path: The file.
        cut_tail: Leave out the steps after the last end flag, which is what other readers of such files do unasked.

    Returns:
        The data set.

    Raises:
        BadInput: If the file is missing, damaged or incomplete; the message names the file and the array.
    """
    with _opened(path) as file:
        keys = _keys(file, path)
        _check_rows(file, path, keys)
        wanted = {key: np.dtype(np.bool_ if key in FLAG_KEYS else np.float32) for key in keys}
        try:
            found = hdf5.read_fast(file, path, wanted)
        except OSError as error:
            raise _damaged(path, error.args[0], error) from error
    arrays = {key: _flat(key, array) for key, array in found.items()}
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]).astype(np.int64) + 1
    steps = len(arrays["rewards"])
    last = int(ends[-1]) if len(ends) else 0
    if cut_tail and last:
        arrays = {key: array[:last] for key, array in arrays.items()}
    else:
        _check_end(path, last, steps)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    return Dataset(**arrays, starts=starts, ends=ends)


def iter_episodes(path: Path, block_rows: int = BLOCK_ROWS) -> Iterator[Episode]:
    """Reads a DSRL HDF5 file episode by episode, for files that do not fit into memory.

    Holds two blocks of ``block_rows`` steps and one episode at a time, whatever the size of the file.

    Args:
        path: The file.
        block_rows: Steps read at once; more are quicker.

    Yields:
        The episodes, in order; their arrays may be views of one block.

    Raises:
        BadInput: As :func:`read_dsrl`, when the reading arrives there.
    """
    with _opened(path) as file:
        keys = _keys(file, path)
        steps = _check_rows(file, path, keys)
        rest: dict[str, Array] = {}
        for start in range(0, steps, block_rows):
            block = {key: _rows(file, path, key, slice(start, start + block_rows)) for key in keys}
            if rest:
                block = {key: np.concatenate([rest[key], block[key]]) for key in keys}
            begin = 0
            for last in np.flatnonzero(block["terminals"] | block["timeouts"]):
                yield Episode(**{key: block[key][begin : last + 1] for key in keys})
                begin = int(last) + 1
            # Copied, so that the block itself is not held by its tail.
            rest = {key: block[key][begin:].copy() for key in keys}
        _check_end(path, steps - len(rest["rewards"]), steps)


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise BadInput(f"{path}: no such file; produce it with the collect stage or restore it with `dvc checkout`")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise BadInput(f"{path}: damaged or not an HDF5 file ({error}); restore it with `dvc checkout`") from error


def _damaged(path: Path, key: str, error: OSError) -> BadInput:
    return BadInput(f"{path}: array '{key}' is damaged ({error.args[-1]}); restore it with `dvc checkout`")


def _keys(file: h5py.File, path: Path) -> tuple[str, ...]:
    """The arrays to read, each of a shape and type that can be."""
    keys = (*EPISODE_KEYS, SUB_COSTS) if isinstance(file.get(SUB_COSTS), h5py.Dataset) else EPISODE_KEYS
    for key in keys:
        array = file.get(key)
        if not isinstance(array, h5py.Dataset):
            present = ", ".join(sorted(file.keys())) or "nothing"
            raise BadInput(f"{path}: no array '{key}' (found: {present}); DSRL files have {', '.join(EPISODE_KEYS)}")
        wide = key in (*WIDE_KEYS, SUB_COSTS)
        if array.ndim != (2 if wide else 1) and not (not wide and array.shape[1:] == (1,)):
            expected = "(steps, width)" if wide else "(steps,)"
            raise BadInput(f"{path}: array '{key}' has shape {array.shape}; expected {expected}")
        flags = key in FLAG_KEYS
        if array.dtype.kind not in ("biu" if flags else "biuf"):
            raise BadInput(f"{path}: array '{key}' holds {array.dtype}; expected {'flags' if flags else 'numbers'}")
    return keys


def _check_rows(file: h5py.File, path: Path, keys: Sequence[str]) -> int:
    """Checks that all arrays have the same, positive number of rows and both observations the same width."""
    rows = {key: len(file[key]) for key in keys}
    if len(set(rows.values())) != 1:
        listing = ", ".join(f"{key} {number}" for key, number in rows.items())
        raise BadInput(f"{path}: arrays differ in their number of steps ({listing}); the file is inconsistent")
    if rows["rewards"] == 0:
        raise BadInput(f"{path}: no steps in the file; collect episodes, or loosen the filter that removed them all")
    before, after = file["observations"].shape, file["next_observations"].shape
    if before != after:
        raise BadInput(f"{path}: observations {before} and next_observations {after} differ in shape")
    return rows["rewards"]


def _check_end(path: Path, last: int, steps: int) -> None:
    if last != steps:
        raise BadInput(
            f"{path}: steps {last} to {steps - 1} belong to an episode without an end (no terminal or timeout); "
            "the file is cut short, so collect it again or cut those steps off knowingly"
        )


def _rows(file: h5py.File, path: Path, key: str, rows: slice) -> Array:
    try:
        array = file[key][rows]
    except OSError as error:
        raise _damaged(path, key, error) from error
    return _flat(key, np.asarray(array).astype(np.bool_ if key in FLAG_KEYS else np.float32, copy=False))


def _flat(key: str, array: Array) -> Array:
    """Takes the second dimension of (N, 1) away where the schema has one dimension."""
    return array if key in (*WIDE_KEYS, SUB_COSTS) else array.reshape(len(array))
