"""Executes stages again in a clean git worktree and names the first artefact that differs.

A receipt claims that this code, these parameters and these inputs give these outputs. Here the
claim is tried: the commit that holds the code is checked out, exactly the recorded inputs are put
into it from DVC's cache, and the stage's command runs there by itself. DVC does not take part, so
neither its run cache can answer in the stage's place nor can a result get into the shared cache.
Each stage starts from what was recorded, not from what the stage before it made just now: one
difference does not make every later stage differ.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from springhead.declared import is_data
from springhead.environment import HARNESS
from springhead.errors import BadInput, SpringheadError
from springhead.git import clean_environment, git
from springhead.home import home as state_folder
from springhead.jsonio import read_json
from springhead.keys import Keys
from springhead.lineage.cleanroom import Store, Trees, link, workplace
from springhead.lineage.contents import first_difference, json_difference
from springhead.lineage.digests import dependency_digest, file_digest
from springhead.lineage.dvcfiles import read_lock
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path
from springhead.lineage.status import last_runs
from springhead.params import lookup, read_params
from springhead.progress import duration

Say = Callable[[str], None]
_TAIL = 20  # lines of a failed stage that its error quotes
_LOCATED = 10  # differing files per stage into which we look; the others are only named


@dataclass(frozen=True)
class Difference:
    """An artefact that came out otherwise."""

    path: str
    what: str
    """Where inside it the difference begins."""


@dataclass(frozen=True)
class Outcome:
    """How one stage came out."""

    stage: str
    commit: str
    state: Literal["equal", "differs", "failed"]
    differences: tuple[Difference, ...] = ()
    """By path. The receipt is listed only if every output is equal."""
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Reproduction:
    """The outcome of all stages, in the order of the graph."""

    outcomes: tuple[Outcome, ...]

    @property
    def equal(self) -> bool:
        """Whether every stage gave the same bytes."""
        return all(outcome.state == "equal" for outcome in self.outcomes)

    @property
    def first(self) -> tuple[str, Difference] | None:
        """The first stage with a differing artefact and that artefact, in the order of graph and path."""
        found = ((o.stage, o.differences[0]) for o in self.outcomes if o.differences)
        return next(found, None)

    def as_json(self) -> dict[str, Any]:
        """Returns the facts that are the same each time."""
        first = self.first
        return {
            "equal": self.equal,
            "first": {"stage": first[0], "path": first[1].path, "what": first[1].what} if first else None,
            "stages": [
                {
                    "stage": o.stage,
                    "commit": o.commit,
                    "state": o.state,
                    "differences": [{"path": d.path, "what": d.what} for d in o.differences],
                    "error": o.error,
                }
                for o in self.outcomes
            ],
        }


def verify(root: Path, names: Sequence[str] = (), say: Say = lambda line: None) -> Reproduction:
    """Executes stages again and compares everything they make with their receipts.

    Args:
        root: the repository root. Nothing in it changes.
        names: stages such as ``rl-collect@BallCircle``, or ``rl-collect`` for all its items; all if empty.
        say: takes lines about the progress.

    Returns:
        The outcomes. One entry ``reproduction`` with them is added to the ledger.

    Raises:
        BadInput: before anything runs: for an unknown stage, one without a receipt, or one whose
            code or parameters no commit holds as the receipt has them.
    """
    return _Verification(root, say).run(names)


class _Verification:
    def __init__(self, root: Path, say: Say) -> None:
        self.root, self.say = root, say
        self.home = state_folder(root)
        self.graph = Graph.read(root)
        self.lock = read_lock(root)
        self.ledger = Ledger(self.home)
        entries = self.ledger.entries()
        self.seconds = {name: float(body.get("seconds", 0.0)) for name, body in last_runs(entries).items()}
        self.made_at = {
            str(e["body"].get("receipt")): str(e["body"].get("git", {}).get("revision", ""))
            for e in entries
            if e["kind"] == "execution"
        }
        self.head = git(root, "rev-parse", "--verify", "HEAD^{commit}")
        self.prefix = git(root, "rev-parse", "--show-prefix")
        self.store = Store(root, self.lock)

    def run(self, names: Sequence[str]) -> Reproduction:
        stages = self._wanted(names)
        with workplace(self.root, self.home) as folder:
            trees = Trees(self.root, folder)
            commits = {stage: self._commit(stage, trees) for stage in stages}
            self._refuse_edits(stages)
            left = sum(self.seconds.get(stage, 0.0) for stage in stages)
            self.say(f"{len(stages)} stages to execute again" + (f", about {duration(left)}" if left >= 1 else ""))
            outcomes = []
            for number, stage in enumerate(stages, start=1):
                usual = self.seconds.get(stage, 0.0)
                took = f" (took {duration(usual)})" if usual else ""
                self.say(f"> [{number}/{len(stages)}] {stage} at {commits[stage][:12]}{took}")
                outcome = self._verify(stage, commits[stage], trees, folder)
                outcomes.append(outcome)
                left -= usual
                rest = f", ~{duration(left)} left" if left >= 1 else ""
                self.say(f"= {stage}: {outcome.state} in {duration(outcome.seconds)}{rest}")
        result = Reproduction(tuple(outcomes))
        self.ledger.append("reproduction", self._body(result), Keys.of(self.root, self.home))
        return result

    def _body(self, result: Reproduction) -> dict[str, Any]:
        facts = result.as_json()
        stages = [{key: entry[key] for key in ("stage", "commit", "state")} for entry in facts["stages"]]
        receipts = {o.stage: file_digest(receipt_path(self.root, o.stage)) for o in result.outcomes}
        seconds = {o.stage: round(o.seconds, 3) for o in result.outcomes}
        return {
            "equal": result.equal,
            "first": facts["first"],
            "stages": [{**s, "receipt": receipts[s["stage"]], "seconds": seconds[s["stage"]]} for s in stages],
        }

    # -- what is claimed --------------------------------------------------------------------------

    def _wanted(self, names: Sequence[str]) -> list[str]:
        known = [stage for stage in self.graph.order if stage in self.lock]
        if not known:
            raise BadInput(f"{self.root}: no stage has run here; `springhead run` or `dvc pull` first")
        wanted: set[str] = set()
        for name in names:
            found = [stage for stage in known if name in (stage, stage.partition("@")[0])]
            if not found:
                some = [stage for stage in known if stage.partition("@")[0] == name.partition("@")[0]] or known
                raise BadInput(f"{name}: no stage of this name has run here; there are {', '.join(some[:6])} …")
            wanted.update(found)
        return [stage for stage in known if not names or stage in wanted]

    def _code(self, stage: str) -> dict[str, str]:
        """Returns the digests of what git must hold for a stage: its code, without the harness."""
        receipt = self.graph.receipts[stage]
        files = {path: digest for path, digest in receipt["code"]["files"].items() if path not in HARNESS}
        others = {p: facts["sha256"] for p, facts in receipt["dependencies"].items() if not is_data(p)}
        return {**files, **others}

    def _commit(self, stage: str, trees: "Trees") -> str:
        """Returns the commit at which a stage can be tried: the one that made the receipt, else HEAD.

        The ledger names the first one; it does not know a receipt that was pulled from elsewhere.

        Raises:
            BadInput: if neither holds the code and parameters of the receipt.
        """
        made_at = self.made_at.get(file_digest(receipt_path(self.root, stage)), "")
        missing = ""
        for commit in dict.fromkeys((made_at, self.head)):
            if commit and trees.has(commit):
                missing = self._unlike(stage, trees.place(commit))
                if not missing:
                    return commit
        raise BadInput(
            f"{stage}: {missing} is in no commit as the receipt has it: it was not committed, or has changed since; "
            f"commit what should hold, run the stage (`dvc repro {stage}`), then verify again"
        )

    def _unlike(self, stage: str, place: Path) -> str:
        """Returns the first file or parameter of a stage that a checkout has otherwise, or nothing."""
        receipt, entry = self.graph.receipts[stage], self.lock[stage]
        for path, digest in sorted(self._code(stage).items()):
            if not (place / path).exists():
                # What git does not have may be data of DVC's, which are put there and digested later.
                if path in receipt["dependencies"] and self.store.has(path, entry):
                    continue
                return path
            if dependency_digest(place, path) != digest:
                return path
        return self._other_parameter(stage, place)

    def _other_parameter(self, stage: str, place: Path) -> str:
        values = read_params(place / "params.yaml")
        for key, value in self.graph.receipts[stage]["params"].items():
            try:
                same = lookup(values, key, "params.yaml") == value
            except BadInput:
                same = False
            if not same:
                return f"params.yaml: {key}"
        return ""

    def _refuse_edits(self, stages: Sequence[str]) -> None:
        """Refuses a stage whose code was edited and not committed: no receipt is about that code.

        Raises:
            BadInput: naming the file.
        """
        listed = git(self.root, "diff", "--name-only", "--relative", "-z", "HEAD", "--", ".")
        edited = {name for name in listed.split("\0") if name}
        for stage in stages:
            for path, digest in sorted(self._code(stage).items()):
                if path in edited and not ((self.root / path).is_file() and file_digest(self.root / path) == digest):
                    raise BadInput(self._refusal(stage, path))
            if "params.yaml" in edited and (key := self._other_parameter(stage, self.root)):
                raise BadInput(self._refusal(stage, key))

    @staticmethod
    def _refusal(stage: str, what: str) -> str:
        return (
            f"{what}: has changes that are not committed and that the receipt of {stage} knows nothing of; "
            f"commit or revert them, run the stage (`dvc repro {stage}`), then verify again"
        )

    # -- one stage --------------------------------------------------------------------------------

    def _verify(self, stage: str, commit: str, trees: "Trees", folder: Path) -> Outcome:
        started = time.monotonic()
        place = trees.place(commit)
        try:
            self._put_inputs(stage, place)
            self._execute(stage, place, folder)
            differences = tuple(self._differences(stage, place))
        except SpringheadError as error:
            return Outcome(stage, commit, "failed", error=str(error), seconds=time.monotonic() - started)
        finally:
            trees.clean(commit)
        state: Literal["equal", "differs"] = "differs" if differences else "equal"
        return Outcome(stage, commit, state, differences, seconds=time.monotonic() - started)

    def _put_inputs(self, stage: str, place: Path) -> None:
        """Puts the recorded inputs where the stage looks for them.

        Raises:
            BadInput: if one cannot be had, or is not what the receipt says was read.
        """
        recorded = self.graph.receipts[stage]["dependencies"]
        for path, facts in sorted(recorded.items()):
            if not (place / path).exists():
                for name, source in self.store.files(path, self.lock[stage]).items():
                    link(source, place / path / name if name else place / path)
            if (found := dependency_digest(place, path)) != facts["sha256"]:
                raise BadInput(
                    f"{path}: what was stored has digest {found[:12]}, {stage} read {facts['sha256'][:12]}; "
                    f"`springhead audit --deep` says which file is damaged"
                )

    def _execute(self, stage: str, place: Path, folder: Path) -> None:
        commands = self.lock[stage]["cmd"]
        extra = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            # As DVC sets them: the harness learns who it is, and dies with this process.
            "DVC_ROOT": str(place),
            "DVC_STAGE": stage,
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
            # A state folder of its own: no ledger entry, no checkpoint to go on from, nothing for MLflow.
            "SPRINGHEAD_HOME": str(folder / "home"),
            "SPRINGHEAD_SOURCES": os.environ.get("SPRINGHEAD_SOURCES") or str(self.home / "sources"),
            "SPRINGHEAD_TRACKING": "spool",
            "SPRINGHEAD_FLOW_RUN": "",
        }
        for command in [commands] if isinstance(commands, str) else commands:
            tail: deque[str] = deque(maxlen=_TAIL)
            status = self._call(command, place, clean_environment(extra), tail)
            if status != 0:
                raise BadInput(f"`{command}` exited with status {status}:\n" + "\n".join(tail))

    def _call(self, command: str, place: Path, env: Mapping[str, str], tail: deque[str]) -> int:
        process = subprocess.Popen(
            command,
            shell=True,  # as DVC does
            cwd=place,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail.append(line.rstrip())
                self.say(f"  {line.rstrip()}")
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise

    # -- comparing --------------------------------------------------------------------------------

    def _differences(self, stage: str, place: Path) -> Iterator[Difference]:
        """Yields what differs, by path; the receipt only if nothing else does."""
        recorded, now = self.graph.receipts[stage], read_json(receipt_path(place, stage))
        different = sorted(set(_listing(recorded).items()) ^ set(_listing(now).items()))
        for number, path in enumerate(dict.fromkeys(path for path, _ in different)):
            yield Difference(path, self._where(path, recorded, now, place) if number < _LOCATED else "")
        if not different:
            # The code was compared with the commit; the harness may be HEAD's where the ledger knows no other.
            facts = [{key: value for key, value in r.items() if key != "code"} for r in (recorded, now)]
            if found := json_difference(facts[0], facts[1]):
                yield Difference(receipt_path(Path(), stage).as_posix(), f"key {found}")

    def _where(self, path: str, recorded: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> str:
        before, after = _listing(recorded).get(path), _listing(now).get(path)
        if before is None or after is None:
            return "was added" if before is None else "is missing"
        try:
            source = self.store.files(path, {})[""]
        except (BadInput, KeyError):
            return "other bytes; what was recorded is not in the cache, so the place cannot be told"
        if file_digest(source) != before:
            return "other bytes; what was recorded is damaged in the cache, so the place cannot be told"
        return first_difference(source, place / path, path)


def _listing(receipt: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digest of every file that a stage made, by path."""
    found: dict[str, str] = {}
    for out, facts in receipt["outputs"].items():
        inner: Mapping[str, str] | None = facts.get("files")
        found |= {out: facts["sha256"]} if inner is None else {f"{out}/{name}": d for name, d in inner.items()}
    return found
