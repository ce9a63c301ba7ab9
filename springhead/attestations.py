"""What is stated and signed about a promoted model, and whether the statements still hold.

Two in-toto statements: how the model was made (SLSA provenance v1) and what a promotion decided about it
(SLSA verification summary v1). :mod:`springhead.signing` signs them.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from springhead import __version__, signing
from springhead.errors import Finding
from springhead.evidence import Candidate
from springhead.jsonio import read_json
from springhead.keys import Keys
from springhead.lineage.digests import file_digest, files_digest
from springhead.lineage.receipts import receipt_path

EVIDENCE = ("provenance", "receipt", "data", "verdict", "evaluation")
"""What a promotion rests on, beside the model and the rules, each named by digest in its summary."""
_ENTRY = (
    "action", "model", "version", "digest", "data_digest", "verdict_digest", "evaluation_digest", "gates_digest",
    "receipt", "provenance", "summary", "figures", "stored",
)  # fmt: skip


def provenance(root: Path, chosen: Candidate, execution: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns how a model was made: the predicate of SLSA provenance v1, from receipt and ledger.

    It claims build level 1: how the model was made is stated and signed, not that the machine that
    made it was isolated.

    Args:
        root: the repository root.
        chosen: the model.
        execution: the ledger's facts about the execution that made it, if it knows one.
    """
    path = receipt_path(root, chosen.stage)
    receipt = read_json(path)
    sources = {name: facts["sha256"] for name, facts in receipt["dependencies"].items()} | receipt["code"]["files"]
    materials: list[dict[str, Any]] = [
        {"name": name, "digest": {"sha256": digest}} for name, digest in sorted(sources.items())
    ]
    details: dict[str, Any] = {"builder": {"id": "urn:springhead:harness:1"}}
    if execution is not None:
        revision = str(execution.get("git", {}).get("revision", ""))
        if revision:
            materials.insert(0, {"name": "repository", "digest": {"gitCommit": revision}})
        metadata = {"invocationId": execution.get("execution"), "startedOn": execution.get("started")}
        details["metadata"] = {key: value for key, value in metadata.items() if value}
    details["byproducts"] = [{"name": path.relative_to(root).as_posix(), "digest": {"sha256": file_digest(path)}}]
    return {
        "buildDefinition": {
            "buildType": "urn:springhead:stage:1",
            "externalParameters": {"stage": chosen.stage, "command": receipt["command"], "params": receipt["params"]},
            "internalParameters": {"seed": receipt["seed"], "environment": receipt["environment"]},
            "resolvedDependencies": materials,
        },
        "runDetails": details,
    }


def summary(name: str, version: str, facts: Mapping[str, str], figures: Mapping[str, float]) -> dict[str, Any]:
    """Returns what a promotion decided: the predicate of a SLSA verification summary v1.

    Args:
        name: name of the registered model.
        version: its version.
        facts: the digests the decision rests on: ``gates``, ``provenance``, ``verdict``, ``evaluation``,
            ``data``, ``receipt``, ``model``, ``stored`` (every file in MLflow's store), and ``action`` and
            ``time``.
        figures: the figures it was judged by.
    """
    attestations = [{"uri": f"urn:springhead:{key}", "digest": {"sha256": facts[key]}} for key in EVIDENCE]
    return {
        "verifier": {"id": "urn:springhead:promotion:1", "version": {"springhead": __version__}},
        "timeVerified": facts["time"],
        "resourceUri": f"models:/{name}/{version}",
        "policy": {"uri": "mlflow/gates.yaml", "digest": {"sha256": facts["gates"]}},
        "inputAttestations": attestations,
        "verificationResult": "PASSED",
        "verifiedLevels": ["SLSA_BUILD_LEVEL_1"],
        "springhead": {
            "action": facts["action"],
            "model": facts["model"],
            "stored": facts["stored"],
            "figures": dict(figures),
        },
    }


def facts(body: dict[str, Any]) -> dict[str, str]:
    """Returns what the summary of a promotion states, from the body of its ledger entry."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": body.get("promoted_as", body["action"]),
        "model": body["digest"],
        "gates": body["gates_digest"],
        "provenance": body["provenance"],
        "receipt": body["receipt"],
        "stored": files_digest(body["stored"]),
        "data": str(body["data_digest"]),
        "verdict": body["verdict_digest"],
        "evaluation": body["evaluation_digest"],
    }


def problems(home: Path, keys: Keys, body: dict[str, Any]) -> list[str]:
    """Returns what is wrong with the signed statements behind a promotion.

    The provenance must be about the promoted model; the summary must name the very version, rules,
    verdict, evaluation, data and receipt that the ledger entry names, so that none can be exchanged.

    Args:
        home: the state folder.
        keys: the keys to trust.
        body: the body of the promotion's ledger entry.
    """
    lacking = [key for key in _ENTRY if key not in body]
    if lacking:
        return [f"it lacks {', '.join(lacking)}: it was not written by a promotion"]
    found: list[str] = []
    opened: dict[str, Any] = {}
    for key, kind in (("provenance", signing.PROVENANCE), ("summary", signing.SUMMARY)):
        path = signing.by_digest(home, body["digest"], str(body.get(key)))
        if path is None:
            where = signing.signature_path(Path(home.name), body["digest"], str(body[key]))
            found.append(f"its signed {key} is missing or was changed ({where})")
            continue
        try:
            statement = signing.opened(path, signing.STATEMENT_TYPE, keys)
            if statement["predicateType"] != kind or signing.subject_digest(statement) != body["digest"]:
                found.append(f"its signed {key} is about something else")
            opened[key] = statement["predicate"]
        except (Finding, KeyError, TypeError) as error:
            found.append(f"its signed {key} cannot be believed ({error})")
    if "summary" in opened:
        found += _unlike_entry(opened["summary"], body)
    return found


def _unlike_entry(signed: dict[str, Any], body: dict[str, Any]) -> list[str]:
    """Returns where a signed summary and a ledger entry state different things."""
    wanted = summary(body["model"], str(body["version"]), facts(body), body["figures"])
    keys = ("resourceUri", "policy", "inputAttestations", "verificationResult", "springhead")
    other = [key for key in keys if signed.get(key) != wanted[key]]
    return [f"its signed summary states another {key} than the ledger" for key in other]
