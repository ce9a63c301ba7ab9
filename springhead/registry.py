"""Promotion: from a model that passes every gate to the alias ``champion`` in MLflow's registry.

MLflow holds the versions and the alias ``champion``; it is storage that anyone may write to, so
nothing is believed because MLflow says it. A version names its model by digest, what was uploaded
is downloaded again and digested before the alias moves, and the ledger entry is written before the
alias: an alias without an entry was set by hand, and ``springhead audit`` says so.
"""

import contextlib
import fcntl
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from springhead import gates, packaging, signing, tracking
from springhead.errors import Finding
from springhead.evidence import Candidate, Evidence, read_evidence
from springhead.gates import Judgement
from springhead.lineage.digests import file_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path
from springhead.versions import (
    AT,
    CHAMPION,
    DIGEST,
    PREVIOUS,
    WITHIN,
    Registered,
    aliases_of,
    champions,
    content,
    download,
    resolve,
    versions_of,
)

__all__ = ["PromotionResult", "Registered", "champions", "download", "promotable", "promote", "resolve", "versions_of"]


@dataclass(frozen=True)
class PromotionResult:
    """What a promotion did; its text is one line for people.

    Attributes:
        model: name of the registered model.
        version: its champion's version now; None after a dry run that would make one.
        digest: digest of the champion's folder.
        label: method and seed of the champion.
        changed: whether the registry was changed.
        message: what happened.
        judgement: the outcome of every gate for every candidate.
        entry: the ledger entry behind the champion; empty after a dry run that would make one.
    """

    model: str
    version: str | None
    digest: str
    label: str
    changed: bool
    message: str
    judgement: Judgement
    entry: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.message} ({self.label}, {self.digest[:12]})"


# -- promotion ------------------------------------------------------------------------------------


def promote(name: str, root: Path, home: Path, dry_run: bool = False) -> PromotionResult:
    """Makes the best model that passes every gate the champion; does nothing if it already is.

    Args:
        name: name of the registered model, for example ``policy-BallCircle``.
        root: the repository root with data, receipts and ``mlflow/gates.yaml``.
        home: the state folder with ledger, keys and, without a server, MLflow's store.
        dry_run: only judge.

    Raises:
        Finding: if no candidate passes; the message has one line per closed gate and candidate.
        BadInput: if the name has no gates, the evaluation is missing, or MLflow cannot be reached.
    """
    rules, item = gates.rules_for(gates.read_rules(root), name)
    evidence = read_evidence(root, home, name, rules.sources(item))
    judgement = gates.judge(name, rules, evidence)
    chosen = judgement.chosen
    if chosen is None:
        raise Finding(f"{name} is not promoted, no candidate passes every gate:\n{judgement.report()}")
    if dry_run:
        standing = evidence.champion is not None and evidence.champion.digest == chosen.digest
        what = "is and would stay the champion" if standing else "would become the champion"
        version = evidence.champion.version if standing and evidence.champion else None
        return PromotionResult(name, version, chosen.digest, chosen.label, False, what, judgement)
    with _only_one(home):
        return _Promotion(name, root, home, evidence, judgement, chosen).run()


def promotable(root: Path) -> list[str]:
    """Returns the names that ``mlflow/gates.yaml`` has gates and this checkout an evaluation for.

    Raises:
        BadInput: if ``mlflow/gates.yaml`` is missing or wrong.
    """
    found = []
    for rules in gates.read_rules(root).values():
        before, after = rules.evaluation.split("{item}")
        for path in sorted(root.glob(rules.evaluation.replace("{item}", "*"))):
            item = path.relative_to(root).as_posix()[len(before) : -len(after)]
            if rules.items is None or item in rules.items:
                found.append(rules.name.replace("{item}", item))
    return found


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    with (home / "promote.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Promotion:
    """One promotion of one chosen candidate."""

    def __init__(
        self, name: str, root: Path, home: Path, evidence: Evidence, judgement: Judgement, chosen: Candidate
    ) -> None:
        self.name, self.root, self.home = name, root, home
        self.evidence, self.judgement, self.chosen = evidence, judgement, chosen
        self.folder = root / chosen.path
        self.ledger = Ledger(home)
        # What the stages recorded goes first, so that the version can point at the run that made it.
        tracking.replay(home)
        self.client = tracking.connect(home)

    def run(self) -> PromotionResult:
        """Brings registry, ledger and alias to where the chosen candidate is the champion."""
        entry = self._standing()
        if entry is not None:
            return self._keep(entry)
        signature = signing.sign(self.folder, self.home, packaging.provenance(self.root, self.chosen))
        signing.verify(self.folder, self.home, self.chosen.digest)
        version = self._version()
        previous = _last_promotion(self.ledger, self.name)
        entry = self.ledger.append("promotion", self._body(version, signature, previous))
        if previous is not None and content(self.client, self.name, str(previous["version"])) is not None:
            self.client.set_registered_model_alias(self.name, PREVIOUS, str(previous["version"]))
        self.client.set_registered_model_alias(self.name, CHAMPION, version)
        after = f" after version {previous['version']}" if previous is not None else ""
        return self._result(version, True, f"version {version} is the champion{after}", entry)

    def _result(self, version: str, changed: bool, message: str, entry: dict[str, Any]) -> PromotionResult:
        chosen = self.chosen
        return PromotionResult(self.name, version, chosen.digest, chosen.label, changed, message, self.judgement, entry)

    def _standing(self) -> dict[str, Any] | None:
        """Returns the ledger entry that already promotes the chosen model, if its version is still there."""
        promotions = [e for e in self.ledger.entries() if e["kind"] == "promotion" and e["body"]["model"] == self.name]
        if not promotions or promotions[-1]["body"]["digest"] != self.chosen.digest:
            return None
        entry: dict[str, Any] = promotions[-1]
        held = content(self.client, self.name, str(entry["body"]["version"]))
        return entry if held == self.chosen.digest else None

    def _keep(self, entry: dict[str, Any]) -> PromotionResult:
        """Leaves the champion where it is, or puts back an alias that was moved or never set."""
        version = str(entry["body"]["version"])
        aliases = aliases_of(self.client, self.name)
        if not signing.signature_path(self.home, self.chosen.digest).is_file():
            signing.sign(self.folder, self.home, packaging.provenance(self.root, self.chosen))
        signing.verify(self.folder, self.home, self.chosen.digest)
        if aliases.get(CHAMPION) == version:
            return self._result(version, False, f"version {version} is already the champion", entry)
        was = f"it was on version {aliases[CHAMPION]}" if CHAMPION in aliases else "it was missing"
        self.client.set_registered_model_alias(self.name, CHAMPION, version)
        return self._result(version, True, f"the alias is back on version {version}, {was}", entry)

    def _tags(self) -> dict[str, str]:
        """Returns what ties a version to everything else, by digest."""
        receipt = receipt_path(self.root, self.chosen.stage)
        tags = {
            DIGEST: self.chosen.digest,
            AT: self.chosen.path,
            WITHIN: packaging.within(self.folder),
            "data.sha256": str(self.chosen.data_digest),
            "verdict.sha256": self.evidence.verdict_digest,
            "evaluation.sha256": self.evidence.evaluation_digest,
            "gates.sha256": file_digest(self.root / gates.RULES),
            "gate.verdict": "passed",
            "receipt": file_digest(receipt),
            "dvc.stage": self.chosen.stage,
        }
        execution = _execution(self.ledger, tags["receipt"])
        if execution is not None:
            tags["git.revision"] = str(execution["git"].get("revision", ""))
            tags[tracking.EXECUTION] = str(execution["execution"])
        return tags

    def _body(self, version: str, signature: Path, previous: dict[str, Any] | None) -> dict[str, Any]:
        chosen, evidence = self.chosen, self.evidence
        return {
            "model": self.name,
            "version": version,
            "digest": chosen.digest,
            "path": chosen.path,
            "stage": chosen.stage,
            "label": chosen.label,
            "data_digest": chosen.data_digest,
            "verdict_digest": evidence.verdict_digest,
            "evaluation_digest": evidence.evaluation_digest,
            "gates_digest": file_digest(self.root / gates.RULES),
            "receipt": file_digest(receipt_path(self.root, chosen.stage)),
            "signature": file_digest(signature),
            "figures": dict(chosen.figures),
            "store": _without_password(tracking.uri(self.home)),
            "previous": {key: previous[key] for key in ("version", "digest")} if previous is not None else None,
        }

    def _version(self) -> str:
        """Makes a version that holds the chosen model, or finds the one an interrupted promotion made."""
        from mlflow.exceptions import MlflowException

        tags = self._tags()
        try:
            self.client.create_registered_model(self.name, {"springhead": "promoted models only"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        same = ("verdict.sha256", "evaluation.sha256", "gates.sha256", "receipt", DIGEST)
        used = {str(e["body"]["version"]) for e in self.ledger.entries() if e["kind"] == "promotion"}
        for found in self.client.search_model_versions(f"name = '{self.name}'"):
            version = str(found.version)
            alike = version not in used and all(found.tags.get(key) == tags[key] for key in same)
            if alike and content(self.client, self.name, version) == self.chosen.digest:
                return version
        version = self._register(tags)
        if content(self.client, self.name, version) != self.chosen.digest:
            raise Finding(
                f"{self.name}: MLflow at {_without_password(tracking.uri(self.home))} does not give back what was "
                f"uploaded as version {version}; the alias was not moved. Check its artifact store"
            )
        return version

    def _register(self, tags: dict[str, str]) -> str:
        """Uploads the model in the form that its users load, and registers it."""
        client, place = self.client, tracking.experiment(self.client, self.home, self.chosen.stage.partition("-")[0])
        run = self._run(place)
        logged = client.create_logged_model(place, self.name, run, tags, model_type=packaging.kind(self.folder))
        with tempfile.TemporaryDirectory() as temporary:
            prepared = packaging.prepare(self.folder, Path(temporary) / "model", self.evidence.cost_limit)
            client.log_model_artifacts(logged.model_id, str(prepared))
        client.finalize_logged_model(logged.model_id, "READY")
        tags = {**tags, "ledger.head": self.ledger.head()}
        made = client.create_model_version(
            self.name,
            f"models:/{logged.model_id}",
            run,
            tags,
            description=self._description(),
            model_id=logged.model_id,
        )
        return str(made.version)

    def _run(self, place: str) -> str | None:
        """Returns the run of the execution that made the chosen model, if MLflow has it."""
        query = f"tags.`{DIGEST}` = '{self.chosen.digest}' AND tags.`springhead.stage` = '{self.chosen.stage}'"
        found = self.client.search_logged_models([place], query, max_results=1)
        return str(found[0].source_run_id) if found and found[0].source_run_id else None

    def _description(self) -> str:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in sorted(self.chosen.figures.items()))
        at = f" at the cost limit {self.evidence.cost_limit:g}" if self.evidence.cost_limit is not None else ""
        return f"{self.chosen.label}, made by {self.chosen.stage}. Evaluated{at}: {figures}."


def _last_promotion(ledger: Ledger, name: str) -> dict[str, Any] | None:
    bodies = [e["body"] for e in ledger.entries() if e["kind"] == "promotion" and e["body"]["model"] == name]
    return bodies[-1] if bodies else None


def _execution(ledger: Ledger, receipt: str) -> dict[str, Any] | None:
    """Returns the first execution that wrote this very receipt."""
    bodies = (e["body"] for e in ledger.entries() if e["kind"] == "execution")
    return next((body for body in bodies if body["receipt"] == receipt), None)


def _without_password(store: str) -> str:
    return re.sub(r"//[^/@]*@", "//", store)
