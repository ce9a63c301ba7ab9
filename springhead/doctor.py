"""Checks of the checkout and its environment, each with what to do about it."""

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from springhead.environment import alive, locked_packages
from springhead.errors import BadInput, Finding
from springhead.git import head_commit, under_git
from springhead.home import home as state_folder
from springhead.lineage.dvcfiles import broken_run_cache, read_lock, remove_run_cache
from springhead.lineage.ledger import Ledger

GOOD, WARNING, RED = "good", "warning", "red"
_LEAST_DISK = 2e9  # bytes; the quick profile writes well under 1 GB
_PYTHON = (3, 11)
_SHOWN = 3  # unsigned entries that are named; `--sign-ledger` lists all
_OPTIONAL_LOCKS = ("drive.lock", "peers.lock", "trl.lock")
"""What `make drive`, `make peers` and `make trl` install beyond or beside the environment of `make install`."""
_DVC_TEMPORARY = re.compile(r"\.[\w-]{22}\.tmp", re.ASCII)
"""The name under which DVC copies a file before it renames it."""


@dataclass(frozen=True)
class Symptom:
    """The outcome of one check."""

    check: str
    severity: str
    """``good``, ``warning`` or ``red``."""
    what: str
    do: str = ""
    mend: Callable[[], None] | None = None
    """Mends it without losing anything and without vouching for anything, where that is possible."""


def examine(root: Path) -> list[Symptom]:
    """Runs every check on a checkout; a check that finds nothing wrong says so."""
    checks = (
        python,
        packages,
        shadowing,
        git,
        dvc,
        lock_file,
        rwlock,
        run_cache,
        leftovers,
        ledger,
        keys,
        runs,
        spool,
        disk,
    )
    return [symptom for check in checks for symptom in check(root)]


def python(root: Path) -> Iterator[Symptom]:
    """Python is recent enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        yield Symptom("python", RED, f"Python {version}", "use Python 3.11 or later, then `make install`")
    else:
        yield Symptom("python", GOOD, f"Python {version}")


def packages(root: Path) -> Iterator[Symptom]:
    """The installed packages are those of the lock files."""
    locks = [lock for lock in sorted((root / "locks").glob("*.lock")) if lock.name not in _OPTIONAL_LOCKS]
    if not locks:
        yield Symptom("packages", WARNING, "locks/: no lock files", "restore them with `git checkout locks`")
        return
    wrong: dict[str, str] = {}
    for lock in locks:
        try:
            wanted = locked_packages(lock)
        except BadInput as error:
            yield Symptom("packages", RED, str(error), f"`git checkout {lock.relative_to(root)}`")
            continue
        for name, version in wanted.items():
            found = _version(name)
            if found != version:
                wrong[name] = f"{name} {found or 'is not installed'} (locked: {version})"
    if wrong:
        some = "; ".join(list(wrong.values())[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        yield Symptom("packages", RED, some, "`make install`")
    else:
        yield Symptom("packages", GOOD, f"as locked in {', '.join(lock.name for lock in locks)}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def shadowing(root: Path) -> Iterator[Symptom]:
    """The folder mlflow/ holds no Python, which would hide the package of that name."""
    modules = sorted((root / "mlflow").glob("*.py"))
    if modules:
        names = ", ".join(path.relative_to(root).as_posix() for path in modules)
        yield Symptom("mlflow/", RED, f"{names} hides the package mlflow", "move the module elsewhere")


def git(root: Path) -> Iterator[Symptom]:
    """The checkout is under git, so that executions can name their commit."""
    try:
        commit = head_commit(root) if under_git(root) else None
    except BadInput as error:
        do = "do as git says; until then receipts name no revision, and no trusted key counts as reviewed"
        yield Symptom("git", RED, str(error), do)
        return
    if commit is None:
        yield Symptom("git", WARNING, "no commit here; receipts cannot name a revision", "`git init`, then commit")
    else:
        yield Symptom("git", GOOD, f"commit {commit[:12]}")


def dvc(root: Path) -> Iterator[Symptom]:
    """DVC is initialised."""
    if not (root / ".dvc" / "config").is_file():
        yield Symptom("dvc", RED, ".dvc/config is missing", "`git checkout .dvc`, or `dvc init`")
    else:
        yield Symptom("dvc", GOOD, "initialised")


def lock_file(root: Path) -> Iterator[Symptom]:
    """``dvc.lock`` is whole."""
    path = root / "dvc.lock"
    if not path.exists():
        yield Symptom("dvc.lock", WARNING, "nothing has run here yet", "`springhead run`, or `dvc pull` if shared")
        return
    if b"<<<<<<<" in path.read_bytes():
        do = "`git checkout --ours dvc.lock`, then `dvc repro`: the run cache restores what was made"
        yield Symptom("dvc.lock", RED, "holds an unresolved merge", do)
        return
    try:
        yield Symptom("dvc.lock", GOOD, f"{len(read_lock(root))} stages")
    except BadInput as error:
        what, _, do = str(error).partition("; ")
        yield Symptom("dvc.lock", RED, what, do)


def _alive(pid: object) -> bool:
    return isinstance(pid, int) and alive(pid)


def _dvc_processes(root: Path) -> list[str]:
    """Returns the process ids of dvc commands that run in this checkout."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            here = (entry / "cwd").resolve().is_relative_to(root)
        except OSError:  # ended in this moment, or another user's
            continue
        if here and any(Path(os.fsdecode(argument)).name == "dvc" for argument in arguments[:3]):
            found.append(entry.name)
    return sorted(found, key=int)


def rwlock(root: Path) -> Iterator[Symptom]:
    """DVC's lock on paths is readable and held by processes that live."""
    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return

    def remove() -> None:
        path.unlink(missing_ok=True)

    try:
        held = json.loads(path.read_text(encoding="utf-8") or "null")
        if not isinstance(held, dict):
            raise ValueError("not a mapping")
        holders = [entry.get("write") for entry in held.values()] + [
            r for e in held.values() for r in e.get("read", [])
        ]
        pids = {holder["pid"] for holder in holders if holder}
    except (ValueError, AttributeError, KeyError, TypeError):
        # DVC writes this file in place, so a kill can leave half of it, which blocks all commands.
        running = _dvc_processes(root)
        first = f"wait for the dvc commands that run ({', '.join(running)}), then " if running else ""
        do = f"{first}`springhead doctor --fix` removes it"
        mend = None if running else remove
        yield Symptom("rwlock", RED, ".dvc/tmp/rwlock is damaged; every dvc command will fail", do, mend)
        return
    dead = sorted(str(pid) for pid in pids if not _alive(pid))
    if dead and len(dead) == len(pids):
        what = f".dvc/tmp/rwlock is held by processes that are gone ({', '.join(dead)})"
        yield Symptom("rwlock", WARNING, what, "DVC drops it by itself; `springhead doctor --fix` does so now", remove)


def run_cache(root: Path) -> Iterator[Symptom]:
    """DVC's run cache holds no folder that a kill left empty."""
    try:
        broken = broken_run_cache(root)
    except BadInput:  # no DVC here, which another check says
        return
    if broken:
        running = _dvc_processes(root)
        first = f"wait for the dvc commands that run ({', '.join(running)}), then " if running else ""
        what = f"DVC's run cache has {len(broken)} folders that a kill left empty; `dvc repro` fails on their stages"
        mend = None if running else functools.partial(remove_run_cache, broken)
        yield Symptom("run cache", RED, what, f"{first}`springhead doctor --fix` removes them", mend)


def leftovers(root: Path) -> Iterator[Symptom]:
    """No temporary outputs of killed stages, nor halves of files that DVC was restoring, lie about."""
    for path in sorted((root / "data").glob("**/.*.tmp-*")):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and _alive(int(pid)):
            continue

        def remove(path: Path = path) -> None:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

        where = path.relative_to(root).as_posix()
        yield Symptom("leftovers", WARNING, f"{where} was left by a killed stage", "`springhead doctor --fix`", remove)
    halves = [path for path in sorted((root / "data").glob("**/.*.tmp")) if _DVC_TEMPORARY.fullmatch(path.name)]
    if halves:
        running = _dvc_processes(root)
        first = f"wait for the dvc commands that run ({', '.join(running)}), then " if running else ""
        where = halves[0].relative_to(root).as_posix()
        what = f"files that dvc was copying when it was killed: {where}{' and others' if halves[1:] else ''}"
        do = f"{first}`springhead doctor --fix` removes them, and `dvc repro` restores what is missing"
        yield Symptom("leftovers", WARNING, what, do, None if running else functools.partial(_sweep, root, halves))


def _sweep(root: Path, halves: list[Path]) -> None:
    """Removes what DVC was copying, unless it has begun to copy once more."""
    if not _dvc_processes(root):
        for path in halves:
            path.unlink(missing_ok=True)


def ledger(root: Path) -> Iterator[Symptom]:
    """The ledger's chain is whole."""
    book = Ledger(state_folder(root))
    problems = book.verify()
    for problem in problems:
        do = "restore ledger.jsonl from a backup; `springhead audit` shows which models it concerns"
        yield Symptom("ledger", RED, problem, do)
    if not problems:
        yield Symptom("ledger", GOOD, f"{len(book.entries())} entries, chain whole")


def keys(root: Path) -> Iterator[Symptom]:
    """The signing key can be used, is trusted, and has signed the ledger's head."""
    from springhead.keys import Keys
    from springhead.lineage import head

    home = state_folder(root)
    book, mine = Ledger(home), Keys.of(root, home)
    for problem in [*mine.untrustworthy(), *mine.unusable()]:
        fresh = "no trusted key" in problem
        do = "" if fresh else "see docs/guide/signing.md; `git log mlflow/trusted-keys` shows who may sign"
        yield Symptom("keys", GOOD if fresh and not book.path.exists() else WARNING, problem, do)
    try:
        state = head.check_head(book, mine)
    except BadInput:  # named above
        return
    if state.problem and book.path.exists():
        missing = not book.path.with_name(head.FILE).is_file()
        do = "restore ledger.jsonl and ledger.head.json from a backup"
        if missing and not book.verify():
            do += (
                "; if you know why the head is missing, `springhead doctor --sign-ledger` signs the ledger as it is now"
            )
        yield Symptom("keys", RED, f"ledger: {state.problem}", do)
    elif state.unsigned:
        some = [_entry(entry) for entry in book.entries()[state.signed :][:_SHOWN]]
        more = "; …" if state.unsigned > _SHOWN else ""
        what = f"the last {state.unsigned} entries of the ledger are not signed yet: {'; '.join(some)}{more}"
        do = "`springhead doctor --sign-ledger` lists and signs them, if you know why"
        yield Symptom("keys", WARNING, what, "the next promotion signs them" if mine.external else do)
    elif state.signed:
        yield Symptom("keys", GOOD, f"the head of the ledger is signed ({state.signed} entries)")


def sign_ledger(root: Path, say: Callable[[str], None]) -> None:
    """Names the entries of the ledger that are not signed, then signs the ledger as it is now.

    It vouches for entries that anybody who can write to the file may have added, so only a person who looked
    at them asks for it; nothing else here does it by the way.

    Args:
        root: the repository.
        say: takes a line for each entry.

    Raises:
        Finding: if the ledger was cut or changed, which a new signature would hide.
        BadInput: if the key cannot be used.
    """
    from springhead.keys import Keys
    from springhead.lineage import head

    home = state_folder(root)
    book, mine = Ledger(home), Keys.of(root, home)
    with book.locked():
        state = head.check_head(book, mine)
        if state.problem and (book.verify() or book.path.with_name(head.FILE).is_file()):
            raise Finding(f"{book.path}: {state.problem}; restore ledger.jsonl and ledger.head.json from a backup")
        entries = book.entries()[state.signed :]
        for entry in entries:
            say(f"not signed: {_entry(entry)}")
        if entries:
            head.sign_head(book, mine, accept=True)
    say(f"signed: {len(entries)} entries" if entries else "every entry of the ledger is signed")


def _entry(entry: Mapping[str, Any]) -> str:
    """Returns an entry in one line: number, time, kind, and what it is about."""
    body = entry["body"]
    about = [str(body[key]) for key in ("stage", "model", "version", "path", "execution") if key in body]
    line = " ".join([str(entry["seq"]), str(entry["time"])[:19], str(entry["kind"]), *about])
    return "".join(c if c.isprintable() else "?" for c in line)  # what was forged must not rewrite the terminal


def runs(root: Path) -> Iterator[Symptom]:
    """No run is marked as running in MLflow whose process is gone."""
    from springhead import spool as recorder
    from springhead import tracking

    home = state_folder(root)
    if not tracking.has_store(home):
        return
    try:
        found = tracking.recorded(home)
    except BadInput as error:
        yield Symptom("runs", WARNING, str(error), "start MLflow, or unset MLFLOW_TRACKING_URI")
        return
    waiting = {path.name.partition(".")[0] for path in recorder.folder(home).glob("*.jsonl*")}
    stale = [run for name, run in found.items() if run["status"] == "RUNNING" and name not in waiting]
    for run in stale:
        what = f"MLflow's run {run['run'][:12]} of {run['stage']} is RUNNING, but nothing records into it any more"
        yield Symptom("runs", WARNING, what, f"`mlflow runs delete --run-id {run['run']}`, or set it to KILLED")
    if not stale:
        yield Symptom("runs", GOOD, f"{len(found)} executions in MLflow, none left behind")


def spool(root: Path) -> Iterator[Symptom]:
    """MLflow has received what the stages recorded."""
    from springhead import spool as recorder

    home = state_folder(root)
    waiting = recorder.waiting(home)

    def replay() -> None:
        from springhead import tracking

        tracking.replay(home)

    if waiting:
        what = f"{len(waiting)} executions are not in MLflow yet"
        yield Symptom("mlflow", WARNING, what, "the next run sends them; `springhead doctor --fix` does so now", replay)
    else:
        yield Symptom("mlflow", GOOD, "nothing waits to be sent")


def disk(root: Path) -> Iterator[Symptom]:
    """There is room for a run."""
    free = shutil.disk_usage(root).free
    if free < _LEAST_DISK:
        do = "free space; `dvc gc --workspace` drops old versions from the cache"
        yield Symptom("disk", WARNING, f"{free / 1e9:.1f} GB free", do)
    elif not os.access(root, os.W_OK):
        yield Symptom("disk", RED, f"{root} cannot be written", "change its owner or mode")
    else:
        yield Symptom("disk", GOOD, f"{free / 1e9:.0f} GB free")
