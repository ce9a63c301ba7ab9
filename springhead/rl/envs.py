"""Environments that keep gymnasium's promises, and a runner of whole episodes.

Every task of the catalogue is registered as ``springhead/<task>-v0``. Whatever the simulator behind it does
(``simulators/``), after ``reset(seed=s)`` an episode is a function of ``s`` and the actions alone: not of earlier
episodes, of other environments in the process, or of a global generator. That is what makes batching free
(``run_episodes``) and training resumable at any episode boundary (``online/``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput, SpringheadError
from springhead.rl.dataset import Episode
from springhead.rl.tasks import TASKS, Task, task

__all__ = ["ActingPolicy", "Episode", "EpisodeRunner", "SimulatorFault", "env_name", "make", "record", "run_episodes"]

Floats = npt.NDArray[np.float32]


class SimulatorFault(BadInput):
    """A simulator failed in a step, or returned a number that is not finite."""


class ActingPolicy(Protocol):
    """What the runner needs of a policy (``springhead.rl.policy.Policy`` satisfies it)."""

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Starts new episodes in ``num_envs`` environments."""

    def act(self, observations: Floats) -> Floats:
        """Maps observations (num_envs, observation_dim) to actions (num_envs, action_dim)."""

    def observe(self, rewards: Floats, costs: Floats) -> None:
        """Reports the rewards and costs (num_envs,) of the step just taken."""


def env_name(task_name: str) -> str:
    """The gymnasium id of a task, for instance ``springhead/BallCircle-v0``."""
    return _register(task(task_name))


_CLASSES = {
    "bullet-safety-gym": "springhead.rl.simulators.bullet:BulletEnv",
    "safety-gymnasium": "springhead.rl.simulators.safety_gymnasium:SafetyGymnasiumEnv",
    "metadrive": "springhead.rl.simulators.metadrive:MetaDriveEnv",
    "gymnasium-robotics": "springhead.rl.simulators.point_maze:PointMazeEnv",
    "sparse": "springhead.rl.simulators.sparse:SparseEnv",
    "custom": "springhead.rl.simulators.custom:CustomEnv",
}
"""The environment class of each family; gymnasium imports it when the first task of the family is made."""


def _register(known: Task) -> str:
    """Makes a task's gymnasium id known and returns it."""
    name = f"springhead/{known.name}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(
            id=name,
            entry_point=_CLASSES[known.family],
            kwargs={"task_name": known.name},
            max_episode_steps=known.horizon,
        )
    return name


with contextlib.suppress(BadInput):  # a mistake among the custom tasks is reported to whoever uses one
    for _known in TASKS.values():
        _register(_known)


def make(task_name: str, seed: int | None = None, render_mode: str | None = None) -> gymnasium.Env[Floats, Floats]:
    """Makes the environment of a task, with its time limit.

    Args:
        task_name: A task of the catalogue.
        seed: Seeds the environment's own stream, so that the first ``reset()`` is reproducible;
            ``reset(seed=...)`` overrides it.
        render_mode: ``rgb_array`` for an environment whose ``render()`` returns pictures, uint8
            (height, width, 3). Episodes are the same with and without.

    Returns:
        A gymnasium environment. Observations are float32 (observation_dim,), raw and un-normalised; actions are
        clipped to [-1, 1]; ``info["cost"]`` is the step's cost, ``info["sub_costs"]``, float32 (K,), its parts
        where the task has any. The horizon is gymnasium's ``TimeLimit``: running out of time is ``truncated``,
        every other end ``terminated``.

    Raises:
        BadInput: If the task is unknown, or its simulator is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
        env = gymnasium.make(env_name(task_name), disable_env_checker=True, **options)
    if seed is not None:
        env.reset(seed=seed)
    return env


_POOL: dict[str, list[gymnasium.Env[Floats, Floats]]] = {}
"""Environments of this process by task. Building one loads robot meshes (up to 0.7 s); since no episode leaks into
the next, using one again changes nothing."""


def _environments(task_name: str, number: int) -> list[gymnasium.Env[Floats, Floats]]:
    pool = _POOL.setdefault(task_name, [])
    while len(pool) < number:
        pool.append(make(task_name))
    return pool[:number]


def discard(task_name: str) -> None:
    """Forgets this process's environments of a task, for instance because a simulator broke in one of them.

    A reset does not mend every simulator: positions that are not finite outlive it in Bullet.
    """
    for env in _POOL.pop(task_name, []):
        env.close()


class EpisodeRunner:
    """Runs one whole episode in each of several environments, in step.

    Args:
        task_name: A task of the catalogue.
        num_envs: How many environments; at least 1.
        envs: The environments to use; by default those of this process, which are made once.
    """

    def __init__(
        self, task_name: str, num_envs: int, envs: Sequence[gymnasium.Env[Floats, Floats]] | None = None
    ) -> None:
        if num_envs < 1:
            raise BadInput(f"num_envs is {num_envs}; use at least 1")
        self.task = task(task_name)
        self.num_envs = num_envs
        self._envs = _environments(task_name, num_envs) if envs is None else envs

    def run(
        self,
        act: Callable[[Floats], Floats],
        seeds: Sequence[int],
        observe: Callable[[Floats, Floats], None] | None = None,
    ) -> list[Episode]:
        """Runs the episodes that start from the given seeds.

        ``act`` always sees ``num_envs`` rows, the surplus ones repeating the first, because a matrix product may
        round differently for another number of rows. Rows of ended episodes keep their last observation, with
        reward and cost 0; what ``act`` returns for them is ignored.

        Args:
            act: Maps float32 (num_envs, observation_dim) to actions (num_envs, action_dim).
            seeds: At most ``num_envs`` reset seeds; episode i is the function of seed i and its actions.
            observe: Told the rewards and costs, float32 (num_envs,), after each step.

        Returns:
            One episode per seed, in order.

        Raises:
            BadInput: If there are too few or too many seeds, or the policy's actions have another shape.
            SimulatorFault: If a simulator fails in a step.
        """
        if not 1 <= len(seeds) <= self.num_envs:
            raise BadInput(f"{len(seeds)} seeds for {self.num_envs} environments; use 1 to {self.num_envs} per run")
        recorders = [_Recorder(env, seed, self.task.horizon) for env, seed in zip(self._envs, seeds, strict=False)]
        shape = (self.num_envs, self.task.action_dim)
        # What each of the num_envs rows shows.
        shown = recorders + [recorders[0]] * (self.num_envs - len(recorders))
        while any([recorder.running for recorder in recorders]):  # noqa: C419  (a list is quicker)
            observations = np.array([recorder.observation for recorder in shown])
            actions = np.asarray(act(observations), dtype=np.float32)
            if actions.shape != shape:
                raise BadInput(f"the policy's actions have the shape {actions.shape}, {self.task.name} takes {shape}")
            for recorder, action in zip(recorders, actions.clip(-1.0, 1.0), strict=False):
                recorder.step(action)
            if observe is not None:
                signals = np.array([recorder.signals for recorder in shown], dtype=np.float32)
                observe(signals[:, 0], signals[:, 1])
        return [recorder.episode() for recorder in recorders]


class _Recorder:
    """Steps one environment through one episode and keeps the transitions."""

    def __init__(self, env: gymnasium.Env[Floats, Floats], seed: int, horizon: int) -> None:
        # Without gymnasium's wrappers, which count the steps and check the order of calls at a price per step.
        self._env = env.unwrapped
        self._seed, self._horizon = seed, horizon
        self.observation, _ = self._env.reset(seed=int(seed))
        self.running = True
        self.signals = 0.0, 0.0
        """Reward and cost of the last step; 0 once the episode has ended."""
        self._observations = [self.observation]
        self._actions: list[Floats] = []
        self._signals: list[tuple[float, float]] = []
        self._sub_costs: list[Floats] = []
        self._terminated = False

    def step(self, action: Floats) -> None:
        """Takes a step, unless the episode has ended.

        Args:
            action: (action_dim,), in [-1, 1]; kept.

        Raises:
            SimulatorFault: If the simulator fails; names seed and step.
        """
        if not self.running:
            self.signals = 0.0, 0.0
            return
        try:
            self.observation, reward, self._terminated, truncated, info = self._env.step(action)
        except SpringheadError as error:
            kind = SimulatorFault if isinstance(error, BadInput) else type(error)
            raise kind(f"{error} (reset seed {self._seed}, step {len(self._actions)})") from error
        self._actions.append(action)
        self.running = not (self._terminated or truncated or len(self._actions) == self._horizon)
        self.signals = float(reward), float(info["cost"])
        self._observations.append(self.observation)
        self._signals.append(self.signals)
        if "sub_costs" in info:
            self._sub_costs.append(info["sub_costs"])

    def episode(self) -> Episode:
        """The finished episode; an end by falling at the very horizon counts as terminal, not as timeout."""
        states = np.stack(self._observations)
        signals = np.array(self._signals, dtype=np.float32)
        ends = np.zeros(len(signals), dtype=np.bool_)
        ends[-1] = True
        return Episode(
            observations=states[:-1],
            next_observations=states[1:],
            actions=np.stack(self._actions),
            rewards=signals[:, 0].copy(),
            costs=signals[:, 1].copy(),
            terminals=ends & self._terminated,
            timeouts=ends & (not self._terminated),
            sub_costs=np.stack(self._sub_costs) if self._sub_costs else None,
        )


def run_episodes(
    task_name: str,
    policy: ActingPolicy,
    seeds: Sequence[int],
    cost_limit: float,
    num_envs: int = 10,
) -> list[Episode]:
    """Runs a policy for whole episodes, several environments at a time.

    A deterministic policy's episode i depends on ``seeds[i]`` alone, up to the rounding of its own arithmetic for
    different batch sizes; keep ``num_envs`` fixed where bytes must be equal.

    Args:
        task_name: A task of the catalogue.
        policy: Is reset before every batch and always acts for ``num_envs`` rows.
        seeds: One reset seed per episode.
        cost_limit: The episode cost limit told to the policy.
        num_envs: Environments stepped together.

    Returns:
        One episode per seed, in the order of ``seeds``.

    Raises:
        BadInput: If the task is unknown or ``num_envs`` is below 1.
    """
    runner = EpisodeRunner(task_name, num_envs)
    episodes: list[Episode] = []
    for start in range(0, len(seeds), num_envs):
        policy.reset(num_envs, cost_limit)
        episodes += runner.run(policy.act, seeds[start : start + num_envs], policy.observe)
    return episodes


def record(
    task_name: str, policy: ActingPolicy, seed: int, cost_limit: float, every: int = 4, num_envs: int = 1
) -> tuple[npt.NDArray[np.uint8], Episode]:
    """Runs one episode and draws it.

    Args:
        task_name: A task of the catalogue.
        policy: Is reset, and acts for ``num_envs`` equal rows.
        seed: The reset seed.
        cost_limit: The episode cost limit told to the policy.
        every: Steps from one picture to the next, from the start on; the last state is always drawn.
        num_envs: Rows that the policy acts for; the number that ``run_episodes`` was given makes the same bytes.

    Returns:
        The pictures, uint8 (T, height, width, 3), and the episode, the one that ``run_episodes`` runs.

    Raises:
        BadInput: If the task is unknown, or cannot be drawn on this machine.
    """
    env = make(task_name, render_mode="rgb_array").unwrapped  # as the runner steps it
    pictures: list[Any] = []
    steps = 0

    def act(observations: Floats) -> Floats:
        if steps % every == 0:
            pictures.append(env.render())
        return policy.act(observations)

    def observe(rewards: Floats, costs: Floats) -> None:
        nonlocal steps
        steps += 1
        policy.observe(rewards, costs)

    try:
        policy.reset(num_envs, cost_limit)
        (episode,) = EpisodeRunner(task_name, num_envs, [env]).run(act, [seed], observe)
        pictures.append(env.render())
    finally:
        env.close()
    return np.array(pictures, dtype=np.uint8), episode
