"""Trusted keys are those that were reviewed: the bytes of the last commit."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from springhead.errors import BadInput
from springhead.keys import TRUSTED, changed_keys
from springhead.stage import _git_state

pytestmark = pytest.mark.unit

KNOWN, ANOTHER = f"{TRUSTED}/known.pem", f"{TRUSTED}/another.pem"


def write_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one trusted key, committed."""
    root = tmp_path / "checkout"
    write_key(root / KNOWN)
    (root / "dvc.yaml").write_text("stages: {}\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "who may sign")
    return root


def refuse(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes git refuse a checkout; root cannot be told of another's ownership otherwise."""
    program = root.parent / "bin/git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho \"fatal: detected dubious ownership in repository at '.'\" >&2\nexit 128\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_added_removed_and_changed_keys_are_named(root: Path) -> None:
    assert changed_keys(root) == []
    write_key(root / ANOTHER)
    assert changed_keys(root) == [ANOTHER]
    git(root, "add", "-A")
    assert changed_keys(root) == [ANOTHER]  # the index is no commit
    (root / KNOWN).unlink()
    assert changed_keys(root) == [ANOTHER, KNOWN]
    write_key(root / KNOWN)
    assert changed_keys(root) == [ANOTHER, KNOWN]
    git(root, "commit", "-qam", "reviewed")
    assert changed_keys(root) == []


@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree"])
def test_a_key_that_git_was_told_to_overlook_is_named(root: Path, flag: str) -> None:
    git(root, "update-index", flag, KNOWN)
    write_key(root / KNOWN)
    assert changed_keys(root) == [KNOWN]


def test_a_replacement_does_not_stand_in_for_the_commit(root: Path) -> None:
    write_key(root / KNOWN)
    made = subprocess.run(["git", "hash-object", "-w", KNOWN], cwd=root, check=True, capture_output=True, text=True)
    git(root, "replace", f"HEAD:{KNOWN}", made.stdout.strip())
    assert changed_keys(root) == [KNOWN]


def test_variables_of_git_hide_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(root / ANOTHER)
    monkeypatch.setenv("GIT_DIR", "/nope")
    assert changed_keys(root) == [ANOTHER]


def test_a_project_in_a_folder_of_its_repository(root: Path) -> None:
    inner = root / "inner"
    write_key(inner / KNOWN)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "inner")
    assert changed_keys(inner) == []
    write_key(inner / KNOWN)
    assert changed_keys(inner) == [KNOWN]


@pytest.mark.fault
def test_where_git_refuses_no_key_counts_as_reviewed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(root / ANOTHER)
    refuse(root, monkeypatch)
    with pytest.raises(BadInput, match=r"nobody can tell whether these keys were reviewed.*dubious ownership"):
        changed_keys(root)


@pytest.mark.fault
def test_a_damaged_repository_is_not_taken_for_none(root: Path) -> None:
    (root / ".git/HEAD").unlink()
    with pytest.raises(BadInput, match="nobody can tell"):
        changed_keys(root)


def test_without_a_commit_or_without_git_there_is_nothing_to_compare_with(root: Path) -> None:
    shutil.rmtree(root / ".git")
    write_key(root / ANOTHER)
    assert changed_keys(root) == []
    git(root, "init", "-q")
    assert changed_keys(root) == []
    git(root, "add", "dvc.yaml")
    git(root, "commit", "-qm", "no key yet")
    assert changed_keys(root) == []


@pytest.mark.fault
def test_a_checkout_that_git_refuses_is_not_called_clean(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = _git_state(root)
    assert (len(clean["revision"]), clean["dirty"]) == (40, False)
    (root / "dvc.yaml").write_text("stages: {a: {}}\n")
    assert _git_state(root) == clean | {"dirty": True}
    (root / ".git/index").write_bytes(b"damaged")
    assert _git_state(root) == clean | {"dirty": None}
    refuse(root, monkeypatch)
    assert _git_state(root) == {"revision": "", "dirty": None}
    shutil.rmtree(root / ".git")
    assert _git_state(root) == {"revision": "", "dirty": False}
