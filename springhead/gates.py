"""The gates before promotion: a pure function of recorded evidence and ``mlflow/gates.yaml``.

A registry sets an alias on anything. Here nothing is promoted unless the validation verdict is for
the very data the model was trained on, the evaluation for this very model, the receipts form a
chain of digests, every bound holds, and the current champion is not clearly better. What is judged
is read by :mod:`springhead.evidence`; this module opens no file but the rules.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.evidence import Candidate, Evidence, Sources, limit_named
from springhead.params import read_params

RULES = Path("mlflow/gates.yaml")
_SEVERITIES = ("none", "warning", "critical")
_LIMITS = ("lowest", "middle", "highest")
_EVERYTHING = ("ledger", "keys")  # checks of what every promotion rests on
_SHOWN = 3  # findings of the audit in one line
_DIGITS = 8  # of a digest that names a candidate, at least


@dataclass(frozen=True)
class Bound:
    """A bound on one figure of the evaluation."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    not_below: str | None = None
    """A reference whose figure, plus ``by``, is the lower bound."""
    not_above: str | None = None
    """A reference whose figure, plus ``by``, is the upper bound."""
    by: float = 0.0
    at: str | None = None
    """``each`` cost limit, or one of them; by default the one by which models are chosen."""


@dataclass(frozen=True)
class Rules:
    """The gates of one family of registered models."""

    family: str
    name: str
    """Name of the registered model, ``{item}`` standing for the task or student."""
    verdict: str
    evaluation: str
    training_data: str
    worst_severity: str
    items: tuple[str, ...] | None
    """The tasks or students that have a registered model; None for all that were evaluated."""
    methods: tuple[str, ...] | None
    """Methods or algorithms that may be promoted; None for all."""
    limit: str | None
    bounds: tuple[Bound, ...]
    choose: str
    margin: float
    noise: float

    def item(self, name: str) -> str | None:
        """Returns the item in the name of a registered model, or None if it is of another family."""
        before, after = self.name.split("{item}")
        fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
        item = name[len(before) : len(name) - len(after)]
        return item if fits and (self.items is None or item in self.items) else None

    def sources(self, item: str) -> Sources:
        """Returns where the evidence for one item lies."""
        verdict, evaluation = (path.replace("{item}", item) for path in (self.verdict, self.evaluation))
        return Sources(verdict, evaluation, self.training_data, self.methods, self.limit)


def _checked(block: Any, known: set[str], required: set[str], where: str) -> dict[str, Any]:
    """Returns a mapping whose keys are all known and complete.

    Raises:
        BadInput: naming the unknown or missing keys.
    """
    if not isinstance(block, dict):
        raise BadInput(f"{where}: expected a mapping, found {type(block).__name__}")
    unknown, missing = sorted(set(map(str, block)) - known), sorted(required - set(block))
    if unknown:
        raise BadInput(f"{where}: unknown key {', '.join(unknown)}; known keys are {', '.join(sorted(known))}")
    if missing:
        raise BadInput(f"{where}: missing key {', '.join(missing)}")
    return block


def _is_number(value: Any) -> bool:
    """Whether a value is a number to compare with; of an infinite or undefined one, every or no figure is on a side."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _bound(block: Any, where: str) -> Bound:
    known = {field.name for field in fields(Bound)}
    values = _checked(block, known, {"metric"}, where)
    for key, value in values.items():
        is_name = key in ("metric", "not_below", "not_above", "at")
        if not (isinstance(value, str) if is_name else _is_number(value)):
            raise BadInput(f"{where}: {key} must be a {'name' if is_name else 'finite number'}, found {value!r}")
    if values.get("at", "each") not in ("each", *_LIMITS):
        raise BadInput(f"{where}: at must be each, {', '.join(_LIMITS)}; found {values['at']!r}")
    if not set(values) & {"at_least", "at_most", "not_below", "not_above"}:
        raise BadInput(f"{where}: bounds nothing; give at_least, at_most, not_below or not_above")
    return Bound(**values)


def read_rules(root: Path) -> dict[str, Rules]:
    """Reads ``mlflow/gates.yaml`` and returns the rules by family.

    Raises:
        BadInput: naming the key that is unknown, missing, given twice or of a wrong kind.
    """
    path = root / RULES
    if not path.exists():
        raise BadInput(f"{path}: no such file; without gates nothing can be promoted")
    families = _checked(read_params(path), {"families"}, {"families"}, str(RULES))["families"]
    if not isinstance(families, dict) or not families:
        raise BadInput(f"{RULES}: families: expected at least one family of models")
    return {str(family): _family(str(family), block) for family, block in families.items()}


def _family(family: str, block: Any) -> Rules:
    where = f"{RULES}: families.{family}"
    known = {field.name for field in fields(Rules)} - {"family"}
    values = dict(_checked(block, known, known, where))
    for key in ("name", "verdict", "evaluation", "training_data", "worst_severity", "choose"):
        if not isinstance(values[key], str):
            raise BadInput(f"{where}.{key}: expected text, found {values[key]!r}")
    for key in ("name", "evaluation"):
        if values[key].count("{item}") != 1:
            raise BadInput(f"{where}.{key}: must hold {{item}} once")
    if values["worst_severity"] not in _SEVERITIES:
        raise BadInput(f"{where}.worst_severity: must be one of {', '.join(_SEVERITIES)}")
    if values["limit"] is not None and values["limit"] not in _LIMITS:
        raise BadInput(f"{where}.limit: must be null or one of {', '.join(_LIMITS)}")
    for key in ("margin", "noise"):
        if not _is_number(values[key]) or values[key] < 0:
            raise BadInput(f"{where}.{key}: must be a finite number of 0 or more, found {values[key]!r}")
    for key in ("items", "methods"):
        if values[key] != "all" and not isinstance(values[key], list):
            raise BadInput(f"{where}.{key}: must be `all` or a list of names")
        values[key] = None if values[key] == "all" else tuple(map(str, values[key]))
    if not isinstance(values["bounds"], list) or not values["bounds"]:
        raise BadInput(f"{where}.bounds: expected a list with at least one bound")
    values["bounds"] = tuple(_bound(b, f"{where}.bounds[{i}]") for i, b in enumerate(values["bounds"]))
    if values["limit"] is None and any(bound.at for bound in values["bounds"]):
        raise BadInput(f"{where}.bounds: `at` needs a family with cost limits, but its limit is null")
    return Rules(family=family, **values)


def rules_for(rules: Mapping[str, Rules], name: str) -> tuple[Rules, str]:
    """Returns the rules and the item of a registered model's name.

    Raises:
        BadInput: if the name is of no family.
    """
    for family in rules.values():
        item = family.item(name)
        if item is not None:
            return family, item
    known = ", ".join(family.name.replace("{item}", "NAME") for family in rules.values())
    raise BadInput(f"{name}: no gates for such a name in {RULES}; known are {known}")


# -- judging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateResult:
    """The outcome of one gate for one candidate."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Judgement:
    """The outcome of all gates for all candidates of a registered model.

    Attributes:
        model: name of the registered model.
        results: (candidate, its results), in the order of the evaluation.
        chosen: the best candidate that passed every gate, or None.
    """

    model: str
    results: list[tuple[Candidate, list[GateResult]]]
    chosen: Candidate | None

    def as_json(self) -> list[dict[str, Any]]:
        """Returns the outcome of every gate for every candidate as JSON values."""
        return [
            {
                "label": candidate.label,
                "path": candidate.path,
                "digest": candidate.digest,
                "chosen": self.chosen is not None and candidate.path == self.chosen.path,
                "gates": [{"gate": gate.name, "passed": gate.passed, "reason": gate.reason} for gate in gates],
            }
            for candidate, gates in self.results
        ]

    def report(self, every: bool = False) -> str:
        """Returns what was found: one line per candidate, and one per gate that is closed, or per gate."""
        lines = []
        for candidate, gates in self.results:
            closed = [gate for gate in gates if not gate.passed]
            state = f"{len(closed)} of {len(gates)} gates closed" if closed else "passes every gate"
            mark = "*" if self.chosen is not None and candidate.path == self.chosen.path else "-"
            lines.append(f"{mark} {candidate.label} ({candidate.digest[:12]}): {state}")
            lines += [
                f"    {'' if gate.passed else 'closed: ' if every else ''}{gate.name}: {gate.reason}"
                for gate in (gates if every else closed)
            ]
        return "\n".join(lines) or "no candidate: the evaluation lists no model that may be promoted"


def judge(name: str, rules: Rules, evidence: Evidence, model: str | None = None, challenger: bool = False) -> Judgement:
    """Applies every gate to every candidate and chooses the best that passes all.

    Args:
        name: name of the registered model, for the report.
        rules: its family's gates.
        evidence: what is recorded about the candidates.
        model: consider only the candidate whose digest begins like this.
        challenger: choose a challenger: not the champion, and not compared with it.

    Raises:
        BadInput: if ``model`` does not name one candidate.
    """
    named = _named(evidence, model) if model is not None else None
    champion = evidence.champion.digest if evidence.champion is not None else None
    if challenger and named is not None and named == champion:
        raise BadInput(f"{model}: is the champion itself; a challenger is another model")
    considered = [c for c in evidence.candidates if named is None or c.digest == named]
    if challenger:
        considered = [c for c in considered if c.digest != champion]
    results = [(candidate, _gates(rules, evidence, candidate, challenger)) for candidate in considered]
    if named is None:
        results = [(candidate, [*found, _withdrawn(evidence, candidate)]) for candidate, found in results]
    passed = [candidate for candidate, gates in results if all(gate.passed for gate in gates)]
    # Equal figures are common with few problems; the label makes the choice the same every time.
    best = min(passed, key=lambda c: (-c.figures[rules.choose], c.label), default=None)
    return Judgement(name, results, best)


def _named(evidence: Evidence, model: str) -> str:
    """Returns the digest that begins with the given digits, which must say clearly which model is meant.

    Naming a model brings back one from which somebody rolled back, so an empty or short text is not enough.
    """
    digits = model.lower()
    if not re.fullmatch(r"[0-9a-f]+", digits) or len(digits) < _DIGITS:
        raise BadInput(f"{model!r}: not a model's digest; give at least {_DIGITS} of its hexadecimal digits")
    found = {c.digest for c in evidence.candidates if c.digest.startswith(digits)}
    known = ", ".join(f"{c.digest[:12]} ({c.label})" for c in evidence.candidates) or "none"
    if not found:
        raise BadInput(f"{model}: {evidence.sources.evaluation} has no such candidate; it has {known}")
    if len(found) > 1:
        raise BadInput(f"{model}: the digests of {len(found)} candidates begin like this; give more digits: {known}")
    return found.pop()


def _gates(rules: Rules, evidence: Evidence, candidate: Candidate, challenger: bool) -> list[GateResult]:
    gates = [
        _listed("model", candidate.model_problems, "the folder holds what was trained and evaluated"),
        _data(rules, evidence, candidate),
        _listed("receipts", candidate.chain_problems, "digests form a chain"),
        *(_within(bound, rules, evidence, candidate) for bound in rules.bounds),
        _listed("signed", evidence.signing_problems, "the key is trusted and the ledger's head is signed"),
        _audit(evidence, candidate),
    ]
    choosable = _choosable(rules, candidate)
    gates.append(choosable)
    return gates if challenger or not choosable.passed else [*gates, _champion(rules, evidence, candidate)]


def _withdrawn(evidence: Evidence, candidate: Candidate) -> GateResult:
    """A model from which somebody rolled back comes back only when it is named."""
    gone = candidate.digest in evidence.withdrawn
    why = f"somebody rolled back from it; `--model {candidate.digest[:12]}` promotes it all the same"
    return GateResult("withdrawn", not gone, why if gone else "nobody rolled back from it")


def _audit(evidence: Evidence, candidate: Candidate) -> GateResult:
    """Nothing that the audit found red may concern this model, or everything."""
    found = [p for p in evidence.findings if candidate.path in p.affects or p.check in _EVERYTHING]
    return _listed("audit", [f"{p.where} {p.what}" for p in found[:_SHOWN]], "green for everything behind it")


def _listed(name: str, problems: list[str], fine: str) -> GateResult:
    return GateResult(name, not problems, "; ".join(problems) or fine)


def _data(rules: Rules, evidence: Evidence, candidate: Candidate) -> GateResult:
    """The verdict must be green enough, whole, and about the data that this model was trained on."""
    verdict = evidence.verdict
    if verdict is None:
        return GateResult("verdict", False, f"no verdict at {evidence.sources.verdict}; run `dvc repro`")
    problems = list(evidence.verdict_problems)
    if candidate.data_digest is None:
        problems.append(f"its training receipt names no data below {rules.training_data}")
    elif verdict["data_digest"] != candidate.data_digest:
        problems.append(
            f"trained on the data {candidate.data_digest[:12]}, but the verdict is for {verdict['data_digest'][:12]}"
        )
    severity = str(verdict["severity"])
    if severity not in _SEVERITIES or _SEVERITIES.index(severity) > _SEVERITIES.index(rules.worst_severity):
        failed = [e["name"] for e in verdict.get("expectations", []) if not e["success"]]
        problems.append(f"the verdict is red ({severity}): {', '.join(failed[:5]) or 'no expectation named'}")
    if not verdict["success"] and severity == "none":
        problems.append("the verdict says neither success nor how severe its failure is")
    return _listed("verdict", problems, f"green for the data {str(candidate.data_digest)[:12]}")


def _within(bound: Bound, rules: Rules, evidence: Evidence, candidate: Candidate) -> GateResult:
    """Checks one bound, at every cost limit it is for; a missing figure or reference closes the gate."""
    name = f"bound {bound.metric}"
    if bound.at is None:
        passed, reason = _holds(bound, candidate.figures, evidence.references)
        return GateResult(name, passed, reason)
    limits = list(candidate.by_limit)
    if not limits:
        return GateResult(name, False, "the evaluation has no figures by cost limit for this model")
    chosen = limits if bound.at == "each" else [limit_named(bound.at, limits)]
    outcomes = [
        (limit, *_holds(bound, candidate.by_limit[limit], evidence.references_by_limit.get(limit, {})))
        for limit in chosen
    ]
    closed = [(limit, reason) for limit, passed, reason in outcomes if not passed]
    shown = closed or [(limit, reason) for limit, _, reason in outcomes]
    return GateResult(name, not closed, "; ".join(f"at the limit {limit}: {reason}" for limit, reason in shown))


def _holds(
    bound: Bound, figures: Mapping[str, float], references: Mapping[str, Mapping[str, float]]
) -> tuple[bool, str]:
    """Returns whether figures keep a bound, and by what numbers."""
    value = figures.get(bound.metric)
    if value is None or value != value:
        return False, f"the evaluation has no figure {bound.metric} for this model"
    reasons, passed = [], True
    for low, kind in ((True, "not_below"), (False, "not_above")):
        reference = getattr(bound, kind)
        if reference is None:
            continue
        base = references.get(reference, {}).get(bound.metric)
        if base is None:
            return False, f"the evaluation has no figure {bound.metric} for the reference {reference}"
        edge = base + bound.by
        passed &= value >= edge if low else value <= edge
        plus = f" + {bound.by:g}" if bound.by else ""
        reasons.append(f"{value:.4g}, must be {'≥' if low else '≤'} {edge:.4g} ({reference}{plus})")
    if bound.at_least is not None:
        passed &= value >= bound.at_least
        reasons.append(f"{value:.4g}, must be ≥ {bound.at_least:g}")
    if bound.at_most is not None:
        passed &= value <= bound.at_most
        reasons.append(f"{value:.4g}, must be ≤ {bound.at_most:g}")
    return passed, "; ".join(reasons)


def _broken(rules: Rules, evidence: Evidence, digest: str) -> str:
    """Returns which bound the champion itself breaks in the current evaluation, or an empty string."""
    itself = next((candidate for candidate in evidence.candidates if candidate.digest == digest), None)
    gates = [_within(bound, rules, evidence, itself) for bound in rules.bounds] if itself is not None else []
    return next((f"it breaks the {gate.name} ({gate.reason})" for gate in gates if not gate.passed), "")


def standard_error(figures: Mapping[str, float], metric: str) -> float:
    """Returns the standard error of a figure over the episodes or problems it was measured on, 0 if unknown.

    A figure with a standard deviation is a mean over episodes; one that comes with a number of problems
    is the share of them, whose variance is binomial.
    """
    spread, episodes = figures.get(f"{metric}_std"), figures.get("episodes", 0.0)
    if spread is not None and episodes > 0:
        return float(spread / math.sqrt(episodes))
    value, problems = figures.get(metric, math.nan), figures.get("problems", 0.0)
    return math.sqrt(value * (1 - value) / problems) if problems > 0 and 0 <= value <= 1 else 0.0


def _choosable(rules: Rules, candidate: Candidate) -> GateResult:
    """Without the figure by which models are chosen, a candidate can be compared with no other."""
    value = candidate.figures.get(rules.choose)
    if value is None or not math.isfinite(value):
        return GateResult("choose", False, f"the evaluation has no figure {rules.choose} to choose by")
    return GateResult("choose", True, f"{rules.choose} {value:.4g}")


def _champion(rules: Rules, evidence: Evidence, candidate: Candidate) -> GateResult:
    """The candidate may not be worse than the current champion by more than the margin and the noise."""
    champion, value = evidence.champion, candidate.figures[rules.choose]
    if champion is None:
        return GateResult("champion", True, "there is no champion yet")
    if champion.digest == candidate.digest:
        return GateResult("champion", True, f"it is the champion (version {champion.version})")
    broken = _broken(rules, evidence, champion.digest)
    if broken:
        return GateResult("champion", True, f"version {champion.version} is no measure: {broken}")
    standing = champion.figures.get(rules.choose)
    if standing is None:
        return GateResult("champion", True, f"version {champion.version} has no figure {rules.choose} to compare with")
    errors = (standard_error(figures, rules.choose) for figures in (candidate.figures, champion.figures))
    allowed = max(rules.margin, rules.noise * math.hypot(*errors))
    reason = f"{rules.choose} {value:.4g} against {standing:.4g} of version {champion.version}, "
    return GateResult("champion", value >= standing - allowed, f"{reason}{allowed:.2g} may be noise")
