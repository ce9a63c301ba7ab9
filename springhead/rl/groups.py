"""A group of episodes, run in this process, and the body of a worker process that runs groups for its parent."""

from __future__ import annotations

import math
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput, SpringheadError
from springhead.rl.dataset import Episode
from springhead.rl.envs import ActingPolicy, EpisodeRunner, SimulatorFault, discard

_SIGN = 1.0  # seconds between two signs of life


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


def named(task_name: str, seeds: Sequence[int]) -> str:
    """Names a group in messages."""
    return f"task {task_name}, seeds {', '.join(map(str, seeds))}"


def run_group(task_name: str, num_envs: int, group: Group, stepped: Callable[[], None] = lambda: None) -> list[Episode]:
    """Runs the episodes of a group.

    Args:
        task_name: A task of the catalogue.
        num_envs: Environments stepped together.
        group: What to run; its policy is used up.
        stepped: Called before every step.

    Returns:
        One episode per seed, in order.

    Raises:
        SimulatorFault: If the simulator fails, or a number that it returns is not finite.
        BadInput: If the policy acts by numbers that are not finite.
    """
    watched = _Watched(task_name, group, stepped)
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

    def __init__(self, task_name: str, group: Group, stepped: Callable[[], None]) -> None:
        self._task_name, self._group, self._stepped, self._step = task_name, group, stepped, 0

    def act(self, observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self._stepped()
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


# -- the body of a worker process ---------------------------------------------------------------------


def serve(descriptor: int, task_name: str, num_envs: int) -> None:
    """Runs groups until the parent is gone. The body of a worker process.

    While it steps it sends ``None`` about once a second, by which the parent tells work from a simulator that hangs.
    """
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

    def send(message: list[Episode] | Exception | None) -> None:
        try:
            connection.send(message)
        except OSError:
            os._exit(0)

    last = 0.0

    def stepped() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SIGN:
            last = now
            send(None)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    while True:
        send(_answer(task_name, num_envs, inbox.get(), stepped))


def _answer(
    task_name: str, num_envs: int, group: Group | Exception, stepped: Callable[[], None]
) -> list[Episode] | Exception:
    """Runs a group and returns its episodes, or the error that the parent is to raise."""
    seeds: tuple[int, ...] = ()
    try:
        if isinstance(group, Exception):
            raise group
        seeds = group.seeds
        return run_group(task_name, num_envs, group, stepped)
    except SpringheadError as error:
        return error.with_traceback(None)
    except Exception as error:
        # Anything else is a defect of the policy or the simulator, so its traceback is worth having; the error
        # itself may not survive pickling.
        text = "".join(traceback.format_exception(error))
        return RuntimeError(f"{named(task_name, seeds)}: {type(error).__name__} in a worker process\n{text}")
