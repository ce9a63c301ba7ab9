"""What filters do to every step of the data: copying episodes, and adding noise to their states.

Work is cut into blocks of whole episodes, small enough for a core's cache, which threads share: NumPy copies, adds and
draws without holding the interpreter. A block has a generator of its own, so the numbers depend neither on how many
threads there are nor on which of them is the faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from springhead.rl.dataset import Dataset
from springhead.rl.filters import Positions
from springhead.rl.hdf5 import threads

Array = npt.NDArray[Any]
T = TypeVar("T")
_ENTRIES = 1 << 17  # of a block's states, half a megabyte
_LEVELS = 1 << 16  # of the noise: what two random bytes choose among


@dataclass(frozen=True)
class _Block:
    """Episodes next to each other in the output.

    Attributes:
        at: (k,) their positions in the data set.
        rows: Where their steps go.
        ends: (k,) row after each one's last step, counted from the block's first row.
    """

    at: Positions
    rows: slice
    ends: npt.NDArray[np.int64]


class Gather:
    """Episodes of a data set, in some order, to be laid end to end.

    Args:
        data: Episodes laid end to end.
        at: (m,) positions of those that are wanted, at least one.
    """

    def __init__(self, data: Dataset, at: Positions) -> None:
        self.data = data
        lengths = data.ends - data.starts
        self._length = int(lengths[0]) if (lengths == lengths[0]).all() else None  # where all have the same
        self.ends = np.cumsum(lengths[at], dtype=np.int64)
        self.starts = self.ends - lengths[at]
        number = self.starts * data.observations.shape[1] // _ENTRIES
        firsts = np.flatnonzero(np.r_[True, number[1:] != number[:-1]])
        self.blocks = [
            _Block(
                at[first:last],
                slice(int(self.starts[first]), int(self.ends[last - 1])),
                self.ends[first:last] - self.starts[first],
            )
            for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(at)], strict=True)
        ]

    def empty(self, key: str) -> Array:
        """Returns room for one array of the episodes."""
        array = getattr(self.data, key)
        return np.empty((int(self.ends[-1]), *array.shape[1:]), array.dtype)

    def copy(self, key: str, block: _Block, out: Array) -> Array:
        """Copies one array of a block's episodes into its place in ``out``, and returns that place."""
        array, place = getattr(self.data, key), out[block.rows]
        if self._length is not None:  # whole episodes are rows of a table
            shape = (-1, self._length, *array.shape[1:])
            np.take(array.reshape(shape), block.at, axis=0, out=place.reshape(shape), mode="clip")
            return place
        breaks = np.flatnonzero(np.diff(block.at) != 1) + 1  # neighbours are copied together
        first, last = block.at[np.r_[0, breaks]], block.at[np.r_[breaks - 1, len(block.at) - 1]]
        runs = zip(self.data.starts[first].tolist(), self.data.ends[last].tolist(), strict=True)
        np.concatenate([array[a:b] for a, b in runs], out=place)
        return place

    def read(self, key: str, block: _Block) -> Array:
        """Returns one array of a block's episodes, not to be written to: a view where they lie next to each other."""
        at, array = block.at, getattr(self.data, key)
        if (np.diff(at) == 1).all():
            part: Array = array[self.data.starts[at[0]] : self.data.ends[at[-1]]]
            return part
        length = block.rows.stop - block.rows.start
        out = np.empty((length, *array.shape[1:]), array.dtype)
        return self.copy(key, replace(block, rows=slice(0, length)), out)

    def arrays(self, keys: Iterable[str]) -> dict[str, Array]:
        """Returns whole arrays of the episodes."""
        made = {key: self.empty(key) for key in keys}

        def copy(block: _Block) -> None:
            for key, out in made.items():
                self.copy(key, block, out)

        _each(copy, self.blocks)
        return made


def take(data: Dataset, at: Positions, keys: Sequence[str] | None = None) -> Dataset:
    """Returns the episodes at some positions, in that order, laid end to end; the data set itself if that is all.

    Args:
        data: Episodes laid end to end.
        at: (m,) positions, at least one.
        keys: Which arrays to copy; the others stay as they are, and it is for the caller to replace them.
    """
    if np.array_equal(at, np.arange(len(data))):
        return data
    gather = Gather(data, at)
    return replace(data, **gather.arrays(data.keys if keys is None else keys), starts=gather.starts, ends=gather.ends)


def with_noise(data: Dataset, at: Positions, scale: float, rng: np.random.Generator) -> tuple[Dataset, float]:
    """Returns the episodes at some positions with Gaussian noise on their states, and the noise's deviation.

    Each state gets one noise vector, also where it appears as a successor, so that next_observations[t] stays
    observations[t + 1]. Its entries have 65,536 equally likely values, the largest of 4.3 deviations.

    Args:
        data: Episodes laid end to end.
        at: (m,) positions, at least one.
        scale: Standard deviation, as a multiple of that of all entries of their observations together.
        rng: Gives every block a generator of its own, which draws a vector for each of its steps, then one for each
            of its episodes' last successor.
    """
    gather = Gather(data, at)
    before, after = gather.empty("observations"), gather.empty("next_observations")
    parts = _each(lambda block: _moments(gather.read("observations", block)), gather.blocks)
    deviation = np.float32(scale * _deviation(parts))
    levels = _quantiles() * deviation

    def add(job: tuple[_Block, np.random.Generator]) -> None:
        block, own = job
        states, successors = (gather.read(key, block) for key in ("observations", "next_observations"))
        noise = draw(levels, own, (len(states) + len(block.at), states.shape[1]))
        np.add(states, noise[: len(states)], out=before[block.rows])
        place = after[block.rows]
        np.add(successors[:-1], noise[1 : len(states)], out=place[:-1])
        place[block.ends - 1] = successors[block.ends - 1] + noise[len(states) :]

    _each(add, list(zip(gather.blocks, rng.spawn(len(gather.blocks)), strict=True)))
    others = take(data, at, [key for key in data.keys if key not in ("observations", "next_observations")])
    return replace(others, observations=before, next_observations=after), float(deviation)


def draw(levels: npt.NDArray[np.float32], rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Draws among 65,536 equally likely values, by two random bytes each.

    Args:
        levels: (65536,) the values.
        rng: Any generator whose raw output has 64 bits, as NumPy's default.
        shape: Shape of the array.
    """
    number = int(np.prod(shape))
    raw = rng.bit_generator.random_raw(-(-number // 4)).astype("<u8", copy=False)
    drawn = np.empty(number, np.float32)
    np.take(levels, raw.view("<u2")[:number], out=drawn, mode="wrap")  # all are in range; "clip" is slower
    return drawn.reshape(shape)


@cache
def _quantiles() -> npt.NDArray[np.float32]:
    """The standard normal distribution at a resolution of 65,536 equally likely values, in rising order.

    They are its quantiles in the middle of 65,536 equal parts of its mass, stretched by 1.00001 to variance 1; the
    largest is 4.325. No distance between the two distribution functions is above 2^-16, and drawing among them takes a
    fifth of the time of NumPy's normal numbers, which was most of what the noise filter did.
    """
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse(0.5 + (i + 0.5) / _LEVELS) for i in range(_LEVELS // 2)])
    upper /= np.sqrt(np.mean(upper**2))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


def _moments(observations: Array) -> tuple[int, float, float]:
    """Number, mean and sum of squared distances from it of a block's entries.

    In float32, summed pairwise, as distances from the mean of the first of them: a block is small enough for six digits
    of the deviation, and no more are needed.
    """
    entries = observations.reshape(-1)
    near = entries[:1024].mean()
    distances = entries - near
    number, total = len(entries), float(distances.sum())
    np.multiply(distances, distances, out=distances)  # not a dot product, whose last bits depend on the threads of BLAS
    squares = max(float(distances.sum()) - total**2 / number, 0.0)  # rounding may take it below 0
    return number, float(near) + total / number, squares


def _deviation(parts: Sequence[tuple[int, float, float]]) -> float:
    """The one standard deviation of all entries, from the moments of parts of them."""
    numbers, means, squares = (np.array(column, np.float64) for column in zip(*parts, strict=True))
    mean = (numbers * means).sum() / numbers.sum()
    return float(np.sqrt((squares.sum() + (numbers * (means - mean) ** 2).sum()) / numbers.sum()))


def _each(work: Callable[[T], Any], jobs: Sequence[T]) -> list[Any]:
    """Does all jobs, in threads where there are several, and returns their results in order."""
    number = min(threads(), len(jobs))
    if number == 1:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(work, jobs))
