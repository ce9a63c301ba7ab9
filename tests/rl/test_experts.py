"""The experts stage: what it writes, twice the same, and after a kill the same again."""

import csv
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.params import load, overlay, read_params
from springhead.rl.envs import run_episodes
from springhead.rl.networks import load_expert
from springhead.rl.online.algorithms import ALGORITHMS
from springhead.rl.online.rollouts import episode_seeds
from springhead.stage import for_test
from stages.rl import experts
from stages.rl.experts import Params, Schedule, configuration, save_points

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

SMALL = {"episodes_per_iteration": 2, "num_envs": 2, "hidden": [8], "epochs": 1, "minibatch": 100}
PARAMS = Params(
    runs={"ppo-lag": 2, "focops": 0},
    policies=3,
    save_from=0.2,
    processes=1,
    algorithms={"ppo-lag": SMALL},
    tasks={
        "BallRun": Schedule(iterations=4, cost_limit_start=50, cost_limit_end=0, ramp_from=0.0, ramp_until=1.0),
    },
)


def test_without_runs_there_is_an_empty_index(tmp_path):
    stage = for_test(dataclasses.replace(PARAMS, runs={"ppo-lag": 0}), tmp_path / "out", {}, {"task": "BallRun"})
    experts.run(stage)
    assert read_json(stage.out / "index.json") == []
    assert stage.record.metrics == {"policies": 0, "env_steps": 0}


def test_save_points_rise_and_end_with_the_last_iteration():
    assert save_points(60, 4, 0.25) == [15, 30, 45, 60]
    assert save_points(3, 14, 0.2) == [1, 2, 3]
    assert save_points(1, 1, 0.0) == [1]
    assert save_points(60, 1, 0.25) == [60]


def test_writes_policies_that_load_with_an_index_that_names_them(tmp_path):
    stage = for_test(PARAMS, tmp_path / "out", {}, {"task": "BallRun"}, seed=5)
    experts.run(stage)
    index = read_json(stage.out / "index.json")
    assert [line["name"] for line in index] == [f"ppo-lag-{run}-{i:02d}" for run in (0, 1) for i in range(3)]
    assert len({line["digest"] for line in index}) == 6
    assert len({line["seed"] for line in index}) == 2
    for line in index:
        folder = stage.out / line["name"]
        assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "policy.safetensors"]
        assert tree_digest(folder) == line["digest"]
        policy = load_expert(folder)
        assert (policy.config.cost_limit, policy.config.seed) == (line["cost_limit"], line["seed"])
        assert policy.config.env_steps == line["env_steps"]
    assert index[0]["cost_limit"] > index[2]["cost_limit"] == 0.0
    lines = list(csv.DictReader((stage.out / "history.csv").open()))
    assert len(lines) == 2 * 4
    # What a policy reached is what the episodes show that it ran itself: those of the iteration after it.
    following = {(line["run"], int(line["env_steps"])): line for line in lines}
    for number, line in enumerate(index):
        if number % 3 < 2:
            shown = following[str(number // 3), line["env_steps"] + 200]
            assert line["episode_return"] == pytest.approx(float(shown["episode_return"]), rel=1e-5)
            assert line["cost_return"] == pytest.approx(float(shown["cost_return"]), rel=1e-5)
    seeds = episode_seeds(configuration(PARAMS, "BallRun", "ppo-lag", index[5]["seed"]), 4)
    ran = run_episodes("BallRun", load_expert(stage.out / index[5]["name"], seeds), seeds, 0.0, 2)
    assert index[5]["episode_return"] == pytest.approx(np.mean([episode.episode_return for episode in ran]))
    assert index[5]["cost_return"] == pytest.approx(np.mean([episode.cost_return for episode in ran]))
    assert stage.record.metrics["policies"] == 6
    assert [model["path"] for model in stage.record.models] == [line["name"] for line in index]


@pytest.mark.fault
def test_a_killed_stage_ends_with_the_same_bytes(tmp_path, monkeypatch):
    longer = dataclasses.replace(PARAMS.tasks["BallRun"], iterations=12)
    params = dataclasses.replace(PARAMS, runs={"ppo-lag": 1}, tasks={"BallRun": longer})
    whole = for_test(params, tmp_path / "whole", {}, {"task": "BallRun"})
    experts.run(whole)
    killed = for_test(params, tmp_path / "killed", {}, {"task": "BallRun"})
    seen = []

    def stop(self, step, **values):
        seen.append(step)
        if step == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(killed), "log", stop)
        with pytest.raises(KeyboardInterrupt):
            experts.run(killed)
        seen.clear()
        patch.setattr(type(killed), "log", lambda self, step, **values: seen.append(step))
        experts.run(killed)
    assert seen == [11, 12]  # resumed from the checkpoint after 10
    assert tree_digest(killed.out) == tree_digest(whole.out)


FEW = {key: SMALL[key] for key in ("episodes_per_iteration", "num_envs", "hidden")}
LONGER = dataclasses.replace(PARAMS.tasks["BallRun"], iterations=24, settings={"cpo": {"iterations": 12}})
ALL = dataclasses.replace(
    PARAMS,
    runs={"ppo-lag": 1, "trpo-lag": 1, "cpo": 1, "focops": 1},
    algorithms=dict.fromkeys(("ppo-lag", "trpo-lag", "cpo", "focops"), FEW),
    tasks={"BallRun": LONGER},
)


def train_all(folder):
    """Runs the stage with four algorithms, into an empty output as the harness gives it; also a process's main."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    stage = for_test(ALL, folder / "out", {}, {"task": "BallRun"})
    experts.run(stage)
    return stage


def test_several_algorithms_share_a_folder_an_index_and_a_history(tmp_path):
    stage = train_all(tmp_path)
    index = read_json(stage.out / "index.json")
    assert [line["algorithm"] for line in index] == [name for name in ALL.runs for _ in range(3)]
    assert {path.name for path in stage.out.iterdir() if path.is_dir()} == {line["name"] for line in index}
    for name in ALL.runs:
        chosen = [line for line in index if line["algorithm"] == name and line["chosen"]]
        others = [line for line in index if line["algorithm"] == name and not line["chosen"]]
        assert (len(chosen), len(others)) == (1, 2)
        # Every run ends with the limit 0.
        assert all((line["cost_return"] <= 0) <= (chosen[0]["cost_return"] <= 0) for line in others)
        assert {"final_return", "final_cost"} == set(stage.record.metrics[name])
    lines = list(csv.DictReader((stage.out / "history.csv").open()))
    assert [(line["algorithm"], line["iteration"]) for line in lines] == [
        (name, str(i)) for name in ALL.runs for i in range(12 if name == "cpo" else 24)
    ]
    assert {line["case"] == "" for line in lines if line["algorithm"] != "cpo"} == {True}
    assert {float(line["case"]) for line in lines if line["algorithm"] == "cpo"} <= {0.0, 1.0, 2.0, 3.0, 4.0}


@pytest.mark.fault
@pytest.mark.parametrize("name", ["cpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL.runs if n != "cpo")])
def test_a_stage_killed_by_the_system_ends_with_the_same_bytes(tmp_path, name):
    """SIGKILL while the algorithm is training, somewhere after its first checkpoint."""
    whole = train_all(tmp_path / "whole")
    code = f"from pathlib import Path; from tests.rl.test_experts import train_all; train_all(Path({str(tmp_path)!r}))"
    child = subprocess.Popen([sys.executable, "-c", code])
    checkpoint = for_test(ALL, tmp_path / "out", {}, {"task": "BallRun"}).scratch / f"{name}-0"
    while not list(checkpoint.glob("checkpoint-*.json")):
        assert child.poll() is None
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "index.json").exists()
    assert tree_digest(train_all(tmp_path).out) == tree_digest(whole.out)


@pytest.mark.e2e
def test_worker_processes_change_no_byte(tmp_path):
    found = []
    for processes in (1, 2):
        params = dataclasses.replace(PARAMS, runs={"ppo-lag": 1}, processes=processes)
        stage = for_test(params, tmp_path / str(processes), {}, {"task": "BallRun"})
        experts.run(stage)
        found.append(tree_digest(stage.out))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "profile",
    [None, *sorted((ROOT / "pipelines/profiles").glob("*.yaml"))],
    ids=lambda path: path.stem if path else "quick",
)
def test_the_projects_parameters_configure_every_algorithm_for_every_task(profile):
    params = read_params(ROOT / "params.yaml")
    if profile is not None:
        params = overlay(params, read_params(profile), profile.name)
    loaded = load(Params, params["rl"]["experts"], "rl.experts")
    assert set(loaded.algorithms) == set(ALGORITHMS) == set(loaded.runs)
    for name in ALGORITHMS:
        for task, schedule in loaded.tasks.items():
            config = configuration(loaded, task, name, seed=1)
            assert (config.task, config.cost_limit_end) == (task, schedule.cost_limit_end)
    assert set(params["rl"]["tasks"]) <= set(loaded.tasks)


@pytest.mark.fault
def test_bad_parameters_are_named(tmp_path):
    stage = for_test(PARAMS, tmp_path / "out", {}, {"task": "CarRun"})
    with pytest.raises(BadInput, match=r"rl\.experts\.tasks has no entry 'CarRun'"):
        experts.run(stage)
    with pytest.raises(ValueError, match="ramp"):
        Schedule(iterations=1, cost_limit_start=1, cost_limit_end=1, ramp_from=0.9, ramp_until=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        dataclasses.replace(PARAMS, policies=0)
    with pytest.raises(ValueError, match="unknown algorithm 'ppo'"):
        dataclasses.replace(PARAMS, runs={"ppo": 1})
    wrong = dataclasses.replace(PARAMS, algorithms={"ppo-lag": {"learning_rat": 0.1}})
    with pytest.raises(BadInput, match=r"ppo-lag\.learning_rat: unknown parameter; did you mean 'learning_rate'"):
        experts.run(for_test(wrong, tmp_path / "wrong", {}, {"task": "BallRun"}))
    wrong = dataclasses.replace(PARAMS, algorithms={"ppo-lag": {**SMALL, "minibatch": 0}})
    with pytest.raises(
        BadInput, match=r"^params\.yaml: rl\.experts\.algorithms\.ppo-lag: minibatch is 0; use at least 1"
    ):
        experts.run(for_test(wrong, tmp_path / "range", {}, {"task": "BallRun"}))
    schedule = dataclasses.replace(PARAMS.tasks["BallRun"], settings={"ppo-lag": {"epoch": 2}})
    wrong = dataclasses.replace(PARAMS, tasks={"BallRun": schedule})
    with pytest.raises(BadInput, match=r"rl\.experts\.tasks\.BallRun\.settings\.ppo-lag\.epoch: unknown parameter"):
        experts.run(for_test(wrong, tmp_path / "settings", {}, {"task": "BallRun"}))
    with pytest.raises(BadInput, match="unknown task"):
        experts.run(for_test(PARAMS, tmp_path / "other", {}, {"task": "BalRun"}))
