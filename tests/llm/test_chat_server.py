import http.client
import json
import math
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from springhead import versions
from springhead.lineage.digests import tree_digest
from springhead.llm import chat_server, generation, students
from springhead.llm.generation import Decoding
from tests.llm.tiny import ROWS, save_tiny

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served") / "tiny", spread=0.6)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    made = chat_server.server(folder, "127.0.0.1", 0, "cpu")
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    made.server_close()
    thread.join()


def ask(address: str, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def question(number: int, **settings: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": ROWS[number]["prompt"]}], **settings}


def test_it_answers_as_the_generation_engine_does(folder: Path, address: str) -> None:
    model, tokenizer = students.load(folder)
    status, answer = ask(address, question(0, max_tokens=9, temperature=0))
    expected = generation.answer(model, tokenizer, [ROWS[0]["prompt"]], Decoding(9))[0]
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": expected.text}, "finish_reason": "length"}
    ]
    prompt = len(generation.prompt_ids(tokenizer, ROWS[0]["prompt"]))
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9}
    with urllib.request.urlopen(f"{address}/v1/models") as listed:
        assert json.load(listed)["data"][0]["id"] == answer["model"]


def test_the_same_request_has_the_same_answer_alone_and_in_company(address: str) -> None:
    asked = [question(k % 4, max_tokens=8, temperature=1.0, seed=k // 4, n=2) for k in range(12)]

    def texts(body: dict[str, Any]) -> list[str]:
        status, answer = ask(address, body)
        assert status == 200, answer
        return [choice["message"]["content"] for choice in answer["choices"]]

    alone = [texts(body) for body in asked]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(texts, asked)) == alone
    assert all(one != two for one, two in alone)
    assert alone[0] != alone[4]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "Expecting property name"),
        ([], "expected a JSON object"),
        ({"messages": []}, "messages: expected a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "has the role 'bot'"),
        (question(0, temperature="hot"), "temperature: expected a number"),
        (question(0, max_tokens=1.5), "max_tokens: expected a whole number"),
        (question(0, max_tokens=math.inf), "max_tokens: expected a whole number, found inf"),
        (question(0, temperature=math.nan), "temperature: expected a number, found nan"),
        (question(0, temperature=10**400), "temperature: expected a number, found 1000"),
        (question(0, max_tokens=0), "max_new_tokens and batch_rows must be at least 1"),
        (question(0, n=1000), "n: must be in 1..64"),
        (question(0, stop=3), "stop: expected a text"),
        (question(0, stream=True), "stream: not supported"),
        ({"messages": [{"role": "user", "content": "Ana " * 600}]}, "leave no room in the model's context of 512"),
    ],
)
def test_a_bad_request_gets_a_reason_and_the_server_goes_on(address: str, body: Any, reason: str) -> None:
    status, answer = ask(address, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert reason in answer["error"]["message"]
    assert ask(address, question(1, max_tokens=2))[0] == 200
    assert ask(address, {}, "/v1/completions")[0] == 404


def test_an_alias_of_the_registry_is_downloaded_checked_and_served(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, Path, str]] = []

    def download(root: Path, state: Path, ref: str, target: Path) -> Path:
        asked.append((root, state, ref))
        shutil.copytree(folder, target)
        return target

    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(versions, "download", download)
    with chat_server.found("models:/mend-tiny@champion") as got:
        made = chat_server.server(got, "127.0.0.1", 0, "cpu")
    # The folder is gone; the model is in memory, under the name of the registered model.
    assert asked == [(tmp_path, tmp_path / "state", "models:/mend-tiny@champion")]
    assert not got.exists()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    status, answer = ask(f"http://127.0.0.1:{made.server_address[1]}", question(0, max_tokens=3, temperature=0))
    made.shutdown()
    made.server_close()
    assert status == 200
    assert answer["model"] == f"mend-tiny-{tree_digest(folder)[:12]}"
    with chat_server.found(str(folder)) as got:
        assert got == folder


@pytest.mark.fault
def test_an_address_that_cannot_be_used_is_one_line(folder: Path, address: str, capsys) -> None:
    assert chat_server.main([str(folder), "--device", "cpu", "--port", address.rpartition(":")[2]]) == 2
    said = capsys.readouterr().err
    assert "error: cannot listen on host 127.0.0.1, port" in said
    assert said.count("\n") == 1
    for port in ("99999", "-1", "x"):
        with pytest.raises(SystemExit, match="2"):
            chat_server.main(["nowhere", "--port", port])
        assert f"{port!r} is no port; use 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["-5", "many", "²"])
def test_a_length_that_is_no_number_is_refused_at_once(address: str, length: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", length.encode("utf-8"))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 400
    assert "is no number of bytes" in json.load(answer)["error"]["message"]
    connection.close()
