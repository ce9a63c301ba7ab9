"""Commands that decide: which model is the champion, and which data set later ones are compared with."""

from typing import Annotated

import typer

from springhead.cli.base import AsJson, app, print_json
from springhead.home import home, repository

Name = Annotated[str, typer.Argument(help="A registered model that mlflow/gates.yaml has gates for.")]


@app.command()
def promote(
    name: Name,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge, change nothing; list every gate.")] = False,
    challenger: Annotated[
        bool, typer.Option("--challenger", help="Set the alias challenger: the best that is not the champion.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Consider this candidate only: 8 digits of its digest or more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the best model that passes its gates the champion."""
    from springhead import registry

    root = repository()
    result = registry.promote(name, root, home(root), dry_run, challenger, model)
    if as_json:
        print_json(result.as_json())
        return
    if dry_run and result.judgement is not None:
        typer.echo(result.judgement.report(every=True))
    typer.echo(str(result))


@app.command()
def rollback(
    name: Name,
    to: Annotated[
        str | None,
        typer.Option("--to", help="The version; default is the newest earlier champion that nobody rolled back from."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the ledger.")] = "",
    as_json: AsJson = False,
) -> None:
    """Put the champion before this one back, after checking it."""
    from springhead import registry

    root = repository()
    result = registry.rollback(name, root, home(root), to, reason)
    print_json(result.as_json()) if as_json else typer.echo(str(result))


@app.command()
def accept(
    stage: Annotated[str, typer.Argument(help="The validate stage that judged the data: rl-validate@TASK.")],
    as_json: AsJson = False,
) -> None:
    """Accept a data set as what later ones are compared with.

    Their validation tests whether they drifted from it.
    """
    from springhead.acceptance import accept as take

    root = repository()
    found = take(stage, root, home(root))
    if as_json:
        print_json(found.as_json())
        return
    path = found.path.relative_to(root)
    if found.entry is None:
        typer.echo(f"{stage}: data {found.data_digest[:12]} are the accepted ones already")
        return
    typer.echo(f"accepted data {found.data_digest[:12]}: {path}, ledger entry {found.entry}")
    typer.echo(f"commit it: git add {path}; `dvc repro rl-validate` writes each drift.json anew, and trains nothing")
