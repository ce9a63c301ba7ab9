"""A checkout as an audit sees it: every artefact with its digest now, each file read once."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from springhead.declared import Declared, read_stages
from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.keys import Keys
from springhead.lineage.digests import file_digest, files_digest
from springhead.lineage.dvcfiles import cache_folder, folder_listing, object_path, read_lock
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.lineage.promotions import standing
from springhead.lineage.receipts import FOLDER, checked_receipt, is_inside, receipt_path

RED, WARNING = "red", "warning"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it is claimed to be."""

    severity: str
    """``red`` or ``warning``."""
    check: str
    """Which check found it, for example ``outputs``."""
    what: str
    where: str
    """The file, id or name."""
    affects: tuple[str, ...]
    """The models that depend on it: registered champions by name, then all of them by path."""
    do: str


class Workspace:
    """A checkout with the digests of its artefacts as they are now, each file read once.

    SHA-256 is the only digest of the data. What ``dvc.lock`` names by MD5 is found in DVC's cache, where
    the MD5 is the name of an object, and the object's SHA-256 is compared; so nothing is read twice, and
    MD5, which is slower and can be forged, is needed only where the cache lacks an object.

    Args:
        root: the repository root.
        progress: called with (files hashed, files in all).
    """

    def __init__(self, root: Path, progress: Callable[[int, int], None] | None = None) -> None:
        self.root = root
        self.home = state_folder(root)
        self.unreadable: list[tuple[Path, str]] = []
        """Receipts and lock files that cannot be read, and why."""
        self.graph = Graph(self._receipts())
        self.lock = self._lock()
        self.ledger = Ledger(self.home)
        self.keys = Keys.of(root, self.home)
        self.problems: list[Problem] = []
        self.checked: dict[str, int] = {}
        self.outputs = sorted({out for receipt in self.graph.receipts.values() for out in receipt["outputs"]})
        self.files = {out: self._listing(out) for out in self.outputs}
        self.locked = {stage: Locked.of(entry, root) for stage, entry in self.lock.items()}
        wanted = {path for listing in self.files.values() for path in listing.values()}
        wanted |= {receipt_path(root, name) for name in self.graph.receipts}
        wanted |= {path for locked in self.locked.values() for _, _, path in locked.objects if path.is_file()}
        self.sizes: dict[Path, int] = {}
        self.hashes = self._hashed(sorted(wanted), progress)

    def _receipts(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in sorted((self.root / FOLDER).glob("*.json")):
            try:
                found[path.stem] = checked_receipt(path)
            except BadInput as error:
                self.unreadable.append((path, str(error)))
        return found

    def _lock(self) -> dict[str, dict[str, Any]]:
        try:
            return read_lock(self.root)
        except BadInput as error:
            self.unreadable.append((self.root / "dvc.lock", str(error)))
            return {}

    def _listing(self, out: str) -> dict[str, Path]:
        """Returns the files of an output by relative path; a single file has the path ''."""
        path = self.root / out
        if path.is_dir():
            found = (item for item in path.rglob("*") if item.is_file())
            return {item.relative_to(path).as_posix(): item for item in sorted(found)}
        return {"": path} if path.is_file() else {}

    def linked_folders(self, out: str) -> list[str]:
        """Returns links to folders inside an output: what they lead to is listed nowhere."""
        path = self.root / out
        found = (item for item in path.rglob("*") if item.is_symlink() and item.is_dir()) if path.is_dir() else ()
        return sorted(item.relative_to(self.root).as_posix() for item in found)

    @cached_property
    def declared(self) -> dict[str, Declared]:
        """The stages of ``dvc.yaml``; none where DVC cannot read it, which it says by itself."""
        try:
            return read_stages(self.root, self.home / "declared")
        except BadInput:
            return {}

    def maker(self, path: str) -> str | None:
        """Returns the stage that ``dvc.yaml`` declares to make a path."""
        for stage, declared in self.declared.items():
            if any(path == out or path.startswith(out + "/") or out.startswith(path + "/") for out in declared.outputs):
                return stage
        return None

    def _hashed(self, paths: list[Path], progress: Callable[[int, int], None] | None) -> dict[Path, str]:
        """Returns the SHA-256 of files; a file that is linked to the cache is read once."""
        same: dict[tuple[int, int], Path] = {}
        first: dict[Path, Path] = {}
        for path in paths:
            facts = path.stat()
            first[path] = same.setdefault((facts.st_dev, facts.st_ino), path)
            self.sizes[path] = facts.st_size
        digests = digests_of(list(dict.fromkeys(first.values())), self.sizes, progress)
        return {path: digests[one] for path, one in first.items()}

    def sha256(self, path: str) -> str | None:
        """Returns the digest of a path as it is now, or None if there is nothing."""
        files = self.now(path)
        if not files:
            return None
        return files[""] if "" in files else files_digest(files)

    def now(self, path: str) -> dict[str, str]:
        """Returns the digests of the files at or below a path; a single file has the path ''."""
        found: dict[str, str] = {}
        for out, listing in self.files.items():
            for name, file in listing.items():
                full = f"{out}/{name}" if name else out
                if full == path:
                    return {"": self.hashes[file]}
                if full.startswith(path + "/"):
                    found[full[len(path) + 1 :]] = self.hashes[file]
        outside = self.root / path
        if not found and outside.exists():
            listing = self._listing(path)
            found = {name: self.hashes.get(file) or file_digest(file) for name, file in listing.items()}
        return found

    def report(self, severity: str, check: str, what: str, where: str, do: str, stages: Iterable[str] = ()) -> None:
        """Adds a finding; the models made by or after ``stages`` are affected, and where they stand as champion."""
        models = self.graph.models_behind(stages)
        paths = {model.path for model in models}
        digests = {model.sha256 for model in models}
        names = {f"models:/{name}@champion" for name, digest in self._champions.items() if digest in digests}
        self.problems.append(Problem(severity, check, what, where, (*sorted(names), *sorted(paths)), do))

    @cached_property
    def broken_chain(self) -> list[str]:
        """What is wrong with the ledger's chain, one message per line."""
        return self.ledger.verify()

    @cached_property
    def _champions(self) -> dict[str, str]:
        entries = [] if self.broken_chain else self.ledger.entries()
        return {name: str(body.get("digest")) for name, body in standing(entries).items()}

    def count(self, check: str, number: int = 1) -> None:
        """Counts what a check looked at."""
        self.checked[check] = self.checked.get(check, 0) + number


@dataclass(frozen=True)
class Locked:
    """What ``dvc.lock`` records for one stage, resolved to the objects of DVC's cache.

    Attributes:
        outs: the MD5 of each output by path, ``….dir`` for a folder.
        objects: for every file of every output: (path in the repository, MD5, object in the cache).
        broken: folders whose listing in the cache is missing or is not what its name says, by path.
    """

    outs: dict[str, str]
    objects: tuple[tuple[str, str, Path], ...]
    broken: dict[str, Path]

    @classmethod
    def of(cls, entry: dict[str, Any], root: Path) -> "Locked":
        """Reads the outputs of a stage of ``dvc.lock``."""
        listed = ((str(out["path"]), str(out.get("md5", ""))) for out in entry.get("outs", []))
        outs = {path: md5 for path, md5 in listed if is_inside(path)}
        cache = cache_folder(root)
        objects: list[tuple[str, str, Path]] = []
        broken: dict[str, Path] = {}
        for path, md5 in outs.items():
            place = object_path(cache, md5)
            if not md5.endswith(".dir"):
                objects.append((path, md5, place))
                continue
            inner = folder_listing(place, md5)
            if inner is None:
                broken[path] = place
                continue
            objects += [(f"{path}/{name}", value, object_path(cache, value)) for name, value in inner.items()]
        return cls(outs, tuple(objects), broken)


def digests_of(
    paths: list[Path], sizes: Mapping[Path, int], progress: Callable[[int, int], None] | None = None
) -> dict[Path, str]:
    """Returns the SHA-256 of files, read by as many threads as there are cores, the largest file first."""
    found: dict[Path, str] = {}
    ordered = sorted(paths, key=lambda path: -sizes.get(path, 0))  # so that no core ends with a big one alone
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashlib and read() release the GIL
        for done, (path, digest) in enumerate(zip(ordered, pool.map(_digest, ordered), strict=True), start=1):
            found[path] = digest
            if progress is not None:
                progress(done, len(ordered))
    return found


def _digest(path: Path) -> str:
    """Returns the digest of a file, or why it has none, which equals no digest."""
    try:
        return file_digest(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"
