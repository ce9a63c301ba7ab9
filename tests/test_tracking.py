"""Recordings reach MLflow exactly once, whatever happens to the server or the replay."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from springhead import spool, tracking
from springhead.lineage.ledger import Ledger
from springhead.spool import Spool
from tests.promotable import empty_store

SHA = "ab" * 32


def record(home: Path, execution: str, status: str | None = "FINISHED", flow: str = "", **start: Any) -> None:
    """Writes the recording of a small training run; ``status`` None leaves it without an end."""
    recorder = Spool(home, execution)
    body = {"stage": "rl-train@BallCircle-cdt-0", "attempt": 1, "time": 1000.0, **start}
    body |= {"params": {"seed": 0, "rl.train": {"lr": 0.1, "sizes": [4, 4], "note": "n" * 900}}}
    recorder.event("start", tags={"inputs": "i" * 64, "flow_run": flow}, **body)
    for step in range(5):
        recorder.event("metric", step=step, values={"loss": 1.0 / (step + 1), "bad": float("nan")}, time=1001.0 + step)
    recorder.event("dataset", name="BallCircle", path="data/rl/filter/BallCircle", sha256=SHA, rows=7, role="training")
    path = "data/rl/train/BallCircle/cdt/0/model"
    recorder.event("model", path=path, sha256=SHA, kind="policy", facts={"task": "BallCircle"})
    recorder.event("metrics", values={"limits": {"20": {"return": 0.5}}, "note": "text"}, time=1006.0)
    if status is not None:
        recorder.event("end", status=status, seconds=7.0, time=1007.0)
    recorder.close()


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return empty_store(tmp_path_factory)


@pytest.fixture
def home(tmp_path: Path, initialised: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes(initialised.read_bytes())
    return tmp_path


def contents(home: Path) -> dict[str, Any]:
    """Returns everything MLflow holds for the safe-RL branch, in comparable form."""
    client = tracking.connect(home)
    place = client.get_experiment_by_name("springhead-rl")
    assert place is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([place.experiment_id]):
        execution = run.data.tags.get(tracking.EXECUTION, "pipeline")
        assert execution not in found, "two runs for one execution"
        histories = {
            key: [(m.step, m.timestamp, str(m.value)) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        datasets = [
            (d.dataset.name, d.dataset.digest, {t.key: t.value for t in d.tags}) for d in run.inputs.dataset_inputs
        ]
        models = [client.get_logged_model(m.model_id) for m in run.outputs.model_outputs]
        found[execution] = {
            "params": run.data.params,
            "histories": histories,
            "datasets": datasets,
            "models": [(str(m.status), m.tags["model.sha256"], m.params) for m in models],
            "status": run.info.status,
            "end": run.info.end_time,
        }
    found["logged models"] = len(client.search_logged_models([place.experiment_id]))
    return found


def test_one_run_with_params_curves_data_sets_and_model(home: Path) -> None:
    record(home, "e1")
    Ledger(home).append(
        "execution",
        {"execution": "e1", "stage": "rl-train@x", "receipt": "r" * 64, "git": {"revision": "c0ffee", "dirty": True}},
    )
    report = tracking.replay(home)
    assert report.ok and report.replayed == ["e1"]
    run = contents(home)["e1"]
    assert run["params"]["rl.train.lr"] == "0.1" and run["params"]["rl.train.sizes"] == "[4,4]"
    assert len(run["params"]["rl.train.note"]) == 500
    assert [step for step, _, _ in run["histories"]["loss"]] == [0, 1, 2, 3, 4]
    assert run["histories"]["bad"][0][2] == "nan"
    assert run["histories"]["final/limits/20/return"] == [(0, 1006000, "0.5")]
    name, digest, tags = run["datasets"][0]
    assert (name, digest, tags["sha256"], tags["mlflow.data.context"]) == ("BallCircle", SHA[:36], SHA, "training")
    assert run["models"] == [("READY", SHA, {"task": "BallCircle"})]
    assert (run["status"], run["end"]) == ("FINISHED", 1007000)
    client = tracking.connect(home)
    place = client.get_experiment_by_name("springhead-rl")
    tags = client.search_runs([place.experiment_id])[0].data.tags
    assert tags["mlflow.source.git.commit"] == "c0ffee" and tags["springhead.receipt"] == "r" * 64


def test_where_git_failed_changes_are_unknown(home: Path) -> None:
    record(home, "e1")
    body = {"execution": "e1", "stage": "rl-train@x", "receipt": "r" * 64, "git": {"revision": "", "dirty": None}}
    Ledger(home).append("execution", body)
    assert tracking.replay(home).ok
    client = tracking.connect(home)
    place = client.get_experiment_by_name("springhead-rl")
    assert client.search_runs([place.experiment_id])[0].data.tags["git.dirty"] == "unknown"


def test_a_second_replay_adds_nothing(home: Path) -> None:
    record(home, "e1")
    tracking.replay(home)
    before = contents(home)
    kept = home / "spool" / "replayed" / "e1.jsonl"
    kept.rename(home / "spool" / "e1.jsonl")  # as if the kill came right before the file was put away
    assert tracking.replay(home).replayed == ["e1"]
    assert contents(home) == before
    assert kept.exists() and tracking.replay(home).replayed == []


def test_failed_and_killed_executions_have_their_status(home: Path) -> None:
    record(home, "failed", status="FAILED")
    record(home, "killed", status=None)
    assert tracking.replay(home).ok
    runs = contents(home)
    assert (runs["failed"]["status"], runs["killed"]["status"]) == ("FAILED", "KILLED")


def test_pipeline_runs_nest_and_the_last_attempt_counts(home: Path) -> None:
    record(home, "first", status="FAILED", flow="f1", time=1000.0)
    assert tracking.replay(home).ok
    assert contents(home)["pipeline"]["status"] == "FAILED"
    record(home, "second", flow="f1", attempt=2, time=1003.0)
    assert tracking.replay(home).ok
    runs = contents(home)
    assert runs["pipeline"]["status"] == "FINISHED" and set(runs) == {"first", "second", "pipeline", "logged models"}


class Flaky:
    """A client whose connection breaks when the n-th call has taken effect but not answered."""

    def __init__(self, client: Any, calls: int) -> None:
        self.client, self.left = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            result = method(*args, **kwargs)
            if self.left == 0:
                raise ConnectionError("connection reset before the answer")
            return result

        return call


@pytest.mark.fault
def test_a_connection_lost_at_any_call_changes_nothing(
    home: Path,
    initialised: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks the replay at each of its calls in turn; the outcome must equal the unbroken one.

    What a call that never arrived leaves is what the call before it left, so one kind of break is enough.
    """
    record(home, "e1", flow="f1")
    tracking.replay(home)
    expected = contents(home)
    real = tracking.connect
    for calls in range(1, 40):
        other = tmp_path_factory.mktemp("broken")
        (other / "mlflow.db").write_bytes(initialised.read_bytes())
        record(other, "e1", flow="f1")
        flaky = Flaky(real(other), calls)
        monkeypatch.setattr(tracking, "connect", lambda _home, flaky=flaky: flaky)
        broken = tracking.replay(other)
        monkeypatch.setattr(tracking, "connect", real)
        assert tracking.replay(other).ok
        assert contents(other) == expected, f"differs when call {calls} breaks"
        if broken.ok:
            assert calls > 10
            return
    pytest.fail("the replay never ran through")


def test_an_unreachable_server_is_reported_and_keeps_the_spool(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(home, "e1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{_free_port()}")
    report = tracking.replay(home)
    assert not report.ok and report.waiting == 1 and "cannot be reached" in report.problems[0]
    assert len(spool.waiting(home)) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "garbage://x")
    assert "MLflow at garbage://x cannot be reached" in tracking.replay(home).problems[0]


def test_a_damaged_recording_does_not_hold_up_the_others(home: Path) -> None:
    record(home, "e1")
    (home / "spool" / "e0.jsonl").write_text('{"event": "start"\nnonsense\n')
    report = tracking.replay(home)
    assert report.replayed == ["e1"] and report.waiting == 1 and "e0.jsonl:1" in report.problems[0]


@pytest.mark.fault
def test_a_spool_that_cannot_be_locked_is_reported(home: Path) -> None:
    record(home, "e1")
    (home / "spool" / "replay.lock").mkdir()
    report = tracking.replay(home)
    assert not report.ok
    assert "Is a directory" in report.problems[0]


def test_replays_at_the_same_time_do_not_double_runs(home: Path) -> None:
    for number in range(3):
        record(home, f"e{number}")
    with ThreadPoolExecutor(2) as pool:  # the lock belongs to the open file, so threads stand for processes
        reports = list(pool.map(tracking.replay, [home, home]))
    assert sorted(e for report in reports for e in report.replayed) == ["e0", "e1", "e2"]
    assert set(contents(home)) == {"e0", "e1", "e2", "logged models"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real MLflow server in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, _free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.home}/mlflow.db"]
        command += ["--artifacts-destination", str(self.home / "mlartifacts")]
        log = (self.home / "server.log").open("ab")
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        for _ in range(1800):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (self.home / "server.log").read_text()
            time.sleep(0.1)
        pytest.fail("the server did not come up")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)  # the group that start_new_session made for this one server
            self.process.wait()
            self.process = None


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    one = Server(home)
    yield one
    one.kill()


@pytest.mark.e2e
@pytest.mark.fault
def test_server_dies_in_the_middle_and_comes_back(home: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """F17: down at the start, killed in the middle of a replay, back again: every run exactly once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    for number in range(3):
        record(home, f"e{number}", flow="f1")
    assert tracking.replay(home).waiting == 3  # down at the start
    server.start()
    original = tracking._log_datasets
    pushed: list[str] = []

    def dies(client: Any, run_id: str, recording: Any) -> None:
        pushed.append(recording.execution)
        if len(pushed) == 2:
            server.kill()
        original(client, run_id, recording)

    monkeypatch.setattr(tracking, "_log_datasets", dies)
    report = tracking.replay(home)
    assert report.replayed == ["e0"] and report.waiting == 2
    monkeypatch.setattr(tracking, "_log_datasets", original)
    server.start()
    assert tracking.replay(home).replayed == ["e1", "e2"]
    found = contents(home)
    assert set(found) == {"e0", "e1", "e2", "pipeline", "logged models"} and found["logged models"] == 3
    assert json.dumps(found["e1"], sort_keys=True) == json.dumps(found["e0"], sort_keys=True)
