"""Recomputes what the receipts, DVC, the verdicts, the ledger and the registry claim.

Each check returns findings; none trusts a time stamp, a state database or a file mode. DVC does
not notice a changed byte in its own cache, and MLflow lets an alias be set on anything, so both
are compared with digests that are computed here and now.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from springhead.declared import is_data
from springhead.errors import BadInput, SpringheadError
from springhead.jsonio import read_json
from springhead.keys import changed_keys
from springhead.lineage import accepted
from springhead.lineage.digests import dependency_digest, files_digest
from springhead.lineage.dvcfiles import cache_objects, directory_md5, file_md5
from springhead.lineage.head import FILE as HEAD
from springhead.lineage.head import check_head
from springhead.lineage.promotions import promotions
from springhead.lineage.receipts import receipt_path
from springhead.lineage.workspace import RED, WARNING, Locked, Problem, Workspace


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


def audit(
    root: Path, deep: bool = False, progress: Callable[[int, int], None] | None = None, registry: bool = True
) -> Audit:
    """Checks a checkout from its data to its registry.

    Args:
        root: the repository root.
        deep: also hash the objects in DVC's cache that no stage uses now, and every version in the registry.
        progress: called with (files hashed, files in all).
        registry: also compare with MLflow and, where ``PREFECT_API_URL`` names one, a Prefect server.

    Raises:
        BadInput: if a receipt, ``dvc.lock`` or the ledger cannot be read at all.
    """
    workspace = Workspace(root, progress)
    if not workspace.graph.receipts and not workspace.unreadable:
        raise BadInput(f"{root}/data/receipts: no receipts; run `springhead run` or `dvc repro`, or `dvc pull`")
    checks = [
        check_readable,
        check_outputs,
        check_contents,
        check_links,
        check_lock,
        check_code,
        check_ledger,
        check_verdicts,
        accepted.check,
    ]
    for check in [*checks, check_signatures]:
        check(workspace)
    if deep:
        check_cache(workspace)
    if registry:
        from springhead.lineage import records

        records.check(workspace, deep)
    order = {RED: 0, WARNING: 1}
    found = tuple(sorted(workspace.problems, key=lambda p: (order[p.severity], p.check, p.where)))
    return Audit(found, workspace.checked)


# -- data -----------------------------------------------------------------------------------------


def check_readable(ws: Workspace) -> None:
    """Names receipts and lock files that cannot be read at all."""
    for path, why in ws.unreadable:
        where = path.relative_to(ws.root).as_posix()
        what = f"cannot be read: {why.removeprefix(f'{path}: ')}"
        stages = [path.stem] if path.suffix == ".json" else list(ws.graph.receipts)
        readers = [link.stage for link in ws.graph.links if any(out in link.path for out in _outs_of(ws, path.stem))]
        do = "`springhead repair`" if path.suffix == ".json" else "`git checkout dvc.lock`"
        ws.report(RED, "receipts" if path.suffix == ".json" else "dvc.lock", what, where, do, [*stages, *readers])


def _outs_of(ws: Workspace, stage: str) -> list[str]:
    locked = ws.locked.get(stage)
    return [out for out in locked.outs if not out.startswith("data/receipts/")] if locked is not None else []


def check_outputs(ws: Workspace) -> None:
    """Compares every output file with the digest in the receipt of the stage that made it."""
    for stage, receipt in ws.graph.receipts.items():
        for out, facts in receipt["outputs"].items():
            for link in ws.linked_folders(out):
                what = "was added: a link to a folder, which the receipt does not name"
                ws.report(RED, "outputs", what, link, f"remove it, then `dvc checkout {out}`", [stage])
            recorded: dict[str, str] = facts.get("files", {"": facts["sha256"]})
            listing = ws.files[out]
            ws.count("outputs", len(recorded))
            if not listing:
                again = f"`dvc checkout {out}` or `dvc pull {out}`"
                ws.report(RED, "outputs", "is not in the workspace, so it cannot be checked", out, again, [stage])
                continue
            for name in sorted(recorded.keys() | listing.keys()):
                path = f"{out}/{name}" if name else out
                now = ws.hashes[listing[name]] if name in listing else None
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
        elif not link.makers and (maker := ws.maker(link.path)):
            what = f"was made by {maker}, whose receipt is gone: nothing says how"
            ws.report(RED, "links", what, link.path, f"`dvc checkout` or `dvc repro {maker}`", [link.stage])
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
    """Compares ``dvc.lock`` and the objects it names in DVC's cache with the receipts and the workspace."""
    if ws.graph.receipts and not (ws.root / "dvc.lock").exists():
        what = "is missing, but stages have run: nothing says which content belongs to them"
        ws.report(RED, "dvc.lock", what, "dvc.lock", "`git checkout dvc.lock`, or `dvc repro`", ws.graph.receipts)
        return
    for stage in sorted(ws.graph.receipts.keys() | ws.lock.keys()):
        receipt, locked = ws.graph.receipts.get(stage), ws.locked.get(stage)
        path = receipt_path(Path(), stage).as_posix()
        if locked is None:
            what = "is the receipt of a stage that dvc.lock does not know"
            ws.report(WARNING, "dvc.lock", what, path, f"`dvc repro {stage}`; remove it if the stage is gone", [stage])
            continue
        if receipt is None:
            if path in locked.outs:
                what = "is missing: what the stage made cannot be traced"
                ws.report(RED, "dvc.lock", what, path, f"`dvc checkout {path}` or `dvc repro {stage}`", [stage])
            continue
        _check_locked(ws, stage, receipt, locked)
        _check_lock_params(ws, stage, ws.lock[stage], receipt)


def _check_locked(ws: Workspace, stage: str, receipt: dict[str, Any], locked: Locked) -> None:
    """Checks that what ``dvc.lock`` names for a stage is what the stage made."""
    made = {receipt_path(Path(), stage).as_posix(): ws.hashes[receipt_path(ws.root, stage)]}
    for out, facts in receipt["outputs"].items():
        made |= (
            {f"{out}/{name}": d for name, d in facts["files"].items()} if "files" in facts else {out: facts["sha256"]}
        )
    named: dict[str, set[str]] = {out: set() for out in locked.outs}
    for path, md5, place in locked.objects:
        ws.count("dvc.lock")
        out = next(o for o in locked.outs if path == o or path.startswith(o + "/"))
        named[out].add(path)
        if place in ws.hashes:
            _check_object(ws, stage, path, md5, place, made.get(path))
        elif (ws.root / path).is_file() and file_md5(ws.root / path) != md5:  # not in the cache: `dvc gc` took it
            what = f"is not what dvc.lock records for {stage} (md5 {md5[:12]}…)"
            ws.report(RED, "dvc.lock", what, path, f"`dvc checkout {out}`, or `dvc repro {stage}`", [stage])
    for out, place in locked.broken.items():
        if place.is_file():
            what = f"cache object, the listing of {out}, holds other bytes than its name says"
            ws.report(RED, "cache", what, _shown(ws, place), f"`springhead repair`, or `dvc repro -f {stage}`", [stage])
        now = {name: file_md5(file) for name, file in ws.files.get(out, {}).items()}
        if now and directory_md5(now) != locked.outs[out]:
            what = f"is not what dvc.lock records for {stage}"
            ws.report(RED, "dvc.lock", what, out, f"`dvc checkout {out}`, or `dvc repro {stage}`", [stage])
    for out in sorted(set(locked.outs) - set(locked.broken)):
        claimed = {path for path in made if path == out or path.startswith(out + "/")}
        if odd := sorted(claimed ^ named[out]):
            what = f"names other files in {out} than the receipt of {stage}: {', '.join(odd[:3])}"
            ws.report(RED, "dvc.lock", what, "dvc.lock", f"`git checkout dvc.lock`, or `dvc repro -f {stage}`", [stage])


def _check_object(ws: Workspace, stage: str, path: str, md5: str, place: Path, made: str | None) -> None:
    """Checks one object of the cache against the receipt."""
    if made is None or ws.hashes[place] == made:
        return
    if file_md5(place) != md5:
        what = f"cache object holds other bytes than its name says ({path} of {stage})"
        ws.report(RED, "cache", what, _shown(ws, place), f"`springhead repair`, or `dvc repro -f {stage}`", [stage])
    else:
        what = f"dvc.lock records another content for {stage} (md5 {md5[:12]}…) than its receipt (sha256 {made[:12]}…)"
        ws.report(RED, "dvc.lock", what, path, f"`git checkout dvc.lock`, or `dvc repro -f {stage}`", [stage])


def _shown(ws: Workspace, path: Path) -> str:
    return path.relative_to(ws.root).as_posix() if path.is_relative_to(ws.root) else str(path)


def _check_lock_params(ws: Workspace, stage: str, entry: dict[str, Any], receipt: dict[str, Any]) -> None:
    locked = {key: value for block in (entry.get("params") or {}).values() for key, value in block.items()}
    for key, value in receipt["params"].items():
        if key in locked and locked[key] != value:
            what = f"records another value of {key} for {stage} than its receipt"
            ws.report(RED, "dvc.lock", what, "dvc.lock", f"`dvc repro -f {stage}`", [stage])


def check_cache(ws: Workspace) -> None:
    """Hashes every object of DVC's cache, also of old revisions: an object's name is the MD5 of its content."""
    users: dict[str, set[str]] = {}
    for stage, locked in ws.locked.items():
        for md5 in [*locked.outs.values(), *(md5 for _, md5, _ in locked.objects)]:
            users.setdefault(md5, set()).add(stage)
    objects = cache_objects(ws.root)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        digests = pool.map(file_md5, [path for _, path in objects])
        for (name, path), md5 in zip(objects, digests, strict=True):
            ws.count("cache")
            where = _shown(ws, path)
            if md5 != name.removesuffix(".dir") and not any(p.where == where for p in ws.problems):
                stages = sorted(users.get(name, ()))
                what = (
                    f"cache object holds other bytes than its name says (used by {', '.join(stages) or 'no stage now'})"
                )
                do = "`springhead repair`, or remove it, then `dvc fetch` from a good remote"
                ws.report(RED, "cache", what, where, do, stages)


# -- code, ledger, verdicts, registry -------------------------------------------------------------


def check_code(ws: Workspace) -> None:
    """Warns where code, a lock file or another file under git has moved on since a stage ran with it."""
    moved: dict[str, list[str]] = {}
    now: dict[str, str | None] = {}
    for stage, receipt in ws.graph.receipts.items():
        used = {**receipt["code"]["files"], **receipt["environment"]["lock"]}
        for path, facts in receipt["dependencies"].items():
            # Data has its own check.
            if not is_data(path):
                used[path] = facts["sha256"]
        for path, recorded in sorted(used.items(), reverse=True):  # files before the folder that they are in
            ws.count("code")
            if path not in now:
                now[path] = dependency_digest(ws.root, path) if (ws.root / path).exists() else None
            named = any(stage in stages and file.startswith(f"{path}/") for file, stages in moved.items())
            if now[path] != recorded and not named:
                moved.setdefault(path, []).append(stage)
    for path, stages in sorted(moved.items()):
        some = ", ".join(stages[:3]) + (f" and {len(stages) - 3} more" if len(stages) > 3 else "")
        what = f"{'is gone' if now[path] is None else 'has changed'} since {some} ran with it"
        ws.report(
            WARNING, "code", what, path, "`git log` shows the change; `dvc repro` runs what depends on it", stages
        )


def check_ledger(ws: Workspace) -> None:
    """Checks the ledger's chain, and that an execution it knows wrote each receipt."""
    for problem in ws.broken_chain:
        where, _, what = problem.partition(": ")
        ws.report(RED, "ledger", what, where, "restore ledger.jsonl from a backup", ws.graph.receipts)
    if ws.broken_chain:  # nothing in it can be believed
        return
    entries = ws.ledger.entries()
    ws.count("ledger", len(entries))
    executions = [entry["body"] for entry in entries if entry["kind"] == "execution"]
    written = {(body["stage"], body["receipt"]) for body in executions}
    known = {body["stage"] for body in executions}
    for stage in sorted(known & ws.declared.keys() - ws.graph.receipts.keys() - ws.lock.keys()):
        what = "was executed by the ledger, but neither a receipt nor dvc.lock knows it: what it made cannot be checked"
        readers = [s for s, d in ws.declared.items() if set(d.dependencies) & set(ws.declared[stage].outputs)]
        ws.report(RED, "ledger", what, stage, f"`dvc repro {stage}`", readers)
    for stage in ws.graph.receipts:
        path = receipt_path(ws.root, stage)
        if (stage, ws.hashes[path]) not in written:
            why = (
                "the ledger knows other executions of the stage only" if stage in known else "no execution is recorded"
            )
            what = f"was not written by an execution in this ledger ({why})"
            do = f"expected after `dvc pull` from another machine; else `dvc repro -f {stage}`"
            ws.report(WARNING, "ledger", what, path.relative_to(ws.root).as_posix(), do, [stage])


def check_signatures(ws: Workspace) -> None:
    """Checks the signed head of the ledger, the keys, and the signed statements behind every promotion."""
    from springhead import attestations

    # Whoever audits need not be able to sign; what matters here is whom the repository trusts.
    for problem in ws.keys.untrustworthy():
        where, _, what = problem.partition(": ")
        if "no trusted key" not in what or promotions(_entries(ws)):
            ws.report(RED, "keys", what, where, "see docs/guide/signing.md", ws.graph.receipts)
    for name in changed_keys(ws.root):
        what = "is trusted here, but is not what the last commit has: nobody reviewed it"
        ws.report(RED, "keys", what, name, f"`git checkout {name}`, remove it, or commit it after a review")
    try:
        ws.keys.public()
    except BadInput:  # a trusted key that cannot be read, which is named above: nothing can be verified
        return
    state = check_head(ws.ledger, ws.keys)
    where = f"{ws.home.name}/{HEAD}"
    if state.problem:
        do = "restore ledger and head from a backup; `springhead doctor` says more"
        ws.report(RED, "ledger", state.problem, where, do, ws.graph.receipts)
    elif state.unsigned:
        what = f"does not vouch for the last {state.unsigned} entries of the ledger yet"
        ws.report(WARNING, "ledger", what, where, "`springhead doctor` says more")
    for entry in promotions(_entries(ws)):
        ws.count("promotions")
        body = entry["body"]
        name = f"{body['model']}/{body['version']}"
        stages = [model.stage for model in ws.graph.models if model.sha256 == body["digest"]]
        problems = attestations.problems(ws.home, ws.keys, body)
        if entry["seq"] >= state.signed and not state.problem:
            problems.append("its ledger entry is not signed")
        for problem in problems:
            what = f"ledger entry {entry['seq']}: {problem}"
            ws.report(RED, "signatures", what, name, f"`springhead promote {body['model']}` after restoring", stages)


def _entries(ws: Workspace) -> list[dict[str, Any]]:
    """Returns the ledger's entries, none where its chain is broken, which a check of its own names."""
    return [] if ws.broken_chain else ws.ledger.entries()


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
