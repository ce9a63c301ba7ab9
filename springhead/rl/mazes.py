"""A planner that drives through mazes, and the data sets that it collects.

As in D4RL's maze data (Fu et al. 2020, "D4RL", section 5): a planner that knows the map drives to one random goal after
the other, and its steps are paid for the one goal of the task, which it mostly passes by. So the data hold the ways
through the maze and almost no episode that goes to the goal and stays: a policy has to put pieces together.

Deviations from D4RL's generator: an episode is a seeded reset and the task's horizon, not a piece of one endless drive;
paths are shortest paths by breadth-first search; the actions have Gaussian noise (D4RL has it as an option).

The planner is a policy like any other (``springhead.rl.envs.ActingPolicy``), an episode of it a function of its seed.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.dsrl_file import write_dsrl
from springhead.rl.envs import ActingPolicy
from springhead.rl.episodes import Episode
from springhead.rl.evaluation import RandomPolicy, episode_seeds
from springhead.rl.facts import Fact, sums, write_rows
from springhead.rl.simulators.point_maze import Layout, layout
from springhead.rl.tasks import Task
from springhead.rl.workers import EpisodeWorkers, Group

Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]

NUM_ENVS = 10
"""Episodes stepped together."""


@dataclass(frozen=True)
class PlannerSettings:
    """How the planner drives; D4RL's controller has the same gains and the same reach."""

    position_gain: float = 10.0
    """Force per metre to the way-point."""
    velocity_gain: float = 1.0
    """Force per m/s, against the movement."""
    reach: float = 0.1
    """Metres from a way-point at which it is passed, and from a random goal at which the next one is drawn."""
    noise: float = 0.5
    """Standard deviation of the noise on each component of an action."""

    def __post_init__(self) -> None:
        if min(self.position_gain, self.velocity_gain, self.noise) < 0:
            raise ValueError("position_gain, velocity_gain and noise must be 0 or more")
        if not 0 < self.reach < 0.5:
            raise ValueError(f"reach is {self.reach}; it must be above 0 and below 0.5, half a cell")

    @property
    def digest(self) -> str:
        """SHA-256 of the settings: what names the planner in row tables."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def next_cells(of: Layout) -> Whole:
    """Shortest ways between all free cells, by breadth-first search.

    Args:
        of: The maze. Two cells are neighbours where they share a side.

    Returns:
        int64 (cells, cells), in the order of ``of.free``: entry [a, b] is the cell after ``a`` on a shortest way to
        ``b``, and ``a`` itself where a = b. Of several shortest ways the first in the order up, left, right, down.

    Raises:
        BadInput: If a free cell cannot be reached from another.
    """
    cells = [(int(row), int(column)) for row, column in of.free]
    number = {cell: i for i, cell in enumerate(cells)}
    around = [
        [number[there] for there in ((r - 1, c), (r, c - 1), (r, c + 1), (r + 1, c)) if there in number]
        for r, c in cells
    ]
    found = np.full((len(cells), len(cells)), -1, dtype=np.int64)
    for goal in range(len(cells)):
        distance = {goal: 0}
        queue = deque([goal])
        while queue:
            here = queue.popleft()
            for there in around[here]:
                if there not in distance:
                    distance[there] = distance[here] + 1
                    queue.append(there)
        if len(distance) < len(cells):
            lost = next(cell for i, cell in enumerate(cells) if i not in distance)
            raise BadInput(f"the maze's cell {lost} cannot be reached from cell {cells[goal]}")
        found[goal, goal] = goal
        for here in range(len(cells)):
            if here != goal:
                found[here, goal] = min(around[here], key=lambda there: distance[there])
    return found


class Planner:
    """Drives along shortest ways, from the middle of one cell to the next, by a PD controller; can be pickled.

    Args:
        of: The maze.
        settings: How it drives.
        episode_seeds: Row i drives to random goals, with noise on its actions, both from ``episode_seeds[i]``. None
            drives to the task's own goal and stays there, without noise.
    """

    def __init__(self, of: Task, settings: PlannerSettings, episode_seeds: Sequence[int] | None = None) -> None:
        self.task = of.name
        self.algorithm = "planner"
        self.observation_dim, self.action_dim = of.observation_dim, of.action_dim
        self._settings = settings
        self._seeds = None if episode_seeds is None else tuple(episode_seeds)
        maze = layout(of)
        self._layout = maze
        self._next = next_cells(maze)
        self._centres = maze.centres(maze.free)
        self._number = np.full(maze.walls.shape, -1, dtype=np.int64)
        self._number[tuple(maze.free.T)] = np.arange(len(maze.free))
        self._generators: list[np.random.Generator] = []
        self._goals: Whole = np.empty(0, dtype=np.int64)
        self._ways: Whole = np.empty(0, dtype=np.int64)
        self._begun = False

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Starts new episodes; there is no cost to be limited."""
        self._generators = [np.random.default_rng([seed, 2]) for seed in (self._seeds or ())[:num_envs]]
        self._goals = np.full(num_envs, self._number[self._layout.goal_cell], dtype=np.int64)
        self._begun = False

    def act(self, observations: Floats) -> Floats:
        """Maps observations (num_envs, 4) to actions (num_envs, 2) in [-1, 1]."""
        places = observations[:, :2].astype(np.float64)
        if not self._begun:
            self._ways = self._number[tuple(self._layout.cells(places).T)]
            for row in range(len(self._generators)):
                self._goals[row] = self._draw_goal(row, int(self._ways[row]))
            self._begun = True
        there = np.linalg.norm(places - self._centres[self._ways], axis=1) < self._settings.reach
        for row in np.flatnonzero(there & (self._ways == self._goals)).tolist():
            if row < len(self._generators):
                self._goals[row] = self._draw_goal(row, int(self._goals[row]))
        self._ways = np.where(there, self._next[self._ways, self._goals], self._ways)
        actions = self._settings.position_gain * (self._centres[self._ways] - places)
        actions -= self._settings.velocity_gain * observations[:, 2:]
        for row, generator in enumerate(self._generators):
            actions[row] += self._settings.noise * generator.standard_normal(2)
        return actions.clip(-1.0, 1.0).astype(np.float32)

    def observe(self, rewards: Floats, costs: Floats) -> None:
        """Nothing to remember: the planner does not look at rewards."""

    def _draw_goal(self, row: int, other_than: int) -> int:
        """Draws a free cell other than the given one."""
        drawn = int(self._generators[row].integers(len(self._next) - 1))
        return drawn + (drawn >= other_than)


def collect(
    of: Task,
    episodes: int,
    seed: int,
    folder: Path,
    settings: PlannerSettings | None = None,
    processes: int = 1,
    done: Callable[[int], None] = lambda number: None,
) -> Path:
    """Collects a maze's data set: random goals, noisy actions, rewards for the task's goal.

    The bytes depend on task, episodes, seed and settings only.

    Args:
        of: The maze.
        episodes: How many, each of the task's horizon; at least 1.
        seed: Reset seeds are drawn from it.
        folder: Gets ``dataset.hdf5`` and its row table ``rows.parquet``; made if need be.
        settings: How the planner drives; the default is the one of the published figures.
        processes: Worker processes.
        done: Called with the number of finished episodes after each group.

    Returns:
        The data set's file.

    Raises:
        BadInput: If ``of`` is no maze or ``episodes`` is below 1.
    """
    if of.family != "gymnasium-robotics":
        raise BadInput(f"task {of.name} is no maze; the planner drives through MazeUMaze, MazeMedium and MazeLarge")
    if episodes < 1:
        raise BadInput(f"episodes is {episodes}; collect at least 1")
    settings = settings or PlannerSettings()
    seeds = np.random.default_rng(seed).integers(2**31, size=episodes).tolist()
    batches = [tuple(seeds[start : start + NUM_ENVS]) for start in range(0, episodes, NUM_ENVS)]
    facts: list[Fact] = []
    collected: list[Episode] = []
    with EpisodeWorkers(of.name, NUM_ENVS, processes) as workers:
        groups = (Group(Planner(of, settings, batch), batch, of.limits[-1]) for batch in batches)
        for number, (batch, group) in enumerate(zip(batches, workers.run(groups), strict=True)):
            collected += group
            facts += [
                Fact(
                    group=number,
                    place=place,
                    policy=settings.digest,
                    algorithm="planner",
                    cost_limit=None,
                    seed=episode_seed,
                    deterministic=False,
                    source=None,
                    **sums(episode),
                )
                for place, (episode_seed, episode) in enumerate(zip(batch, group, strict=True))
            ]
            done(len(collected))
    folder.mkdir(parents=True, exist_ok=True)
    write_dsrl(folder / "dataset.hdf5", collected)
    write_rows(folder / "rows.parquet", facts)
    return folder / "dataset.hdf5"


def references(of: Task, episodes: int, seed: int, processes: int = 1) -> dict[str, Floats]:
    """What uniformly random actions and the planner with the task's own goal achieve: the scores 0 and 100.

    Args:
        of: The maze.
        episodes: Of each of the two, from the same reset seeds.
        seed: Reset seeds are drawn from it.
        processes: Worker processes.

    Returns:
        Episode returns (episodes,) of ``random`` and ``planner``.
    """
    seeds = episode_seeds(seed, episodes)
    batches = [seeds[start : start + NUM_ENVS] for start in range(0, episodes, NUM_ENVS)]
    makers: dict[str, Callable[[int], ActingPolicy]] = {
        "random": lambda number: RandomPolicy(of, seed, number),
        "planner": lambda number: Planner(of, PlannerSettings()),
    }
    found = {}
    with EpisodeWorkers(of.name, NUM_ENVS, processes) as workers:
        for name, make in makers.items():
            groups = (Group(make(number), batch, of.limits[-1]) for number, batch in enumerate(batches))
            returns = [episode.episode_return for group in workers.run(groups) for episode in group]
            found[name] = np.array(returns, dtype=np.float32)
    return found
