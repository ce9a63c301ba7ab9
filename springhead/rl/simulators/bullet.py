"""Bullet-Safety-Gym: balls, cars, drones and ants that run and circle.

The package ignores ``reset(seed=...)``, draws from numpy's global generator, and lets an episode leak into
the next one: motor targets and pending thrust outlive its state restore, so the same start gives another
trajectory. :class:`BulletEnv` closes all three holes. After ``reset(seed=s)`` an episode is a function of ``s`` and
the actions alone: not of earlier episodes, of other environments in the process, or of the global generator.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.rl.simulators.isolation import HEIGHT, WIDTH, global_numpy_seed, quiet
from springhead.rl.simulators.spaces import spaces
from springhead.rl.tasks import Task, task

Floats = npt.NDArray[np.float32]

_SUB_COSTS = {"boundary": "cost_outside_bounds", "velocity": "cost_velocity_violation"}
"""Our names of the separate constraint signals and the package's, which leaves a signal of 0 out."""


def _simulator(of: Task) -> Any:
    """Builds the bare Bullet-Safety-Gym environment of a task (without gymnasium's wrappers)."""
    with quiet():
        import bullet_safety_gym  # noqa: F401  (registers the ids)

        return gymnasium.make(of.env_id, disable_env_checker=True).unwrapped


class BulletEnv(gymnasium.Env[Floats, Floats]):
    """A Bullet-Safety-Gym task with real seeding, float32 observations and independent episodes.

    Observations are float32 (observation_dim,), raw and un-normalised; actions are clipped to [-1, 1];
    ``info["cost"]`` is the step's cost. ``terminated`` means the robot fell. The horizon is gymnasium's
    ``TimeLimit``, which ``gymnasium.make`` adds, so running out of time is reported as ``truncated``.

    Args:
        task_name: A task of the catalogue.
        render_mode: ``rgb_array`` to draw pictures; nothing else differs.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        self.task = task(task_name)
        self.render_mode = render_mode
        self._cost = 0.0  # of the last step
        # Built under a fixed global state: construction draws from it too.
        with global_numpy_seed(0):
            self._simulator = _simulator(self.task)
            # The first reset stores the state that later resets restore; do it where it cannot vary.
            self._simulator.reset()
            self._base_state = _BaseState(self._simulator.agent)
        self.observation_space, self.action_space = spaces(self.task, 1000.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Makes the episode reproducible; None continues this environment's own stream.
            options: Not used; present for gymnasium.

        Returns:
            The first observation, float32 (observation_dim,), and an info dictionary with cost 0.
        """
        super().reset(seed=seed, options=options)
        simulator = self._simulator
        self._base_state.forget(until_step=True)
        self._cost = 0.0
        # Restoring the stored state keeps three things of the last episode: motor targets, queued forces, and
        # the solver's contact points where the robot stood close to its start. Neutral targets, and one step
        # in the air that uses the forces up and ends all contacts, leave nothing of it behind.
        agent = simulator.agent
        agent.apply_action(np.zeros(self.task.action_dim))
        simulator.bc.resetBasePositionAndOrientation(agent.body_id, [0.0, 0.0, 100.0], [0.0, 0.0, 0.0, 1.0])
        simulator.bc.stepSimulation()
        with global_numpy_seed(int(self.np_random.integers(2**32))):
            observation, _ = simulator.reset()
        return np.asarray(observation, dtype=np.float32), {"cost": 0.0}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Args:
            action: (action_dim,); components outside [-1, 1] are clipped.

        Returns:
            Observation float32 (observation_dim,), reward, terminated, False, and info with ``cost`` and, in the
            Run tasks, ``sub_costs``, float32 (2,); ``cost`` is 1 where any of them is.
        """
        clipped = np.clip(np.asarray(action, dtype=np.float32).reshape(self.task.action_dim), -1.0, 1.0)
        observation, reward, terminated, _, info = self._simulator.step(clipped)
        info["cost"] = self._cost = float(info.get("cost", 0.0))
        if self.task.sub_costs:
            info["sub_costs"] = np.array([info.get(_SUB_COSTS[name], 0.0) for name in self.task.sub_costs], np.float32)
        return np.asarray(observation, dtype=np.float32), float(reward), bool(terminated), False, info

    def render(self) -> npt.NDArray[np.uint8]:
        """Returns a picture of the present state by Bullet's software renderer, uint8 (240, 320, 3).

        A red ball is above the robot where the last step had a cost.
        """
        simulator, client = self._simulator, self._simulator.bc
        agent = simulator.agent
        x, y, z = agent.get_position()
        # The software renderer draws the package's see-through ball solid: around the robot it would hide it.
        ball = [x, y, z + 1.0] if self._cost > 0 else [0.0, 0.0, -100.0]
        client.resetBasePositionAndOrientation(agent.violation_body_id, ball, [0.0, 0.0, 0.0, 1.0])
        camera = simulator.world.camera
        view = client.computeViewMatrixFromYawPitchRoll(
            camera.cam_base_pos, camera.cam_dist, camera.cam_yaw, camera.cam_pitch, 0, 2
        )
        lens = client.computeProjectionMatrixFOV(60.0, WIDTH / HEIGHT, 0.1, 100.0)
        _, _, pixels, _, _ = client.getCameraImage(WIDTH, HEIGHT, view, lens, renderer=client.ER_TINY_RENDERER)
        return np.asarray(pixels, dtype=np.uint8).reshape(HEIGHT, WIDTH, 4)[..., :3]

    def close(self) -> None:
        """Disconnects from the physics server."""
        self._simulator.close()


class _BaseState:
    """Reads the robot's base state once per simulation step, where the package reads it about nine times.

    Also leaves out the red sphere that the package draws around a robot that incurs cost at every step. Both
    together make the light robots' steps almost twice as fast, and change no number (``tests/rl/test_simulators.py``).

    Args:
        agent: The simulator package's robot; its state readers are replaced on this object alone.
    """

    def __init__(self, agent: Any) -> None:
        self._known: dict[int, npt.NDArray[np.float64]] = {}
        self._keep = False
        for body in (agent, agent.root_link):
            if body is not None:  # a robot of one body has no root link
                self._wrap(body)
        after_step = agent.collect_information_after_step

        def collect() -> None:
            self.forget(until_step=False)
            after_step()

        agent.collect_information_after_step = collect
        agent.violates_constraints = lambda _violated: None

    def forget(self, until_step: bool) -> None:
        """Drops what is known; with ``until_step``, keeps nothing before the next simulation step."""
        self._known.clear()
        self._keep = not until_step

    def _wrap(self, body: Any) -> None:
        read = body.get_state

        def get_state() -> npt.NDArray[np.float64]:
            if id(body) in self._known:
                return self._known[id(body)]
            state: npt.NDArray[np.float64] = read()
            if self._keep:
                state.flags.writeable = False
                self._known[id(body)] = state
            return state

        body.get_state = get_state
