"""The harness every stage runs in.

It reads and checks the parameters, digests every dependency, seeds everything, runs the stage
into a temporary folder, renames the result into place, digests the dependencies again, and
writes the receipt. A stage whose inputs were edited while it ran fails and leaves nothing:
DVC alone would record the edited input as the one that was used.
"""

import errno
import os
import posixpath
import re
import shutil
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from springhead import environment, hermetic
from springhead.declared import Declared, read_stage, stage_name, stray_files
from springhead.energy import Meter
from springhead.errors import BadInput, Finding, SpringheadError
from springhead.git import git, head_commit, under_git
from springhead.home import home as state_folder
from springhead.home import repository
from springhead.jsonio import write_json
from springhead.keys import Keys
from springhead.lineage.digests import dependency_files, file_digest, files_digest, json_digest, tree_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import describe
from springhead.params import load, lookup, read_params
from springhead.progress import Progress, duration
from springhead.spool import Spool

P = TypeVar("P")
_INTERNAL_ERROR = 70  # sysexits EX_SOFTWARE: a fault of ours, reported with its traceback


@dataclass
class Record:
    """What a stage declares about itself while it runs; it ends up in the receipt."""

    metrics: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Stage(Generic[P]):
    """What a stage's ``run`` function is given."""

    name: str
    """The DVC name, for example ``rl-collect@BallCircle``."""
    item: Mapping[str, str]
    """The matrix item, for example ``{"task": "BallCircle"}``."""
    params: P
    """The stage's block of ``params.yaml``."""
    seed: int
    """A seed of the stage's own, derived from ``seed`` in ``params.yaml`` and its name."""
    root: Path
    """The repository root, which is also the working folder."""
    out: Path
    """Where to write: a temporary folder, renamed to its place when the stage succeeds."""
    scratch: Path
    """Resume checkpoints: the same folder again for the same inputs, removed after success."""
    dependencies: tuple[Path, ...]
    """The declared dependencies."""
    record: Record = field(default_factory=Record)
    spool: Spool | None = None

    def inputs(self, stage: str) -> list[Path]:
        """Returns the declared dependencies below ``data/<branch>/<stage>``, in order."""
        prefix = self.root / "data" / self.name.partition("-")[0] / stage
        return [path for path in self.dependencies if path == prefix or prefix in path.parents]

    def input(self, stage: str) -> Path:
        """Returns the one declared dependency below ``data/<branch>/<stage>``.

        Raises:
            BadInput: if there is none, or more than one.
        """
        found = self.inputs(stage)
        if len(found) != 1:
            raise BadInput(f"dvc.yaml: stage {self.name}: expected one dependency on '{stage}', found {len(found)}")
        return found[0]

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Adds final, deterministic metrics (numbers, or nested mappings of them)."""
        self.record.metrics.update(values)

    def log(self, step: int, **values: float) -> None:
        """Logs a point of a training curve. It goes to MLflow and never into an output."""
        if self.spool is not None:
            self.spool.event("metric", step=step, values={k: float(v) for k, v in values.items()}, time=time.time())

    def progress(self, total: int, label: str = "", unit: str = "it") -> Progress:
        """Returns a progress line for ``total`` units of work."""
        return Progress(total, label or self.name, unit)

    def model(self, path: Path, kind: str, **facts: Any) -> None:
        """Declares that ``path``, inside ``out``, is a finished model folder.

        Args:
            path: the folder.
            kind: ``policy`` or ``language-model``.
            **facts: deterministic facts about it, such as task, algorithm or seed.
        """
        entry = {"path": path.relative_to(self.out).as_posix(), "sha256": tree_digest(path), "kind": kind}
        self.record.models.append({**entry, "facts": facts})

    def dataset(self, path: Path, name: str, rows: int, role: str) -> None:
        """Declares a data set this stage made (``role="output"``) or trained on (``"training"``)."""
        base = self.out if role == "output" else self.root
        where = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
        entry = {"name": name, "path": where, "sha256": tree_digest(path), "rows": int(rows), "role": role}
        self.record.datasets.append(entry)


def for_test(
    params: P,
    out: Path,
    inputs: Mapping[str, Path],
    item: Mapping[str, str] | None = None,
    seed: int = 0,
    branch: str = "rl",
    stage: str = "test",
) -> Stage[P]:
    """Makes a stage for a unit test: ``inputs`` maps stage names to folders.

    The folders are linked below a root beside ``out``, so that ``input`` finds them as it
    would in a repository.
    """
    root = out.parent / f".{out.name}-root"
    dependencies = []
    for name, folder in inputs.items():
        link = root / "data" / branch / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(folder.resolve(), target_is_directory=folder.is_dir())
        dependencies.append(link)
    scratch = root / "scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    items = dict(item or {})
    name = f"{branch}-{stage}" + (f"@{'-'.join(items.values())}" if items else "")
    return Stage(name, items, params, seed, root, out, scratch, tuple(dependencies))


def run_stage(body: Callable[[Stage[P]], None], params: type[P], argv: list[str] | None = None) -> None:
    """Runs a stage script: the only call of its ``main``.

    Args:
        body: the stage's ``run`` function.
        params: its frozen dataclass of parameters.
        argv: the item values in matrix order; default ``sys.argv[1:]``.

    Exits with 0, or 1 for a finding, 2 for bad input, 70 for a fault in the code.
    """
    items = sys.argv[1:] if argv is None else argv
    debug = os.environ.get("SPRINGHEAD_DEBUG") == "1"
    try:
        _Execution(body, params, items).run()
    except SpringheadError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped; a training stage resumes from its last checkpoint when it is run again", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; free space, then run again", file=sys.stderr)
        raise SystemExit(2) from None


class _Execution(Generic[P]):
    """One execution of one stage, from reading its declaration to its ledger entry."""

    def __init__(self, body: Callable[[Stage[P]], None], params: type[P], items: list[str]) -> None:
        self.root = repository(os.environ.get("DVC_ROOT"))
        os.chdir(self.root)
        self.body = body
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if body.__module__ == "__main__" and spec is not None else body.__module__
        self.home = state_folder(self.root)
        name = os.environ.get("DVC_STAGE") or stage_name(module, items)
        self.declared: Declared = read_stage(self.root, name, self.home / "declared")
        self.kind = params
        self.items = items
        self.module = module
        self.id = uuid.uuid4().hex
        self.started = time.time()
        self.meter = Meter()

    # -- what went in ---------------------------------------------------------------------------

    def _read_params(self) -> tuple[dict[str, Any], P]:
        """Returns the declared parameter values by key, and the stage's own block as a dataclass."""
        values = read_params(self.root / "params.yaml")
        declared = {key: lookup(values, key, "params.yaml") for key in self.declared.parameters}
        block = f"{self.declared.branch}.{self.declared.stage}"
        if block not in declared or "seed" not in declared:
            raise BadInput(f"dvc.yaml: stage {self.declared.name}: its params must list 'seed' and '{block}'")
        return declared, load(self.kind, declared[block], f"params.yaml: {block}")

    def _digest_dependencies(self) -> dict[str, dict[str, Any]]:
        """Returns digest and size of every declared dependency."""
        found = {}
        for dep in self.declared.dependencies:
            path = self.root / dep
            if not path.exists():
                raise BadInput(f"{dep}: missing dependency of {self.declared.name}; run `dvc repro` or `dvc checkout`")
            if dep.startswith("data/") and (strays := stray_files(path, self.declared.all_outputs, self.root)):
                raise BadInput(
                    f"{strays[0]}: lies in {dep}, which {self.declared.name} reads, but no stage of dvc.yaml makes it"
                    f" ({len(strays)} such files); remove it"
                )
            files = dependency_files(self.root, dep) if path.is_dir() else {}
            digest = files_digest(files) if path.is_dir() else file_digest(path)
            size = sum((path / name).stat().st_size for name in files) if path.is_dir() else path.stat().st_size
            found[dep] = {"sha256": digest, "bytes": size}
        return found

    def _lock(self) -> Path:
        lock = f"locks/{self.declared.branch}.lock"
        if lock not in self.declared.dependencies:
            raise BadInput(f"dvc.yaml: stage {self.declared.name}: add the dependency {lock}")
        return self.root / lock

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the stage and everything around it."""
        declared, params = self._read_params()
        packages = environment.check_packages(self._lock())
        before = self._digest_dependencies()
        inputs = json_digest({"stage": self.declared.name, "params": declared, "dependencies": before})
        seed = int(json_digest([declared["seed"], self.declared.name])[:8], 16)
        environment.settle(seed)

        target = self.root / self.declared.output
        _sweep(target)
        out = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        out.mkdir(parents=True)
        scratch = self.home / "scratch" / self.declared.name / inputs[:16]
        scratch.mkdir(parents=True, exist_ok=True)
        attempt = self._attempt(inputs)
        spool = Spool(self.home, self.id)
        dependencies = tuple(self.root / dep for dep in self.declared.dependencies)
        stage: Stage[P] = Stage(
            self.declared.name, self._item(), params, seed, self.root, out, scratch, dependencies, Record(), spool
        )
        spool.event("start", **self._start_event(declared, attempt, inputs))
        try:
            with hermetic.sealed(self.root, self.home, self.declared, out, scratch):
                self.body(stage)
            self._check_inputs(before, declared)
            receipt = self._receipt(stage, declared, before, packages)
            self._put_in_place(stage, target, receipt)
        except BaseException as error:
            self._failed(stage, error, inputs, attempt)
            raise
        self._succeeded(stage, receipt, inputs, attempt)
        shutil.rmtree(scratch, ignore_errors=True)

    def _item(self) -> dict[str, str]:
        """Returns the item by name; names and order are those of ``${item.NAME}`` in the command."""
        import yaml

        block = yaml.safe_load((self.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        stage = block[self.declared.name.partition("@")[0]]
        names = re.findall(r"\$\{item\.(\w+)\}", stage.get("do", stage)["cmd"])
        if len(names) != len(self.items):
            raise BadInput(f"{self.module}: expected the arguments {names}, got {self.items}")
        return dict(zip(names, self.items, strict=True))

    def _attempt(self, inputs: str) -> int:
        entries = Ledger(self.home).entries()
        earlier = [e for e in entries if e["kind"] in ("execution", "failure") and e["body"].get("inputs") == inputs]
        return 1 + len(earlier)

    def _start_event(self, declared: dict[str, Any], attempt: int, inputs: str) -> dict[str, Any]:
        tags = {"inputs": inputs, "flow_run": os.environ.get("SPRINGHEAD_FLOW_RUN", "")}
        return {
            "stage": self.declared.name,
            "attempt": attempt,
            "params": declared,
            "tags": tags,
            "time": self.started,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    def _check_inputs(self, before: dict[str, dict[str, Any]], declared: dict[str, Any]) -> None:
        """Fails if a dependency or parameter changed while the stage ran, or code is undeclared."""
        after = self._digest_dependencies()
        changed = [path for path, facts in before.items() if after[path]["sha256"] != facts["sha256"]]
        now = read_params(self.root / "params.yaml")
        changed += [f"params.yaml: {k}" for k, v in declared.items() if lookup(now, k, "params.yaml") != v]
        if changed:
            raise BadInput(
                f"{self.declared.name}: input changed during the run: {', '.join(changed)}. "
                "Nothing was kept; run `dvc repro` again"
            )
        undeclared = environment.undeclared_code(self.root, self.declared.dependencies)
        if undeclared:
            raise BadInput(
                f"dvc.yaml: stage {self.declared.name} imports code that is no dependency: "
                f"{', '.join(undeclared)}; add it to deps"
            )

    def _receipt(
        self, stage: Stage[P], declared: dict[str, Any], before: dict[str, dict[str, Any]], packages: dict[str, str]
    ) -> dict[str, Any]:
        """Returns the deterministic facts of this execution."""
        facts = describe(stage.out)
        if not facts["files"]:
            raise BadInput(f"{self.declared.name}: the stage wrote nothing to {self.declared.output}")
        outputs = {self.declared.output: facts}
        if self.declared.metrics is not None:
            if not stage.record.metrics:
                raise BadInput(f"{self.declared.name}: declares metrics in dvc.yaml but reported none")
            temporary = self._staged(self.declared.metrics)
            write_json(temporary, stage.record.metrics)
            outputs[self.declared.metrics] = describe(temporary)
        here = self.declared.output
        code = environment.code_files(self.root, self.declared.dependencies)
        lock = self._lock().relative_to(self.root).as_posix()
        return {
            "stage": self.declared.name,
            "command": " ".join(["python -m", self.module, *self.items]),
            "params": declared,
            "seed": stage.seed,
            "dependencies": before,
            "code": {"digest": files_digest(code), "files": code},
            "environment": {
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                "lock": {lock: file_digest(self.root / lock)},
                "packages": packages,
            },
            "outputs": outputs,
            "datasets": [
                {**d, "path": posixpath.normpath(f"{here}/{d['path']}")} if d["role"] == "output" else d
                for d in stage.record.datasets
            ],
            "models": [{**m, "path": posixpath.normpath(f"{here}/{m['path']}")} for m in stage.record.models],
            "metrics": stage.record.metrics,
        }

    def _staged(self, path: str) -> Path:
        target = self.root / path
        return target.with_name(f".{target.name}.tmp-{os.getpid()}")

    def _put_in_place(self, stage: Stage[P], target: Path, receipt: dict[str, Any]) -> None:
        """Makes the outputs durable and renames them: a reader sees all of one or none."""
        _fsync_tree(stage.out)
        receipt_file = self.root / self.declared.receipt
        receipt_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._staged(self.declared.receipt), receipt)  # if the disk is full, it is now
        if target.exists() or target.is_symlink():
            _remove(target)
        os.replace(stage.out, target)
        if self.declared.metrics is not None:
            os.replace(self._staged(self.declared.metrics), self.root / self.declared.metrics)
        os.replace(self._staged(self.declared.receipt), receipt_file)
        _fsync_folder(target.parent)

    # -- how it ended ---------------------------------------------------------------------------

    def _failed(self, stage: Stage[P], error: BaseException, inputs: str, attempt: int) -> None:
        """Keeps a red verdict for reading, removes everything else, and records the failure."""
        findings = isinstance(error, Finding) and any(stage.out.iterdir())
        if findings:
            kept = self.home / "failed" / self.declared.name
            _remove(kept)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(stage.out, kept)
            print(f"{self.declared.name}: its findings are kept in {kept}", file=sys.stderr)
        _remove(stage.out)
        for path in (self.declared.metrics, self.declared.receipt):
            if path is not None:
                _remove(self._staged(path))
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        message = str(error) or type(error).__name__
        try:
            assert stage.spool is not None
            stage.spool.event("end", status=status, seconds=time.time() - self.started, time=time.time())
            stage.spool.close()
            body = {"stage": self.declared.name, "inputs": inputs, "attempt": attempt, "error": message[:2000]}
            body["findings"] = findings
            Ledger(self.home).append("failure", {**body, **self._volatile()}, Keys.of(self.root, self.home))
        except OSError as second:  # a full disk must not hide the first error
            print(f"warning: the failure could not be recorded: {second}", file=sys.stderr)

    def _succeeded(self, stage: Stage[P], receipt: dict[str, Any], inputs: str, attempt: int) -> None:
        """Appends the ledger entry and sends the spooled events on to MLflow where due."""
        path = self.root / self.declared.receipt
        body = {
            "stage": self.declared.name,
            "attempt": attempt,
            "receipt": file_digest(path),
            "inputs": inputs,
            "outputs": {name: facts["sha256"] for name, facts in receipt["outputs"].items()},
            "models": [{key: m[key] for key in ("path", "sha256", "kind")} for m in receipt["models"]],
        }
        spool = stage.spool
        assert spool is not None
        for entry in receipt["datasets"]:
            spool.event("dataset", **entry)
        for entry in receipt["models"]:
            spool.event("model", **entry)
        if receipt["metrics"]:
            spool.event("metrics", values=receipt["metrics"], time=time.time())
        seconds = time.time() - self.started
        # The ledger comes first: a run that MLflow knows as finished always has its entry.
        Ledger(self.home).append("execution", {**body, **self._volatile()}, Keys.of(self.root, self.home))
        spool.event("end", status="FINISHED", seconds=seconds, time=time.time())
        spool.close()
        made = receipt["outputs"][self.declared.output]
        print(
            f"{self.declared.name}: {len(made['files'])} files, {made['bytes'] / 1e6:.1f} MB "
            f"in {duration(seconds)} -> {self.declared.output}",
            file=sys.stderr,
        )
        if (receipt["models"] or receipt["metrics"]) and os.environ.get("SPRINGHEAD_TRACKING") != "spool":
            from springhead import tracking

            tracking.replay(self.home)

    def _volatile(self) -> dict[str, Any]:
        """Returns time, place, energy and git state: facts for the ledger, never for an output."""
        joules = self.meter.stop()
        return {
            "execution": self.id,
            "git": _git_state(self.root),
            "host": socket.gethostname(),
            "python": sys.version.split()[0],
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "cpu_seconds": round(sum(os.times()[:4]), 3),
            **({"energy": joules} if joules else {}),
            "flow_run": os.environ.get("SPRINGHEAD_FLOW_RUN", ""),
        }


def _git_state(root: Path) -> dict[str, Any]:
    """Returns the commit and whether the checkout differs from it, which is None where git does not say."""
    state: dict[str, Any] = {"revision": "", "dirty": False}
    if not under_git(root):
        return state
    state["dirty"] = None
    with suppress(BadInput):
        state["revision"] = head_commit(root) or ""
        # Outputs, dvc.lock and the parameter overlay of a run are expected to differ.
        changes = git(root, "status", "--porcelain", "--", ".", ":!dvc.lock", ":!mlflow/trusted-keys")
        state["dirty"] = bool(changes)
    return state


def _sweep(target: Path) -> None:
    """Removes temporary siblings left by executions that were killed."""
    for left in target.parent.glob(f".{target.name}.tmp-*"):
        pid = left.name.rpartition("-")[2]
        if not (pid.isdigit() and environment.alive(int(pid))):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _fsync_folder(path)
    _fsync_folder(folder)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
