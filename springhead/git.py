"""Git, run as a command, and its extra worktrees, in which stages execute undisturbed."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from springhead.errors import BadInput


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's environment without git's variables, which a hook may have set."""
    return {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | dict(extra or {})


def git(root: Path, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes | None = None) -> str:
    """Runs git in a folder and returns its output, stripped.

    Raises:
        BadInput: with git's own message, if it fails.
    """
    return git_bytes(root, *arguments, env=env, stdin=stdin).decode(errors="surrogateescape").rstrip("\n")


def git_bytes(root: Path, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes | None = None) -> bytes:
    """Runs git in a folder and returns its output as it is.

    Raises:
        BadInput: with git's own message, if it fails.
    """
    done = _run(root, arguments, env, stdin)
    if done.returncode != 0:
        raise _failed(root, arguments, done)
    return done.stdout


def head_commit(root: Path) -> str | None:
    """Returns the commit that is checked out, or None where nothing has been committed yet.

    Raises:
        BadInput: with git's own message, if it fails.
    """
    question = ("rev-parse", "--verify", "--quiet", "HEAD")
    done = _run(root, question)
    if done.returncode == 1:  # how git says that HEAD names no commit; a refusal is 128
        return None
    if done.returncode != 0:
        raise _failed(root, question, done)
    return done.stdout.decode().strip()


def under_git(root: Path) -> bool:
    """Tells whether a folder or one above it is a checkout, also where git itself refuses to read it."""
    return any(os.path.lexists(folder / ".git") for folder in (root, *root.parents))


def _run(
    root: Path, arguments: Sequence[str], env: Mapping[str, str] | None = None, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    # No hooks: DVC's post-checkout hook would check out data in the middle of ours.
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    return subprocess.run(command, cwd=root, env=clean_environment(env), input=stdin, capture_output=True)


def _failed(root: Path, arguments: Sequence[str], done: subprocess.CompletedProcess[bytes]) -> BadInput:
    message = " ".join(done.stderr.decode(errors="replace").split())  # an error is one line
    return BadInput(f"{root}: git {arguments[0]} failed: {message}")


def uncommitted(state: Mapping[str, Any]) -> str:
    """Returns what to write behind the commit of an execution, given the git state that the ledger has of it."""
    if state.get("dirty", False) is None:
        return "; uncommitted changes unknown, git failed"
    return " with uncommitted changes" if state.get("dirty") and state.get("revision") else ""


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
