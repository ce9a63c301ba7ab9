"""What the simulators share: what keeps a package from leaking into the process, and the process into it."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np

WIDTH, HEIGHT = 320, 240  # of a picture: all simulators draw alike


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the simulator's start-up chatter, which C code writes straight to the file descriptors."""
    saved_streams = sys.stdout, sys.stderr
    # The simulator package itself redirects sys.stdout by file number and C name, which only the
    # interpreter's own streams have; a captured or wrapped stream would make it fail.
    if sys.__stdout__ is not None and sys.__stderr__ is not None:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    saved = [(number, os.dup(number)) for number in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in saved:
            os.dup2(sink, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        os.close(sink)
        sys.stdout, sys.stderr = saved_streams


@contextlib.contextmanager
def global_numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator for the block and puts its former state back afterwards."""
    saved = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(saved)
