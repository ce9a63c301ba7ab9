"""Where two files of one format begin to differ: the data set, column, tensor, key or line, and the index.

Indices count from 0. What no reader understands is compared by bytes.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SHOWN = 60  # characters of a value
_ABSENT = object()


def first_difference(recorded: Path, now: Path, name: str) -> str:
    """Says where two files that are not equal begin to differ.

    Args:
        recorded: the file as it was recorded.
        now: the file as it is now.
        name: the artefact's name, whose ending gives the format (a cache object has none).
    """
    reader = _READERS.get(Path(name).suffix)
    if reader is not None:
        try:
            found = reader(recorded, now)
        except Exception as error:  # any library's own error: a damaged file is still different
            return f"{_bytes(recorded, now)} (not readable as {Path(name).suffix[1:]}: {error})"
        return found or f"{_bytes(recorded, now)}; the content is equal"
    return _bytes(recorded, now)


def json_difference(recorded: Any, now: Any, key: str = "") -> str:
    """Says at which key two JSON values begin to differ; empty if they are equal."""
    found = _walk(recorded, now, key)
    return found or ""


def _shown(value: object) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _pair(recorded: object, now: object) -> str:
    return f"{_shown(recorded)} recorded, {_shown(now)} now"


def _same(one: object, other: object) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN is not equal to itself


def _walk(recorded: Any, now: Any, key: str) -> str | None:
    if isinstance(recorded, dict) and isinstance(now, dict):
        for name in sorted(recorded.keys() | now.keys()):
            inner = f"{key}.{name}" if key else str(name)
            if found := _walk(recorded.get(name, _ABSENT), now.get(name, _ABSENT), inner):
                return found
        return None
    if isinstance(recorded, list) and isinstance(now, list):
        for index, (one, other) in enumerate(zip(recorded, now, strict=False)):
            if found := _walk(one, other, f"{key}[{index}]"):
                return found
        return None if len(recorded) == len(now) else f"{key}: {len(recorded)} items recorded, {len(now)} now"
    same = type(recorded) is type(now) and _same(recorded, now)
    return None if same else f"{key or 'value'}: {_pair(recorded, now)}"


def _json(recorded: Path, now: Path) -> str | None:
    found = _walk(json.loads(recorded.read_bytes()), json.loads(now.read_bytes()), "")
    return f"key {found}" if found else None


def _lines(recorded: Path, now: Path) -> str | None:
    one, other = recorded.read_bytes().split(b"\n"), now.read_bytes().split(b"\n")
    for number, (before, after) in enumerate(zip(one, other, strict=False)):
        if before != after:
            return f"line {number + 1}: {_inside_line(before, after)}"
    return f"{len(one)} lines recorded, {len(other)} now" if len(one) != len(other) else None


def _inside_line(before: bytes, after: bytes) -> str:
    try:
        values = json.loads(before), json.loads(after)
    except ValueError:
        return _pair(before.decode(errors="replace"), after.decode(errors="replace"))
    return _walk(*values, "") or "the same values, written differently"


def _array(recorded: npt.NDArray[Any], now: npt.NDArray[Any]) -> str | None:
    if recorded.dtype != now.dtype or recorded.shape != now.shape:
        return f"{recorded.dtype}{list(recorded.shape)} recorded, {now.dtype}{list(now.shape)} now"
    if recorded.dtype.hasobject:
        unequal = [i for i, (x, y) in enumerate(zip(recorded.flat, now.flat, strict=True)) if not _same(x, y)]
        place = unequal[0] if unequal else None
    else:  # by bytes, so that NaN equals itself and -0.0 is not 0.0
        size = max(recorded.dtype.itemsize, 1)
        raw = [np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8) for a in (recorded, now)]
        different = np.flatnonzero(raw[0] != raw[1])
        place = int(different[0]) // size if len(different) else None
    if place is None:
        return None
    index = [int(i) for i in np.unravel_index(place, recorded.shape)] if recorded.shape else []
    one, other = recorded.reshape(-1)[place].tolist(), now.reshape(-1)[place].tolist()
    return f"{index}: {_pair(one, other)}"


def _hdf5(recorded: Path, now: Path) -> str | None:
    import h5py

    def objects(file: h5py.File) -> dict[str, Any]:
        found: dict[str, Any] = {"/": file}
        file.visititems(lambda name, item: found.__setitem__(name, item))
        return found

    with h5py.File(recorded, "r") as one, h5py.File(now, "r") as other:
        before, after = objects(one), objects(other)
        for name in sorted(before.keys() | after.keys()):
            if name not in before or name not in after:
                return f"dataset {name!r}: {'was added' if name in after else 'is missing'}"
            attributes = [{k: np.asarray(v).tolist() for k, v in i.attrs.items()} for i in (before[name], after[name])]
            if found := _walk(attributes[0], attributes[1], ""):
                return f"attribute of {name!r}: {found}"
            if isinstance(before[name], h5py.Dataset) and isinstance(after[name], h5py.Dataset):
                arrays = [np.asarray(item[()]) for item in (before[name], after[name])]
                if found := _array(*arrays):
                    return f"dataset {name!r}{'' if found[0] == '[' else ': '}{found}"
            elif type(before[name]) is not type(after[name]):
                return f"{name!r}: another kind of object"
    return None


def _parquet(recorded: Path, now: Path) -> str | None:
    import pyarrow.parquet as pq

    one, other = (pq.ParquetFile(path).read() for path in (recorded, now))
    if one.schema != other.schema:
        columns = [{field.name: str(field.type) for field in table.schema} for table in (one, other)]
        return f"schema: {_walk(columns[0], columns[1], '') or 'metadata'}"
    for name in one.column_names:
        if one[name].equals(other[name]):
            continue
        for row, (before, after) in enumerate(zip(one[name].to_pylist(), other[name].to_pylist(), strict=False)):
            if not _same(before, after):
                return f"column {name!r}, row {row}: {_pair(before, after)}"
    return f"{one.num_rows} rows recorded, {other.num_rows} now" if one.num_rows != other.num_rows else None


def _safetensors(recorded: Path, now: Path) -> str | None:
    """Compares the tensors' bytes by the file's own header, so that every dtype is understood."""

    def read(path: Path) -> tuple[dict[str, Any], bytes]:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        return json.loads(content[8 : 8 + length]), content[8 + length :]

    (head, data), (head_now, data_now) = read(recorded), read(now)
    for name in sorted(head.keys() | head_now.keys()):
        if name not in head or name not in head_now:
            return f"tensor {name!r}: {'was added' if name in head_now else 'is missing'}"
        before, after = head[name], head_now[name]
        shapes = [{k: v for k, v in entry.items() if k != "data_offsets"} for entry in (before, after)]
        if found := _walk(shapes[0], shapes[1], ""):
            return f"tensor {name!r}: {found}"
        if name == "__metadata__":
            continue
        (a, b), (c, d) = before["data_offsets"], after["data_offsets"]
        if data[a:b] != data_now[c:d]:
            place = next(_unequal(data[a:b], data_now[c:d]))
            count = int(np.prod(before["shape"], dtype=np.int64))
            index = np.unravel_index(place // max((b - a) // max(count, 1), 1), before["shape"] or [1])
            return f"tensor {name!r}{[int(i) for i in index]}: other bytes"
    return None


def _unequal(one: bytes, other: bytes) -> Iterator[int]:
    """Yields the places at which two byte strings differ, then the length of the shorter."""
    short = min(len(one), len(other))
    yield from np.flatnonzero(np.frombuffer(one[:short], np.uint8) != np.frombuffer(other[:short], np.uint8)).tolist()
    yield short


def _bytes(recorded: Path, now: Path) -> str:
    block, place = 1 << 20, 0
    with recorded.open("rb") as one, now.open("rb") as other:
        while True:
            before, after = one.read(block), other.read(block)
            if before != after or not before:
                place += next(_unequal(before, after))
                break
            place += len(before)
    sizes = recorded.stat().st_size, now.stat().st_size
    lengths = f", {sizes[0]} bytes recorded, {sizes[1]} now" if sizes[0] != sizes[1] else ""
    return f"byte {place}{lengths}"


_READERS: dict[str, Callable[[Path, Path], str | None]] = {
    ".csv": _lines,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".json": _json,
    ".jsonl": _lines,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    ".txt": _lines,
}
