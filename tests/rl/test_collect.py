"""The collect stage: every episode is tied to its policy, the files agree, and no fault loses what was finished."""

import dataclasses
import errno
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import psutil
import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest, tree_files
from springhead.progress import Progress
from springhead.rl import envs
from springhead.rl.acting import load_expert
from springhead.rl.collection import Buffer, make_plan, select
from springhead.rl.dataset import iter_minari, read_dsrl, write_dsrl
from springhead.rl.envs import make, run_episodes
from springhead.rl.facts import Fact, sums, write_rows
from springhead.rl.filters import Ranges, Thin, thin
from springhead.rl.tasks import task
from springhead.rl.workers import SimulatorFault
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


# -- which episodes are kept ------------------------------------------------------------------


def plane(number, seed=0):
    generator = np.random.default_rng(seed)
    return [
        Fact(0, place, f"{place:04x}", "p", "ppo-lag", 1.0, place, False, None, float(value), float(cost), (), 10)
        for place, (value, cost) in enumerate(zip(generator.normal(size=number), generator.gamma(1, 30, number)))
    ]


def test_without_rules_everything_is_kept_but_copies():
    facts = plane(20)
    chosen = select([*facts, facts[3]], Buffer(), 0)
    assert chosen.kept == facts
    assert chosen.duplicates == 1
    assert chosen.decisions["id"] == []


def test_ranges_reject_and_say_so():
    facts = plane(200)
    chosen = select(facts, Buffer(keep=Ranges(cost_max=50.0, return_min=-1.0)), 0)
    assert chosen.kept == [fact for fact in facts if fact.cost_return <= 50 and fact.episode_return >= -1]
    dropped = {i for i, kept in zip(chosen.decisions["id"], chosen.decisions["kept"], strict=True) if not kept}
    assert dropped == {fact.id for fact in facts} - {fact.id for fact in chosen.kept}
    by_id = {fact.id: fact for fact in facts}
    table = zip(*(chosen.decisions[name] for name in ("id", "rule", "kept", "value", "threshold")), strict=True)
    for row, rule, kept, value, threshold in table:
        if rule == "range-cost-max":
            assert (value, threshold, kept) == (by_id[row].cost_return, 50.0, value <= 50.0)
    with pytest.raises(BadInput, match="rejects every episode"):
        select(facts, Buffer(keep=Ranges(cost_max=-1.0)), 0)


def test_the_buffer_grows_to_half_as_much_again_and_is_thinned_over_the_plane():
    facts = plane(1000)
    chosen = select(facts, Buffer(100), 7)
    assert len(chosen.kept) == 100
    order = [fact.place for fact in chosen.kept]
    assert order == sorted(order)
    ids, kept = chosen.decisions["id"], chosen.decisions["kept"]
    assert sorted(ids) == sorted(fact.id for fact in facts)  # one decision each
    assert {i for i, k in zip(ids, kept, strict=True) if k} == {fact.id for fact in chosen.kept}
    # Thinned before the end: by hand, the first 151 episodes give the first 51 that are dropped.
    returns = np.array([fact.episode_return for fact in facts[:151]])
    costs = np.array([fact.cost_return for fact in facts[:151]])
    first = thin(returns, costs, Thin(100), np.random.default_rng([7, 0]))
    assert set(ids[:51]) == {facts[position].id for position in np.flatnonzero(~first.kept)}
    # Spread: rare corners of the plane survive more often than the crowd.
    rare = {fact.id for fact in facts if fact.cost_return > 100}
    assert sum(fact.id in rare for fact in chosen.kept) / len(rare) > 2 * 100 / 1000
    assert select(facts, Buffer(100), 7).kept == chosen.kept
    assert select(facts, Buffer(100), 8).kept != chosen.kept
    assert len(select(facts[:120], Buffer(100), 7).kept) == 100
    assert select(facts[:100], Buffer(100), 7).kept == facts[:100]


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


# -- faults -----------------------------------------------------------------------------------

MORE = dataclasses.replace(PARAMS, sampled_episodes=6, mean_episodes=2)


def stage_in(folder, expert_folder, params=MORE):
    shutil.rmtree(folder / "out", ignore_errors=True)  # as the harness gives it
    return for_test(params, folder / "out", {"experts": expert_folder}, {"task": "BallRun"}, seed=9)


def shards_of(stage):
    return sorted((stage.scratch / "shards").glob("0*"))


@pytest.fixture(scope="module")
def whole(expert_folder, tmp_path_factory):
    stage = stage_in(tmp_path_factory.mktemp("whole"), expert_folder)
    collect.run(stage)
    assert len(shards_of(stage)) == 8
    return tree_files(stage.out)


def main(folder, expert_folder, processes):
    """The body of a process that is killed."""
    collect.run(stage_in(folder, expert_folder, dataclasses.replace(MORE, processes=int(processes))))


@pytest.mark.fault("F29")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(expert_folder, tmp_path, whole, processes):
    generator = np.random.default_rng()
    command = [
        sys.executable, "-c", "import sys; from pathlib import Path; from tests.rl.test_collect import main; "
        "main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])", str(tmp_path), str(expert_folder), str(processes),
    ]  # fmt: skip
    shards = tmp_path / ".out-root/scratch/shards"
    done = []
    for kill in range(4 - processes):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # Not while Python still imports: from the moment there is one more shard than before.
        while running.poll() is None and len(list(shards.glob("0*"))) <= len(done):
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.05))
        running.kill()
        running.wait()
        assert running.returncode == -signal.SIGKILL, f"kill {kill} came too late"
        now = [path.name for path in sorted(shards.glob("0*"))]
        assert set(done) < set(now)  # nothing that was finished is lost
        done = now
    stage = stage_in(tmp_path, expert_folder)
    before = {path: path.stat().st_mtime_ns for path in shards_of(stage)}
    collect.run(stage)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nor made again
    assert tree_files(stage.out) == whole


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.fault("F30")
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_shard_is_named_and_collected_again(expert_folder, tmp_path, whole, how, capsys):
    stage = stage_in(tmp_path, expert_folder)
    collect.run(stage)
    hurt = shards_of(stage)[3]
    others = {path: path.stat().st_mtime_ns for path in shards_of(stage) if path != hurt}
    damage(hurt, how)
    stage = stage_in(tmp_path, expert_folder)
    collect.run(stage)
    line = next(line for line in capsys.readouterr().err.splitlines() if "is damaged" in line)
    assert str(hurt) in line
    assert "its 2 episodes are collected again" in line
    assert tree_files(stage.out) == whole
    assert {path: path.stat().st_mtime_ns for path in shards_of(stage) if path != hurt} == others


@pytest.mark.fault("F30")
def test_a_shard_damaged_while_the_stage_runs_is_never_used(expert_folder, tmp_path, whole, monkeypatch):
    stage = stage_in(tmp_path, expert_folder)

    def late(*arguments):
        damage(shards_of(stage)[3], "flipped")
        return select(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "select", late)
        with pytest.raises(BadInput, match="the shard of group 3 was damaged while the stage ran; run the stage again"):
            collect.run(stage)
    again = stage_in(tmp_path, expert_folder)
    collect.run(again)
    assert tree_files(again.out) == whole


@pytest.mark.fault("F12")
def test_a_full_disk_keeps_the_finished_shards(expert_folder, tmp_path, whole):
    stage = stage_in(tmp_path, expert_folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(bar, n=1, **figures):
        if len(shards_of(stage)) == 3:  # from here on a file of more than 4 kB is one too large
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", fill)
        try:
            with pytest.raises(OSError, match=r"shards/000003-") as caught:
                collect.run(stage)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path.name[:6] for path in sorted((stage.scratch / "shards").iterdir())] == ["000000", "000001", "000002"]
    kept = {path: path.stat().st_mtime_ns for path in shards_of(stage)}
    again = stage_in(tmp_path, expert_folder)
    collect.run(again)
    assert tree_files(again.out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def breaking(seed, at, where):
    """An environment whose simulator returns NaN at one step of one episode; the runner leaves wrappers out."""
    env = envs.make("BallRun")
    base, state = env.unwrapped, {}
    reset, step = base.reset, base.step

    def note(*, seed=None, options=None):
        state.update(seed=seed, step=0)
        return reset(seed=seed, options=options)

    def broken(action):
        observation, reward, terminated, truncated, info = step(action)
        if (state["seed"], state["step"]) == (seed, at):
            if where == "next_observations":
                observation = observation * np.float32(np.nan)
            elif where == "rewards":
                reward = float("nan")
            else:
                info = {**info, "cost": float("nan")}
        state["step"] += 1
        return observation, reward, terminated, truncated, info

    base.reset, base.step = note, broken
    return env


@pytest.mark.fault("F31")
@pytest.mark.parametrize("where", ["next_observations", "rewards", "costs"])
def test_nan_from_the_simulator_is_named_and_the_finished_shards_stay(
    expert_folder, tmp_path, whole, where, monkeypatch
):
    stage = stage_in(tmp_path, expert_folder)
    index = read_json(expert_folder / "index.json")
    seed = make_plan(index, 6, 2, {}, 2, 9)[2].seeds[1]
    with monkeypatch.context() as patch:
        patch.setattr(envs, "_POOL", {"BallRun": [breaking(seed, 17, where) for _ in range(2)]})
        with pytest.raises(SimulatorFault) as caught:
            collect.run(stage)
    message = str(caught.value)
    for part in (f"policy {index[0]['name']} (ppo-lag)", "task BallRun", f"seed {seed}", "step 17", where):
        assert part in message
    assert [path.name[:6] for path in shards_of(stage)] == ["000000", "000001"]
    again = stage_in(tmp_path, expert_folder)
    collect.run(again)
    assert tree_files(again.out) == whole


@pytest.mark.fault("F32")
def test_workers_killed_while_collecting_change_nothing(expert_folder, tmp_path, whole):
    stage = stage_in(tmp_path, expert_folder, dataclasses.replace(MORE, processes=2))
    killed = []

    def kill(bar, n=1, **figures):
        fresh = [child for child in psutil.Process().children() if child.pid not in killed]
        if len(killed) < 3 and fresh:
            victim = fresh[0]
            victim.kill()
            killed.append(victim.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", kill)
        collect.run(stage)
    assert len(set(killed)) == 3
    assert tree_files(stage.out) == whole


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
