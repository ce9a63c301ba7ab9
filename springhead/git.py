"""Git, run as a command, and its extra worktrees, in which stages execute undisturbed."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from springhead.errors import BadInput


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's environment without git's variables, which a hook may have set."""
    return {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | dict(extra or {})


def git(root: Path, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes | None = None) -> str:
    """Runs git in a folder and returns its output, stripped.

    Raises:
        BadInput: with git's own message, if it fails.
    """
    # No hooks: DVC's post-checkout hook would check out data in the middle of ours.
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(command, cwd=root, env=clean_environment(env), input=stdin, capture_output=True)
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip()
        raise BadInput(f"{root}: git {arguments[0]} failed: {message}")
    return done.stdout.decode(errors="surrogateescape").rstrip("\n")


def add_worktree(root: Path, commit: str, folder: Path) -> Path:
    """Makes a worktree of a commit.

    Returns:
        The folder in it that corresponds to ``root``: ``folder`` itself, unless the project
        lives in a sub-folder of its git repository.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    git(root, "worktree", "add", "--detach", "--quiet", str(folder), commit)
    return folder / git(root, "rev-parse", "--show-prefix")


def remove_worktree(root: Path, folder: Path) -> None:
    """Removes a worktree with whatever is in it; silent if it is gone already."""
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    git(root, "worktree", "prune")
