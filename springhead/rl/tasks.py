"""The catalogue of tasks: dimensions, horizons, score ranges and cost limits.

A task is an environment plus the constants by which policies are scored on it. The first 38 of ``tasks.json`` are those
of the DSRL benchmark (Liu et al. 2023, "Datasets and Benchmarks for Offline Safe Reinforcement Learning") with the
benchmark's own constants, so scores computed here compare with published ones; ``docs/methods/tasks.md`` lists them
and says where each number comes from. The others have sparse rewards, no cost, and constants that were measured here
(``docs/methods/mazes.md``). AntRun's lowest return repeats CarButton2's, most likely a slip in the
published table; it stays, because every published AntRun score was computed with it.

A checkout may have tasks of its own: entries of ``environments/tasks.yaml``, in the same terms
(``docs/guide/adding-a-task.md``).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from springhead.errors import BadInput
from springhead.home import repository
from springhead.params import load, read_params

CUSTOM = "environments/tasks.yaml"
"""Where a checkout declares tasks of its own; the folder is a dependency of the rl stages."""
ACTION_BOUND = 1.0 + 1e-6
"""Of an action's entries; float32 arithmetic of an action map may miss 1 by a rounding."""


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: Our name, for instance ``BallCircle``; also the data directory and the Minari name.
        family: The simulator the task comes from.
        env_id: The base environment by its simulator's name, for instance ``SafetyBallCircle-v0``. Sparse tasks: the
            task whose robot it is.
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
        sub_costs: Names of a step's separate constraint signals; empty where the task has only one. The step's
            cost is their maximum where ``cost_kind`` is ``binary``, their sum otherwise.
        data_file: The published data set's file name; empty if there is none.
        cost_key: Custom tasks only: the key of the step's info that holds the cost.
        options: Custom tasks: keyword arguments of ``gymnasium.make``. Mazes: ``goal_cell``, the row and column of the
            goal. Sparse tasks: ``threshold``, the return after which steps are paid.
    """

    name: str
    family: Literal["bullet-safety-gym", "safety-gymnasium", "metadrive", "gymnasium-robotics", "sparse", "custom"]
    env_id: str
    observation_dim: int
    action_dim: int
    horizon: int
    cost_kind: Literal["binary", "continuous"]
    terminates: bool
    limits: tuple[float, float, float]
    return_range: tuple[float, float]
    cost_range: tuple[float, float]
    density: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    sub_costs: tuple[str, ...] = ()
    data_file: str = ""
    cost_key: str = "cost"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("observation_dim", "action_dim", "horizon"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("return_range", "cost_range"):
            low, high = getattr(self, key)
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"{key} is {[low, high]}; it must be [lowest, highest], two finite numbers")
        if self.cost_range[0] < 0:
            raise ValueError(f"cost_range begins at {self.cost_range[0]}; costs are 0 or more")
        if not 0 <= self.limits[0] < self.limits[1] < self.limits[2] < math.inf:
            raise ValueError(
                f"limits are {list(self.limits)}; they must be three rising numbers of 0 or more, and finite"
            )

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
        return normalised_cost(cost, limit)


def normalised_cost(cost: float, limit: float) -> float:
    """An episode cost, or a mean of such, by its limit: :meth:`Task.normalised_cost`, which needs nothing of a task."""
    epsilon = 1.0 if limit == 0 else 0.0
    return (float(cost) + epsilon) / (float(limit) + epsilon)


def _published() -> dict[str, Task]:
    path = Path(__file__).with_name("tasks.json")
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {name: load(Task, {"name": name, **entry}, f"{path}: {name}") for name, entry in entries.items()}


def custom_root() -> Path | None:
    """The checkout whose custom tasks are known, found from the working folder; None outside of any."""
    try:
        root = repository()
    except BadInput:
        return None
    return root if (root / CUSTOM).is_file() else None


def _custom(root: Path | None) -> dict[str, Task]:
    """Reads the custom tasks of a checkout.

    Raises:
        BadInput: If the file is not as it must be; names the entry and the key.
    """
    if root is None:
        return {}
    tasks = {}
    for name, entry in read_params(root / CUSTOM).items():
        where = f"{CUSTOM}: {name}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", str(name)):
            raise BadInput(f"{where}: a task's name is made of letters and digits and begins with a letter")
        if name in _PUBLISHED:
            raise BadInput(f"{where}: the published suite has a task of this name; choose another")
        if not isinstance(entry, Mapping):
            raise BadInput(f"{where}: expected a mapping of keys, found {entry!r}")
        if given := {"name", "family", "data_file"} & set(entry):
            raise BadInput(f"{where}.{min(given)}: is not for custom tasks; leave it out")
        tasks[name] = load(Task, {"name": name, "family": "custom", **entry}, where)
    return tasks


class _Catalogue(Mapping[str, Task]):
    """The published tasks, and the custom ones, which are read when the catalogue is first used.

    Not at import: a mistake in the file is to be reported by the command that uses it, not by an import.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, Task] | None = None

    def refresh(self) -> None:
        """Forgets what was read, for a process that changes its working folder or the file."""
        self._tasks = None

    def _read(self) -> dict[str, Task]:
        if self._tasks is None:
            self._tasks = {**_PUBLISHED, **_custom(custom_root())}
        return self._tasks

    def __getitem__(self, name: str) -> Task:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


_PUBLISHED = _published()
TASKS = _Catalogue()
"""Every task by name: the published ones family by family, then the custom ones."""


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
