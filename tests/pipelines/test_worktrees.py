"""Snapshots of a checkout, worktrees with a shared cache, and DVC's lock file."""

import shutil
from pathlib import Path

import pytest

from pipelines import worktrees
from pipelines.graph import repository
from pipelines.worktrees import (
    add_worktree,
    differences,
    merge_lock,
    read_lock,
    record_result,
    take_snapshot,
    write_lock,
)
from springhead.errors import BadInput
from tests.pipelines.conftest import Light

pytestmark = pytest.mark.unit


def show(light: Light, revision: str, name: str) -> str:
    return light.run("git", "show", f"{revision}:{name}").stdout


def test_a_clean_checkout_is_its_own_snapshot(light: Light) -> None:
    snapshot = take_snapshot(light.root, "r1")
    assert snapshot.commit == light.git("rev-parse", "HEAD")
    assert light.git("rev-parse", "refs/springhead/runs/r1") == snapshot.commit


def test_a_snapshot_has_uncommitted_edits_and_new_files_and_touches_nothing(light: Light) -> None:
    light.write("source.txt", "edited\n")
    light.write("new.txt", "new\n")
    light.write("data/a/big.bin", "ignored")
    light.write("staged.txt", "staged\n")
    light.git("add", "staged.txt")
    before = light.git("status", "--porcelain")
    snapshot = take_snapshot(light.root, "r1")
    assert light.git("status", "--porcelain") == before
    assert light.git("rev-parse", f"{snapshot.commit}^") == light.git("rev-parse", "HEAD")
    assert show(light, snapshot.commit, "source.txt") == "edited\n"
    assert show(light, snapshot.commit, "new.txt") == "new\n"
    assert show(light, snapshot.commit, "staged.txt") == "staged\n"
    assert "big.bin" not in light.git("ls-tree", "-r", "--name-only", snapshot.commit)


def test_a_deleted_file_is_not_in_the_snapshot(light: Light) -> None:
    light.run("rm", "source.txt")
    assert "source.txt" not in light.git("ls-tree", "-r", "--name-only", take_snapshot(light.root, "r1").commit)


def test_a_repository_without_commits_can_be_run(light: Light) -> None:
    light.run("rm", "-rf", ".git")
    light.run("git", "init", "-q", "-b", "main")
    snapshot = take_snapshot(light.root, "r1")
    assert show(light, snapshot.commit, "source.txt") == "hello\n"


def test_params_of_a_profile_go_into_the_snapshot_only(light: Light) -> None:
    snapshot = take_snapshot(light.root, "r1", b"seed: 9\n")
    assert snapshot.params_changed
    assert show(light, snapshot.commit, "params.yaml") == "seed: 9\n"
    assert light.read("params.yaml").startswith("seed: 0\n")


def test_data_that_git_does_not_ignore_is_refused(light: Light) -> None:
    (light.root / "huge.bin").write_bytes(b"0" * (21 * 2**20))
    with pytest.raises(BadInput, match=r"huge\.bin.*21 MB.*gitignore"):
        take_snapshot(light.root, "r1")


def test_differences_since_the_snapshot(light: Light) -> None:
    light.write("source.txt", "edited\n")
    snapshot = take_snapshot(light.root, "r1")
    assert differences(light.root, snapshot) == []
    light.write("dvc.lock", "schema: '2.0'\n")
    light.write("work.py", "pass\n")
    assert differences(light.root, snapshot) == ["work.py"]


def test_a_worktree_uses_the_cache_of_the_checkout(built: Light) -> None:
    light = built
    light.dvc("remote", "add", "-q", "--local", "--default", "there", "../there")
    place = add_worktree(light.root, take_snapshot(light.root, "r1"), light.home / "worktrees" / "r1" / "0")
    with repository(place) as repo:
        assert repo.cache.local_cache_dir == str(light.root / ".dvc" / "cache")
        assert repo.config["core"]["remote"] == "there"
        assert repo.config["remote"]["there"]["url"] == str(light.root.parent / "there")
    light.dvc("checkout", "-q", place=place)
    assert (place / "data/b/check.txt").read_text() == light.read("data/b/check.txt")
    worktrees.remove_worktree(light.root, place)
    assert "worktrees/r1" not in light.git("worktree", "list")


def test_a_project_below_the_root_of_its_repository(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "outer" / "project", ignore=shutil.ignore_patterns(".git"))
    light = Light(tmp_path / "outer" / "project")
    light.run("git", "init", "-q", "-b", "main", "..")
    snapshot = take_snapshot(light.root, "r1", b"seed: 9\n")
    assert show(light, snapshot.commit, "project/params.yaml") == "seed: 9\n"
    place = add_worktree(light.root, snapshot, tmp_path / "w")
    assert place == tmp_path / "w" / "project"
    assert (place / "dvc.yaml").is_file()


def test_a_lock_survives_a_round_trip_in_dvcs_own_form(light: Light) -> None:
    light.write("params.yaml", light.read("params.yaml").replace("pause: 0", "pause: 1e-05"))
    light.dvc("repro", "-q", "a-make")
    before = light.read("dvc.lock")
    assert "1e-05" in before
    write_lock(light.root, read_lock(light.root))
    assert light.read("dvc.lock") == before


def test_merging_keeps_order_and_other_entries() -> None:
    base = {"schema": "2.0", "stages": {"a": {"cmd": "1"}, "b": {"cmd": "1"}}}
    merged = merge_lock(base, {"c": {"cmd": "2"}, "a": {"cmd": "2"}})
    assert list(merged["stages"].items()) == [("a", {"cmd": "2"}), ("b", {"cmd": "1"}), ("c", {"cmd": "2"})]
    assert base["stages"]["a"] == {"cmd": "1"}
    assert merge_lock({}, {})["schema"] == "2.0"


@pytest.mark.parametrize("text", ["", "stages: [", "stages: 3\n"])
def test_a_damaged_lock_is_named(light: Light, text: str) -> None:
    light.write("dvc.lock", text)
    with pytest.raises(BadInput, match=r"dvc\.lock: damaged"):
        read_lock(light.root)


def test_results_are_a_commit_that_can_be_checked_out(light: Light) -> None:
    snapshot = take_snapshot(light.root, "r1")
    assert record_result(light.root, snapshot, _with_lock(light, "schema: '2.0'\n")) != snapshot.commit
    assert light.run("git", "show", "refs/springhead/runs/r1:dvc.lock").stdout == "schema: '2.0'\n"
    assert light.git("rev-parse", "refs/springhead/runs/r1^") == snapshot.commit


def _with_lock(light: Light, text: str) -> Path:
    place = light.root / ".springhead" / "place"
    place.mkdir(parents=True)
    (place / "dvc.lock").write_text(text)
    return place


def test_gits_own_message_is_passed_on(light: Light) -> None:
    with pytest.raises(BadInput, match="git rev-parse failed"):
        worktrees.git(light.root, "rev-parse", "nothing")
