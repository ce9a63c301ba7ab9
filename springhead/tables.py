"""Tables with deterministic bytes: Parquet for rows, decisions and verdicts, CSV for results that people read."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from springhead.errors import BadInput

ROW_GROUP = 1 << 15
"""Rows in a row group: what must be read to find one row; of ids, two megabytes."""


def write_table(path: Path | str, columns: Mapping[str, Sequence[Any] | np.ndarray], schema: pa.Schema) -> pa.Table:
    """Writes columns as one Parquet file and returns the table.

    Args:
        path: the file to write; its folder is made.
        columns: one sequence per schema field, all of one length.
        schema: names and types, in the order of the file.

    Raises:
        BadInput: if a column is missing, unknown or does not fit its type.
    """
    unknown = sorted(set(columns) - set(schema.names))
    missing = sorted(set(schema.names) - set(columns))
    if unknown or missing:
        raise BadInput(f"{path}: columns do not fit the schema: unknown {unknown}, missing {missing}")
    try:
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        table = pa.Table.from_arrays(arrays, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadInput(f"{path}: {error}") from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", version="2.6", store_schema=True, row_group_size=ROW_GROUP)
    return table


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same keys as CSV with a header, numbers to six digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_table(path: Path | str) -> pa.Table:
    """Reads a Parquet file.

    Raises:
        BadInput: if it is missing or damaged.
    """
    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; run the stage that makes it (`dvc repro`)") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path}: not a readable Parquet file ({error}); restore it with `dvc checkout`") from error
