"""The experts' learning benchmark: a result belongs to its settings, and so do the policies that it judges."""

import json

import pytest

from benchmarks.experts_learning import Run, execute, has_result

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
