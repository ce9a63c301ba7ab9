"""What differs between two data sets: rows and the rule behind each, distributions, and receipts.

Rows are matched by id, which is the digest of their content. The tables are read in place by
DuckDB, from the workspace or from DVC's cache, so revisions of ten million rows need no checkout.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.lineage.receiptdiff import changes
from springhead.lineage.rows import ROWS, plain
from springhead.lineage.sides import Side, side

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BINS = 20
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PRODUCER = ("policy", "algorithm", "cost_limit", "generator", "method", "operator", "family", "split")
_NO_QUANTITY = ("id", "index", "seed")  # names and places, which have no distribution worth a look
_MOST_VALUES = 50
_DIGITS = 12  # of a figure: sums of floats depend on the order of threads beyond them


def diff(root: Path, a: str, b: str) -> dict[str, Any]:
    """Compares two data sets.

    Args:
        root: the repository root.
        a: a reference, see :func:`springhead.lineage.sides.side`.
        b: another one.

    Returns:
        Plain JSON: both sides, the number of rows in both, what became of the rows that only one
        side has, distributions of the columns, and what differs between the receipts behind them.

    Raises:
        BadInput: if a reference means no data set, or a table is missing or damaged.
    """
    import duckdb

    first, second = side(root, "a", a), side(root, "b", b)
    with tempfile.TemporaryDirectory(dir=state_folder(root)) as spill, duckdb.connect(":memory:") as connection:
        connection.execute("SET threads TO 2")
        connection.execute(f"SET temp_directory = {_literal(spill)}")
        try:
            return _Comparison(connection, first, second).answer()
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            brief = str(error).splitlines()[0]
            raise BadInput(f"a row table cannot be read ({brief}); restore it with `dvc checkout`") from None
        except duckdb.OutOfMemoryException as error:
            raise BadInput(f"not enough memory or disk below {spill}: {str(error).splitlines()[0]}") from None


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


class _Comparison:
    """One comparison in one database."""

    def __init__(self, connection: "DuckDBPyConnection", a: Side, b: Side) -> None:
        self.connection, self.sides = connection, {"a": a, "b": b}
        self.columns: dict[str, dict[str, str]] = {}
        for one in (a, b):
            self._open(one)

    def ask(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        done = self.connection.execute(sql, list(values))
        names = [column[0] for column in done.description or ()]
        return [{n: plain(v) for n, v in zip(names, row, strict=True)} for row in done.fetchall()]

    def _source(self, one: Side, path: str) -> str:
        return f"read_parquet({_literal(str(one.state.file(path)))})"

    def _open(self, one: Side) -> None:
        """Makes the views of a side: its rows, what its filter dropped, and what that changed."""
        source = self._source(one, one.table)
        types = {r["column_name"]: r["column_type"] for r in self.ask(f"DESCRIBE SELECT * FROM {source}")}
        if "id" not in types:
            raise BadInput(f"{one.table}: no column 'id', so its rows cannot be compared")
        self.columns[one.name] = types
        chosen = [f"{_name(c)} = {_literal(v)}" for c, v in one.conditions.items() if c in types]
        where = " AND ".join(chosen) or "true"
        self.connection.execute(f"CREATE VIEW whole_{one.name} AS SELECT * FROM {source}")
        self.connection.execute(f"CREATE VIEW {one.name} AS SELECT * FROM {source} WHERE {where}")
        empty = "SELECT NULL::VARCHAR AS id, NULL::VARCHAR AS rule, NULL::BOOLEAN AS kept, NULL::DOUBLE AS value, "
        empty += "NULL::DOUBLE AS threshold, NULL::VARCHAR AS replaced_by, NULL::BIGINT AS place WHERE false"
        if one.decisions:
            path = _literal(str(one.state.file(one.decisions)))
            empty = f"SELECT *, file_row_number AS place FROM read_parquet({path}, file_row_number = true)"
        self.connection.execute(f"CREATE VIEW decisions_{one.name} AS {empty}")
        # A row may be changed several times: the id of what a rule made is traced to the row that came in.
        # Where a rule puts a row in the place of its twin, that row came in itself: it was judged before.
        self.connection.execute(f"""
            CREATE TEMP TABLE chain_{one.name} AS
            WITH RECURSIVE replaced AS (
                SELECT * FROM decisions_{one.name} WHERE replaced_by IS NOT NULL AND replaced_by <> id
            ), judged AS (
                SELECT id, min(place) AS place FROM decisions_{one.name}
                WHERE id IN (SELECT replaced_by FROM replaced) GROUP BY id
            ), pairs AS (
                SELECT replaced.id, replaced.rule, replaced.replaced_by
                FROM replaced LEFT JOIN judged ON judged.id = replaced.replaced_by
                WHERE judged.place IS NULL OR judged.place > replaced.place
            ), chain AS (
                SELECT replaced_by AS id, id AS root, rule FROM pairs
                WHERE id NOT IN (SELECT replaced_by FROM pairs)
                UNION
                SELECT pairs.replaced_by, chain.root, chain.rule FROM pairs JOIN chain ON pairs.id = chain.id
            ) SELECT * FROM chain""")
        self.connection.execute(f"""
            CREATE TEMP TABLE gone_{one.name} AS
            SELECT coalesce(chain.root, d.id) AS root, d.rule, d.value, d.threshold, d.replaced_by IS NULL AS dropped
            FROM decisions_{one.name} AS d LEFT JOIN chain_{one.name} AS chain ON chain.id = d.id
            WHERE NOT d.kept OR d.replaced_by <> d.id""")

    # -- rows -------------------------------------------------------------------------------------

    def answer(self) -> dict[str, Any]:
        counts = {name: self.ask(f"SELECT count(*) AS n FROM {name}")[0]["n"] for name in self.sides}
        only = {name: self._only(name, other) for name, other in (("a", "b"), ("b", "a"))}
        fates = {f"only_{name}": self._fates(name, other) for name, other in (("a", "b"), ("b", "a"))}
        return {
            **{name: self._describe(one, counts[name]) for name, one in self.sides.items()},
            "rows": {
                "common": counts["a"] - only["a"],
                "only_a": only["a"],
                "only_b": only["b"],
                "other_facts": self._other_facts(),
            },
            **fates,
            "numeric": self._numeric(counts),
            "categorical": self._categorical(),
            "receipts": changes(self.sides["a"], self.sides["b"]),
        }

    def _describe(self, one: Side, rows: int) -> dict[str, Any]:
        graph = one.state.graph
        return {
            "ref": one.ref,
            "revision": one.state.label,
            "path": one.path,
            "sha256": graph.digest(one.path),
            "stage": one.stage,
            "conditions": {c: v for c, v in one.conditions.items() if c in self.columns[one.name]},
            "rows": rows,
        }

    def _only(self, name: str, other: str) -> int:
        """Keeps the ids that only one side has, each with the id that came into that side's filter."""
        self.connection.execute(f"""
            CREATE TEMP TABLE only_{name} AS
            SELECT x.id, coalesce(chain.root, x.id) AS root, chain.rule AS changed_by
            FROM {name} AS x ANTI JOIN {other} AS y ON x.id = y.id
            LEFT JOIN chain_{name} AS chain ON chain.id = x.id""")
        return int(self.ask(f"SELECT count(*) AS n FROM only_{name}")[0]["n"])

    def _fates(self, name: str, other: str) -> list[dict[str, Any]]:
        """Says of the rows that only one side has what the other side did with them."""
        conditions = [c for c in self.sides[other].conditions if c in self.columns[other]]
        part = " || ', ' || ".join(f"'{c} ' || {_name(c)}" for c in conditions) or "NULL::VARCHAR"
        elsewhere = f"SELECT id, any_value({part}) AS part FROM whole_{other} WHERE {bool(conditions)} GROUP BY id"
        self.connection.execute(f"""
            CREATE TEMP TABLE fate_{name} AS
            SELECT o.id, o.root, gone.value, gone.threshold,
                coalesce(gone.rule, CASE WHEN kept.id IS NOT NULL THEN o.changed_by END, elsewhere.part) AS rule,
                CASE WHEN gone.dropped THEN 'dropped' WHEN gone.rule IS NOT NULL THEN 'replaced there'
                     WHEN kept.id IS NOT NULL THEN 'replaced here' WHEN elsewhere.id IS NOT NULL THEN 'elsewhere'
                     ELSE 'not made' END AS what
            FROM only_{name} AS o
            LEFT JOIN (SELECT DISTINCT ON (root) * FROM gone_{other} ORDER BY root, dropped DESC, rule) AS gone
                ON gone.root = o.root
            LEFT JOIN (SELECT DISTINCT id FROM {other}) AS kept ON kept.id = o.root
            LEFT JOIN ({elsewhere}) AS elsewhere ON elsewhere.id = o.root""")
        found = self.ask(f"""
            SELECT what, rule, count(*) AS rows, min(value) AS lowest_value, max(value) AS highest_value,
                min(threshold) AS lowest_threshold, max(threshold) AS highest_threshold, min(id, 3) AS examples
            FROM fate_{name} WHERE what <> 'not made' GROUP BY what, rule ORDER BY rows DESC, what, rule""")
        return found + self._not_made(name, other)

    def _not_made(self, name: str, other: str) -> list[dict[str, Any]]:
        """Says who made the rows that never came into the other side, and whether that side has the maker."""
        count = self.ask(f"SELECT count(*) AS n FROM fate_{name} WHERE what = 'not made'")[0]["n"]
        if not count:
            return []
        one, two = self.sides[name], self.sides[other]
        tables = self._tables_behind(two)
        ids = " UNION ALL ".join(f"SELECT id FROM {t}" for t in tables) or "SELECT NULL::VARCHAR AS id WHERE false"
        self.connection.execute(f"""
            CREATE TEMP TABLE lost_{name} AS
            SELECT f.id, EXISTS (FROM ({ids}) AS u WHERE u.id = f.root) AS upstream
            FROM fate_{name} AS f WHERE f.what = 'not made'""")
        keys = [c for c in _PRODUCER if c in self.columns[name]]
        known = [c for c in ("policy", "generator") if c in self.columns[name]]
        chosen = ", ".join(f"x.{_name(c)}" for c in keys)
        groups = self.ask(f"""
            SELECT {chosen}{", " if chosen else ""}lost.upstream, count(*) AS rows, min(lost.id, 3) AS examples
            FROM lost_{name} AS lost JOIN {name} AS x ON x.id = lost.id GROUP BY ALL ORDER BY rows DESC, examples""")
        makers = self._makers(tables, known)
        paths = {m.sha256: m.path for m in one.state.graph.models}
        found = []
        for group in groups:
            upstream, rows, examples = (group.pop(key) for key in ("upstream", "rows", "examples"))
            maker = next((str(group[c]) for c in known if group.get(c)), None)
            entry = {
                "what": "left out" if upstream else "not made",
                "rule": None,
                "rows": rows,
                "examples": examples,
                "producer": group,
                "model": paths.get(maker or ""),
            }
            found.append(entry | {"maker_is_there": maker in makers if maker else None})
        return found

    def _tables_behind(self, one: Side) -> list[str]:
        """Returns the row tables of all stages behind a data set that are here."""
        graph, found = one.state.graph, []
        for stage in graph.upstream(one.stage):
            for out, facts in graph.receipts[stage]["outputs"].items():
                if ROWS in facts.get("files", {}):
                    found.append(self._source(one, f"{out}/{ROWS}"))
        return found

    def _makers(self, tables: Sequence[str], columns: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for source in tables:
            there = {r["column_name"] for r in self.ask(f"DESCRIBE SELECT * FROM {source}")}
            for column in columns:
                if column in there:
                    values = self.ask(f"SELECT DISTINCT {_name(column)}::VARCHAR AS v FROM {source}")
                    found |= {str(row["v"]) for row in values if row["v"] is not None}
        return found

    def _other_facts(self) -> dict[str, int]:
        """Counts the rows that both sides have but describe otherwise, by column."""
        shared = [c for c in self.columns["a"] if c in self.columns["b"] and c not in ("id", "index")]
        if not shared:
            return {}
        differs = [
            f"a.{_name(c)} IS DISTINCT FROM b.{_name(c)}"
            if self.columns["a"][c] == self.columns["b"][c]
            else f"a.{_name(c)}::VARCHAR IS DISTINCT FROM b.{_name(c)}::VARCHAR"
            for c in shared
        ]
        counts = ", ".join(f"count(*) FILTER ({test}) AS {_name(c)}" for test, c in zip(differs, shared, strict=True))
        (row,) = self.ask(f"SELECT {counts} FROM a JOIN b ON a.id = b.id")
        return {column: count for column, count in row.items() if count}

    # -- columns ----------------------------------------------------------------------------------

    def _of_kind(self, name: str, numeric: bool) -> list[str]:
        words = ("VARCHAR", "BOOLEAN", "ENUM")
        return [
            column
            for column, kind in self.columns[name].items()
            if column not in _NO_QUANTITY
            and "[" not in kind
            and "(" not in kind.removeprefix("ENUM").removeprefix("DECIMAL")
            and (kind.startswith(words) is not numeric)
            and (
                not numeric
                or kind.startswith(
                    ("DOUBLE", "FLOAT", "DECIMAL", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "U")
                )
            )
        ]

    def _numeric(self, counts: Mapping[str, int]) -> dict[str, Any]:
        found = {}
        sides = {name: self._of_kind(name, numeric=True) for name in self.sides}
        for column in dict.fromkeys([*sides["a"], *sides["b"]]):
            figures = {name: self._figures(name, column) if column in sides[name] else None for name in self.sides}
            known = [f for f in figures.values() if f is not None and f["count"]]
            if known:
                low, high = min(f["min"] for f in known), max(f["max"] for f in known)
                found[column] = {**figures, "histogram": self._histogram(sides, column, low, high)}
        return found

    def _figures(self, name: str, column: str) -> dict[str, Any]:
        quantiles = ", ".join(map(str, QUANTILES))
        (row,) = self.ask(f"""
            SELECT count(x) AS count, min(x) AS min, max(x) AS max, favg(x) AS mean, stddev_samp(x) AS sd,
                quantile_cont(x, [{quantiles}]) AS quantiles
            FROM (SELECT {_name(column)}::DOUBLE AS x FROM {name}) WHERE isfinite(x)""")
        quantile = row.pop("quantiles") or [None] * len(QUANTILES)
        row["quantiles"] = {f"{q:g}": _rounded(v) for q, v in zip(QUANTILES, quantile, strict=True)}
        return {key: _rounded(value) if isinstance(value, float) else value for key, value in row.items()}

    def _histogram(self, sides: Mapping[str, list[str]], column: str, low: float, high: float) -> dict[str, Any]:
        """Counts both sides in the same bins of equal width."""
        whole = all(self.columns[n][column].endswith(("INT", "INTEGER")) for n in sides if column in sides[n])
        bins = min(BINS, int(high - low) + 1) if whole else BINS if high > low else 1
        edge = high + 1 if whole and bins < BINS else high
        width = (edge - low) / bins or 1.0
        counts = {}
        for name in (n for n in sides if column in sides[n]):
            rows = self.ask(f"""
                SELECT least(floor((x - {low!r}) / {width!r}), {bins - 1})::INTEGER AS bin, count(*) AS n
                FROM (SELECT {_name(column)}::DOUBLE AS x FROM {name}) WHERE isfinite(x) GROUP BY bin""")
            by_bin = {row["bin"]: row["n"] for row in rows}
            counts[name] = [by_bin.get(number, 0) for number in range(bins)]
        return {"edges": [_rounded(low + width * number) for number in range(bins + 1)], **counts}

    def _categorical(self) -> dict[str, Any]:
        found = {}
        sides = {name: self._of_kind(name, numeric=False) for name in self.sides}
        for column in dict.fromkeys([*sides["a"], *sides["b"]]):
            parts = [
                f"SELECT {_name(column)}::VARCHAR AS value, count(*) FILTER ({name == 'a'}) AS a, "
                f"count(*) FILTER ({name == 'b'}) AS b FROM {name} GROUP BY value"
                for name in sides
                if column in sides[name]
            ]
            both = " UNION ALL ".join(parts)
            values = f"SELECT value, sum(a)::BIGINT AS a, sum(b)::BIGINT AS b FROM ({both}) GROUP BY value"
            (summary,) = self.ask(f"""
                SELECT count(*) FILTER (a > 0) AS distinct_a, count(*) FILTER (b > 0) AS distinct_b,
                    count(*) FILTER (a > 0 AND b > 0) AS distinct_common FROM ({values})""")
            most = self.ask(
                f"SELECT * FROM ({values}) ORDER BY abs(b - a) DESC, a + b DESC, value LIMIT {_MOST_VALUES}"
            )
            found[column] = {**summary, "values": most}
        return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
