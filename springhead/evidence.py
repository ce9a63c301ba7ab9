"""Reads what the gates judge: verdict, evaluation, receipts, ledger, and the models themselves.

Everything is joined by digest. A file is believed only if the receipt of the stage that made it
names the digest it has now; what does not fit becomes a problem of the candidates that rest on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.keys import Keys
from springhead.lineage.digests import file_digest, tree_digest
from springhead.lineage.graph import Graph
from springhead.lineage.head import check_head
from springhead.lineage.ledger import Ledger
from springhead.lineage.promotions import standing, withdrawn
from springhead.lineage.receipts import receipt_path
from springhead.lineage.workspace import RED, Problem

if TYPE_CHECKING:
    from springhead.lineage.audit import Audit

REGISTRY_CHECKS = ("registry", "runs", "prefect", "signatures")
"""Checks whose findings do not close a gate: they are about earlier promotions, which a new one puts right."""


@dataclass(frozen=True)
class Sources:
    """Where the evidence for one registered model lies, relative to the repository root."""

    verdict: str
    evaluation: str
    training_data: str
    methods: tuple[str, ...] | None
    limit: str | None


@dataclass(frozen=True)
class Candidate:
    """One evaluated model.

    Attributes:
        label: method or algorithm and seed, for people.
        path: its folder, relative to the repository root.
        digest: the digest that the evaluation gives for it.
        stage: the stage that made it, empty if no receipt says so.
        facts: what its receipt says about it.
        data_digest: the digest of the data it was trained on, by its training receipt.
        figures: the figures of the evaluation, at the cost limit by which models are chosen.
        by_limit: the figures at every cost limit, lowest first; empty for language models.
        model_problems: how its folder, its receipt and its evaluation disagree.
        chain_problems: links of its history whose digests do not meet.
    """

    label: str
    path: str
    digest: str
    stage: str
    facts: Mapping[str, Any]
    data_digest: str | None
    figures: Mapping[str, float]
    by_limit: Mapping[str, Mapping[str, float]]
    model_problems: list[str]
    chain_problems: list[str]


@dataclass(frozen=True)
class Champion:
    """The last promoted model, as the ledger has it.

    Attributes:
        version: its version in the registry.
        digest: digest of its folder.
        figures: its figures: those of the current evaluation if it is part of it, else those at
            its promotion.
    """

    version: str
    digest: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Evidence:
    """Everything the gates of one registered model look at."""

    sources: Sources
    verdict: Mapping[str, Any] | None
    verdict_digest: str
    verdict_problems: list[str]
    evaluation_digest: str
    cost_limit: float | None
    """The cost limit at which the figures were measured; None for language models."""
    references: Mapping[str, Mapping[str, float]]
    references_by_limit: Mapping[str, Mapping[str, Mapping[str, float]]]
    candidates: list[Candidate]
    signing_problems: list[str]
    """Why a promotion could not be signed, or the ledger behind it not be believed."""
    findings: tuple[Problem, ...]
    """What an audit found that is red, the registry aside, which promotion itself puts right."""
    champion: Champion | None
    withdrawn: frozenset[str]
    """Digests of models from which somebody rolled back, and that were not promoted since."""


def read_evidence(root: Path, home: Path, model: str, sources: Sources, audited: "Audit | None" = None) -> Evidence:
    """Reads the evidence for a registered model.

    Args:
        root: the repository root.
        home: the state folder with the ledger.
        model: name of the registered model, by which the ledger knows its champion.
        sources: where to look.
        audited: an audit of this checkout as it is now; made here by default.

    Raises:
        BadInput: if there is no evaluation, or it is not in the form the project writes.
    """
    from springhead.lineage.audit import audit

    graph, ledger = Graph.read(root), Ledger(home)
    summary = read_json(root / sources.evaluation)
    limit = _limit(summary, sources)
    models = [(entry, _figures(entry, limit, sources)) for entry in _entries(summary, sources)]
    verdict = read_json(root / sources.verdict) if (root / sources.verdict).is_file() else None
    evaluation_problems = _unlike_receipt(root, graph, sources.evaluation)
    examined = audited if audited is not None else audit(root, registry=False)
    entries = ledger.entries() if not ledger.verify() else []
    executed = frozenset(str(e["body"]["receipt"]) for e in entries if e["kind"] == "execution")
    candidates = [
        _candidate(root, graph, sources, entry, figures, evaluation_problems, executed)
        for entry, figures in models
        if sources.methods is None or _method(entry) in sources.methods
    ]
    return Evidence(
        sources=sources,
        verdict=verdict,
        verdict_digest=file_digest(root / sources.verdict) if verdict is not None else "",
        verdict_problems=_verdict_problems(root, graph, sources, verdict),
        evaluation_digest=file_digest(root / sources.evaluation),
        cost_limit=None if limit is None else float(limit),
        references=_references(summary, models, limit),
        references_by_limit={
            key: _references(summary, _evaluated_at(key, summary, sources), key) for key in _limits(summary, sources)
        },
        candidates=candidates,
        signing_problems=_signing_problems(root, home),
        findings=tuple(p for p in examined.problems if p.severity == RED and p.check not in REGISTRY_CHECKS),
        champion=_champion(ledger, model, models),
        withdrawn=withdrawn(entries, model),
    )


def _signing_problems(root: Path, home: Path) -> list[str]:
    keys = Keys.of(root, home)
    problems = keys.unusable()
    if problems:
        return problems
    ledger = Ledger(home)
    state = check_head(ledger, keys)
    if state.problem:
        return [f"ledger: {state.problem}"]
    if state.unsigned and not keys.external:
        return [f"ledger: its last {state.unsigned} entries are not signed; see `springhead doctor`"]
    forged = [e for e in ledger.entries()[state.signed :] if e["kind"] == "promotion"]
    return [f"ledger: entry {entry['seq']} is a promotion that nobody signed" for entry in forged]


# -- the evaluation -------------------------------------------------------------------------------


def _method(entry: Mapping[str, Any]) -> str:
    """Returns what the entry calls its algorithm or method."""
    return str(entry.get("algorithm") or entry.get("method") or "")


def _entries(summary: Any, sources: Sources) -> list[Mapping[str, Any]]:
    entries = summary.get("models") if isinstance(summary, dict) else None
    if not isinstance(entries, list):
        raise BadInput(f"{sources.evaluation}: no list of models in it; run `dvc repro` to make it again")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadInput(f"{sources.evaluation}: models[{number}] is no entry; run `dvc repro` to make it again")
        lacking = [key for key in ("path", "digest") if not entry.get(key)]
        if lacking and _method(entry) != "base":
            raise BadInput(f"{sources.evaluation}: models[{number}] has no {' and no '.join(lacking)}")
    return entries


def _limit(summary: Any, sources: Sources) -> str | None:
    """Returns the key of the cost limit that the gates look at: of those that every model was evaluated at."""
    if sources.limit is None:
        return None
    keys = _limits(summary, sources)
    if not keys:
        raise BadInput(f"{sources.evaluation}: no figures by cost limit in it; run `dvc repro` to make it again")
    entries = _entries(summary, sources)
    if common := [key for key in keys if all(key in entry.get("limits", {}) for entry in entries)]:
        return limit_named(sources.limit, common)
    found = {_method(entry): ", ".join(sorted(entry.get("limits", {}), key=float)) or "none" for entry in entries}
    raise BadInput(
        f"{sources.evaluation}: no cost limit at which every model was evaluated, so none to choose by "
        f"({'; '.join(f'{method}: {limits}' for method, limits in sorted(found.items()))}); "
        "give them one in common by `limits` in rl.train and run `dvc repro`"
    )


def limit_named(name: str, ordered: list[str]) -> str:
    """Returns the limit that is the ``lowest``, ``middle`` or ``highest`` of an ordered list."""
    return {"lowest": ordered[0], "middle": ordered[len(ordered) // 2], "highest": ordered[-1]}[name]


def _evaluated_at(limit: str, summary: Any, sources: Sources) -> list[tuple[Mapping[str, Any], dict[str, float]]]:
    """Returns the models that were evaluated at a cost limit, with their figures there."""
    entries = _entries(summary, sources)
    return [(entry, _figures(entry, limit, sources)) for entry in entries if limit in entry.get("limits", {})]


def _limits(summary: Any, sources: Sources) -> list[str]:
    """Returns all cost limits that any model was evaluated at, lowest first."""
    return sorted({str(key) for entry in _entries(summary, sources) for key in entry.get("limits", {})}, key=float)


def _numbers(block: Any) -> dict[str, float]:
    """Returns the numbers in a mapping."""
    items = block.items() if isinstance(block, dict) else ()
    return {key: float(v) for key, v in items if isinstance(v, int | float) and not isinstance(v, bool)}


def _figures(entry: Mapping[str, Any], limit: str | None, sources: Sources) -> dict[str, float]:
    if limit is None:
        return _numbers(entry.get("metrics"))
    if limit not in entry.get("limits", {}):
        raise BadInput(f"{sources.evaluation}: {entry.get('path')}: not evaluated at the cost limit {limit}")
    return _numbers(entry["limits"][limit])


def _references(
    summary: Mapping[str, Any], models: list[tuple[Mapping[str, Any], dict[str, float]]], limit: str | None
) -> dict[str, dict[str, float]]:
    """Returns figures by name: the mean over the seeds of each method, and the evaluation's own references.

    A reference that was measured at several limits has one entry for each, or one for all.
    """
    found: dict[str, dict[str, float]] = {}
    for method in sorted({_method(entry) for entry, _ in models}):
        rows = [figures for entry, figures in models if _method(entry) == method]
        shared = set.intersection(*(set(row) for row in rows))
        found[method] = {key: sum(row[key] for row in rows) / len(rows) for key in sorted(shared)}
    for entry in summary.get("references") or []:
        figures = entry.get("limits", {}).get(limit) if limit is not None else entry.get("metrics")
        if figures is not None:
            found[_method(entry)] = _numbers(figures)
    return found


def _champion(ledger: Ledger, model: str, models: list[tuple[Mapping[str, Any], dict[str, float]]]) -> Champion | None:
    last = standing(ledger.entries()).get(model)
    if last is None:
        return None
    now = next((figures for entry, figures in models if entry.get("digest") == last["digest"]), None)
    return Champion(str(last["version"]), last["digest"], now if now is not None else last.get("figures", {}))


# -- what the receipts say ------------------------------------------------------------------------


def _unlike_receipt(root: Path, graph: Graph, path: str) -> list[str]:
    """Returns a problem if a file is not what the receipt of its stage says."""
    recorded = graph.digest(path)
    if recorded is None:
        return [f"no receipt names {path}; run `dvc repro`"]
    if not (root / path).exists():
        return [f"{path} is missing; run `dvc checkout`"]
    if tree_digest(root / path) != recorded:
        return [f"{path} differs from its receipt; run `dvc checkout`"]
    return []


def _verdict_problems(root: Path, graph: Graph, sources: Sources, verdict: Any) -> list[str]:
    if verdict is None:
        return []
    lacking = [key for key in ("data_digest", "success", "severity") if key not in verdict]
    if lacking:
        raise BadInput(f"{sources.verdict}: no {', '.join(lacking)} in it; run `dvc repro` to make it again")
    problems = _unlike_receipt(root, graph, sources.verdict)
    maker = graph.maker(sources.verdict)
    read = [link.sha256 for link in graph.links if link.stage == maker]
    if maker is not None and verdict["data_digest"] not in read:
        problems.append(f"the verdict is for data that {maker} did not read, by its receipt")
    return problems


def _candidate(
    root: Path,
    graph: Graph,
    sources: Sources,
    entry: Mapping[str, Any],
    figures: dict[str, float],
    evaluation_problems: list[str],
    executed: frozenset[str],
) -> Candidate:
    path, digest = str(entry["path"]), str(entry["digest"])
    label = " seed ".join(str(part) for part in (_method(entry), entry.get("seed")) if part not in ("", None))
    declared = next((model for model in graph.models if model.path == path), None)
    stage = declared.stage if declared is not None else ""
    data = [link.sha256 for link in graph.links if link.stage == stage and _below(link.path, sources.training_data)]
    problems = list(evaluation_problems)
    if declared is None:
        problems.append(f"no receipt declares a model at {path}; run `dvc repro`")
    elif declared.sha256 != digest:
        problems.append(f"{digest[:12]} was evaluated, but {stage} made {declared.sha256[:12]}; run `dvc repro`")
    if not (root / path).is_dir():
        problems.append(f"{path} is missing; run `dvc checkout`")
    elif tree_digest(root / path) != digest:
        problems.append(f"{path} is not the model that was evaluated; a file in it was changed, added or removed")
    return Candidate(
        label=label or path,
        path=path,
        digest=digest,
        stage=stage,
        facts=dict(declared.facts) if declared is not None else {},
        data_digest=data[0] if len(data) == 1 else None,
        figures=figures,
        by_limit={key: _numbers(entry["limits"][key]) for key in sorted(entry.get("limits", {}), key=float)},
        model_problems=problems,
        chain_problems=[*_chain_problems(graph, sources, stage), *_not_executed(root, graph, sources, stage, executed)],
    )


def _not_executed(root: Path, graph: Graph, sources: Sources, stage: str, executed: frozenset[str]) -> list[str]:
    """Returns the receipts behind a model that no execution in the ledger wrote: anybody may have."""
    judges = (graph.maker(sources.evaluation), graph.maker(sources.verdict))
    behind = {s for name in (stage, *judges) if name for s in (graph.upstream(name) if name == stage else [name])}
    unknown = [name for name in sorted(behind) if file_digest(receipt_path(root, name)) not in executed]
    return [f"the ledger has no execution that wrote the receipt of {', '.join(unknown[:3])}"] if unknown else []


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _chain_problems(graph: Graph, sources: Sources, stage: str) -> list[str]:
    """Returns the broken links behind a model, its verdict and its evaluation."""
    if not stage:
        return ["no receipt of the stage that made it"]
    judge = graph.maker(sources.evaluation)
    verdict = graph.maker(sources.verdict)
    stages = set(graph.upstream(stage)) | {name for name in (judge, verdict) if name is not None}
    problems = []
    for link in graph.links:
        # An evaluation reads all models of its item; one that was made again since is its own problem.
        foreign = link.stage == judge and stage not in link.makers and link.makers
        if link.stage not in stages or foreign:
            continue
        if not link.makers:
            problems.append(f"{link.stage} read {link.path}, which no receipt made")
        elif not link.verified:
            problems.append(f"{link.stage} read another {link.path} than {', '.join(link.makers[:3])} made")
    if judge is not None and stage not in graph.parents(judge):
        problems.append(f"{judge} did not read what {stage} made")
    return problems
