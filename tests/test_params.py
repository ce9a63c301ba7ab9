"""Parameters are read strictly: what is not understood is an error that names the key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from springhead.errors import BadInput
from springhead.params import from_command, keys_of, load, lookup, overlay, read_params, with_overrides


@dataclass(frozen=True)
class Inner:
    low: float
    high: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    sizes: tuple[int, ...]
    inner: Inner
    mode: Literal["a", "b"] = "a"
    limit: float | None = None
    rate: Literal["auto"] | float = "auto"
    pair: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes: needs at least one size")


GOOD = {"name": "x", "sizes": [1, 2], "inner": {"low": 1}}


@pytest.mark.unit
def test_values_are_converted_to_their_types() -> None:
    made = load(Outer, {**GOOD, "limit": 3, "pair": [4, 5]}, "p")
    assert made == Outer("x", (1, 2), Inner(1.0), "a", 3.0, pair=(4, 5))
    assert isinstance(made.inner.low, float)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, "p.nmae: unknown parameter; did you mean 'name'?"),
        ({"inner": {"low": 1, "hihg": 2}}, "p.inner.hihg: unknown parameter; did you mean 'high'?"),
        ({"inner": {}}, "p.inner.low: missing parameter"),
        ({"sizes": [1, "2"]}, "p.sizes[1]: expected int, found '2'"),
        ({"sizes": [True]}, "p.sizes[0]: expected int, found True"),
        ({"sizes": []}, "p: sizes: needs at least one size"),
        ({"mode": "c"}, "p.mode: 'c' is not one of 'a', 'b'"),
        ({"limit": "no"}, "p.limit: expected float"),
        ({"rate": "uato"}, "p.rate: 'uato' is not one of 'auto'; or p.rate: expected float, found 'uato' (str)"),
        ({"pair": [1]}, "p.pair: expected 2 items, found 1"),
        ({"inner": 3}, "p.inner: expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(Outer, {**GOOD, **change}, "p")
    assert message in str(caught.value)


@pytest.mark.unit
def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: 1e-6\nb: 1.0e-6\nc: 5e3\nd: e5\n")
    assert read_params(tmp_path / "p.yaml") == {"a": 1e-6, "b": 1e-6, "c": 5000.0, "d": "e5"}


@pytest.mark.unit
def test_a_missing_file_is_restored_where_it_is_the_checkouts_own(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"params\.yaml: no such file; restore it with `git checkout`"):
        read_params(tmp_path / "params.yaml")
    with pytest.raises(BadInput, match=r"mine\.yaml: no such file; check its name$"):
        read_params(tmp_path / "mine.yaml")


@pytest.mark.unit
def test_an_overlay_changes_leaves_and_refuses_unknown_keys() -> None:
    base = {"seed": 0, "rl": {"train": {"steps": 5, "lr": 1.0}}}
    assert overlay(base, {"rl": {"train": {"steps": 9}}}, "o")["rl"]["train"] == {"steps": 9, "lr": 1.0}
    assert base["rl"]["train"]["steps"] == 5  # type: ignore[index]
    assert overlay(base, {"rl": {"train": None}}, "o")["rl"] == {}
    with pytest.raises(BadInput, match=r"o.rl.train: unknown key 'step'; did you mean 'steps'"):
        overlay(base, {"rl": {"train": {"step": 9}}}, "o")


def test_an_overlay_may_add_where_a_block_holds_what_differs_from_defaults() -> None:
    base = {"rl": {"train": {"algorithms": {"bc": {"steps": 1}}, "tasks": {}}}}
    changes = {
        "rl": {"train": {"algorithms": {"bc": {"device": "cuda"}, "cpq": {"steps": 2}}, "tasks": {"A": {"bc": {}}}}}
    }
    merged = overlay(base, changes, "o.yaml")["rl"]["train"]
    assert merged == {
        "algorithms": {"bc": {"steps": 1, "device": "cuda"}, "cpq": {"steps": 2}},
        "tasks": {"A": {"bc": {}}},
    }
    with pytest.raises(BadInput, match=r"rl\.train: unknown key 'algorithm'"):
        overlay(base, {"rl": {"train": {"algorithm": {}}}}, "o.yaml")


@pytest.mark.unit
def test_a_missing_key_is_named_to_the_level_where_it_ends() -> None:
    with pytest.raises(BadInput, match=r"missing key 'rl\.train'"):
        lookup({"rl": {}}, "rl.train.steps", "params.yaml")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a folder; name a YAML file"),
        (b"a: \xe9", "not valid UTF-8 ("),
        (b"a: [", "not valid YAML: while parsing"),
        (b"a: 2020-13-45", "not valid YAML: month must be in 1..12"),
        (b"- a", "expected a mapping of parameters at the top level"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_params(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "expected key=value"),
        ("=1", "expected key=value"),
        ("a.b=1", "a is no block of settings"),
        ("a=[", "the value is not valid YAML (while parsing a flow node did not find"),
        ("a=2020-13-45", "the value is not valid YAML (month must be in 1..12)"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(override: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        with_overrides({"a": 3}, [override])
    assert str(caught.value).startswith(f"{override!r}: {message}")
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Listed:
    steps: int
    """How
    many."""
    bare: float = 0.5
    # No docstring.
    inner: Inner | None = None
    """What lies within."""
    mode: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()


@pytest.mark.unit
def test_a_command_reads_its_file_and_what_is_put_over_it_and_lists_its_keys(tmp_path: Path, capsys) -> None:
    (tmp_path / "p.yaml").write_text("steps: 3\nnames: [x]\n")
    given = [str(tmp_path / "p.yaml"), "inner.low=1e-3", "steps=4"]
    assert from_command(Listed, "some.module", "Does 5 % of it.", given) == Listed(4, 0.5, Inner(0.001), "a", ("x",))
    assert list(keys_of(Listed)) == [
        "  steps: whole number (needed)",
        "      How many.",
        "  bare: number = 0.5",
        "  inner: block or null = null",
        "      What lies within.",
        "  inner.low: number (needed)",
        "  inner.high: number = 1.0",
        '  mode: a, b = "a"',
        "  names: list of text = []",
    ]
    with pytest.raises(SystemExit, match="0"):
        from_command(Listed, "some.module", "Does 5 % of it.", ["--help"])
    said = capsys.readouterr().out
    assert "python -m some.module" in said
    assert "Does 5 % of it." in said
    assert "  inner.low: number (needed)\n" in said
    with pytest.raises(SystemExit, match="2"):
        from_command(Listed, "some.module", "", [])
