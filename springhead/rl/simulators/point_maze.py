"""PointMaze of gymnasium-robotics as the task that D4RL made of it (Fu et al. 2020, "D4RL", section 5, maze2d-*-v1).

The simulation is the package's: its maps, its model, its limit on the speed. The task is D4RL's: one fixed goal, a
start in any other free cell, a reward of 1 for every step within 0.5 m of the goal, no end but the horizon, no cost.
The goal is the same in every episode, hence no part of the observation: position and velocity.

Deviations from D4RL:

1. The goal is the middle of its cell. D4RL draws it within 0.1 m of there, once for each environment that is made.
2. Positions have the package's origin, the middle of the map, and its axes; D4RL counts cells from a corner.
3. The speed is limited to 5 m/s per axis as in the package; in D4RL to 5.2.

Deviation from the package: its ``step`` runs the forward dynamics twice to limit the speed; here the velocity is
clipped in place, which the step's own forward pass then sees. Episodes agree to rounding, which a test shows.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.simulators.isolation import HEIGHT, WIDTH, quiet
from springhead.rl.simulators.mujoco_camera import Camera
from springhead.rl.simulators.spaces import spaces
from springhead.rl.tasks import Task, task

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.float64]

GOAL_RADIUS = 0.5
"""Metres from the goal within which a step is paid."""
START_NOISE = 0.1
"""A start lies so far from the middle of its cell at most (m per axis); also the deviation of its velocity (m/s)."""
TOP_SPEED = 5.0
"""m/s per axis, before each step."""


@dataclass(frozen=True)
class Layout:
    """Where the cells of a maze are. A cell is a square metre.

    Attributes:
        walls: bool (rows, columns).
        goal_cell: Row and column of the goal.
    """

    walls: npt.NDArray[np.bool_]
    goal_cell: tuple[int, int]

    @property
    def free(self) -> npt.NDArray[np.int64]:
        """Rows and columns of the cells without a wall, (cells, 2), row by row."""
        return np.argwhere(~self.walls).astype(np.int64)

    def centres(self, cells: npt.NDArray[np.int64]) -> Places:
        """Middles (n, 2) in metres, x and y, of cells (n, 2)."""
        rows, columns = self.walls.shape
        cells = np.asarray(cells)
        return np.stack([cells[:, 1] + 0.5 - columns / 2, rows / 2 - cells[:, 0] - 0.5], axis=1)

    def cells(self, places: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Rows and columns (n, 2) of the cells that places (n, 2), x and y in metres, lie in."""
        rows, columns = self.walls.shape
        found = np.stack([np.floor(rows / 2 - places[:, 1]), np.floor(places[:, 0] + columns / 2)], axis=1)
        return found.astype(np.int64)

    @property
    def goal(self) -> Places:
        """The goal (2,), x and y in metres."""
        place: Places = self.centres(np.array([self.goal_cell]))[0]
        return place


def layout(of: Task) -> Layout:
    """The maze of a task, from the package's map.

    Raises:
        BadInput: If the package is not installed.
    """
    walls = np.array(_package_settings(of)["maze_map"]) == 1
    row, column = of.options["goal_cell"]
    return Layout(walls, (int(row), int(column)))


def _package_settings(of: Task) -> dict[str, Any]:
    """What the package registers the environment with."""
    try:
        with quiet():  # it warns of environments that nobody asked for
            import gymnasium_robotics  # noqa: F401  (importing it registers its environments)
    except ImportError as error:
        raise BadInput(f"the package gymnasium-robotics is not installed ({error}); run `make install`") from error
    return dict(gymnasium.spec(of.env_id).kwargs)


def _simulation(of: Task) -> Any:
    """The package's environment. It writes its model into the folder for temporary files and leaves it there, under a
    name that another process may choose too; so it gets a folder of its own.
    """
    settings = _package_settings(of)
    entry: Any = gymnasium.envs.registration.load_env_creator(str(gymnasium.spec(of.env_id).entry_point))
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            return entry(**settings)
        finally:
            tempfile.tempdir = before


class PointMazeEnv(gymnasium.Env[Floats, Floats]):
    """A point mass that is pushed through a maze.

    Observations are float32 (4,): x, y in metres and their velocities in m/s. Actions are the forces along x and y,
    in [-1, 1] of 100 N. ``info["cost"]`` is always 0. The horizon is gymnasium's ``TimeLimit``, which
    ``gymnasium.make`` adds.

    Args:
        task_name: A maze of the catalogue.
        render_mode: ``rgb_array`` to draw pictures; nothing else differs.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        self.task = task(task_name)
        self.render_mode = render_mode
        self._camera: Camera | None = None
        self.layout = layout(self.task)
        self._package = _simulation(self.task)
        self._model, self._data = self._package.model, self._package.data
        self._qpos, self._qvel, self._ctrl = self._data.qpos, self._data.qvel, self._data.ctrl  # views
        self._goal_x, self._goal_y = self.layout.goal.tolist()
        self._model.site("target").pos[:2] = self.layout.goal  # for pictures
        cells = self.layout.free
        self._starts = self.layout.centres(cells[(cells != self.layout.goal_cell).any(axis=1)])
        self.observation_space, self.action_space = spaces(self.task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts an episode in a random free cell other than the goal's.

        Args:
            seed: Makes the episode reproducible; None continues this environment's own stream.
            options: Not used; present for gymnasium.

        Returns:
            The first observation, float32 (4,), and an info dictionary with cost 0.
        """
        super().reset(seed=seed, options=options)
        start = self._starts[self.np_random.integers(len(self._starts))]
        mujoco.mj_resetData(self._model, self._data)
        self._qpos[:] = start + self.np_random.uniform(-START_NOISE, START_NOISE, size=2)
        self._qvel[:] = START_NOISE * self.np_random.standard_normal(2)
        return self._observed(), {"cost": 0.0}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step of 0.01 s.

        Args:
            action: (2,); components outside [-1, 1] are clipped.

        Returns:
            Observation float32 (4,), reward 0 or 1, False, False, and info with ``cost`` 0.
        """
        # Python's numbers: NumPy's price of a call is several times that of the whole simulation step.
        right, up = action.tolist()
        self._ctrl[:] = min(max(right, -1.0), 1.0), min(max(up, -1.0), 1.0)
        across, along = self._qvel.tolist()
        if not (abs(across) <= TOP_SPEED and abs(along) <= TOP_SPEED):
            self._qvel[:] = np.clip(self._qvel, -TOP_SPEED, TOP_SPEED)
        mujoco.mj_step(self._model, self._data)
        x, y = self._qpos.tolist()
        near = (x - self._goal_x) ** 2 + (y - self._goal_y) ** 2 <= GOAL_RADIUS**2
        return self._observed(), float(near), False, False, {"cost": 0.0}

    def _observed(self) -> Floats:
        return np.array([*self._qpos.tolist(), *self._qvel.tolist()], dtype=np.float32)

    def render(self) -> npt.NDArray[np.uint8]:
        """Returns a picture of the whole maze, uint8 (240, 320, 3).

        Raises:
            BadInput: If MuJoCo cannot draw here.
        """
        mujoco.mj_kinematics(self._model, self._data)
        if self._camera is None:
            self._camera = Camera(self._model, WIDTH, HEIGHT, None, distance=1.2 * max(self.layout.walls.shape))
        return self._camera.picture(self._data)

    def close(self) -> None:
        """Releases the simulation."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self._package.close()
