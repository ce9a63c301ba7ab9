"""What all commands share: the program they are registered with, its errors, and ways to print."""

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from springhead import __version__, output
from springhead.errors import SpringheadError

_INTERNAL_ERROR = 70
_DEBUG = "SPRINGHEAD_DEBUG"


class _Group(TyperGroup):
    """Prints our errors as one line, and accepts ``--debug`` anywhere on the command line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _ends_quietly():  # --help prints here
            return super().make_context(*args, **kwargs)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            os.environ[_DEBUG] = "1"
            args = [arg for arg in args if arg != "--debug"]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        try:
            with _ends_quietly():
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
            hint = "" if debugging() else "; --debug shows where"
            typer.echo(f"internal error: {type(error).__name__}: {error}{hint}", err=True)
            raise typer.Exit(_INTERNAL_ERROR) from None


@contextmanager
def _ends_quietly() -> Iterator[None]:
    """Ends the program where nobody reads what it prints; a pipe of another kind that broke is an error like others."""
    try:
        yield
    except BrokenPipeError:
        if not output.reader_gone():
            raise
        output.silence()
        raise typer.Exit(output.ENDED) from None


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(_DEBUG) == "1"


def _trace() -> None:
    if debugging():
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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"springhead {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(value: Any) -> None:
    """Prints a value as JSON."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True))


def print_rich(renderable: Any) -> None:
    """Prints a tree or a table of Rich's."""
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise

    # Without a terminal a narrow default would cut paths in the middle of a log line.
    Ours(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=False).print(renderable)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    code = 0
    try:
        app(args=list(argv) if argv is not None else None, prog_name="springhead")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code if output.flush() else output.ENDED
