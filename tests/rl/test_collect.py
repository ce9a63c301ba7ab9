"""The collect stage: every episode is tied to its policy, and the files agree with each other."""

import dataclasses

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest, tree_files
from springhead.rl.dataset import read_dsrl
from springhead.rl.envs import make, run_episodes
from springhead.rl.networks import load_expert
from springhead.stage import for_test
from springhead.tables import read_table
from stages.rl import collect, experts
from tests.rl.test_experts import PARAMS as EXPERTS

pytestmark = pytest.mark.unit

PARAMS = collect.Params(sampled_episodes=3, mean_episodes=1, num_envs=2)


@pytest.fixture(scope="module")
def expert_folder(tmp_path_factory):
    params = dataclasses.replace(EXPERTS, runs=1, policies=2)
    stage = for_test(params, tmp_path_factory.mktemp("rl") / "experts", {}, {"task": "BallRun"})
    experts.run(stage)
    return stage.out


@pytest.fixture(scope="module")
def collected(expert_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "collect"
    stage = for_test(PARAMS, out, {"experts": expert_folder}, {"task": "BallRun"}, seed=9)
    collect.run(stage)
    return stage


def test_rows_and_file_agree(collected, expert_folder):
    data = read_dsrl(collected.out / "dataset.hdf5")
    rows = read_table(collected.out / "rows.parquet").to_pylist()
    assert len(data) == len(rows) == 8
    index = read_json(expert_folder / "index.json")
    for position, (row, episode) in enumerate(zip(rows, data.episodes(), strict=True)):
        assert row["index"] == position
        assert row["id"] == episode.id
        assert row["length"] == episode.length == 100
        assert row["episode_return"] == episode.episode_return
        assert row["cost_return"] == episode.cost_return
        assert row["parents"] == []
        expert = index[position // 4]
        assert (row["policy"], row["cost_limit"]) == (expert["digest"], expert["cost_limit"])
        assert row["deterministic"] == (position % 4 == 3)
    assert len({row["id"] for row in rows}) == 8
    assert len({row["seed"] for row in rows}) == 8


def test_a_row_says_how_to_make_its_episode_again(collected, expert_folder):
    rows = read_table(collected.out / "rows.parquet").to_pylist()
    by_digest = {line["digest"]: line["name"] for line in read_json(expert_folder / "index.json")}
    row = next(r for r in rows if r["deterministic"])
    policy = load_expert(expert_folder / by_digest[row["policy"]])
    [episode] = run_episodes("BallRun", policy, [row["seed"]], row["cost_limit"], PARAMS.num_envs)
    assert episode.id == row["id"]
    # And the recorded actions alone replay it in a fresh environment.
    env = make("BallRun")
    observation, _ = env.reset(seed=row["seed"])
    for before, action, reward in zip(episode.observations, episode.actions, episode.rewards, strict=True):
        np.testing.assert_array_equal(observation, before)
        observation, got, *_ = env.step(action)
        assert np.float32(got) == reward


def test_collected_again_gives_the_same_bytes(collected, expert_folder, tmp_path):
    again = for_test(PARAMS, tmp_path / "again", {"experts": expert_folder}, {"task": "BallRun"}, seed=9)
    collect.run(again)
    assert tree_files(again.out) == tree_files(collected.out)
    other = for_test(PARAMS, tmp_path / "other", {"experts": expert_folder}, {"task": "BallRun"}, seed=10)
    collect.run(other)
    assert tree_digest(other.out) != tree_digest(collected.out)


def test_metrics_say_how_the_episodes_spread(collected):
    data = read_dsrl(collected.out / "dataset.hdf5")
    metrics = collected.record.metrics
    assert metrics["episodes"] == 8
    assert metrics["steps"] == 800
    assert metrics["lowest_cost"] == data.cost_returns.min()
    safe = data.cost_returns <= 20
    assert metrics["limit_20"]["safe_episodes"] == safe.sum()
    assert metrics["limit_20"]["best_return"] == pytest.approx(data.episode_returns[safe].max())


@pytest.mark.fault
def test_a_swapped_policy_is_named(expert_folder, tmp_path):
    index = read_json(expert_folder / "index.json")
    changed = tmp_path / "experts"
    changed.mkdir()
    for line in index:
        (changed / line["name"]).symlink_to(expert_folder / line["name"])
    index[1]["digest"] = "0" * 64
    write_json(changed / "index.json", index)
    stage = for_test(PARAMS, tmp_path / "out", {"experts": changed}, {"task": "BallRun"})
    with pytest.raises(BadInput, match=r"0-01.*digest differs"):
        collect.run(stage)
    write_json(changed / "index.json", [])
    with pytest.raises(BadInput, match="names no policies"):
        collect.run(stage)
