"""The row table of a data set of episodes: what each is made of, and what it adds up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from springhead.rl.episodes import Episode
from springhead.tables import write_table

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("policy", pa.string()),
        ("algorithm", pa.string()),
        ("cost_limit", pa.float64()),
        ("seed", pa.int64()),
        ("deterministic", pa.bool_()),
        ("source", pa.string()),
        ("episode_return", pa.float64()),
        ("cost_return", pa.float64()),
        ("sub_cost_returns", pa.list_(pa.float64())),
        ("length", pa.int64()),
        ("index", pa.int64()),
    ]
)
"""The row table: one row per episode; ``seed`` is its reset seed, ``index`` its position in the HDF5 file. ``source``
is the digest of the file that an episode was imported from, null for one that was rolled out here."""


@dataclass(frozen=True)
class Fact:
    """An episode without its arrays: where it lies, what made it, and what it adds up to.

    Attributes:
        group: The number of its group, -1 for an imported episode.
        place: Its place in the group, or in the imported data set.
        id: The digest of its content.
        policy: The digest of the policy that acted, None for an imported episode.
        algorithm: The algorithm that made the policy.
        cost_limit: The cost limit that the policy was trained for, None where it is not known.
        seed: The reset seed, None likewise.
        deterministic: Whether the policy acted by its mean, None likewise.
        source: The digest of the file it was imported from.
        episode_return: Its undiscounted return.
        cost_return: Its undiscounted cost.
        sub_cost_returns: The same for each constraint signal.
        length: Its number of steps.
    """

    group: int
    place: int
    id: str
    policy: str | None
    algorithm: str
    cost_limit: float | None
    seed: int | None
    deterministic: bool | None
    source: str | None
    episode_return: float
    cost_return: float
    sub_cost_returns: tuple[float, ...]
    length: int


def sums(episode: Episode) -> dict[str, Any]:
    """What of a fact the episode itself says."""
    return {
        "id": episode.id,
        "episode_return": episode.episode_return,
        "cost_return": episode.cost_return,
        "sub_cost_returns": tuple(episode.sub_cost_returns),
        "length": episode.length,
    }


def bare(episode: Episode) -> Episode:
    """The episode without its sub-costs, under the id that it then has."""
    return episode if episode.sub_costs is None else replace(episode, sub_costs=None)


def write_rows(path: Path, facts: Sequence[Fact]) -> None:
    """Writes the row table; an episode has no parent rows, what it came from is its policy or its source."""
    names = [name for name in ROWS.names if name not in ("parents", "index", "sub_cost_returns")]
    columns: dict[str, list[Any]] = {name: [getattr(fact, name) for fact in facts] for name in names}
    columns["sub_cost_returns"] = [list(fact.sub_cost_returns) for fact in facts]
    write_table(path, {**columns, "parents": [[] for _ in facts], "index": list(range(len(facts)))}, ROWS)
