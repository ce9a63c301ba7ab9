"""Does a task behave as its entry says and as the pipeline relies on? ``springhead tasks --check NAME``.

Dimensions, ranges, types and ends of every step; costs and their parts; and what no single step shows: that an
episode is a function of reset seed and actions alone, whatever ran before it, in another environment and in another
process. Collected data, batching, workers and exact resume rest on that.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.envs import make
from springhead.rl.tasks import Task, task

Floats = npt.NDArray[np.float32]

_TOLERANCE = 1e-6  # of a sum of sub-costs, which are float32
_ATTEMPTS = 8
_HELD = 25  # steps in one direction: white noise goes nowhere and meets no cost


@dataclass(frozen=True)
class Conduct:
    """What a check saw.

    Attributes:
        task: The task's name.
        steps: Steps of the episode that was repeated.
        ended: ``terminated``, ``truncated``, or ``running`` where the check stopped first.
        episode_return: Its sum of rewards under random actions.
        episode_cost: Its sum of costs.
        sub_costs: Sums of its separate constraint signals, by name.
        steps_per_second: Of one environment, resets not counted.
        reset_seconds: Of one reset; not the first, which may start a simulator.
        digest: SHA-256 of everything the episode showed.
    """

    task: str
    steps: int
    ended: str
    episode_return: float
    episode_cost: float
    sub_costs: dict[str, float]
    steps_per_second: float
    reset_seconds: float
    digest: str


def check(task_name: str, steps: int = 200, seed: int = 7, other_process: bool = True) -> Conduct:
    """Steps a task under random actions and holds it to its entry.

    Args:
        task_name: A task of the catalogue.
        steps: Most steps of an episode; at least the horizon runs whole episodes.
        seed: Decides the reset seeds and the actions.
        other_process: Also compare with the same episode in another process.

    Returns:
        Figures of the episode that was repeated.

    Raises:
        BadInput: Naming the task and the first thing that is not as it must be.
    """
    known = task(task_name)
    env = make(task_name)
    try:
        _check_spaces(known, env)
        found = _run(known, env, seed, steps)
        for before in (1, max(1, steps // 2)):  # short and long ones leave different things behind
            _run(known, env, seed + 1 + before, before)
        again = _run(known, env, seed, steps)
        _demand(known, again.digest == found.digest, "an episode depends on the ones before it, not on its seed alone")
        _check_seeds_matter(known, env, seed, steps)
        second = make(task_name)
        try:
            elsewhere = _run(known, second, seed, steps)
        finally:
            second.close()
        _demand(known, elsewhere.digest == found.digest, "a second environment gives another episode for the same seed")
    finally:
        env.close()
    if other_process:
        digest = _in_another_process(task_name, steps, seed)
        _demand(known, digest == found.digest, "another process gives another episode for the same seed")
    return replace(found, reset_seconds=again.reset_seconds)


def _demand(known: Task, holds: bool, message: str) -> None:
    if not holds:
        raise BadInput(f"task {known.name}: {message}")


def _check_seeds_matter(known: Task, env: gymnasium.Env[Floats, Floats], seed: int, steps: int) -> None:
    """Two seeds must differ under some actions: what they decide may be out of sight of a robot that soon fails."""
    for attempt in range(_ATTEMPTS):
        one, other = (_run(known, env, start, steps, actions_of=seed + attempt) for start in (seed, seed + 1))
        if one.digest != other.digest:
            return
    _demand(known, False, "another seed gives the same episode; reset must use its seed")


def _check_spaces(known: Task, env: gymnasium.Env[Floats, Floats]) -> None:
    def box(space: Any, dim: int) -> bool:
        return isinstance(space, gymnasium.spaces.Box) and space.shape == (dim,) and space.dtype == np.float32

    _demand(known, box(env.observation_space, known.observation_dim), f"observations are {env.observation_space}")
    _demand(known, box(env.action_space, known.action_dim), f"actions are {env.action_space}")
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    full = bool((env.action_space.low == -1).all() and (env.action_space.high == 1).all())
    _demand(known, full, f"actions are {env.action_space}, not in [-1, 1]")
    horizon = env.spec.max_episode_steps if env.spec is not None else None
    _demand(known, horizon == known.horizon, f"the time limit is {horizon}, the entry's horizon {known.horizon}")


def _run(
    known: Task, env: gymnasium.Env[Floats, Floats], seed: int, steps: int, actions_of: int | None = None
) -> Conduct:
    """Runs one episode of at most ``steps`` steps under random actions, checking each."""
    generator = np.random.default_rng(seed if actions_of is None else actions_of)
    demand: Callable[[bool, str], None] = lambda holds, message: _demand(known, holds, message)  # noqa: E731
    seen = hashlib.sha256()
    start = time.perf_counter()
    observation, _ = env.reset(seed=seed)
    reset_seconds = time.perf_counter() - start
    seen.update(_observed(known, observation))
    rewards: list[float] = []
    costs: list[float] = []
    parts: list[Floats] = []
    ended = "running"
    start = time.perf_counter()
    while ended == "running" and len(rewards) < steps:
        if len(rewards) % _HELD == 0:
            aim = generator.uniform(-1.0, 1.0, known.action_dim)
        action = np.clip(aim + generator.normal(0.0, 0.2, known.action_dim), -1.0, 1.0).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        where = f"step {len(rewards)}"
        demand(isinstance(reward, float) and np.isfinite(reward), f"{where}: the reward is {reward!r}")
        parts.append(_costs(known, info, where))
        rewards.append(float(reward))
        costs.append(info["cost"])
        seen.update(
            _observed(known, observation) + np.array([reward, info["cost"]], np.float64).tobytes() + parts[-1].tobytes()
        )
        demand(isinstance(terminated, bool) and isinstance(truncated, bool), f"{where}: its end flags are no bools")
        ended = "terminated" if terminated else "truncated" if truncated else "running"
    seconds = time.perf_counter() - start
    seen.update(ended.encode())
    demand(known.terminates or ended != "terminated", f"an episode terminated at step {len(rewards)}; set terminates")
    demand(ended != "running" or len(rewards) < known.horizon, "an episode went on past the horizon")
    early = f"an episode was truncated at step {len(rewards)}, before the horizon; leave time to the entry's horizon"
    demand(ended != "truncated" or len(rewards) == known.horizon, early)
    sums = np.stack(parts).sum(axis=0, dtype=np.float64)
    return Conduct(
        task=known.name,
        steps=len(rewards),
        ended=ended,
        episode_return=float(np.sum(rewards)),
        episode_cost=float(np.sum(costs)),
        sub_costs=dict(zip(known.sub_costs, sums.tolist(), strict=True)),
        steps_per_second=len(rewards) / seconds,
        reset_seconds=reset_seconds,
        digest=seen.hexdigest(),
    )


def _observed(known: Task, observation: Any) -> bytes:
    right = isinstance(observation, np.ndarray) and observation.dtype == np.float32
    _demand(known, right and observation.shape == (known.observation_dim,), "an observation is no float32 vector of it")
    _demand(known, bool(np.isfinite(observation).all()), "an observation holds numbers that are not finite")
    return bytes(observation.tobytes())


def _costs(known: Task, info: dict[str, Any], where: str) -> Floats:
    """Checks a step's cost against its parts and returns the parts, float32 (K,)."""
    cost = info.get("cost")
    _demand(known, isinstance(cost, float) and 0 <= cost < np.inf, f"{where}: info['cost'] is {cost!r}")
    assert isinstance(cost, float)
    if known.cost_kind == "binary":
        _demand(known, cost in (0.0, 1.0), f"{where}: the cost is {cost}; set cost_kind to continuous")
    parts = np.asarray(info.get("sub_costs", ()), dtype=np.float32)
    _demand(known, parts.shape == (len(known.sub_costs),), f"{where}: sub_costs has shape {parts.shape}")
    if len(parts):
        _demand(known, bool((parts >= 0).all()), f"{where}: a sub-cost is negative: {parts}")
        whole = float(parts.max() if known.cost_kind == "binary" else parts.sum(dtype=np.float64))
        rule = "maximum" if known.cost_kind == "binary" else "sum"
        near = abs(cost - whole) <= _TOLERANCE * max(1.0, cost)
        _demand(known, near, f"{where}: the cost is {cost}, the {rule} of its sub-costs {whole}")
    return parts


def _in_another_process(task_name: str, steps: int, seed: int) -> str:
    """The digest of the same episode, run by another interpreter."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from springhead.rl import conduct; "
        "print('digest', conduct.digest(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), task_name, str(steps), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BadInput(f"task {task_name}: fails in a process of its own: {last[0]}")
    return done.stdout.rpartition("digest ")[2].strip()


def digest(task_name: str, steps: int, seed: int) -> str:
    """Runs the episode that :func:`check` repeats and returns its digest."""
    env = make(task_name)
    try:
        return _run(task(task_name), env, seed, steps).digest
    finally:
        env.close()
