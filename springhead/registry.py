"""Promotion: from a model that passes every gate to the alias ``champion`` in MLflow's registry.

MLflow holds the versions and the aliases ``champion``, ``challenger`` and ``previous``; it is storage
that anyone may write to, so nothing is believed because MLflow says it. A version names its model by
digest, what was uploaded is read back and digested before the alias moves, and the ledger entry, under a
signed head, is written before the alias: an alias without an entry was set by hand, and ``springhead
audit`` says so.
"""

import contextlib
import fcntl
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead import attestations, gates, packaging, signing, tracking, versions
from springhead.errors import BadInput, Finding
from springhead.evidence import Candidate, Evidence, read_evidence
from springhead.gates import Judgement
from springhead.keys import Keys
from springhead.lineage.audit import Audit, audit
from springhead.lineage.digests import file_digest, tree_files
from springhead.lineage.head import check_head
from springhead.lineage.ledger import Ledger
from springhead.lineage.promotions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ROLLBACK,
    is_champion,
    promotions,
    standing,
    withdrawn,
)
from springhead.lineage.receipts import receipt_path
from springhead.versions import (
    AT,
    DIGEST,
    WITHIN,
    Registered,
    aliases_of,
    champions,
    content,
    download,
    everything,
    resolve,
    versions_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "PromotionResult",
    "Registered",
    "champions",
    "download",
    "everything",
    "promotable",
    "promote",
    "resolve",
    "rollback",
    "versions_of",
]


@dataclass(frozen=True)
class PromotionResult:
    """What a promotion did; its text is one line for people.

    Attributes:
        model: name of the registered model.
        version: the version the alias is on now; None after a dry run that would make one.
        digest: digest of the model's folder.
        label: method and seed of the model.
        changed: whether the registry was changed.
        message: what happened.
        judgement: the outcome of every gate for every candidate; None for a rollback.
        entry: the ledger entry behind the alias; empty after a dry run that would make one.
    """

    model: str
    version: str | None
    digest: str
    label: str
    changed: bool
    message: str
    judgement: Judgement | None
    entry: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.message} ({self.label}, {self.digest[:12]})"

    def as_json(self) -> dict[str, Any]:
        """Returns the result as JSON values, every gate of every candidate with it."""
        plain = {
            key: getattr(self, key) for key in ("model", "version", "digest", "label", "changed", "message", "entry")
        }
        return plain | {"candidates": self.judgement.as_json() if self.judgement is not None else []}


# -- promotion ------------------------------------------------------------------------------------


def promote(
    name: str,
    root: Path,
    home: Path,
    dry_run: bool = False,
    challenger: bool = False,
    model: str | None = None,
    audited: Audit | None = None,
) -> PromotionResult:
    """Makes the best model that passes every gate the champion; does nothing if it already is.

    Args:
        name: name of the registered model, for example ``policy-BallCircle``.
        root: the repository root with data, receipts and ``mlflow/gates.yaml``.
        home: the state folder with ledger and, without a server, MLflow's store.
        dry_run: only judge, at this moment: other promotions are not kept waiting.
        challenger: set the alias ``challenger`` instead, on the best model that is not the champion
            and passes every gate but the comparison with the champion.
        model: consider only the candidate whose digest begins like this, with 8 hexadecimal digits or more.
        audited: an audit of this checkout as it is now, where one was just made.

    Raises:
        Finding: if no candidate passes; the message has one line per closed gate and candidate.
        BadInput: if the name has no gates, the evaluation is missing, the digest is not of one candidate, or
            MLflow cannot be reached.
    """
    alias = CHALLENGER if challenger else CHAMPION
    # What is judged includes who is champion, so nobody else may promote between the judgement and the alias.
    with contextlib.nullcontext() if dry_run else _only_one(home):
        rules, item = gates.rules_for(gates.read_rules(root), name)
        evidence = read_evidence(root, home, name, rules.sources(item), audited)
        judgement = gates.judge(name, rules, evidence, model, challenger)
        chosen = judgement.chosen
        if chosen is None:
            raise Finding(f"{name} has no {alias} to promote, no candidate passes every gate:\n{judgement.report()}")
        if not dry_run:
            return _Promotion(name, root, home, evidence, judgement, chosen, alias).run()
    stands = standing(Ledger(home).entries(), alias).get(name)
    same = stands is not None and stands["digest"] == chosen.digest
    what = f"is and would stay the {alias}" if same else f"would become the {alias}"
    version = str(stands["version"]) if stands is not None and same else None
    return PromotionResult(name, version, chosen.digest, chosen.label, False, what, judgement)


def examine(root: Path) -> Audit:
    """Audits what promotions rest on, once for several of them."""
    return audit(root, registry=False)


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
    home.mkdir(parents=True, exist_ok=True)
    with (home / "promote.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _append(ledger: Ledger, body: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Enters a promotion, and stops before any alias moves if the ledger could not be signed."""
    entry = ledger.append("promotion", body, keys)
    state = check_head(ledger, keys)
    if state.problem or state.unsigned:
        raise Finding(f"{ledger.path}: {state.problem or 'its head could not be signed'}; the alias was not moved")
    return entry


class _Promotion:
    """One promotion of one chosen candidate."""

    def __init__(
        self,
        name: str,
        root: Path,
        home: Path,
        evidence: Evidence,
        judgement: Judgement,
        chosen: Candidate,
        alias: str,
    ) -> None:
        self.name, self.root, self.home, self.alias = name, root, home, alias
        self.evidence, self.judgement, self.chosen = evidence, judgement, chosen
        self.folder = root / chosen.path
        self.ledger, self.keys = Ledger(home), Keys.of(root, home)
        # What the stages recorded goes first, so that the version can point at the run that made it.
        tracking.replay(home)
        self.client = tracking.connect(home)

    def run(self) -> PromotionResult:
        """Brings registry, ledger and alias to where the chosen candidate stands under its alias."""
        before = standing(self.ledger.entries(), self.alias).get(self.name)
        if before is not None and self._stands(before):
            return self._keep(before)
        execution = _execution(self.ledger, file_digest(receipt_path(self.root, self.chosen.stage)))
        predicate = attestations.provenance(self.root, self.chosen, execution)
        provenance = signing.sign(self.folder, self.home, self.keys, signing.PROVENANCE, predicate)
        signing.verify(self.folder, self.home, self.keys, self.chosen.digest)
        version = self._version()
        entry = _append(self.ledger, self._body(version, provenance, before), self.keys)
        self.client.set_model_version_tag(self.name, version, "gate.verdict", "passed")
        self._move(version, before)
        after = f" after version {before['version']}" if before is not None else ""
        return self._result(version, True, f"version {version} is the {self.alias}{after}", entry)

    def _move(self, version: str, before: dict[str, Any] | None) -> None:
        if self.alias == CHAMPION:
            if before is not None and content(self.client, self.name, str(before["version"])) is not None:
                self.client.set_registered_model_alias(self.name, PREVIOUS, str(before["version"]))
            held = aliases_of(self.client, self.name).get(CHALLENGER)
            if held is not None and self.name not in standing(self.ledger.entries(), CHALLENGER):
                self.client.delete_registered_model_alias(self.name, CHALLENGER)
        self.client.set_registered_model_alias(self.name, self.alias, version)

    def _result(self, version: str, changed: bool, message: str, entry: dict[str, Any]) -> PromotionResult:
        chosen = self.chosen
        return PromotionResult(self.name, version, chosen.digest, chosen.label, changed, message, self.judgement, entry)

    def _stands(self, body: dict[str, Any]) -> bool:
        """Tells whether a promotion is of the chosen model and everything it left is still whole."""
        if body["digest"] != self.chosen.digest:
            return False
        if versions.stored_files(self.client, self.name, str(body["version"])) != body.get("stored"):
            return False
        return not attestations.problems(self.home, self.keys, body)

    def _keep(self, body: dict[str, Any]) -> PromotionResult:
        """Leaves the alias where it is, or puts back one that was moved or never set."""
        version = str(body["version"])
        aliases = aliases_of(self.client, self.name)
        if aliases.get(self.alias) == version:
            return self._result(version, False, f"version {version} is already the {self.alias}", body)
        was = f"it was on version {aliases[self.alias]}" if self.alias in aliases else "it was missing"
        self.client.set_registered_model_alias(self.name, self.alias, version)
        return self._result(version, True, f"the alias is back on version {version}, {was}", body)

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
            "gate.verdict": "pending",
            "receipt": file_digest(receipt),
            "dvc.stage": self.chosen.stage,
        }
        execution = _execution(self.ledger, tags["receipt"])
        if execution is not None:
            tags["git.revision"] = str(execution["git"].get("revision", ""))
            tags[tracking.EXECUTION] = str(execution["execution"])
        return tags

    def _body(self, version: str, provenance: Path, previous: dict[str, Any] | None) -> dict[str, Any]:
        chosen, evidence = self.chosen, self.evidence
        body: dict[str, Any] = {
            "action": self.alias,
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
            "provenance": file_digest(provenance),
            "figures": dict(chosen.figures),
            "stored": versions.stored_files(self.client, self.name, version),
            "store": _without_password(tracking.uri(self.home)),
            "previous": {key: previous[key] for key in ("version", "digest")} if previous is not None else None,
        }
        predicate = attestations.summary(self.name, version, attestations.facts(body), chosen.figures)
        summary = signing.sign(self.folder, self.home, self.keys, signing.SUMMARY, predicate)
        return body | {"summary": file_digest(summary)}

    def _version(self) -> str:
        """Makes a version that holds the chosen model, or finds the one an interrupted promotion made."""
        from mlflow.exceptions import MlflowException

        tags = self._tags()
        try:
            self.client.create_registered_model(self.name, {"springhead": "promoted models only"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        challenger = standing(self.ledger.entries(), CHALLENGER).get(self.name)
        if challenger is not None and self.alias == CHAMPION and challenger["digest"] == self.chosen.digest:
            version = str(challenger["version"])  # the challenger that wins keeps its version, if it is whole
            held = versions.stored_files(self.client, self.name, version)
            if held is not None and held == challenger.get("stored"):
                for key, value in tags.items():
                    self.client.set_model_version_tag(self.name, version, key, value)
                return version
        return self._register(tags)

    def _register(self, tags: dict[str, str]) -> str:
        """Uploads the model in the form that its users load, and registers it."""
        client, place = self.client, tracking.experiment(self.client, self.home, self.chosen.stage.partition("-")[0])
        run = self._run(place)
        logged = client.create_logged_model(place, self.name, run, tags, model_type=packaging.kind(self.folder))
        with tempfile.TemporaryDirectory() as temporary:
            prepared = packaging.prepare(self.folder, Path(temporary) / "model", self.evidence.cost_limit)
            uploaded = tree_files(prepared)
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
        version = str(made.version)
        if versions.stored_files(client, self.name, version) != uploaded:
            raise Finding(
                f"{self.name}: MLflow at {_without_password(tracking.uri(self.home))} does not give back what was "
                f"uploaded as version {version}; the alias was not moved. Check its artifact store"
            )
        return version

    def _run(self, place: str) -> str | None:
        """Returns the run of the execution that made the chosen model, if MLflow has it."""
        query = f"tags.`{DIGEST}` = '{self.chosen.digest}' AND tags.`springhead.stage` = '{self.chosen.stage}'"
        found = self.client.search_logged_models([place], query, max_results=1)
        return str(found[0].source_run_id) if found and found[0].source_run_id else None

    def _description(self) -> str:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in sorted(self.chosen.figures.items()))
        at = f" at the cost limit {self.evidence.cost_limit:g}" if self.evidence.cost_limit is not None else ""
        return f"{self.chosen.label}, made by {self.chosen.stage}. Evaluated{at}: {figures}."


# -- rollback -------------------------------------------------------------------------------------


def rollback(name: str, root: Path, home: Path, to: str | None = None, reason: str = "") -> PromotionResult:
    """Puts the alias ``champion`` back on a version that carried it before.

    Nothing is judged again: the version was judged when it was promoted, and that judgement is signed. What
    is checked is that the statements hold and that MLflow still has the very bytes. A rollback that was
    killed before it moved the alias is completed by the next one.

    Args:
        name: name of the registered model.
        root: the repository root.
        home: the state folder.
        to: the version; default is the newest earlier champion from which nobody rolled back.
        reason: why, for the ledger.

    Raises:
        Finding: if the version was never champion or is it now, no earlier champion is left, the version's
            statements do not hold, or its bytes have changed.
        BadInput: if nothing was promoted yet, or MLflow cannot be reached.
    """
    ledger, keys = Ledger(home), Keys.of(root, home)
    with _only_one(home):  # before the ledger is read: another promotion would make it out of date
        entries = ledger.entries()
        now = standing(entries).get(name)
        if now is None:
            raise BadInput(f"{name}: nothing was promoted yet, so there is nothing to go back to")
        client = tracking.connect(home)
        unfinished = to in (None, str(now["version"])) and _lacks_alias(client, now)
        target = now if unfinished else _earlier(entries, now, to)
        _refuse_unless_whole(client, ledger, keys, target)
        version, instead = str(target["version"]), str((now["previous"] if unfinished else now)["version"])
        entry = now if unfinished else _enter_rollback(ledger, keys, target, now, reason)
        client.set_registered_model_alias(name, PREVIOUS, instead)
        client.set_registered_model_alias(name, CHAMPION, version)
    message = f"version {version} is the champion again, instead of version {instead}"
    if unfinished:
        message += ", as the last rollback entered it"
    return PromotionResult(name, version, target["digest"], target["label"], True, message, None, entry)


def _lacks_alias(client: "MlflowClient", now: dict[str, Any]) -> bool:
    """Tells whether a champion came back by a rollback that did not get to the alias, or whose alias was moved."""
    from mlflow.exceptions import MlflowException

    if now.get("action") != ROLLBACK:
        return False
    try:
        return aliases_of(client, now["model"]).get(CHAMPION) != str(now["version"])
    except MlflowException:  # the registered model is gone; that its bytes are, too, is said later
        return True


def _earlier(entries: list[dict[str, Any]], now: dict[str, Any], to: str | None) -> dict[str, Any]:
    """Returns the last entry of the champion to go back to: the one named, or the newest nobody rolled back from."""
    name, present = now["model"], str(now["version"])
    past = [e["body"] for e in promotions(entries) if e["body"]["model"] == name and is_champion(e["body"])]
    other: list[dict[str, Any]] = [body for body in reversed(past) if str(body["version"]) != present]
    gone = withdrawn(entries, name)
    shown = (f"{b['version']} (rolled back from)" if b["digest"] in gone else str(b["version"]) for b in other[::-1])
    known = f"earlier champions: {', '.join(dict.fromkeys(shown)) or 'none'}"
    if to == present:
        raise Finding(f"{name}: version {to} is the champion already; {known}")
    if to is not None:
        named = next((body for body in other if str(body["version"]) == to), None)
        if named is None:
            raise Finding(f"{name}: version {to} was never champion; {known}")
        return named
    # Another version of the present model is no way back from it.
    found = next((body for body in other if body["digest"] not in gone | {now["digest"]}), None)
    if found is None:
        how = "; `--to VERSION` puts one back all the same" if other else ""
        raise Finding(f"{name}: no champion is left to go back to; {known}{how}")
    return found


def _refuse_unless_whole(client: "MlflowClient", ledger: Ledger, keys: Keys, target: dict[str, Any]) -> None:
    """Raises Finding unless what a promotion stated is signed and MLflow still has what it promoted."""
    home, name, version = ledger.path.parent, target["model"], str(target["version"])
    state = check_head(ledger, keys)
    problems = [
        *keys.unusable(),
        *([state.problem] if state.problem else []),
        *(["the ledger has a promotion that nobody signed"] if promotions(ledger.entries()[state.signed :]) else []),
        *attestations.problems(home, keys, target),
    ]
    if versions.stored_files(client, name, version) != target.get("stored"):
        problems.append("MLflow no longer holds the bytes that were promoted")
    if problems:
        raise Finding(f"{name}: version {version} cannot be champion again: {'; '.join(problems)}")


def _enter_rollback(
    ledger: Ledger, keys: Keys, target: dict[str, Any], now: dict[str, Any], reason: str
) -> dict[str, Any]:
    body = {key: value for key, value in target.items() if key not in ("entry", "time", "reason")}
    previous = {key: now[key] for key in ("version", "digest")}
    # The summary is that of the promotion: it states what was judged then, under its action.
    more = {"action": ROLLBACK, "promoted_as": target.get("promoted_as", target["action"])}
    return _append(ledger, body | more | {"reason": reason, "previous": previous}, keys)


def _execution(ledger: Ledger, receipt: str) -> dict[str, Any] | None:
    """Returns the first execution that wrote this very receipt."""
    bodies = (e["body"] for e in ledger.entries() if e["kind"] == "execution")
    return next((body for body in bodies if body["receipt"] == receipt), None)


def _without_password(store: str) -> str:
    return re.sub(r"//[^/@]*@", "//", store)
