"""Questions about single rows: episodes of a safe-RL data set, rows of a text data set.

Row tables, decisions and quarantine lists are Parquet files beside the data. DuckDB reads them
in place, so there is no index to build, to keep in step or to trust.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead.errors import BadInput
from springhead.lineage.graph import Graph

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROWS, DECISIONS, QUARANTINE = "rows.parquet", "decisions.parquet", "quarantine.parquet"
# Each kind of table with the columns that a query may name, also where a file lacks them.
_COLUMNS = {
    ROWS: {"id": "VARCHAR", "parents": "VARCHAR[]"},
    DECISIONS: {"id": "VARCHAR", "replaced_by": "VARCHAR"},
    QUARANTINE: {"id": "VARCHAR"},
}
_MOST = 10_000  # rows followed from one row; more means the question was about a data set


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


class Rows:
    """The row tables that the receipts of a checkout name.

    Args:
        root: the repository root.
        graph: its artefact graph.
    """

    def __init__(self, root: Path, graph: Graph) -> None:
        import duckdb

        self.root, self.graph = root, graph
        self._connection: DuckDBPyConnection = duckdb.connect(":memory:")
        self._connection.execute("SET threads TO 2")
        self.tables: dict[str, dict[str, str]] = {kind: {} for kind in _COLUMNS}
        """For each kind of table, the stage that wrote it by path."""
        self.missing: list[str] = []
        """Tables that receipts name but that are not in the workspace."""
        for stage in graph.order:
            for out, facts in graph.receipts[stage]["outputs"].items():
                for file in facts.get("files", {}):
                    kind = file.rpartition("/")[2]
                    if kind in self.tables:
                        self._add(kind, f"{out}/{file}", stage)
        for kind in _COLUMNS:
            self._view(kind)

    def _add(self, kind: str, path: str, stage: str) -> None:
        if (self.root / path).is_file():
            self.tables[kind][path] = stage
        else:
            self.missing.append(path)

    def _view(self, kind: str) -> None:
        """Makes the union of all tables of a kind, with the file each row is in as ``table``."""
        wanted = _COLUMNS[kind]
        parts = [", ".join(f"NULL::{t} AS {name}" for name, t in wanted.items()) + ', NULL AS "table" WHERE false']
        for path in self.tables[kind]:
            there = self.columns(path)
            chosen = [f"{name if name in there else 'NULL'}::{t} AS {name}" for name, t in wanted.items()]
            parts.append(f'{", ".join(chosen)}, {_literal(path)} AS "table" FROM {self.source(path)}')
        union = " UNION ALL ".join(f"SELECT {part}" for part in parts)
        self._connection.execute(f"CREATE VIEW {kind.partition('.')[0]} AS {union}")

    def ask(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Runs a query and returns its rows as dictionaries of JSON values."""
        done = self._connection.execute(sql, list(values))
        names = [column[0] for column in done.description or ()]
        return [{n: plain(v) for n, v in zip(names, row, strict=True)} for row in done.fetchall()]

    def columns(self, path: str) -> list[str]:
        """Returns the column names of a table.

        Raises:
            BadInput: if the file is not readable Parquet.
        """
        import duckdb

        try:
            found = self._connection.execute(f"DESCRIBE SELECT * FROM {self.source(path)}").fetchall()
        except duckdb.Error as error:
            brief = str(error).splitlines()[0]
            raise BadInput(f"{path}: not a readable Parquet file ({brief}); restore it with `dvc checkout`") from None
        return [str(row[0]) for row in found]

    def source(self, path: str) -> str:
        """Returns a table of the workspace as an SQL source."""
        return f"read_parquet({_literal(str(self.root / path))})"

    # -- one row --------------------------------------------------------------------------------

    def find(self, prefix: str, ref: str = "") -> str:
        """Returns the one id that begins with ``prefix``; errors quote ``ref``, what the user typed.

        Raises:
            BadInput: if no row, or more than one, has such an id.
        """
        sql = " UNION ".join(f"SELECT id FROM {kind.partition('.')[0]} WHERE starts_with(id, ?)" for kind in _COLUMNS)
        ids = sorted({row["id"] for row in self.ask(sql, [prefix] * len(_COLUMNS))})
        if len(ids) == 1:
            return str(ids[0])
        if ids:
            shown = ", ".join(i[: max(16, len(prefix) + 4)] for i in ids[:5])
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
        name = kind.partition(".")[0]
        tables = {hit["table"] for hit in self.ask(f'SELECT DISTINCT "table" FROM {name} WHERE id = ?', [row])}
        return [
            {"stage": stage, "table": path, "row": found}
            for path, stage in self.tables[kind].items()
            if path in tables
            for found in self.ask(f"SELECT * FROM {self.source(path)} WHERE id = ?", [row])
        ]

    # -- rows around it -------------------------------------------------------------------------

    def _edges(self, ids: Iterable[str], up: bool) -> list[tuple[str, str, str]]:
        """Returns (known id, other id, relation) for the rows one step above or below ``ids``."""
        known = sorted(set(ids))
        if up:
            made = (
                "SELECT id AS here, unnest(parents) AS there, 'parent' AS how FROM rows WHERE id IN (SELECT unnest(?))"
            )
            changed = "SELECT replaced_by AS here, id AS there, 'changed by a filter' AS how FROM decisions "
            changed += "WHERE replaced_by IN (SELECT unnest(?)) AND replaced_by <> id"
        else:
            made = "SELECT here, id AS there, how FROM (SELECT id, unnest(parents) AS here, 'parent' AS how FROM rows) "
            made += "WHERE here IN (SELECT unnest(?))"
            changed = "SELECT id AS here, replaced_by AS there, 'changed by a filter' AS how FROM decisions "
            changed += "WHERE id IN (SELECT unnest(?)) AND replaced_by IS NOT NULL AND replaced_by <> id"
        sql = f"SELECT DISTINCT here, there, how FROM ({changed} UNION ALL {made}) ORDER BY ALL"
        return [(e["here"], e["there"], e["how"]) for e in self.ask(sql, [known, known])]

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

    def _chosen(self, data: str, method: str | None) -> str | None:
        """Returns the rows of a data set as an SQL source: of its file, and of one method where given."""
        table = self.table_of(data)
        if table is None:
            return None
        columns, file = self.columns(table), data.rpartition("/")[2]
        conditions = []
        if "file" in columns and file.endswith((".jsonl", ".hdf5")):
            conditions.append(f"file = {_literal(file)}")  # one table may cover several files
        if "method" in columns and method is not None:
            conditions.append(f"method = {_literal(method)}")  # fine-tuning takes the rows of its method
        return f"(SELECT * FROM {self.source(table)} WHERE {' AND '.join(conditions) or 'true'})"

    def within(self, ids: Sequence[str], data: str, method: str | None = None) -> tuple[list[str], int]:
        """Returns which of ``ids`` are rows of a data set, and how many rows that has."""
        rows = self._chosen(data, method)
        if rows is None:
            return [], 0
        found = self.ask(f"SELECT DISTINCT id FROM {rows} WHERE id IN (SELECT unnest(?)) ORDER BY id", [list(ids)])
        return [row["id"] for row in found], int(self.ask(f"SELECT count(*) AS n FROM {rows}")[0]["n"])

    def ids(self, data: str, method: str | None = None) -> list[str]:
        """Returns the ids of all rows of a data set, in the order of the file where it has one."""
        rows, table = self._chosen(data, method), self.table_of(data)
        if rows is None or table is None:
            return []
        order = '"index"' if "index" in self.columns(table) else "id"
        return [row["id"] for row in self.ask(f"SELECT id FROM {rows} ORDER BY {order}")]

    def origins(self, data: str, method: str | None = None) -> list[dict[str, Any]]:
        """Returns who made the rows of a data set, with counts: policies, or generators and operators."""
        rows, table = self._chosen(data, method), self.table_of(data)
        if rows is None or table is None:
            return []
        wanted = ("policy", "algorithm", "cost_limit", "generator", "method", "operator", "family", "split")
        keys = ", ".join(f'"{name}"' for name in wanted if name in self.columns(table))
        return self.ask(f"SELECT {keys}, count(*) AS rows FROM {rows} GROUP BY ALL ORDER BY ALL") if keys else []

    def rules(self, stage: str) -> list[dict[str, Any]]:
        """Returns each rule a filter stage applied: how many rows it kept, dropped and replaced."""
        found = []
        for path, owner in self.tables[DECISIONS].items():
            if owner != stage:
                continue
            columns = self.columns(path)
            extra = ", min(threshold) AS lowest_threshold, max(threshold) AS highest_threshold"
            extra = extra if "threshold" in columns else ""
            replaced = "count(replaced_by)" if "replaced_by" in columns else "0"
            sql = f"SELECT rule, count(*) FILTER (kept) AS kept, count(*) FILTER (NOT kept) AS dropped, {replaced} "
            sql += f"AS replaced{extra} FROM (SELECT *, row_number() OVER () AS place FROM {self.source(path)}) "
            rules = self.ask(sql + "GROUP BY rule ORDER BY min(place)")
            found += [{"stage": stage, "table": path, **rule} for rule in rules]
        return found
