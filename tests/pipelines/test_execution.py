"""Processes in groups that die with the run, and locks that die with their holder."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.execution import Executor, Processes, lines, locked
from springhead.errors import BadInput

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_that(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_a_stage_gets_the_state_folder_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    executor = Executor(Path("state"), "r1", "flow", {}, print)
    assert executor.environment(tmp_path / "worktree", None)["SPRINGHEAD_HOME"] == str(tmp_path / "state")


def test_output_comes_line_by_line_with_the_exit_status(tmp_path: Path) -> None:
    seen: list[str] = []
    script = 'printf "one\\ntwo\\rthree\\n\\nno end" ; echo to-stderr >&2; exit 3'
    assert Processes().run(["/bin/sh", "-c", script], tmp_path, os.environ, seen.append) == 3
    assert seen == ["one", "two", "three", "no endto-stderr"]


def test_lines_survive_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "output").write_bytes(b"caf\xe9\n" + b"x" * 70000)
    with (tmp_path / "output").open("rb") as stream:
        assert list(lines(stream)) == ["caf�", "x" * 70000]


def test_stop_ends_children_and_grandchildren_and_starts_no_more(tmp_path: Path) -> None:
    processes, seen = Processes(), []
    command = ["/bin/sh", "-c", "sleep 300 & echo $!; wait"]
    thread = threading.Thread(target=processes.run, args=(command, tmp_path, os.environ, seen.append))
    thread.start()
    await_that(lambda: seen)
    processes.stop()
    thread.join(30)
    assert not thread.is_alive()
    await_that(lambda: not alive(int(seen[0])))
    with pytest.raises(BadInput, match="being stopped"):
        processes.run(command, tmp_path, os.environ, seen.append)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    processes, seen, status = Processes(), [], []
    command = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
    run = lambda: status.append(processes.run(command, tmp_path, os.environ, seen.append))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    await_that(lambda: seen)
    processes.stop()
    thread.join(30)
    assert status == [-signal.SIGKILL]


@pytest.mark.fault
def test_kill_9_of_the_runner_kills_what_it_runs(tmp_path: Path) -> None:
    script = """
import os, pathlib, sys
from pipelines.execution import Processes
Processes().run(["/bin/sh", "-c", "sleep 300 & echo $!; wait"], pathlib.Path("."), os.environ,
                lambda line: pathlib.Path("pid").write_text(line))
"""
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid = tmp_path / "pid"
    await_that(lambda: pid.exists() and pid.read_text())
    child = int(pid.read_text())
    assert alive(child)
    runner.kill()
    runner.wait()
    await_that(lambda: not alive(child))


def test_a_lock_is_held_by_one_and_waited_for(tmp_path: Path) -> None:
    path, order = tmp_path / "locks" / "a", []
    second_waits = threading.Event()

    def second() -> None:
        with locked(path, second_waits.set):
            order.append("second")

    with locked(path, lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        assert second_waits.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
