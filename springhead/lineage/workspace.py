"""A checkout as an audit sees it: every artefact with its digest now, each file read once."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from springhead.home import home as state_folder
from springhead.lineage.digests import file_digest, files_digest
from springhead.lineage.dvcfiles import Hashes, directory_md5, hash_file, read_lock
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path

RED, WARNING = "red", "warning"
_THREADS = 4  # hashlib and read() release the GIL


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
    """Paths of the models that depend on it."""
    do: str


class Workspace:
    """A checkout with the digests of its artefacts as they are now, each file read once."""

    def __init__(self, root: Path, progress: Callable[[int, int], None] | None = None) -> None:
        self.root = root
        self.home = state_folder(root)
        self.graph = Graph.read(root)
        self.lock = read_lock(root)
        self.ledger = Ledger(self.home)
        self.problems: list[Problem] = []
        self.checked: dict[str, int] = {}
        self.outputs = sorted({out for receipt in self.graph.receipts.values() for out in receipt["outputs"]})
        self.files = {out: self._listing(out) for out in self.outputs}
        wanted = sorted({path for listing in self.files.values() for path in listing.values()})
        receipts = [receipt_path(root, name) for name in self.graph.receipts]
        self.hashes: dict[Path, Hashes] = dict(hashed([*wanted, *receipts], progress))

    def _listing(self, out: str) -> dict[str, Path]:
        """Returns the files of an output by relative path; a single file has the path ''."""
        path = self.root / out
        if path.is_dir():
            found = (item for item in path.rglob("*") if item.is_file())
            return {item.relative_to(path).as_posix(): item for item in sorted(found)}
        return {"": path} if path.is_file() else {}

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
                    return {"": self.hashes[file].sha256}
                if full.startswith(path + "/"):
                    found[full[len(path) + 1 :]] = self.hashes[file].sha256
        outside = self.root / path
        if not found and outside.exists():
            listing = self._listing(path)
            found = {name: file_digest(file) for name, file in listing.items()}
        return found

    def md5(self, path: str) -> str | None:
        """Returns DVC's hash of an output or receipt as it is now."""
        file = self.root / path
        if file in self.hashes:
            return self.hashes[file].md5
        listing = self.files.get(path) or self._listing(path)
        if not listing:
            return None
        known = {n: self.hashes[f].md5 if f in self.hashes else hash_file(f).md5 for n, f in listing.items()}
        return known[""] if "" in known else directory_md5(known)

    def report(self, severity: str, check: str, what: str, where: str, do: str, stages: Iterable[str] = ()) -> None:
        """Adds a finding; the models made by or after ``stages`` are affected."""
        affects = tuple(sorted({model.path for model in self.graph.models_behind(stages)}))
        self.problems.append(Problem(severity, check, what, where, affects, do))

    def count(self, check: str, number: int = 1) -> None:
        """Counts what a check looked at."""
        self.checked[check] = self.checked.get(check, 0) + number


def hashed(paths: list[Path], progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[Path, Hashes]]:
    """Yields the digests of files in their order, read by several threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, (path, hashes) in enumerate(zip(paths, pool.map(hash_file, paths), strict=True), start=1):
            if progress is not None:
                progress(done, len(paths))
            yield path, hashes
