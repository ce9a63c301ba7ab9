"""Executes one stage in a worktree: ``dvc repro --single-item`` in a process group of its own.

Whatever kills the flow kills the stage too. An ordinary end, Ctrl-C and SIGTERM are handled by
:meth:`Processes.stop`; against ``kill -9`` every group has a guard, a shell that waits on a pipe
held by this process: when the pipe closes, it kills the group.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

from pipelines.graph import Node
from pipelines.worktrees import clean_environment, merge_lock, read_lock, write_lock
from springhead.errors import BadInput, Finding

State = Literal["executed", "cached", "up to date", "failed", "skipped"]
_GRACE = 5.0  # seconds between asking a group to end and killing it
_TAIL = 25  # lines of output kept for the error message
# DVC's advice is about its own checkout, which here is a worktree that will be gone.
_ADVICE = (
    "Updating lock file",
    "Generating lock file",
    "To track the changes",
    "\tgit add",
    "\tdvc config core.autostage",
    "To enable auto",
    "Use `dvc push`",
)
# `dvc checkout` of what the stage reads, then `dvc repro` of it, in one process: starting DVC
# costs more than either.
_DVC = """
import sys
from dvc.cli import main
stage, *upstream = sys.argv[1:]
failed = upstream and main(["checkout", "--quiet", "--force", *upstream])
sys.exit(failed or main(["repro", "--single-item", stage]))
"""
_GUARD = 'read _; kill -s KILL -- "-$1"'


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    stage: str
    state: State
    seconds: float = 0.0
    error: str = ""
    """The last lines of its output, if it failed; why it was skipped, if it was."""
    entry: Mapping[str, Any] | None = None
    """Its entry in ``dvc.lock``."""


class StageFailed(Finding):
    """A stage exited with an error; carries the outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"stage {outcome.stage} failed:\n{outcome.error}")
        self.outcome = outcome


@dataclass
class Processes:
    """The process groups that are running, so that they can be ended together."""

    _groups: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def run(self, command: Sequence[str], folder: Path, env: Mapping[str, str], sink: Callable[[str], None]) -> int:
        """Runs a command, hands each line of its output to ``sink`` and returns its exit status."""
        with self._lock:
            if self.stopped:
                raise BadInput("the run is being stopped")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", str(process.pid)], stdin=subprocess.PIPE, process_group=0
            )
            self._groups.add(process.pid)
        assert process.stdout is not None
        assert guard.stdin is not None
        try:
            for line in lines(process.stdout):
                sink(line)
            return process.wait()
        finally:
            with self._lock:
                self._groups.discard(process.pid)
            guard.kill()  # before its pipe closes: the group's number may soon belong to another
            guard.wait()
            guard.stdin.close()
            process.stdout.close()

    def stop(self) -> None:
        """Ends all groups, first kindly, and lets no new one start."""
        with self._lock:
            self.stopped = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self._lock:
                groups = list(self._groups)
            for group in groups:
                try:
                    os.killpg(group, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + _GRACE
            while self._groups and time.monotonic() < deadline:
                time.sleep(0.05)


def lines(stream: IO[bytes]) -> Iterator[str]:
    """Yields the lines of a stream as they come; a carriage return ends a line as well."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
        yield from (line.decode(errors="replace").rstrip() for line in whole if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace").rstrip()


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds an exclusive lock, which the kernel frees if this process dies.

    Args:
        path: the lock file, made if needed.
        on_wait: called once if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class Executor:
    """What all stages of one run share: locks, results so far, environment and output."""

    home: Path
    run: str
    flow_run: str
    base: dict[str, Any]
    """``dvc.lock`` of the snapshot."""
    say: Callable[[str], None]
    """Takes the lines for the terminal."""
    processes: Processes = field(default_factory=Processes)
    entries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Lock entries of the stages that have ended well."""
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Where the run keeps its logs and small results."""
        return self.home / "runs" / self.run

    def lock(self) -> dict[str, Any]:
        """Returns ``dvc.lock`` as it is after the stages that have ended."""
        return merge_lock(self.base, dict(self.entries))

    def environment(self, place: Path, gpu: str | None) -> dict[str, str]:
        """Returns the environment in which DVC and the stage run."""
        extra = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            # The snapshot's code first, not that of an editable install.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "SPRINGHEAD_HOME": str(self.home.absolute()),  # the stage works in another folder
            "SPRINGHEAD_FLOW_RUN": self.flow_run,
            "SPRINGHEAD_TRACKING": "spool",  # the run sends everything to MLflow once, at its end
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.home / "worktrees" / self.run / "site"),
            "DO_NOT_TRACK": "1",
        }
        if gpu is not None:
            extra["CUDA_VISIBLE_DEVICES"] = gpu
        return clean_environment(extra)

    def execute(self, node: Node, place: Path, log: Callable[[str], None], gpu: str | None = None) -> Outcome:
        """Brings one stage up to date in a worktree that nobody else uses meanwhile.

        Args:
            node: a stage whose upstream stages are all up to date in :meth:`lock`.
            place: the root of the worktree.
            log: takes each line of output (Prefect's log).
            gpu: value for ``CUDA_VISIBLE_DEVICES``; None leaves it alone.

        Raises:
            StageFailed: if the stage's command fails.
        """
        started = time.monotonic()
        record = Recorder(self, node.name, log)
        wait = f"{node.name}: waiting for another run that is executing this stage"
        with record, locked(self.home / "locks" / node.name.replace("/", "_"), lambda: self.say(wait)):
            env = self.environment(place, gpu)
            write_lock(place, self.lock())
            self.fetch_uncached(place)
            command = [sys.executable, "-c", _DVC, node.name, *node.upstream]
            status = self.processes.run(command, place, env, record.line)
            seconds = time.monotonic() - started
            entry = read_lock(place).get("stages", {}).get(node.name)
        if status != 0 or entry is None:
            why = "\n".join(record.tail) or f"dvc repro exited with status {status} and said nothing"
            raise StageFailed(Outcome(node.name, "failed", seconds, why))
        self._keep_uncached(node, place)
        with self._writing:
            self.entries[node.name] = entry
            write_lock(self.folder, self.lock())
        return Outcome(node.name, record.state, seconds, entry=entry)

    def _keep_uncached(self, node: Node, place: Path) -> None:
        """Copies outputs that DVC does not cache to the run's folder, for the other worktrees."""
        for name in node.uncached:
            _copy(place / name, self.folder / "files" / name)

    def fetch_uncached(self, place: Path) -> None:
        """Copies the outputs that DVC does not cache from the run's folder to a checkout."""
        files = self.folder / "files"
        for source in sorted(p for p in files.rglob("*") if p.is_file()):
            _copy(source, place / source.relative_to(files))


class Recorder:
    """Receives a stage's output: to the terminal with a prefix, to Prefect's log and to a file."""

    def __init__(self, executor: Executor, stage: str, log: Callable[[str], None]) -> None:
        self.stage = stage
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.state: State = "up to date"
        self._say, self._log = executor.say, log
        self._path = executor.folder / "logs" / f"{stage.replace('/', '_')}.log"

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def silently(self, line: str) -> None:
        """Takes a line that only the file shows."""
        self._file.write(line + "\n")

    def line(self, line: str) -> None:
        """Takes a line of ``dvc repro``, noting what DVC says it does."""
        self.silently(line)
        if line == f"Running stage '{self.stage}':":
            self.state = "executed"
        elif line.startswith(f"Stage '{self.stage}' is cached"):
            self.state = "cached"
        if line.startswith(_ADVICE):
            return
        self.tail.append(line)
        self._say(f"[{self.stage}] {line}")
        self._log(line)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
