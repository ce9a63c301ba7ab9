"""A model folder behind the chat-completions interface, for clients and evaluation harnesses that speak it.

    python -m springhead.llm.chat_server MODEL_FOLDER [--host 127.0.0.1] [--port 8000] [--device auto]
    python -m springhead.llm.chat_server models:/mend-small-llama@champion     # checked against digest and signature

POST /v1/chat/completions and GET /v1/models. Requests that wait at the same time and decode alike are answered as one
batch. An answer depends on the request alone: the same messages, settings and `seed` give the same text. Meant for one
machine and its users: no encryption, no passwords, and so only the local host unless told otherwise.
"""

import argparse
import json
import math
import queue
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput, SpringheadError
from springhead.lineage.digests import json_digest, tree_digest
from springhead.llm import chat, students
from springhead.llm.generation import Answer, Decoding, answer, prompt_ids

_LONGEST_BODY = 4 * 2**20
_MOST_CHOICES = 64
_LAST_PORT = 65535


@dataclass(frozen=True)
class Question:
    """One choice of one request."""

    messages: Sequence[Mapping[str, Any]]
    decoding: Decoding
    key: str
    reply: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Answers questions in one thread of its own, those that wait and decode alike together."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int = 64) -> None:
        self.model, self.tokenizer, self.most = model, tokenizer, most
        self._waiting: queue.Queue[Question] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers, in order.

        Raises:
            BadInput: a question cannot be answered.
        """
        for question in questions:
            self._waiting.put(question)
        return [question.reply.result() for question in questions]

    def _work(self) -> None:
        left: list[Question] = []
        while True:
            waiting = left or [self._waiting.get()]
            while len(waiting) < 4 * self.most:
                try:
                    waiting.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            alike = [q for q in waiting if q.decoding == waiting[0].decoding][: self.most]
            left = [q for q in waiting if q not in alike]
            self._answer(alike)

    def _answer(self, questions: Sequence[Question]) -> None:
        try:
            asked = [question.messages for question in questions]
            keys = [question.key for question in questions]
            given = answer(self.model, self.tokenizer, asked, questions[0].decoding, keys=keys)
        except Exception as error:
            if len(questions) > 1:  # one bad question must not spoil its neighbours
                for question in questions:
                    self._answer([question])
                return
            questions[0].reply.set_exception(error)
            return
        for question, one in zip(questions, given, strict=True):
            question.reply.set_result(one)


def questions_of(body: Any) -> list[Question]:
    """The questions of a request body, one for each choice asked for.

    Raises:
        BadInput: naming the field that cannot be used.
    """
    if not isinstance(body, dict):
        raise BadInput("expected a JSON object")
    if body.get("stream"):
        raise BadInput("stream: not supported; ask without it")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput("messages: expected a list of at least one message")
    messages = chat.messages_of({"id": "messages", "messages": messages})
    choices = _number(body, "n", 1, int)
    if not 1 <= choices <= _MOST_CHOICES:
        raise BadInput(f"n: must be in 1..{_MOST_CHOICES}")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise BadInput("stop: expected a text or a list of texts")
    most = _number(body, "max_completion_tokens", _number(body, "max_tokens", 256, int), int)
    try:
        decoding = Decoding(
            max_new_tokens=most,
            temperature=_number(body, "temperature", 1.0, float),
            top_p=_number(body, "top_p", 1.0, float),
            top_k=_number(body, "top_k", 0, int),
            seed=_number(body, "seed", 0, int),
            stop=tuple(stop),
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    key = json_digest(messages)
    return [Question(messages, decoding, f"{key}/{number}") for number in range(choices)]


def _number(body: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not _usable(value) or (kind is int and int(value) != value):
        raise BadInput(f"{name}: expected {'a whole number' if kind is int else 'a number'}, found {value!r}")
    return abs(int(value)) if name == "seed" else kind(value)


def _usable(value: Any) -> bool:
    """Whether a JSON value is a finite number; Python's reader takes NaN and Infinity as well."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def completion(body: Any, batcher: Batcher, name: str) -> dict[str, Any]:
    """The answer to a chat-completions request.

    Raises:
        BadInput: the request cannot be answered.
    """
    questions = questions_of(body)
    prompt = len(prompt_ids(batcher.tokenizer, questions[0].messages))
    given = batcher.ask(questions)
    made = sum(len(one.ids) for one in given)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": one.text},
            "finish_reason": "length" if one.finish == "length" else "stop",
        }
        for index, one in enumerate(given)
    ]
    return {
        "id": f"chatcmpl-{questions[0].key[:24]}",
        "object": "chat.completion",
        "created": 0,  # a time would make two equal answers differ
        "model": name,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
    }


def server(folder: Path, host: str, port: int, device: students.Device) -> ThreadingHTTPServer:
    """A server that is bound but does not serve yet.

    Raises:
        BadInput: not a safe model folder, or the address cannot be used.
    """
    model, tokenizer = students.load_to_ask(folder, device)
    batcher, name = Batcher(model, tokenizer), f"{folder.name}-{tree_digest(folder)[:12]}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.rstrip("/") == "/v1/models":
                self._send(200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "springhead"}]})
            else:
                self._fail(404, f"{self.path}: not found; there are /v1/models and /v1/chat/completions")

        def do_POST(self) -> None:
            if self.path.rstrip("/") != "/v1/chat/completions":
                self._fail(404, f"{self.path}: not found; there are /v1/models and /v1/chat/completions")
                return
            given = self.headers.get("Content-Length") or "0"
            if not (given.isascii() and given.isdigit()):  # a negative one would read until the client hangs up
                self.close_connection = True
                self._fail(400, f"Content-Length {given!r} is no number of bytes")
                return
            length = int(given)
            if length > _LONGEST_BODY:
                self.close_connection = True
                self._fail(413, f"the request is longer than {_LONGEST_BODY} bytes")
                return
            try:
                self._send(200, completion(json.loads(self.rfile.read(length)), batcher, name))
            except (BadInput, ValueError) as error:
                self._fail(400, str(error))
            except Exception as error:  # the server outlives whatever a request does
                self._fail(500, f"{type(error).__name__}: {error}")

        def _fail(self, status: int, message: str) -> None:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            self._send(status, {"error": {"message": message, "type": kind}})

        def _send(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Requests are not logged: prompts are nobody's business."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:  # the second: no number of a port
        raise BadInput(
            f"cannot listen on host {host}, port {port} ({error}); choose another --host or --port"
        ) from error


@contextmanager
def found(name: str) -> Iterator[Path]:
    """The folder of a model: a folder as it is; a version or alias of the registry, downloaded and checked.

    Raises:
        BadInput: the registry has no such model.
        Finding: what it has is not what was signed at the promotion.
    """
    if not name.startswith("models:/"):
        yield Path(name)
        return
    from springhead import home, versions  # MLflow takes seconds, and a folder does not need it

    root = home.repository()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / name.removeprefix("models:/").partition("@")[0].partition("/")[0]
        yield versions.download(root, home.home(root), name, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, or models:/NAME@ALIAS")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for everyone (%(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes any that is free (%(default)s)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "auto"], default="auto", help="auto takes a GPU where there is one"
    )
    given = parser.parse_args(arguments)
    try:
        with found(given.model) as folder:
            made = server(folder, given.host, given.port, given.device)
    except SpringheadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"http://{given.host}:{made.server_address[1]}/v1", flush=True)
    try:
        made.serve_forever()
    except KeyboardInterrupt:
        made.server_close()
    return 0


def _port(text: str) -> int:
    """A port, refused here because the model may take minutes to load before it is used."""
    if not text.isdecimal() or int(text) > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use 0 to {_LAST_PORT}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
