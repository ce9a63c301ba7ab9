"""What the report shows of data: data sets, films of who made them, filters, verdicts and drift.

What cannot be read becomes a note; the rest is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from springhead.errors import SpringheadError
from springhead.jsonio import read_json
from springhead.lineage.graph import Graph, branch_of, item_of, role_of
from springhead.lineage.rows import Rows

_ROLES = {"safe": "the best that keeps the middle limit", "greedy": "the one with most reward"}
_DRIFTS_SHOWN = 8


def datasets(graph: Graph) -> list[dict[str, Any]]:
    """Every data set that a stage made, with the number of models made from it."""
    found = []
    for stage in graph.order:
        for data in graph.receipts[stage]["datasets"]:
            if data["role"] == "output":
                readers = graph.models_behind([stage])
                found.append({**data, "stage": stage, "models": len(readers)})
    return sorted(found, key=lambda d: branch_of(d["stage"]) != "rl")


def films(root: Path, graph: Graph, notes: list[str]) -> list[dict[str, Any]]:
    """For every gallery stage its films: ``path`` (None where there is none), ``title``, and ``why`` there is none."""
    found = []
    for stage, path in _outputs(root, graph, "gallery", "gallery.json"):
        try:
            entries = [_film(path.parent, role, entry) for role, entry in read_json(path).items()]
        except (SpringheadError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"The films of {stage} cannot be shown ({error}).")
            continue
        found.append({"stage": stage, "title": item_of(stage) or stage, "films": entries})
    return found


def _film(folder: Path, role: str, entry: dict[str, Any]) -> dict[str, Any]:
    who = f"{_ROLES.get(role, role)}: {entry['algorithm']} at cost limit {entry['cost_limit']:.3g}"
    if entry["film"] is None:
        return {"path": None, "title": who, "why": str(entry["why"])}
    path = folder / entry["film"]
    figures = f"return {entry['episode_return']:.1f}, cost {entry['cost_return']:g} in {entry['length']} steps"
    return {"path": path if path.is_file() else None, "title": f"{who}; {figures}", "why": "its film is not here"}


def filters(root: Path, graph: Graph, notes: list[str]) -> list[dict[str, Any]]:
    """Returns each filter stage with its rules and its plots."""
    try:
        rows = Rows(root, graph)
        rules = {stage: rows.rules(stage) for stage in graph.order}
    except SpringheadError as error:
        notes.append(f"Filter decisions are left out: {error}.")
        return []
    found = []
    for stage in (name for name in graph.order if rules[name]):
        outputs = graph.receipts[stage]["outputs"]
        plots = [root / out / n for out, entry in outputs.items() for n in entry.get("files", {}) if n.endswith(".png")]
        found.append({"stage": stage, "rules": rules[stage], "plots": [p for p in plots if p.is_file()]})
    return sorted(found, key=lambda f: branch_of(f["stage"]) != "rl")


def verdicts(
    root: Path, graph: Graph, notes: list[str], failures: Mapping[str, str], kept: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Every verdict, with the Data Docs and the drift that its stage wrote beside it.

    Args:
        root: The checkout.
        graph: Its receipts.
        notes: Takes what cannot be shown.
        failures: The stages that failed when they ran last, with the message.
        kept: For those among them whose findings were kept, where: their verdict is shown, not that of an earlier run.
    """
    found = []
    files = dict(_outputs(root, graph, "validate", "verdict.json"))
    files |= {stage: folder / "verdict.json" for stage, folder in kept.items() if role_of(stage) == "validate"}
    for stage, path in files.items():
        try:
            verdict = read_json(path)
            expectations = [{"description": "", "frame": "", **e} for e in verdict["expectations"]]
        except (SpringheadError, KeyError, TypeError) as error:
            notes.append(f"The verdict of {stage} cannot be read ({error}).")
            continue
        docs = path.parent / "data_docs"
        entry: dict[str, Any] = {"stage": stage, "docs": docs if (docs / "index.html").is_file() else None}
        entry |= {"failed": failures.get(stage, ""), "latest": stage in kept or stage not in failures}
        found.append({**verdict, **entry, "expectations": expectations, "drift": _drift(path.parent, stage, notes)})
    return sorted(found, key=lambda v: branch_of(v["stage"]) != "rl")


def _drift(folder: Path, stage: str, notes: list[str]) -> dict[str, Any] | None:
    """The drift of a data set, its largest first; None where the stage judges none."""
    path = folder / "drift.json"
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        ordered = sorted(found["quantities"], key=lambda q: (-q["drift"], q["quantity"]))
        bounds = [e for e in found["expectations"] if not e["success"]]
        return {
            "accepted": found["accepted"],
            "severity": found["severity"],
            "watched": len(ordered),
            "quantities": ordered[:_DRIFTS_SHOWN],
            "broken": [e["description"] for e in bounds],
        }
    except (SpringheadError, KeyError, TypeError) as error:
        notes.append(f"The drift of {stage} cannot be read ({error}).")
        return None


def _outputs(root: Path, graph: Graph, step: str, name: str) -> Iterator[tuple[str, Path]]:
    """Stages that play a role whose output has a file of this name, with the file."""
    for stage in (stage for stage in graph.order if role_of(stage) == step):
        for out in graph.receipts[stage]["outputs"]:
            if (root / out / name).is_file():
                yield stage, root / out / name
