"""Commands about where data and models come from, and whether the records of it hold."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from springhead.cli.base import AsJson, app, print_json, print_rich
from springhead.errors import BadInput
from springhead.home import repository


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

        typer.echo(f"page: {write_page(repository(), ref, html, scan)}")
        return
    if rows:
        ids = query.rows_of(repository(), ref)
        print_json(ids) if as_json else typer.echo("\n".join(ids))
        return
    answer = query.lineage(repository(), ref, scan)
    if as_json:
        print_json(answer)
        return
    from springhead.lineage.tree import render

    print_rich(render(answer))


@app.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(help="REVISION:PATH, such as HEAD~1:data/rl/filter/BallCircle, a path, digest or model."),
    ],
    b: Annotated[str, typer.Argument(help="What to compare with, in the same forms.")],
    as_json: AsJson = False,
) -> None:
    """Compare two data sets by rows, rules and spread.

    A model stands for the data it was trained on. Rows that only one side has are listed by the rule of the other
    side that dropped or changed them, or by the producer that the other side lacks. Exit code 0 with or without
    differences.
    """
    from springhead.lineage.diff import diff as compare

    answer = compare(repository(), a, b)
    if as_json:
        print_json(answer)
        return
    from springhead.lineage.difftext import render

    print_rich(render(answer))


@app.command()
def audit(
    deep: Annotated[bool, typer.Option("--deep", help="Also hash every object in DVC's cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute every digest and compare all records."""
    from springhead.lineage.audit import audit as examine
    from springhead.lineage.workspace import RED

    result = examine(repository(), deep, _counter())
    if as_json:
        print_json(result.as_json())
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

    result = mend(repository(), (lambda line: None) if as_json else typer.echo, execute)
    left = [problem for problem in result.left.problems if problem.severity == RED]
    if as_json:
        print_json({"done": result.done, "left": result.left.as_json()})
    else:
        for problem in left:
            typer.secho(f"still red: {problem.where} {problem.what}", fg="red")
            typer.echo(f"        do: {problem.do}")
        typer.echo(
            "nothing to mend" if not result.done and not left else f"{len(result.done)} steps, {len(left)} still red"
        )
    if left:
        raise typer.Exit(1)


@app.command("verify-repro")
def verify_repro(
    stages: Annotated[
        list[str] | None,
        typer.Argument(help="Stages, such as rl-collect@BallCircle, or rl-collect for all its items; default all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Execute stages again in a clean worktree, and compare.

    Every byte of every output must be the same.
    """
    from springhead.lineage.reproduce import verify

    result = verify(repository(), stages or (), lambda line: typer.echo(line, err=True))
    if as_json:
        print_json(result.as_json())
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
    """Write OpenLineage events, Croissant files or cards.

    Cards are of data sets or of models.
    """
    from springhead.export.documents import export as make

    typer.echo(make(repository(), kind, ref, out, url))
