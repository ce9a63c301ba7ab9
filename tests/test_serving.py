"""`mlflow models serve` answers for a promoted policy, with nothing of ours but the installed package."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from springhead import registry, tracking
from tests.promotable import NAME, REPOSITORY, TASK, Checkout, with_store

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    made = Checkout(with_store(tmp_path_factory))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry.promote(NAME, made.root, made.home)
    return made


@pytest.fixture(scope="module")
def server(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri(checkout.home), "PYTHONPATH": str(REPOSITORY)}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(1800):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"the server did not come up: {(folder / 'log').read_text()}")
        yield address
    finally:
        os.killpg(process.pid, 9)  # the session that was started for this one server
        process.wait()


def ask(address: str, question: dict[str, Any]) -> tuple[int, Any]:
    """Returns status and answer."""
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_answers_arrays_and_tables_under_any_cost_limit(checkout: Checkout, server: str) -> None:
    from springhead.rl.policy import load_policy, predict

    policy = load_policy(checkout.root / f"data/rl/train/{TASK}/cdt/0/model")
    observations = np.random.default_rng(0).standard_normal((3, policy.observation_dim), dtype=np.float32)
    rows = observations.tolist()
    table = {"columns": [f"x{i}" for i in range(policy.observation_dim)], "data": rows}
    for limit in (10.0, 40.0):
        for question in ({"inputs": rows}, {"instances": rows}, {"dataframe_split": table}):
            status, answer = ask(server, {**question, "params": {"cost_limit": limit}})
            assert status == 200, answer
            expected = predict(policy, observations, limit)
            np.testing.assert_allclose(np.asarray(answer["predictions"], np.float32), expected, rtol=1e-6)


def test_the_default_is_the_limit_it_was_promoted_at(checkout: Checkout, server: str) -> None:
    from springhead.rl.policy import load_policy, predict

    policy = load_policy(checkout.root / f"data/rl/train/{TASK}/cdt/0/model")
    row = np.ones((1, policy.observation_dim), np.float32)
    _, answer = ask(server, {"inputs": row.tolist()})
    np.testing.assert_allclose(np.asarray(answer["predictions"], np.float32), predict(policy, row, 20.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "limit", "reason"),
    [([[0.0, 1.0]], 20.0, "shape"), ([[float("nan")] * 8], 20.0, "not finite"), ([[0.0] * 8], 1.0, "at least 10")],
)
def test_a_bad_question_gets_a_reason(server: str, rows: list[list[float]], limit: float, reason: str) -> None:
    status, answer = ask(server, {"inputs": rows, "params": {"cost_limit": limit}})
    assert status == 400
    assert reason in answer["message"]
