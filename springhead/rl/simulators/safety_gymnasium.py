"""Safety-Gymnasium: points and cars among hazards, and MuJoCo robots with a speed limit.

Safety-Gymnasium 1.0.0 was made for gymnasium 0.28, MuJoCo 2.3 and NumPy 1. Four things of it break under gymnasium 1,
MuJoCo 3 and NumPy 2, and :func:`_import_package` and :func:`_joints_by_array` get around them without changing a
number or leaving anything patched:

* its ``__init__`` registers environments through ``gymnasium.wrappers.compatibility``, which is gone. It is not run:
  the modules below it work without it;
* its data classes have arrays as defaults, which Python 3.11 takes for mutable ones because arrays have no hash. The
  colours get one before those classes are made;
* the car looks joints up by an array of length 1, which MuJoCo's bindings refuse under NumPy 2;
* ``step`` returns six values, the cost as the third. It moves into ``info``.

The navigation tasks build their world anew at each reset, which took 0.5 to 0.9 seconds: a YAML file parsed, 24 MB of
pictures of a night sky decoded, and places tried until all objects have room. The file is read once, the sky is
plain, and places are tried in quicker arithmetic. No number depends on that (``tests/rl/test_simulators.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
import yaml

from springhead.errors import BadInput
from springhead.rl.simulators.isolation import HEIGHT, WIDTH, quiet
from springhead.rl.simulators.mujoco_camera import Camera
from springhead.rl.simulators.spaces import spaces
from springhead.rl.tasks import Task, task

Floats = npt.NDArray[np.float32]

_PACKAGE = "safety_gymnasium"
_PLAIN_SKY = {
    "@type": "skybox",
    "@builtin": "gradient",
    "@rgb1": ".4 .5 .6",
    "@rgb2": "0 0 0",
    "@width": 32,
    "@height": 32,
}
_DIVERGED = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQACC + 1)


class _Hashable(np.ndarray):
    """An array that may be the default of a data class field."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


@lru_cache(maxsize=1)
def _import_package() -> SimpleNamespace:
    """Imports the parts of the package that the tasks need, as ``builder`` and ``velocity`` (by class name).

    The package is known to the import system only while this function runs: whoever else imports it gets it whole,
    or the error that it raises by itself.

    Raises:
        BadInput: If the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BadInput(f"the package {_PACKAGE} is not installed; run `make install`")
    package = ModuleType(_PACKAGE)
    package.__file__ = spec.origin
    package.__path__ = list(spec.submodule_search_locations or ())
    before = {name: sys.modules.pop(name) for name in _loaded()}
    sys.modules[_PACKAGE] = package
    try:
        colours = importlib.import_module(f"{_PACKAGE}.assets.color").COLOR
        for name, colour in colours.items():
            colours[name] = np.asarray(colour).view(_Hashable)
        builder = importlib.import_module(f"{_PACKAGE}.builder").Builder
        _hasten()
        velocity = {robot: _velocity_class(robot) for robot in ("ant", "half_cheetah", "hopper", "swimmer", "walker2d")}
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)
    return SimpleNamespace(builder=builder, velocity=velocity)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]


def _velocity_class(robot: str) -> Any:
    module = importlib.import_module(f"{_PACKAGE}.tasks.safe_velocity.safety_{robot}_velocity_v1")
    camel = "".join(part.capitalize() for part in robot.split("_"))
    return getattr(module, f"Safety{camel}VelocityEnv")


def _hasten() -> None:
    """Replaces three slow spots of the package by code that computes the same numbers."""
    world: Any = importlib.import_module(f"{_PACKAGE}.world")
    world.yaml = SimpleNamespace(load=_read_assets, FullLoader=yaml.FullLoader)
    generator: Any = importlib.import_module(f"{_PACKAGE}.utils.random_generator").RandomGenerator
    generator.sample_layout = _sample_layout
    gremlins: Any = importlib.import_module(f"{_PACKAGE}.assets.mocaps.gremlins").Gremlins
    gremlins.move = _move_gremlins


def _sample_layout(self: Any) -> bool:
    """Places one object after the other where there is room; in Python's floats, which are quicker one by one."""
    layout: dict[str, Any] = {}
    taken: list[tuple[float, float, float]] = []
    for name, (areas, keepout) in self.placements.items():
        for _ in range(100):
            place = self.draw_placement(areas, keepout)
            x, y = place.tolist()
            for other_x, other_y, other_keepout in taken:
                apart = math.sqrt((x - other_x) * (x - other_x) + (y - other_y) * (y - other_y))
                if apart < other_keepout + self.placements_margin + keepout:
                    break
            else:
                break
        else:
            return False
        layout[name] = place
        taken.append((x, y, keepout))
    self.layout = layout
    return True


def _move_gremlins(self: Any) -> None:
    """Sets the places that the moving objects are drawn to; all have the same, relative to where they began."""
    phase = float(self.engine.data.time)
    place = np.array([np.sin(phase) * self.travel, np.cos(phase) * self.travel, self.size])
    for i in range(self.num):
        self.set_mocap_pos(f"gremlin{i}mocap", place)


def _read_assets(file: Any, Loader: Any) -> Any:
    """Stands in for ``yaml.load`` where the package reads its asset file, at every reset."""
    return _assets(Path(file.name))


@lru_cache(maxsize=4)
def _assets(path: Path) -> Any:
    assets = yaml.safe_load(path.read_text(encoding="utf-8"))
    assets["textures"]["skybox"] = _PLAIN_SKY
    return assets


@contextlib.contextmanager
def _joints_by_array() -> Iterator[None]:
    """Lets ``MjModel.jnt`` take an array of length 1 for an index, as it did before NumPy 2."""
    by_index = mujoco.MjModel.jnt

    def jnt(model: Any, index: Any) -> Any:
        return by_index(model, index.item() if isinstance(index, np.ndarray) else index)

    mujoco.MjModel.jnt = jnt
    try:
        yield
    finally:
        mujoco.MjModel.jnt = by_index


@contextlib.contextmanager
def _no_log_file() -> Iterator[None]:
    """Drops MuJoCo's warnings about old model files, which it writes to MUJOCO_LOG.TXT in the working folder."""
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda _message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(handler)


def _simulator(of: Task) -> Any:
    """Builds the bare simulation of a task, without gymnasium's wrappers."""
    package = _import_package()
    if of.name.endswith("Velocity"):
        robot = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", of.name.removesuffix("Velocity")).lower()
        return package.velocity[robot]()
    agent = re.match("[A-Z][a-z]+", of.name)
    assert agent is not None
    with _joints_by_array():
        return package.builder(task_id=f"Safety{of.name}-v0", config={"agent_name": agent[0]})


class SafetyGymnasiumEnv(gymnasium.Env[Floats, Floats]):
    """A Safety-Gymnasium task under gymnasium's present interface.

    Observations are float32 (observation_dim,), raw and un-normalised; actions are clipped to [-1, 1].
    ``info["cost"]`` is 1 in a step that violates any constraint, else 0. ``terminated`` means that the robot fell
    or, in the Goal and Push tasks, that no place was left for the next goal. The horizon is gymnasium's
    ``TimeLimit``, which ``gymnasium.make`` adds.

    Args:
        task_name: A task of the catalogue.
        render_mode: ``rgb_array`` to draw pictures; nothing else differs.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        self.task = task(task_name)
        self.render_mode = render_mode
        self._camera: Camera | None = None
        self._is_velocity = self.task.name.endswith("Velocity")
        with quiet(), _no_log_file():
            self._simulator = _simulator(self.task)
        # The first reset builds the world another way than all later ones; do it where nobody sees it.
        self._simulator.reset(seed=0)
        self.observation_space, self.action_space = spaces(self.task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Makes the episode reproducible; None continues this environment's own stream.
            options: Not used; present for gymnasium.

        Returns:
            The first observation, float32 (observation_dim,), and an info dictionary with cost 0.
        """
        super().reset(seed=seed, options=options)
        if self._camera is not None and not self._is_velocity:
            self._close_camera()  # the reset builds a new model
        observation, _ = self._simulator.reset(seed=int(self.np_random.integers(2**32)))
        self._warnings = self._simulation.data.warning.number  # a view that MuJoCo keeps up to date
        return np.asarray(observation, dtype=np.float32), {"cost": 0.0}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Args:
            action: (action_dim,); components outside [-1, 1] are clipped.

        Returns:
            Observation float32 (observation_dim,), reward, terminated, False, and info with ``cost`` and, where
            the task has several constraints, ``sub_costs``, float32 (K,); ``cost`` is 1 where any of them is.

        Raises:
            BadInput: If the simulation diverged. MuJoCo would go on from the model's rest position.
        """
        clipped = np.clip(np.asarray(action, dtype=np.float64).reshape(self.task.action_dim), -1.0, 1.0)
        observation, reward, cost, terminated, _, info = self._simulator.step(clipped)
        if self._warnings[_DIVERGED].any():
            raise BadInput(
                f"task {self.task.name}: the simulation diverged under action {clipped}; MuJoCo started it anew"
            )
        info["cost"] = float(cost)
        if self.task.sub_costs:
            info["sub_costs"] = np.array([info.get(f"cost_{name}", 0.0) for name in self.task.sub_costs], np.float32)
        return np.asarray(observation, dtype=np.float32), float(reward), bool(terminated), False, info

    @property
    def _simulation(self) -> Any:
        """What holds MuJoCo's ``model`` and ``data``."""
        return self._simulator if self._is_velocity else self._simulator.task

    def render(self) -> npt.NDArray[np.uint8]:
        """Returns a picture of the present state, uint8 (240, 320, 3): from the side, or of the whole floor.

        Raises:
            BadInput: If MuJoCo cannot draw here.
        """
        if self._camera is None:
            self._camera = Camera(self._simulation.model, WIDTH, HEIGHT, "track" if self._is_velocity else None)
        return self._camera.picture(self._simulation.data)

    def _close_camera(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def close(self) -> None:
        """Releases the simulation."""
        self._close_camera()
        if self._is_velocity:
            self._simulator.close()
