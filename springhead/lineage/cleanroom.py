"""What a stage needs to be executed again elsewhere: recorded files by their hashes, and clean worktrees."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.git import add_worktree, git, remove_worktree
from springhead.lineage.dvcfiles import cache_folder, file_md5


def link(source: Path, target: Path) -> None:
    """Puts a file into a place that gets folders as needed, without copying it where the file system allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


class Store:
    """Finds the files of an artefact by the hashes in ``dvc.lock``: in DVC's cache, else in the checkout."""

    def __init__(self, root: Path, lock: Mapping[str, Mapping[str, Any]]) -> None:
        self.root = root
        self.cache = cache_folder(root)
        self.outs: dict[str, str] = {}
        for entry in lock.values():
            self.outs |= {out["path"]: out["md5"] for out in entry.get("outs", ()) if "md5" in out}

    def has(self, path: str, entry: Mapping[str, Any]) -> bool:
        """Whether :meth:`files` would find something."""
        try:
            return bool(self.files(path, entry))
        except BadInput:
            return False

    def files(self, path: str, entry: Mapping[str, Any]) -> dict[str, Path]:
        """Returns the files of a path, by name inside it; a single file has the name ''.

        Args:
            path: an output, something inside one, a folder above several, or a dependency of ``entry``.
            entry: the lock entry of the stage that reads it; it says which version was read.

        Raises:
            BadInput: if a file is neither in the cache nor in the checkout.
        """
        named = {dep["path"]: dep["md5"] for dep in entry.get("deps", ()) if "md5" in dep}
        found = self._hashes(path, named[path]) if path in named else None
        if found is None:
            found = self._from_outputs(path)
        if not found:
            raise BadInput(f"{path}: not in DVC's cache; `dvc fetch` it from a remote, or run its stage again")
        return {name: self._file(f"{path}/{name}" if name else path, md5) for name, md5 in found.items()}

    def _hashes(self, path: str, md5: str) -> dict[str, str] | None:
        """Returns the hash of each file behind one hash; None for a folder whose listing is not stored."""
        if not md5.endswith(".dir"):
            return {"": md5}
        listing = self._object(md5)
        if not listing.is_file():
            return None
        try:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{listing}: damaged listing of {path}; remove it, then `dvc fetch`") from None

    def _from_outputs(self, path: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for out, md5 in self.outs.items():
            if not (out == path or out.startswith(path + "/") or path.startswith(out + "/")):
                continue
            for name, inner in (self._hashes(out, md5) or {}).items():
                full = f"{out}/{name}" if name else out
                if full == path:
                    found[""] = inner
                elif full.startswith(path + "/"):
                    found[full[len(path) + 1 :]] = inner
        return found

    def _object(self, md5: str) -> Path:
        return self.cache / md5[:2] / md5[2:]

    def _file(self, path: str, md5: str) -> Path:
        stored, here = self._object(md5), self.root / path
        if stored.is_file():
            return stored
        if here.is_file() and file_md5(here) == md5:  # an output that DVC does not cache
            return here
        raise BadInput(f"{path}: its content {md5} is not in DVC's cache; `dvc fetch`, or run its stage again")


@dataclass
class Trees:
    """One clean worktree per commit, made when it is first asked for."""

    root: Path
    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def has(self, commit: str) -> bool:
        """Whether the commit is still in the repository."""
        try:
            git(self.root, "cat-file", "-e", f"{commit}^{{commit}}")
        except BadInput:
            return False
        return True

    def place(self, commit: str) -> Path:
        """Returns the project's folder in the worktree of a commit."""
        if commit not in self.made:
            self.made[commit] = add_worktree(self.root, commit, self.folder / "trees" / commit)
        return self.made[commit]

    def clean(self, commit: str) -> None:
        """Takes away everything that a stage read or wrote: the next one must find only its own inputs."""
        top = self.folder / "trees" / commit
        git(top, "reset", "--hard", "--quiet")
        git(top, "clean", "-ffdxq")


@contextlib.contextmanager
def workplace(root: Path, home: Path) -> Iterator[Path]:
    """Makes a folder that is removed at the end; one whose process was killed is removed by the next call."""
    base = home / "reproductions"
    base.mkdir(parents=True, exist_ok=True)
    with (base / "sweep.lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # nobody may take a folder for abandoned before it is locked
        for left in sorted(path for path in base.iterdir() if path.is_dir()):
            if not _held(left / "lock"):
                shutil.rmtree(left, ignore_errors=True)
        git(root, "worktree", "prune")
        folder = base / uuid.uuid4().hex[:12]
        folder.mkdir()
        lock = (folder / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        for tree in sorted((folder / "trees").glob("*")):
            remove_worktree(root, tree)
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _held(path: Path) -> bool:
    """Whether a living process holds a lock file."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
