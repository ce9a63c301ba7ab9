"""Compares the profiles of accepted data sets, which git tracks, with what the ledger says was accepted.

New data are judged by their distance from such a profile, so one that says other things of its data than what was
accepted was edited, and is red. One that this ledger does not know came with git, and is a warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from springhead.declared import ACCEPTED
from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import file_digest
from springhead.lineage.workspace import RED, WARNING, Workspace


def acceptances(entries: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Returns the bodies of the entries that accepted what is at a path of the checkout, oldest first."""
    return [e["body"] for e in entries if e["kind"] == "acceptance" and e["body"]["path"] == path]


def check(ws: Workspace) -> None:
    """Compares every profile; that a stage has read another one is said where files under git are compared."""
    if ws.broken_chain:  # the check of the ledger names the line
        return
    entries = ws.ledger.entries()
    for path in sorted((ws.root / ACCEPTED).rglob("*.json")):
        ws.count("accepted")
        _check_profile(ws, path, acceptances(entries, path.relative_to(ws.root).as_posix()))


def _check_profile(ws: Workspace, path: Path, accepted: list[dict[str, Any]]) -> None:
    where, digest = path.relative_to(ws.root).as_posix(), file_digest(path)
    if any(body["profile"] == digest for body in accepted):
        return
    try:
        data = read_json(path)["data_digest"]
    except (BadInput, KeyError, TypeError):
        what = "is no readable profile"
        ws.report(RED, "accepted", what, where, f"`git checkout {where}`, or remove it")
        return
    if any(body["data"] == data for body in accepted):
        what = f"was edited: it is about data {data[:16]}…, but not what the ledger accepted of them"
        stage = accepted[-1]["stage"]
        do = f"`git checkout {where}`; `springhead accept {stage}` if `git log` explains it"
        ws.report(RED, "accepted", what, where, do)
        return
    what = "was not accepted by an entry of this ledger"
    do = "expected after `git pull`; `git log` says who accepted it, `springhead accept` enters it here"
    ws.report(WARNING, "accepted", what, where, do)
