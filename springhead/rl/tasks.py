"""The catalogue of tasks: dimensions, horizons, score ranges and cost limits.

A task is an environment plus the constants by which policies are scored on it. The 38 of ``tasks.json`` are those of
the DSRL benchmark (Liu et al. 2023, "Datasets and Benchmarks for Offline Safe Reinforcement Learning") with the
benchmark's own constants, so scores computed here compare with published ones; ``docs/methods/tasks.md`` lists them
and says where each number comes from. AntRun's lowest return repeats CarButton2's, most likely a slip in the
published table; it stays, because every published AntRun score was computed with it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from springhead.errors import BadInput


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: Our name, for instance ``BallCircle``; also the data directory and the Minari name.
        family: The simulator the task comes from.
        env_id: The base environment by its simulator's name, for instance ``SafetyBallCircle-v0``.
        observation_dim: Length of one observation.
        action_dim: Length of one action; every action component lies in [-1, 1].
        horizon: Steps after which an episode is truncated.
        cost_kind: ``binary`` where every step costs 0 or 1, ``continuous`` otherwise.
        terminates: Whether an episode can end before the horizon, for instance because the robot fell.
        limits: The three episode cost limits at which the benchmark evaluates.
        return_range: (lowest, highest) episode return of the published data set.
        cost_range: (lowest, highest) episode cost return of the published data set.
        density: Settings of the density filter by its published name ("0.5", "0.75"):
            (cost bins, return bins, most episodes per cell, cells with this many or fewer are dropped).
        sub_costs: Names of a step's separate constraint signals; empty where the task has only one.
        data_file: The published data set's file name; empty if there is none.
    """

    name: str
    family: Literal["bullet-safety-gym", "safety-gymnasium", "metadrive", "custom"]
    env_id: str
    observation_dim: int
    action_dim: int
    horizon: int
    cost_kind: Literal["binary", "continuous"]
    terminates: bool
    limits: tuple[float, float, float]
    return_range: tuple[float, float]
    cost_range: tuple[float, float]
    density: Mapping[str, tuple[int, int, int, int]]
    sub_costs: tuple[str, ...] = ()
    data_file: str = ""

    def normalised_return(self, episode_return: float) -> float:
        """Scales an episode return so that the published data set spans [0, 1].

        Args:
            episode_return: Undiscounted sum of rewards of one episode, or a mean of such sums.

        Returns:
            (R - R_min) / (R_max - R_min) with the task's published extremes; may leave [0, 1].
        """
        low, high = self.return_range
        return (float(episode_return) - low) / (high - low)

    def normalised_cost(self, cost: float, limit: float) -> float:
        """Scales an episode cost by its limit, so that safe means at most 1.

        Args:
            cost: Undiscounted sum of costs of one episode, or a mean of such sums; at least 0.
            limit: The cost limit of an episode, at least 0.

        Returns:
            (C + e) / (limit + e), where e is 1 at limit 0 and 0 otherwise (the benchmark's rule, DSRL section 5).

        Raises:
            BadInput: If the limit is negative.
        """
        if limit < 0:
            raise BadInput(f"cost limit {limit} of task {self.name} is negative; use a limit of 0 or more")
        epsilon = 1.0 if limit == 0 else 0.0
        return (float(cost) + epsilon) / (float(limit) + epsilon)


def _read(path: Path) -> dict[str, Task]:
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {name: _task(name, entry) for name, entry in entries.items()}


def _task(name: str, entry: Mapping[str, Any]) -> Task:
    tuples = {key: tuple(entry[key]) for key in ("limits", "return_range", "cost_range", "sub_costs")}
    density = MappingProxyType({key: tuple(settings) for key, settings in entry["density"].items()})
    return Task(name=name, **{**entry, **tuples, "density": density})


TASKS: Mapping[str, Task] = MappingProxyType(_read(Path(__file__).with_name("tasks.json")))
"""Every task by name, family by family."""


def task(name: str) -> Task:
    """Looks a task up by name.

    Args:
        name: A key of ``TASKS``.

    Returns:
        The task.

    Raises:
        BadInput: If there is no such task; the message lists the names and the nearest match.
    """
    if name in TASKS:
        return TASKS[name]
    by_lower_case = {known.lower(): known for known in TASKS}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower_case[near[0]]}?" if near else ""
    raise BadInput(f"unknown task {name!r}.{hint} Known tasks: {', '.join(sorted(TASKS))}")
