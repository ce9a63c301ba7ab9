"""Environments that keep gymnasium's promises, and a runner of whole episodes.

Bullet-Safety-Gym ignores ``reset(seed=...)``, draws from numpy's global generator, and lets an episode leak into
the next one: motor targets and pending thrust outlive its state restore, so the same start gives another
trajectory. :class:`BulletEnv` closes all three holes. After ``reset(seed=s)`` an episode is a function of ``s`` and
the actions alone: not of earlier episodes, of other environments in the process, or of the global generator. That
is what makes batching free (``run_episodes``) and training resumable at any episode boundary (``online/``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.tasks import TASKS, Task, task

__all__ = ["BulletEnv", "Episode", "EpisodeRunner", "env_name", "make", "run_episodes"]

Floats = npt.NDArray[np.float32]


class ActingPolicy(Protocol):
    """What the runner needs of a policy (``springhead.rl.policy.Policy`` satisfies it)."""

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Starts new episodes in ``num_envs`` environments."""

    def act(self, observations: Floats) -> Floats:
        """Maps observations (num_envs, observation_dim) to actions (num_envs, action_dim)."""

    def observe(self, rewards: Floats, costs: Floats) -> None:
        """Reports the rewards and costs (num_envs,) of the step just taken."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the simulator's start-up chatter, which C code writes straight to the file descriptors."""
    saved_streams = sys.stdout, sys.stderr
    # The simulator package itself redirects sys.stdout by file number and C name, which only the
    # interpreter's own streams have; a captured or wrapped stream would make it fail.
    if sys.__stdout__ is not None and sys.__stderr__ is not None:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    saved = [(number, os.dup(number)) for number in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in saved:
            os.dup2(sink, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        os.close(sink)
        sys.stdout, sys.stderr = saved_streams


def _simulator(of: Task) -> Any:
    """Builds the bare Bullet-Safety-Gym environment of a task (without gymnasium's wrappers)."""
    with _quiet():
        import bullet_safety_gym  # noqa: F401  (registers the ids)

        return gymnasium.make(of.env_id, disable_env_checker=True).unwrapped


class BulletEnv(gymnasium.Env[Floats, Floats]):
    """A Bullet-Safety-Gym task with real seeding, float32 observations and independent episodes.

    Observations are float32 (observation_dim,), raw and un-normalised; actions are clipped to [-1, 1];
    ``info["cost"]`` is the step's cost. ``terminated`` means the robot fell. The horizon is gymnasium's
    ``TimeLimit``, which ``gymnasium.make`` adds, so running out of time is reported as ``truncated``.

    Args:
        task_name: A task of the catalogue.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium declares it without ClassVar)

    def __init__(self, task_name: str) -> None:
        self.task = task(task_name)
        # Built under a fixed global state: construction draws from it too.
        with _global_numpy_seed(0):
            self._simulator = _simulator(self.task)
            # The first reset stores the state that later resets restore; do it where it cannot vary.
            self._simulator.reset()
            self._base_state = _BaseState(self._simulator.agent)
        bound = np.full(self.task.observation_dim, 1000.0, dtype=np.float32)
        self.observation_space = gymnasium.spaces.Box(-bound, bound, dtype=np.float32)
        limit = np.ones(self.task.action_dim, dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(-limit, limit, dtype=np.float32)

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
        # Restoring the stored state keeps three things of the last episode: motor targets, queued forces, and
        # the solver's contact points where the robot stood close to its start. Neutral targets, and one step
        # in the air that uses the forces up and ends all contacts, leave nothing of it behind.
        agent = simulator.agent
        agent.apply_action(np.zeros(self.task.action_dim))
        simulator.bc.resetBasePositionAndOrientation(agent.body_id, [0.0, 0.0, 100.0], [0.0, 0.0, 0.0, 1.0])
        simulator.bc.stepSimulation()
        with _global_numpy_seed(int(self.np_random.integers(2**32))):
            observation, _ = simulator.reset()
        return np.asarray(observation, dtype=np.float32), {"cost": 0.0}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Args:
            action: (action_dim,); components outside [-1, 1] are clipped.

        Returns:
            Observation float32 (observation_dim,), reward, terminated, False, and info with ``cost``.
        """
        clipped = np.clip(np.asarray(action, dtype=np.float32).reshape(self.task.action_dim), -1.0, 1.0)
        observation, reward, terminated, _, info = self._simulator.step(clipped)
        info["cost"] = float(info.get("cost", 0.0))
        return np.asarray(observation, dtype=np.float32), float(reward), bool(terminated), False, info

    def close(self) -> None:
        """Disconnects from the physics server."""
        self._simulator.close()


class _BaseState:
    """Reads the robot's base state once per simulation step, where the package reads it about nine times.

    Also leaves out the red sphere that the package draws around a robot that incurs cost: there is no screen. Both
    together make the light robots' steps almost twice as fast, and change no number (``tests/rl/test_envs.py``).

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


@contextlib.contextmanager
def _global_numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator for the block and puts its former state back afterwards."""
    saved = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(saved)


def env_name(task_name: str) -> str:
    """The gymnasium id of a task, for instance ``springhead/BallCircle-v0``."""
    return f"springhead/{task(task_name).name}-v0"


def _register() -> None:
    for known in TASKS.values():
        if env_name(known.name) not in gymnasium.registry:
            gymnasium.register(
                id=env_name(known.name),
                entry_point="springhead.rl.envs:BulletEnv",
                kwargs={"task_name": known.name},
                max_episode_steps=known.horizon,
            )


_register()


def make(task_name: str, seed: int | None = None) -> gymnasium.Env[Floats, Floats]:
    """Makes the environment of a task, with its time limit.

    Args:
        task_name: A task of the catalogue.
        seed: Seeds the environment's own stream, so that the first ``reset()`` is reproducible;
            ``reset(seed=...)`` overrides it.

    Returns:
        A gymnasium environment; see :class:`BulletEnv` for what it observes and returns.

    Raises:
        BadInput: If the task is unknown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gymnasium.make(env_name(task_name), disable_env_checker=True)
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


class EpisodeRunner:
    """Runs one whole episode in each of several environments, in step.

    Args:
        task_name: A task of the catalogue.
        num_envs: How many environments; at least 1.
    """

    def __init__(self, task_name: str, num_envs: int) -> None:
        if num_envs < 1:
            raise BadInput(f"num_envs is {num_envs}; use at least 1")
        self.task = task(task_name)
        self.num_envs = num_envs
        self._envs = _environments(task_name, num_envs)

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
        """
        if not 1 <= len(seeds) <= self.num_envs:
            raise BadInput(f"{len(seeds)} seeds for {self.num_envs} environments; use 1 to {self.num_envs} per run")
        recorders = [_Recorder(env, seed) for env, seed in zip(self._envs, seeds, strict=False)]
        rows = np.zeros(self.num_envs, dtype=np.intp)
        rows[: len(recorders)] = np.arange(len(recorders))
        while any(recorder.running for recorder in recorders):
            observations = np.stack([recorder.observation for recorder in recorders])
            actions = np.asarray(act(observations[rows]), dtype=np.float32)
            signals = np.array([r.step(a) for r, a in zip(recorders, actions, strict=False)], dtype=np.float32)
            if observe is not None:
                observe(signals[rows, 0], signals[rows, 1])
        return [recorder.episode() for recorder in recorders]


class _Recorder:
    """Steps one environment through one episode and keeps the transitions."""

    def __init__(self, env: gymnasium.Env[Floats, Floats], seed: int) -> None:
        self._env = env
        self.observation, _ = env.reset(seed=int(seed))
        self.running = True
        self._observations = [self.observation]
        self._actions: list[Floats] = []
        self._signals: list[tuple[float, float]] = []
        self._terminated = False

    def step(self, action: Floats) -> tuple[float, float]:
        """Takes a step and returns (reward, cost); (0, 0) once the episode has ended."""
        if not self.running:
            return 0.0, 0.0
        executed = np.clip(action, -1.0, 1.0).astype(np.float32)
        self.observation, reward, self._terminated, truncated, info = self._env.step(executed)
        self.running = not (self._terminated or truncated)
        self._observations.append(self.observation)
        self._actions.append(executed)
        self._signals.append((float(reward), float(info["cost"])))
        return self._signals[-1]

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
