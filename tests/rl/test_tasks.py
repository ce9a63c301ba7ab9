"""The catalogue against the benchmark's own constants and the simulator's own registry."""

import gymnasium
import pytest

from springhead.errors import BadInput
from springhead.rl.tasks import TASKS, task

pytestmark = pytest.mark.unit


def _offline_id(known):
    """The benchmark's own environment id."""
    if known.family == "metadrive":
        return f"OfflineMetadrive-{known.name}-v0"
    suffix, version = ("Gymnasium", known.env_id[-2:]) if known.family == "safety-gymnasium" else ("", "v0")
    return f"Offline{known.name}{suffix}-{version}"


def test_constants_are_the_benchmarks(capfd):
    infos = pytest.importorskip("dsrl.infos")
    for name, known in TASKS.items():
        assert known.return_range == (infos.MIN_EPISODE_REWARD[name], infos.MAX_EPISODE_REWARD[name])
        assert known.cost_range == (infos.MIN_EPISODE_COST[name], infos.MAX_EPISODE_COST[name])
        assert known.horizon == infos.DEFAULT_MAX_EPISODE_STEPS[name]
        for density, settings in known.density.items():
            published = infos.DENSITY_CFG[f"{_offline_id(known)}_density{density}"]
            assert settings == tuple(published[key] for key in ("cbins", "rbins", "max_npb", "min_npb"))


def test_horizons_are_the_simulators():
    import bullet_safety_gym  # noqa: F401

    bullet = [known for known in TASKS.values() if known.family == "bullet-safety-gym"]
    assert len(bullet) == 8
    for known in bullet:
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
