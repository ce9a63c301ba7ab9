"""Errors that a user can act on.

Every message names the file, key or id that is wrong and says what to do. The command line
prints the message alone; a traceback is shown only with ``--debug``.
"""

import sys
from collections.abc import Callable


class SpringheadError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 2


class BadInput(SpringheadError):
    """A parameter, file or data set cannot be used as it is."""


class Finding(SpringheadError):
    """A check came out red: a failed verdict, a closed gate, an audit with findings."""

    exit_code = 1


def exit_code_of(command: Callable[[], object]) -> int:
    """Runs a command of its own module and returns its exit code; an error to act on is printed, without traceback."""
    try:
        command()
    except SpringheadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
