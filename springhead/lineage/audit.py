"""Recomputes what the receipts, DVC, the verdicts, the ledger and the registry claim.

Each check returns findings; none trusts a time stamp, a state database or a file mode. DVC does
not notice a changed byte in its own cache, and MLflow lets an alias be set on anything, so both
are compared with digests that are computed here and now.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput, SpringheadError
from springhead.jsonio import read_json
from springhead.lineage.digests import file_digest, files_digest
from springhead.lineage.dvcfiles import cache_objects
from springhead.lineage.receipts import receipt_path
from springhead.lineage.workspace import RED, WARNING, Problem, Workspace, hashed


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    problems: tuple[Problem, ...]
    checked: dict[str, int]
    """How many things each check looked at."""

    @property
    def red(self) -> bool:
        """Whether anything was found that is more than a warning."""
        return any(problem.severity == RED for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return {"red": self.red, "checked": self.checked, "problems": [asdict(p) for p in self.problems]}


def audit(root: Path, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> Audit:
    """Checks a checkout from its data to its registry.

    Args:
        root: the repository root.
        deep: also re-hash every object in DVC's cache.
        progress: called with (files hashed, files in all).

    Raises:
        BadInput: if a receipt, ``dvc.lock`` or the ledger cannot be read at all.
    """
    workspace = Workspace(root, progress)
    if not workspace.graph.receipts:
        raise BadInput(f"{root}/data/receipts: no receipts; run `springhead run` or `dvc repro`, or `dvc pull`")
    checks = [check_outputs, check_contents, check_links, check_lock, check_code, check_ledger, check_verdicts]
    for check in [*checks, check_registry]:
        check(workspace)
    if deep:
        check_cache(workspace)
    order = {RED: 0, WARNING: 1}
    found = tuple(sorted(workspace.problems, key=lambda p: (order[p.severity], p.check, p.where)))
    return Audit(found, workspace.checked)


# -- data -----------------------------------------------------------------------------------------


def check_outputs(ws: Workspace) -> None:
    """Compares every output file with the digest in the receipt of the stage that made it."""
    for stage, receipt in ws.graph.receipts.items():
        for out, facts in receipt["outputs"].items():
            recorded: dict[str, str] = facts.get("files", {"": facts["sha256"]})
            listing = ws.files[out]
            ws.count("outputs", len(recorded))
            if not listing:
                again = f"`dvc checkout {out}` or `dvc pull {out}`"
                ws.report(RED, "outputs", "is not in the workspace, so it cannot be checked", out, again, [stage])
                continue
            for name in sorted(recorded.keys() | listing.keys()):
                path = f"{out}/{name}" if name else out
                now = ws.hashes[listing[name]].sha256 if name in listing else None
                problem = _difference(recorded.get(name), now)
                if problem:
                    again = f"restore it: `rm -r {out} && dvc checkout {out}`, or `dvc repro -f {stage}`"
                    ws.report(RED, "outputs", problem, path, again, [stage])


def _difference(recorded: str | None, now: str | None) -> str:
    if recorded == now:
        return ""
    if now is None:
        return f"is missing; {recorded} was made"
    if recorded is None:
        return "was added: the receipt does not name it"
    return f"has changed: sha256 is {now[:16]}…, the receipt has {recorded[:16]}…"


def check_contents(ws: Workspace) -> None:
    """Checks that a receipt agrees with itself: folder, model and data set digests follow from its files."""
    for stage, receipt in ws.graph.receipts.items():
        where = receipt_path(Path(), stage).as_posix()
        claims = [(out, f["sha256"], files_digest(f["files"])) for out, f in receipt["outputs"].items() if "files" in f]
        declared = [*receipt["models"], *(d for d in receipt["datasets"] if d["role"] == "output")]
        claims += [(entry["path"], entry["sha256"], ws.graph.digest(entry["path"]) or "") for entry in declared]
        claims.append(("its code", receipt["code"]["digest"], files_digest(receipt["code"]["files"])))
        ws.count("receipts")
        for path, claimed, follows in claims:
            if claimed != follows:
                what = f"contradicts itself about {path}: claims {claimed[:16]}…, its files give {follows[:16] or '?'}…"
                ws.report(RED, "receipts", what, where, f"`dvc repro -f {stage}` writes it again", [stage])
        if receipt["stage"] != stage:
            what = f"is the receipt of {receipt['stage']}"
            ws.report(RED, "receipts", what, where, f"`dvc checkout {where}`", [stage])


def check_links(ws: Workspace) -> None:
    """Checks that what each stage read is what the stages before it made."""
    for link in ws.graph.links:
        ws.count("links")
        if not link.verified:
            what = f"{link.stage} read other data than {', '.join(link.makers)} made since"
            ws.report(RED, "links", what, link.path, f"`dvc repro {link.stage}`", [link.stage])
        elif not link.makers and ws.sha256(link.path) != link.sha256:
            what = f"has changed since {link.stage} read it"
            ws.report(RED, "links", what, link.path, f"restore it, or `dvc repro {link.stage}`", [link.stage])
    for stage, receipt in ws.graph.receipts.items():
        for data in receipt["datasets"]:
            if data["role"] == "training" and ws.graph.digest(data["path"]) not in (None, data["sha256"]):
                what = f"{stage} trained on another version of this data"
                ws.report(RED, "links", what, data["path"], f"`dvc repro {stage}`", [stage])


# -- DVC ------------------------------------------------------------------------------------------


def check_lock(ws: Workspace) -> None:
    """Compares ``dvc.lock`` with the workspace and with the receipts."""
    for stage in ws.graph.receipts.keys() | ws.lock.keys():
        receipt, entry = ws.graph.receipts.get(stage), ws.lock.get(stage)
        path = receipt_path(Path(), stage).as_posix()
        if entry is None:
            what = "is the receipt of a stage that dvc.lock does not know"
            ws.report(WARNING, "dvc.lock", what, path, f"`dvc repro {stage}`; remove it if the stage is gone", [stage])
            continue
        outs = {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}
        if receipt is None:
            if path in outs:
                what = "is missing: what the stage made cannot be traced"
                ws.report(RED, "dvc.lock", what, path, f"`dvc checkout {path}` or `dvc repro {stage}`", [stage])
            continue
        for out in sorted(outs):
            ws.count("dvc.lock")
            now = ws.md5(out)
            if now is not None and now != outs[out]:
                what = f"is not what dvc.lock records for {stage} (md5 {now[:12]}…, not {outs[out][:12]}…)"
                ws.report(RED, "dvc.lock", what, out, f"`dvc checkout {out}`, or `dvc repro {stage}`", [stage])
        _check_lock_params(ws, stage, entry, receipt)


def _check_lock_params(ws: Workspace, stage: str, entry: dict[str, Any], receipt: dict[str, Any]) -> None:
    locked = {key: value for block in (entry.get("params") or {}).values() for key, value in block.items()}
    for key, value in receipt["params"].items():
        if key in locked and locked[key] != value:
            what = f"records another value of {key} for {stage} than its receipt"
            ws.report(RED, "dvc.lock", what, "dvc.lock", f"`dvc repro -f {stage}`", [stage])


def check_cache(ws: Workspace) -> None:
    """Hashes every object of DVC's cache: an object's name is the MD5 of its content."""
    used: dict[str, set[str]] = {}
    for stage, entry in ws.lock.items():
        for out in entry.get("outs", []):
            used.setdefault(out.get("md5", ""), set()).add(stage)
    objects = cache_objects(ws.root)
    for name, _, inner in objects:
        for md5 in inner:  # what a folder's listing names is used where the folder is
            used.setdefault(md5, set()).update(used.get(name, ()))
    for (name, path, _), (_, hashes) in zip(objects, hashed([p for _, p, _ in objects]), strict=True):
        ws.count("cache")
        if hashes.md5 != name.removesuffix(".dir"):
            stages = sorted(used.get(name, ()))
            what = f"cache object holds other bytes than its name says (used by {', '.join(stages) or 'no stage now'})"
            first = stages[0] if stages else "STAGE"
            do = f"remove it, then `dvc fetch` from a good remote or `dvc repro -f {first}`"
            ws.report(RED, "cache", what, str(path), do, stages)


# -- code, ledger, verdicts, registry -------------------------------------------------------------


def check_code(ws: Workspace) -> None:
    """Warns where code, a lock file or another file under git has moved on since a stage ran with it."""
    moved: dict[str, list[str]] = {}
    now: dict[str, str | None] = {}
    for stage, receipt in ws.graph.receipts.items():
        used = {**receipt["code"]["files"], **receipt["environment"]["lock"]}
        for path, facts in receipt["dependencies"].items():
            # Data has its own check, and what changed in a folder of code is named file by file.
            if path.partition("/")[0] != "data" and not (ws.root / path).is_dir():
                used[path] = facts["sha256"]
        for path, recorded in used.items():
            ws.count("code")
            if path not in now:
                now[path] = file_digest(ws.root / path) if (ws.root / path).is_file() else None
            if now[path] != recorded:
                moved.setdefault(path, []).append(stage)
    for path, stages in sorted(moved.items()):
        some = ", ".join(stages[:3]) + (f" and {len(stages) - 3} more" if len(stages) > 3 else "")
        what = f"{'is gone' if now[path] is None else 'has changed'} since {some} ran with it"
        ws.report(
            WARNING, "code", what, path, "`git log` shows the change; `dvc repro` runs what depends on it", stages
        )


def check_ledger(ws: Workspace) -> None:
    """Checks the ledger's chain, and that an execution it knows wrote each receipt."""
    for problem in ws.ledger.verify():
        where, _, what = problem.partition(": ")
        ws.report(RED, "ledger", what, where, "restore ledger.jsonl from a backup", ws.graph.receipts)
    try:
        entries = ws.ledger.entries()
    except BadInput:  # the chain check above has named the line
        return
    ws.count("ledger", len(entries))
    executions = [entry["body"] for entry in entries if entry["kind"] == "execution"]
    written = {(body["stage"], body["receipt"]) for body in executions}
    known = {body["stage"] for body in executions}
    for stage in ws.graph.receipts:
        path = receipt_path(ws.root, stage)
        if (stage, ws.hashes[path].sha256) not in written:
            why = (
                "the ledger knows other executions of the stage only" if stage in known else "no execution is recorded"
            )
            what = f"was not written by an execution in this ledger ({why})"
            do = f"expected after `dvc pull` from another machine; else `dvc repro -f {stage}`"
            ws.report(WARNING, "ledger", what, path.relative_to(ws.root).as_posix(), do, [stage])


def check_verdicts(ws: Workspace) -> None:
    """Checks that each verdict is about the very data that is there now, and what it says."""
    for stage, receipt in ws.graph.receipts.items():
        for out in receipt["outputs"]:
            for name, file in ws.files[out].items():
                if file.name != "verdict.json":
                    continue
                path = f"{out}/{name}"
                ws.count("verdicts")
                try:
                    verdict = read_json(file)
                    _check_verdict(ws, stage, path, verdict)
                except (SpringheadError, KeyError, TypeError) as error:
                    what = f"is no readable verdict ({error})"
                    ws.report(RED, "verdicts", what, path, f"`dvc repro -f {stage}`", _judged(ws, stage))


def _judged(ws: Workspace, stage: str) -> list[str]:
    """Returns the stages whose data a validate stage judges; what follows from them is affected."""
    return sorted({maker for link in ws.graph.links if link.stage == stage for maker in link.makers} | {stage})


def _check_verdict(ws: Workspace, stage: str, path: str, verdict: dict[str, Any]) -> None:
    judged = _judged(ws, stage)
    now = {ws.sha256(path) for link in ws.graph.links if link.stage == stage for path in _judgeable(ws, link.path)}
    if verdict["data_digest"] not in now:
        what = f"judges data {verdict['data_digest'][:16]}…, which is not the data that is there now"
        ws.report(RED, "verdicts", what, path, f"`dvc repro -f {stage}`", judged)
    bad = [e["name"] for e in verdict["expectations"] if not e["success"] and e["severity"] == "critical"]
    if bad and verdict["success"]:
        what = f"says success, but a critical expectation failed: {', '.join(bad)}"
        ws.report(RED, "verdicts", what, path, f"`dvc repro -f {stage}`", judged)
    elif bad or not verdict["success"]:
        what = f"is a critical failure: {', '.join(bad) or 'see its expectations'}"
        ws.report(RED, "verdicts", what, path, "mend the data, then `dvc repro`", judged)


def _judgeable(ws: Workspace, path: str) -> list[str]:
    """Returns what a verdict can be about, given a dependency: the path, and the output that holds it."""
    return [path, *(out for out in ws.outputs if path.startswith(out + "/"))]


def check_registry(ws: Workspace) -> None:
    """Checks that every champion was put there by a promotion, and that MLflow still holds what was promoted."""
    from springhead import registry

    try:
        newest = {e["body"]["model"]: e["body"] for e in ws.ledger.entries() if e["kind"] == "promotion"}
        champions = {champion.name: champion for champion in registry.champions(ws.home)}
    except SpringheadError as error:
        do = "start MLflow, or mend what the message names"
        ws.report(RED, "registry", f"cannot be compared ({error})", "MLflow", do)
        return
    for name in sorted(newest.keys() | champions.keys()):
        ws.count("champions")
        problem = _champion_problem(ws, newest.get(name), champions.get(name))
        digest = champions[name].digest if name in champions else newest[name]["digest"]
        stages = [model.stage for model in ws.graph.models if model.sha256 == digest]
        if problem:
            ws.report(
                RED, "registry", problem, name, f"`springhead promote {name}` sets the alias by the rules", stages
            )
        elif not stages:
            what = "the champion was not made by any receipt here: the pipeline has moved on since"
            ws.report(WARNING, "registry", what, name, f"`springhead promote {name}` judges the models made now")


def _champion_problem(ws: Workspace, promoted: dict[str, Any] | None, champion: Any) -> str:
    """Returns what is wrong with one champion, or an empty string."""
    from springhead import registry

    if champion is None:
        assert promoted is not None
        return f"version {promoted['version']} was promoted, but nothing carries the alias champion now"
    if promoted is None:
        return f"alias champion is on version {champion.version}, but nothing was ever promoted: it was set by hand"
    if str(promoted["version"]) != str(champion.version):
        return (
            f"alias champion is on version {champion.version}, but version {promoted['version']} was promoted: "
            "it was moved by hand"
        )
    if champion.digest != promoted["digest"]:
        return f"version {champion.version} names {champion.digest[:16]}…, but {promoted['digest'][:16]}… was promoted"
    with tempfile.TemporaryDirectory() as temporary:
        try:
            registry.download(ws.home, f"{champion.name}@{registry.CHAMPION}", Path(temporary))
        except SpringheadError as error:
            return f"version {champion.version} is not what was promoted: {error}"
        except Exception as error:  # MLflow lets errors of its stores through
            return f"version {champion.version} cannot be read from MLflow ({type(error).__name__}: {error})"
    return ""
