"""Imports episodes that others collected: DSRL's published files, Minari data sets, D4RL-style HDF5.

A source is accepted only with the digest that the parameters state, so the rows of an imported data set are traced
to the very bytes they came from: their ``source`` is that digest. Each episode is held to its task, and of each there
is one row in the decisions table; by default an episode that does not fit is an error, and it is left out only where
the parameters say so. Each source is read twice, once to judge and once to write, so that no data set need fit into
memory.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa

from springhead import sources
from springhead.errors import BadInput
from springhead.jsonio import write_json
from springhead.rl.dsrl_file import write_stream
from springhead.rl.episodes import EPISODE_KEYS, Episode
from springhead.rl.facts import Fact, sums, write_rows
from springhead.rl.foreign import Found, d4rl_episodes, dsrl_episodes, minari_episodes, unread
from springhead.rl.import_rules import Decision, judge
from springhead.rl.tasks import Task
from springhead.tables import write_table

MIRROR = "huggingface.co/datasets/YYY-45/DSRL"
"""Where the data sets of the benchmark are published since its own server is gone."""
_D4RL_KEYS = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What holds for every format."""

    sha256: str
    """The bytes that are meant: a file's SHA-256; of a folder, what ``springhead import-check`` prints."""
    unfinished: Literal["error", "drop"] = "error"
    """What to do with steps that no end flag follows."""
    faulty: Literal["error", "drop"] = "error"
    """What to do with an episode that cannot be of this task."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}; it has 64 hexadecimal digits")


def _check_path(path: str) -> None:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(
            f"path is {path!r}; it must be relative to $SPRINGHEAD_SOURCES or to sources/ of the state folder, so that "
            "it means the same on every machine"
        )


@dataclass(frozen=True, kw_only=True)
class Dsrl(_Given):
    """A published file of the benchmark, or any other of its schema."""

    revision: str | None = None
    """Commit of the public mirror to fetch it from; null: it is there already."""
    file: str | None = None
    """Its name; null is the name of the task's published file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision is {self.revision!r}; name a commit, 40 hexadecimal digits: branches move")
        if self.file is not None:
            _check_path(self.file)


@dataclass(frozen=True, kw_only=True)
class Minari(_Given):
    """A Minari data set."""

    path: str
    """Its id, which is also its folder's path, for instance ``mujoco/hopper/expert-v0``."""
    cost: str | None
    """The key of ``infos`` that holds the cost of each step; null: every step costs 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_path(self.path)


@dataclass(frozen=True, kw_only=True)
class D4rl(_Given):
    """A file as D4RL has them."""

    path: str
    """Where it lies."""
    cost: str | None
    """The array that holds the costs, for instance ``infos/cost``; null: every step costs 0."""
    timeouts: Literal["file", "horizon"] = "file"
    """``horizon``: an episode ends after the task's horizon too, for files without time-outs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_path(self.path)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source: a task, and one format with its settings."""

    task: str
    dsrl: Dsrl | None = None
    minari: Minari | None = None
    d4rl: D4rl | None = None

    def __post_init__(self) -> None:
        if len([name for name in FORMATS if getattr(self, name) is not None]) != 1:
            raise ValueError(f"a source names its task and exactly one format of {', '.join(FORMATS)}")

    @property
    def format(self) -> str:
        """The format's name."""
        return next(name for name in FORMATS if getattr(self, name) is not None)

    @property
    def settings(self) -> Dsrl | Minari | D4rl:
        """The format's settings."""
        found: Dsrl | Minari | D4rl = getattr(self, self.format)
        return found


FORMATS = ("dsrl", "minari", "d4rl")

DECISIONS = pa.schema(
    [
        ("id", pa.string()),
        ("rule", pa.string()),
        ("kept", pa.bool_()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("source", pa.string()),
        ("source_index", pa.int64()),
    ]
)
"""One row per episode of every source. ``rule`` is the one that left it out; of those kept, ``last step`` where a step
was cut off its end (``value`` says how many), else ``import``. ``source_index`` is its position in the source."""


def minari_folder() -> Path:
    """The folder in which Minari itself keeps data sets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()


def obtain(source: Source, of: Task, root: Path | None) -> Path:
    """Returns a local path to a source, fetching it if need be.

    Looks in ``$SPRINGHEAD_SOURCES``, in the state folder, for a Minari data set also in Minari's own folder, and for
    a file of the benchmark with a ``revision`` on the public mirror.

    Raises:
        BadInput: If it cannot be had, or its bytes are others than the parameters state.
    """
    settings = source.settings
    if isinstance(settings, Dsrl):
        name = settings.file or of.data_file
        if not name:
            raise BadInput(f"params.yaml: rl.imports: task {of.name} has no published file; name the file")
        origin = MIRROR + (f"@{settings.revision}" if settings.revision else "")
        url = f"https://{MIRROR}/resolve/{settings.revision}/{name}" if settings.revision else None
        wanted = sources.Source(name, f"dsrl/{name}", origin, "CC BY 4.0", settings.sha256, url)
        return sources.fetch(wanted, root)
    origin = "where it is published"
    wanted = sources.Source(settings.path, settings.path, origin, "see there", settings.sha256)
    also = [minari_folder() / settings.path] if isinstance(settings, Minari) else []
    return sources.fetch(wanted, root, also)


def episodes_of(path: Path, settings: Dsrl | Minari | D4rl, of: Task) -> Iterator[Found]:
    """Reads a source's episodes as they are in it."""
    match settings:
        case Dsrl():
            return dsrl_episodes(path, of)
        case Minari():
            return minari_episodes(path, of, settings.cost)
        case D4rl():
            return d4rl_episodes(path, of, settings.cost, settings.timeouts == "horizon")


@dataclass
class Judged:
    """A source and what becomes of its episodes."""

    path: Path
    source: Source
    decisions: list[Decision]
    facts: list[Fact]

    @property
    def name(self) -> str:
        """What the source is called."""
        settings = self.source.settings
        return self.path.name if isinstance(settings, Dsrl) else settings.path


def examine(path: Path, source: Source, of: Task, known: set[str]) -> Judged:
    """Judges every episode of a source; writes nothing.

    Args:
        path: Where the source lies.
        source: What it is.
        of: The task.
        known: Ids of the episodes that there are already; of several with the same bytes the first counts. Grows.

    Raises:
        BadInput: If an episode does not fit and is not to be dropped, or none is left.
    """
    settings = source.settings
    decisions, facts = [], []
    for found in episodes_of(path, settings, of):
        decision = judge(found, of, str(path))
        unfinished = decision.rule == "unfinished"
        if not decision.kept and (settings.unfinished if unfinished else settings.faulty) == "error":
            raise BadInput(decision.why + ("" if unfinished else "; set faulty: drop to leave such episodes out"))
        if decision.kept and decision.id in known:
            decision = Decision(decision.id, "duplicate", False, None, None)
        decisions.append(decision)
        if decision.kept:
            known.add(decision.id)
            facts.append(
                Fact(
                    group=-1,
                    place=found.index,
                    policy=None,
                    algorithm="imported",
                    cost_limit=None,
                    seed=None,
                    deterministic=None,
                    source=settings.sha256,
                    **sums(found.episode),
                )
            )
    if not facts:
        first = next((decision.why for decision in decisions if decision.why), "they are there already")
        rules = ", ".join(f"{number} by {rule}" for rule, number in _left_out(decisions).items())
        raise BadInput(f"{path}: none of its {len(decisions)} episodes can be imported (left out: {rules}); {first}")
    return Judged(path, source, decisions, facts)


def import_sources(of: Task, wanted: Sequence[Source], out: Path, root: Path | None = None) -> list[dict[str, Any]]:
    """Imports a task's sources, in their order.

    Writes ``index.json`` (what was imported, an empty list if there are no sources) and, if there are any,
    ``dataset.hdf5`` (DSRL's schema), ``rows.parquet`` and ``decisions.parquet``. On an error nothing is written.

    Args:
        of: The task.
        wanted: The sources; all of this task.
        out: The folder to write to.
        root: The repository, for the state folder.

    Returns:
        The index.

    Raises:
        BadInput: If a source cannot be had or read, or an episode does not fit its task.
    """
    known: set[str] = set()
    judged = [examine(obtain(source, of, root), source, of, known) for source in wanted]
    index = [_entry(source) for source in judged]
    if judged:
        steps = sum(fact.length for source in judged for fact in source.facts)
        write_stream(out / "dataset.hdf5", _kept(judged, of), steps, EPISODE_KEYS)
        write_rows(out / "rows.parquet", [fact for source in judged for fact in source.facts])
        _write_decisions(out / "decisions.parquet", judged)
    write_json(out / "index.json", index)
    return index


def _kept(judged: Sequence[Judged], of: Task) -> Iterator[Episode]:
    """Reads the sources again and yields the episodes that are kept."""
    for source in judged:
        for found in episodes_of(source.path, source.source.settings, of):
            if source.decisions[found.index].kept:
                yield found.episode


def _write_decisions(path: Path, judged: Sequence[Judged]) -> None:
    rows = [(source, index, row) for source in judged for index, row in enumerate(source.decisions)]
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for _, _, row in rows] for name in ("id", "rule", "kept", "value", "threshold")
    }
    columns["source"] = [source.source.settings.sha256 for source, _, _ in rows]
    columns["source_index"] = [index for _, index, _ in rows]
    write_table(path, columns, DECISIONS)


def _left_out(decisions: Sequence[Decision]) -> dict[str, int]:
    """How many episodes each rule left out."""
    return dict(Counter(decision.rule for decision in decisions if not decision.kept))


def _entry(judged: Judged) -> dict[str, Any]:
    """What the index says of a source."""
    settings = judged.source.settings
    entry: dict[str, Any] = {
        "name": judged.name,
        "format": judged.source.format,
        "sha256": settings.sha256,
        "episodes": len(judged.facts),
        "steps": sum(fact.length for fact in judged.facts),
        "left_out": _left_out(judged.decisions),
        "steps_cut": int(sum(d.value or 0 for d in judged.decisions if d.rule == "last step")),
        "cost": settings.cost if not isinstance(settings, Dsrl) else "costs",
    }
    if isinstance(settings, Dsrl):
        return entry | {"revision": settings.revision, "not_read": unread(judged.path, EPISODE_KEYS)}
    if isinstance(settings, D4rl):
        return entry | {"not_read": unread(judged.path, (*_D4RL_KEYS, settings.cost or ""))}
    return entry
