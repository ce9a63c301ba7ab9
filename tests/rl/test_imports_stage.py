"""The stage that imports: an empty index by default, rows with their lineage, and the command that looks first."""

import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from springhead.cli import app
from springhead.declared import stage_name
from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest, tree_files
from springhead.params import load
from springhead.rl.dsrl_file import read_dsrl
from springhead.stage import for_test
from springhead.tables import read_table
from stages.rl import collect, imports
from tests.rl.foreign_files import HORIZON, flat, make_episodes, write_hdf5, write_minari

pytestmark = pytest.mark.unit
WHOLE = (HORIZON, HORIZON, HORIZON)
"""BallCircle never terminates."""


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(tmp_path / "sources"))
    return tmp_path / "sources"


def run(out, sources, task="BallCircle"):
    params = load(imports.Params, {"sources": sources}, "params.yaml: rl.imports")
    stage = for_test(params, out, {}, {"task": task}, stage="imports")
    imports.run(stage)
    return stage


def test_by_default_there_is_an_empty_index_and_nothing_else(tmp_path):
    stage = run(tmp_path / "out", [])
    assert [path.name for path in stage.out.iterdir()] == ["index.json"]
    assert read_json(stage.out / "index.json") == []
    assert (stage.record.datasets, stage.record.metrics) == ([], {})


def test_a_stage_takes_the_sources_of_its_task_and_gives_equal_bytes_again(tmp_path, shelf):
    path = write_hdf5(shelf / "dsrl" / "mine.hdf5", flat(make_episodes(WHOLE)))
    write_minari(shelf, "ball-v0", make_episodes((HORIZON, HORIZON), seed=1))
    sources = [
        {"task": "BallCircle", "dsrl": {"file": "mine.hdf5", "sha256": tree_digest(path)}},
        {"task": "CarRun", "dsrl": {"file": "nowhere.hdf5", "sha256": "0" * 64}},
        {"task": "BallCircle", "minari": {"path": "ball-v0", "sha256": tree_digest(shelf / "ball-v0"), "cost": "cost"}},
    ]
    stage = run(tmp_path / "out", sources)
    assert [entry["episodes"] for entry in read_json(stage.out / "index.json")] == [3, 2]
    assert stage.record.metrics == {"episodes": 5, "left_out": 0}
    assert [(d["rows"], d["role"]) for d in stage.record.datasets] == [(5, "output")]
    assert read_table(stage.out / "rows.parquet").num_rows == 5
    again = run(tmp_path / "again", sources)
    assert tree_files(stage.out) == tree_files(again.out)


def test_collection_takes_what_was_imported_with_its_source(tmp_path, shelf):
    path = write_hdf5(shelf / "dsrl" / "mine.hdf5", flat(make_episodes(WHOLE)))
    made = run(tmp_path / "made", [{"task": "BallCircle", "dsrl": {"file": "mine.hdf5", "sha256": tree_digest(path)}}])
    experts = tmp_path / "experts"
    experts.mkdir()
    write_json(experts / "index.json", [])
    params = collect.Params(sampled_episodes=1, mean_episodes=1, num_envs=1)
    inputs = {"experts": experts, "imports": made.out}
    stage = for_test(params, tmp_path / "collected", inputs, {"task": "BallCircle"}, stage="collect")
    collect.run(stage)
    assert [episode.id for episode in read_dsrl(stage.out / "dataset.hdf5").episodes()] == [
        e.id for e in make_episodes(WHOLE)
    ]
    rows = read_table(stage.out / "rows.parquet").to_pylist()
    assert {(row["source"], row["policy"], row["algorithm"]) for row in rows} == {(tree_digest(path), None, "imported")}


@pytest.mark.fault
def test_a_task_that_does_not_exist_is_told_in_every_stage(tmp_path):
    with pytest.raises(BadInput, match=r"unknown task 'BalCircle'\. Did you mean BallCircle"):
        run(tmp_path / "out", [{"task": "BalCircle", "dsrl": {"sha256": "0" * 64}}])


def test_the_stage_is_cheap_to_start():
    code = "import stages.rl.imports, sys; print({'torch', 'minari', 'pybullet', 'gymnasium'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert stage_name("stages.rl.imports", ["BallCircle"]) == "rl-imports@BallCircle"


def check(*arguments):
    done = CliRunner().invoke(app, ["import-check", *map(str, arguments)])
    return done.exit_code, done.stdout + done.stderr


def entry(output):
    return yaml.safe_load(output.partition("params.yaml:\n")[2])


def test_what_the_command_prints_imports_the_file(tmp_path, shelf):
    arrays = flat(make_episodes(WHOLE))
    arrays["timeouts"] = arrays["timeouts"].astype("u1")[:, None]
    arrays["timeouts"][-1] = 0
    path = write_hdf5(shelf / "dsrl" / "mine.hdf5", arrays)
    code, out = check(path, "--task", "BallCircle")
    assert code == 0
    assert "2 episodes of BallCircle, 400 steps" in out
    assert "timeouts are uint8, timeouts have shape (600, 1)" in out
    assert "left out by unfinished: 1; mine.hdf5: episode 2: its 200 steps" in out
    index = read_json(run(tmp_path / "out", entry(out)).out / "index.json")
    assert (index[0]["episodes"], index[0]["left_out"]) == (2, {"unfinished": 1})


def test_the_command_shows_what_validation_would_refuse(tmp_path, shelf):
    arrays = flat(make_episodes((HORIZON, HORIZON, 30, HORIZON, 90)))
    arrays["costs"][5] = 0.25
    arrays["terminals"][-1], arrays["timeouts"][-1] = False, True
    path = write_hdf5(shelf / "dsrl" / "mine.hdf5", arrays)
    code, out = check(path, "--task", "BallCircle")
    assert code == 0
    assert "2 episodes of BallCircle, 400 steps" in out
    assert "left out by cost kind: 1; mine.hdf5: episode 0: the cost is 0.25 at step 5" in out
    assert "left out by terminal: 1; mine.hdf5: episode 2: ends with a terminal after 30 steps" in out
    assert "left out by timeout before horizon: 1; mine.hdf5: episode 4: has a time-out after 90 steps" in out
    index = read_json(run(tmp_path / "out", entry(out)).out / "index.json")
    assert index[0]["left_out"] == {"cost kind": 1, "terminal": 1, "timeout before horizon": 1}


def test_the_command_knows_the_other_formats(tmp_path, shelf):
    write_minari(shelf, "others/ball-v0", make_episodes(WHOLE))
    code, out = check(shelf / "others" / "ball-v0", "--task", "BallCircle", "--cost", "cost")
    assert code == 0
    assert entry(out)[0]["minari"]["path"] == "others/ball-v0"
    assert read_json(run(tmp_path / "minari", entry(out)).out / "index.json")[0]["format"] == "minari"
    episodes = make_episodes(WHOLE)
    arrays = {key: flat(episodes)[key] for key in ("observations", "actions", "rewards", "terminals")}
    path = write_hdf5(shelf / "old.hdf5", arrays)
    code, out = check(path, "--task", "BallCircle")
    assert code == 2
    assert "no array 'timeouts'" in out
    code, out = check(path, "--task", "BallCircle", "--horizon")
    assert code == 0
    assert "3 last steps cut" in out
    found = read_json(run(tmp_path / "d4rl", entry(out)).out / "index.json")[0]
    assert (found["format"], found["cost"], found["steps_cut"]) == ("d4rl", None, 3)


def test_a_file_that_lies_elsewhere_is_imported_from_where_the_command_says(tmp_path, shelf):
    written = [
        (write_hdf5(tmp_path / "x, {y}.hdf5", flat(make_episodes(WHOLE))), (), shelf / "dsrl"),
        (write_hdf5(shelf / "one: two.hdf5", flat(make_episodes(WHOLE))), (), shelf / "dsrl"),
        (write_hdf5(tmp_path / "old.hdf5", flat(make_episodes(WHOLE))), ("--cost", "costs"), shelf),
        (tmp_path / "theirs" / "ball-v0", ("--cost", "cost"), shelf),
    ]
    write_minari(tmp_path / "theirs", "ball-v0", make_episodes(WHOLE))
    for number, (path, options, folder) in enumerate(written):
        code, out = check(path, "--task", "BallCircle", *options)
        assert code == 0
        assert f"# first put it at {folder / path.name}" in out
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
        assert run(tmp_path / f"out{number}", entry(out)).record.metrics["episodes"] == 3
        code, out = check(folder / path.name, "--task", "BallCircle", *options)
        assert (code, "first put it" in out) == (0, False)
        assert run(tmp_path / f"again{number}", entry(out)).record.metrics["episodes"] == 3


@pytest.mark.fault
def test_the_command_names_what_cannot_be_read(tmp_path, shelf):
    code, out = check(tmp_path / "none.hdf5", "--task", "BallCircle")
    assert (code, "none.hdf5: no such file" in out.replace("\n", "")) == (2, True)
    (tmp_path / "text.hdf5").write_text("text")
    code, out = check(tmp_path / "text.hdf5", "--task", "BallCircle")
    assert (code, "not an HDF5 file" in out) == (2, True)
    path = write_hdf5(shelf / "x.hdf5", flat(make_episodes(WHOLE)))
    code, out = check(path, "--task", "AntRun")
    assert (code, "task AntRun needs (steps, 33)" in out) == (2, True)
