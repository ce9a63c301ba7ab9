"""The runner of suites: outcomes, verdict JSON, Data Docs; offline, without a home, the same bytes anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from springhead import expectations
from springhead.errors import Finding, SpringheadError
from springhead.jsonio import read_json
from springhead.lineage.digests import json_digest, tree_digest
from springhead.tables import read_table
from springhead.verdicts import ROW, Check, Frame, Verdict, plain, verdict

ROOT = Path(__file__).resolve().parents[1]
UP_TO_ONE = {"min_value": 0.0, "max_value": 1.0}
CHECKS = (
    Check("ExpectWidgetsInRange", "between", "size", "sizes lie in 0..1", UP_TO_ONE),
    Check("ExpectWidgetColours", "in_set", "colour", "colours are known", {"value_set": ["red", "blue"]}),
    Check("ExpectWidgetCodes", "matches", "code", "codes are three digits", {"regex": r"^\d{3}$"}, "warning"),
    Check("ExpectWidgetCodesGiven", "not_null", "code", "every widget has a code"),
    Check("ExpectWidgetFaultless", "null", "fault", "no widget has a fault"),
    Check("ExpectWidgetTested", "true", "tested", "every widget is tested"),
    Check("ExpectWidgetCodesUnique", "unique", "code", "no code occurs twice"),
    Check("ExpectWidgetCount", "row_count", "", "there are ten widgets or more", {"min_value": 10}),
)
# Which rows each expectation must name; row 5 is free of faults.
FAULTS = {
    "ExpectWidgetsInRange": [0, 1],
    "ExpectWidgetColours": [2],
    "ExpectWidgetCodes": [3],
    "ExpectWidgetCodesGiven": [4],
    "ExpectWidgetFaultless": [6],
    "ExpectWidgetTested": [7],
    "ExpectWidgetCodesUnique": [8, 9],
    "ExpectWidgetCount": [],
}


def widgets(good: bool) -> Frame:
    """Ten widgets in five boxes; each fault is in a row of its own."""
    table = pd.DataFrame(
        {
            ROW: np.arange(10),
            "size": np.linspace(0.0, 1.0, 10, dtype=np.float32),
            "colour": ["red", "blue"] * 5,
            "code": [f"{i:03d}" for i in range(10)],
            "fault": pd.Series([None] * 10, dtype=object),
            "tested": np.ones(10, dtype=bool),
        }
    )
    if not good:
        table.loc[[0, 1], "size"] = [-1.0, np.inf]
        table.loc[2, "colour"] = "green"
        table.loc[3, "code"] = "12"
        table.loc[4, "code"] = None
        table.loc[6, "fault"] = "a crack"
        table.loc[7, "tested"] = False
        table.loc[[8, 9], "code"] = "777"
    ids = [f"box-{i // 2}" for i in range(10)]
    frame = Frame("widgets", "widget", table, CHECKS, ids, ("colour",))
    if good:
        return frame
    rest = table.drop(index=5).reset_index(drop=True).assign(**{ROW: range(9)})
    return Frame("widgets", "widget", rest, CHECKS, ids[:5] + ids[6:])


def judged(frame: Frame, data: Path, out: Path) -> Verdict:
    """Judges one frame and writes the verdict."""
    found = verdict("widgets", [frame], expectations.judge("widgets", [frame], out / "data_docs"), data, 10)
    found.write(out, [frame])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "widgets.txt").write_text("ten widgets\n")
    return folder


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Verdict, Path]:
    out = tmp_path_factory.mktemp("red")
    return judged(widgets(good=False), data, out), out


def test_each_kind_goes_red_for_its_fault_alone(red: tuple[Verdict, Path]) -> None:
    found, _ = red
    kept = [i for i in range(10) if i != 5]
    named = {o.check.name: [kept[row] for row in o.rows] for o in found.outcomes}
    assert named == FAULTS
    assert not any(o.success for o in found.outcomes)


def test_sound_data_are_green(tmp_path: Path, data: Path) -> None:
    found = judged(widgets(good=True), data, tmp_path)
    assert [o.check.name for o in found.outcomes if not o.success] == []
    assert found.severity == "none"
    assert read_json(tmp_path / "verdict.json")["success"] is True
    assert read_table(tmp_path / "quarantine.parquet").num_rows == 0
    found.refuse("rl-validate@widgets")


def test_the_verdict_is_bound_to_data_and_suite(red: tuple[Verdict, Path], data: Path) -> None:
    written = read_json(red[1] / "verdict.json")
    assert written["data_digest"] == tree_digest(data)
    assert written["suite_digest"] == json_digest(read_json(red[1] / "suite.json"))
    assert (written["success"], written["severity"], written["rows"]) == (False, "critical", 10)
    entry = next(e for e in written["expectations"] if e["name"] == "ExpectWidgetsInRange")
    assert entry["unexpected_ids"] == ["box-0"]
    assert (entry["unexpected_count"], entry["unexpected_id_count"]) == (2, 1)
    assert entry["observed"]["max"] == "inf"
    assert written["quarantined"] == 5


def test_a_bound_changes_the_suite_digest(data: Path) -> None:
    frame = widgets(good=True)
    wider = Check("ExpectWidgetsInRange", "between", "size", "sizes lie in 0..1", {"min_value": 0.0, "max_value": 2.0})
    other = Frame("widgets", "widget", frame.table, (wider, *CHECKS[1:]), frame.ids)
    assert verdict("w", [frame], [], data, 10).suite_digest != verdict("w", [other], [], data, 10).suite_digest


def test_quarantine_names_ids_and_how_they_failed(red: tuple[Verdict, Path]) -> None:
    lines = read_table(red[1] / "quarantine.parquet").to_pylist()
    by_name = {line["expectation"]: line for line in lines}
    assert by_name["ExpectWidgetsInRange"]["detail"] == "2 widgets, the first at size=-1.0"
    assert by_name["ExpectWidgetFaultless"] == {
        "id": "box-3",
        "expectation": "ExpectWidgetFaultless",
        "severity": "critical",
        "detail": "fault=a crack",
    }


def test_a_critical_failure_names_ids_and_the_verdict(red: tuple[Verdict, Path]) -> None:
    with pytest.raises(Finding, match=r"ExpectWidgetFaultless.*box-3") as caught:
        red[0].refuse("rl-validate@widgets")
    assert "failed/rl-validate@widgets/" in str(caught.value)
    assert "ExpectWidgetCodes:" not in str(caught.value)  # that one is a warning


def test_warnings_do_not_refuse(data: Path, red: tuple[Verdict, Path]) -> None:
    only = tuple(o for o in red[0].outcomes if o.check.severity == "warning")
    found = Verdict("w", "", "", {}, 10, only)
    found.refuse("rl-validate@widgets")
    assert found.to_json()["severity"] == "warning"
    assert found.to_json()["success"] is True
    assert found.to_json()["quarantined"] == 1


def test_data_docs_are_whole_and_quote_the_ids(red: tuple[Verdict, Path]) -> None:
    docs = red[1] / "data_docs"
    pages = {path.relative_to(docs).as_posix(): path.read_text() for path in docs.rglob("*.html")}
    page = next(text for name, text in pages.items() if name.startswith("validations/"))
    assert "sizes lie in 0..1" in page
    assert "box-0" in page
    assert "widgets" in pages["index.html"]
    for name, text in pages.items():
        assert "amazonaws" not in text, name
        assert (docs / name).parent.joinpath("../" * name.count("/"), "static/images/logo-long.png").is_file()


def test_an_expectation_that_cannot_be_computed_is_an_error(tmp_path: Path) -> None:
    broken = Check("ExpectGhosts", "between", "ghost", "there is no such column", UP_TO_ONE)
    frame = Frame("widgets", "widget", widgets(good=True).table, (broken,), ["a"] * 10)
    with pytest.raises(SpringheadError, match=r"ExpectGhosts on widgets\.ghost could not be computed.*mend the suite"):
        expectations.judge("widgets", [frame], tmp_path / "docs")


def test_empty_frames_are_judged(tmp_path: Path) -> None:
    frame = widgets(good=True)
    empty = Frame("widgets", "widget", frame.table.iloc[:0], CHECKS, [])
    outcomes = expectations.judge("widgets", [empty], tmp_path / "docs")
    assert [o.check.name for o in outcomes if not o.success] == ["ExpectWidgetCount"]


def test_values_become_json() -> None:
    value = {"a": np.float32(0.1), "b": [np.int64(3), float("nan"), -np.inf], "c": np.bool_(True), "d": pd.NA}
    assert json.dumps(plain(value)) == '{"a": 0.100000001, "b": [3, null, "-inf"], "c": true, "d": null}'


@pytest.mark.fault
def test_same_bytes_offline_without_a_home(red: tuple[Verdict, Path], data: Path, tmp_path: Path) -> None:
    """A fresh interpreter with no network, no home folder and other hash seed, locale and time zone."""
    script = f"""
import socket
def refuse(*args, **kwargs):
    raise RuntimeError(f"network call: {{args}}")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
from pathlib import Path
from tests.test_expectations import judged, widgets
judged(widgets(good=False), Path({str(data)!r}), Path({str(tmp_path)!r}))
"""
    home = tmp_path.parent / "no-such-home"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not home.exists()
    assert tree_digest(tmp_path) == tree_digest(red[1])
