"""One run, from the snapshot of a checkout to the results back in it. Knows nothing of Prefect."""

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines import worktrees
from pipelines.execution import Executor, Outcome
from pipelines.graph import Graph, Node, changed, named, read_graph, repository, settled
from pipelines.scheduler import Schedule, Submit
from springhead.declared import read_stages
from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.lineage.dvcfiles import broken_run_cache, remove_run_cache
from springhead.lineage.ledger import Ledger
from springhead.progress import duration

Say = Callable[[str], None]
_ABANDONED = 60.0  # seconds after which nobody is still writing an entry of DVC's run cache


@dataclass(frozen=True)
class Request:
    """What to run."""

    workers: int
    profile: str | None = None
    targets: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The folder name of results that do not belong into the checkout."""
        return (self.profile or "quick") + (f"-{json_digest(list(self.settings))[:8]}" if self.settings else "")


@dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes:
        run: its id, empty if there was nothing to do.
        place: the folder with the results checked out: the checkout itself, unless the
            parameters were another's.
        outcomes: how each stage ended, in the order of the graph.
        notes: what the user should know beside that.
    """

    run: str
    place: Path
    outcomes: Mapping[str, Outcome]
    seconds: float
    notes: tuple[str, ...] = ()

    def of(self, *states: str) -> list[Outcome]:
        """Returns the outcomes in any of the given states."""
        return [o for o in self.outcomes.values() if o.state in states]


def new_run_id() -> str:
    """Returns an id that sorts by time: ``20260131-235959-1f2e``."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def identity(root: Path) -> str:
    """Returns a short name of a checkout, for marks in a state folder that several may share."""
    return json_digest(str(root))[:12]


@contextlib.contextmanager
def exclusive(root: Path, home: Path, wait: bool, say: Say = print) -> Iterator[None]:
    """Holds the lock that makes this the only run of a checkout.

    Raises:
        BadInput: if another run holds it and ``wait`` is false.
    """
    path = home / "locks" / f"run-{identity(root)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown process"
            if not wait:
                raise BadInput(
                    f"{root}: another `springhead run` is at work here ({holder}); wait until it ends, or use --wait"
                ) from None
            say(f"waiting for another run of this checkout ({holder})")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"pid {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        yield
        file.truncate(0)


def last_seconds(home: Path) -> dict[str, float]:
    """Returns how long each stage took when it was last executed, from the ledger."""
    found = {}
    for entry in Ledger(home).entries():
        body = entry.get("body", {})
        if entry.get("kind") == "execution" and isinstance(body.get("seconds"), int | float):
            found[str(body.get("stage"))] = float(body["seconds"])
    return found


def visible_gpus() -> list[str]:
    """Returns the identifiers of the GPUs that stages may use, empty on a machine without one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [part.strip() for part in chosen.split(",") if part.strip() and part.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.split() if asked.returncode == 0 else []


def check_targets(root: Path, home: Path, request: Request) -> None:
    """Makes sure that targets are stages, before the long way to the graph is begun.

    Names depend on the parameters, over which stages repeat. Where those are not the checkout's, DVC is asked in a
    folder that holds its file and the parameters, and nothing else.

    Raises:
        BadInput: naming the target that is no stage, with the closest names, or what is wrong with the other arguments.
    """
    if not request.targets:
        return
    params = worktrees.overlaid_params(root, request.profile, request.settings)
    if params is None:
        named(request.targets, read_stages(root, home / "declared"))
        return
    with tempfile.TemporaryDirectory(prefix="springhead-") as folder:
        place = Path(folder).resolve()
        (place / ".dvc").mkdir()
        (place / ".dvc" / "config").write_text("[core]\nno_scm = true\nanalytics = false\n", encoding="utf-8")
        shutil.copyfile(root / "dvc.yaml", place / "dvc.yaml")
        (place / "params.yaml").write_bytes(params)
        named(request.targets, read_stages(place, home / "declared"))


def nothing_to_do(root: Path, request: Request) -> Result | None:
    """Returns the result of a run for which every stage is up to date in the checkout, else None."""
    started = time.monotonic()
    if worktrees.overlaid_params(root, request.profile, request.settings) is not None:
        return None
    graph = read_graph(root)
    if request.targets:
        graph = graph.restricted(request.targets)
    if changed(root, list(graph.nodes) if request.targets else ()):
        return None
    outcomes = {name: Outcome(name, "up to date") for name in graph.stages}
    return Result("", root, outcomes, time.monotonic() - started)


@dataclass
class Session:
    """A run of a checkout. The caller holds :func:`exclusive`."""

    root: Path
    home: Path
    request: Request
    flow_run: str
    say: Say
    terminal: Say
    """Takes the lines of the stages, which Prefect's log gets by another way."""
    run: str = field(default_factory=new_run_id)
    executor: Executor | None = None

    @property
    def folder(self) -> Path:
        """Where the run's worktrees are."""
        return self.home / "worktrees" / self.run

    def stop(self) -> None:
        """Ends everything that was started."""
        if self.executor is not None:
            self.executor.processes.stop()

    def perform(self, submitter: Callable[[Executor], Submit]) -> Result:
        """Brings the stages up to date.

        Args:
            submitter: makes, from the executor, the function that starts a stage.
        """
        started = time.monotonic()
        self._protect_home()
        if done := nothing_to_do(self.root, self.request):
            return done
        params = worktrees.overlaid_params(self.root, self.request.profile, self.request.settings)
        self._sweep()
        snapshot = worktrees.take_snapshot(self.root, self.run, params)
        self.say(
            f"run {self.run}: snapshot {snapshot.commit[:12]}, logs in {self._show(self.home / 'runs' / self.run)}"
        )
        try:
            first = worktrees.add_worktree(self.root, snapshot, self.folder / "0")
            graph = read_graph(first)
            if self.request.targets:
                graph = graph.restricted(self.request.targets)
            outcomes = self._schedule(snapshot, graph, first, submitter)
            place, notes = self._deliver(snapshot, graph, outcomes, first)
        finally:
            self.stop()
            self._clear()
        return Result(self.run, place, outcomes, time.monotonic() - started, tuple(notes))

    # -- before -----------------------------------------------------------------------------------

    def _protect_home(self) -> None:
        """Keeps the state folder out of git, whatever the checkout's own .gitignore says."""
        ignore = self.home / ".gitignore"
        if self.home.is_relative_to(self.root) and not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")

    def _sweep(self) -> None:
        """Removes the worktrees of runs that were killed; the caller's lock says none is alive."""
        marker = identity(self.root)
        for folder in (self.home / "worktrees").glob("*"):
            owner = folder / "owner"
            if owner.is_file() and owner.read_text(encoding="utf-8") == marker:
                shutil.rmtree(folder, ignore_errors=True)
        worktrees.git(self.root, "worktree", "prune")
        remove_run_cache(broken_run_cache(self.root, _ABANDONED))
        self.folder.mkdir(parents=True)
        (self.folder / "owner").write_text(marker, encoding="utf-8")
        for folder in (self.home / "runs" / self.run, self.home / "locks"):
            folder.mkdir(parents=True, exist_ok=True)

    # -- the stages -------------------------------------------------------------------------------

    def _schedule(
        self,
        snapshot: worktrees.Snapshot,
        graph: Graph,
        first: Path,
        submitter: Callable[[Executor], Submit],
    ) -> dict[str, Outcome]:
        base = worktrees.read_lock(first)
        self.executor = Executor(self.home, self.run, self.flow_run, base, self.terminal)
        known = settled(first, graph)
        todo = [name for name in graph.stages if name not in known]
        self.say(f"stages: {len(todo)} to look at, {len(graph.stages) - len(todo)} up to date")
        count = max(1, min(self.request.workers, len(todo)))
        places = [first]
        for number in range(1, count):
            places.append(worktrees.add_worktree(self.root, snapshot, self.folder / str(number)))
        estimates = last_seconds(self.home)
        reporter = Reporter(self.say, len(todo), count, estimates)
        schedule = Schedule(
            graph, places, visible_gpus(), graph.urgency(estimates), reporter.start, reporter.end, reporter.idle
        )
        reporter.left = sum(estimates.get(name, 0.0) for name in todo)
        return schedule.run(submitter(self.executor), known)

    # -- after ------------------------------------------------------------------------------------

    def _deliver(
        self, snapshot: worktrees.Snapshot, graph: Graph, outcomes: Mapping[str, Outcome], first: Path
    ) -> tuple[Path, list[str]]:
        """Brings the results to where the user looks for them, and returns that place and notes."""
        assert self.executor is not None
        ended = [n for n, o in outcomes.items() if o.state in ("executed", "cached", "up to date")]
        worktrees.write_lock(first, self._ordered(self.executor.base, graph))
        commit = worktrees.record_result(self.root, snapshot, first)
        self.say(f"results: commit {commit[:12]} ({worktrees.REFS}/{self.run})")
        moved = [n for n in worktrees.differences(self.root, snapshot) if n in ("dvc.yaml", "params.yaml")]
        if snapshot.params_changed:
            why = "the parameters are not the checkout's"
        elif moved:
            why = f"{' and '.join(moved)} changed during the run"
        else:
            return self.root, self._deliver_here(snapshot, graph, ended)
        place = self._deliver_apart(ended, first)
        return place, [f"{why}, so the checkout was left as it is; the results are in {self._show(place)}"]

    def _ordered(self, base: dict[str, Any], graph: Graph) -> dict[str, Any]:
        """Returns a lock with the run's entries, new ones in the order in which ``dvc repro`` would add them."""
        assert self.executor is not None
        entries = self.executor.entries
        return worktrees.merge_lock(base, {name: entries[name] for name in graph.nodes if name in entries})

    def _deliver_apart(self, ended: Sequence[str], first: Path) -> Path:
        """Keeps the first worktree, all results checked out in it, as ``<home>/results/<label>``."""
        assert self.executor is not None
        self.executor.fetch_uncached(first)
        _checkout(first, ended)
        kept = self.home / "results" / self.request.label
        worktrees.remove_worktree(self.root, kept)
        kept.parent.mkdir(parents=True, exist_ok=True)
        top = self.folder / "0"
        worktrees.git(self.root, "worktree", "move", str(top), str(kept))
        return kept / first.relative_to(top)

    def _deliver_here(self, snapshot: worktrees.Snapshot, graph: Graph, ended: Sequence[str]) -> list[str]:
        assert self.executor is not None
        entries = self.executor.entries
        if entries:
            with repository(self.root) as repo, repo.lock:
                # Read again: a `dvc repro` by hand may have written meanwhile.
                worktrees.write_lock(self.root, self._ordered(worktrees.read_lock(self.root), graph))
        self.executor.fetch_uncached(self.root)
        _checkout(self.root, ended)
        with repository(self.root) as repo, repo.scm_context(quiet=True):
            for stage in repo.index.stages:
                if stage.addressing in entries:  # as `dvc repro` does, where .gitignore lacks them
                    stage.ignore_outs()
        return self._consistent(snapshot, ended)

    def _consistent(self, snapshot: worktrees.Snapshot, ended: Sequence[str]) -> list[str]:
        """Asks DVC whether the stages that ended well are up to date in the checkout.

        Raises:
            BadInput: if one is not though nobody edited anything: the stage is not deterministic
                about what it reads, or another process wrote to the checkout.
        """
        stale = [name for name in changed(self.root) if name in ended]
        if not stale:
            return []
        edited = worktrees.differences(self.root, snapshot)
        if not edited:
            raise BadInput(f"{', '.join(stale)}: not up to date after the run; `dvc status` says why")
        return [f"{', '.join(edited)} changed during the run: {', '.join(stale)} would run again"]

    def _clear(self) -> None:
        for folder in sorted(p for p in self.folder.glob("*") if p.is_dir()):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        worktrees.git(self.root, "worktree", "prune")

    def _show(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def _checkout(place: Path, names: Sequence[str]) -> None:
    """Checks out the outputs of stages.

    Raises:
        BadInput: with DVC's message, for example where a file edited by hand would be lost.
    """
    if not names:
        return
    command = [sys.executable, "-m", "dvc", "checkout", "--quiet", *names]
    env = worktrees.clean_environment({"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"})
    done = subprocess.run(command, cwd=place, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise BadInput(
            f"{place}: the results are in the cache and in dvc.lock, but could not be checked out: "
            f"{done.stderr.strip()}\nMove your own changes away, then `dvc checkout`"
        )


@dataclass
class Reporter:
    """Says when stages start and end, and about how long the rest will take."""

    say: Say
    total: int
    workers: int
    estimates: Mapping[str, float]
    left: float = 0.0
    done: int = 0

    def start(self, node: Node) -> None:
        """A stage was given to a worktree."""
        usual = self.estimates.get(node.name)
        about = f" (took {duration(usual)} last time)" if usual else ""
        described = f": {node.description}" if node.description else ""
        self.say(f"> {node.name}{described}{about}")

    def end(self, outcome: Outcome) -> None:
        """A stage has ended."""
        self.done += 1
        self.left -= self.estimates.get(outcome.stage, 0.0)
        rest = f", ~{duration(self.left / self.workers)} left" if self.left > 1 else ""
        sign = "x" if outcome.state == "failed" else "="
        took = duration(outcome.seconds)
        self.say(f"{sign} {outcome.stage}: {outcome.state} in {took} [{self.done}/{self.total}{rest}]")

    def idle(self, running: Mapping[str, float]) -> None:
        """Nothing has started or ended for a while."""
        shown = [
            f"{name} {duration(seconds)}" + (f" of ~{duration(self.estimates[name])}" if name in self.estimates else "")
            for name, seconds in running.items()
        ]
        self.say(f"  running: {', '.join(shown)}")
