"""What is behind a model, and what became of a row.

``lineage`` answers for anything a user can point at: a registered model, a digest, a path, a
stage or a row id. The answer is plain JSON; :mod:`springhead.lineage.tree` prints it.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.jsonio import read_json
from springhead.lineage.digests import file_digest
from springhead.lineage.graph import Graph, Model, branch_of, role_of, rows_method
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path
from springhead.lineage.rows import Rows

Executions = dict[tuple[str, str], list[dict[str, Any]]]
SHORTEST = 8  # digits of a digest that a user must give
_HEX = re.compile(r"[0-9a-f]+")
_REGISTERED = re.compile(r"(models:/)?[\w.-]+(@[\w.-]+|/\d+)")


@dataclass(frozen=True)
class Subject:
    """What a reference points at."""

    kind: str
    """``model``, ``artefact`` (an output or a part of one), ``stage`` or ``row``."""
    name: str
    """Path of the model or artefact, name of the stage, or id (prefix) of the row."""
    sha256: str = ""
    model: Model | None = None
    registry: dict[str, Any] | None = None


def lineage(root: Path, ref: str, scan: bool = False, graph: Graph | None = None) -> dict[str, Any]:
    """Answers for any reference; see :func:`find` for the forms.

    Args:
        root: the repository root.
        ref: what is asked about.
        scan: read every row table whole instead of asking the index in the state folder where a row is.
        graph: the artefact graph, read from ``root`` by default.

    Raises:
        BadInput: if the reference is unknown or ambiguous; the message says what to do.
    """
    graph = graph or Graph.read(root)
    subject = find(root, graph, ref)
    if subject.kind == "row":
        return lineage_of_row(root, ref, graph, scan)
    return {"query": ref, **_behind(root, graph, subject)}


def lineage_of_model(root: Path, ref: str) -> dict[str, Any]:
    """Returns everything behind a model.

    Args:
        root: the repository root.
        ref: ``models:/NAME@champion``, ``NAME@champion``, ``NAME/3``, a digest or a path.

    Raises:
        BadInput: if the reference is unknown, ambiguous or no model.
    """
    graph = Graph.read(root)
    subject = find(root, graph, ref)
    if subject.model is None:
        kind = {"artefact": "an artefact"}.get(subject.kind, f"a {subject.kind}")
        raise BadInput(f"{ref}: is no model but {kind} ({subject.name}); ask `springhead lineage {ref}`")
    return {"query": ref, **_behind(root, graph, subject)}


# -- references -----------------------------------------------------------------------------------


def find(root: Path, graph: Graph, ref: str) -> Subject:
    """Finds what a reference means.

    Known forms: ``models:/NAME@ALIAS``, ``NAME@ALIAS``, ``NAME/VERSION``, ``row:ID``, a path of
    an output or inside one, a stage name, and a digest of at least eight hexadecimal digits of a
    model, an output or a row.

    Raises:
        BadInput: if nothing, or more than one thing, is meant.
    """
    if ref.startswith("row:"):
        return Subject("row", _digits(ref[4:], ref))
    if ref in graph.receipts:
        return Subject("stage", ref)
    path = _relative(root, ref)
    if path is not None and graph.makers(path):
        return _by_path(graph, path)
    if ref.partition("@")[0] in {stage.partition("@")[0] for stage in graph.receipts}:
        near = difflib.get_close_matches(ref, graph.receipts, 3, 0.0)
        raise BadInput(f"{ref}: no stage of this name has a receipt here; there are {', '.join(near)} …")
    if _REGISTERED.fullmatch(ref):
        return _registered(root, graph, ref)
    if _HEX.fullmatch(ref.lower()):
        return _by_digest(graph, _digits(ref, ref))
    promoted = {e["body"]["model"] for e in Ledger(state_folder(root)).entries() if e["kind"] == "promotion"}
    if ref.removeprefix("models:/") in promoted:
        raise BadInput(f"{ref}: a registered model; say which version: {ref}@champion, or {ref}/1 and so on")
    raise BadInput(
        f"{ref}: not known here. Give models:/NAME@champion, NAME/VERSION, a path below data/, a stage "
        f"({', '.join(graph.order[:2]) or 'none has run yet'} …), {SHORTEST} or more digits of a digest, or row:ID"
    )


def _digits(text: str, ref: str) -> str:
    text = text.lower()
    if not _HEX.fullmatch(text) or not SHORTEST <= len(text) <= 64:
        raise BadInput(f"{ref}: expected {SHORTEST} to 64 hexadecimal digits of a SHA-256")
    return text


def _relative(root: Path, ref: str) -> str | None:
    path = Path(ref)
    try:
        return path.relative_to(root).as_posix() if path.is_absolute() else path.as_posix().rstrip("/")
    except ValueError:
        return None


def _by_path(graph: Graph, path: str) -> Subject:
    inside = [m for m in graph.models if m.path == path or m.path.startswith(path + "/")]
    exact = [m for m in inside if m.path == path] or inside
    if len(exact) == 1:
        return Subject("model", exact[0].path, exact[0].sha256, exact[0])
    digest = graph.digest(path)
    if digest is None:
        raise BadInput(f"{path}: no receipt names this file; it is not part of what the stage made")
    return Subject("artefact", path, digest)


def _by_digest(graph: Graph, prefix: str) -> Subject:
    models = {m.sha256: m for m in graph.models if m.sha256.startswith(prefix)}
    if len(models) == 1:
        (model,) = models.values()
        return Subject("model", model.path, model.sha256, model)
    if models:
        raise BadInput(f"{prefix}: {len(models)} models begin like this; give more digits")
    outputs: dict[str, str] = {}
    for receipt in graph.receipts.values():
        for out, facts in receipt["outputs"].items():
            entries = {out: facts["sha256"]} | {f"{out}/{n}": d for n, d in facts.get("files", {}).items()}
            entries |= {d["path"]: d["sha256"] for d in receipt["datasets"] if d["role"] == "output"}
            for path, digest in entries.items():
                if digest.startswith(prefix):
                    outputs.setdefault(digest, path)
    if len(outputs) > 1:
        raise BadInput(f"{prefix}: several artefacts begin like this ({', '.join(outputs.values())}); give more digits")
    for digest, path in outputs.items():
        return Subject("artefact", path, digest)
    return Subject("row", prefix)


def _registered(root: Path, graph: Graph, ref: str) -> Subject:
    from springhead import registry

    version = registry.resolve(state_folder(root), ref)
    facts = {"name": version.name, "version": version.version, "aliases": list(version.aliases)}
    digest = version.digest
    model = next((m for m in graph.models if m.sha256 == digest), None)
    if model is None:
        raise BadInput(
            f"{ref}: version {version.version} holds the model {digest[:16] or '(no digest)'}, which no receipt "
            "in this checkout made; check out the commit that made it, then `dvc checkout`"
        )
    return Subject("model", model.path, digest, model, facts)


# -- behind a model -------------------------------------------------------------------------------


def _behind(root: Path, graph: Graph, subject: Subject) -> dict[str, Any]:
    """Collects everything behind a model, an artefact or a stage."""
    starts = [subject.name] if subject.kind == "stage" else list(graph.makers(subject.name))
    stages = sorted({s for start in starts for s in graph.upstream(start)}, key=graph.order.index)
    # A verdict or an evaluation reads what it judges, so it hangs below, not behind.
    judges = _judges(graph, stages, subject)
    ledger = Ledger(state_folder(root)).entries()
    ran = executions(ledger)
    rows = Rows(root, graph)
    training = [d for s in starts for d in graph.receipts[s]["datasets"] if d["role"] == "training"]
    method = _method(subject.model)
    answer: dict[str, Any] = {
        "kind": subject.kind,
        "name": subject.name,
        "sha256": subject.sha256,
        "stages": [stage_facts(root, graph, name, ran) for name in stages],
        "judges": [stage_facts(root, graph, name, ran) for name in judges if name not in stages],
        "datasets": [{"stage": s, **d} for s in stages for d in graph.receipts[s]["datasets"]],
        "filters": [rule for s in stages for rule in rows.rules(s)],
        "origins": [{"data": d["path"], **o} for d in training for o in _named(graph, rows.origins(d["path"], method))],
        "verdicts": [v for s in judges for v in _verdicts(root, graph, s)],
        "evaluations": [_evaluation(root, graph, s, subject.model) for s in judges if role_of(s) == "evaluate"],
        "missing": sorted(set(rows.missing)),
    }
    if subject.model is not None:
        promotion = _promotion(ledger, subject.sha256)
        answer |= {
            "model": _model(subject.model),
            "registry": subject.registry or _from_promotion(promotion),
            "promotion": promotion,
        }
    else:
        answer["models"] = [_model(m) for m in graph.models_behind(starts)]
    return answer


def rows_of(root: Path, ref: str) -> list[str]:
    """Returns the ids of all rows a model was trained on, or that an artefact holds.

    Raises:
        BadInput: if the reference is unknown or has no row table.
    """
    graph = Graph.read(root)
    subject = find(root, graph, ref)
    rows = Rows(root, graph)
    data = [subject.name]
    if subject.model is not None:
        datasets = graph.receipts[subject.model.stage]["datasets"]
        data = [d["path"] for d in datasets if d["role"] == "training"]
    ids = [i for path in data for i in rows.ids(path, _method(subject.model))]
    if not ids:
        raise BadInput(f"{ref}: no row table for {', '.join(data) or 'it'} in the workspace; run `dvc checkout`")
    return ids


def _judges(graph: Graph, stages: list[str], subject: Subject) -> list[str]:
    """Returns the validate stages over data behind the subject, and the evaluations of the model."""
    found = set()
    for link in graph.links:
        role = role_of(link.stage)
        if role == "validate" and set(link.makers) & set(stages):
            found.add(link.stage)
        if role in ("evaluate", "attack") and subject.model is not None and subject.model.stage in link.makers:
            found.add(link.stage)
    return sorted(found, key=graph.order.index)


def stage_facts(root: Path, graph: Graph, name: str, ran: Executions) -> dict[str, Any]:
    """Returns what a receipt says about its stage, and which executions in the ledger wrote this receipt."""
    receipt = graph.receipts[name]
    digest = file_digest(receipt_path(root, name))
    links = graph.links_of(name)
    return {
        "stage": name,
        "branch": branch_of(name),
        "receipt": digest,
        "command": receipt["command"],
        "params": receipt["params"],
        "seed": receipt["seed"],
        "code": receipt["code"]["digest"],
        "lock": receipt["environment"]["lock"],
        "inputs": [{"path": k.path, "sha256": k.sha256, "from": list(k.makers), "verified": k.verified} for k in links],
        "outputs": {p: {k: v for k, v in f.items() if k != "files"} for p, f in receipt["outputs"].items()},
        "executions": ran.get((name, digest), []),
    }


def executions(ledger: list[dict[str, Any]]) -> Executions:
    """Returns the ledger's facts about executions, by stage and digest of the receipt they wrote."""
    wanted = ("execution", "git", "host", "started", "seconds", "attempt", "flow_run", "python")
    found: Executions = {}
    for entry in ledger:
        if entry["kind"] == "execution":
            body = entry["body"]
            facts = {key: body[key] for key in wanted if key in body} | {"entry": entry["seq"]}
            found.setdefault((body["stage"], body["receipt"]), []).append(facts)
    return found


def _named(graph: Graph, origins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the path of the model behind each policy or generator digest."""
    paths = {m.sha256: m.path for m in graph.models}
    return [{**o, "model": paths.get(str(o.get("policy") or o.get("generator") or ""))} for o in origins]


def _verdicts(root: Path, graph: Graph, stage: str) -> list[dict[str, Any]]:
    """Returns the verdict of a validate stage; empty for other stages."""
    found = []
    for out, facts in graph.receipts[stage]["outputs"].items():
        for file, digest in facts.get("files", {}).items():
            path = f"{out}/{file}"
            if file.rpartition("/")[2] == "verdict.json" and (root / path).is_file():
                verdict, expectations = _with_list(root / path, "expectations", ("name", "success"))
                failed = [e["name"] for e in expectations if not e["success"]]
                short = {k: v for k, v in verdict.items() if k != "expectations"}
                total = len(expectations)
                entry = {"stage": stage, "path": path, "sha256": digest, "expectations": total, "failed": failed}
                found.append(entry | short)
    return found


def _evaluation(root: Path, graph: Graph, stage: str, model: Model | None) -> dict[str, Any]:
    """Returns what an evaluation says about one model: its entry in the stage's ``summary.json``."""
    receipt = graph.receipts[stage]
    figures: dict[str, Any] = {}
    for out in receipt["outputs"]:
        path = root / out / "summary.json"
        entries = _with_list(path, "models", ())[1] if model is not None and path.is_file() else []
        for entry in entries:
            if model is not None and entry.get("digest") == model.sha256:
                figures = entry
    return {"stage": stage, "outputs": sorted(receipt["outputs"]), "figures": figures}


def _with_list(path: Path, key: str, needed: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a JSON object and the list of objects it has under a key.

    Raises:
        BadInput: the file is of another form, as one that was edited may be.
    """
    found = read_json(path)
    entries = found.get(key, []) if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and e.keys() >= set(needed) for e in entries):
        raise BadInput(f"{path}: has no list of {key}; restore it with `dvc checkout`")
    return found, entries


def _model(model: Model) -> dict[str, Any]:
    facts = dict(model.facts)
    return {"stage": model.stage, "path": model.path, "sha256": model.sha256, "kind": model.kind, "facts": facts}


def _method(model: Model | None) -> str | None:
    """Returns the method whose rows of a data set a model took."""
    return rows_method(model.facts) if model is not None else None


def _promotion(ledger: list[dict[str, Any]], digest: str) -> dict[str, Any] | None:
    """Returns the newest promotion of a model, with its place in the ledger."""
    for entry in reversed(ledger):
        if entry["kind"] == "promotion" and entry["body"]["digest"] == digest:
            return {**entry["body"], "entry": entry["seq"], "time": entry["time"]}
    return None


def _from_promotion(promotion: dict[str, Any] | None) -> dict[str, Any] | None:
    return {"name": promotion["model"], "version": promotion["version"], "aliases": []} if promotion else None


# -- what became of a row -------------------------------------------------------------------------


def lineage_of_row(root: Path, row: str, graph: Graph | None = None, scan: bool = False) -> dict[str, Any]:
    """Returns where a row is, what each filter decided, its relatives, and the models it trained.

    Args:
        root: the repository root.
        row: at least eight digits of its id.
        graph: the artefact graph, read from ``root`` by default.
        scan: read every row table whole instead of asking the index in the state folder.

    Raises:
        BadInput: if the id is unknown or ambiguous.
    """
    graph = graph or Graph.read(root)
    rows = Rows(root, graph, scan)
    full = rows.find(_digits(row.removeprefix("row:"), row), row)
    below = rows.relatives(full, up=False)
    places = rows.places(full)
    makers = {str(p["row"].get("policy") or p["row"].get("generator") or "") for p in places}
    return {
        "query": row,
        "kind": "row",
        "name": full,
        "places": places,
        "decisions": rows.decisions(full),
        "quarantine": rows.quarantine(full),
        "made_by": [_model(m) for m in graph.models if m.sha256 in makers],
        "parents": rows.relatives(full, up=True),
        "children": below,
        "models": list(_trained(root, graph, rows, [full, *(r["id"] for r in below)])),
        "missing": sorted(set(rows.missing)),
    }


def _trained(root: Path, graph: Graph, rows: Rows, ids: list[str]) -> Iterable[dict[str, Any]]:
    """Yields every model whose training data holds one of the rows, and which ones."""
    promoted = [e["body"] for e in Ledger(state_folder(root)).entries() if e["kind"] == "promotion"]
    within: dict[tuple[str, str | None], tuple[list[str], int]] = {}
    for model in graph.models:
        for data in graph.receipts[model.stage]["datasets"]:
            if data["role"] != "training":
                continue
            key = (data["path"], _method(model))
            if key not in within:
                within[key] = rows.within(ids, *key)
            found, size = within[key]
            if not found:
                continue
            direct = ids[0] in found
            yield _model(model) | {
                "data": data["path"],
                "data_rows": size,
                # Fewer than data_rows where training was limited to a part or left over-long rows out.
                "trained_rows": data["rows"],
                "direct": direct,
                "through": [] if direct else found[:20],
                "promoted_as": [f"{p['model']}/{p['version']}" for p in promoted if p["digest"] == model.sha256],
                # A data set that was made again since holds other rows than the model saw.
                "current": graph.digest(data["path"]) in (None, data["sha256"]),
            }
