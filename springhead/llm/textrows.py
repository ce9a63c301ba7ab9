"""Rows of text data: their JSON lines, their ids and the row table written beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl, write_jsonl
from springhead.lineage.digests import json_digest
from springhead.tables import write_table

Row = dict[str, Any]

ROWS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("split", pa.string()),
        ("method", pa.string()),
        ("operator", pa.string()),
        ("variant", pa.int32()),
        ("family", pa.string()),
        ("ops", pa.int32()),
        ("depth", pa.int32()),
        ("generator", pa.string()),
        ("index", pa.int32()),
        ("file", pa.string()),
    ]
)
"""The row table of every text stage. `index` is the row's line in `file`, from 0; method, operator and variant are
null for problems, which no method has touched yet; `generator` names the rule that wrote the row."""


def row_id(row: Mapping[str, Any]) -> str:
    """The id of a row: the digest of everything in it but the id."""
    return json_digest({key: value for key, value in row.items() if key != "id"})


def with_row_id(row: Mapping[str, Any]) -> Row:
    """The row with its id set (any old one is replaced)."""
    return {**row, "id": row_id(row)}


def spread_evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` rows at even distances (all, if there are fewer)."""
    if count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def read_rows(path: Path, fields: Mapping[str, type]) -> list[Row]:
    """All rows of a JSON-lines file.

    Raises:
        BadInput: a row lacks one of the fields or has another type there, an id occurs twice, or there are no rows.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for number, row in enumerate(read_jsonl(path), start=1):
        wrong = [name for name, kind in fields.items() if type(row.get(name)) is not kind]
        if wrong:
            raise BadInput(
                f"{path}:{number}: row {row.get('id', '(no id)')}: missing or of a wrong type: {', '.join(wrong)}; "
                "make the file again"
            )
        if row["id"] in seen:
            raise BadInput(f"{path}:{number}: the id {row['id']} occurs a second time; remove one of the rows")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: no rows; check the stage that makes it")
    return rows


def write_rows(folder: Path, files: Mapping[str, Sequence[Row]]) -> None:
    """Write each file's rows as JSON lines, and `rows.parquet` over all of them, files in the order given."""
    columns: dict[str, list[Any]] = {name: [] for name in ROWS_SCHEMA.names}
    for file, rows in files.items():
        write_jsonl(folder / file, rows)
        for index, row in enumerate(rows):
            facts = {**row, "index": index, "file": file, "generator": generator_of(row)}
            for name, column in columns.items():
                column.append(facts.get(name))
    write_table(folder / "rows.parquet", columns, ROWS_SCHEMA)


def generator_of(row: Mapping[str, Any]) -> str:
    """The name of the rule that wrote a row."""
    return f"{row['method']}.{row['operator']}" if "method" in row else f"problems.{row['family']}"
