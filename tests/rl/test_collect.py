"""The collect stage: every episode is tied to its policy, the files agree, and no fault loses what was finished."""

import dataclasses
from dataclasses import replace

import h5py
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest, tree_files
from springhead.params import load
from springhead.rl.acting import load_expert
from springhead.rl.collection import Buffer, make_plan
from springhead.rl.dataset import iter_minari, read_dsrl, write_dsrl
from springhead.rl.envs import make, run_episodes
from springhead.rl.facts import Fact, sums, write_rows
from springhead.rl.filters import Ranges
from springhead.rl.tasks import task
from springhead.stage import for_test
from springhead.tables import read_table
from stages.rl import collect, experts
from tests.rl.test_experts import PARAMS as EXPERTS

pytestmark = pytest.mark.unit

PARAMS = collect.Params(sampled_episodes=3, mean_episodes=1, num_envs=2)


@pytest.fixture(scope="module")
def expert_folder(tmp_path_factory):
    params = dataclasses.replace(EXPERTS, runs={"ppo-lag": 1}, policies=2)
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


def test_where_no_episode_keeps_a_limit_there_is_no_best_return():
    facts = [
        Fact(0, place, str(place), None, "a", None, None, None, None, value, cost, (), 1)
        for place, (value, cost) in enumerate([(500.0, 90.0), (800.0, 15.0)])
    ]
    found = collect.coverage(facts, task("BallCircle"))
    assert found["limit_10"] == {"safe_episodes": 0}
    assert found["limit_20"] == {"safe_episodes": 1, "best_return": 800.0}


@pytest.mark.fault
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_weights_that_are_no_factors_are_refused(weight):
    values = {"sampled_episodes": 1, "mean_episodes": 1, "num_envs": 1, "weights": {"ppo-lag": weight}}
    with pytest.raises(BadInput, match="here: weights must be finite and not negative"):
        load(collect.Params, values, "here")


@pytest.mark.fault
def test_weights_that_leave_everybody_out_are_named(expert_folder, tmp_path):
    params = replace(PARAMS, weights={"ppo-lag": 0.0})
    stage = for_test(params, tmp_path / "out", {"experts": expert_folder}, {"task": "BallRun"})
    with pytest.raises(BadInput, match=r"rl\.collect\.weights leave out every expert of BallRun"):
        collect.run(stage)


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
    with pytest.raises(BadInput, match="no experts and nothing imported"):
        collect.run(stage)


def test_weights_mix_policies_and_algorithms(expert_folder, tmp_path):
    index = read_json(expert_folder / "index.json")
    first, second = (line["name"] for line in index)
    plans = make_plan(index, 3, 1, {"ppo-lag": 2.0, second: 0.0}, 4, 9)
    assert [(plan.expert["name"], len(plan.seeds), plan.deterministic) for plan in plans] == [
        (first, 4, False), (first, 2, False), (first, 2, True),
    ]  # fmt: skip
    same = make_plan(index, 3, 1, {second: 1.0}, 4, 9)
    assert [plan.seeds for plan in same] == [plan.seeds for plan in make_plan(index, 3, 1, {}, 4, 9)]
    assert [len(plan.seeds) for plan in make_plan(index, 2, 1, {"ppo-lag": 0.01}, 4, 9)] == [1, 1]
    assert [plan.deterministic for plan in make_plan(index, 1, 2, {second: 0.01, first: 0.0}, 4, 9)] == [True]
    with pytest.raises(BadInput, match=r"weights names sac-lag; the experts have ppo-lag, ppo-lag-0-00, "):
        make_plan(index, 3, 1, {"sac-lag": 2.0}, 4, 9)


def test_sub_costs_reach_every_format(collected):
    of = task("BallRun")
    data = read_dsrl(collected.out / "dataset.hdf5")
    rows = read_table(collected.out / "rows.parquet").to_pylist()
    folder = collected.out / "minari/springhead/BallRun-v0"
    assert data.sub_costs.shape == (800, len(of.sub_costs)) and len(of.sub_costs) > 1
    assert [e.id for e in iter_minari(folder, "cost", of.sub_costs)] == [row["id"] for row in rows]
    for row, episode in zip(rows, data.episodes(), strict=True):
        assert row["sub_cost_returns"] == episode.sub_cost_returns
        assert row["source"] is None
    said = read_json(folder / "data/metadata.json")
    assert said["algorithm_name"] == "ppo-lag"
    with h5py.File(folder / "data/main_data.hdf5") as stored:
        for number, row in enumerate(rows):
            about = stored[f"episode_{number}"].attrs
            assert {key: about[key] for key in ("seed", "policy", "cost_limit")} == {
                key: row[key] for key in ("seed", "policy", "cost_limit")
            }


def test_the_bytes_do_not_depend_on_the_number_of_processes(collected, expert_folder, tmp_path):
    params = dataclasses.replace(PARAMS, processes=2)
    stage = for_test(params, tmp_path / "out", {"experts": expert_folder}, {"task": "BallRun"}, seed=9)
    collect.run(stage)
    assert tree_files(stage.out) == tree_files(collected.out)


def test_rejected_episodes_are_in_no_file_but_in_the_decisions(expert_folder, tmp_path, collected):
    everything = read_table(collected.out / "rows.parquet").to_pylist()
    costs = sorted(row["cost_return"] for row in everything)
    params = dataclasses.replace(PARAMS, buffers={"BallRun": Buffer(3, Ranges(cost_max=costs[5]))})
    stage = for_test(params, tmp_path / "out", {"experts": expert_folder}, {"task": "BallRun"}, seed=9)
    collect.run(stage)
    rows = read_table(stage.out / "rows.parquet").to_pylist()
    decisions = read_table(stage.out / "decisions.parquet").to_pylist()
    assert len(rows) == 3
    assert [e.id for e in read_dsrl(stage.out / "dataset.hdf5").episodes()] == [row["id"] for row in rows]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert {d["id"] for d in decisions} == {row["id"] for row in everything}
    dropped = {d["id"] for d in decisions if not d["kept"]}
    assert dropped == {row["id"] for row in everything} - {row["id"] for row in rows}
    assert stage.record.metrics["rejected"] == 5


# -- imports ----------------------------------------------------------------------------------


def imported_into(folder, episodes, source="ab" * 32):
    """What the imports stage hands over."""
    folder.mkdir()
    write_dsrl(folder / "dataset.hdf5", episodes, task("BallRun").sub_costs)
    nothing = dict.fromkeys(("policy", "cost_limit", "seed", "deterministic"))
    facts = [
        Fact(group=-1, place=i, algorithm="imported", source=source, **nothing, **sums(e))
        for i, e in enumerate(episodes)
    ]
    write_rows(folder / "rows.parquet", facts)
    write_json(folder / "index.json", [{"name": "x", "sha256": source, "format": "dsrl", "episodes": len(episodes)}])
    return folder


@pytest.mark.parametrize("with_parts", [True, False])
def test_imported_episodes_come_first_and_name_their_source(collected, expert_folder, tmp_path, with_parts):
    own = read_dsrl(collected.out / "dataset.hdf5").episodes()
    other = [replace(e, rewards=e.rewards + 1, sub_costs=e.sub_costs if with_parts else None) for e in own[:2]]
    folder = imported_into(tmp_path / "imports", other)
    inputs = {"experts": expert_folder, "imports": folder}
    stage = for_test(PARAMS, tmp_path / "out", inputs, {"task": "BallRun"}, seed=9)
    collect.run(stage)
    data = read_dsrl(stage.out / "dataset.hdf5")
    rows = read_table(stage.out / "rows.parquet").to_pylist()
    assert [e.id for e in data.episodes()] == [row["id"] for row in rows]
    assert [row["source"] for row in rows] == ["ab" * 32] * 2 + [None] * 8
    assert [row["policy"] is None for row in rows] == [True] * 2 + [False] * 8
    assert [row["id"] for row in rows[:2]] == [e.id for e in other]
    # Sub-costs are there for all episodes or for none; without them an episode has another id.
    assert (data.sub_costs is not None) == with_parts
    assert [row["id"] for row in rows[2:]] == [(e if with_parts else replace(e, sub_costs=None)).id for e in own]
    assert len(list(iter_minari(stage.out / "minari/springhead/BallRun-v0"))) == 10


def test_imports_alone_are_enough_and_copies_count_once(collected, tmp_path):
    own = read_dsrl(collected.out / "dataset.hdf5").episodes()
    folder = imported_into(tmp_path / "imports", own[:5])
    (tmp_path / "experts").mkdir()
    write_json(tmp_path / "experts/index.json", [])
    inputs = {"experts": tmp_path / "experts", "imports": folder}
    params = dataclasses.replace(PARAMS, buffers={"BallRun": Buffer(3)})
    stage = for_test(params, tmp_path / "out", inputs, {"task": "BallRun"})
    collect.run(stage)
    left = [e.id for e in read_dsrl(stage.out / "dataset.hdf5").episodes()]
    assert len(left) == 3 and set(left) < {e.id for e in own[:5]}
    assert read_json(stage.out / "minari/springhead/BallRun-v0/data/metadata.json")["algorithm_name"] == "imported"


def test_nothing_imported_changes_nothing(collected, expert_folder, tmp_path):
    (tmp_path / "imports").mkdir()
    write_json(tmp_path / "imports/index.json", [])
    inputs = {"experts": expert_folder, "imports": tmp_path / "imports"}
    stage = for_test(PARAMS, tmp_path / "out", inputs, {"task": "BallRun"}, seed=9)
    collect.run(stage)
    assert tree_files(stage.out) == tree_files(collected.out)


@pytest.mark.fault
def test_imports_whose_rows_are_of_other_episodes_are_refused(collected, expert_folder, tmp_path):
    own = read_dsrl(collected.out / "dataset.hdf5").episodes()
    folder = imported_into(tmp_path / "imports", own[:2])
    write_dsrl(folder / "dataset.hdf5", own[2:4])
    inputs = {"experts": expert_folder, "imports": folder}
    with pytest.raises(BadInput, match="name different episodes; import them again"):
        collect.run(for_test(PARAMS, tmp_path / "out", inputs, {"task": "BallRun"}, seed=9))
