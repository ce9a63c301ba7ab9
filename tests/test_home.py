"""The state folder: one for a repository, from wherever it is asked for."""

import shutil
import subprocess
from pathlib import Path

import pytest

from springhead.errors import BadInput
from springhead.home import home, main_checkout

pytestmark = pytest.mark.unit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a commit."""
    root = tmp_path / "checkout"
    (root / "data/rl").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)
    return root


def test_a_relative_state_folder_is_below_the_main_checkout(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRINGHEAD_HOME", "state/../state")
    tree = tmp_path / "tree"
    subprocess.run(["git", "worktree", "add", "-q", str(tree)], cwd=checkout, check=True, capture_output=True)
    for here in (checkout, checkout / "data/rl", tree, tmp_path):
        monkeypatch.chdir(here)
        root = None if here != tmp_path else tree
        assert home(root) == checkout / "state"


def test_a_state_folder_in_the_home_of_the_user(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("SPRINGHEAD_HOME", "~/state")
    assert home(checkout) == tmp_path / "user/state"
    monkeypatch.setenv("SPRINGHEAD_HOME", "~nobody-of-this-name/state")
    with pytest.raises(BadInput, match="SPRINGHEAD_HOME=~nobody-of-this-name"):
        home(checkout)


def test_an_absolute_state_folder_needs_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "state"))
    assert home() == tmp_path / "state"


def test_variables_of_git_do_not_lead_elsewhere(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkout, other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert main_checkout(checkout) == checkout
