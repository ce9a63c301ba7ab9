"""What was spent on stages and models, and what the cache saved: seconds, CPU seconds, energy.

The ledger alone tells. An ``execution`` or ``failure`` entry holds what one attempt took; a
``run`` entry, which `springhead run` writes at its end, names the results it used again by their
receipts. What was saved is the cost of the execution that made such a result, once per reuse.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.lineage import query
from springhead.lineage.digests import file_digest
from springhead.lineage.graph import Graph, branch_of
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path
from springhead.progress import duration

Amount = dict[str, float]
"""``seconds``, ``cpu_seconds``, and joules as ``energy_package``, ``energy_dram``, ``energy_gpu``.

A key is there only if at least one entry had it; nothing unknown is counted as zero.
"""


def amount(body: Mapping[str, Any]) -> Amount:
    """Returns what one attempt took, by its ledger entry."""
    found = {key: float(body[key]) for key in ("seconds", "cpu_seconds") if key in body}
    return found | {f"energy_{kind}": float(joules) for kind, joules in body.get("energy", {}).items()}


def add(amounts: Iterable[Mapping[str, float]]) -> Amount:
    """Returns the sum of amounts, rounded to a thousandth."""
    total: Amount = {}
    for one in amounts:
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + value
    return {key: round(value, 3) for key, value in total.items()}


def cost(root: Path, ref: str | None = None) -> dict[str, Any]:
    """Returns what the history of a checkout, or of one model, took and what the cache saved.

    Args:
        root: the repository root.
        ref: a model, data set, stage or digest as `springhead lineage` takes it; default everything.

    Returns:
        Plain JSON: ``stages`` and ``models``, and their ``total``. ``spent`` counts every attempt
        in the ledger, failed ones too; a model's ``made`` counts one execution of each stage behind
        it, the one that made what the model rests on.

    Raises:
        BadInput: if the reference is unknown or a row, or nothing has run here yet.
    """
    graph = Graph.read(root)
    entries = Ledger(state_folder(root)).entries()
    if not any(entry["kind"] in ("execution", "failure") for entry in entries):
        raise BadInput(
            f"{state_folder(root)}: its ledger has no executions; they are known where the stages ran. "
            "Run `springhead run` or `dvc repro`"
        )
    wanted = _wanted(root, graph, ref)
    history = _History(entries)
    stages = {
        s: history.stage(s) for s in sorted(history.stages | set(graph.receipts)) if wanted is None or s in wanted
    }
    ordered = sorted(stages, key=lambda s: (branch_of(s), graph.depth.get(s, len(graph.depth)), s))
    models, together = _models(root, graph, history, wanted)
    return {
        "query": ref,
        "stages": [{"stage": s, **stages[s]} for s in ordered],
        "models": models,
        "total": {
            "models": together,
            "spent": add(stages[s]["spent"] for s in stages),
            "failed": add(stages[s]["failed"] for s in stages),
            "saved": add(stages[s]["saved"] for s in stages),
            "up_to_date": add(stages[s]["up_to_date"] for s in stages),
            "executions": sum(stages[s]["executions"] for s in stages),
            "failures": sum(stages[s]["failures"] for s in stages),
            "restored": sum(stages[s]["restored"] for s in stages),
            "kept": sum(stages[s]["kept"] for s in stages),
            "unknown_reuses": sum(stages[s]["unknown_reuses"] for s in stages),
            "runs": history.runs,
        },
    }


def _wanted(root: Path, graph: Graph, ref: str | None) -> set[str] | None:
    """Returns the stages behind a reference, or None for all."""
    if ref is None:
        return None
    subject = query.find(root, graph, ref)
    if subject.kind == "row":
        raise BadInput(f"{ref}: no model, data set or stage here has this digest; costs are known for those only")
    starts = [subject.name] if subject.kind == "stage" else graph.makers(subject.name)
    return {stage for start in starts for stage in graph.upstream(start)}


class _History:
    """The attempts and reuses that a ledger knows, by stage."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.attempts: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        self.made: dict[tuple[str, str], Amount] = {}
        """What the newest execution took that wrote a receipt, by stage and digest of the receipt."""
        self.reuses: dict[str, dict[str, list[Amount | None]]] = {}
        self.runs = 0
        for entry in entries:
            body = entry["body"]
            if entry["kind"] in ("execution", "failure"):
                self.attempts.setdefault(body["stage"], []).append((entry["kind"], body))
                if entry["kind"] == "execution":
                    self.made[body["stage"], body["receipt"]] = amount(body)
            elif entry["kind"] == "run":
                self.runs += 1
                for how in ("cached", "up_to_date"):
                    for stage, receipt in body.get(how, {}).items():
                        # The newest execution before the run made what the run used.
                        used = self.made.get((stage, receipt))
                        self.reuses.setdefault(stage, {}).setdefault(how, []).append(used)

    @property
    def stages(self) -> set[str]:
        return {*self.attempts, *self.reuses}

    def stage(self, name: str) -> dict[str, Any]:
        attempts = self.attempts.get(name, [])
        failed = [amount(body) for kind, body in attempts if kind == "failure"]
        reuses = self.reuses.get(name, {})
        cached, kept = reuses.get("cached", []), reuses.get("up_to_date", [])
        return {
            "executions": len(attempts) - len(failed),
            "failures": len(failed),
            "spent": add(amount(body) for _, body in attempts),
            "failed": add(failed),
            "restored": len(cached),
            "saved": add(used for used in cached if used is not None),
            "kept": len(kept),
            "up_to_date": add(used for used in kept if used is not None),
            "unknown_reuses": sum(used is None for used in [*cached, *kept]),
        }


def _models(
    root: Path, graph: Graph, history: _History, wanted: set[str] | None
) -> tuple[list[dict[str, Any]], Amount]:
    """Returns each stage that makes models, with what everything behind it took, and all of them together.

    Models that one stage makes together, as experts, share one entry.
    """
    receipts = {stage: file_digest(receipt_path(root, stage)) for stage in graph.receipts}
    made = {stage: history.made.get((stage, receipt)) for stage, receipt in receipts.items()}
    by_stage: dict[str, list[Any]] = {}
    for model in graph.models:
        by_stage.setdefault(model.stage, []).append(model)
    behind = {stage: graph.upstream(stage) for stage in by_stage}
    uses = Counter(stage for stages in behind.values() for stage in stages)
    found: list[dict[str, Any]] = []
    for maker in sorted(by_stage, key=lambda s: (branch_of(s), graph.depth[s], s)):
        if wanted is not None and maker not in wanted:
            continue
        stages = behind[maker]
        shared = [s for s in stages if uses[s] > 1 and s != maker]
        found.append(
            {
                "stage": maker,
                "models": [{"path": m.path, "sha256": m.sha256, "kind": m.kind} for m in by_stage[maker]],
                "made": add(made[s] or {} for s in stages),
                "alone": add(made[s] or {} for s in stages if s not in shared),
                "shared": add(made[s] or {} for s in shared),
                "stages": stages,
                "shared_stages": shared,
                "unknown": [s for s in stages if made[s] is None],
            }
        )
    together = sorted({stage for entry in found for stage in behind[str(entry["stage"])]})
    return found, add(made[s] or {} for s in together)


# -- for people -----------------------------------------------------------------------------------


def lines(answer: Mapping[str, Any]) -> list[str]:
    """Returns the answer as lines for a terminal."""
    kinds = sorted({key for s in answer["stages"] for key in s["spent"] if key.startswith("energy_")})
    titles = ["time", "CPU", *(kind.removeprefix("energy_") for kind in kinds)]
    return [
        *_aligned(["stage", "executed", "failed", *titles, "restored", "saved", "kept"], _stage_rows(answer, kinds)),
        "",
        *_aligned(
            ["model, with all behind it", *titles, "alone", "shared with other models"], _model_rows(answer, kinds)
        ),
        "",
        *_notes(answer, kinds),
    ]


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a table whose first column is aligned left, the others right, except for a last one of names."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    last = len(head) - 1 if head[-1].startswith("shared") else None
    return [
        "  ".join(
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _stage_rows(answer: Mapping[str, Any], kinds: list[str]) -> list[list[str]]:
    total = {**answer["total"], "stage": "total"}
    return [
        [
            one["stage"],
            str(one["executions"]),
            str(one["failures"] or ""),
            *_cells(one["spent"], kinds),
            str(one["restored"] or ""),
            _seconds(one["saved"].get("seconds")) if one["restored"] else "",
            str(one["kept"] or ""),
        ]
        for one in [*answer["stages"], total]
    ]


def _model_rows(answer: Mapping[str, Any], kinds: list[str]) -> list[list[str]]:
    rows = []
    for model in answer["models"]:
        several = f"{model['stage']} ({len(model['models'])} models)"
        label = model["models"][0]["path"] if len(model["models"]) == 1 else several
        shared = ", ".join(model["shared_stages"])
        if model["unknown"]:
            shared += f" (without {', '.join(model['unknown'][:3])}: made elsewhere)"
        rows.append([label, *_cells(model["made"], kinds), _seconds(model["alone"].get("seconds")), shared])
    together = _cells(answer["total"]["models"], kinds)
    return [*rows, ["all of them, shared stages once", *together, "", ""]] if rows else []


def _notes(answer: Mapping[str, Any], kinds: list[str]) -> list[str]:
    total = answer["total"]
    if total["runs"]:
        saved, kept = (_seconds(total[name].get("seconds")) or "0s" for name in ("saved", "up_to_date"))
        found = [
            f"Recorded runs: {total['runs']}. Restored from the cache: {total['restored']} results, which saved "
            f"{saved}; in place and up to date: {total['kept']} (another {kept})."
        ]
    else:
        found = ["No run is recorded yet, so reuse is not known: `springhead run` records it, `dvc repro` does not."]
    if total["unknown_reuses"]:
        found.append(
            f"{total['unknown_reuses']} of these results were made elsewhere; what they took is not known here."
        )
    if total["failed"]:
        found.append(f"Failed attempts took {_seconds(total['failed'].get('seconds'))} of the time spent.")
    if kinds:
        found.append("Energy is that of the whole package or device, other processes included (docs/guide/cost.md).")
    else:
        found.append("Energy: no counter could be read (docs/guide/cost.md says which ones there are).")
    return found


def _cells(one: Mapping[str, float], kinds: list[str]) -> list[str]:
    joules = [_joules(one.get(kind)) for kind in kinds]
    return [_seconds(one.get("seconds")), _seconds(one.get("cpu_seconds")), *joules]


def _seconds(value: float | None) -> str:
    return "" if value is None else duration(value)


def _joules(value: float | None) -> str:
    if value is None:
        return ""
    if value < 360:
        return f"{value:.0f} J"
    return f"{value / 3600:.2f} Wh" if value < 3.6e6 else f"{value / 3.6e6:.2f} kWh"
