"""Where a checkout keeps what is neither code nor data: ledger, keys, MLflow store, scratch.

It is one folder per repository, ``.springhead/`` of the main checkout, also when the code runs
in one of git's extra worktrees, so that all runs share one ledger.
"""

import os
import subprocess
from functools import lru_cache
from pathlib import Path

from springhead.errors import BadInput
from springhead.git import clean_environment


def repository(start: Path | str | None = None) -> Path:
    """Returns the root of the checkout that holds ``start`` (default: the working folder).

    Raises:
        BadInput: if no parent folder holds a ``dvc.yaml``.
    """
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise BadInput(f"{here}: no dvc.yaml here or above; run this inside a Springhead checkout")


@lru_cache(maxsize=32)
def _main_checkout(root: Path) -> Path:
    question = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir", "--show-toplevel"]
    git = subprocess.run(question, cwd=root, env=clean_environment(), capture_output=True, text=True)
    if git.returncode != 0:  # not under git: the folder itself is all there is
        return root
    common, top = (Path(line) for line in git.stdout.splitlines()[:2])
    # The project may live in a sub-folder of its repository; the same one in the main checkout.
    return (common.parent / root.relative_to(top.resolve())) if common.name == ".git" else root


def main_checkout(root: Path | str | None = None) -> Path:
    """Returns the main checkout of a repository, given any of its worktrees."""
    return _main_checkout(Path(root).resolve() if root is not None else repository())


def _named(override: str, root: Path | str | None) -> Path:
    try:
        folder = Path(override).expanduser()
    except RuntimeError as error:
        raise BadInput(f"SPRINGHEAD_HOME={override}: {error}; set it to a writable folder") from error
    return folder if folder.is_absolute() else (main_checkout(root) / folder).resolve()


def home(root: Path | str | None = None) -> Path:
    """Returns the state folder: ``$SPRINGHEAD_HOME`` or ``.springhead/`` of the main checkout.

    A relative ``$SPRINGHEAD_HOME`` is below the main checkout, so that it is one folder from wherever the
    command is called; ``~`` is the user's home.

    Raises:
        BadInput: if the folder cannot be made.
    """
    override = os.environ.get("SPRINGHEAD_HOME")
    folder = _named(override, root) if override else main_checkout(root) / ".springhead"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({error}); set SPRINGHEAD_HOME to a writable folder") from error
    return folder
