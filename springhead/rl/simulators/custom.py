"""Tasks of the user's own: any gymnasium environment that an entry of ``environments/tasks.yaml`` names.

The environment itself is used as it is. This class holds it to what the entry says and to what the rest of the
pipeline relies on, and says in terms of the entry what does not fit: dimensions, actions in [-1, 1] (others are
rescaled), float32 observations, a cost of at least 0 in every step's info, the horizon of the entry and no other.
That an episode is a function of seed and actions alone cannot be seen in a step; ``springhead tasks --check`` tries
it.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.simulators.spaces import spaces
from springhead.rl.tasks import CUSTOM, Task, custom_root, task

Floats = npt.NDArray[np.float32]


class CustomEnv(gymnasium.Env[Floats, Floats]):
    """A custom task. Observations are float32 (observation_dim,), actions are in [-1, 1], info has ``cost``.

    Args:
        task_name: A custom task of the catalogue.
        render_mode: What the environment is made with; see ``springhead.rl.envs.make``.

    Raises:
        BadInput: If the environment cannot be made, or is not what its entry says.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        self.task = task(task_name)
        self.render_mode = render_mode
        self._env = _make(self.task, render_mode)
        self._low, self._width = _action_range(self.task, self._env.action_space)
        _check_observations(self.task, self._env.observation_space)
        self.observation_space, self.action_space = spaces(self.task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Makes the episode reproducible; None continues this environment's own stream.
            options: Passed on to the environment.

        Returns:
            The first observation, float32 (observation_dim,), and an info dictionary with cost 0.
        """
        super().reset(seed=seed, options=options)
        observation, _ = self._env.reset(seed=int(self.np_random.integers(2**31)), options=options)
        return self._observed(observation), {"cost": 0.0}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Args:
            action: (action_dim,), scaled from [-1, 1] to the environment's own range; what lies outside is clipped.

        Returns:
            Observation float32 (observation_dim,), reward, terminated, truncated, and info with ``cost`` and, where
            the entry names any, ``sub_costs``, float32 (K,).

        Raises:
            BadInput: If the step's info has no cost, or a negative one.
        """
        clipped = np.clip(np.asarray(action, dtype=np.float64).reshape(self.task.action_dim), -1.0, 1.0)
        own = (self._low + (clipped + 1.0) * self._width / 2.0).astype(self._env.action_space.dtype)
        observation, reward, terminated, truncated, info = self._env.step(own)
        info = {**info, "cost": self._signal(info, self.task.cost_key, "cost_key")}
        if self.task.sub_costs:
            signals = [self._signal(info, key, "sub_costs") for key in self.task.sub_costs]
            info["sub_costs"] = np.array(signals, dtype=np.float32)
        return self._observed(observation), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """A picture of the present state, as the environment draws it."""
        return self._env.render()

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()

    def _observed(self, observation: Any) -> Floats:
        observed = np.asarray(observation, dtype=np.float32)
        if observed.shape != (self.task.observation_dim,):
            raise BadInput(
                f"task {self.task.name}: an observation has shape {observed.shape}; its entry in {CUSTOM} says "
                f"observation_dim {self.task.observation_dim}"
            )
        return observed

    def _signal(self, info: dict[str, Any], key: str, setting: str) -> float:
        if key not in info:
            raise BadInput(
                f"task {self.task.name}: a step's info has no {key!r}; it has {', '.join(sorted(info)) or 'nothing'}. "
                f"Set {setting} of its entry in {CUSTOM}"
            )
        value = float(info[key])
        if value < 0:
            raise BadInput(f"task {self.task.name}: info[{key!r}] is {value}; a cost is 0 or more")
        return value


def _make(of: Task, render_mode: str | None) -> Any:
    """Makes the environment that an entry names, from the checkout's own modules or an installed package."""
    root = custom_root()
    if root is not None and str(root) not in sys.path:
        sys.path.append(str(root))
    options = {**of.options, **({"render_mode": render_mode} if render_mode is not None else {})}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # -1 leaves out the time limit that the environment is registered with: the entry's horizon holds.
            return gymnasium.make(of.env_id, max_episode_steps=-1, disable_env_checker=True, **options)
    except Exception as error:  # whatever the user's own code raises
        raise BadInput(
            f"task {of.name}: cannot make {of.env_id!r} of {CUSTOM}: {type(error).__name__}: {error}"
        ) from error


def _action_range(of: Task, space: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The lowest action and the width of the range, (action_dim,)."""
    if not isinstance(space, gymnasium.spaces.Box) or space.shape != (of.action_dim,):
        raise BadInput(
            f"task {of.name}: the actions are {space}; its entry in {CUSTOM} says a vector of action_dim "
            f"{of.action_dim} real numbers"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise BadInput(f"task {of.name}: the actions are {space}; give every component finite bounds")
    return low, high - low


def _check_observations(of: Task, space: Any) -> None:
    if not isinstance(space, gymnasium.spaces.Box) or space.shape != (of.observation_dim,):
        raise BadInput(
            f"task {of.name}: the observations are {space}; its entry in {CUSTOM} says a vector of observation_dim "
            f"{of.observation_dim} real numbers (gymnasium.wrappers.FlattenObservation makes one of most spaces)"
        )
