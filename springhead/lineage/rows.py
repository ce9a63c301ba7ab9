"""Questions about single rows: episodes of a safe-RL data set, rows of a text data set.

Row tables, decisions and quarantine lists are Parquet files beside the data. Counts over whole tables are
DuckDB's; single rows are read from the few row groups that :mod:`springhead.lineage.index` names, so that a
question about one of ten million rows takes a moment.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.lineage.graph import Graph
from springhead.lineage.index import DIGITS, IDS, MENTIONS, Index, prefixes

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROWS, DECISIONS, QUARANTINE = "rows.parquet", "decisions.parquet", "quarantine.parquet"
_KINDS = (ROWS, DECISIONS, QUARANTINE)
_MOST = 10_000  # rows followed from one row; more means the question was about a data set
_IN_ORDER = "GROUP BY rule ORDER BY min(file_row_number)"
_CHANGED, _EQUAL = "changed by a filter", "dropped for an equal row"


def plain(value: Any) -> Any:
    """Returns a value of a table as JSON can hold it: NaN and infinity become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _strings(ids: Iterable[str]) -> pa.Array:
    return pa.array(sorted(set(ids)), pa.string())


class Rows:
    """The row tables that the receipts of a checkout name.

    Args:
        root: the repository root.
        graph: its artefact graph.
        scan: read every table whole instead of using the index of the state folder.
    """

    def __init__(self, root: Path, graph: Graph, scan: bool = False) -> None:
        self.root, self.graph = root, graph
        self.tables: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
        """For each kind of table, the stage that wrote it by path."""
        self.missing: list[str] = []
        """Tables that receipts name but that are not in the workspace."""
        for stage in graph.order:
            for out, facts in graph.receipts[stage]["outputs"].items():
                for file in facts.get("files", {}):
                    kind = file.rpartition("/")[2]
                    if kind in self.tables:
                        self._add(kind, f"{out}/{file}", stage)
        paths = [path for kind in _KINDS for path in self.tables[kind]]
        self.index = Index(root, state_folder(root), paths, scan)

    def _add(self, kind: str, path: str, stage: str) -> None:
        if (self.root / path).is_file():
            self.tables[kind][path] = stage
        else:
            self.missing.append(path)

    @cached_property
    def _connection(self) -> "DuckDBPyConnection":
        import duckdb

        return duckdb.connect(":memory:")

    def ask(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Runs a query and returns its rows as dictionaries of JSON values.

        Raises:
            BadInput: if a table of the workspace is damaged.
        """
        import duckdb

        try:
            done = self._connection.execute(sql, list(values))
            names = [column[0] for column in done.description or ()]
            return [{n: plain(v) for n, v in zip(names, row, strict=True)} for row in done.fetchall()]
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            brief = str(error).splitlines()[0]
            raise BadInput(f"a row table cannot be read ({brief}); restore it with `dvc checkout`") from None

    def columns(self, path: str) -> list[str]:
        """Returns the column names of a table.

        Raises:
            BadInput: if the file is not readable Parquet.
        """
        return list(self.index.table(path).schema_arrow.names)

    def source(self, path: str) -> str:
        """Returns a table of the workspace as an SQL source."""
        return f"read_parquet({_literal(str(self.root / path))})"

    # -- one row --------------------------------------------------------------------------------

    def _some(self, path: str, keys: np.ndarray, columns: Sequence[str], what: str = IDS) -> pa.Table | None:
        """Returns columns of the row groups that may hold ids with these prefixes, None for none of them."""
        groups = self.index.groups(path, keys, what)
        if not groups or not set(columns) <= set(self.columns(path)):
            return None
        return self.index.read(path, groups, columns)

    def find(self, prefix: str, ref: str = "") -> str:
        """Returns the one id that begins with ``prefix``; errors quote ``ref``, what the user typed.

        Raises:
            BadInput: if no row, or more than one, has such an id.
        """
        ids: set[str] = set()
        first, last = (prefixes(_strings([prefix.ljust(DIGITS, digit)])) for digit in "0f")
        for kind in _KINDS:
            for path in self.tables[kind]:
                groups = self.index.groups(path, first, last=last)
                if not groups:
                    continue
                column = self.index.read(path, groups, ["id"])["id"]
                ids |= set(column.filter(pc.starts_with(column, prefix)).to_pylist())
        if len(ids) == 1:
            return ids.pop()
        if ids:
            shown = ", ".join(i[: max(16, len(prefix) + 4)] for i in sorted(ids)[:5])
            raise BadInput(f"{ref or prefix}: {len(ids)} rows begin like this ({shown} …); give more digits")
        tables = len(self.tables[ROWS])
        hint = f"; {len(self.missing)} tables are not in the workspace, run `dvc checkout`" if self.missing else ""
        raise BadInput(
            f"{ref or prefix}: no {'row' if ref.startswith('row:') else 'model, output or row'} has this digest "
            f"({tables} row tables were searched){hint}. "
            "Ids are in the column `id` of data/**/rows.parquet"
        )

    def places(self, row: str) -> list[dict[str, Any]]:
        """Returns every row table that holds the row, with the row itself, makers before readers."""
        return self._whole(ROWS, row)

    def decisions(self, row: str) -> list[dict[str, Any]]:
        """Returns what each filter decided about the row: rule, kept, value, threshold."""
        return self._whole(DECISIONS, row)

    def quarantine(self, row: str) -> list[dict[str, Any]]:
        """Returns which expectations the row failed."""
        return self._whole(QUARANTINE, row)

    def _whole(self, kind: str, row: str) -> list[dict[str, Any]]:
        found = []
        key = np.unique(prefixes(_strings([row])))
        for path, stage in self.tables[kind].items():
            for group in self.index.groups(path, key):
                # Not pyarrow's indices_nonzero: it crashes on the column of an empty row group.
                at = np.flatnonzero(pc.equal(self.index.read(path, [group], ["id"])["id"], row).to_numpy())
                if len(at):  # a group may hold another row with the same eight digits
                    whole = self.index.read(path, [group], self.columns(path)).take(at)
                    found += [{"stage": stage, "table": path, "row": plain(entry)} for entry in whole.to_pylist()]
        return found

    # -- rows around it -------------------------------------------------------------------------

    def _edges(self, ids: Iterable[str], up: bool) -> list[tuple[str, str, str]]:
        """Returns (known id, other id, relation) for the rows one step above or below ``ids``."""
        known = _strings(ids)
        keys = np.unique(prefixes(known))
        found: set[tuple[str, str, str]] = set()
        for path in self.tables[ROWS]:
            some = self._some(path, keys, ["id", "parents"], IDS if up else MENTIONS)
            if some is not None:
                lists = some["parents"].combine_chunks()
                children, parents = pc.take(some["id"], pc.list_parent_indices(lists)), pc.list_flatten(lists)
                here, there = (children, parents) if up else (parents, children)
                found |= _matching(here, there, known, "parent")
        for path in self.tables[DECISIONS]:
            some = self._some(path, keys, ["id", "replaced_by", "kept"], MENTIONS if up else IDS)
            if some is not None:
                for kept, how in ((True, _CHANGED), (False, _EQUAL)):
                    part = some.filter(pc.equal(some["kept"], kept))
                    here, there = (part["replaced_by"], part["id"]) if up else (part["id"], part["replaced_by"])
                    found |= _matching(here, there, known, how)
        return sorted(edge for edge in found if edge[0] != edge[1])

    def relatives(self, row: str, up: bool) -> list[dict[str, Any]]:
        """Returns the rows a row was made from (``up``) or that were made from it, nearest first.

        Each has its id, the id it hangs on (``of``), the number of steps and the relation.
        """
        seen, level, found, step = {row}, [row], [], 0
        while level and len(seen) < _MOST:
            step += 1
            fresh: dict[str, tuple[str, str]] = {}
            for here, there, how in self._edges(level, up):
                if there not in seen:
                    fresh.setdefault(there, (here, how))
            found += [{"id": i, "of": here, "step": step, "relation": how} for i, (here, how) in sorted(fresh.items())]
            seen |= set(fresh)
            level = list(fresh)
        return found

    # -- training data --------------------------------------------------------------------------

    def table_of(self, data: str) -> str | None:
        """Returns the row table of a data set: inside a folder, or beside a file."""
        for folder in (data, data.rpartition("/")[0]):
            if f"{folder}/{ROWS}" in self.tables[ROWS]:
                return f"{folder}/{ROWS}"
        return None

    def _conditions(self, table: str, data: str, method: str | None) -> dict[str, str]:
        """Returns the values that the rows of a data set have in its table: of its file, of one method."""
        columns, file = self.columns(table), data.rpartition("/")[2]
        wanted = {}
        if "file" in columns and file.endswith((".jsonl", ".hdf5")):
            wanted["file"] = file  # one table may cover several files
        if "method" in columns and method is not None:
            wanted["method"] = method  # fine-tuning takes the rows of its method
        return wanted

    def chosen(self, data: str, method: str | None = None) -> str | None:
        """Returns the rows of a data set as an SQL source, or None if it has no row table."""
        table = self.table_of(data)
        if table is None:
            return None
        wanted = self._conditions(table, data, method)
        conditions = " AND ".join(f'"{name}" = {_literal(value)}' for name, value in wanted.items())
        return f"(SELECT * FROM {self.source(table)} WHERE {conditions or 'true'})"

    def within(self, ids: Sequence[str], data: str, method: str | None = None) -> tuple[list[str], int]:
        """Returns which of ``ids`` are rows of a data set, and how many rows that has (0 if none is)."""
        rows, table = self.chosen(data, method), self.table_of(data)
        if rows is None or table is None:
            return [], 0
        wanted, known = self._conditions(table, data, method), _strings(ids)
        some = self._some(table, np.unique(prefixes(known)), ["id", *wanted])
        if some is None:
            return [], 0
        mask = pc.is_in(some["id"], known)
        for name, value in wanted.items():
            mask = pc.and_(mask, pc.equal(some[name], value))
        found = sorted(set(some["id"].filter(mask).to_pylist()))
        if not found:
            return [], 0
        (count,) = self._counted(table, rows, "SELECT count(*) AS n FROM")
        return found, int(count["n"])

    def _counted(self, table: str, source: str, sql: str, rest: str = "") -> list[dict[str, Any]]:
        """Returns what a query counts over a whole table; where the table lies is no part of the question."""
        question = f"{sql} {source.replace(str(self.root / table), 'table')} {rest}"
        return self.index.counted(table, question, lambda: self.ask(f"{sql} {source} {rest}"))

    def ids(self, data: str, method: str | None = None) -> list[str]:
        """Returns the ids of all rows of a data set, in the order of the file where it has one."""
        rows, table = self.chosen(data, method), self.table_of(data)
        if rows is None or table is None:
            return []
        order = '"index"' if "index" in self.columns(table) else "id"
        return [row["id"] for row in self.ask(f"SELECT id FROM {rows} ORDER BY {order}")]

    def origins(self, data: str, method: str | None = None) -> list[dict[str, Any]]:
        """Returns who made the rows of a data set, with counts: policies, or generators and operators."""
        rows, table = self.chosen(data, method), self.table_of(data)
        if rows is None or table is None:
            return []
        wanted = ("policy", "algorithm", "cost_limit", "generator", "method", "operator", "family", "split")
        keys = ", ".join(f'"{name}"' for name in wanted if name in self.columns(table))
        if not keys:
            return []
        return self._counted(table, rows, f"SELECT {keys}, count(*) AS rows FROM", "GROUP BY ALL ORDER BY ALL")

    def rules(self, stage: str) -> list[dict[str, Any]]:
        """Returns each rule a filter stage applied: how many rows it kept, dropped and replaced."""
        found = []
        for path, owner in self.tables[DECISIONS].items():
            if owner != stage:
                continue
            columns = self.columns(path)
            extra = ", min(threshold) AS lowest_threshold, max(threshold) AS highest_threshold"
            extra = extra if "threshold" in columns else ""
            replaced = "count(replaced_by) FILTER (kept)" if "replaced_by" in columns else "0"
            numbered = f"read_parquet({_literal(str(self.root / path))}, file_row_number = true)"
            sql = f"SELECT rule, count(*) FILTER (kept) AS kept, count(*) FILTER (NOT kept) AS dropped, {replaced} "
            rules = self._counted(path, numbered, f"{sql}AS replaced{extra} FROM", _IN_ORDER)
            found += [{"stage": stage, "table": path, **rule} for rule in rules]
        return found


def _matching(here: pa.ChunkedArray, there: pa.ChunkedArray, known: pa.Array, how: str) -> set[tuple[str, str, str]]:
    """Returns the pairs whose first member is known and whose second is not null."""
    mask = pc.and_(pc.is_in(here, known), pc.is_valid(there))
    return {(a, b, how) for a, b in zip(here.filter(mask).to_pylist(), there.filter(mask).to_pylist(), strict=True)}
