"""Episodes in worker processes: for training, collection and evaluation alike.

The unit of work is a group: a policy and the reset seeds of a few whole episodes. A worker gets both, steps the
episodes together with the policy inside its own process, and sends the finished episodes back, so that nothing
crosses between processes at a step; a group's episodes are some hundred kilobytes that go through a pipe once. A
group's result depends on the group alone (``EpisodeRunner``), hence neither on the number of processes nor on which
of them runs it, and a group whose worker died can simply be run again.

Workers are fresh interpreters, not forks, which would copy a physics server and thread pools in mid-flight. They
import what their task and policy need and not the program that started them. They end when the connection to their
parent ends, whatever ended it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from pickle import PicklingError
from typing import Any

from springhead.errors import BadInput, SpringheadError
from springhead.rl.dataset import Episode
from springhead.rl.envs import SimulatorFault
from springhead.rl.groups import Group, named, run_group

__all__ = ["EpisodeWorkers", "Group", "SimulatorFault", "WorkerDied"]

RETRIES = 2
"""How often a group is run again after its worker died."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from springhead.rl.groups import serve; serve(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
)
_SILENCE = "SPRINGHEAD_WORKER_SILENCE"
_log = logging.getLogger(__name__)


class WorkerDied(SpringheadError):
    """A group ended its worker process each time that it was run, or a worker process made no step for too long."""


class EpisodeWorkers:
    """Runs groups of episodes in several processes. A context manager; workers start when there is work for them.

    Args:
        task_name: A task of the catalogue.
        num_envs: Environments per process, stepped together; a policy always acts for so many rows.
        processes: Worker processes. 0 and 1 run everything in this process. The results are the same bytes.
        silence: Seconds without a step after which a worker process counts as hung: more than its imports, the resets
            of ``num_envs`` environments and one step of each take on a busy machine. ``SPRINGHEAD_WORKER_SILENCE``
            if left out, 900 without that.

    Attributes:
        deaths: One line for each worker that died, naming task and seeds.
    """

    def __init__(self, task_name: str, num_envs: int, processes: int = 1, silence: float | None = None) -> None:
        if processes < 0:
            raise BadInput(f"processes is {processes}; use 0 or 1 for this process alone, or more for workers")
        self.silence = _silence_limit() if silence is None else silence
        self.task_name = task_name
        self.num_envs = num_envs
        self.processes = processes
        self.deaths: list[str] = []
        self._workers: list[_Worker] = []
        self._running = False
        self._finalizer = weakref.finalize(self, _end_all, self._workers)  # also when the interpreter exits

    def __enter__(self) -> EpisodeWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. They start again if there is more work."""
        _end_all(self._workers)

    def run(self, groups: Iterable[Group]) -> Iterator[list[Episode]]:
        """Runs groups and yields their episodes in the order of the groups.

        Groups are taken from ``groups`` a few ahead of what was yielded. An error of a group is raised when it is
        its turn: all groups before it have been yielded.

        Args:
            groups: The groups.

        Yields:
            For each group one episode per seed, in order.

        Raises:
            SimulatorFault: If a simulator fails, or an observation, reward or cost is not finite; names task, seed,
                step and array.
            WorkerDied: If a group's worker died three times, or hung once; names task, seeds and how it ended.
            BadInput: If a policy cannot be sent to a worker, acts by numbers that are not finite, or has no episode
                in its group or more than ``num_envs``.
        """
        if self._running:
            raise RuntimeError("EpisodeWorkers.run is under way; finish or close its iterator before another begins")
        self._running = True
        try:
            if self.processes > 1:
                yield from _Schedule(self, groups).results()
            else:
                for group in groups:
                    with _one_torch_thread():
                        episodes = run_group(self.task_name, self.num_envs, copy.deepcopy(group))
                    yield episodes
        finally:
            self._running = False
            # A worker that still computes for an abandoned iterator must not answer the next one.
            abandoned = [worker for worker in self._workers if worker.assigned]
            for worker in abandoned:
                self._workers.remove(worker)
            _end_all(abandoned)

    def _start(self) -> _Worker:
        worker = _Worker(self.task_name, self.num_envs)
        self._workers.append(worker)
        return worker

    def _bury(self, worker: _Worker) -> str:
        """Takes a dead worker out and returns how it ended."""
        self._workers.remove(worker)
        return worker.end()


@dataclass
class _Assignment:
    """A group on its way: its number, and how often it ended its worker."""

    index: int
    group: Group
    deaths: int = 0


class _Worker:
    """A worker process, seen from its parent."""

    def __init__(self, task_name: str, num_envs: int) -> None:
        self.assigned: deque[_Assignment] = deque()  # the first is being run
        self.heard = 0.0  # when it last said something, or was given its first group
        self.connection, theirs = Pipe()
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), task_name, str(num_envs)]
        environment = {**os.environ, **_ONE_THREAD}
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )

    def send(self, assignment: _Assignment) -> None:
        """Hands a group over; if the worker is dead, that shows at the next :meth:`receive`.

        Raises:
            BadInput: If its policy cannot be sent.
        """
        policy = type(assignment.group.policy)
        if policy.__module__ == "__main__":
            raise BadInput(
                f"policy {policy.__name__}: its class stands in the program that was started, which workers do not "
                "import; move it into a module"
            )
        if not self.assigned:
            self.heard = time.monotonic()
        self.assigned.append(assignment)
        try:
            self.connection.send(assignment.group)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except (PicklingError, AttributeError, TypeError) as error:
            name = policy.__name__
            raise BadInput(f"policy {name}: cannot be sent to a worker ({error}); make it picklable") from error

    def receive(self) -> list[Episode] | BaseException | None:
        """Returns the result of the first assigned group, or None for a sign that it is being run.

        Raises:
            EOFError: If the worker is dead.
        """
        try:
            result: list[Episode] | BaseException | None = self.connection.recv()
        except OSError as error:  # died while it sent
            raise EOFError from error
        self.heard = time.monotonic()
        if result is not None:
            self.assigned.popleft()
        return result

    def kill(self) -> None:
        """Tells the process to end, whatever it does."""
        self._process.kill()

    def end(self) -> str:
        """Waits until the process is gone, and returns how it ended."""
        self.connection.close()
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:  # it closed its end but lives on
            self._process.kill()
            code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    while workers:
        workers.pop().end()


@dataclass
class _Schedule:
    """One call of :meth:`EpisodeWorkers.run`: which groups wait, are under way, and are done."""

    pool: EpisodeWorkers
    groups: Iterable[Group]
    waiting: deque[_Assignment] = field(default_factory=deque)
    done: dict[int, list[Episode] | BaseException] = field(default_factory=dict)
    taken: int = 0
    yielded: int = 0

    def results(self) -> Iterator[list[Episode]]:
        source = iter(self.groups)
        while True:
            self._take(source)
            self._hand_out()
            if self.yielded in self.done:
                result = self.done.pop(self.yielded)
                self.yielded += 1
                if isinstance(result, BaseException):
                    raise result
                left = time.monotonic()
                yield result
                for worker in self.pool._workers:  # what they said meanwhile has not been heard
                    worker.heard += time.monotonic() - left
            elif self.yielded < self.taken:
                self._receive()
            else:
                return

    def _take(self, source: Iterator[Group]) -> None:
        """Takes groups until enough wait; never far ahead of what was yielded, for results take memory."""
        processes = self.pool.processes
        while len(self.waiting) < 2 * processes and self.taken - self.yielded < 4 * processes:
            group = next(source, None)
            if group is None:
                return
            self.waiting.append(_Assignment(self.taken, group))
            self.taken += 1

    def _hand_out(self) -> None:
        """Gives every worker a group, and a second one to go on with while there are plenty.

        The last groups are held back until a worker is free: which one that will be is not known before.
        """
        workers = self.pool._workers
        while self.waiting:
            idle = next((worker for worker in workers if not worker.assigned), None)
            if idle is None and len(workers) < self.pool.processes:
                idle = self.pool._start()
            if idle is None and len(self.waiting) > self.pool.processes:
                idle = next((worker for worker in workers if len(worker.assigned) == 1), None)
            if idle is None:
                return
            idle.send(self.waiting.popleft())

    def _receive(self) -> None:
        """Waits for a worker, and takes what it has to say: a result, that it is at work, or that it is dead."""
        at_work = [worker for worker in self.pool._workers if worker.assigned]
        patience = min(worker.heard for worker in at_work) + self.pool.silence - time.monotonic()
        ready = wait([worker.connection for worker in at_work], max(patience, 0.0))
        for worker in at_work:
            if worker.connection in ready:
                index = worker.assigned[0].index
                try:
                    result = worker.receive()
                except EOFError:
                    self._again(worker)
                else:
                    if result is not None:
                        self.done[index] = result
            elif time.monotonic() - worker.heard > self.pool.silence:
                self._hung(worker)

    def _hung(self, worker: _Worker) -> None:
        """Ends a worker that makes no step. Its group is not run again: it would hang once more, and as long."""
        worker.kill()
        self.pool._bury(worker)
        suspect = worker.assigned.popleft()
        name = named(self.pool.task_name, suspect.group.seeds)
        how = f"the worker process made no step for {self.pool.silence:g} s"
        self.pool.deaths.append(f"{name}: {how} and was ended")
        self.done[suspect.index] = WorkerDied(
            f"{name}: {how}; if this machine is only slow, raise SPRINGHEAD_WORKER_SILENCE (seconds), else run these "
            "seeds with processes=1 to see where the simulator hangs"
        )
        self.waiting.extendleft(reversed(worker.assigned))

    def _again(self, worker: _Worker) -> None:
        """Puts the groups of a dead worker back; the one that it was running may have been the cause."""
        how = self.pool._bury(worker)
        suspect = worker.assigned[0]
        suspect.deaths += 1
        name = named(self.pool.task_name, suspect.group.seeds)
        self.pool.deaths.append(f"{name}: the worker process died ({how})")
        if suspect.deaths > RETRIES:
            worker.assigned.popleft()
            self.done[suspect.index] = WorkerDied(
                f"{name}: the worker process died {suspect.deaths} times ({how}); if memory ran out, use fewer "
                "processes, else run these seeds with processes=1 to see the simulator's own message"
            )
        else:
            _log.warning("%s: the worker process died (%s); its episodes are run again", name, how)
        self.waiting.extendleft(reversed(worker.assigned))


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Computes as workers do: sums that torch splits over threads depend on the number of threads."""
    torch: Any = sys.modules.get("torch")
    if torch is None or torch.get_num_threads() == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silence_limit() -> float:
    """The seconds of ``SPRINGHEAD_WORKER_SILENCE``."""
    text = os.environ.get(_SILENCE, "900")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise BadInput(f"{_SILENCE} is {text!r}; use a number of seconds above 0, or unset it")
    return seconds
