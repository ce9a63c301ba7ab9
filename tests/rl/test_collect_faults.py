"""No fault loses what a collection has finished: kills, damaged shards, a full disk, NaN, dead workers."""

import dataclasses
import errno
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_files
from springhead.progress import Progress
from springhead.rl import envs
from springhead.rl.collection import make_plan, select
from springhead.rl.workers import SimulatorFault
from springhead.stage import for_test
from stages.rl import collect
from tests.rl.test_collect import PARAMS, expert_folder

__all__ = ["expert_folder"]

pytestmark = pytest.mark.unit

MORE = dataclasses.replace(PARAMS, sampled_episodes=14, mean_episodes=2)


def stage_in(folder, expert_folder, params=MORE):
    shutil.rmtree(folder / "out", ignore_errors=True)  # as the harness gives it
    return for_test(params, folder / "out", {"experts": expert_folder}, {"task": "BallRun"}, seed=9)


def shards_of(stage):
    return sorted((stage.scratch / "shards").glob("0*"))


@pytest.fixture(scope="module")
def whole(expert_folder, tmp_path_factory):
    stage = stage_in(tmp_path_factory.mktemp("whole"), expert_folder)
    collect.run(stage)
    assert len(shards_of(stage)) == 16
    return tree_files(stage.out)


def main(folder, expert_folder, processes):
    """The body of a process that is killed."""
    collect.run(stage_in(folder, expert_folder, dataclasses.replace(MORE, processes=int(processes))))


@pytest.mark.fault("F29")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(expert_folder, tmp_path, whole, processes):
    generator = np.random.default_rng()
    command = [
        sys.executable, "-c", "import sys; from pathlib import Path; from tests.rl.test_collect_faults import main; "
        "main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])", str(tmp_path), str(expert_folder), str(processes),
    ]  # fmt: skip
    shards = tmp_path / ".out-root/scratch/shards"
    done = []
    for kill in range(4 - processes):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # Not while Python still imports: from the moment there is one more shard than before.
        while running.poll() is None and len(list(shards.glob("0*"))) <= len(done):
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.02))
        running.kill()
        running.wait()
        assert running.returncode == -signal.SIGKILL, f"kill {kill} came too late"
        now = [path.name for path in sorted(shards.glob("0*"))]
        assert set(done) < set(now)  # nothing that was finished is lost
        done = now
    stage = stage_in(tmp_path, expert_folder)
    before = {path: path.stat().st_mtime_ns for path in shards_of(stage)}
    collect.run(stage)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nor made again
    assert tree_files(stage.out) == whole


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.fault("F30")
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_shard_is_named_and_collected_again(expert_folder, tmp_path, whole, how, capsys):
    stage = stage_in(tmp_path, expert_folder)
    collect.run(stage)
    hurt = shards_of(stage)[3]
    others = {path: path.stat().st_mtime_ns for path in shards_of(stage) if path != hurt}
    damage(hurt, how)
    stage = stage_in(tmp_path, expert_folder)
    collect.run(stage)
    line = next(line for line in capsys.readouterr().err.splitlines() if "is damaged" in line)
    assert str(hurt) in line
    assert "its 2 episodes are collected again" in line
    assert tree_files(stage.out) == whole
    assert {path: path.stat().st_mtime_ns for path in shards_of(stage) if path != hurt} == others


@pytest.mark.fault("F30")
def test_a_shard_damaged_while_the_stage_runs_is_never_used(expert_folder, tmp_path, whole, monkeypatch):
    stage = stage_in(tmp_path, expert_folder)

    def late(*arguments):
        damage(shards_of(stage)[3], "flipped")
        return select(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "select", late)
        with pytest.raises(BadInput, match="the shard of group 3 was damaged while the stage ran; run the stage again"):
            collect.run(stage)
    again = stage_in(tmp_path, expert_folder)
    collect.run(again)
    assert tree_files(again.out) == whole


@pytest.mark.fault("F12")
def test_a_full_disk_keeps_the_finished_shards(expert_folder, tmp_path, whole):
    stage = stage_in(tmp_path, expert_folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(bar, n=1, **figures):
        if len(shards_of(stage)) == 3:  # from here on a file of more than 4 kB is one too large
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", fill)
        try:
            with pytest.raises(OSError, match=r"shards/000003-") as caught:
                collect.run(stage)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path.name[:6] for path in sorted((stage.scratch / "shards").iterdir())] == ["000000", "000001", "000002"]
    kept = {path: path.stat().st_mtime_ns for path in shards_of(stage)}
    again = stage_in(tmp_path, expert_folder)
    collect.run(again)
    assert tree_files(again.out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def breaking(of_seed, at, where):
    """An environment whose simulator returns NaN at one step of one episode; the runner leaves wrappers out.

    ``observations`` stands for the first one, which comes from the reset.
    """
    env = envs.make("BallRun")
    base, state = env.unwrapped, {}
    reset, step = base.reset, base.step

    def note(*, seed=None, options=None):
        state.update(seed=seed, step=0)
        observation, info = reset(seed=seed, options=options)
        if where == "observations" and state["seed"] == of_seed:
            observation = observation * np.float32(np.nan)
        return observation, info

    def broken(action):
        observation, reward, terminated, truncated, info = step(action)
        if where != "observations" and (state["seed"], state["step"]) == (of_seed, at):
            if where == "next_observations":
                observation = observation * np.float32(np.nan)
            elif where == "rewards":
                reward = float("nan")
            else:
                info = {**info, "cost": float("nan")}
        state["step"] += 1
        return observation, reward, terminated, truncated, info

    base.reset, base.step = note, broken
    return env


@pytest.mark.fault("F31")
@pytest.mark.parametrize(
    ("where", "step"), [("observations", 0), ("next_observations", 17), ("rewards", 17), ("costs", 17)]
)
def test_nan_from_the_simulator_is_named_and_the_finished_shards_stay(
    expert_folder, tmp_path, whole, where, step, monkeypatch
):
    stage = stage_in(tmp_path, expert_folder)
    index = read_json(expert_folder / "index.json")
    seed = make_plan(index, 14, 2, {}, 2, 9)[2].seeds[1]
    with monkeypatch.context() as patch:
        patch.setattr(envs, "_POOL", {"BallRun": [breaking(seed, step, where) for _ in range(2)]})
        with pytest.raises(SimulatorFault) as caught:
            collect.run(stage)
    message = str(caught.value)
    for part in (f"policy {index[0]['name']} (ppo-lag)", "task BallRun", f"seed {seed}", f"step {step}", where):
        assert part in message
    assert [path.name[:6] for path in shards_of(stage)] == ["000000", "000001"]
    again = stage_in(tmp_path, expert_folder)
    collect.run(again)
    assert tree_files(again.out) == whole


@pytest.mark.fault("F32")
def test_workers_killed_while_collecting_change_nothing(expert_folder, tmp_path, whole):
    stage = stage_in(tmp_path, expert_folder, dataclasses.replace(MORE, processes=2))
    killed = []

    def kill(bar, n=1, **figures):
        fresh = [child for child in psutil.Process().children() if child.pid not in killed]
        if len(killed) < 3 and fresh:
            victim = fresh[0]
            victim.kill()
            killed.append(victim.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", kill)
        collect.run(stage)
    assert len(set(killed)) == 3
    assert tree_files(stage.out) == whole
