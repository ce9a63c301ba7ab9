"""Who stands where in the registry, as the ledger alone has it."""

from collections.abc import Iterable
from typing import Any

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ROLLBACK = "rollback"


def promotions(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the promotion entries, oldest first: champions, challengers and rollbacks."""
    return [entry for entry in entries if entry["kind"] == "promotion"]


def is_champion(body: dict[str, Any]) -> bool:
    """Tells whether a promotion or a rollback set the alias ``champion``."""
    return body.get("action") != CHALLENGER


def standing(entries: Iterable[dict[str, Any]], alias: str = CHAMPION) -> dict[str, dict[str, Any]]:
    """Returns the body of the entry by which each registered model's alias stands, by name.

    Args:
        entries: the entries of the ledger.
        alias: ``champion``, ``challenger`` or ``previous``.
    """
    champion: dict[str, dict[str, Any]] = {}
    before: dict[str, dict[str, Any]] = {}
    challenger: dict[str, dict[str, Any]] = {}
    for entry in promotions(entries):
        body = entry["body"] | {"entry": entry["seq"], "time": entry["time"]}
        name = body["model"]
        if not is_champion(body):
            challenger[name] = body
            continue
        if name in champion and champion[name]["version"] != body["version"]:
            before[name] = champion[name]
        champion[name] = body
        if name in challenger and challenger[name]["digest"] == body["digest"]:
            del challenger[name]  # it won
    return {CHAMPION: champion, CHALLENGER: challenger, PREVIOUS: before}[alias]


def withdrawn(entries: Iterable[dict[str, Any]], name: str) -> frozenset[str]:
    """Returns the digests of models from which somebody rolled back, and that were not promoted since."""
    found: set[str] = set()
    for entry in promotions(entries):
        body = entry["body"]
        if body["model"] != name:
            continue
        if body.get("action") == ROLLBACK and body.get("previous"):
            found.add(str(body["previous"]["digest"]))
        if is_champion(body):
            found.discard(str(body["digest"]))
    return frozenset(found)
