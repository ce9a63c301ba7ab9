"""The catalogue as a table: for the terminal, and for ``docs/methods/tasks.md``, which a test compares with it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from springhead.rl.tasks import TASKS, Task


def text_lines(used: list[str]) -> Iterator[str]:
    """Yields the lines of ``springhead tasks``; tasks named in ``used`` are marked. Family names stand alone."""
    yield f"{'task':<21}{'obs':>4}{'act':>4}{'steps':>6}  {'cost limits':<12}{'step cost':<12}sub-costs"
    for family, tasks in groupby(TASKS.values(), lambda known: known.family):
        yield family
        for known in tasks:
            mark = "  (in params.yaml)" if known.name in used else ""
            yield (
                f"  {known.name:<19}{known.observation_dim:>4}{known.action_dim:>4}{known.horizon:>6}  "
                f"{_limits(known):<12}{known.cost_kind:<12}{', '.join(known.sub_costs) or '-'}{mark}"
            )


def markdown_lines(family: str) -> Iterator[str]:
    """Yields the table of one family in Markdown."""
    yield "| task | obs | act | steps | ends early | returns | costs | limits | sub-costs | density presets |"
    yield "|---|--:|--:|--:|---|---|---|---|---|---|"
    for known in TASKS.values():
        if known.family == family:
            presets = "; ".join(
                f"{name}: {', '.join(map(str, settings))}" for name, settings in sorted(known.density.items())
            )
            cells = (
                f"`{known.name}`",
                known.observation_dim,
                known.action_dim,
                known.horizon,
                "yes" if known.terminates else "no",
                _range(known.return_range),
                _range(known.cost_range),
                _limits(known),
                ", ".join(known.sub_costs) or "–",
                presets or "–",
            )
            yield "| " + " | ".join(map(str, cells)) + " |"


def _limits(known: Task) -> str:
    return ", ".join(f"{limit:g}" for limit in known.limits)


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:.4g} … {high:.4g}"
