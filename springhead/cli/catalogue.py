"""Commands about tasks, algorithms and data of others."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from springhead.cli.base import AsJson, app, print_json
from springhead.home import repository


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
        print_json({name: asdict(known) for name, known in TASKS.items()})
        return
    from springhead.params import read_params
    from springhead.rl.task_table import text_lines

    used = read_params(repository() / "params.yaml").get("rl", {}).get("tasks", [])
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
        print_json({name: asdict(seen) for name, seen in found.items()})


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
        print_json(found)
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
    found = algorithms_of(Path(__file__).parent.parent)
    if as_json:
        print_json(found)
        return
    for entry in found:
        typer.secho(entry["title"], bold=True)
        typer.echo(f"    {entry['source']}\n    {entry['file']}")


def algorithms_of(package: Path) -> list[dict[str, str]]:
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
