"""The deployment of prefect.yaml: a server, a worker, one run by schedule and one by hand."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.conftest import Light, make_project

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds; everything here takes one minute on an idle machine
NAME = "springhead/nightly"


class Server:
    """A Prefect server of our own, asked through its HTTP interface."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.log = folder / "server.log"
        self.env = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": self.url}

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """Sends a request and returns the JSON of the answer.

        With 503 the server says that its SQLite file was just being written and that nothing of the request was done:
        Prefect's own client asks again, and so does this.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return bool(self.ask("/health"))
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def process(command: list[str], light: Light, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process, and ends it by its id."""
    with log.open("wb") as file:
        started = subprocess.Popen(command, cwd=light.root, env={**light.env, **env}, stdout=file, stderr=file)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def await_that(condition: Callable[[], Any], what: str, *logs: Path) -> Any:
    """Waits until the condition holds and returns its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            tails = "\n".join(f"== {log.name}\n{log.read_text()[-4000:]}" for log in logs)
            raise AssertionError(f"{what}: not within {PATIENCE:.0f} s\n{tails}")
        time.sleep(1)
    return value


@pytest.fixture
def deployed(tmp_path: Path) -> Light:
    """The light project with this repository's flow and deployment in it."""
    light = make_project(tmp_path / "light")
    shutil.copytree(
        ROOT / "pipelines",
        light.root / "pipelines",
        ignore=shutil.ignore_patterns("__pycache__", "profiles"),
        dirs_exist_ok=True,
    )
    shutil.copy(ROOT / "prefect.yaml", light.root)
    light.git("add", "-A")
    light.git("commit", "-qm", "deployment")
    return light


def test_runs_by_schedule_and_by_hand_equal_dvc_repro(deployed: Light, tmp_path: Path) -> None:
    light, server = deployed, Server(tmp_path)
    plain = Light(shutil.copytree(light.root, tmp_path / "plain"))
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    worker_log = tmp_path / "worker.log"
    serve = [*prefect, "server", "start", "--host", "127.0.0.1", "--port", str(server.port), "--no-ui"]
    work = [*prefect, "worker", "start", "--pool", "springhead", "--limit", "1"]
    soon = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_PREFETCH_SECONDS": "1"}
    with process(serve, light, server.env, server.log):
        await_that(server.healthy, "the server", server.log)
        light.run(*prefect, "work-pool", "create", "springhead", "--type", "process", **server.env)
        light.run(*prefect, "deploy", "--name", "nightly", **server.env)
        deployment = server.ask(f"/deployments/name/{NAME}")
        assert [s["schedule"]["cron"] for s in deployment["schedules"]] == ["30 2 * * *"]
        assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        assert str(tmp_path) not in (ROOT / "prefect.yaml").read_text()

        with process(work, light, {**server.env, **soon}, worker_log):
            _schedule_once(server, deployment)
            by_schedule = await_that(lambda: _ended(server, deployment, True), "the schedule", worker_log, server.log)
            assert by_schedule["state_type"] == "COMPLETED", worker_log.read_text()[-6000:]
            plain.run("dvc", "repro", "-q")
            assert light.read("dvc.lock") == plain.read("dvc.lock")

            light.write("source.txt", "by hand\n")
            plain.write("source.txt", "by hand\n")
            light.run(*prefect, "deployment", "run", NAME, **server.env)
            by_hand = await_that(lambda: _ended(server, deployment, False), "the run by hand", worker_log, server.log)
            assert by_hand["state_type"] == "COMPLETED", worker_log.read_text()[-6000:]
        plain.run("dvc", "repro", "-q")
        assert light.read("dvc.lock") == plain.read("dvc.lock")
        assert light.read("data/b/check.txt") == "BY HAND\n4"
        tasks = server.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [by_schedule["id"]]}}})
        assert sorted(t["name"] for t in tasks) == ["a-make@x", "a-make@y", "a-sum", "b-check", "b-read"]


def _schedule_once(server: Server, deployment: dict[str, Any]) -> None:
    """Puts a schedule that is due soon, and then not for a long time, in the place of the nightly one."""
    due = datetime.now(UTC) + timedelta(seconds=30)
    schedule = {"interval": 10 * 24 * 3600, "anchor_date": due.isoformat(), "timezone": "UTC"}
    server.ask(f"/deployments/{deployment['id']}/schedules", [{"schedule": schedule, "active": True}])
    for nightly in deployment["schedules"]:
        request = f"/deployments/{deployment['id']}/schedules/{nightly['id']}"
        server.ask(request, method="DELETE")


def _ended(server: Server, deployment: dict[str, Any], by_schedule: bool) -> dict[str, Any] | None:
    """Returns the newest run of a kind that has ended, if there is one."""
    runs = server.ask("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}})
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    found = [r for r in runs if r["auto_scheduled"] == by_schedule and r["state_type"] in final]
    return found[0] if found else None


@pytest.mark.unit
def test_the_deployment_names_no_place_and_no_secret() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert os.fspath(ROOT) not in text
    assert "{{ checkout.stdout }}" in text
