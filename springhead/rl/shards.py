"""Finished groups of episodes on disk, so that a collection that was killed goes on where it was.

A group is one file, named by its number and the SHA-256 of its bytes. It is written beside its place, synced and
renamed: under its name it is whole, or it was damaged afterwards, which its name gives away. A shard is a cache. Its
group is a function of the stage's inputs, and the folder belongs to those inputs, so a damaged one is collected again.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from springhead.errors import BadInput
from springhead.rl.episodes import Dataset, Episode


class Shards:
    """The shards of one collection.

    Args:
        folder: Where they lie; made if need be.
        warn: Is told of every shard that is damaged, in one line.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self._warn = folder, warn
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*"):  # half-written when the process was killed
            left.unlink()

    def find(self, number: int, episodes: int) -> list[Episode] | None:
        """Returns a group's episodes, or None if it has to be collected (again).

        Args:
            number: The group's number.
            episodes: How many episodes it has.
        """
        for path in sorted(self.folder.glob(f"{number:06d}-*")):
            found = _read(path)
            if found is not None and len(found) == episodes:
                return found
            self._warn(
                f"{path}: the shard of group {number} is damaged (its bytes have another sha256 than its name says); "
                f"its {episodes} episodes are collected again"
            )
            path.unlink()
        return None

    def load(self, number: int) -> list[Episode]:
        """Returns the episodes of a group that was found or written before.

        Raises:
            BadInput: If the shard was damaged meanwhile.
        """
        for path in self.folder.glob(f"{number:06d}-*"):
            found = _read(path)
            if found is not None:
                return found
        raise BadInput(
            f"{self.folder}: the shard of group {number} was damaged while the stage ran; run the stage again, "
            "which collects this group again and keeps the others"
        )

    def write(self, number: int, episodes: Sequence[Episode]) -> None:
        """Writes a group, durably.

        Raises:
            OSError: If the disk is full; nothing is left of this shard then, and the others are untouched.
        """
        buffer = io.BytesIO()
        data = Dataset.of(episodes)
        # Not compressed: that would take longer than some simulators take to step.
        np.savez(buffer, ends=data.ends, **{key: getattr(data, key) for key in data.keys})
        content = buffer.getbuffer()
        name = f"{number:06d}-{hashlib.sha256(content).hexdigest()}.npz"
        temporary = self.folder / f".{name}"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.folder / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.folder / name)) from error
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> list[Episode] | None:
    """Returns the episodes of a shard, None if its bytes are not those of its name."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem.partition("-")[2]:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        ends = arrays["ends"]
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        flat = {key: arrays[key] for key in arrays.files if key != "ends"}
    return Dataset(**flat, starts=starts, ends=ends).episodes()
