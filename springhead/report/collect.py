"""The facts the report shows, read from receipts, ledger and outputs.

What is missing is said on the page. A report that fails because one plot is not there would be
missing exactly when it is needed.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from springhead.errors import SpringheadError
from springhead.jsonio import read_json
from springhead.lineage.dvcfiles import read_lock
from springhead.lineage.graph import Graph, branch_of, item_of, role_of, step_of
from springhead.lineage.ledger import Ledger
from springhead.lineage.status import champions_of, last_runs
from springhead.report import data

BRANCHES = {"rl": "Safe policies", "llm": "Language models"}


@dataclass
class Facts:
    """Everything on the page, and notes on what could not be had."""

    graph: Graph
    ledger: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """The stages that failed when they ran last, with the first line of the message."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    champions: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    films: list[dict[str, Any]] = field(default_factory=list)
    filters: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)


def collect(root: Path, home: Path) -> Facts:
    """Reads the facts of a checkout; whatever fails becomes a note."""
    notes: list[str] = []
    ledger = Ledger(home)
    entries: list[dict[str, Any]] = []
    try:
        entries = ledger.entries()
    except SpringheadError as error:
        notes.append(f"Times and promotions are left out: {error}.")
    notes += [f"The ledger is damaged: {problem}." for problem in ledger.verify()[:3]]
    facts = Facts(_graph(root, notes), entries, notes)
    failures = _failures(entries)
    facts.failures = {stage: str(body.get("error") or "failed").splitlines()[0] for stage, body in failures.items()}
    facts.stages = _stages(root, facts)
    facts.champions = _champions(facts)
    facts.results = [r for name in facts.graph.order for r in _result(root, facts, name)]
    facts.datasets = data.datasets(facts.graph)
    facts.films = data.films(root, facts.graph, notes)
    facts.filters = data.filters(root, facts.graph, notes)
    kept = {stage: home / "failed" / stage for stage, body in failures.items() if body.get("findings")}
    facts.verdicts = data.verdicts(root, facts.graph, notes, facts.failures, kept)
    return facts


def _graph(root: Path, notes: list[str]) -> Graph:
    receipts: dict[str, dict[str, Any]] = {}
    for path in sorted((root / "data/receipts").glob("*.json")):
        try:
            receipts |= {path.stem: read_json(path)}
        except SpringheadError as error:
            notes.append(f"A receipt is left out: {error}.")
    return Graph(receipts)


# -- stages ---------------------------------------------------------------------------------------


def _stages(root: Path, facts: Facts) -> list[dict[str, Any]]:
    runs = last_runs(facts.ledger)
    failed = facts.failures
    unverified = {link.stage for link in facts.graph.links if not link.verified}
    rows = []
    for name in sorted(facts.graph.order, key=lambda n: branch_of(n) != "rl"):
        outputs = facts.graph.receipts[name]["outputs"]
        gone = [out for out in outputs if not (root / out).exists()]
        state = "failed" if name in failed else "stale" if name in unverified else "missing" if gone else "made"
        says = {
            "failed": failed.get(name, ""),
            "stale": "read older data than is there now",
            "missing": f"not in the workspace: {', '.join(gone)}",
        }
        rows.append({"name": name, "state": state, "note": says.get(state, ""), "bytes": _bytes(outputs)})
        rows[-1] |= _execution(runs.get(name))
    for name in sorted(failed.keys() - facts.graph.receipts.keys()):
        rows.append({"name": name, "state": "failed", "note": failed[name], "bytes": 0, **_execution(None)})
    try:
        absent = sorted(read_lock(root).keys() - facts.graph.receipts.keys())
    except SpringheadError as error:
        absent = []
        facts.notes.append(f"dvc.lock cannot be read: {error}.")
    if absent:
        facts.notes.append(f"{len(absent)} stages of dvc.lock have no receipt here ({', '.join(absent[:3])}).")
    return rows


def _bytes(outputs: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(int(entry["bytes"]) for entry in outputs.values())


def _execution(body: Mapping[str, Any] | None) -> dict[str, Any]:
    if body is None:
        return {"seconds": None, "started": "", "revision": "", "attempt": 0, "dirty": False}
    git = body.get("git", {})
    return {
        "seconds": body.get("seconds"),
        "started": str(body.get("started", ""))[:16].replace("T", " "),
        "revision": str(git.get("revision", ""))[:10],
        "dirty": git.get("dirty", False),  # None: git failed
        "attempt": body.get("attempt", 1),
    }


def _failures(ledger: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the newest entry of each stage whose newest entry is a failure."""
    last: dict[str, dict[str, Any]] = {}
    for entry in ledger:
        if entry["kind"] == "failure":
            last[entry["body"]["stage"]] = entry["body"]
        elif entry["kind"] == "execution":
            last.pop(entry["body"]["stage"], None)
    return last


# -- champions and results ------------------------------------------------------------------------


def _champions(facts: Facts) -> list[dict[str, Any]]:
    models = {model.sha256: model for model in facts.graph.models}
    found = []
    for body in champions_of(facts.ledger):
        model = models.get(body["digest"])
        figures = {k: v for k, v in (body.get("figures") or {}).items() if isinstance(v, int | float)}
        found.append(
            {
                "name": body["model"],
                "version": body["version"],
                "digest": body["digest"],
                "time": str(body["time"])[:16].replace("T", " "),
                "entry": body["entry"],
                "signed": bool(body.get("signature")),
                "kind": model.kind if model else "",
                "facts": dict(model.facts) if model else {},
                "path": model.path if model else "",
                "figures": figures,
                "bindings": {k: v for k, v in body.items() if k.endswith("_digest") and isinstance(v, str)},
            }
        )
    return sorted(found, key=lambda champion: (champion["kind"] != "policy", champion["name"]))


def _result(root: Path, facts: Facts, stage: str) -> list[dict[str, Any]]:
    """Returns the leaderboard and plots of an evaluation."""
    if role_of(stage) not in ("evaluate", "attack"):
        return []
    found: dict[str, Any] = {
        "stage": stage,
        "branch": branch_of(stage),
        "title": " ".join(filter(None, (item_of(stage) or stage, step_of(stage).rpartition("_")[0]))),
        "tables": [],
        "plots": [],
    }
    for out, entry in facts.graph.receipts[stage]["outputs"].items():
        for name in entry.get("files", {}):
            path = root / out / name
            if not path.is_file():
                continue
            if path.name == "summary.json" and (table := by_method(path, facts.notes)):
                found["tables"].insert(0, {"title": "by method, over seeds", "open": True, **table})
            if path.name == "leaderboard.csv" and (table := leaderboard(path, facts.notes)):
                found["tables"].append({"title": "every line of the leaderboard", "open": False, **table})
            if path.suffix in (".png", ".svg"):
                found["plots"].append(path)
    if found["tables"]:  # the first one is what a reader came for
        found["tables"][0]["open"] = True
    return [found]


_SHOWN = ("worst_case", "accuracy", "consistency", "all_right", "mixed", "all_wrong", "order_drop")


def by_method(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Reads means and spreads over seeds by split and method from a summary that has them.

    Returns:
        A table as :func:`leaderboard` returns it, or None for a summary of another kind.
    """
    try:
        splits = read_json(path).get("splits") or {}
        lines = [
            {"method": method, "split": split, **_flat(cell)}
            for split, cells in splits.items()
            for method, cell in cells.items()
        ]
    except (SpringheadError, AttributeError, TypeError, KeyError) as error:
        notes.append(f"{path.name} of {path.parent.name} cannot be read ({error}).")
        return None
    return _table(lines) if lines else None


def _flat(cell: Mapping[str, Any]) -> dict[str, str]:
    """Returns ``{figure: mean, figure_std: deviation}`` of the figures that are shown."""
    known = {name: cell[name] for name in _SHOWN if isinstance(cell.get(name), dict)}
    values = {name: str(stats["mean"]) for name, stats in known.items()}
    if any("seeds" in stats for stats in known.values()):
        values = {"seeds": str(max(stats.get("seeds", 0) for stats in known.values())), **values}
    return values | {f"{name}_std": str(stats["std"]) for name, stats in known.items() if "std" in stats}


def leaderboard(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Reads a leaderboard; a column and the one with its spread over seeds become one.

    Returns:
        ``{"columns": [(key, title)], "rows": [{key: (text, mark)}]}``; ``mark`` is ``good`` or
        ``bad`` for a normalised cost within or above its limit, which is 1.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        notes.append(f"{path.name} of {path.parent.name} cannot be read ({error}).")
        return None
    if not lines:
        return None
    return _table(lines)


def _table(lines: list[dict[str, str]]) -> dict[str, Any]:
    keys = [key for key in lines[0] if key and not _is_spread(key, lines[0])]
    rows = [{key: (_cell(line, key), _mark(line, key)) for key in keys} for line in lines]
    return {"columns": [(key, _title(key)) for key in keys], "rows": rows, "best": _best(lines, keys)}


_SPREADS = ("_std", "_spread")  # endings of the columns that hold a standard deviation over seeds


def _spread_of(key: str, line: Mapping[str, str]) -> str | None:
    """Returns the column with the spread of a column, if there is one."""
    base = key.removesuffix("_mean")
    return next((base + ending for ending in _SPREADS if base + ending in line), None)


def _is_spread(key: str, line: Mapping[str, str]) -> bool:
    endings = (*_SPREADS, "_low", "_high")
    base = next((key.removesuffix(ending) for ending in endings if key.endswith(ending)), None)
    return base is not None and (base in line or base + "_mean" in line)


def _title(key: str) -> str:
    return key.removesuffix("_mean").replace("_", " ")


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def number(value: float) -> str:
    """Returns a figure with three digits that matter, and no more."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _cell(line: Mapping[str, str], key: str) -> str:
    value = _float(line.get(key))
    if value is None:
        return {"True": "yes", "False": "no"}.get(line.get(key) or "", line.get(key) or "–")
    if key == "seed" and value < 0:  # of a model that was not trained here
        return "–"
    alone = 1.0 in (_float(line.get("seeds")), _float(line.get("models")))  # one model has no spread
    spread = None if alone else _float(line.get(_spread_of(key, line) or ""))
    if spread is None:
        low, high = _float(line.get(f"{key}_low")), _float(line.get(f"{key}_high"))
        return f"{value:.3f} [{low:.3f}, {high:.3f}]" if low is not None and high is not None else number(value)
    return f"{value:.3f} ± {spread:.3f}" if abs(value) < 10 else f"{value:.1f} ± {spread:.1f}"


def _mark(line: Mapping[str, str], key: str) -> str:
    value = _float(line.get(key))
    name = key.lower()
    if value is None or "cost" not in name or not name.startswith(("normalised", "normalized")):
        return ""
    return "good" if value <= 1.0 else "bad"


def _best(lines: list[dict[str, str]], keys: list[str]) -> dict[str, list[int]]:
    """Returns the best rows of each accuracy column within each split."""
    best: dict[str, list[int]] = {}
    for key in keys:
        if not any(word in key for word in ("accuracy", "worst", "consisten", "all_right", "exact")):
            continue
        for split in {line.get("split", "") for line in lines}:
            values = {i: v for i, x in enumerate(lines) if x.get("split", "") == split and (v := _float(x.get(key)))}
            top = max(values.values(), default=None)
            best.setdefault(key, []).extend(i for i, v in values.items() if v == top)
    return best
