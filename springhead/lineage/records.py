"""Compares the registry, MLflow's runs and Prefect's runs with what the ledger says about them.

All three are storage that others may write to. What they hold is compared with the ledger, entry by entry;
what a version really stores is read and digested.
"""

import json
import os
import urllib.error
import urllib.request
import uuid
from typing import TYPE_CHECKING, Any

from springhead.lineage.ledger import GENESIS
from springhead.lineage.promotions import CHALLENGER, CHAMPION, PREVIOUS, promotions, standing
from springhead.lineage.workspace import RED, WARNING, Workspace

if TYPE_CHECKING:
    from springhead.versions import Registered

_PATIENCE = 10.0  # seconds for a Prefect server to answer
# Tag of a version, and the key of the ledger entry that must say the same.
_SAME = {
    "model.sha256": "digest",
    "data.sha256": "data_digest",
    "verdict.sha256": "verdict_digest",
    "evaluation.sha256": "evaluation_digest",
    "gates.sha256": "gates_digest",
    "receipt": "receipt",
}


def check(ws: Workspace, deep: bool) -> None:
    """Runs the checks; a store that cannot be reached is a finding where anything should be in it."""
    if ws.broken_chain:  # the check of the ledger names the line
        return
    entries = ws.ledger.entries()
    try:
        _registry(ws, entries, deep)
        _runs(ws, entries)
    except Exception as error:  # MLflow lets errors of its stores and of the network through
        severity = RED if promotions(entries) else WARNING
        ws.report(severity, "registry", f"cannot be compared ({error})", "MLflow", "start MLflow, then audit again")
    if os.environ.get("PREFECT_API_URL"):
        _prefect(ws, entries, os.environ["PREFECT_API_URL"].rstrip("/"))


def _stages(ws: Workspace, digest: str) -> list[str]:
    return [model.stage for model in ws.graph.models if model.sha256 == digest]


# -- the registry ---------------------------------------------------------------------------------


def _registry(ws: Workspace, entries: list[dict[str, Any]], deep: bool) -> None:
    from springhead import versions

    held = versions.everything(ws.home)
    names = {version.name for version in held} | set(standing(entries))
    for name in sorted(names):
        mine = [version for version in held if version.name == name]
        ws.count("champions")
        for alias in (CHAMPION, CHALLENGER, PREVIOUS):
            _alias(ws, name, alias, standing(entries, alias).get(name), mine)
        _versions(ws, name, entries, mine, deep)


def _alias(ws: Workspace, name: str, alias: str, body: dict[str, Any] | None, held: "list[Registered]") -> None:
    """Compares where an alias is with where the ledger puts it."""
    on = next((version for version in held if alias in version.aliases), None)
    # Nothing depends on ``previous``: a rollback goes by the ledger.
    severity = WARNING if alias == PREVIOUS else RED
    do = f"`springhead promote {name}` sets the alias by the rules"
    if alias == CHALLENGER:
        do = f"`springhead promote {name} --challenger`, or `mlflow` to remove the alias"
    if on is None and body is not None:
        what = f"version {body['version']} was promoted, but nothing carries the alias {alias} now"
    elif on is not None and body is None:
        what = f"alias {alias} is on version {on.version}, but no entry of the ledger put it there: it was set by hand"
    elif on is not None and body is not None and str(body["version"]) != on.version:
        what = f"alias {alias} is on version {on.version}, but the ledger has version {body['version']}: "
        what += "it was moved by hand"
    else:
        if body is not None and alias == CHAMPION and not _stages(ws, body["digest"]):
            what = "the champion was not made by any receipt here: the pipeline has moved on since"
            do = f"`springhead promote {name}` judges the models made now"
            ws.report(WARNING, "registry", what, name, do)
        return
    digest = on.digest if on is not None else str(body["digest"] if body else "")
    ws.report(severity, "registry", what, name, do, _stages(ws, digest))


def _versions(ws: Workspace, name: str, entries: list[dict[str, Any]], held: "list[Registered]", deep: bool) -> None:
    """Compares each version of a registered model with the entry that promoted it, down to its bytes."""
    from springhead import tracking, versions

    bodies = {str(e["body"]["version"]): e["body"] for e in promotions(entries) if e["body"]["model"] == name}
    heads = {GENESIS, *ws.ledger.digests()}
    client = tracking.connect(ws.home) if held else None
    for version in held:
        ws.count("versions")
        where, body = f"{name}/{version.version}", bodies.pop(version.version, None)
        if version.tags.get("ledger.head", GENESIS) not in heads:
            what = "was registered on a ledger that ended otherwise: the ledger was cut or put back since"
            ws.report(RED, "registry", what, where, "restore ledger.jsonl from a backup", _stages(ws, version.digest))
        if body is None:
            # The tag is set after the entry, so a promotion that was killed leaves a pending version.
            passed = version.tags.get("gate.verdict") == "passed"
            what = "was promoted, but the ledger has no such entry: it was cut or put back, or the tag was set by hand"
            if not passed:
                what = "was never promoted: a promotion was interrupted, or somebody registered it"
            ws.report(RED if passed else WARNING, "registry", what, where, "restore the ledger, or delete it in MLflow")
            continue
        stages = _stages(ws, body["digest"])
        other = [tag for tag, key in _SAME.items() if version.tags.get(tag) != str(body.get(key))]
        if other:
            what = f"names another {', '.join(other)} than its promotion (ledger)"
            ws.report(RED, "registry", what, where, f"`springhead promote {name}`, after finding out who", stages)
        # A store elsewhere is read for what is in use; with --deep for all.
        if client is None or not (version.aliases or deep or versions.local(client, version)):
            continue
        now, then = versions.stored_files(client, name, version.version), body.get("stored") or {}
        if now == then:
            continue
        odd = sorted(file for file in (now or {}).keys() | then.keys() if (now or {}).get(file) != then.get(file))
        folder = versions.local(client, version)
        named = ", ".join(str(folder / file) if folder is not None else file for file in odd[:3])
        what = f"does not hold what was promoted: {named}" if now is not None else "cannot be read from MLflow's store"
        do = f"`springhead promote {name}` registers it again" if version.aliases else "delete the version in MLflow"
        ws.report(RED, "registry", what, where, f"{do}; find out who writes to MLflow's store", stages)
    for number, body in bodies.items():
        gone = "is not in the registry any more, but was promoted"
        severity = RED if standing(entries).get(name, {}).get("version") == number else WARNING
        do = f"`springhead promote {name}` registers it again"
        ws.report(severity, "registry", gone, f"{name}/{number}", do, _stages(ws, body["digest"]))


# -- MLflow's runs --------------------------------------------------------------------------------


def _runs(ws: Workspace, entries: list[dict[str, Any]]) -> None:
    """Compares every execution of the ledger with its run in MLflow, both ways."""
    from springhead import spool, tracking

    if not tracking.has_store(ws.home):
        return
    runs = tracking.recorded(ws.home)
    waiting = {path.name.partition(".")[0] for path in spool.waiting(ws.home)}
    executions = {str(e["body"]["execution"]): e for e in entries if e["kind"] == "execution"}
    failures = {str(e["body"]["execution"]) for e in entries if e["kind"] == "failure"}
    missing = []
    for name, entry in executions.items():
        ws.count("runs")
        body, run = entry["body"], runs.get(name)
        where = f"{body['stage']} (ledger entry {entry['seq']})"
        if run is None:
            missing += [] if name in waiting else [body["stage"]]
        elif run["receipt"] and run["receipt"] != body["receipt"]:
            what = f"MLflow's run {run['run'][:12]} names another receipt than the ledger"
            ws.report(RED, "runs", what, where, "restore MLflow's store, or rebuild it from the spool", [body["stage"]])
        elif run["status"] != "FINISHED":
            what = f"finished by the ledger, but MLflow's run {run['run'][:12]} is {run['status']}"
            ws.report(RED, "runs", what, where, "restore MLflow's store, or rebuild it from the spool", [body["stage"]])
    if missing:
        some = ", ".join(sorted(set(missing))[:3])
        what = f"has no run of {len(missing)} executions ({some}): its store is new or incomplete"
        do = "move `.springhead/spool/replayed/*.jsonl` back to `.springhead/spool`, then `springhead doctor --fix`"
        ws.report(WARNING, "runs", what, "MLflow", do)
    for name, run in runs.items():
        if name in executions or name in failures or run["status"] != "FINISHED":
            continue  # a killed execution has a run, but wrote nothing and no entry
        what = f"MLflow's run {run['run'][:12]} finished an execution that the ledger does not have: an entry is gone"
        stage = run["stage"]
        affected = [stage] if stage in ws.graph.receipts else []
        ws.report(RED, "runs", what, stage, "restore ledger.jsonl from a backup", affected)


# -- Prefect --------------------------------------------------------------------------------------


def _prefect(ws: Workspace, entries: list[dict[str, Any]], api: str) -> None:
    """Asks a Prefect server about the flow runs that the ledger names."""
    flows = sorted({str(e["body"].get("flow_run") or "") for e in entries if e["kind"] == "execution"} - {""})
    promoted = {e["body"]["receipt"] for e in promotions(entries)}
    for flow in flows:
        try:
            uuid.UUID(flow)
            state = _state(f"{api}/flow_runs/{flow}")
        except (urllib.error.URLError, OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                what = "is in the ledger, but the Prefect server does not know it: its database is new, or another's"
                ws.report(WARNING, "prefect", what, f"flow run {flow}", "compare PREFECT_API_URL with the worker's")
                continue
            ws.report(
                WARNING, "prefect", f"cannot be asked ({error})", api, "start the server, or unset PREFECT_API_URL"
            )
            return
        ws.count("flow runs")
        mine = [e["body"] for e in entries if e["kind"] == "execution" and e["body"].get("flow_run") == flow]
        stages = sorted({body["stage"] for body in mine})
        if state == "RUNNING" and not _alive(mine):
            what = "is RUNNING by the Prefect server, but executed nothing for six hours: it was killed, or hangs"
            ws.report(WARNING, "prefect", what, f"flow run {flow}", f"`prefect flow-run cancel {flow}`", stages)
        elif state in ("CRASHED", "CANCELLED", "FAILED") and any(body["receipt"] in promoted for body in mine):
            what = f"is {state} by the Prefect server, but a model it made was promoted"
            ws.report(WARNING, "prefect", what, f"flow run {flow}", "look at the run before trusting the model", stages)


def _state(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_PATIENCE) as answer:
        return str(json.load(answer).get("state_type") or "")


def _alive(executions: list[dict[str, Any]]) -> bool:
    """Tells whether a flow's executions may still go on; those of another machine count as alive."""
    import socket
    import time
    from datetime import datetime

    here = all(body.get("host") == socket.gethostname() for body in executions)
    last = max(
        (datetime.fromisoformat(body["started"]).timestamp() + body["seconds"] for body in executions), default=0
    )
    return not here or time.time() - last < _STALE


_STALE = 6 * 3600.0  # seconds without a new execution after which a run on this machine counts as dead
