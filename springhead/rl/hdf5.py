"""HDF5 that is read by several threads, and written without crashing on a full disk.

HDF5 inflates one chunk after the other under one lock. :func:`read_fast` asks it only where the chunks lie, and then
reads, checks and inflates them itself, in threads and with ISA-L. Whatever surprises it (another filter, a checksum
that does not fit) it leaves to HDF5, which has the last word.

HDF5 reports no full disk to Python: closing the file ends the process (SIGSEGV). :class:`Sink` is a file that never
fails towards HDF5 and says afterwards what went wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from isal.igzip_lib import IsalError

Array = npt.NDArray[Any]

_DEFLATE, _SHUFFLE, _FLETCHER32 = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32


_BATCH = 1 << 19  # stored bytes that a thread reads at a time


class _UnusualError(Exception):
    """A chunk that only HDF5 itself can judge."""


@dataclass(frozen=True)
class _Layout:
    """How an array's chunks are stored."""

    filters: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def threads() -> int:
    """How many threads inflate: the cores this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def read_fast(file: h5py.File, path: Path, wanted: dict[str, np.dtype[Any]]) -> dict[str, Array]:
    """Reads whole arrays, converted to the wanted types.

    Args:
        file: The open file.
        path: Where it lies.
        wanted: The type of each array, by key; each is an array of numbers or flags.

    Returns:
        The arrays by key, in their stored shape.

    Raises:
        OSError: If an array is damaged; its first argument is then the array's key.
    """
    results = {key: np.empty(file[key].shape, dtype) for key, dtype in wanted.items()}
    with path.open("rb") as raw, ThreadPoolExecutor(threads()) as pool:
        work = {key: _start(file[key], raw.fileno(), results[key], pool) for key in wanted}
        for key, chunks in work.items():
            if chunks is None or not _all_done(chunks):
                try:
                    # Not read_direct: HDF5's own conversion is many times slower than NumPy's.
                    results[key][...] = file[key][()]
                except OSError as error:
                    raise OSError(key, str(error)) from error
    return results


def _all_done(chunks: list[Future[None]]) -> bool:
    """Waits for all chunks of an array; False if one of them must be left to HDF5."""
    try:
        for chunk in chunks:
            chunk.result()
    except (_UnusualError, IsalError, ValueError, OSError):  # type: ignore[misc]  # ISA-L's error has no type
        for chunk in chunks:
            chunk.cancel()
        return False
    return True


def _start(array: h5py.Dataset, descriptor: int, result: Array, pool: ThreadPoolExecutor) -> list[Future[None]] | None:
    """Starts reading an array's chunks; None if the array is not stored in a way that is known here."""
    layout = _layout(array)
    if layout is None:
        return None
    places: list[Any] = []
    array.id.chunk_iter(places.append)
    expected = np.prod([-(-size // step) for size, step in zip(array.shape, layout.shape, strict=True)])
    if len(places) != expected:  # chunks never written hold a fill value
        return None
    # Some at a time: handing a small chunk to a thread takes as long as reading it.
    count = max(1, _BATCH // (1 + sum(place.size for place in places) // len(places)))
    batches = [places[start : start + count] for start in range(0, len(places), count)]
    return [pool.submit(_read_chunks, descriptor, batch, layout, result) for batch in batches]


def _read_chunks(descriptor: int, places: list[Any], layout: _Layout, result: Array) -> None:
    for place in places:
        _read_chunk(descriptor, place, layout, result)


def _layout(array: h5py.Dataset) -> _Layout | None:
    """Returns how an array is stored, None if HDF5 has to read it."""
    if array.chunks is None or 0 in array.shape or array.file.userblock_size or array.dtype.hasobject:
        return None
    created = array.id.get_create_plist()
    filters = tuple(int(created.get_filter(number)[0]) for number in range(created.get_nfilters()))
    known = {_DEFLATE, _SHUFFLE, _FLETCHER32}
    return _Layout(filters, tuple(array.chunks), array.dtype) if set(filters) <= known else None


def _read_chunk(descriptor: int, place: Any, layout: _Layout, result: Array) -> None:
    """Reads one chunk and puts it where it belongs."""
    if place.filter_mask:
        raise _UnusualError
    content: Any = memoryview(os.pread(descriptor, place.size, place.byte_offset))
    if len(content) != place.size:
        raise _UnusualError
    for name in reversed(layout.filters):
        if name == _FLETCHER32:
            content, stored = content[:-4], int.from_bytes(content[-4:], "little")
            if fletcher32(content) != stored:
                raise _UnusualError
        elif name == _DEFLATE:
            content = memoryview(isal_zlib.decompress(content, 15, layout.nbytes))
        else:
            by_byte = np.frombuffer(content, np.uint8).reshape(layout.dtype.itemsize, -1)
            content = memoryview(by_byte.T.tobytes())
    block = np.frombuffer(content, layout.dtype).reshape(layout.shape)
    ends = [min(a + n, size) for a, n, size in zip(place.chunk_offset, layout.shape, result.shape, strict=True)]
    target = tuple(slice(a, b) for a, b in zip(place.chunk_offset, ends, strict=True))
    result[target] = block[tuple(slice(0, t.stop - t.start) for t in target)]


_WIDTH = 1024
_WORDS = _WIDTH << 15  # words at a time, so that no sum leaves 32 bits
_PLACES = np.arange(_WIDTH)


def fletcher32(content: memoryview | bytes) -> int:
    """HDF5's Fletcher-32 of some bytes: two sums over big-endian 16-bit words, each in 1..65535 unless all are 0.

    The second sum weighs each word by how many follow it, itself included. With the words in rows of ``_WIDTH``, row
    and column sums say all of it, and NumPy adds those at memory speed. Swapping the bytes of all words multiplies
    both sums by 256 modulo 65535, so that the words can be added in the order they are stored in.
    """
    first = second = 0
    words = np.frombuffer(content, "<u2", len(content) // 2)
    for start in range(0, len(words), _WORDS):
        block = words[start : start + _WORDS]
        rows = block[: len(block) // _WIDTH * _WIDTH].reshape(-1, _WIDTH)
        by_row, by_column = rows.sum(1, dtype=np.uint32), rows.sum(0, dtype=np.uint32)
        rest = block[rows.size :].astype(np.int64)
        place = _WIDTH * int(by_row.astype(np.int64) @ np.arange(len(by_row)))
        place += int(by_column.astype(np.int64) @ _PLACES)
        place += int(rest @ np.arange(rows.size, len(block)))
        total = int(by_row.sum(dtype=np.int64)) + int(rest.sum())
        second = _fold(second + first * len(block) + len(block) * total - place)
        first = _fold(first + total)
    first, second = _fold(first << 8), _fold(second << 8)
    if len(content) % 2:
        first = _fold(first + (content[-1] << 8))
        second = _fold(second + first)
    return second << 16 | first


def _fold(value: int) -> int:
    return (value - 1) % 65535 + 1 if value else 0


class Sink:
    """A file for HDF5 that takes everything, on a full disk into memory, and remembers the first error.

    Args:
        path: The file; an existing one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._memory: bytearray | None = None
        self._at = 0
        self.error: OSError | None = None

    def _fail(self, error: OSError) -> bytearray:
        """Goes on in memory, with what is in the file so far."""
        self.error = error
        self._memory = bytearray(os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0))
        return self._memory

    def write(self, content: memoryview) -> int:
        """Writes at the current place."""
        if self._memory is None:
            try:
                done = 0
                while done < len(content):
                    done += os.pwrite(self._file.fileno(), content[done:], self._at + done)
            except OSError as error:
                self._fail(error)
        if self._memory is not None:
            self._memory.extend(bytes(max(0, self._at + len(content) - len(self._memory))))
            self._memory[self._at : self._at + len(content)] = content
        self._at += len(content)
        return len(content)

    def read(self, size: int) -> bytes:
        """Reads at the current place."""
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, buffer: memoryview) -> int:
        """Reads at the current place."""
        if self._memory is not None:
            content = bytes(self._memory[self._at : self._at + len(buffer)])
        else:
            content = os.pread(self._file.fileno(), len(buffer), self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the current place."""
        size = len(self._memory) if self._memory is not None else os.fstat(self._file.fileno()).st_size
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: size}[whence]
        return self._at

    def tell(self) -> int:
        """The current place."""
        return self._at

    def truncate(self, size: int | None = None) -> int:
        """Makes the file this long."""
        size = self._at if size is None else size
        if self._memory is None:
            try:
                os.ftruncate(self._file.fileno(), size)
            except OSError as error:
                self._fail(error)
        if self._memory is not None:
            del self._memory[size:]
            self._memory.extend(bytes(size - len(self._memory)))
        return size

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@contextlib.contextmanager
def create(path: Path, **options: Any) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Opens a new HDF5 file; on any error nothing is left of it.

    Args:
        path: The file; an existing one is replaced.
        **options: For ``h5py.File``.

    Yields:
        The file, and a function that raises the OSError as soon as there was one: to be called now and then.

    Raises:
        OSError: With the file's name, if the disk is full.
    """
    sink = Sink(path)
    done = False

    def check() -> None:
        if sink.error is not None:
            raise OSError(sink.error.errno, sink.error.strerror, str(path)) from sink.error

    try:
        with h5py.File(sink, "w", libver="earliest", **options) as file:
            yield file, check
        check()
        done = True
    finally:
        sink.close()
        if not done:
            path.unlink(missing_ok=True)
