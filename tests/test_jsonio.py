"""JSON: what cannot be read or written is named, whatever is wrong with it."""

import math
from pathlib import Path

import pytest

from springhead.errors import BadInput
from springhead.jsonio import canonical, parse, read_json, read_jsonl, write_json

pytestmark = [pytest.mark.unit, pytest.mark.fault]
DEEP = "[" * 100_000
LONG = '{"a": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("text", ["{", "", DEEP, LONG], ids=["cut", "empty", "deep", "long number"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"x\.json: not valid JSON"):
        read_json(path)
    with pytest.raises(ValueError):  # of whatever kind, but no RecursionError
        parse(text)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": "\\ud83d"}', "surrogates not allowed"),
        ('{"a": "\\uD83D"}', "surrogates not allowed"),
        (DEEP, "recursion"),
        (LONG, "integer string"),
    ],
    ids=["nan", "infinity", "half", "HALF", "deep", "long number"],
)
def test_a_line_that_could_not_be_written_again_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n' + line + "\n")
    rows = read_jsonl(path)
    assert next(rows) == {"a": "\N{GRINNING FACE}"}
    with pytest.raises(BadInput, match=rf"x\.jsonl:2: not valid JSON .*{why}"):
        next(rows)


@pytest.mark.parametrize("value", [math.nan, "\ud83d", {1, 2}], ids=["nan", "half", "set"])
def test_what_is_no_json_is_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(BadInput, match="cannot be written as JSON"):
        canonical(value)
    with pytest.raises(BadInput, match=r"x\.json: cannot be written as JSON"):
        write_json(tmp_path / "x.json", value)
    assert not list(tmp_path.iterdir())
