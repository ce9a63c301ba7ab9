"""Evaluation of policies: normalised reward and cost under the task's cost limits.

DSRL's protocol (Liu et al. 2023, section 5): deterministic actions, whole episodes, undiscounted sums,
the cost normalised by the limit that the policy was asked to keep in that very episode. (The released
evaluation of CDT normalises by one fixed limit whatever the target was.) All policies meet the same
episodes: episode i of every policy and limit starts from the same reset seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from springhead.rl.dataset import Episode
from springhead.rl.policy import Policy, load_policy
from springhead.rl.tasks import Task, normalised_cost, task
from springhead.rl.workers import EpisodeWorkers, Group

Floats = npt.NDArray[np.float64]


class RandomPolicy:
    """Uniform actions in [-1, 1]: the baseline that any learning must beat.

    Args:
        of: The task.
        seed: Of the actions.
        batch: How many batches of episodes came before; each has actions of its own.
    """

    def __init__(self, of: Task, seed: int, batch: int = 0) -> None:
        self.task = of.name
        self.algorithm = "random"
        self.observation_dim = of.observation_dim
        self.action_dim = of.action_dim
        self._seed = seed
        self._batch = batch
        self._generator = np.random.default_rng([seed, batch])

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Begins new episodes, with actions of their own."""
        self._batch += 1
        self._generator = np.random.default_rng([self._seed, self._batch])

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Draws actions (n, action_dim), whatever is observed."""
        return self._generator.uniform(-1.0, 1.0, (len(observations), self.action_dim)).astype(np.float32)

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Nothing to remember."""


class SavedPolicy:
    """A policy folder, loaded where it acts: only its path travels to a worker process.

    Args:
        folder: The policy folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._policy: Policy | None = None

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Begins new episodes.

        Raises:
            BadInput: If the folder holds no policy, or one that cannot act under the limit.
        """
        self._policy = self._policy or load_policy(self._folder)
        self._policy.reset(num_envs, cost_limit)

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Acts as the policy does."""
        assert self._policy is not None
        return self._policy.act(observations)

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Tells the policy."""
        assert self._policy is not None
        self._policy.observe(rewards, costs)


@dataclass(frozen=True)
class Job:
    """One policy under one cost limit.

    Attributes:
        task: Task name.
        folder: The policy folder, or None for the random policy.
        cost_limit: The episode cost limit told to the policy.
        seeds: Reset seeds, one per episode.
        num_envs: Environments stepped together.
    """

    task: str
    folder: Path | None
    cost_limit: float
    seeds: tuple[int, ...]
    num_envs: int


@dataclass(frozen=True)
class Outcome:
    """What a job's episodes came to, in the order of its seeds.

    Attributes:
        returns: float64 (episodes,), undiscounted sums of rewards.
        costs: float64 (episodes,), undiscounted sums of costs.
        lengths: int64 (episodes,).
    """

    returns: Floats
    costs: Floats
    lengths: npt.NDArray[np.int64]


def groups(job: Job) -> list[Group]:
    """The groups of episodes that a job consists of."""
    found = []
    for batch, start in enumerate(range(0, len(job.seeds), job.num_envs)):
        policy = SavedPolicy(job.folder) if job.folder else RandomPolicy(task(job.task), job.seeds[0], batch)
        found.append(Group(policy, job.seeds[start : start + job.num_envs], job.cost_limit))
    return found


def run_jobs(jobs: Sequence[Job], processes: int, done: Callable[[int], None] = lambda number: None) -> list[Outcome]:
    """Runs jobs, in this process or in worker processes; the results do not depend on which.

    Args:
        jobs: The jobs.
        processes: Worker processes; 1 runs everything in this one.
        done: Called with the number of finished jobs after each, in order.

    Returns:
        One outcome per job, in their order.

    Raises:
        BadInput: If a folder holds no policy, or one that cannot act under the limit.
    """
    outcomes: list[Outcome] = []
    for (name, num_envs), alike in itertools.groupby(jobs, lambda job: (job.task, job.num_envs)):
        parts = [groups(job) for job in alike]
        with EpisodeWorkers(name, num_envs, processes) as workers:
            results = workers.run(itertools.chain.from_iterable(parts))
            for part in parts:
                outcomes.append(_outcome(itertools.islice(results, len(part))))
                done(len(outcomes))
    return outcomes


def _outcome(results: Iterator[list[Episode]]) -> Outcome:
    episodes = list(itertools.chain.from_iterable(results))
    return Outcome(
        returns=np.array([episode.episode_return for episode in episodes]),
        costs=np.array([episode.cost_return for episode in episodes]),
        lengths=np.array([episode.length for episode in episodes], dtype=np.int64),
    )


def episode_seeds(seed: int, number: int, stream: int = 0) -> tuple[int, ...]:
    """Returns the reset seeds of an evaluation, each of 31 bits.

    Args:
        seed: Of the evaluation.
        number: How many.
        stream: Another set of episodes of the same evaluation for each.
    """
    generator = np.random.default_rng([seed, stream] if stream else seed)
    return tuple(int(value) for value in generator.integers(2**31, size=number))


def feasible_first(outcomes: Sequence[Outcome], limit: float) -> int:
    """Chooses among policies: any that keeps the limit on average beats any that does not (FSRL's rule).

    Among those that keep it the highest mean return wins, among the others the lowest mean cost; the later one at a
    tie, which has seen more training. (OSRL takes the lowest cost of all, which prefers policies that do nothing.)

    Args:
        outcomes: What each policy's episodes came to, at least one, in the order of training.
        limit: The mean episode cost to keep.

    Returns:
        The position of the chosen one.
    """

    def rank(position: int) -> tuple[bool, float, int]:
        cost, value = float(outcomes[position].costs.mean()), float(outcomes[position].returns.mean())
        return cost <= limit, value if cost <= limit else -cost, position

    return max(range(len(outcomes)), key=rank)


def figures(outcome: Outcome, of: Task, cost_limit: float) -> dict[str, float]:
    """Summarises the episodes of one policy under one limit.

    Returns:
        Mean and standard deviation (over episodes) of return and cost, raw and normalised, the share of
        episodes over the limit, and the mean length.
    """
    returns = np.array([of.normalised_return(value) for value in outcome.returns])
    costs = np.array([of.normalised_cost(value, cost_limit) for value in outcome.costs])
    return {
        "episodes": len(returns),
        "episode_return": float(outcome.returns.mean()),
        "episode_return_std": float(outcome.returns.std()),
        "cost_return": float(outcome.costs.mean()),
        "cost_return_std": float(outcome.costs.std()),
        "normalised_return": float(returns.mean()),
        "normalised_return_std": float(returns.std()),
        # Of the mean, not the mean of the quotients, whose rounding puts a mean cost at the limit above 1.
        "normalised_cost": of.normalised_cost(float(outcome.costs.mean()), cost_limit),
        "normalised_cost_std": float(costs.std()),
        "violation_probability": float((outcome.costs > cost_limit).mean()),
        "length": float(outcome.lengths.mean()),
    }


def expert_extremes(index: Sequence[dict[str, Any]], limits: Sequence[float]) -> tuple[str, dict[float, str]]:
    """Chooses the experts to compare with, by what they achieved in training.

    Args:
        index: The experts' index: ``name``, ``episode_return`` and ``cost_return`` of each.
        limits: The cost limits.

    Returns:
        The name of the worst expert, the one with the lowest return, and for each limit the best one: the
        highest return among those that kept the limit, or the cheapest where none did.
    """
    worst = min(index, key=lambda expert: (expert["episode_return"], expert["name"]))
    best = {}
    for limit in limits:
        safe = [expert for expert in index if expert["cost_return"] <= limit]
        if safe:
            chosen = max(safe, key=lambda expert: (expert["episode_return"], expert["name"]))
        else:
            chosen = min(index, key=lambda expert: (expert["cost_return"], expert["name"]))
        best[limit] = str(chosen["name"])
    return str(worst["name"]), best


def over_seeds(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages the figures of models that differ in their training seed only.

    Args:
        models: Entries with ``algorithm`` and ``limits`` (figures by limit).

    Returns:
        One row per algorithm and limit, in order of first appearance: the mean over models of each
        figure, and its sample standard deviation over models (``…_spread``, 0 for one model); ``safe`` says whether
        the mean cost keeps the limit, as in :func:`feasible_first`.
    """
    rows = []
    for algorithm in dict.fromkeys(model["algorithm"] for model in models):
        entries = [model for model in models if model["algorithm"] == algorithm]
        for limit in sorted({limit for model in entries for limit in model["limits"]}, key=float):
            group = [model for model in entries if limit in model["limits"]]
            row: dict[str, Any] = {"algorithm": algorithm, "cost_limit": float(limit), "models": len(group)}
            for key in (
                "normalised_return",
                "normalised_cost",
                "violation_probability",
                "episode_return",
                "cost_return",
            ):
                values = np.array([model["limits"][limit][key] for model in group])
                row[key] = float(values.mean())
                row[f"{key}_spread"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            row["normalised_cost"] = normalised_cost(row["cost_return"], row["cost_limit"])
            row["safe"] = row["cost_return"] <= row["cost_limit"]
            rows.append(row)
    return rows


def comparisons(rows: Sequence[dict[str, Any]], references: Sequence[str]) -> list[dict[str, Any]]:
    """Sets every learned algorithm beside the references under the same limit.

    Args:
        rows: Rows of :func:`over_seeds`, those of the references among them.
        references: Algorithm names to compare with.

    Returns:
        One entry per learned algorithm and limit: whether it is safe on average, and its lead in
        normalised return over each reference.
    """
    at = {(row["algorithm"], row["cost_limit"]): row for row in rows}
    found = []
    for row in rows:
        if row["algorithm"] in references:
            continue
        limit = row["cost_limit"]
        leads = {
            f"lead_over_{name}": row["normalised_return"] - at[name, limit]["normalised_return"]
            for name in references
            if (name, limit) in at
        }
        entry = {"algorithm": row["algorithm"], "cost_limit": limit, "safe": row["safe"], **leads}
        found.append(entry)
    return found
