"""The table of docs/guide/faults.md: every fault has tests, and every test exists and is found by name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = [f"F{number}" for number in range(1, 41)]


def rows() -> dict[str, list[str]]:
    """Returns the test nodes of each fault of the table."""
    text = (ROOT / "docs/guide/faults.md").read_text()
    lines = [line.split("|") for line in text.splitlines() if re.match(r"\| F\d+ \|", line)]
    return {cells[1].strip(): re.findall(r"`(tests/[\w/]+\.py::\w+)`", cells[4]) for cells in lines}


def named_in(path: Path) -> dict[str, set[str]]:
    """Returns the tests of a file, each with the faults that its marks name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [
                m for m in node.decorator_list if isinstance(m, ast.Call) and ast.unparse(m.func).endswith("mark.fault")
            ]
            found[node.name] = {str(ast.literal_eval(argument)) for mark in marks for argument in mark.args}
    return found


@pytest.mark.unit
def test_every_fault_has_a_row_and_every_test_of_it_exists() -> None:
    table = rows()
    assert list(table) == FAULTS
    for fault, nodes in table.items():
        assert nodes, fault
        for node in nodes:
            file, _, name = node.partition("::")
            assert (ROOT / file).is_file(), node
            assert name in named_in(ROOT / file), node


@pytest.mark.unit
def test_every_test_that_names_a_fault_is_in_the_table() -> None:
    table, marked = rows(), 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, faults in named_in(path).items():
            for fault in faults:
                marked += 1
                if name != "test_the_bomb_works":  # the control of F14: without the guard the fault does strike
                    assert f"{path.relative_to(ROOT).as_posix()}::{name}" in table[fault], (fault, name)
    assert marked > 15
