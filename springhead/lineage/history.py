"""The artefacts of another revision, found through its ``dvc.lock`` and DVC's cache.

A commit names the content of every output by MD5; the cache holds it by that name. So a data set
of last week can be read in place, without a checkout, as long as nobody emptied the cache.
"""

import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from springhead.errors import BadInput
from springhead.git import clean_environment
from springhead.jsonio import read_json
from springhead.lineage.digests import file_digest
from springhead.lineage.dvcfiles import cache_folder
from springhead.lineage.graph import Graph
from springhead.lineage.receipts import FOLDER, receipt_path
from springhead.params import Loader


class State:
    """The artefacts of a repository at some moment.

    Args:
        root: the repository root.
    """

    label = "workspace"

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def graph(self) -> Graph:
        """The artefact graph, from the receipts of that moment."""
        return Graph.read(self.root)

    def file(self, path: str) -> Path:
        """Returns where the content of a file lies that has this path below the repository root.

        Raises:
            BadInput: if it is not here; the message says how to get it.
        """
        found = self.root / path
        if not found.is_file():
            raise BadInput(f"{path}: not in the workspace; run `dvc checkout {path}`, or `dvc pull {path}`")
        return found


class Commit(State):
    """The artefacts that a commit's ``dvc.lock`` names.

    Args:
        root: the repository root.
        revision: anything git takes for a commit.

    Raises:
        BadInput: if git does not know it, or it has no valid ``dvc.lock``.
    """

    def __init__(self, root: Path, revision: str) -> None:
        super().__init__(root)
        asked = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        if not revision or asked is None:
            raise BadInput(f"{revision}: git knows no such revision; `git log --all` lists them")
        self.commit = asked.strip()
        self.label = revision if self.commit.startswith(revision) else f"{revision} ({self.commit[:12]})"
        text = _git(root, "show", f"{self.commit}:./dvc.lock")
        if text is None:
            raise BadInput(f"{self.label}: has no dvc.lock, so it names no data; give a revision that was run")
        self._outs = _outputs(text, f"{self.label}: dvc.lock")
        self._listings: dict[str, dict[str, str]] = {}

    @cached_property
    def _cache(self) -> Path:
        return cache_folder(self.root)

    def _object(self, md5: str, path: str) -> Path:
        found = self._cache / md5[:2] / md5[2:]
        if not found.is_file():
            raise BadInput(
                f"{self.label}:{path}: its content is not in DVC's cache ({found}); "
                f"run `dvc fetch --all-commits {path}`, or `git checkout {self.commit[:12]}` and `dvc pull`"
            )
        return found

    @cached_property
    def graph(self) -> Graph:
        """The artefact graph, from those receipts of the commit that the cache holds."""
        return Graph({name: _receipt(path) for name, path in self.receipt_files().items()})

    def receipt_files(self) -> dict[str, Path]:
        """Returns by stage where its receipt lies; a stage whose receipt the cache lacks is left out."""
        found = {}
        for path in self._outs:
            if path.startswith(f"{FOLDER}/") and path.endswith(".json"):
                with suppress(BadInput):  # only the stages that a question is about must be there
                    found[Path(path).name.removesuffix(".json")] = self.file(path)
        return found

    def file(self, path: str) -> Path:
        """See :meth:`State.file`."""
        out = next((o for o in (path, *map(str, Path(path).parents)) if o in self._outs), None)
        if out is None:
            raise BadInput(f"{self.label}:{path}: no output of that revision's dvc.lock has this path")
        md5 = self._outs[out]
        if out == path:
            return self._object(md5, path)
        if out not in self._listings:
            self._listings[out] = _listing(self._object(md5, out))
        inside = path[len(out) + 1 :]
        if inside not in self._listings[out]:
            raise BadInput(f"{self.label}:{path}: {out} has no such file")
        return self._object(self._listings[out][inside], path)

    def has(self, path: str) -> bool:
        """Whether the commit's ``dvc.lock`` names an output at, above or below a path."""
        return any(o == path or path.startswith(f"{o}/") or o.startswith(f"{path}/") for o in self._outs)


@lru_cache(maxsize=10_000)
def _receipt(path: Path) -> dict[str, Any]:
    """Reads a receipt from the cache, where many commits name the same object."""
    return dict(read_json(path))


def _outputs(text: str, name: str) -> dict[str, str]:
    """Returns the MD5 of every output in a lock file."""
    try:
        stages = (yaml.load(text, Loader=Loader) or {}).get("stages") or {}
        return {str(o["path"]): str(o["md5"]) for s in stages.values() for o in s.get("outs", []) if "md5" in o}
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise BadInput(f"{name}: not a lock file of DVC ({type(error).__name__}); take another revision") from error


def _listing(path: Path) -> dict[str, str]:
    try:
        return {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(path.read_bytes())}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: damaged listing in DVC's cache; remove it and run `dvc fetch`") from error


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=root, env=clean_environment(), capture_output=True, text=True, errors="replace")
    return done.stdout if done.returncode == 0 else None


def commits(root: Path) -> Iterator[Commit]:
    """Yields the commits that changed ``dvc.lock``, newest first, also those that only runs made.

    `springhead run` keeps a commit of every run below ``refs/springhead``. Commits with the same
    lock, or with a damaged one, are passed over.
    """
    seen: set[str] = set()
    for revision in (_git(root, "rev-list", "--all", "--", "dvc.lock") or "").split():
        blob = (_git(root, "rev-parse", "--verify", "--quiet", f"{revision}:./dvc.lock") or "").strip()
        if not blob or blob in seen:
            continue
        seen.add(blob)
        try:
            yield Commit(root, revision)
        except BadInput:
            continue


def find_receipt(root: Path, digest: str) -> tuple[Commit, dict[str, Any]] | None:
    """Returns the newest commit and receipt that name a digest: of an output, a data set or a model.

    Args:
        root: the repository root.
        digest: the first digits of a SHA-256.
    """
    for state in commits(root):
        for receipt in state.graph.receipts.values():
            entries = [facts["sha256"] for facts in receipt["outputs"].values()]
            entries += [d["sha256"] for d in receipt["datasets"] if d["role"] == "output"]
            entries += [m["sha256"] for m in receipt["models"]]
            if any(str(entry).startswith(digest) for entry in entries):
                return state, receipt
    return None


def receipts_by_digest(root: Path, wanted: Iterable[str]) -> dict[str, tuple[State, str]]:
    """Returns for each digest of a receipt the state that has it and the stage, the workspace first.

    Digests that neither the workspace nor the history knows are left out.
    """
    found: dict[str, tuple[State, str]] = {}
    left = set(wanted)
    here = State(root)
    for stage in here.graph.receipts:
        found[file_digest(receipt_path(root, stage))] = (here, stage)
    for state in commits(root):
        if not left - found.keys():
            break
        for stage, path in state.receipt_files().items():
            found.setdefault(_digest(path), (state, stage))
    return {digest: found[digest] for digest in left if digest in found}


@lru_cache(maxsize=10_000)
def _digest(path: Path) -> str:
    return file_digest(path)
