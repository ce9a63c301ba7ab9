"""Output whose reader has gone, as in ``springhead tasks | head``: the program says nothing and ends.

Python turns the write into a ``BrokenPipeError`` and tries to write the rest once more at exit. The signal that ends
other programs would end this one in the middle of any write to any pipe, those to its own workers included, so it stays
switched off, and only standard output and standard error count here.
"""

import os
import select
import signal
import sys
from contextlib import suppress
from typing import TextIO

ENDED = 128 + signal.SIGPIPE
"""Exit code of a program that the signal has ended, as a shell reports it."""


def reader_gone() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads any more."""
    return any(_unread(number) for number in (1, 2))


def silence() -> None:
    """Sends what is still to be written, where nobody reads, to nowhere."""
    for number in (1, 2):
        if _unread(number):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def flush() -> bool:
    """Writes out what is buffered, and returns whether somebody took it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        silence()
        with suppress(BrokenPipeError):  # what is left in the buffers goes nowhere now
            sys.stdout.flush()
            sys.stderr.flush()
        return False
    return True


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, for work that goes on also where nobody listens any more.

    Args:
        line: What to say.
        stream: Where to; standard output if left out.
    """
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        silence()


def _unread(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)  # an error is reported whether asked for or not
    try:
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except OSError:
        return False
