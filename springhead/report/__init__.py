"""The static HTML report: what was made, how good it is, and where it came from."""

from springhead.report.build import build

__all__ = ["build"]
