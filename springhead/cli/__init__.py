"""The command ``springhead``.

Imports of anything heavy are inside the commands, so that ``--help`` answers at once. Exit codes:
0 good, 1 a finding, 2 usage or bad input, 70 a fault of ours, 141 nobody reads the output.
"""

from springhead.cli import catalogue, models, provenance, runs
from springhead.cli.base import app, main

__all__ = ["app", "catalogue", "main", "models", "provenance", "runs"]
