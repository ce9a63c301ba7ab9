"""Verdicts on data as plain data: what is expected of which frame, what came out, which rows are at fault.

A suite is a list of frames; a frame is a table with the expectations on its columns. Nothing here runs one: that
is `springhead.expectations`, the only module that knows Great Expectations (it takes seconds to import).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from springhead.errors import Finding
from springhead.jsonio import write_json
from springhead.lineage.digests import files_digest, json_digest, tree_files
from springhead.tables import write_table

Severity = Literal["critical", "warning"]
Kind = Literal["between", "in_set", "matches", "not_null", "null", "true", "unique", "row_count"]
ROW = "row"
"""The first column of every frame: the row's position, by which a failure finds its id."""
QUARANTINE_SCHEMA = pa.schema(
    [("id", pa.string()), ("expectation", pa.string()), ("severity", pa.string()), ("detail", pa.string())]
)
_NAMED_IN_VERDICT = 20
_NAMED_IN_MESSAGE = 3


@dataclass(frozen=True)
class Check:
    """One expectation on one column.

    Attributes:
        name: The expectation's own name, such as ``ExpectCostsNonNegative``.
        kind: What is expected of the column's values; ``row_count`` is about the frame and has no column.
        column: The column.
        description: What holds when it is green, in words.
        arguments: min_value and max_value, value_set, or regex, by kind.
        severity: A critical failure stops the pipeline; a warning is only reported.
    """

    name: str
    kind: Kind
    column: str
    description: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity = "critical"


@dataclass(frozen=True)
class Frame:
    """A table and what is expected of it.

    Attributes:
        name: Such as ``transitions``.
        noun: What one table row is, such as ``step``; for messages.
        table: The columns; the first is `ROW`, counting from 0. Nulls are skipped by all kinds but ``not_null``.
        checks: The expectations.
        ids: For each table row, the id it belongs to (several steps share their episode's id).
        keys: Columns that say where a table row is; failures quote them.
        quarantines: Whether the ids are ids of data rows, which a failure puts into quarantine.
    """

    name: str
    noun: str
    table: pd.DataFrame
    checks: tuple[Check, ...]
    ids: Sequence[str] | np.ndarray
    keys: tuple[str, ...] = ()
    quarantines: bool = True


@dataclass(frozen=True)
class Outcome:
    """What one expectation came to on one frame.

    Attributes:
        rows: Positions of the failing table rows.
        observed: What was seen in the column, as JSON.
    """

    frame: Frame
    check: Check
    success: bool
    rows: np.ndarray
    observed: Any

    def ids(self) -> list[str]:
        """The distinct ids of the failing rows, in the order of their first failure."""
        return [str(self.frame.ids[row]) for row in self._first_rows()]

    def _codes(self) -> np.ndarray:
        """For each failing row a number that rows of one id share; rows without an id share one too."""
        ids = np.asarray(self.frame.ids, dtype=object)[self.rows]
        codes: np.ndarray = pd.factorize(ids, use_na_sentinel=False)[0]
        return codes

    def _first_rows(self) -> np.ndarray:
        codes = self._codes()
        _, first = np.unique(codes, return_index=True)
        return self.rows[np.sort(first)]

    def quarantine(self) -> list[tuple[str, str, str, str]]:
        """One line per id: id, expectation, severity, and how many of its rows failed and how the first did."""
        codes = self._codes()
        counts = np.bincount(codes)
        table = self.frame.table
        lines: list[tuple[str, str, str, str]] = []
        shown = list(dict.fromkeys([*self.frame.keys, self.check.column]))
        for row, count in zip(self._first_rows(), counts, strict=True):
            where = ", ".join(f"{name}={plain(table[name].iloc[row])}" for name in shown)
            detail = f"{where}" if count == 1 else f"{count} {self.frame.noun}s, the first at {where}"
            lines.append((str(self.frame.ids[row]), self.check.name, self.check.severity, detail))
        return lines

    def to_json(self) -> dict[str, Any]:
        """The entry of this expectation in ``verdict.json``."""
        ids = self.ids()
        return {
            "name": self.check.name,
            "frame": self.frame.name,
            "column": self.check.column,
            "description": self.check.description,
            "severity": self.check.severity,
            "success": self.success,
            "observed": self.observed,
            "unexpected_count": len(self.rows),
            "unexpected_id_count": len(ids),
            "unexpected_ids": ids[:_NAMED_IN_VERDICT],
        }


def suite_json(name: str, frames: Iterable[Frame]) -> dict[str, Any]:
    """The definition of a suite, with all its bounds: the digest of this is the suite's identity."""
    expectations = [
        {
            "frame": frame.name,
            "name": check.name,
            "kind": check.kind,
            "column": check.column,
            "description": check.description,
            "severity": check.severity,
            "arguments": plain(dict(check.arguments)),
        }
        for frame in frames
        for check in frame.checks
    ]
    return {"suite": name, "expectations": expectations}


@dataclass(frozen=True)
class Verdict:
    """A suite's outcome on one data set.

    Attributes:
        suite: The suite's name.
        suite_digest: Digest of its definition, see `suite_json`.
        data_digest: Digest of the validated folder: the one in the receipt of the stage that made it.
        files: Digests of the files in that folder.
        rows: How many data rows (episodes, text rows) were validated.
        outcomes: In the order of the suite.
    """

    suite: str
    suite_digest: str
    data_digest: str
    files: Mapping[str, str]
    rows: int
    outcomes: tuple[Outcome, ...]

    @property
    def severity(self) -> str:
        """The worst failure: none, warning or critical."""
        failed = {outcome.check.severity for outcome in self.outcomes if not outcome.success}
        return next((level for level in ("critical", "warning") if level in failed), "none")

    def quarantine(self) -> list[tuple[str, str, str, str]]:
        """The lines of ``quarantine.parquet``."""
        failed = [outcome for outcome in self.outcomes if not outcome.success and outcome.frame.quarantines]
        return [line for outcome in failed for line in outcome.quarantine()]

    def to_json(self) -> dict[str, Any]:
        """The content of ``verdict.json``; ``success`` means that no critical expectation failed."""
        return {
            "suite": self.suite,
            "suite_digest": self.suite_digest,
            "data_digest": self.data_digest,
            "files": dict(self.files),
            "success": self.severity != "critical",
            "severity": self.severity,
            "expectations": [outcome.to_json() for outcome in self.outcomes],
            "quarantined": len({line[0] for line in self.quarantine()}),
            "rows": self.rows,
        }

    def write(self, out: Path, frames: Sequence[Frame]) -> None:
        """Writes ``verdict.json``, ``suite.json`` and ``quarantine.parquet``."""
        write_json(out / "verdict.json", self.to_json())
        write_json(out / "suite.json", suite_json(self.suite, frames))
        columns = list(zip(*self.quarantine(), strict=True)) or [()] * len(QUARANTINE_SCHEMA)
        named = {name: list(values) for name, values in zip(QUARANTINE_SCHEMA.names, columns, strict=True)}
        write_table(out / "quarantine.parquet", named, QUARANTINE_SCHEMA)

    def refuse(self, stage: str) -> None:
        """Raises if a critical expectation failed.

        Raises:
            Finding: Naming the expectations, the first ids of each and where the whole verdict is.
        """
        failed = [o for o in self.outcomes if not o.success and o.check.severity == "critical"]
        if not failed:
            return
        lines = [f"{stage}: {len(failed)} critical expectation(s) of the {self.suite} suite failed"]
        for outcome in failed:
            ids = outcome.ids()
            rest = f" and {len(ids) - _NAMED_IN_MESSAGE} more" if len(ids) > _NAMED_IN_MESSAGE else ""
            names = f": {', '.join(ids[:_NAMED_IN_MESSAGE])}{rest}" if ids else f" (observed {outcome.observed})"
            count = f"{len(outcome.rows)} {outcome.frame.noun}(s)" if ids else outcome.frame.name
            lines.append(f"  {outcome.check.name}: {outcome.check.description}; not so in {count}{names}")
        lines.append(
            f"verdict.json and quarantine.parquet below failed/{stage}/ in the state folder (.springhead) have every "
            "row. Mend the stage that made them, filter them out, or change the bound in params.yaml"
        )
        raise Finding("\n".join(lines))


def verdict(suite: str, frames: Sequence[Frame], outcomes: Sequence[Outcome], data: Path, rows: int) -> Verdict:
    """Binds outcomes to the digests of the suite and of the folder they are about."""
    files = tree_files(data)
    return Verdict(suite, json_digest(suite_json(suite, frames)), files_digest(files), files, rows, tuple(outcomes))


def plain(value: Any) -> Any:
    """Turns NumPy scalars and containers into JSON values: NaN becomes null, infinity the text ``inf``.

    Floats are cut to nine digits, so that a message does not show a float32's tail.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    return value if isinstance(value, bool | int | str) else str(value)
