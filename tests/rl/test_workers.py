"""Groups of episodes in processes: the same bytes from any number, and every fault found, named and survived."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from springhead.environment import alive
from springhead.errors import BadInput
from springhead.hermetic import Seal
from springhead.rl.dataset import EPISODE_KEYS, Episode
from springhead.rl.workers import EpisodeWorkers, Group, SimulatorFault, WorkerDied
from tests.rl.acting import Breaks, Dies, Diverged, Loaded, Raises, Reads, Sleeps, Wander

pytestmark = pytest.mark.unit


def work(number: int, first: int = 0) -> list[Group]:
    """Groups of one or two episodes each."""
    return [Group(Wander(k), tuple(range(10 * k, 10 * k + 1 + k % 2)), 10.0 + k) for k in range(first, first + number)]


def same(found: list[list[Episode]], expected: list[list[Episode]]) -> None:
    assert [len(group) for group in found] == [len(group) for group in expected]
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        for key in EPISODE_KEYS:
            assert getattr(a, key).dtype == getattr(b, key).dtype
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


@pytest.fixture(scope="module")
def expected() -> list[list[Episode]]:
    """Seven groups, in this process."""
    with EpisodeWorkers("BallCircle", 2) as workers:
        return list(workers.run(work(7)))


@pytest.mark.parametrize("processes", [0, 2, 3])
def test_results_do_not_depend_on_the_number_of_processes(expected, processes):
    with EpisodeWorkers("BallCircle", 2, processes) as workers:
        same(list(workers.run(work(7))), expected)
        # Warm workers that ran other groups before.
        same(list(workers.run(reversed(work(7)))), expected[::-1])
    assert len({episode.id for group in expected for episode in group}) == 10


def test_groups_that_share_one_policy_do_not_hear_of_each_other():
    shared = Wander(5)
    groups = [Group(shared, (3,), 10.0)] * 3
    for processes in (1, 2):
        with EpisodeWorkers("BallCircle", 2, processes) as workers:
            found = list(workers.run(groups))
        same(found, [found[0]] * 3)


def test_groups_are_taken_a_few_ahead_and_the_rest_never_if_nobody_asks(expected):
    taken = []

    def endless():
        for k in itertools.count():
            taken.append(k)
            yield work(1, k)[0]

    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        results = workers.run(endless())
        assert taken == []
        same([next(results), next(results)], expected[:2])
        with pytest.raises(RuntimeError, match="under way"):
            next(workers.run(work(1)))
        results.close()
        assert 2 <= len(taken) <= 10
        # What the abandoned iterator had begun does not turn up in the next.
        same(list(workers.run(work(3))), expected[:3])


def test_workers_import_what_they_need_and_no_more():
    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        ((episode,),) = workers.run([Group(Loaded(0), (0,), 10.0)])
    assert "pytest" in sys.modules
    assert not episode.actions.any()


@pytest.mark.fault
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_dead_workers_group_is_run_again(tmp_path, expected, how, caplog):
    groups = work(7)
    groups[3] = Group(Dies(3, tmp_path, 2, how), groups[3].seeds, 13.0)
    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        same(list(workers.run(groups)), expected)
        ended = "killed by SIGKILL" if how == "kill" else "exit code 3"
        assert workers.deaths == [f"task BallCircle, seeds 30, 31: the worker process died ({ended})"] * 2
    assert caplog.text.count("its episodes are run again") == 2
    assert len(list(tmp_path.iterdir())) == 2  # two processes died, and both were real


@pytest.mark.fault
def test_workers_killed_from_outside_at_any_instant(expected):
    generator = np.random.default_rng()
    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        results, found = workers.run(work(7)), []
        for _ in range(3):
            found.append(next(results))
            time.sleep(generator.uniform(0.0, 0.1))
            os.kill(workers._workers[-1]._process.pid, signal.SIGKILL)
        same(found + list(results), expected)


@pytest.mark.fault
def test_a_group_that_always_kills_its_worker_is_an_error_and_the_groups_before_it_are_kept(tmp_path, expected):
    groups = [*work(2), Group(Dies(0, tmp_path, 99, "kill"), (7, 8), 10.0), *work(3, 3)]
    found = []
    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        with pytest.raises(WorkerDied, match=r"task BallCircle, seeds 7, 8: .* died 3 times \(killed by SIGKILL\)"):
            found.extend(workers.run(groups))
        same(found, expected[:2])
        same(list(workers.run(work(2))), expected[:2])


@pytest.mark.fault
def test_a_worker_that_hangs_is_ended_and_named_and_a_slow_one_is_not(expected):
    groups = [
        *work(2),
        Group(Sleeps(2, range(24), 0.25), (20,), 12.0),
        Group(Sleeps(0, range(9, 10), 600.0), (7, 8), 10.0),
    ]
    found = []
    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        same(list(workers.run(work(2))), expected[:2])  # both have done their imports
        workers.silence = 4.0
        message = r"task BallCircle, seeds 7, 8: the worker process made no step for 4 s; if this machine is only slow"
        with pytest.raises(WorkerDied, match=message):
            found.extend(workers.run([*groups, *work(1, 3)]))
        assert workers.deaths == ["task BallCircle, seeds 7, 8: the worker process made no step for 4 s and was ended"]
        same(found, expected[:3])  # the third slept for 6 s altogether
        workers.silence = 900.0
        same(list(workers.run(work(2))), expected[:2])


def test_the_limit_of_silence_is_read_from_the_environment(monkeypatch):
    assert EpisodeWorkers("BallCircle", 2).silence == 900.0
    monkeypatch.setenv("SPRINGHEAD_WORKER_SILENCE", "60")
    assert EpisodeWorkers("BallCircle", 2).silence == 60.0
    monkeypatch.setenv("SPRINGHEAD_WORKER_SILENCE", "a minute")
    with pytest.raises(BadInput, match="SPRINGHEAD_WORKER_SILENCE is 'a minute'; use a number of seconds above 0"):
        EpisodeWorkers("BallCircle", 2)


@pytest.mark.fault
@pytest.mark.parametrize("processes", [1, 2])
def test_a_simulator_that_returns_nonsense_is_named_with_seed_step_and_array(expected, processes):
    found = []
    with EpisodeWorkers("BallCircle", 2, processes) as workers:
        message = r"task BallCircle, seed 41, step 6: the simulator returned nan in next_observations"
        with pytest.raises(SimulatorFault, match=message):
            found.extend(workers.run([*work(2), Group(Breaks(1, 6), (40, 41), 10.0), *work(1)]))
        # A robot that is nowhere outlives a reset; the next groups do not meet it.
        same(list(workers.run(work(2))), expected[:2])
    same(found, expected[:2])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_policy_that_has_diverged_is_not_blamed_on_the_simulator(processes):
    with (
        EpisodeWorkers("BallCircle", 2, processes) as workers,
        pytest.raises(BadInput, match=r"task BallCircle, seed 6, step 0: the policy's action holds inf") as error,
    ):
        list(workers.run([Group(Diverged(0), (5, 6), 10.0)]))
    assert not isinstance(error.value, SimulatorFault)


def test_a_defect_of_a_policy_comes_back_with_its_traceback():
    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        with pytest.raises(RuntimeError, match=r"(?s)seeds 4: ZeroDivisionError .*acting.py.*a defect of this policy"):
            list(workers.run([Group(Raises(0), (4,), 10.0)]))
        with pytest.raises(BadInput, match="3 seeds for 2 environments"):
            list(workers.run([Group(Wander(0), (1, 2, 3), 10.0)]))
        assert workers.deaths == []


def test_policies_that_cannot_travel_are_refused_by_name():
    class Local(Wander):
        pass

    class Script(Wander):
        __module__ = "__main__"

    with EpisodeWorkers("BallCircle", 2, 2) as workers:
        with pytest.raises(BadInput, match="policy Local: cannot be sent to a worker"):
            list(workers.run([Group(Local(0), (1,), 10.0)]))
        with pytest.raises(BadInput, match="policy Script: its class stands in the program that was started"):
            list(workers.run([Group(Script(0), (1,), 10.0)]))
    with pytest.raises(BadInput, match="processes is -1"):
        EpisodeWorkers("BallCircle", 2, -1)


def test_workers_are_sealed_as_their_stage(tmp_path, monkeypatch):
    hidden, journal = tmp_path / "checkout" / "hidden.txt", tmp_path / "journal"
    hidden.parent.mkdir()
    hidden.write_text("undeclared")
    seal = Seal("rl-x@a", "stages.rl-x.do.deps", (str(hidden.parent),), (), str(journal))
    monkeypatch.setenv("SPRINGHEAD_SEAL", json.dumps(asdict(seal)))
    message = "stage rl-x@a reads hidden.txt, which it does not declare; add it to stages.rl-x.do.deps"
    with EpisodeWorkers("BallCircle", 2, 2) as workers, pytest.raises(BadInput, match=message):
        list(workers.run([Group(Reads(hidden), (1,), 10.0)]))
    assert message in journal.read_text()


PARENT = """
import sys
from pathlib import Path
from springhead.rl.workers import EpisodeWorkers, Group
from tests.rl.acting import Breaks, Dies, Diverged, Loaded, Raises, Reads, Slow, Wander
folder = Path(sys.argv[1])
with EpisodeWorkers("BallCircle", 2, 2) as workers:
    list(workers.run([Group(Slow(folder), (1,), 10.0), Group(Slow(folder), (2,), 10.0)]))
"""


def gone(process: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


@pytest.mark.fault
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_parent(tmp_path, how):
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        command,
        cwd=root,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 60
        while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(workers) == 2
        assert all(alive(worker) for worker in workers)
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)  # as Ctrl-C does, which reaches the workers as well
        else:
            parent.send_signal(how)
        _, errors = parent.communicate(timeout=120)
        assert all(gone(worker) for worker in workers)
        if how == signal.SIGINT:  # one traceback, the parent's
            assert errors.count("Traceback") == 1
            assert errors.rstrip().endswith("KeyboardInterrupt")
    finally:
        parent.kill()


def test_closing_ends_workers_in_mid_flight_and_more_work_starts_new_ones(tmp_path, expected):
    workers = EpisodeWorkers("BallCircle", 2, 2)
    same(list(workers.run(work(2))), expected[:2])
    processes = [worker._process.pid for worker in workers._workers]
    assert len(processes) == 2
    assert all(alive(process) for process in processes)
    workers.close()
    assert not any(alive(process) for process in processes)
    same(list(workers.run(work(1))), expected[:1])
    (process,) = (worker._process.pid for worker in workers._workers)  # one group starts one worker
    del workers  # without closing
    assert gone(process)
