"""Where a checkout stands: each stage's state, the last promotions, what waits for MLflow."""

from pathlib import Path
from typing import Any

from springhead import spool
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import read_receipts
from springhead.lineage.why import changes, declared_stages


def champions_of(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the newest promotion of each registered model, by name; the ledger alone decides."""
    newest = {e["body"]["model"]: {**e["body"], "time": e["time"], "entry": e["seq"]} for e in promotions(ledger)}
    return [newest[name] for name in sorted(newest)]


def promotions(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the promotion entries, oldest first."""
    return [entry for entry in ledger if entry["kind"] == "promotion"]


def last_runs(ledger: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the newest execution of each stage."""
    return {entry["body"]["stage"]: entry["body"] for entry in ledger if entry["kind"] == "execution"}


def status(root: Path, home: Path) -> dict[str, Any]:
    """Collects the state of a checkout.

    Args:
        root: the repository root.
        home: its state folder.

    Raises:
        BadInput: if ``dvc.yaml``, a receipt or the ledger cannot be read.
    """
    receipts, ledger = read_receipts(root), Ledger(home).entries()
    declared, runs = declared_stages(root), last_runs(ledger)
    digests: dict[str, str | None] = {}
    rows = []
    order = Graph(receipts).depth
    for name in sorted(declared, key=lambda n: (n.partition("-")[0], order.get(n, len(order)), n)):
        found = [c for c in changes(root, declared[name], receipts.get(name), digests) if c.runs]
        state = "up to date" if not found else "not run" if name not in receipts else "changed"
        reason = f"{found[0].name}: {found[0].what}" if found else ""
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        ran = runs.get(name, {}).get("started", "")[:19]
        rows.append({"stage": name, "state": state, "why": reason + more, "ran": ran})
    return {
        "stages": rows,
        "champions": champions_of(ledger),
        "ledger": len(ledger),
        "waiting": len(spool.waiting(home)),
    }
