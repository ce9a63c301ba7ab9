"""The ledger: an append-only chain in which every change of the past is named."""

import multiprocessing
from pathlib import Path

import pytest

from springhead.lineage.ledger import GENESIS, Ledger


def _filled(tmp_path: Path, count: int = 5) -> Ledger:
    ledger = Ledger(tmp_path)
    for number in range(count):
        ledger.append("note", {"number": number})
    return ledger


@pytest.mark.unit
def test_entries_form_a_chain(tmp_path: Path) -> None:
    ledger = _filled(tmp_path)
    entries = ledger.entries()
    assert [e["seq"] for e in entries] == [0, 1, 2, 3, 4]
    assert entries[0]["prev"] == GENESIS
    assert ledger.verify() == []
    assert Ledger(tmp_path / "none").verify() == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines.__setitem__(1, lines[1].replace(b'"number":1', b'"number":9')), 3),
        (lambda lines: lines.pop(1), 2),
        (lambda lines: lines.insert(1, lines.pop(2)), 2),
        (lambda lines: lines.__setitem__(2, b"{}"), 3),
        (lambda lines: lines.__setitem__(2, b"[" * 100_000), 3),
        (lambda lines: lines.__setitem__(2, b'{"seq":' + b"9" * 5000 + b"}"), 3),
    ],
    ids=["edited", "removed", "reordered", "replaced", "nested", "long number"],
)
def test_a_changed_past_is_named_by_line(tmp_path: Path, change, line: int) -> None:  # type: ignore[no-untyped-def]
    ledger = _filled(tmp_path)
    lines = ledger.path.read_bytes().splitlines()
    change(lines)
    ledger.path.write_bytes(b"\n".join(lines) + b"\n")
    problems = ledger.verify()
    assert problems
    assert f"ledger.jsonl:{line}:" in problems[0]


@pytest.mark.fault
def test_a_torn_last_line_is_dropped_by_the_next_append(tmp_path: Path) -> None:
    ledger = _filled(tmp_path, 2)
    with ledger.path.open("ab") as file:
        file.write(b'{"seq":2,"prev":"ab')  # a kill in the middle of a write
    ledger.append("note", {"number": 2})
    assert [e["body"]["number"] for e in ledger.entries()] == [0, 1, 2]
    assert ledger.verify() == []


def _append_many(folder: Path, start: int) -> None:
    for number in range(20):
        Ledger(folder).append("note", {"number": start + number})


@pytest.mark.unit
def test_two_processes_append_to_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(tmp_path, start)) for start in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(Ledger(tmp_path).entries()) == 40
    assert Ledger(tmp_path).verify() == []
