"""Every offline algorithm goes through the train and the evaluate stage, and what comes out can be loaded and acts."""

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from springhead import evidence
from springhead.errors import BadInput
from springhead.evidence import Sources
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest
from springhead.rl.dataset import write_dsrl
from springhead.rl.offline.algorithms import ALGORITHMS, entry
from springhead.rl.policy import load_policy
from springhead.stage import for_test
from stages.rl import evaluate, train
from tests.rl.offline_data import BALL, spread
from tests.rl.test_policy import expert_model

pytestmark = pytest.mark.unit

SMALL = {"steps": 3, "batch_size": 4, "hidden": [8], "vae_hidden": [8, 8], "policies": 1, "checkpoint_every": 2,
         "width": 8, "layers": 1, "heads": 2, "context": 2, "samples": 2}  # fmt: skip
"""What an algorithm has of these, it is given."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline") / "filter"
    folder.mkdir()
    write_dsrl(folder / "dataset.hdf5", spread(12, 100))
    write_json(folder.parent / "verdict.json", {"data_digest": tree_digest(folder), "success": True})
    (folder.parent / "experts").mkdir()
    write_json(folder.parent / "experts/index.json", [])
    return folder


def params(algorithm: str) -> train.Params:
    found = entry(algorithm)
    known = {field.name for field in fields(found.settings_class())}
    chosen: dict[str, Any] = {key: value for key, value in SMALL.items() if key in known}
    if algorithm == "cdt":
        chosen |= {"augmentation": {"min_per_cell": 0}}
        del chosen["hidden"]
    return train.Params({found.block: chosen})


def test_limits_of_ones_own_are_evaluated(data: Path, tmp_path: Path) -> None:
    inputs = {"filter": data, "validate": data.parent / "verdict.json", "experts": data.parent / "experts"}
    chosen = train.Params({"bc": {"steps": 3, "batch_size": 4, "hidden": [8], "limits": [15, 30]}})
    for algorithm in ("bc-safe", "bc-all", "bc-multi-task"):
        item = {"task": "BallCircle", "algorithm": algorithm, "seed": "0"}
        train.run(for_test(chosen, tmp_path / "train" / algorithm / "0", inputs, item))
    asked = evaluate.Params(episodes=1, num_envs=1, processes=1, selection_episodes=1)
    judged = for_test(asked, tmp_path / "evaluate", {**inputs, "train": tmp_path / "train"}, {"task": "BallCircle"})
    evaluate.run(judged)
    models = {one["algorithm"]: one["limits"] for one in read_json(judged.out / "summary.json")["models"]}
    assert sorted(models["bc-safe"]) == ["15", "20", "30", "40"]
    # One network for all limits is asked for the same.
    assert sorted(models["bc-multi-task"]) == ["15", "20", "30", "40"]
    # It knows no limits: its one episode is compared with each of them.
    assert sorted(models["bc-all"]) == ["10", "20", "40"]
    assert len({one["episode_return"] for one in models["bc-all"].values()}) == 1


def test_cdt_is_asked_for_its_own_limits_and_the_leaderboard_says_which_checkpoint(data: Path, tmp_path: Path) -> None:
    inputs = {"filter": data, "validate": data.parent / "verdict.json", "experts": data.parent / "experts"}
    chosen = train.Params({"cdt": {**params("cdt").algorithms["cdt"], "limits": [30, 15], "policies": 0}})
    item = {"task": "BallCircle", "algorithm": "cdt", "seed": "0"}
    train.run(for_test(chosen, tmp_path / "train/cdt/0", inputs, item))
    asked = evaluate.Params(episodes=1, num_envs=1, processes=1, selection_episodes=1)
    judged = for_test(asked, tmp_path / "evaluate", {**inputs, "train": tmp_path / "train"}, {"task": "BallCircle"})
    evaluate.run(judged)
    assert sorted(read_json(judged.out / "summary.json")["models"][0]["limits"]) == ["15", "20", "30", "40"]
    with (judged.out / "leaderboard.csv").open(encoding="utf-8") as file:
        assert {row["checkpoint"] for row in csv.DictReader(file)} == {"last"}  # no policies were kept on the way


def evaluated(data: Path, folder: Path, **limits: list[float]) -> tuple[dict[str, Any], Sources]:
    """The summary of cdt and bc-safe trained for limits of their own, and where gates that ask for the middle read."""
    inputs = {"filter": data, "validate": data.parent / "verdict.json", "experts": folder / "experts"}
    costs = {"dear": 35.0, "cheap": 12.0}
    for name in costs:
        expert_model(inputs["experts"] / name)
    index = [{"name": f"{name}/model", "episode_return": cost, "cost_return": cost} for name, cost in costs.items()]
    write_json(inputs["experts"] / "index.json", index)
    for algorithm, own in limits.items():
        block = entry(name := algorithm.replace("_", "-")).block
        chosen = train.Params({block: {**params(name).algorithms[block], "limits": own, "policies": 0}})
        item = {"task": "BallCircle", "algorithm": name, "seed": "0"}
        train.run(for_test(chosen, folder / "train" / name / "0", inputs, item))
    asked = evaluate.Params(episodes=1, num_envs=1, processes=1, selection_episodes=0)
    judged = for_test(asked, folder / "evaluate", {**inputs, "train": folder / "train"}, {"task": "BallCircle"})
    evaluate.run(judged)
    return read_json(judged.out / "summary.json"), Sources("", "summary.json", "", None, "middle")


def reference_limits(summary: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in summary["references"]:
        found.setdefault(one["algorithm"], []).extend(one["limits"])
    return {name: sorted(limits, key=float) for name, limits in found.items()}


@pytest.mark.parametrize(
    ("limits", "measured", "middle"),
    [
        ({"cdt": [15, 30]}, ["15", "20", "30", "40"], "30"),
        ({"cdt": [15, 30], "bc_safe": [12, 14]}, ["12", "14", "15", "20", "30", "40"], "40"),
        ({"cdt": [], "bc_safe": []}, ["10", "20", "40"], "20"),
    ],
)
def test_gates_find_every_reference_at_the_limit_by_which_they_choose(
    limits: dict[str, list[float]], measured: list[str], middle: str, data: Path, tmp_path: Path
) -> None:
    summary, sources = evaluated(data, tmp_path, **limits)
    assert reference_limits(summary) == dict.fromkeys(evaluate.REFERENCES, measured)
    assert evidence._limit(summary, sources) == middle
    assert all(middle in model["limits"] for model in summary["models"])


def test_models_without_a_limit_in_common_are_named(data: Path, tmp_path: Path) -> None:
    summary, sources = evaluated(data, tmp_path, cdt=[15, 30], bc_safe=[50, 60])
    assert reference_limits(summary)["random"] == ["15", "20", "30", "40", "50", "60"]
    message = r"summary\.json: no cost limit .*\(bc-safe: 50, 60; cdt: 15, 20, 30, 40\); .*`limits` in rl\.train"
    with pytest.raises(BadInput, match=message):
        evidence._limit(summary, sources)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_it_is_trained_evaluated_and_loaded(algorithm: str, data: Path, tmp_path: Path) -> None:
    inputs = {"filter": data, "validate": data.parent / "verdict.json", "experts": data.parent / "experts"}
    item = {"task": "BallCircle", "algorithm": algorithm, "seed": "4"}
    trained = for_test(params(algorithm), tmp_path / "train" / algorithm / "4", inputs, item, seed=4)
    train.run(trained)
    assert any("loss" in name or name.startswith("advantage_error") for name in trained.record.metrics)
    config = read_json(trained.out / "model/config.json")
    assert (config["task"], config["algorithm"]) == ("BallCircle", algorithm)
    assert [path.name for path in (trained.out / "policies").iterdir()] == ["00000002"]

    asked = evaluate.Params(episodes=1, num_envs=1, processes=1, selection_episodes=1)
    judged = for_test(asked, tmp_path / "evaluate", {**inputs, "train": tmp_path / "train"}, {"task": "BallCircle"})
    evaluate.run(judged)
    summary = read_json(judged.out / "summary.json")
    assert [(one["algorithm"], one["seed"]) for one in summary["models"]] == [(algorithm, 4)]
    assert sorted(summary["models"][0]["limits"]) == ["10", "20", "40"]
    with (judged.out / "leaderboard.csv").open(encoding="utf-8") as file:
        rows = [(row["checkpoint"], row["algorithm"]) for row in csv.DictReader(file)]
    assert rows.count(("last", algorithm)) == rows.count(("feasible-first", algorithm)) == 3

    policy = load_policy(trained.out / "model")
    policy.reset(2, 20.0)
    actions = policy.act(np.zeros((2, BALL.observation_dim), dtype=np.float32))
    assert actions.shape == (2, BALL.action_dim)
    assert np.isfinite(actions).all()
