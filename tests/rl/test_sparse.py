"""Sparse locomotion: what is paid, in data and by the environment alike."""

import re
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from springhead.rl import conduct, envs, task_table
from springhead.rl.envs import run_episodes
from springhead.rl.episodes import Episode
from springhead.rl.evaluation import RandomPolicy
from springhead.rl.simulators.sparse import sparse
from springhead.rl.tasks import TASKS, task

pytestmark = pytest.mark.unit

THRESHOLD = 2.0


@pytest.fixture
def hopper(monkeypatch):
    """A sparse task with a threshold that a hopper passes on its way to the ground."""
    dense = task("HopperVelocity")
    entry = replace(
        dense, name="HopperHop", family="sparse", env_id=dense.name, return_range=(0.0, 1000.0),
        options={"threshold": THRESHOLD},
    )  # fmt: skip
    monkeypatch.setattr(TASKS, "_tasks", {**TASKS, entry.name: entry})
    yield entry
    envs.discard(entry.name)
    gymnasium.registry.pop(f"springhead/{entry.name}-v0", None)


def test_every_step_after_the_return_has_passed_the_threshold_is_paid():
    n = 5
    episode = Episode(
        observations=np.zeros((n, 2), np.float32),
        next_observations=np.ones((n, 2), np.float32),
        actions=np.zeros((n, 1), np.float32),
        rewards=np.array([1, 2, 0.5, -2, 3], np.float32),  # sums 1, 3, 3.5, 1.5, 4.5
        costs=np.ones(n, np.float32),
        terminals=np.zeros(n, bool),
        timeouts=np.array([0, 0, 0, 0, 1], bool),
    )
    paid = sparse(episode, 3.0)
    assert paid.rewards.tolist() == [0, 0, 1, 0, 1]  # exactly the threshold is not paid, nor what fell below it again
    assert paid.costs.tolist() == [0] * n
    assert paid.timeouts is episode.timeouts
    assert sparse(episode, 5.0).episode_return == 0


def test_the_environment_pays_as_the_data_do(hopper):
    seeds = [4, 5, 6]
    paid = run_episodes(hopper.name, RandomPolicy(hopper, 0), seeds, 0.0, 3)
    dense = run_episodes(hopper.env_id, RandomPolicy(hopper, 0), seeds, 0.0, 3)
    assert [episode.id for episode in paid] == [sparse(episode, THRESHOLD).id for episode in dense]
    assert any(0 < episode.episode_return < episode.length for episode in paid)


def test_the_task_keeps_its_word(hopper):
    seen = conduct.check(hopper.name, steps=60, other_process=False)
    assert seen.episode_cost == 0


def test_the_page_shows_the_catalogue():
    page = (Path(__file__).parents[2] / "docs/methods/mazes.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+Sparse)` \| (.*?) \| \d+ \| [\d,]+ \| \d+ % \|", page, re.MULTILINE)
    wanted = []
    for of in (known for known in TASKS.values() if known.family == "sparse"):
        (line,) = (line for line in task_table.markdown_lines("sparse") if line.startswith(f"| `{of.name}` |"))
        cells = line.split(" | ")[1:8]  # from the length of an observation to the limits
        wanted.append((of.name, " | ".join([f"{of.options['threshold']}", *cells])))
    assert shown == wanted
    assert len(shown) == 2
