"""Runs a suite with Great Expectations and builds its Data Docs: the only module that imports it.

The context is ephemeral: suites live in our code, data are frames in memory, verdicts are our own JSON. Data Docs
are settled afterwards, so that the same data always give the same bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

# Read by Great Expectations when it is imported: nothing leaves this machine.
os.environ["GX_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
from great_expectations.core.run_identifier import RunIdentifier

from springhead.errors import SpringheadError
from springhead.verdicts import ROW, Check, Frame, Outcome, plain

_BASES: dict[str, type[gxe.Expectation]] = {
    "between": gxe.ExpectColumnValuesToBeBetween,
    "in_set": gxe.ExpectColumnValuesToBeInSet,
    "matches": gxe.ExpectColumnValuesToMatchRegex,
    "not_null": gxe.ExpectColumnValuesToNotBeNull,
    "null": gxe.ExpectColumnValuesToBeNull,
    "true": gxe.ExpectColumnValuesToBeInSet,
    "unique": gxe.ExpectColumnValuesToBeUnique,
    "row_count": gxe.ExpectTableRowCountToBeBetween,
}
_EXAMPLES = 20
_RUN_TIME = "2000-01-01T00:00:00+00:00"  # a run has a time in Great Expectations; ours must not depend on it
_ASSETS = ("images/favicon.ico", "images/logo-long.png")
_LOGO = re.compile(r"https://great-expectations-web-assets\.s3[^\"]*/(?:full_logo_dark|logo-long)\.png[^\"]*")
_MOMENT = re.compile(r"\b20\d{6}T\d{6}\.\d{6}Z")
# The run time above, which the pages show in the reader's time zone.
_LOCAL_RUN_TIME = re.compile(r"\b(?:1999-12-31|2000-01-01)[T ]\d\d:\d\d:\d\d ?[A-Z+-][A-Za-z0-9:+-]*")
_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b")


def judge(suite: str, frames: Sequence[Frame], docs: Path) -> list[Outcome]:
    """Validates every frame against its checks and writes Data Docs.

    Args:
        suite: The suite's name.
        frames: What to validate, see `springhead.verdicts.Frame`.
        docs: The folder for the static HTML; it begins at ``index.html``.

    Returns:
        One outcome per check, in the order of frames and checks.

    Raises:
        SpringheadError: An expectation could not be computed, which is a fault of the suite.
    """
    context = gx.get_context(mode="ephemeral")
    # Progress bars of half a second each would only hide the stage's own progress.
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    outcomes = [outcome for frame in frames for outcome in _validate(context, suite, frame)]
    _build_docs(context, docs)
    return outcomes


def _expectation(check: Check) -> gxe.Expectation:
    """Makes the expectation under its own name, a subclass of the built-in one that computes it."""
    arguments: dict[str, Any] = {"value_set": [True]} if check.kind == "true" else dict(check.arguments)
    if check.kind != "row_count":
        arguments["column"] = check.column
    return _named(check.name, check.kind)(**arguments, severity=check.severity, description=check.description)


@cache  # making a class registers it, once is enough
def _named(name: str, kind: str) -> type[gxe.Expectation]:
    return type(name, (_BASES[kind],), {"__module__": __name__, "__doc__": f"{name}: expects {kind} of a column."})


def _validate(context: Any, suite: str, frame: Frame) -> list[Outcome]:
    name = f"{suite}-{frame.name}"
    expectations = [_expectation(check) for check in frame.checks]
    added = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
    source = context.data_sources.add_pandas(name)
    batch = source.add_dataframe_asset(frame.name).add_batch_definition_whole_dataframe("all")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=added))
    # Naming index columns here would make one dictionary per failing row, gigabytes for a million; the frame's own
    # index gives numbers, and `_shorten` names the columns for those that a page shows.
    complete = {"result_format": "COMPLETE", "include_unexpected_rows": False}
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(name=name, validation_definitions=[definition], result_format=complete)
    )
    done = checkpoint.run(
        batch_parameters={"dataframe": frame.table.reset_index(drop=True)},
        run_id=RunIdentifier(run_name=suite, run_time=_RUN_TIME),
    )
    [(key, result)] = done.run_results.items()
    by_name = {entry.expectation_config.type: entry for entry in result.results}
    outcomes = [_outcome(frame, check, by_name[_snake(check.name)]) for check in frame.checks]
    for entry in result.results:
        _shorten(entry.result, frame)
    context.validation_results_store.update(key, result)
    return outcomes


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _outcome(frame: Frame, check: Check, entry: Any) -> Outcome:
    raised = entry.exception_info or {}
    nested = raised.values() if "raised_exception" not in raised else [raised]
    for info in nested:
        if info.get("raised_exception"):
            raise SpringheadError(
                f"{check.name} on {frame.name}.{check.column} could not be computed: "
                f"{info.get('exception_message')}; mend the suite"
            )
    found = entry.result.get("unexpected_index_list") or []
    rows = np.sort(np.array(found, dtype=np.int64))
    return Outcome(frame, check, bool(entry.success), rows, _observed(frame.table, check))


def _observed(table: pd.DataFrame, check: Check) -> Any:
    """What the column held: its range if numeric, else its number of distinct values."""
    if check.kind == "row_count":
        return len(table)
    column = table[check.column]
    seen: dict[str, Any] = {"missing": int(column.isna().sum())}
    if pd.api.types.is_bool_dtype(column):
        seen["true"] = int(column.sum())
    elif pd.api.types.is_numeric_dtype(column):
        known = column.dropna()
        seen |= {"min": known.min() if len(known) else None, "max": known.max() if len(known) else None}
    else:
        seen["distinct"] = int(column.nunique())
    return plain(seen)


def _shorten(result: dict[str, Any], frame: Frame) -> None:
    """Keeps the first examples only, for the docs, and adds the ids to them: a page cannot show a million rows."""
    for key in ("unexpected_list", "unexpected_index_list", "partial_unexpected_index_list"):
        if key in result:
            result[key] = result[key][:_EXAMPLES]
    # A million positions in one text, and a query that our users' tools do not speak.
    result.pop("unexpected_index_query", None)
    if result.get("unexpected_index_list"):
        places = [
            {
                ROW: int(row),
                **{name: plain(frame.table[name].iloc[row]) for name in frame.keys},
                "id": str(frame.ids[row]),
            }
            for row in result["unexpected_index_list"]
        ]
        result["unexpected_index_list"] = result["partial_unexpected_index_list"] = places
        result["unexpected_index_column_names"] = list(dict.fromkeys([ROW, *frame.keys, "id"]))


# -- Data Docs ------------------------------------------------------------------------------------


def _build_docs(context: Any, docs: Path) -> None:
    docs = docs.absolute()
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
    }
    context.add_data_docs_site("local", site)
    context.build_data_docs(site_names=["local"])
    static = docs / "static"
    kept = {name: (static / name).read_bytes() for name in _ASSETS}
    shutil.rmtree(static)  # fonts and animations that no page refers to, four megabytes
    for name, content in kept.items():
        path = static / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for page in sorted(docs.rglob("*.html")):
        _settle(page, docs)


def _settle(page: Path, docs: Path) -> None:
    """Makes a page a function of its content: random element ids and times out, the logo from this folder."""
    text = page.read_text(encoding="utf-8")
    up = "../" * (len(page.relative_to(docs).parts) - 1)
    text = _LOGO.sub(f"{up}static/images/logo-long.png", text)
    text = _MOMENT.sub(lambda found: found[0] if found[0].startswith("20000101T") else "not recorded", text)
    text = _LOCAL_RUN_TIME.sub("not recorded", text)
    numbers: dict[str, str] = {}
    for found in _UUID.findall(text):
        numbers.setdefault(found, str(uuid.uuid5(uuid.NAMESPACE_OID, f"{page.name} {len(numbers)}")))
    text = _UUID.sub(lambda found: numbers[found[0]], text)
    page.write_text(text, encoding="utf-8")
