"""The command and the Prefect flow: what a user sees, exit codes, and what Prefect records."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import run
from pipelines.execution import Outcome
from pipelines.finish import Conclusion, raise_if_red
from springhead.errors import Finding
from tests.pipelines.conftest import Light

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "pipelines.run")


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Prefect database for all flow runs here: making one takes 20 s."""
    return tmp_path_factory.mktemp("prefect")


@pytest.mark.unit
def test_help_needs_no_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--workers", "--profile", "--target", "--set", "--no-promote", "--wait"):
        assert option in text


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0"),
        (["--profile", "papr"], "known are quick, smoke"),
        (["--set", "a.row=3"], "did you mean 'rows'"),
        (["--target", "c-make"], "no stage 'c-make'"),
    ],
)
def test_mistakes_are_found_before_prefect_starts(
    light: Light,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(light.root)
    monkeypatch.setitem(sys.modules, "pipelines.flow", None)  # importing it would fail
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.unit
def test_outside_a_checkout_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main([]) == 2
    assert "no dvc.yaml" in capsys.readouterr().err


@pytest.mark.unit
def test_nothing_to_do_needs_no_prefect(
    built: Light, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built.root / "data")
    monkeypatch.setitem(sys.modules, "pipelines.flow", None)
    assert run.main([]) == 0
    assert "stages: 0 executed, 5 up to date" in capsys.readouterr().out


@pytest.mark.unit
def test_the_summary_counts_and_decides_the_exit_status() -> None:
    outcomes = {
        "a": Outcome("a", "executed", 61.0),
        "b": Outcome("b", "cached", 1.0),
        "c": Outcome("c", "up to date"),
    }
    conclusion = Conclusion(outcomes, 62.0, champions={"policy-x": "version 3"}, places={"report": "report/index.html"})
    text = "\n".join(conclusion.table())
    assert "stages: 1 executed, 1 cached, 1 up to date (1m02s)" in text
    assert "champion policy-x: version 3" in text
    assert "report/index.html" in text
    assert "| a | executed | 1m01s |" in conclusion.markdown()
    raise_if_red(conclusion)
    conclusion.closed["mend-y"] = "cost above limit"
    assert "gate closed for mend-y: cost above limit" in "\n".join(conclusion.table())
    with pytest.raises(Finding, match="not promoted: mend-y"):
        raise_if_red(conclusion)


def test_the_flow_runs_retries_and_fails_as_promised(light: Light, prefect_home: Path) -> None:
    light.write("source.txt", "bad\n")
    light.write("dvc.yaml", light.read("dvc.yaml").replace("{gpu: true}", "{gpu: true, retry: 1}"))
    failed = light.run(*COMMAND, check=False, PREFECT_HOME=str(prefect_home))
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "x b-read: failed" in failed.stdout
    assert "stages: 3 executed, 1 failed, 1 skipped, 0 up to date" in failed.stdout
    assert "row 7 is bad" in failed.stderr
    assert "Traceback" not in failed.stderr

    light.write("source.txt", "good\n")
    good = light.run(*COMMAND, "--workers", "2", PREFECT_HOME=str(prefect_home))
    assert "stages: 2 executed, 1 cached, 2 up to date" in good.stdout
    assert "[b-read] > python work.py read" in good.stdout
    assert light.read("data/b/check.txt") == "GOOD\n4"

    assert sorted(_states(prefect_home, "flow_run").values()) == ["COMPLETED", "FAILED"]
    assert sorted(_states(prefect_home, "task_run").values()) == ["COMPLETED"] * 6 + ["FAILED"]
    assert _column(prefect_home, "run_count", "task_run where state_type = 'FAILED'") == [2]


@pytest.mark.fault
def test_kill_9_of_a_run_leaves_nothing_running_and_the_next_run_works(light: Light, prefect_home: Path) -> None:
    shutil.rmtree(light.home, ignore_errors=True)
    light.write("params.yaml", light.read("params.yaml").replace("pause: 0", "pause: 120"))
    env = {**light.env, "PREFECT_HOME": str(prefect_home)}
    log = light.root.parent / "killed.log"
    with log.open("w") as file:
        killed = subprocess.Popen(COMMAND, cwd=light.root, env=env, stdout=file, stderr=file)
    deadline = time.monotonic() + 300
    while "> python work.py make" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        assert killed.poll() is None, log.read_text()
        time.sleep(0.2)
    marks = list((light.home / "runs").glob("*.flow"))
    assert len(marks) == 1
    flow_run = marks[0].read_text()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    while left := _running_in(light.root):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert not (light.root / "dvc.lock").exists()

    light.write("params.yaml", light.read("params.yaml").replace("pause: 120", "pause: 0"))
    again = light.run(*COMMAND, PREFECT_HOME=str(prefect_home))
    assert "stages: 5 executed, 0 up to date" in again.stdout
    assert _states(prefect_home, "flow_run")[flow_run] == "CRASHED"


def _column(prefect_home: Path, column: str, table: str) -> list[object]:
    """Reads a column of Prefect's database, which spares a server."""
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        return [row[0] for row in database.execute(f"select {column} from {table} order by id")]


def _states(prefect_home: Path, table: str) -> dict[object, object]:
    """Returns the state of each run by its id."""
    return dict(zip(_column(prefect_home, "id", table), _column(prefect_home, "state_type", table), strict=True))


def _running_in(root: Path) -> list[str]:
    """Returns the command lines of the processes whose working folder is below ``root``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve().is_relative_to(root):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found
