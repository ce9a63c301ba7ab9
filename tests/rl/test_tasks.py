"""The catalogue against the published table, the benchmark's own package and the simulator's own registry."""

import json
from pathlib import Path

import gymnasium
import pytest

from springhead.errors import BadInput
from springhead.rl import task_table
from springhead.rl.tasks import TASKS, task

pytestmark = pytest.mark.unit

PUBLISHED = {
    entry["name"]: entry
    for entry in json.loads(Path(__file__).with_name("published_tasks.json").read_text(encoding="utf-8"))["tasks"]
}


def density_of(entry):
    keys = ("cbins", "rbins", "max_npb", "min_npb")
    return {name: tuple(settings[key] for key in keys) for name, settings in entry["density_cfg"].items()}


def test_the_catalogue_is_the_published_table():
    suites = ("bullet-safety-gym", "safety-gymnasium", "metadrive")
    published = {name for name, known in TASKS.items() if known.family in suites}
    assert published == set(PUBLISHED)
    assert len(published) == 38
    for name, entry in PUBLISHED.items():
        known = TASKS[name]
        assert known.name == name
        assert known.family.replace("-", "_") in entry["suite"]
        assert (known.observation_dim, known.action_dim) == (entry["obs_dim"], entry["act_dim"])
        assert known.horizon == entry["max_episode_steps"]
        assert known.return_range == (entry["min_episode_reward"], entry["max_episode_reward"])
        assert known.cost_range == (entry["min_episode_cost"], entry["max_episode_cost"])
        assert known.limits == tuple(entry["eval_cost_limits"])
        assert known.density == density_of(entry)
        assert known.data_file == entry["dataset_file"]
        assert known.data_file.startswith(known.env_id.removesuffix("-v0") + "-")
        if entry["base_env_id"] is not None:  # the MetaDrive tasks have none
            assert known.env_id == entry["base_env_id"].split()[0]


def test_numbers_are_of_one_type():
    """10 and 10.0 are different bytes in a receipt."""
    for known in TASKS.values():
        numbers = (*known.limits, *known.return_range, *known.cost_range)
        assert all(type(number) is float for number in numbers)
        assert all(type(number) is int for settings in known.density.values() for number in settings)


def test_constants_are_the_benchmarks(capfd):
    infos = pytest.importorskip("dsrl.infos")
    densities = {}
    for name, entry in PUBLISHED.items():
        known = TASKS[name]
        assert known.return_range == (infos.MIN_EPISODE_REWARD[name], infos.MAX_EPISODE_REWARD[name])
        assert known.cost_range == (infos.MIN_EPISODE_COST[name], infos.MAX_EPISODE_COST[name])
        assert known.horizon == infos.DEFAULT_MAX_EPISODE_STEPS[name]
        assert infos.DATASET_URLS[name].rpartition("/")[2] == known.data_file
        densities |= {f"{entry['offline_env_id']}_density{key}": value for key, value in known.density.items()}
    keys = ("cbins", "rbins", "max_npb", "min_npb")
    published = {name: tuple(settings[key] for key in keys) for name, settings in infos.DENSITY_CFG.items()}
    assert densities == published


def test_horizons_are_the_simulators():
    import bullet_safety_gym  # noqa: F401

    for known in TASKS.values():
        if known.family == "bullet-safety-gym":
            assert gymnasium.spec(known.env_id).max_episode_steps == known.horizon


def test_normalised_scores():
    ball = task("BallCircle")
    low, high = ball.return_range
    assert ball.normalised_return(low) == 0.0
    assert ball.normalised_return(high) == 1.0
    assert ball.normalised_return((low + high) / 2) == pytest.approx(0.5)
    assert ball.normalised_cost(10.0, 20.0) == 0.5
    # At limit 0 a cost of 0 is just safe and any cost is not.
    assert ball.normalised_cost(0.0, 0.0) == 1.0
    assert ball.normalised_cost(3.0, 0.0) == 4.0
    with pytest.raises(BadInput, match="negative"):
        ball.normalised_cost(1.0, -1.0)


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(BadInput, match=r"Did you mean BallCircle\?.*AntCircle, AntRun, AntVelocity"):
        task("ballcirle")
    with pytest.raises(BadInput, match="Known tasks"):
        task("xyzzy")


def test_the_published_page_shows_the_catalogue():
    page = (Path(__file__).parents[2] / "docs/methods/tasks.md").read_text(encoding="utf-8")
    for family in ("bullet-safety-gym", "safety-gymnasium", "metadrive"):
        lines = list(task_table.markdown_lines(family))
        assert len(lines) > 9
        assert "\n".join(lines) in page, f"{family}: bring its table in docs/methods/tasks.md up to date"


def test_the_list_marks_what_is_used():
    lines = list(task_table.text_lines(["CarRun"]))
    assert [line for line in lines if line.endswith("(in params.yaml)")] == [
        "  CarRun                7   2   200  10, 20, 40  binary      boundary, velocity  (in params.yaml)"
    ]
    assert [line for line in lines[1:] if not line.startswith(" ")][:2] == ["bullet-safety-gym", "safety-gymnasium"]
