"""Custom tasks: an entry makes an environment a task, for the whole pipeline, and what is wrong is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import yaml

from springhead.errors import BadInput
from springhead.rl import conduct, envs
from springhead.rl.tasks import CUSTOM, TASKS, task
from springhead.rl.workers import EpisodeWorkers, Group
from tests.rl.acting import Wander

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent.parent
ENTRY = {
    "env_id": "environments.corridor:Corridor-v3",
    "observation_dim": 4,
    "action_dim": 2,
    "horizon": 60,
    "cost_kind": "binary",
    "terminates": False,
    "limits": [5, 10, 20],
    "return_range": [-1, 3],
    "cost_range": [0, 60],
    "cost_key": "price",
    "sub_costs": ["cost_wall", "cost_fast"],
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one custom task, and the working folder."""
    (tmp_path / "environments").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("rl: {tasks: [Corridor]}\n")
    shutil.copy(Path(__file__).with_name("corridor.py"), tmp_path / "environments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    declare(tmp_path)
    yield tmp_path
    TASKS.refresh()
    envs.discard("Corridor")
    for name in [name for name in sys.modules if name.startswith("environments")]:
        del sys.modules[name]
    for name in ("springhead/Corridor-v0", "Corridor-v3"):
        gymnasium.registry.pop(name, None)


def declare(root, name="Corridor", without=(), **changes):
    """Writes the entry, with changes, and makes the process read it."""
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if key not in without}
    (root / CUSTOM).write_text(yaml.safe_dump({name: entry}))
    TASKS.refresh()
    gymnasium.registry.pop("springhead/Corridor-v0", None)
    envs.discard("Corridor")


def test_an_entry_makes_a_task(checkout):
    known = task("Corridor")
    assert (known.family, known.limits, known.sub_costs) == ("custom", (5.0, 10.0, 20.0), ("cost_wall", "cost_fast"))
    assert list(TASKS)[-1] == "Corridor"
    assert [name for name, known in TASKS.items() if known.family == "custom"] == ["Corridor"]
    seen = conduct.check("Corridor", steps=60)
    assert (seen.steps, seen.ended) == (60, "truncated")  # the entry's horizon, not the environment's own limit of 7
    assert 0 < seen.episode_cost < 60
    assert known.normalised_return(3.0) == 1.0


def test_actions_are_rescaled_to_the_environments_range(checkout):
    env = envs.make("Corridor")
    env.reset(seed=1)
    still = env.unwrapped._env.unwrapped.state[2:].copy()
    env.step(np.float32([1.0, -0.5]))  # of [-1, 1], hence a push of (2, -1)
    np.testing.assert_allclose(env.unwrapped._env.unwrapped.state[2:] - still, [0.1, -0.05])
    env.step(np.float32([9.0, -9.0]))  # clipped: the environment itself asserts its range


def test_episodes_carry_sub_costs_and_are_the_same_in_worker_processes(checkout):
    groups = [Group(Wander(seed), (seed, seed + 1), 10.0) for seed in (1, 3)]
    with EpisodeWorkers("Corridor", 2, processes=1) as here, EpisodeWorkers("Corridor", 2, processes=2) as elsewhere:
        one, two = list(here.run(groups)), list(elsewhere.run(groups))
    assert [[e.id for e in group] for group in one] == [[e.id for e in group] for group in two]
    for episode in one[0] + one[1]:
        assert episode.length == 60
        np.testing.assert_array_equal(episode.sub_costs.max(axis=1), episode.costs)


def test_it_is_drawn_as_it_draws_itself(checkout):
    pictures, episode = envs.record("Corridor", Wander(2), 5, 10.0, every=20)
    assert pictures.shape == (4, 40, 60, 3)
    assert episode.id == envs.run_episodes("Corridor", Wander(2), [5], 10.0, 1)[0].id


def test_the_command_lists_and_checks_it(checkout):
    def springhead(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "springhead", "tasks", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)

    listed = springhead()
    assert listed.returncode == 0, listed.stderr
    assert "custom\n  Corridor" in listed.stdout
    assert "cost_wall, cost_fast  (in params.yaml)" in listed.stdout
    checked = springhead("--check", "Corridor", "--steps", "60")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("Corridor: good; 60 steps, truncated")
    declare(checkout, horizon=0)
    broken = springhead("--check", "Corridor")
    assert broken.returncode == 2
    assert broken.stderr == f"error: {CUSTOM}: Corridor: horizon is 0; it must be at least 1\n"


def test_no_checkout_no_custom_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TASKS.refresh()
    assert TASKS
    assert all(known.family != "custom" for known in TASKS.values())
    TASKS.refresh()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ["limits"]}, r"Corridor\.limits: missing parameter"),
        ({"limit": [1, 2, 3]}, r"Corridor\.limit: unknown parameter; did you mean 'limits'\?"),
        ({"limits": [10, 5, 20]}, r"Corridor: limits are \[10\.0, 5\.0, 20\.0\]; they must be three rising numbers"),
        ({"limits": [5, 10, float("inf")]}, r"Corridor: limits are .*three rising numbers of 0 or more, and finite"),
        ({"return_range": [3, -1]}, r"Corridor: return_range is \[3\.0, -1\.0\]; it must be \[lowest, highest\]"),
        ({"cost_range": [-1, 9]}, "Corridor: cost_range begins at -1.0; costs are 0 or more"),
        ({"observation_dim": "four"}, r"Corridor\.observation_dim: expected int, found 'four'"),
        ({"cost_kind": "bool"}, r"Corridor\.cost_kind: 'bool' is not one of 'binary', 'continuous'"),
        ({"family": "metadrive"}, r"Corridor\.family: is not for custom tasks; leave it out"),
        ({"name": "BallRun"}, "BallRun: the published suite has a task of this name"),
        ({"name": "my-task"}, "my-task: a task's name is made of letters and digits"),
    ],
)
def test_a_wrong_entry_is_named(checkout, changes, message):
    declare(checkout, **changes)
    with pytest.raises(BadInput, match=rf"^environments/tasks\.yaml: {message}"):
        task("Corridor")
    with pytest.raises(BadInput):  # not hidden behind the tasks that are all right
        envs.make("BallRun")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "environments.corridors:Corridor-v3"}, "cannot make .*ModuleNotFoundError: .*corridors"),
        ({"env_id": "environments.corridor:Corridors-v3"}, "cannot make .*NameNotFound"),
        ({"options": {"wide": 3}}, "cannot make .*TypeError.*wide"),
        ({"observation_dim": 5}, r"observations are Box.*\(4,\).* says a vector of observation_dim 5"),
        ({"action_dim": 3}, r"actions are Box.*\(2,\).* says a vector of action_dim 3"),
        ({"options": {"fault": "discrete"}}, r"actions are Discrete\(3\).* says a vector of action_dim 2"),
        ({"options": {"fault": "unbounded"}}, "give every component finite bounds"),
        ({"options": {"fault": "costless"}}, "info has no 'price'; it has cost_fast, cost_wall. Set cost_key"),
        ({"sub_costs": ["wall"]}, "info has no 'wall'; it has .* Set sub_costs"),
        ({"options": {"fault": "refund"}}, r"info\['price'\] is -1.0; a cost is 0 or more"),
        ({"options": {"fault": "dear"}}, "the cost is 3.0; set cost_kind to continuous"),
        ({"options": {"fault": "odd"}}, "the cost is 1.0, the maximum of its sub-costs 0.0"),
        ({"options": {"fault": "ends"}}, "an episode terminated at step 1; set terminates"),
        ({"options": {"fault": "impatient"}}, "truncated at step 1, before the horizon; leave time to the entry"),
        ({"options": {"fault": "deaf"}}, "another seed gives the same episode; reset must use its seed"),
        ({"options": {"fault": "leaky"}}, "an episode depends on the ones before it, not on its seed alone"),
        ({"options": {"fault": "entropy"}}, "an episode depends on the ones before it, not on its seed alone"),
    ],
)
def test_an_environment_that_is_not_as_its_entry_says_is_named(checkout, changes, message):
    declare(checkout, **changes)
    with pytest.raises(BadInput, match=f"^task Corridor: .*{message}"):
        conduct.check("Corridor", steps=30, other_process=False)
