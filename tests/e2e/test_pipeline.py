"""The whole pipeline at smoke size: plain DVC, a remote, another clone, and the same bytes again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from springhead.jsonio import read_json
from springhead.lineage.audit import audit
from springhead.lineage.digests import tree_digest
from springhead.params import overlay

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.e2e


def _environment(where: Path) -> dict[str, str]:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SPRINGHEAD_TRACKING": "spool",
        "SPRINGHEAD_HERMETIC": "1",  # a stage that reads what it does not declare fails
        "DVC_SITE_CACHE_DIR": str(where.parent / f"{where.name}-site"),
    }
    env.pop("SPRINGHEAD_HOME", None)
    return env


def _run(where: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=_environment(where))
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the code of this checkout and the parameters of the smoke profile."""
    where = tmp_path_factory.mktemp("pipeline") / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        # What a run in this checkout may have left: its lock, its key, and what was accepted.
        left = name == "dvc.lock" or name.startswith(("mlflow/trusted-keys/", "data/accepted/rl/"))
        if not left and (ROOT / name).is_file():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, where / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    smoke = yaml.safe_load((ROOT / "pipelines/profiles/smoke.yaml").read_text())
    (where / "params.yaml").write_text(yaml.safe_dump(overlay(params, smoke, "smoke"), sort_keys=False))
    _run(where, "git", "init", "-q", "-b", "main")
    _run(where, "git", "add", "-A")
    _run(where, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "code")
    return where


@pytest.fixture(scope="module")
def both(source: Path) -> tuple[Path, Path]:
    """The same repository and a clean clone of it, each after a ``dvc repro`` of its own, at the same time."""
    clone = source.with_name("clone")
    _run(source, "git", "clone", "-q", str(source), str(clone))
    running = {}
    for where in (source, clone):
        with where.with_suffix(".log").open("w") as log:
            env = _environment(where)
            running[where] = subprocess.Popen(["dvc", "repro"], cwd=where, stdout=log, stderr=log, env=env)
    for where, process in running.items():
        assert process.wait() == 0, where.with_suffix(".log").read_text()[-8000:]
    return source, clone


@pytest.fixture(scope="module")
def made(both: tuple[Path, Path]) -> Path:
    """A repository after ``dvc repro``."""
    return both[0]


def test_dvc_alone_builds_everything_and_then_nothing(made: Path) -> None:
    assert "up to date" in _run(made, "dvc", "status")
    assert "Running stage" not in _run(made, "dvc", "repro")
    declared = _run(made, "dvc", "stage", "list", "--name-only").split()
    receipts = {path.stem for path in (made / "data/receipts").glob("*.json")}
    assert receipts == set(declared)
    assert "rl-evaluate@BallRun" in _run(made, "dvc", "metrics", "show")
    assert "llm-finetune" in _run(made, "dvc", "dag")
    # The lock is to be committed, and so is the public key that the first stage made.
    assert _run(made, "git", "status", "--porcelain").split() == ["??", "dvc.lock", "??", "mlflow/trusted-keys/"]


def test_the_audit_is_green_and_a_flipped_byte_turns_it_red(made: Path) -> None:
    assert not audit(made).red
    victim = made / "data/rl/filter/BallRun/rows.parquet"
    good = victim.read_bytes()
    victim.unlink()  # the workspace may hold a link into the cache
    victim.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    found = audit(made)
    assert found.red
    assert any("rows.parquet" in str(problem) for problem in found.problems)
    victim.unlink()
    _run(made, "dvc", "checkout", "--force")
    assert not audit(made).red


def test_a_push_and_a_pull_restore_everything(made: Path, tmp_path: Path) -> None:
    remote, clone = tmp_path / "remote", tmp_path / "clone"
    _run(made, "dvc", "remote", "add", "--local", "--force", "--default", "store", str(remote))
    _run(made, "dvc", "push")
    _run(tmp_path, "git", "clone", "-q", str(made), str(clone))
    shutil.copy2(made / "dvc.lock", clone / "dvc.lock")
    _run(clone, "dvc", "remote", "add", "--local", "--default", "store", str(remote))
    _run(clone, "dvc", "pull")
    assert "Running stage" not in _run(clone, "dvc", "repro")
    assert tree_digest(clone / "data/rl") == tree_digest(made / "data/rl")
    assert not audit(clone).red


def test_a_clean_clone_makes_the_same_bytes(both: tuple[Path, Path]) -> None:
    made, clone = both
    names = sorted(path.name for path in (made / "data/receipts").glob("*.json"))
    differing = [n for n in names if read_json(made / "data/receipts" / n) != read_json(clone / "data/receipts" / n)]
    assert differing == []
    assert (clone / "dvc.lock").read_bytes() == (made / "dvc.lock").read_bytes()


@pytest.mark.slow
@pytest.mark.fault("F12")
def test_a_full_disk_in_each_stage_changes_nothing(made: Path) -> None:
    """Every kind of stage, run by itself where no file may be larger than the limit."""
    declared = _run(made, "dvc", "stage", "list", "--name-only").split()
    kinds = {name.partition("@")[0]: name for name in declared}
    before, lock = tree_digest(made / "data"), (made / "dvc.lock").read_bytes()
    for name in kinds.values():
        command = read_json(made / f"data/receipts/{name}.json")["command"]
        # In blocks of a kilobyte: the smallest that lets a stage begin to write.
        script = f"ulimit -f 2; exec {sys.executable} {command.removeprefix('python ')}"
        env = {**os.environ, "SPRINGHEAD_TRACKING": "spool"}
        done = subprocess.run(["bash", "-c", script], cwd=made, env=env, capture_output=True, text=True)
        assert done.returncode != 0, name
        left = sorted((made / "data").glob("**/.*.tmp-*"))
        for path in left:  # by a library that crashed; the next execution sweeps them
            assert done.returncode < 0 or done.returncode > 128, (name, path)
            shutil.rmtree(path)
        assert tree_digest(made / "data") == before, name
        assert (made / "dvc.lock").read_bytes() == lock
    assert "Running stage" not in _run(made, "dvc", "repro")
