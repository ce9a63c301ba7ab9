"""Mends what an audit found, as far as that can be done without believing anything new.

A file comes back from DVC's cache, a damaged cache object from the workspace, a remote, or by executing the
stage again; an alias goes back to where the ledger has it. Everything that comes back must have the digest
that the receipt names. What would need a decision (a changed ledger, an edited ``dvc.lock``, a red verdict)
is left alone and named.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from springhead.lineage.audit import Audit, audit
from springhead.lineage.digests import file_digest
from springhead.lineage.dvcfiles import file_md5
from springhead.lineage.head import check_head
from springhead.lineage.promotions import CHALLENGER, CHAMPION, PREVIOUS, standing
from springhead.lineage.workspace import RED, Workspace

Say = Callable[[str], None]
_FROM_DVC = ("outputs", "dvc.lock", "receipts", "cache", "verdicts")


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        done: each step, in words.
        left: an audit afterwards.
    """

    done: tuple[str, ...]
    left: Audit


def repair(root: Path, say: Say = lambda line: None, execute: bool = True) -> Repair:
    """Audits a checkout, mends what it can and audits again.

    Args:
        root: the repository root.
        say: takes a line for each step.
        execute: whether a stage may be executed again where nothing else has its output.

    Raises:
        BadInput: as :func:`springhead.lineage.audit.audit`.
    """
    found = audit(root)
    done: list[str] = []

    def note(line: str) -> None:
        done.append(line)
        say(line)

    if any(p.severity == RED and p.check in _FROM_DVC for p in found.problems):
        _Files(root, found, note, execute).mend()
    if any(p.check == "registry" for p in found.problems):
        _aliases(root, note)
    return Repair(tuple(done), audit(root) if done else found)


class _Files:
    """Brings outputs and cache objects back to what the receipts say."""

    def __init__(self, root: Path, found: Audit, note: Say, execute: bool) -> None:
        self.root, self.note, self.execute = root, note, execute
        self.workspace = Workspace(root)
        self.suspects = {p.where for p in found.problems if p.severity == RED and p.check in _FROM_DVC}

    def mend(self) -> None:
        """Mends every output that a finding is about."""
        for stage, locked in sorted(self.workspace.locked.items()):
            for out in sorted(locked.outs):
                objects = [(path, md5, place) for path, md5, place in locked.objects if _below(path, out)]
                broken = locked.broken.get(out)
                about = {out, *(path for path, _, _ in objects), *(self._shown(p) for _, _, p in objects)}
                about |= {self._shown(broken)} if broken is not None else set()
                added = any(where.startswith(out + "/") for where in self.suspects)
                if about & self.suspects or added:
                    self._mend(stage, out, objects, broken)

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def _mend(self, stage: str, out: str, objects: list[tuple[str, str, Path]], broken: Path | None) -> None:
        wanted = self._wanted(stage)
        if broken is not None and broken.is_file():
            self.note(f"removed the damaged listing of {out} from the cache")
            broken.unlink()
        lost = broken is not None
        for path, md5, place in objects:
            if place.is_file() and file_md5(place) != md5:
                place.unlink()
                self.note(f"removed a damaged object from the cache ({path})")
            if place.is_file():
                continue
            file = self.root / path
            if file.is_file() and _now(file) == wanted.get(path) and file_md5(file) == md5:
                _copy_object(file, place)
                self.note(f"put {path} back into the cache from the workspace")
                continue
            lost = True
        if lost and self._dvc("fetch", out):
            self.note(f"fetched {out} from the remote")
            lost = False
        if not lost and self._dvc("checkout", "--force", out):
            self.note(f"checked out {out}")
        elif self.execute:
            self.note(f"executing {stage} again: neither cache nor remote has {out}")
            if not self._dvc("repro", "--single-item", "--force", stage):
                self.note(f"{stage} could not be executed; run `dvc repro {stage}` to see why")
                return
            changed = sorted(path for path, digest in wanted.items() if _now(self.root / path) != digest)
            if changed:
                self.note(f"{stage} now makes other bytes ({', '.join(changed[:3])}): its models must be judged again")
        else:
            self.note(f"{out}: neither cache nor remote has it; `dvc repro -f {stage}` makes it again")

    def _wanted(self, stage: str) -> dict[str, str]:
        """Returns the digest of every file a stage made, by path, from its receipt."""
        receipt = self.workspace.graph.receipts.get(stage)
        found: dict[str, str] = {}
        for out, facts in (receipt or {"outputs": {}})["outputs"].items():
            files = facts.get("files")
            found |= {out: facts["sha256"]} if files is None else {f"{out}/{n}": d for n, d in files.items()}
        return found

    def _dvc(self, *arguments: str) -> bool:
        """Runs DVC quietly and tells whether it succeeded."""
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)
        return done.returncode == 0


def _below(path: str, out: str) -> bool:
    return path == out or path.startswith(out + "/")


def _now(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


def _copy_object(source: Path, place: Path) -> None:
    """Puts a file into the cache, whole or not at all, read-only as DVC keeps its objects."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.tmp-{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.chmod(0o444)
    os.replace(temporary, place)


def _aliases(root: Path, note: Say) -> None:
    """Puts aliases back to where the ledger has them, if the versions still hold what was promoted."""
    from springhead import attestations, tracking, versions

    workspace = Workspace(root)
    state = check_head(workspace.ledger, workspace.keys)
    entries = [] if state.problem else workspace.ledger.entries()
    if state.problem or any(entry["kind"] == "promotion" for entry in entries[state.signed :]):
        note("the aliases are left alone: the ledger that says where they belong cannot be believed")
        return
    client = tracking.connect(workspace.home)
    for alias in (CHAMPION, CHALLENGER, PREVIOUS):
        for name, body in standing(entries, alias).items():
            version = str(body["version"])
            whole = versions.stored_files(client, name, version) == body.get("stored")
            if not whole or attestations.problems(workspace.home, workspace.keys, body):
                note(f"{name}/{version}: not what was promoted; `springhead promote {name}` registers it again")
            elif versions.aliases_of(client, name).get(alias) != version:
                client.set_registered_model_alias(name, alias, version)
                note(f"alias {alias} of {name} is back on version {version}")
    for found in versions.everything(workspace.home):
        for alias in found.aliases:
            if alias in (CHAMPION, CHALLENGER) and found.name not in standing(entries, alias):
                client.delete_registered_model_alias(found.name, alias)
                note(f"removed the alias {alias} from {found.name}/{found.version}: no promotion put it there")
