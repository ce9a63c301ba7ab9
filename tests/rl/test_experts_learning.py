"""The experts' learning benchmark: a result belongs to its settings, and so do the policies that it judges."""

import json

import numpy as np
import pytest

from benchmarks.experts_learning import Run, configuration, execute, has_result
from springhead.rl.acting import load_expert
from springhead.rl.online.rollouts import episode_seeds, roll_out
from springhead.rl.workers import EpisodeWorkers

pytestmark = pytest.mark.unit

RUN = Run("focops", "BallRun", 0)
SMALL = {"iterations": 2, "episodes_per_iteration": 2, "num_envs": 2, "hidden": [8], "epochs": 1}


def test_a_run_with_other_settings_judges_no_policy_of_the_former_ones(tmp_path):
    other = {**SMALL, "learning_rate": 0.05}
    fresh = execute(RUN, other, tmp_path / "fresh", tmp_path, quiet=True)
    former = execute(RUN, SMALL, tmp_path / "used", tmp_path, quiet=True)
    again = execute(RUN, other, tmp_path / "used", tmp_path, quiet=True)
    assert again["last"] == fresh["last"] != former["last"]
    assert again["feasible_first"] == fresh["feasible_first"]


def test_a_result_counts_for_its_own_settings_only(tmp_path):
    assert not has_result(RUN, SMALL, tmp_path)
    made = execute(RUN, SMALL, tmp_path / "scratch", tmp_path, quiet=True)
    assert json.loads((tmp_path / "BallRun-focops-0.json").read_text())["last"] == made["last"]
    assert has_result(RUN, SMALL, tmp_path)
    assert not has_result(RUN, {**SMALL, "epochs": 2}, tmp_path)


def test_the_chosen_policy_is_the_one_that_ran_the_episodes_it_was_chosen_by(tmp_path):
    """Not the one that came out of that iteration: one update can carry a policy far over its limit."""
    changes = {**SMALL, "iterations": 4, "learning_rate": 0.01, "epochs": 5}
    made = execute(RUN, changes, tmp_path / "scratch", tmp_path, quiet=True)
    chosen = made["feasible_first"]["iteration"]
    assert chosen == 3
    policy = load_expert(tmp_path / "scratch" / RUN.name / f"policies/{chosen:05d}")
    config = configuration(RUN, changes)
    with EpisodeWorkers("BallRun", 2) as workers:
        episodes = roll_out(workers, policy, episode_seeds(config, chosen), 20.0)
    _, episode_return, cost_return = made["curve"][chosen]
    assert np.mean([episode.episode_return for episode in episodes]) == pytest.approx(episode_return, abs=0.01)
    assert np.mean([episode.cost_return for episode in episodes]) == pytest.approx(cost_return, abs=0.01)
