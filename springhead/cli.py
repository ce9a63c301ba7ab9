"""The command ``springhead``.

Imports of anything heavy are inside the commands, so that ``--help`` answers at once. Exit codes:
0 good, 1 a finding, 2 usage or bad input, 70 a fault of ours.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from springhead.errors import BadInput, SpringheadError

_INTERNAL_ERROR = 70
_DEBUG = "SPRINGHEAD_DEBUG"


class _Group(TyperGroup):
    """Prints our errors as one line, and accepts ``--debug`` anywhere on the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            os.environ[_DEBUG] = "1"
            args = [arg for arg in args if arg != "--debug"]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SpringheadError as error:
            _trace()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):
                raise
            _trace()
            hint = "" if _debug() else "; --debug shows where"
            typer.echo(f"internal error: {type(error).__name__}: {error}{hint}", err=True)
            raise typer.Exit(_INTERNAL_ERROR) from None


def _debug() -> bool:
    return os.environ.get(_DEBUG) == "1"


def _trace() -> None:
    if _debug():
        traceback.print_exc()


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Data-centric pipelines whose every model can be traced to its source.",
    epilog="--debug shows tracebacks. dvc, prefect and mlflow work beside this command as their users expect.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _root() -> Path:
    from springhead.home import repository

    return repository()


def _home(root: Path) -> Path:
    from springhead.home import home

    return home(root)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True))


def _print(renderable: Any) -> None:
    from rich.console import Console

    # Without a terminal a narrow default would cut paths in the middle of a log line.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=False).print(renderable)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    short_help="Run what is not up to date, promote and report.",
)
def run(ctx: typer.Context) -> None:
    """Hands over to ``python -m pipelines.run``, which knows the options."""
    arguments = [sys.executable, "-m", "pipelines.run", *ctx.args, *(["--debug"] if _debug() else [])]
    if not {"-h", "--help"} & set(ctx.args):
        os.chdir(_root())
    sys.stdout.flush()
    os.execv(sys.executable, arguments)


@app.command()
def lineage(
    ref: Annotated[
        str,
        typer.Argument(help="models:/NAME@champion, NAME/VERSION, a path, a stage, a digest (8+ digits) or row:ID."),
    ],
    as_json: AsJson = False,
    rows: Annotated[bool, typer.Option("--rows", help="List the ids of all rows behind it, one per line.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page with the graph.")
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Read every row table whole; use no index.")] = False,
) -> None:
    """Show everything behind a model, or what became of a row."""
    from springhead.lineage import query

    if html is not None:
        if rows or as_json:
            raise BadInput("--html: goes with neither --json nor --rows; give one of them")
        from springhead.lineage.page import write_page

        typer.echo(f"page: {write_page(_root(), ref, html, scan)}")
        return
    if rows:
        ids = query.rows_of(_root(), ref)
        _print_json(ids) if as_json else typer.echo("\n".join(ids))
        return
    answer = query.lineage(_root(), ref, scan)
    if as_json:
        _print_json(answer)
        return
    from springhead.lineage.tree import render

    _print(render(answer))


@app.command()
def audit(
    deep: Annotated[bool, typer.Option("--deep", help="Also hash every object in DVC's cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute every digest and compare all records."""
    from springhead.lineage.audit import audit as examine
    from springhead.lineage.workspace import RED

    result = examine(_root(), deep, _counter())
    if as_json:
        _print_json(result.as_json())
    else:
        for problem in result.problems:
            colour = "red" if problem.severity == RED else "yellow"
            typer.secho(f"{problem.severity:<8}{problem.where}", fg=colour, bold=True)
            typer.echo(f"        {problem.what}")
            if problem.affects:
                rest = f" and {len(problem.affects) - 3} more" if len(problem.affects) > 3 else ""
                typer.echo(f"        affects {', '.join(problem.affects[:3])}{rest}")
            typer.echo(f"        do: {problem.do}")
        counts = ", ".join(f"{number} {check}" for check, number in sorted(result.checked.items()))
        typer.echo(f"checked {counts}")
        red = sum(problem.severity == RED for problem in result.problems)
        state = f"{red} red, {len(result.problems) - red} warnings"
        typer.secho(f"audit: {state}" if result.problems else "audit: green", fg="red" if red else "green", bold=True)
    if result.red:
        raise typer.Exit(1)


def _counter() -> Any:
    """Returns a progress callback for a terminal; logs need no line per file."""
    if not sys.stderr.isatty():
        return None
    from springhead.progress import Progress

    bar: list[Progress] = []

    def advance(done: int, total: int) -> None:
        if not bar:
            bar.append(Progress(total, "hashing", "files"))
        bar[0].advance(1)

    return advance


@app.command()
def repair(
    execute: Annotated[
        bool, typer.Option("--execute/--no-execute", help="Execute stages whose output is lost.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Mend what the audit finds: files, cache objects, aliases."""
    from springhead.lineage.repair import repair as mend
    from springhead.lineage.workspace import RED

    result = mend(_root(), (lambda line: None) if as_json else typer.echo, execute)
    left = [problem for problem in result.left.problems if problem.severity == RED]
    if as_json:
        _print_json({"done": result.done, "left": result.left.as_json()})
    else:
        for problem in left:
            typer.secho(f"still red: {problem.where} {problem.what}", fg="red")
            typer.echo(f"        do: {problem.do}")
        typer.echo(
            "nothing to mend" if not result.done and not left else f"{len(result.done)} steps, {len(left)} still red"
        )
    if left:
        raise typer.Exit(1)


Name = Annotated[str, typer.Argument(help="A registered model that mlflow/gates.yaml has gates for.")]


@app.command()
def promote(
    name: Name,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge, change nothing; list every gate.")] = False,
    challenger: Annotated[
        bool, typer.Option("--challenger", help="Set the alias challenger: the best that is not the champion.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Consider this candidate only: digits of its digest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the best model that passes its gates the champion."""
    from springhead import registry

    root = _root()
    result = registry.promote(name, root, _home(root), dry_run, challenger, model)
    if as_json:
        _print_json(result.as_json())
        return
    if dry_run and result.judgement is not None:
        typer.echo(result.judgement.report(every=True))
    typer.echo(str(result))


@app.command()
def accept(
    stage: Annotated[str, typer.Argument(help="The validate stage that judged the data: rl-validate@TASK.")],
    as_json: AsJson = False,
) -> None:
    """Accept a data set: later ones are compared with it for drift."""
    from springhead.acceptance import accept as take

    root = _root()
    found = take(stage, root, _home(root))
    if as_json:
        _print_json(found.as_json())
        return
    path = found.path.relative_to(root)
    if found.entry is None:
        typer.echo(f"{stage}: data {found.data_digest[:12]} are the accepted ones already")
        return
    typer.echo(f"accepted data {found.data_digest[:12]}: {path}, ledger entry {found.entry}")
    typer.echo(f"commit it: git add {path}; `dvc repro rl-validate` writes each drift.json anew, and trains nothing")


@app.command()
def rollback(
    name: Name,
    to: Annotated[
        str | None, typer.Option("--to", help="The version; default is the champion before this one.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the ledger.")] = "",
    as_json: AsJson = False,
) -> None:
    """Put the champion before this one back, after checking it."""
    from springhead import registry

    root = _root()
    result = registry.rollback(name, root, _home(root), to, reason)
    _print_json(result.as_json()) if as_json else typer.echo(str(result))


@app.command()
def report(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to (default: report/).")] = None,
) -> None:
    """Write the static HTML report."""
    from springhead.report import build

    root = _root()
    typer.echo(f"report: {build(root, _home(root), out)}")


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended without losing anything.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check environment and checkout, and say what to do."""
    from springhead import doctor as physician

    root = _root()
    symptoms = physician.examine(root)
    if fix:
        for symptom in (s for s in symptoms if s.mend is not None):
            assert symptom.mend is not None
            symptom.mend()
            typer.echo(f"mended: {symptom.what}")
        symptoms = physician.examine(root)
    if as_json:
        _print_json([{"check": s.check, "severity": s.severity, "what": s.what, "do": s.do} for s in symptoms])
    else:
        colours = {physician.GOOD: "green", physician.WARNING: "yellow", physician.RED: "red"}
        for symptom in symptoms:
            typer.secho(f"{symptom.severity:<8}", fg=colours[symptom.severity], nl=False)
            typer.echo(f"{symptom.check:<10}{symptom.what}" + (f"\n{'':18}do: {symptom.do}" if symptom.do else ""))
    if any(symptom.severity == physician.RED for symptom in symptoms):
        raise typer.Exit(1)


@app.command()
def tasks(
    check: Annotated[
        list[str] | None,
        typer.Option("--check", metavar="NAME", help="Step this task, seeded, and say whether it keeps its word."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Most steps of an episode that --check runs.")] = 200,
    as_json: AsJson = False,
) -> None:
    """List the safe-RL tasks, or check some of them."""
    from springhead.rl.tasks import TASKS, task

    if check:
        _check_tasks([task(name).name for name in check], steps, as_json)
        return
    if as_json:
        _print_json({name: asdict(known) for name, known in TASKS.items()})
        return
    from springhead.params import read_params
    from springhead.rl.task_table import text_lines

    used = read_params(_root() / "params.yaml").get("rl", {}).get("tasks", [])
    for line in text_lines(used):
        typer.secho(line, bold=not line.startswith(" "))


def _check_tasks(names: list[str], steps: int, as_json: bool) -> None:
    from springhead.rl.conduct import check

    found = {}
    for name in names:
        seen = found[name] = check(name, steps)
        if not as_json:
            parts = "".join(f", {part} {value:g}" for part, value in seen.sub_costs.items())
            typer.echo(
                f"{name}: good; {seen.steps} steps, {seen.ended}, return {seen.episode_return:.3g}, "
                f"cost {seen.episode_cost:.3g}{parts}; {seen.steps_per_second:.0f} steps/s, "
                f"reset {1000 * seen.reset_seconds:.1f} ms"
            )
    if as_json:
        _print_json({name: asdict(seen) for name, seen in found.items()})


@app.command("import-check")
def import_check(
    path: Annotated[Path, typer.Argument(help="An HDF5 file of DSRL's or D4RL's kind, or a Minari data set's folder.")],
    task: Annotated[str, typer.Option("--task", help="The task it is held to.")],
    cost: Annotated[
        str | None, typer.Option("--cost", help="Where the costs are: an array, or a key of Minari's infos.")
    ] = None,
    horizon: Annotated[
        bool, typer.Option("--horizon", help="End episodes after the task's horizon: for files without time-outs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at data of others, and print the entry that imports it."""
    from springhead.rl import import_check as checker
    from springhead.rl.tasks import task as task_named

    of = task_named(task)
    found = checker.summary(path, checker.settings_for(path, cost, "horizon" if horizon else "file"), of)
    if as_json:
        _print_json(found)
        return
    typer.echo(f"{path}: {found['format']}, sha256 {found['sha256']}")
    typer.echo(f"{found['episodes']} episodes of {of.name}, {found['steps']} steps")
    for name, (low, high) in found["ranges"].items():
        typer.echo(f"    {name:<12}{low:g} to {high:g}")
    if found["quirks"]:
        typer.echo(f"read as they are: {', '.join(found['quirks'])}")
    if found["steps_cut"]:
        typer.echo(f"{found['steps_cut']} last steps cut: the file lacks their successors")
    for rule, out in found["left_out"].items():
        typer.echo(f"left out by {rule}: {out['episodes']}; {out['first']}")
    typer.echo(f"for rl.imports.sources in params.yaml:\n  {found['params']}")


@app.command()
def algorithms(as_json: AsJson = False) -> None:
    """List algorithms and methods with their papers."""
    found = _algorithms(Path(__file__).parent)
    if as_json:
        _print_json(found)
        return
    for entry in found:
        typer.secho(entry["title"], bold=True)
        typer.echo(f"    {entry['source']}\n    {entry['file']}")


def _algorithms(package: Path) -> list[dict[str, str]]:
    """Returns the modules whose header names a source, read without importing them."""
    import ast

    found = []
    for folder in ("rl/online", "rl/offline", "llm"):
        for path in sorted((package / folder).glob("*.py")):
            header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            title, _, rest = header.partition("\n")
            paragraphs = [" ".join(part.split()) for part in rest.split("\n\n")]
            source = next((p for p in paragraphs if p.startswith(("Source", "Paper"))), "")
            if source:
                file = f"springhead/{folder}/{path.name}"
                found.append({"file": file, "title": title.rstrip("."), "source": source})
    return found


@app.command()
def why(
    stage: Annotated[str, typer.Argument(help="A stage such as rl-collect@BallCircle.")], as_json: AsJson = False
) -> None:
    """Say why a stage will run again."""
    from springhead.lineage.why import why as compare

    changes = compare(_root(), stage)
    if as_json:
        _print_json([{"kind": c.kind, "name": c.name, "what": c.what, "runs": c.runs} for c in changes])
        return
    for change in changes:
        typer.echo(f"{change.kind:<10}{change.name}: {change.what}")
    if not any(change.runs for change in changes):
        typer.echo(f"{stage} is up to date")


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show each stage's state, the champions, and what waits."""
    from springhead.lineage.status import status as collect

    root = _root()
    state = collect(root, _home(root))
    if as_json:
        _print_json(state)
        return
    width = max((len(row["stage"]) for row in state["stages"]), default=0)
    colours = {"up to date": "green", "changed": "yellow"}
    for row in state["stages"]:
        typer.echo(f"{row['stage']:<{width}}  ", nl=False)
        typer.secho(f"{row['state']:<11}", fg=colours.get(row["state"]), nl=False)
        typer.echo(f"{row['ran']:<21}{row['why']}")
    for champion in state["champions"]:
        typer.echo(f"champion {champion['model']}/{champion['version']}  {champion['digest'][:12]}")
    typer.echo(f"ledger {state['ledger']} entries; {state['waiting']} executions wait for MLflow")


@app.command("verify-repro")
def verify_repro(
    stages: Annotated[
        list[str] | None,
        typer.Argument(help="Stages, such as rl-collect@BallCircle, or rl-collect for all its items; default all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Execute stages again in a clean worktree and compare every byte."""
    from springhead.lineage.reproduce import verify

    result = verify(_root(), stages or (), lambda line: typer.echo(line, err=True))
    if as_json:
        _print_json(result.as_json())
    else:
        colours = {"equal": "green", "differs": "red", "failed": "red"}
        for outcome in result.outcomes:
            typer.secho(f"{outcome.state:<8}", fg=colours[outcome.state], nl=False)
            typer.echo(outcome.stage)
            for difference in outcome.differences:
                typer.echo(f"        {difference.path}" + (f": {difference.what}" if difference.what else ""))
            if outcome.error:
                typer.echo("\n".join(f"        {line}" for line in outcome.error.splitlines()))
        equal = sum(outcome.state == "equal" for outcome in result.outcomes)
        typer.echo(f"{len(result.outcomes)} stages executed again, {equal} equal")
        if result.first is not None:
            stage, difference = result.first
            typer.secho(f"first difference: {difference.path} of {stage}, {difference.what}", fg="red", bold=True)
    if not result.equal:
        raise typer.Exit(1)


@app.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(help="REVISION:PATH, such as HEAD~1:data/rl/filter/BallCircle, a path, digest or model."),
    ],
    b: Annotated[str, typer.Argument(help="What to compare with, in the same forms.")],
    as_json: AsJson = False,
) -> None:
    """Compare two data sets: rows by rule, distributions, receipts.

    A model stands for the data it was trained on. Rows that only one side has are listed by the rule of the other
    side that dropped or changed them, or by the producer that the other side lacks. Exit code 0 with or without
    differences.
    """
    from springhead.lineage.diff import diff as compare

    answer = compare(_root(), a, b)
    if as_json:
        _print_json(answer)
        return
    from springhead.lineage.difftext import render

    _print(render(answer))


@app.command()
def cost(
    ref: Annotated[
        str | None, typer.Argument(help="A model, data set, stage or digest, as for lineage (default: everything).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show seconds, CPU and energy spent, and saved by the cache."""
    from springhead.lineage import cost as accounts

    answer = accounts.cost(_root(), ref)
    _print_json(answer) if as_json else typer.echo("\n".join(accounts.lines(answer)))


@app.command()
def export(
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help="openlineage, croissant, data-card or model-card.")],
    ref: Annotated[
        str | None,
        typer.Argument(help="What it is about, as for lineage (default: all executions, data sets or champions)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A file, or a folder for several documents (default: print).")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="openlineage: server for the events; croissant: where the data is published."),
    ] = None,
) -> None:
    """Write OpenLineage events, Croissant descriptions, data cards or model cards."""
    from springhead.export.documents import export as make

    typer.echo(make(_root(), kind, ref, out, url))


@app.command("merge-lock")
def merge_lock(
    base: Annotated[Path, typer.Argument(help="The common ancestor; git's %O.")],
    ours: Annotated[Path, typer.Argument(help="This branch's version, which takes the result; git's %A.")],
    theirs: Annotated[Path, typer.Argument(help="The other branch's version; git's %B.")],
) -> None:
    """Merge dvc.lock stage by stage: a merge driver for git."""
    from springhead.lineage.mergelock import merge

    for stage in merge(base, ours, theirs):
        typer.echo(f"{stage}: both branches ran it; `dvc repro` decides", err=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="springhead")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
