"""The catalogue of tasks: dimensions, horizons, score ranges and cost limits.

A task is an environment of Bullet-Safety-Gym plus the constants by which the DSRL benchmark (Liu et al. 2023,
"Datasets and Benchmarks for Offline Safe Reinforcement Learning") scores policies on it. The constants are the
benchmark's own, so scores computed here compare with published ones. Adding a task is adding one entry to
``_BULLET``; ``docs/guide/adding-a-task.md`` has the steps.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from springhead.errors import BadInput


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: Our name, for instance ``BallCircle``; also the data directory and the Minari name.
        env_id: The base environment registered by its simulator package, for instance ``SafetyBallCircle-v0``.
        observation_dim: Length of one observation.
        action_dim: Length of one action; every action component lies in [-1, 1].
        horizon: Steps after which an episode is truncated.
        cost_kind: ``binary`` where every step costs 0 or 1, ``continuous`` otherwise.
        terminates: Whether an episode can end before the horizon because the robot fell.
        limits: The three episode cost limits at which the benchmark evaluates.
        return_range: (lowest, highest) episode return of the published data set.
        cost_range: (lowest, highest) episode cost return of the published data set.
        density: Settings of the density filter by its published name ("0.5", "0.75"):
            (cost bins, return bins, most episodes per cell, cells with this many or fewer are dropped).
        family: The simulator the task comes from.
    """

    name: str
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
    family: str

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


# name: observation_dim, action_dim, horizon, terminates, return_range, highest cost, density 0.5, density 0.75
# AntRun's lowest return repeats another task's value in the published table, most likely a slip there; it stays,
# because every published AntRun score was computed with it.
_BULLET = {
    "AntCircle": (34, 8, 500, True, (0.0177031010389328, 460.7091979980469), 200.0, (10, 50, 12, 2), (10, 50, 20, 2)),
    "AntRun": (33, 8, 200, True, (0.001767391717990563, 955.4818725585938), 150.0, (10, 50, 6, 2), (10, 50, 10, 2)),
    "BallCircle": (8, 2, 200, False, (0.38312244415283203, 881.46337890625), 80.0, (10, 20, 5, 2), (10, 30, 10, 2)),
    "BallRun": (7, 2, 100, False, (26.339754104614258, 1327.445556640625), 80.0, (10, 15, 7, 2), (10, 15, 12, 2)),
    "CarCircle": (8, 2, 300, False, (3.484419822692871, 534.3060913085938), 100.0, (10, 50, 5, 2), (10, 50, 9, 2)),
    "CarRun": (7, 2, 200, False, (204.28726196289062, 574.6533203125), 40.0, (10, 20, 6, 2), (10, 20, 11, 2)),
    "DroneCircle": (18, 4, 300, True, (207.794189453125, 996.38916015625), 100.0, (10, 50, 10, 2), (10, 50, 18, 2)),
    "DroneRun": (17, 4, 200, True, (10.557029724121094, 682.8330078125), 140.0, (10, 50, 6, 2), (10, 50, 18, 2)),
}
_BULLET_LIMITS = (10.0, 20.0, 40.0)


def _bullet_tasks() -> dict[str, Task]:
    tasks = {}
    for name, (observation_dim, action_dim, horizon, terminates, returns, cost, half, most) in _BULLET.items():
        tasks[name] = Task(
            name=name,
            env_id=f"Safety{name}-v0",
            observation_dim=observation_dim,
            action_dim=action_dim,
            horizon=horizon,
            cost_kind="binary",
            terminates=terminates,
            limits=_BULLET_LIMITS,
            return_range=returns,
            cost_range=(0.0, cost),
            density=MappingProxyType({"0.5": half, "0.75": most}),
            family="bullet-safety-gym",
        )
    return tasks


TASKS: Mapping[str, Task] = MappingProxyType(_bullet_tasks())
"""Every task by name, in alphabetical order."""


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
