"""The flight recorder of an execution: what MLflow shall know, first written to a local file.

A stage never talks to a tracking server, so an outage can neither fail nor slow it. It writes
one JSON line per event to ``<home>/spool/<execution>.jsonl.part``;
:func:`springhead.tracking.replay` pushes whole files to MLflow later, each exactly once.

A ``.part`` file is locked by the process that writes it. The kernel drops the lock when that
process dies, so an unlocked ``.part`` file is what a killed execution left behind, whatever
happened to its process id since.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from springhead.errors import BadInput
from springhead.jsonio import canonical

KINDS = frozenset({"start", "metric", "metrics", "dataset", "model", "end"})


def folder(home: Path) -> Path:
    """Returns the spool folder of a state folder."""
    return home / "spool"


def _writable(value: Any) -> Any:
    """Spells NaN and infinity as strings that ``float`` reads back, since JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    if hasattr(value, "item"):  # a NumPy or torch scalar
        return _writable(value.item())
    return value


class Spool:
    """Writes the events of one execution.

    Args:
        home: the state folder, see :func:`springhead.home.home`.
        execution: the id of the execution, 32 hexadecimal digits.
    """

    def __init__(self, home: Path, execution: str) -> None:
        self.path = folder(home) / f"{execution}.jsonl"
        self._part = self.path.with_name(self.path.name + ".part")
        self._file: IO[bytes] | None = None
        self.lost = 0  # events that could not be written, for example on a full disk

    def event(self, kind: str, /, **body: Any) -> None:
        """Appends one event; a disk that cannot take it is reported once and never raises.

        Args:
            kind: ``start`` {stage, attempt, params, tags, time}, ``metric`` {step, values, time},
                ``metrics`` {values, nested}, ``dataset`` {name, path, sha256, rows, role},
                ``model`` {path, sha256, kind, facts} or ``end`` {status, seconds, time}. Times are
                seconds since the epoch.
            **body: the facts of the event, JSON types or scalars that turn into them.

        Raises:
            BadInput: on an unknown kind or a value that JSON cannot hold.
        """
        if kind not in KINDS:
            raise BadInput(f"event kind {kind!r} is unknown; use one of {', '.join(sorted(KINDS))}")
        if kind == "start":
            body = {"pid": os.getpid(), "host": socket.gethostname(), **body}
        if kind == "end" and self.lost:
            body = {**body, "lost": self.lost}
        line = canonical({"event": kind, "body": _writable(body)}) + b"\n"
        try:
            file = self._file or self._open()
            file.write(line)
            file.flush()
        except OSError as error:
            if not self.lost:
                print(f"{self._part}: cannot record for MLflow ({error}); the stage goes on", file=sys.stderr)
            self.lost += 1

    def _open(self) -> IO[bytes]:
        self._part.parent.mkdir(parents=True, exist_ok=True)
        file = self._part.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        return file

    def close(self) -> None:
        """Makes the file durable and hands it over to the replay."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            os.fsync(file.fileno())
            os.replace(self._part, self.path)
        except OSError as error:
            print(f"{self._part}: cannot be closed ({error}); it counts as killed", file=sys.stderr)
        finally:
            file.close()


@dataclass(frozen=True)
class Recording:
    """The events of one execution as read back.

    Attributes:
        execution: its id.
        path: the file.
        events: (kind, body) in the order of writing; the first is ``start``.
        status: MLflow's run status: FINISHED, FAILED, or KILLED where the end is missing.
    """

    execution: str
    path: Path
    events: list[tuple[str, dict[str, Any]]]
    status: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Returns the bodies of all events of one kind."""
        return [body for name, body in self.events if name == kind]


def _alive(part: Path) -> bool:
    """Tells whether the writer of a ``.part`` file still holds its lock."""
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def waiting(home: Path) -> list[Path]:
    """Returns the files that can be replayed now, oldest first: whole ones and left-behind parts."""
    found = list(folder(home).glob("*.jsonl"))
    for part in folder(home).glob("*.jsonl.part"):
        with contextlib.suppress(FileNotFoundError):  # closed and renamed in this moment
            if not _alive(part):
                found.append(part)
    return sorted((path for path in found if path.exists()), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut off by a kill
        try:
            entry = json.loads(line)
            yield entry["event"], entry["body"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}:{number}: not an event ({error}); move the file away to go on") from error


def read(path: Path) -> Recording:
    """Reads the events of one execution.

    Raises:
        BadInput: naming file and line, if a line is damaged or the start is missing.
    """
    events = list(_lines(path))
    if not events or events[0][0] != "start":
        raise BadInput(f"{path}: holds no start event; move the file away to go on")
    end: dict[str, Any] = next((body for kind, body in reversed(events) if kind == "end"), {})
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(str(end.get("status", "killed")).lower(), "KILLED")
    return Recording(path.name.partition(".")[0], path, events, status)
