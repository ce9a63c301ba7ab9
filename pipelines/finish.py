"""What follows the stages: tracking, promotion, the report, and the table that says so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.execution import Outcome
from pipelines.session import Request, Result
from springhead.errors import Finding, SpringheadError
from springhead.keys import Keys
from springhead.lineage.digests import file_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path
from springhead.progress import duration

Say = Callable[[str], None]


@dataclass
class Conclusion:
    """How a run ended, in words.

    Attributes:
        outcomes: how each stage ended.
        seconds: what the stages and everything around them took.
        champions: registered model name to what promotion said of it.
        closed: registered model name to the reason its gate stayed closed, or why it could not be judged.
        notes: what the user should know beside that.
        places: what there is to look at: a label to a path or a command.
    """

    outcomes: Mapping[str, Outcome]
    seconds: float
    champions: dict[str, str] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def counts(self) -> str:
        """Returns the line of counts, ``stages: 3 executed, 2 cached, 9 up to date``."""
        states = [outcome.state for outcome in self.outcomes.values()]
        parts = [f"{states.count('executed')} executed"]
        parts += [f"{states.count(state)} {state}" for state in ("cached", "failed", "skipped") if state in states]
        parts.append(f"{states.count('up to date')} up to date")
        return f"stages: {', '.join(parts)}"

    def table(self) -> list[str]:
        """Returns the summary as lines for the terminal."""
        rows = [o for o in self.outcomes.values() if o.state != "up to date"]
        width = max((len(o.stage) for o in rows), default=0)
        lines = [""]
        for o in rows:
            why = f"  {o.error}" if o.state == "skipped" else ""
            lines.append(f"  {o.stage:<{width}}  {o.state:<8}  {duration(o.seconds) if o.seconds else '':>6}{why}")
        lines.append(f"{self.counts()} ({duration(self.seconds)})")
        lines += [f"champion {name}: {what}" for name, what in self.champions.items()]
        lines += [f"gate closed for {name}: {why}" for name, why in self.closed.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.places:
            label = max(len(name) for name in self.places)
            lines += ["where to look:", *(f"  {name:<{label}}  {where}" for name, where in self.places.items())]
        return lines

    def markdown(self) -> str:
        """Returns the summary for Prefect's UI."""
        rows = [f"| {o.stage} | {o.state} | {duration(o.seconds)} |" for o in self.outcomes.values()]
        lines = [f"**{self.counts()}**", "", "| stage | state | time |", "|---|---|---|", *rows, ""]
        lines += [f"- champion `{name}`: {what}" for name, what in self.champions.items()]
        lines += [f"- gate closed for `{name}`: {why}" for name, why in self.closed.items()]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def raise_if_red(conclusion: Conclusion) -> None:
    """Turns a failed stage or a closed gate into the error that decides the exit status.

    Raises:
        Finding: naming each failed stage with the end of its output, or each closed gate.
    """
    failed = [o for o in conclusion.outcomes.values() if o.state == "failed"]
    if failed:
        raise Finding("\n".join(f"stage {o.stage} failed:\n{o.error}" for o in failed))
    if conclusion.closed:
        raise Finding(f"not promoted: {', '.join(conclusion.closed)}")


def conclude(result: Result, root: Path, home: Path, request: Request, promote: bool, say: Say) -> Conclusion:
    """Does what follows the stages.

    Tracking is brought up to date in every case. The report follows a whole run, and says what
    failed; promotion follows only one in which no stage failed.

    Args:
        result: what the run did.
        root: the checkout.
        home: the state folder.
        request: what was asked for.
        promote: whether to promote.
        say: takes progress lines.
    """
    conclusion = Conclusion(result.outcomes, result.seconds, notes=list(result.notes))
    _record(result, root, home)
    _track(home, conclusion)
    if result.of("failed"):
        logs = home / "runs" / result.run / "logs"
        conclusion.places["logs of the stages"] = _show(logs, root)
        if not request.targets:
            _report_failure(result.place, home, root, conclusion)
        return conclusion
    if request.targets:
        conclusion.notes.append("a run with --target promotes nothing and builds no report")
        return conclusion
    if promote and (result.place / "mlflow" / "gates.yaml").is_file():
        _promote(result.place, home, conclusion, say)
    # What closes a gate, such as an evaluation that cannot be read, may be in the way of the report as well.
    (_report_failure if conclusion.closed else _report)(result.place, home, root, conclusion)
    for name in conclusion.champions:
        conclusion.places[f"history of {name}"] = f"springhead lineage models:/{name}@champion"
    _point_out(result.place, home, root, conclusion)
    return conclusion


def _record(result: Result, root: Path, home: Path) -> None:
    """Writes into the ledger what the run executed and what it used again.

    A result that was used again is named by its receipt, which leads to the execution that made
    it: `springhead cost` counts from that what the cache saved.
    """
    body: dict[str, object] = {"run": result.run, "seconds": round(result.seconds, 3)}
    body |= {state: [o.stage for o in result.of(state)] for state in ("executed", "failed", "skipped")}
    for state, name in (("cached", "cached"), ("up to date", "up_to_date")):
        receipts = {o.stage: receipt_path(result.place, o.stage) for o in result.of(state)}
        body[name] = {stage: file_digest(path) for stage, path in receipts.items() if path.is_file()}
    Ledger(home).append("run", body, Keys.of(root, home))


def _track(home: Path, conclusion: Conclusion) -> None:
    from springhead import tracking

    if not any((home / "spool").glob("*.jsonl*")):  # importing MLflow takes seconds
        return
    report = tracking.replay(home)
    if not report.ok:
        conclusion.notes.append("MLflow could not be reached; the next run sends what it missed")


def _promote(place: Path, home: Path, conclusion: Conclusion, say: Say) -> None:
    from springhead import registry

    try:
        names = registry.promotable(place)
        examined = registry.examine(place) if names else None
    except SpringheadError as error:
        conclusion.closed["every model"] = str(error)
        return
    for name in names:
        say(f"promotion of {name}")
        try:
            conclusion.champions[name] = str(registry.promote(name, root=place, home=home, audited=examined))
        except SpringheadError as error:  # one evaluation that cannot be read says nothing about the other models
            conclusion.closed[name] = str(error)


def _report(place: Path, home: Path, root: Path, conclusion: Conclusion) -> None:
    if not (place / "data" / "receipts").is_dir():
        return
    from springhead import report

    page = report.build(place, home, None if place == root else place / "report")
    conclusion.places["report"] = _show(page, root)


def _report_failure(place: Path, home: Path, root: Path, conclusion: Conclusion) -> None:
    """Writes the report of a red run: an earlier page would go on showing that all is well."""
    try:
        _report(place, home, root, conclusion)
    except (SpringheadError, OSError) as error:  # the failure of the stage or the gate is what matters
        conclusion.notes.append(f"the report could not be written: {error}")


def _point_out(place: Path, home: Path, root: Path, conclusion: Conclusion) -> None:
    docs = sorted(p.parent for p in (place / "data").glob("*/validate/**/data_docs/index.html"))
    if docs:
        conclusion.places["validation"] = _show(docs[0] / "index.html", root)
    if (home / "mlflow.db").is_file():
        store = f"sqlite:///{_show(home / 'mlflow.db', root)}"
        conclusion.places["experiments"] = f"mlflow ui --backend-store-uri {store}"
    conclusion.places["metrics"] = (
        "dvc metrics show" if place == root else f"cd {_show(place, root)} && dvc metrics show"
    )


def _show(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
