"""Where a checkout stands: each stage's state, the last promotions, what waits for MLflow."""

from pathlib import Path
from typing import Any

from springhead import spool
from springhead.declared import read_stages
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.lineage.promotions import standing
from springhead.lineage.receipts import read_receipts
from springhead.lineage.why import changes


def champions_of(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns by which entry each registered model has its champion, by name; the ledger alone decides."""
    found = standing(ledger)
    return [found[name] for name in sorted(found)]


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
    declared, runs = read_stages(root, home / "declared"), last_runs(ledger)
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
