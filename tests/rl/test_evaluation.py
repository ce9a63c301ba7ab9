"""Scores by hand, paired episodes, processes that change nothing, and the stages end to end."""

from pathlib import Path

import numpy as np
import pytest

from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest
from springhead.params import load
from springhead.rl.dataset import write_dsrl
from springhead.rl.evaluation import (
    Job,
    Outcome,
    comparisons,
    episode_seeds,
    expert_extremes,
    feasible_first,
    figures,
    over_seeds,
    run_jobs,
)
from springhead.stage import for_test
from springhead.tables import read_table
from stages.rl import evaluate, train
from tests.rl.offline_data import BALL, spread
from tests.rl.test_policy import expert_model

pytestmark = pytest.mark.unit
LOW, HIGH = BALL.return_range


def outcome(returns: list[float], costs: list[float]) -> Outcome:
    return Outcome(np.array(returns), np.array(costs), np.full(len(returns), 200))


def test_figures_by_hand() -> None:
    found = figures(outcome([LOW, HIGH], [0.0, 30.0]), BALL, 20.0)
    assert found["normalised_return"] == pytest.approx(0.5)
    assert found["normalised_return_std"] == pytest.approx(0.5)
    assert found["normalised_cost"] == pytest.approx(0.75)
    assert found["violation_probability"] == 0.5
    assert found["cost_return"] == 15.0
    assert found["episodes"] == 2


def test_at_a_limit_of_0_one_is_added_above_and_below() -> None:
    found = figures(outcome([0.0, 0.0], [0.0, 3.0]), BALL, 0.0)
    assert found["normalised_cost"] == pytest.approx((1 + 4) / 2)
    assert found["violation_probability"] == 0.5


def test_any_policy_that_keeps_the_limit_beats_any_that_does_not() -> None:
    tried = [outcome([9.0], [30.0]), outcome([1.0], [19.0]), outcome([5.0], [20.0]), outcome([2.0], [0.0])]
    assert feasible_first(tried, 20.0) == 2
    assert feasible_first(tried, 40.0) == 0
    assert feasible_first(tried[:1] + tried[1:3], 10.0) == 1  # none keeps it: the cheapest
    assert feasible_first([outcome([5.0], [1.0])] * 3, 20.0) == 2  # a tie: the later one


def test_the_episodes_of_a_choice_are_others_than_those_reported() -> None:
    assert not set(episode_seeds(3, 20)) & set(episode_seeds(3, 20, 1))


def test_each_limit_normalises_by_itself() -> None:
    same = outcome([LOW], [20.0])
    assert [figures(same, BALL, limit)["normalised_cost"] for limit in (10.0, 20.0, 40.0)] == [2.0, 1.0, 0.5]


def test_a_mean_cost_at_the_limit_is_exactly_1_and_safe() -> None:
    # The mean of these three quotients is 1.0000000000000002.
    found = figures(outcome([LOW] * 3, [21.0, 34.0, 14.0]), BALL, 23.0)
    assert found["normalised_cost"] == 1.0
    costs = (13.0, 16.0, 1.0)
    alike = [figures(outcome([LOW], [cost]), BALL, 10.0) for cost in costs]
    [row] = over_seeds([{"algorithm": "cdt", "limits": {"10": entry}} for entry in alike])
    assert row["safe"]
    assert row["normalised_cost"] == 1.0


def model(algorithm: str, value: float, cost: float, limit: str = "20") -> dict:
    keys = ("normalised_return", "normalised_cost", "violation_probability", "episode_return", "cost_return")
    figures = (value, cost, 0.0, value, cost * float(limit))
    return {"algorithm": algorithm, "limits": {limit: dict(zip(keys, figures, strict=True))}}


def test_the_leaderboard_averages_over_seeds() -> None:
    rows = over_seeds([model("cdt", 0.4, 0.8), model("cdt", 0.8, 1.0), model("bc-safe", 0.5, 1.2)])
    assert [row["algorithm"] for row in rows] == ["cdt", "bc-safe"]
    assert rows[0]["normalised_return"] == pytest.approx(0.6)
    assert rows[0]["normalised_return_spread"] == pytest.approx(0.08**0.5)
    assert (rows[0]["models"], rows[0]["safe"]) == (2, True)
    assert (rows[1]["models"], rows[1]["safe"], rows[1]["normalised_cost_spread"]) == (1, False, 0.0)


def test_entrants_with_different_limits_share_a_role() -> None:
    rows = over_seeds([model("best-expert", 0.4, 0.8, "10"), model("best-expert", 0.6, 0.8, "20")])
    assert [(row["cost_limit"], row["normalised_return"]) for row in rows] == [(10.0, 0.4), (20.0, 0.6)]


def test_comparisons_give_the_lead_over_each_reference() -> None:
    rows = over_seeds([model("cdt", 0.7, 0.8), model("random", -0.1, 3.0), model("worst-expert", 0.4, 0.5)])
    found = comparisons(rows, ("random", "worst-expert", "best-expert"))
    assert len(found) == 1
    assert found[0]["lead_over_random"] == pytest.approx(0.8)
    assert found[0]["lead_over_worst-expert"] == pytest.approx(0.3)
    assert found[0]["safe"]


def test_the_experts_to_compare_with() -> None:
    index = [
        {"name": "a", "episode_return": 10.0, "cost_return": 5.0},
        {"name": "b", "episode_return": 30.0, "cost_return": 25.0},
        {"name": "c", "episode_return": 50.0, "cost_return": 60.0},
        {"name": "d", "episode_return": 5.0, "cost_return": 90.0},
    ]
    assert expert_extremes(index, (1.0, 10.0, 40.0)) == ("d", {1.0: "a", 10.0: "a", 40.0: "b"})


def test_the_random_policy_does_not_depend_on_processes_and_meets_the_same_episodes() -> None:
    seeds = episode_seeds(3, 3)
    assert seeds == episode_seeds(3, 3) != episode_seeds(4, 3)
    jobs = [Job("BallCircle", None, limit, seeds, 2) for limit in (10.0, 20.0)]
    done: list[int] = []
    here, there = run_jobs(jobs, 1, done.append), run_jobs(jobs, 2)
    assert done == [1, 2]
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a.returns, b.returns)
        np.testing.assert_array_equal(a.costs, b.costs)
    np.testing.assert_array_equal(here[0].returns, here[1].returns)
    assert len(set(here[0].returns.tolist())) == 3


# -- the stages ---------------------------------------------------------------------------------

TRAIN = {
    "bc": {"steps": 4, "batch_size": 16, "hidden": [8], "checkpoint_every": 2, "policies": 1},
    "cdt": {
        "steps": 2, "batch_size": 8, "context": 3, "width": 8, "layers": 1, "heads": 2,
        "augmentation": {"min_per_cell": 0}, "checkpoint_every": 2,
    },
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """A filtered data set, the verdict on it, and two experts."""
    filtered, verdict, experts = (tmp_path / name for name in ("filtered", "validated", "experts"))
    filtered.mkdir()
    write_dsrl(filtered / "dataset.hdf5", spread(12))
    write_json(verdict / "verdict.json", {"data_digest": tree_digest(filtered), "success": True})
    index = []
    for number, name in enumerate(("first", "last")):
        expert_model(experts / name).rename(experts / "moved")
        (experts / name).rmdir()
        (experts / "moved").rename(experts / name)
        index.append({"name": name, "episode_return": float(number), "cost_return": 10.0})
    write_json(experts / "index.json", index)
    return {"filter": filtered, "validate": verdict, "experts": experts}


def trained(data: dict[str, Path], out: Path, algorithm: str, seed: int) -> dict:
    item = {"task": "BallCircle", "algorithm": algorithm, "seed": str(seed)}
    inputs = {name: data[name] for name in ("filter", "validate")}
    stage = for_test(load(train.Params, {"algorithms": TRAIN}, "p"), out, inputs, item, seed=seed, stage="train")
    train.run(stage)
    return {"models": stage.record.models, "datasets": stage.record.datasets, "metrics": stage.record.metrics}


def test_train_and_evaluate_end_to_end(data: dict[str, Path], tmp_path: Path) -> None:
    models = tmp_path / "models"
    for algorithm in ("cdt", "bc-safe"):
        for seed in (0, 1):
            (models / algorithm).mkdir(parents=True, exist_ok=True)
            record = trained(data, models / algorithm / str(seed), algorithm, seed)
            assert record["models"][0]["kind"] == "policy"
            assert record["models"][0]["facts"] == {"task": "BallCircle", "algorithm": algorithm, "seed": str(seed)}
            assert record["datasets"][0]["role"] == "training"
            lines = (models / algorithm / str(seed) / "history.csv").read_text().splitlines()
            assert lines[0].startswith("step,loss")
    inputs = {"train": models, "experts": data["experts"], "filter": data["filter"]}
    params = load(evaluate.Params, {"episodes": 2, "num_envs": 2, "processes": 1, "selection_episodes": 1}, "p")
    outs = []
    for name in ("one", "two"):
        stage = for_test(params, tmp_path / name, inputs, {"task": "BallCircle"}, seed=1, stage="evaluate")
        evaluate.run(stage)
        outs.append(tmp_path / name)
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == ["episodes.parquet", "frontier.csv", "frontier.png", "leaderboard.csv", "summary.json"]
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    summary = read_json(outs[0] / "summary.json")
    found = [(entry["algorithm"], entry["seed"]) for entry in summary["models"]]
    assert found == [("bc-safe", 0), ("bc-safe", 1), ("cdt", 0), ("cdt", 1)]
    assert summary["models"][2]["digest"] == tree_digest(models / "cdt" / "0" / "model")
    assert summary["models"][2]["path"].endswith("cdt/0/model")
    assert set(summary["models"][0]["limits"]) == {"10", "20", "40"}
    chosen = summary["feasible_first"]  # CDT kept no policies on the way
    assert [(entry["algorithm"], entry["seed"]) for entry in chosen] == [("bc-safe", 0), ("bc-safe", 1)]
    for entry, last in zip(chosen, summary["models"], strict=False):
        for limit, values in entry["limits"].items():
            assert values["step"] in (2, None)
            if values["step"] is None:
                assert {key: value for key, value in values.items() if key != "step"} == last["limits"][limit]
    board = (outs[0] / "leaderboard.csv").read_text()
    assert board.startswith("checkpoint,")
    assert board.count("feasible-first,bc-safe") == 3
    assert board.count("last,") == len(summary["leaderboard"])
    assert [entry["algorithm"] for entry in summary["references"]] == ["random", "worst-expert", "best-expert"]
    episodes = read_table(outs[0] / "episodes.parquet").to_pydict()
    assert len(episodes["algorithm"]) == (4 + 3) * 3 * 2
    assert set(episodes["episode_seed"]) == set(episode_seeds(1, 2))
    assert set(stage.record.metrics) == {"bc-safe", "cdt", "random", "worst-expert", "best-expert"}
    assert set(stage.record.metrics["cdt"]["20"]) == {"normalised_return", "normalised_cost", "violation_probability"}


def test_training_refuses_data_without_a_verdict_of_their_own(data: dict[str, Path], tmp_path: Path) -> None:
    write_json(data["validate"] / "verdict.json", {"data_digest": "0" * 64, "success": True})
    with pytest.raises(BadInput, match="the verdict is on other data"):
        trained(data, tmp_path / "out", "bc-safe", 0)
    write_json(data["validate"] / "verdict.json", {"data_digest": tree_digest(data["filter"]), "success": False})
    with pytest.raises(Finding, match="failed validation"):
        trained(data, tmp_path / "out", "bc-safe", 0)


def test_an_unknown_algorithm_is_named_with_the_known_ones(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        BadInput,
        match=r"rl.algorithms: unknown offline algorithm 'bc-bold'. Did you mean .*, cdt,",
    ):
        trained(data, tmp_path / "out", "bc-bold", 0)


def test_evaluation_refuses_no_models_and_models_of_another_task(data: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="no policy folder below"):
        evaluate.models([empty], tmp_path, BALL)
    (tmp_path / "cdt").mkdir()
    trained(data, tmp_path / "cdt" / "0", "cdt", 0)
    config = tmp_path / "cdt" / "0" / "model" / "config.json"
    write_json(config, {**read_json(config), "task": "CarRun"})
    with pytest.raises(BadInput, match="trained for CarRun, not for BallCircle"):
        evaluate.models([tmp_path / "cdt"], tmp_path, BALL)
