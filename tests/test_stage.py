"""The stage harness: receipts, sealed inputs, atomic outputs, errors that name what is wrong."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from springhead.jsonio import read_json
from springhead.lineage.digests import file_digest, tree_digest
from springhead.lineage.ledger import Ledger
from tests.conftest import Project
from tests.faults.processes import alive


def _state(project: Project) -> Path:
    return project.root / ".springhead"


@pytest.mark.e2e
def test_repro_leaves_receipts_ledger_and_nothing_to_do(project: Project) -> None:
    project.run("dvc", "repro")
    receipt = read_json(project.root / "data/receipts/rl-use@a.json")
    assert receipt["params"] == {"seed": 3, "rl.use": {"factor": 0.5}}
    assert receipt["dependencies"]["data/rl/make"]["sha256"] == tree_digest(project.root / "data/rl/make")
    assert receipt["outputs"]["data/rl/use/a"]["sha256"] == tree_digest(project.root / "data/rl/use/a")
    assert receipt["models"][0]["sha256"] == tree_digest(project.root / "data/rl/use/a/model")
    assert receipt["metrics"] == {"score": 2.0}
    assert receipt["code"]["files"]["stages/rl/use.py"] == file_digest(project.root / "stages/rl/use.py")
    make = read_json(project.root / "data/receipts/rl-make.json")
    assert make["datasets"][0]["path"] == "data/rl/make/rows.json"

    entries = [e["body"] for e in Ledger(_state(project)).entries()]
    assert [e["stage"] for e in entries] == ["rl-make", "rl-use@a", "rl-use@b"]
    assert entries[1]["receipt"] == file_digest(project.root / "data/receipts/rl-use@a.json")
    assert Ledger(_state(project)).verify() == []
    assert "up to date" in project.run("dvc", "status").stdout
    second = project.run("dvc", "repro")
    assert "Running stage" not in second.stdout
    assert len(Ledger(_state(project)).entries()) == 3
    assert not list((_state(project) / "scratch").rglob("*.safetensors"))


@pytest.mark.e2e
def test_executed_again_in_a_clean_clone_gives_the_same_bytes(project: Project, tmp_path: Path) -> None:
    project.run("dvc", "repro")
    clone = tmp_path / "elsewhere" / "clone"
    project.run("git", "clone", "-q", str(project.root), str(clone))
    other = Project(clone)
    other.run("dvc", "repro", PYTHONHASHSEED="7", TZ="Asia/Kolkata", LC_ALL="C")
    for folder in ("data/rl", "data/receipts", "data/metrics"):
        assert tree_digest(project.root / folder) == tree_digest(clone / folder)


@pytest.mark.fault
@pytest.mark.parametrize("target", ["source.txt", "params.yaml", "stages/rl/make.py"])
def test_an_input_edited_during_the_run_fails_the_stage_and_nothing_is_cached(project: Project, target: str) -> None:
    project.params("rows: 4, pause: 4.0")
    env = {**project.env, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        ["dvc", "repro", "rl-make"],
        cwd=project.root,
        env=env,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list((project.root / "data/rl").glob(".make.tmp-*")):  # the stage has digested its inputs
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    before = (project.root / target).read_text()
    changed = before.replace("rows: 4", "rows: 5") if target == "params.yaml" else before + "# changed\n"
    (project.root / target).write_text(changed)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "input changed during the run" in err + out
    assert target in err + out
    assert "Traceback" not in err + out
    assert not (project.root / "data/rl/make").exists()
    assert not list((project.root / "data/rl").glob(".make*"))
    assert not (project.root / "dvc.lock").exists()
    cached = list((project.root / ".dvc/cache").rglob("*")) if (project.root / ".dvc/cache").exists() else []
    assert not [p for p in cached if p.is_file()]
    kinds = [e["kind"] for e in Ledger(_state(project)).entries()]
    assert kinds == ["failure"]


@pytest.mark.fault
def test_bad_input_is_one_clear_line_and_leaves_no_output(project: Project) -> None:
    cases = {
        "rows: 4, rwos: 3": ("rl.make.rwos: unknown parameter; did you mean 'rows'?", 2),
        "pause: 1.0": ("rl.make.rows: missing parameter", 2),
        "rows: four": ("rl.make.rows: expected int, found 'four'", 2),
        "rows: 4, fail: bad": ("rows.json: no good; mend it", 2),
        "rows: 4, fail: import": ("imports code that is no dependency: stages/rl/helper.py", 2),
        "rows: 4, fail: finding": ("row source-0 is red", 1),
    }
    for params, (message, code) in cases.items():
        project.params(params)
        done = project.run("python", "-m", "stages.rl.make", check=False)
        assert done.returncode == code, (params, done.stderr)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not list((project.root / "data").rglob("*make*")), params
    kept = _state(project) / "failed/rl-make/rows.json"  # what a red verdict leaves for reading
    assert json.loads(kept.read_text())[0].startswith("source-0-")
    unknown = project.run("python", "-m", "stages.rl.use", "c", check=False)
    assert unknown.returncode == 2
    assert "rl-use@a, rl-use@b" in unknown.stderr


@pytest.mark.fault
def test_a_full_disk_fails_cleanly_and_the_next_run_succeeds(project: Project) -> None:
    project.params("rows: 4, fail: big")
    done = project.run("bash", "-c", "ulimit -f 8000; exec dvc repro rl-make", check=False)
    assert done.returncode != 0
    assert not (project.root / "data/rl/make").exists()
    assert not list((project.root / "data/rl").glob(".make*"))
    project.params("rows: 4")
    project.run("dvc", "repro")


@pytest.mark.fault
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_a_killed_dvc_leaves_no_orphan_and_no_partial_output(project: Project, shell: str) -> None:
    # DVC runs a command by $SHELL: bash gives its place to the command, dash stays in between.
    project.params("rows: 4, pause: 600.0")
    process = subprocess.Popen(
        ["dvc", "repro", "rl-make"],
        cwd=project.root,
        env={**project.env, "SHELL": shell},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (left := list((project.root / "data/rl").glob(".make.tmp-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int(left[0].name.rpartition("-")[2])
    process.send_signal(signal.SIGKILL)
    process.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    project.params("rows: 4")
    project.run("dvc", "repro", "rl-make")
    assert sorted(p.name for p in (project.root / "data/rl").iterdir()) == ["make"]


@pytest.mark.unit
def test_a_wrong_environment_is_named(project: Project) -> None:
    project.write("locks/rl.lock", "numpy==1.0.0\nno-such-package==2\n")
    done = project.run("python", "-m", "stages.rl.make", check=False)
    assert done.returncode == 2
    assert "wanted 1.0.0" in done.stderr
    assert "no-such-package not installed" in done.stderr


@pytest.mark.unit
def test_every_stage_has_its_three_places() -> None:
    """A stage is a script, a block of dvc.yaml and a block of params.yaml of one name."""
    import yaml

    root = Path(__file__).parent.parent
    declared = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    params = yaml.safe_load((root / "params.yaml").read_text())
    scripts = {f"{p.parent.name}-{p.stem}" for p in (root / "stages").glob("*/*.py") if p.stem != "__init__"}
    assert scripts == set(declared)
    blocks = {f"{b}-{s}" for b in ("rl", "llm") for s, v in params[b].items() if isinstance(v, dict) and s != "runs"}
    assert blocks == set(declared)
    for name, block in declared.items():
        stage = block.get("do", block)  # foreach keeps the stage one level down
        branch, _, short = name.partition("-")
        assert stage["cmd"].startswith(f"python -m stages.{branch}.{short}"), name
        assert f"stages/{branch}/{short}.py" in stage["deps"], name
        assert f"locks/{branch}.lock" in stage["deps"], name
        imported = re.compile(rf"stages\.{branch}\.{short}\b|from stages\.{branch} import [^\n]*\b{short}\b")
        tests = (root / f"tests/{branch}").rglob("test_*.py")
        assert any(imported.search(path.read_text()) for path in tests), f"{name} has no test"


@pytest.mark.unit
def test_mlflow_folder_holds_no_python() -> None:
    """A module in mlflow/ would shadow the mlflow package."""
    root = Path(__file__).parent.parent
    assert not list((root / "mlflow").rglob("*.py"))
    assert (root / "mlflow").is_dir()
