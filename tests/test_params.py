"""Parameters are read strictly: what is not understood is an error that names the key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from springhead.errors import BadInput
from springhead.params import load, lookup, overlay, read_params


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
