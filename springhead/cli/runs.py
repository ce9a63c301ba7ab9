"""Commands about the stages: run them, and say what state they are in and what they cost."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from springhead.cli.base import AsJson, app, debugging, print_json
from springhead.home import home, repository


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    short_help="Run what is not up to date, promote and report.",
)
def run(ctx: typer.Context) -> None:
    """Hands over to ``python -m pipelines.run``, which knows the options."""
    arguments = [sys.executable, "-m", "pipelines.run", *ctx.args, *(["--debug"] if debugging() else [])]
    if not {"-h", "--help"} & set(ctx.args):
        os.chdir(repository())
    sys.stdout.flush()
    os.execv(sys.executable, arguments)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show each stage's state, the champions, and what waits."""
    from springhead.lineage.status import status as collect

    root = repository()
    state = collect(root, home(root))
    if as_json:
        print_json(state)
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


@app.command()
def why(
    stage: Annotated[str, typer.Argument(help="A stage such as rl-collect@BallCircle.")], as_json: AsJson = False
) -> None:
    """Say why a stage will run again."""
    from springhead.lineage.why import why as compare

    changes = compare(repository(), stage)
    if as_json:
        print_json([{"kind": c.kind, "name": c.name, "what": c.what, "runs": c.runs} for c in changes])
        return
    for change in changes:
        typer.echo(f"{change.kind:<10}{change.name}: {change.what}")
    if not any(change.runs for change in changes):
        typer.echo(f"{stage} is up to date")


@app.command()
def cost(
    ref: Annotated[
        str | None, typer.Argument(help="A model, data set, stage or digest, as for lineage (default: everything).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show seconds, CPU and energy spent, and saved by the cache."""
    from springhead.lineage import cost as accounts

    answer = accounts.cost(repository(), ref)
    print_json(answer) if as_json else typer.echo("\n".join(accounts.lines(answer)))


@app.command()
def report(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to (default: report/).")] = None,
) -> None:
    """Write the static HTML report."""
    from springhead.report import build

    root = repository()
    typer.echo(f"report: {build(root, home(root), out)}")


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended without losing or signing anything.")
    ] = False,
    sign_ledger: Annotated[
        bool, typer.Option("--sign-ledger", help="List the entries of the ledger that are not signed, and sign them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check environment and checkout, and say what to do."""
    from springhead import doctor as physician

    root = repository()
    symptoms = physician.examine(root)
    if fix:
        for symptom in (s for s in symptoms if s.mend is not None):
            assert symptom.mend is not None
            symptom.mend()
            typer.echo(f"mended: {symptom.what}")
        symptoms = physician.examine(root)
    if sign_ledger:
        physician.sign_ledger(root, lambda line: typer.echo(line, err=as_json))
        symptoms = physician.examine(root)
    if as_json:
        print_json([{"check": s.check, "severity": s.severity, "what": s.what, "do": s.do} for s in symptoms])
    else:
        colours = {physician.GOOD: "green", physician.WARNING: "yellow", physician.RED: "red"}
        for symptom in symptoms:
            typer.secho(f"{symptom.severity:<8}", fg=colours[symptom.severity], nl=False)
            typer.echo(f"{symptom.check:<10}{symptom.what}" + (f"\n{'':18}do: {symptom.do}" if symptom.do else ""))
    if any(symptom.severity == physician.RED for symptom in symptoms):
        raise typer.Exit(1)


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
