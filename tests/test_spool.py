"""What an execution records survives kills, full disks and odd values."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from springhead import spool
from springhead.errors import BadInput
from springhead.spool import Spool


def test_events_are_read_back_in_order(tmp_path: Path) -> None:
    recorder = Spool(tmp_path, "e1")
    recorder.event("start", stage="rl-train", time=1.0)
    recorder.event("metric", step=1, values={"loss": float("nan"), "rate": np.float32(0.5)}, time=2.0)
    recorder.event("end", status="FINISHED", seconds=1.0, time=2.0)
    assert spool.waiting(tmp_path) == []  # still being written
    recorder.close()
    (path,) = spool.waiting(tmp_path)
    recording = spool.read(path)
    assert (recording.execution, recording.status) == ("e1", "FINISHED")
    assert [kind for kind, _ in recording.events] == ["start", "metric", "end"]
    assert recording.of("start")[0]["pid"] == os.getpid()
    assert recording.of("metric")[0]["values"] == {"loss": "nan", "rate": 0.5}
    assert "NaN" not in path.read_text()


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"kind 'metrik'.*metric"):
        Spool(tmp_path, "e1").event("metrik", step=1)


@pytest.mark.fault
def test_a_killed_writer_leaves_a_recording_with_status_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from springhead.spool import Spool\n"
        "s = Spool(pathlib.Path(sys.argv[1]), 'e1'); s.event('start', stage='rl-train', time=1.0)\n"
        "s.event('metric', step=1, values={'loss': 1.0}, time=1.5); print('ready', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    assert spool.waiting(tmp_path) == []  # alive: not for the replay
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (path,) = spool.waiting(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"event":"metric","bo')  # the kill hit in the middle of a line
    recording = spool.read(path)
    assert recording.status == "KILLED" and len(recording.events) == 2


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e1.jsonl"
    path.write_text(json.dumps({"event": "start", "body": {}}) + "\nbroken\n")
    with pytest.raises(BadInput, match=r"e1\.jsonl:2"):
        spool.read(path)
    path.write_text("")
    with pytest.raises(BadInput, match="no start"):
        spool.read(path)


@pytest.mark.fault
def test_a_disk_that_takes_nothing_does_not_stop_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    recorder = Spool(tmp_path, "e1")
    recorder.event("start", stage="rl-train", time=1.0)
    recorder.event("end", status="FINISHED", seconds=1.0, time=2.0)
    recorder.close()
    assert recorder.lost == 2
    assert capsys.readouterr().err.count("the stage goes on") == 1
