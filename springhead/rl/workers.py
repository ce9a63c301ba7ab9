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
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pickle import PicklingError
from typing import Any

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput, SpringheadError
from springhead.rl.dataset import Episode
from springhead.rl.envs import ActingPolicy, EpisodeRunner, SimulatorFault, discard

__all__ = ["EpisodeWorkers", "Group", "SimulatorFault", "WorkerDied"]

RETRIES = 2
"""How often a group is run again after its worker died."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from springhead.rl.workers import serve; serve(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
)
_log = logging.getLogger(__name__)


class WorkerDied(SpringheadError):
    """A group ended its worker process each time that it was run."""


@dataclass(frozen=True)
class Group:
    """One unit of work: whole episodes stepped together. Its result depends on nothing else.

    Attributes:
        policy: Acts in all of them; picklable. Each group runs a copy of its own, so that what a policy remembers
            cannot pass from one group to another.
        seeds: Reset seeds, one per episode, at most ``num_envs``.
        cost_limit: The episode cost limit told to the policy.
    """

    policy: ActingPolicy
    seeds: tuple[int, ...]
    cost_limit: float


class EpisodeWorkers:
    """Runs groups of episodes in several processes. A context manager; workers start when there is work for them.

    Args:
        task_name: A task of the catalogue.
        num_envs: Environments per process, stepped together; a policy always acts for so many rows.
        processes: Worker processes. 0 and 1 run everything in this process. The results are the same bytes.

    Attributes:
        deaths: One line for each worker that died, naming task and seeds.
    """

    def __init__(self, task_name: str, num_envs: int, processes: int = 1) -> None:
        if processes < 0:
            raise BadInput(f"processes is {processes}; use 0 or 1 for this process alone, or more for workers")
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
            WorkerDied: If a group's worker died three times; names task, seeds and how it ended.
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
                        episodes = _run_group(self.task_name, self.num_envs, copy.deepcopy(group))
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
        self.assigned.append(assignment)
        try:
            self.connection.send(assignment.group)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except (PicklingError, AttributeError, TypeError) as error:
            name = policy.__name__
            raise BadInput(f"policy {name}: cannot be sent to a worker ({error}); make it picklable") from error

    def receive(self) -> list[Episode] | BaseException:
        """Returns the result of the first assigned group.

        Raises:
            EOFError: If the worker is dead.
        """
        try:
            result: list[Episode] | BaseException = self.connection.recv()
        except OSError as error:  # died while it sent
            raise EOFError from error
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
                yield result
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
        """Waits for a worker, and takes what it has to say: a result, or that it is dead."""
        at_work = [worker for worker in self.pool._workers if worker.assigned]
        ready = wait([worker.connection for worker in at_work])
        for worker in (worker for worker in at_work if worker.connection in ready):
            index = worker.assigned[0].index
            try:
                self.done[index] = worker.receive()
            except EOFError:
                self._again(worker)

    def _again(self, worker: _Worker) -> None:
        """Puts the groups of a dead worker back; the one that it was running may have been the cause."""
        how = self.pool._bury(worker)
        suspect = worker.assigned[0]
        suspect.deaths += 1
        name = _name(self.pool.task_name, suspect.group.seeds)
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


def _name(task_name: str, seeds: Sequence[int]) -> str:
    return f"task {task_name}, seeds {', '.join(map(str, seeds))}"


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


def _run_group(task_name: str, num_envs: int, group: Group) -> list[Episode]:
    watched = _Watched(task_name, group)
    runner = EpisodeRunner(task_name, num_envs)
    try:
        group.policy.reset(num_envs, group.cost_limit)
        episodes = runner.run(watched.act, group.seeds, group.policy.observe)
        for seed, episode in zip(group.seeds, episodes, strict=True):
            _check(task_name, seed, episode)
    except Exception:
        discard(task_name)  # the next group must not meet a broken simulator
        raise
    return episodes


class _Watched:
    """A group's policy that is shown finite observations only, and whose actions are looked at.

    What a simulator or a policy makes of a number that is not finite (an assertion, a crash, more of them) would hide
    where it came from. Costs about 2 us for all environments of a step.
    """

    def __init__(self, task_name: str, group: Group) -> None:
        self._task_name, self._group, self._step = task_name, group, 0

    def act(self, observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not math.isfinite(observations.sum()):  # only a sign of it: great numbers may also add up to infinity
            before = self._step - 1
            self._look(observations, max(before, 0), "observations" if before < 0 else "next_observations")
        actions = self._group.policy.act(observations)
        if not math.isfinite(actions.sum()):
            self._look(actions, self._step, "actions")
        self._step += 1
        return actions

    def _look(self, rows: npt.NDArray[np.float32], step: int, key: str) -> None:
        for seed, row in zip(self._group.seeds, rows, strict=False):
            bad = row[~np.isfinite(row)]
            if len(bad):
                raise _fault(self._task_name, seed, step, key, float(bad[0]))


def _check(task_name: str, seed: int, episode: Episode) -> None:
    """Looks for the first number of an episode that is not finite, among those that no policy was shown."""
    arrays = {
        "rewards": episode.rewards,
        "costs": episode.costs,
        "sub_costs": episode.sub_costs,
        "next_observations": episode.next_observations,
    }
    found: list[tuple[int, str, float]] = []
    for key, array in arrays.items():
        if array is not None and not np.isfinite(array).all():
            rows = array.reshape(len(array), -1)
            step = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            found.append((step, key, float(rows[step][~np.isfinite(rows[step])][0])))
    if found:
        raise _fault(task_name, seed, *min(found, key=lambda fault: fault[0]))


def _fault(task_name: str, seed: int, step: int, key: str, value: float) -> BadInput:
    where = f"task {task_name}, seed {seed}, step {step}"
    if key == "actions":
        return BadInput(f"{where}: the policy's action holds {value}; its weights have diverged, so train it again")
    return SimulatorFault(
        f"{where}: the simulator returned {value} in {key}; nothing of this group of episodes is kept. The episode is "
        "a function of its seed and the policy: leave out the seed, and report both to the simulator's authors"
    )


# -- the worker's side --------------------------------------------------------------------------------


def serve(descriptor: int, task_name: str, num_envs: int) -> None:
    """Runs groups until the parent is gone. The body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends us
    os.set_inheritable(descriptor, False)
    if "SPRINGHEAD_SEAL" in os.environ:  # as stages/__init__.py does for processes that import it
        from springhead.hermetic import inherit

        inherit()
    connection, inbox = Connection(descriptor), queue.SimpleQueue[Group | Exception]()

    def receive() -> None:
        # In a thread, which costs nothing while it waits, for two reasons: the parent never has to wait until a
        # group is done to hand over the next one, and the end of the parent ends a group in mid-flight.
        while True:
            try:
                inbox.put(connection.recv())
            except (EOFError, OSError):
                os._exit(0)
            except Exception as error:  # the policy cannot be made here
                inbox.put(error)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    while True:
        result = _answer(task_name, num_envs, inbox.get())
        try:
            connection.send(result)
        except OSError:
            os._exit(0)


def _answer(task_name: str, num_envs: int, group: Group | Exception) -> list[Episode] | Exception:
    """Runs a group and returns its episodes, or the error that the parent is to raise."""
    seeds: tuple[int, ...] = ()
    try:
        if isinstance(group, Exception):
            raise group
        seeds = group.seeds
        return _run_group(task_name, num_envs, group)
    except SpringheadError as error:
        return error.with_traceback(None)
    except Exception as error:
        # Anything else is a defect of the policy or the simulator, so its traceback is worth having; the error
        # itself may not survive pickling.
        text = "".join(traceback.format_exception(error))
        return RuntimeError(f"{_name(task_name, seeds)}: {type(error).__name__} in a worker process\n{text}")
