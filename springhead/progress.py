"""Progress lines for long work: count, share, figures, elapsed time and an estimate.

One plain line every few seconds reads well in a terminal, in a Prefect log and in CI alike.
"""

import sys
import time
from types import TracebackType
from typing import Self

_INTERVAL = 5.0  # seconds between lines


def duration(seconds: float) -> str:
    """Returns a short human form of a duration: ``8s``, ``2m05s``, ``1h03m``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts finished units and prints a line on stderr at most every five seconds."""

    def __init__(self, total: int, label: str = "", unit: str = "it") -> None:
        self.total = max(int(total), 1)
        self.label = label
        self.unit = unit
        self.done = 0
        self._start = self._last = time.monotonic()
        self._first = 0
        self._figures: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None and time.monotonic() - self._start >= 1.0:
            self._print()

    def resume(self, done: int) -> None:
        """Tells that ``done`` units were finished in an earlier, interrupted execution."""
        self.done = self._first = done

    def advance(self, n: int = 1, **figures: float) -> None:
        """Adds ``n`` finished units; ``figures`` are shown beside the count."""
        self.done += n
        self._figures.update(figures)
        if time.monotonic() - self._last >= _INTERVAL:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        parts = [f"{self.done}/{self.total} {self.unit} ({100 * self.done / self.total:.0f} %)", duration(elapsed)]
        fresh = self.done - self._first
        if fresh > 0 and self.done < self.total:
            parts.append(f"~{duration(elapsed / fresh * (self.total - self.done))} left")
        parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
        print(f"  {self.label + ': ' if self.label else ''}{' · '.join(parts)}", file=sys.stderr, flush=True)
