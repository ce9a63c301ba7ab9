"""Where a row is: a cache in the state folder that says which row groups of a table to read.

Ids are digests, so no statistics of a Parquet file can tell where one is, and reading every id of ten
million rows takes seconds. For each table this cache holds the first eight digits of each id with its row
group: eight bytes, sorted. It only ever spares reading: what is found is read from the table itself.

What is counted over a whole table is kept in the same way.

An index is named by the SHA-256 of its table, so a table with other content has another index. Whether a
file still has the content that was hashed is decided as git does for its own index: by size, time and
inode, and by hashing again where one of them moved. An index that is not as it was written is made again,
and the folder may be removed at any time.
"""

import contextlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from springhead.errors import BadInput
from springhead.lineage.digests import file_digest, json_digest

DIGITS = 8  # of an id that the index holds; a question gives at least as many
IDS, MENTIONS = "ids", "mentions"
"""What is looked up: the rows with an id, or the rows that name it as their parent or replacement."""
_SETTLED = 2_000_000_000  # ns; a file changed less than this ago may change again without a new time stamp
_RECENT = 128  # column chunks of a row group that are kept; of ids, two megabytes each
_LOW, _LETTER = np.uint64(0x0F0F_0F0F_0F0F_0F0F), np.uint64(0x0101_0101_0101_0101)


def open_table(path: Path, shown: str) -> pq.ParquetFile:
    """Opens a Parquet file.

    Raises:
        BadInput: if it is not one; the message calls it ``shown``.
    """
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        brief = str(error).splitlines()[0]
        raise BadInput(f"{shown}: not a readable Parquet file ({brief}); restore it with `dvc checkout`") from None
    schema = table.schema_arrow
    if "id" not in schema.names or not _is_string(schema.field("id").type):
        raise BadInput(f"{shown}: is no table of rows: it has no text column `id`; restore it with `dvc checkout`")
    return table


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def prefixes(ids: pa.Array) -> np.ndarray:
    """Returns the first eight hexadecimal digits of each id as numbers, uint32, nulls left out."""
    ids = ids.cast(pa.large_string()).drop_null()
    short = pc.less(pc.binary_length(ids), DIGITS)
    if pc.any(short).as_py():  # ids are digests, but a table may hold anything
        ids = pc.if_else(short, pc.ascii_rpad(ids, DIGITS, "0"), ids)
    if len(ids) == 0:
        return np.zeros(0, np.uint32)
    _, offsets, content = ids.buffers()
    starts = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids)]
    text = np.frombuffer(content, np.uint8)
    eight = np.lib.stride_tricks.sliding_window_view(text, DIGITS)[starts].view(">u8").ravel().astype(np.uint64)
    # All eight characters at once: the low four bits, and nine more for a letter; then the gaps are closed.
    eight = (eight & _LOW) + ((eight >> np.uint64(6)) & _LETTER) * np.uint64(9)
    eight = (eight | (eight >> np.uint64(4))) & np.uint64(0x00FF_00FF_00FF_00FF)
    eight = (eight | (eight >> np.uint64(8))) & np.uint64(0x0000_FFFF_0000_FFFF)
    return (eight | (eight >> np.uint64(16))).astype(np.uint32)


def _keys(values: np.ndarray, group: int) -> np.ndarray:
    return (values.astype(np.uint64) << np.uint64(32)) | np.uint64(group)


def _sorted(keys: list[np.ndarray]) -> np.ndarray:
    """Returns keys in order, each once; half the time of ``numpy.unique``."""
    merged = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    merged.sort()
    fresh = np.ones(len(merged), bool)
    np.not_equal(merged[1:], merged[:-1], out=fresh[1:])
    return merged[fresh]


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """Returns the strings of a column, those inside lists too."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) and array.num_chunks else array
    return array.flatten() if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) else array


def _stat(path: Path) -> list[int]:
    """Returns size and time of a file."""
    there = path.stat()
    return [there.st_size, there.st_mtime_ns]


class Index:
    """The row groups in which ids are, for the tables of one checkout.

    Args:
        root: the repository root.
        home: its state folder.
        paths: the tables, relative to the root.
        scan: read every row group of every table instead: the same answers without any cache.
    """

    def __init__(self, root: Path, home: Path, paths: Iterable[str], scan: bool = False) -> None:
        self.root, self.scan = root, scan
        self.folder = home / "index"
        self.built = 0
        """How many tables had to be indexed."""
        self._paths = tuple(paths)
        self._tables: dict[str, pq.ParquetFile] = {}
        self._loaded: dict[str, dict[str, np.ndarray]] = {}
        self._all_loaded = False
        self._digests: dict[str, str] = {}
        self._written: dict[str, list[int]] = {}
        self._recent: OrderedDict[tuple[str, int, str], pa.ChunkedArray] = OrderedDict()

    def table(self, path: str) -> pq.ParquetFile:
        """Returns a table of the workspace, opened once.

        Raises:
            BadInput: if it is no readable Parquet file.
        """
        if path not in self._tables:
            self._tables[path] = open_table(self.root / path, path)
        return self._tables[path]

    def groups(self, path: str, wanted: np.ndarray, what: str = IDS, last: np.ndarray | None = None) -> list[int]:
        """Returns the row groups of a table that may hold one of the ids; the caller reads and compares.

        Args:
            path: one of the tables.
            wanted: the :func:`prefixes` of the ids, sorted.
            what: :data:`IDS` or :data:`MENTIONS`.
            last: where each of ``wanted`` is the first of a range, the last of it.

        Raises:
            BadInput: if a table is no readable Parquet file.
        """
        if self.scan:
            return list(range(self.table(path).num_row_groups))
        if not self._all_loaded:
            self._prepare(self._paths)
            self._all_loaded = True
        keys = self._loaded[path][what]
        low = np.searchsorted(keys, _keys(wanted, 0))
        high = np.searchsorted(keys, _keys(wanted if last is None else last, 0xFFFF_FFFF), side="right")
        runs = [keys[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True) if a < b]
        return sorted({int(key) & 0xFFFF_FFFF for run in runs for key in run})

    def read(self, path: str, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Reads columns of some row groups of a table; what was read last is kept.

        Raises:
            BadInput: if its bytes are damaged.
        """
        if not groups:
            schema = self.table(path).schema_arrow
            return pa.schema([schema.field(name) for name in columns]).empty_table()
        parts = [pa.table({name: self._column(path, group, name) for name in columns}) for group in groups]
        return pa.concat_tables(parts)

    def _column(self, path: str, group: int, name: str) -> pa.ChunkedArray:
        key = (path, group, name)
        if key not in self._recent:
            self._recent[key] = self._fetch(*key)
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    def _fetch(self, path: str, group: int, name: str) -> pa.ChunkedArray:
        try:
            return self.table(path).read_row_group(group, columns=[name])[name]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            brief = str(error).splitlines()[0]
            raise BadInput(f"{path}: damaged ({brief}); restore it with `dvc checkout`") from None

    def counted(self, path: str, question: str, ask: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Returns the answer to a question about a whole table, kept for as long as the table is the same.

        Args:
            path: one of the tables.
            question: what is asked, in words that name everything the answer depends on but the table.
            ask: answers it from the table.
        """
        if self.scan:
            return ask()
        if path not in self._digests:
            self._prepare([path])
        name = f"{self._digests[path]}.counts"
        kept: dict[str, Any] = {}
        try:
            found = json.loads((self.folder / name).read_bytes())
            if json_digest(found["answers"]) == found["sha256"]:
                kept = found["answers"]
        except (OSError, ValueError, LookupError, TypeError):
            pass  # none yet, or damaged
        if question not in kept:
            kept[question] = ask()
            self._write(name, json.dumps({"sha256": json_digest(kept), "answers": kept}).encode())
        return list(kept[question])

    # -- building and keeping -------------------------------------------------------------------

    def _prepare(self, paths: Iterable[str]) -> None:
        """Loads the index of each table, and builds those that are not there."""
        known = self._known()
        self._written = known["indexes"] | self._written
        tables = known["tables"]
        stats: dict[str, list[Any]] = {}
        missing = []
        for path in paths:
            if path in self._loaded:
                continue
            there = (self.root / path).stat()
            stats[path] = [there.st_size, there.st_mtime_ns, there.st_ino]
            entry = tables.get(self._name(path))
            if entry is None or entry[:3] != stats[path] or not self._load(path, entry[3]):
                missing.append(path)
        if not missing:
            return
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            digests = dict(zip(missing, pool.map(self._make, missing), strict=True))
        # A file that was just written may be written again within one tick of its clock.
        settled = time.time_ns() - _SETTLED
        fresh = {self._name(p): [*stats[p], d] for p, d in digests.items() if stats[p][1] < settled}
        self._keep(tables | fresh, set(digests.values()))

    def _name(self, path: str) -> str:
        return str(self.root / path)

    def _known(self) -> dict[str, dict[str, list[Any]]]:
        """Returns size, time, inode and digest of each table as last hashed, and size and time of each index."""
        try:
            found = json.loads((self.folder / "files.json").read_bytes())
            tables = {name: entry for name, entry in found["tables"].items() if len(entry) == 4}
            return {"tables": tables, "indexes": {digest: list(entry) for digest, entry in found["indexes"].items()}}
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            return {"tables": {}, "indexes": {}}  # a cache that cannot be read is a cache that is not there

    def _load(self, path: str, digest: str) -> bool:
        """Maps the index of a table into memory; returns whether there is one that is as it was written."""
        file = self.folder / f"{digest}.index"
        try:
            if _stat(file) != self._written.get(digest):
                return False
            content = np.memmap(file, np.uint64, "r")
        except (OSError, ValueError):
            return False
        if len(content) < 2 or len(content) != 2 + int(content[0]) + int(content[1]):
            return False
        ends = 2 + int(content[0])
        self._loaded[path] = {IDS: content[2:ends], MENTIONS: content[ends:]}
        self._digests[path] = digest
        return True

    def _make(self, path: str) -> str:
        """Hashes a table, indexes it where its content is new, and returns its digest."""
        digest = file_digest(self.root / path)
        if self._load(path, digest):
            return digest
        table = self.table(path)
        names = set(table.schema_arrow.names)
        found: dict[str, list[np.ndarray]] = {IDS: [], MENTIONS: []}
        for group in range(table.num_row_groups):
            for what, columns in ((IDS, ("id",)), (MENTIONS, ("parents", "replaced_by"))):
                for column in (c for c in columns if c in names):
                    strings = _flat(self._fetch(path, group, column))
                    found[what].append(_keys(prefixes(strings), group))
        arrays = {what: _sorted(keys) for what, keys in found.items()}
        self._loaded[path] = arrays
        self._digests[path] = digest
        self.built += 1
        sizes = np.array([len(arrays[IDS]), len(arrays[MENTIONS])], np.uint64)
        if self._write(f"{digest}.index", sizes.tobytes(), *(arrays[what].tobytes() for what in (IDS, MENTIONS))):
            self._written[digest] = _stat(self.folder / f"{digest}.index")
        return digest

    def _write(self, name: str, *content: bytes) -> bool:
        """Writes a file of the cache whole or not at all; where nothing can be written there is no cache."""
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                for part in content:
                    file.write(part)
            os.replace(temporary, self.folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False
        return True

    def _keep(self, entries: dict[str, list[Any]], made: set[str]) -> None:
        """Writes the list of known tables and removes the indexes of tables that are gone."""
        there = {name: entry for name, entry in sorted(entries.items()) if Path(name).exists()}
        used = {entry[3] for entry in there.values()} | made
        indexes = {digest: entry for digest, entry in sorted(self._written.items()) if digest in used}
        self._write("files.json", json.dumps({"tables": there, "indexes": indexes}, indent=0).encode())
        for file in [*self.folder.glob("*.index"), *self.folder.glob("*.counts")]:
            if file.name.partition(".")[0] not in used:
                with contextlib.suppress(OSError):
                    file.unlink()
