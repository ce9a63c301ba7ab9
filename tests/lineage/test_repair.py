"""What an audit finds is mended from cache, workspace, remote or by executing again, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from springhead.lineage.audit import audit
from springhead.lineage.digests import tree_digest
from springhead.lineage.dvcfiles import file_md5, object_path
from springhead.lineage.repair import repair
from tests.conftest import Project

pytestmark = pytest.mark.fault
ROWS = "data/rl/make/rows.json"


def spoil(path: Path) -> None:
    """Puts other bytes into a file, whatever its mode and whoever shares its inode."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    with path.open("r+b") as file:
        file.write(bytes(content))
    path.chmod(0o444)


@pytest.fixture(scope="module")
def made_template(project_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project after `dvc repro`, with copies in the workspace and a remote that has everything."""
    root = tmp_path_factory.mktemp("made") / "project"
    shutil.copytree(project_template, root)
    project = Project(root)
    project.run("dvc", "config", "cache.type", "copy")
    project.run("dvc", "repro", "-q")
    return root


@pytest.fixture
def made(made_template: Path, tmp_path: Path) -> Project:
    shutil.copytree(made_template, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def object_of(project: Project, path: str) -> Path:
    return object_path(project.root / ".dvc/cache/files/md5", file_md5(project.root / path))


def mended(project: Project, execute: bool = True) -> tuple[str, ...]:
    """Repairs, and asserts that it was red before and green after."""
    assert audit(project.root).red
    result = repair(project.root, execute=execute)
    assert not result.left.red, [p for p in result.left.problems if p.severity == "red"]
    assert not audit(project.root, deep=True).red
    return result.done


def test_a_sound_checkout_is_left_alone(made: Project) -> None:
    before = tree_digest(made.root / "data")
    assert repair(made.root).done == ()
    assert tree_digest(made.root / "data") == before


def test_a_changed_file_comes_back_from_the_cache(made: Project) -> None:
    before = tree_digest(made.root / "data")
    spoil(made.root / ROWS)
    (made.root / "data/rl/make/extra.txt").write_text("added")
    (made.root / "data/receipts/rl-use@a.json").write_text("{}")
    # A receipt that is no receipt stops the audit; it is restored as DVC restores it.
    made.run("dvc", "checkout", "--force", "data/receipts/rl-use@a.json")
    assert mended(made, execute=False) == ("checked out data/rl/make",)
    assert tree_digest(made.root / "data") == before


def test_a_damaged_cache_object_comes_back_from_the_workspace(made: Project) -> None:
    spoil(object_of(made, ROWS))
    assert f"put {ROWS} back into the cache from the workspace" in mended(made, execute=False)


def test_what_is_lost_here_comes_back_from_a_remote(made: Project, tmp_path: Path) -> None:
    made.run("dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    made.run("dvc", "push", "-q")
    spoil(object_of(made, ROWS))
    spoil(made.root / ROWS)
    assert "fetched data/rl/make from the remote" in mended(made, execute=False)


def test_what_is_lost_everywhere_is_made_again_with_the_same_bytes(
    made: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "DVC_SITE_CACHE_DIR", "SPRINGHEAD_TRACKING", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, made.env[name])
    before = tree_digest(made.root / "data")
    spoil(object_of(made, ROWS))
    spoil(made.root / ROWS)
    left = repair(made.root, execute=False)
    assert left.left.red
    assert any("neither cache nor remote has it" in line for line in left.done)
    assert any("executing rl-make again" in line for line in mended(made))
    assert tree_digest(made.root / "data") == before


def test_what_needs_a_decision_is_left_alone(made: Project) -> None:
    path = made.root / ".springhead/ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    entry = json.loads(lines[0])
    entry["body"]["host"] = "elsewhere"
    path.write_text(json.dumps(entry, separators=(",", ":"), sort_keys=True) + "\n" + "".join(lines[1:]))
    result = repair(made.root)
    assert result.left.red
    assert result.done == ()
    assert path.read_text().startswith(json.dumps(entry, separators=(",", ":"), sort_keys=True))
