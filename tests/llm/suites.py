"""What the tests of the two suites of text rows do alike."""

from pathlib import Path
from typing import Any

from springhead import expectations
from springhead.llm.textrows import Row
from springhead.verdicts import Frame, Outcome

Rows = dict[str, list[Row]]
"""Rows by file."""


def places(rows: Rows) -> list[tuple[str, int, str]]:
    """File, position and id of every row that has an id."""
    return [(file, i, row["id"]) for file, found in rows.items() for i, row in enumerate(found) if "id" in row]


def by_name(suite: Any, found: list[Frame], docs: Path) -> dict[str, Outcome]:
    """The outcome of each of a suite's expectations."""
    return {outcome.check.name: outcome for outcome in expectations.judge(suite, found, docs)}


def check_names(red: Any, name: str, faults: Any, extra: dict[str, list[str]]) -> None:
    """An expectation is red for the rows whose faults it is for, and for no other row."""
    outcomes, names = red
    wanted = [names[fault] for fault, (_, named) in faults.items() if name in named]
    wanted += [names[fault] for fault in extra.get(name, [])]
    assert not outcomes[name].success
    assert sorted(outcomes[name].ids()) == sorted(set(wanted))
