"""The command ``python -m pipelines.run``, which is also ``springhead run``.

Runs the Prefect flow over the DVC graph in this process. Without ``PREFECT_API_URL`` Prefect
starts a server of its own for the time of the run, in the state folder of the checkout.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from springhead import output
from springhead.errors import BadInput, SpringheadError
from springhead.home import home as state_folder
from springhead.home import repository

if TYPE_CHECKING:
    from pipelines.session import Request, Result

_INTERNAL_ERROR = 70


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="springhead run",
        description="Brings every stage up to date, promotes what passes its gate and builds the report.",
        epilog="Exit status: 0 good, 1 a stage failed or a gate is closed, 2 bad input, 70 a fault of ours.",
    )
    made.add_argument("--workers", type=int, metavar="N", help="stages at once (default: 2, on one core 1)")
    made.add_argument("--profile", metavar="NAME", help="overlay on params.yaml: smoke, quick (as it is), paper")
    made.add_argument(
        "--target", action="append", metavar="STAGE", help="only this stage and what it needs; may be repeated"
    )
    made.add_argument(
        "--set", action="append", dest="settings", metavar="KEY=VALUE", help="overlay on params.yaml; may be repeated"
    )
    made.add_argument("--no-promote", action="store_true", help="leave the registry as it is")
    made.add_argument("--wait", action="store_true", help="wait for another run of this checkout to end")
    made.add_argument("--debug", action="store_true", help="show tracebacks and Prefect's own log")
    return made


def prepare_environment(home: Path, debug: bool = False) -> None:
    """Sets what Prefect reads when it is imported. What the user has set is left alone.

    Args:
        home: the state folder; Prefect's database goes below it.
        debug: whether Prefect's own log is shown on the terminal.
    """
    defaults = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # 10 s at rest, over 100 on a busy machine
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_LOGGING_TO_API_MAX_LOG_SIZE": "100000",
    }
    if not debug:
        defaults["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"  # we print ourselves
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        return _guarded(argv)
    finally:
        # A run goes on where nobody reads its lines any more: what it makes is worth more than they are.
        output.flush()


def _guarded(argv: Sequence[str] | None) -> int:
    """Turns errors into a line and an exit status."""
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments)
    except SpringheadError as error:
        if arguments.debug:
            traceback.print_exc()
        output.say(f"error: {error}", sys.stderr)
        return error.exit_code
    except Exception as error:
        if arguments.debug:
            raise
        output.say(f"internal error: {type(error).__name__}: {error}; --debug shows where", sys.stderr)
        return _INTERNAL_ERROR
    except KeyboardInterrupt:
        output.say("stopped; finished stages are in the cache, training resumes from its checkpoints", sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from pipelines.session import Request, check_targets, exclusive, nothing_to_do

    if arguments.workers is not None and arguments.workers < 1:
        raise BadInput(f"--workers {arguments.workers}: expected 1 or more")
    root = repository()
    home = state_folder(root)
    os.chdir(root)
    targets, settings = tuple(arguments.target or ()), tuple(arguments.settings or ())
    request = Request(arguments.workers or 1, arguments.profile, targets, settings)
    check_targets(root, home, request)
    with exclusive(root, home, arguments.wait):
        done = nothing_to_do(root, request)  # finds wrong arguments too, before Prefect takes its time
        if done is not None:
            _finish(done, root, home, request, not arguments.no_promote)
            return 0
    os.environ["SPRINGHEAD_TERMINAL"] = "1"
    prepare_environment(home, arguments.debug)
    if "PREFECT_API_URL" not in os.environ:
        output.say("starting Prefect (about 10 s, the first time 30 s)")
    from pipelines.flow import pipeline

    try:
        state = pipeline(
            workers=arguments.workers,
            profile=arguments.profile,
            target=arguments.target,
            settings=arguments.settings,
            promote=not arguments.no_promote,
            wait=arguments.wait,
            return_state=True,
        )
    except RuntimeError as error:  # the flow's own errors are in the state
        raise BadInput(f"Prefect: {error} Try again, or use `dvc repro`, which needs no server") from error
    state.result()  # raises what the flow raised
    return 0


def _finish(done: "Result", root: Path, home: Path, request: "Request", promote: bool) -> None:
    """Concludes a run in which every stage is up to date, so that Prefect has nothing to do."""
    from pipelines.finish import conclude, raise_if_red

    conclusion = conclude(done, root, home, request, promote, output.say)
    output.say("\n".join(conclusion.table()))
    raise_if_red(conclusion)


if __name__ == "__main__":
    raise SystemExit(main())
