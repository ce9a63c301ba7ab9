"""Collection: which episodes are rolled out, by which policy and from which seed, and which of them are kept.

Every policy of the experts' index acts for whole episodes, some with sampled actions (spread around the policy) and
some by its mean. They are planned in groups of environments stepped together; a group is a function of its policy
and seeds alone, so groups may run in any process, and finished ones are kept as shards (:mod:`springhead.rl.shards`).

Which episodes are kept follows the trajectory buffer by which DSRL's data was made (FSRL's, Liu et al. 2023; see
``docs/methods/collection.md``): those outside given ranges of return and cost are rejected, the others grow a buffer
to 1.5 times its size, which is then thinned over a grid of the (cost, return) plane. Deviations: the draws are seeded;
each thinning is :func:`springhead.rl.filters.thin`, whose grid puts the largest value into the last cell and not
beyond it; a last thinning makes the size the most episodes there are. Every decision is a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl import filters
from springhead.rl.acting import load_expert
from springhead.rl.dsrl_file import iter_episodes
from springhead.rl.episodes import Episode
from springhead.rl.facts import Fact, bare, sums
from springhead.rl.shards import Shards
from springhead.rl.workers import EpisodeWorkers, Group, SimulatorFault, WorkerDied

Entry = Mapping[str, Any]
GROWTH = 1.5
"""The buffer grows to so many times its size before it is thinned."""


@dataclass(frozen=True)
class Buffer:
    """Which episodes of a task are kept."""

    max_episodes: int | None = None
    """Size of the buffer: it grows to 1.5 times this and is thinned over a grid; null keeps every episode."""
    keep: filters.Ranges | None = None
    """Episodes outside these ranges of return and cost are rejected."""

    def __post_init__(self) -> None:
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError("max_episodes must be at least 1, or null")


@dataclass(frozen=True)
class Plan:
    """One group to roll out.

    Attributes:
        expert: Its policy's entry in the experts' index.
        seeds: Reset seeds, one per episode; a sampled episode also draws its actions from it.
        deterministic: Whether the policy acts by its mean.
    """

    expert: Entry
    seeds: tuple[int, ...]
    deterministic: bool


def make_plan(
    index: Sequence[Entry], sampled: int, by_mean: int, weights: Mapping[str, float], num_envs: int, seed: int
) -> list[Plan]:
    """Plans the groups of all policies, in the order of the index.

    Args:
        index: The experts' index.
        sampled: Episodes per policy with sampled actions, before weights.
        by_mean: Episodes per policy with its mean actions, before weights.
        weights: Factors on both numbers, by a policy's name or its algorithm; where both are named, the policy's
            counts. 0 leaves it out; any other weight gives an episode at least.
        num_envs: Episodes in a group, at most.
        seed: Seeds all episodes. Policy number i draws from ``[seed, i]``.

    Raises:
        BadInput: If a weight names no policy and no algorithm of the index.
    """
    known = {str(entry[key]) for entry in index for key in ("name", "algorithm")}
    if unknown := sorted(set(weights) - known):
        raise BadInput(
            f"params.yaml: rl.collect.weights names {', '.join(unknown)}; the experts have {', '.join(sorted(known))}"
        )
    plans: list[Plan] = []
    for number, entry in enumerate(index):
        weight = weights.get(entry["name"], weights.get(entry["algorithm"], 1.0))
        counts = [round(weight * count) for count in (sampled, by_mean)]
        if weight > 0 and not any(counts):
            counts = [1, 0] if sampled >= by_mean else [0, 1]
        seeds = np.random.default_rng([seed, number]).integers(2**31, size=sum(counts)).tolist()
        for deterministic, part in ((False, seeds[: counts[0]]), (True, seeds[counts[0] :])):
            for start in range(0, len(part), num_envs):
                plans.append(Plan(entry, tuple(part[start : start + num_envs]), deterministic))
    return plans


def roll_out(
    task_name: str,
    plans: Sequence[Plan],
    experts: Path,
    shards: Shards,
    num_envs: int,
    processes: int,
    finished: Callable[[int, list[Episode]], None],
) -> None:
    """Rolls out the groups that have no shard yet, and writes their shards.

    Args:
        task_name: The task.
        plans: All groups.
        experts: The folder of the policies.
        shards: The shards.
        num_envs: Environments stepped together.
        processes: Worker processes; the bytes do not depend on them.
        finished: Told the number and the episodes of every group, those first that were there already.

    Raises:
        SimulatorFault: If the simulator returned a number that is not finite; names task, policy, seed and step.
            Groups before it are kept as shards, as they are after any other error.
        WorkerDied: If a group ended its worker again and again.
    """
    missing: list[int] = []
    for number, plan in enumerate(plans):
        found = shards.find(number, len(plan.seeds))
        if found is None:
            missing.append(number)
        else:
            finished(number, found)

    def groups() -> Iterator[Group]:
        for number in missing:
            plan = plans[number]
            seeds = None if plan.deterministic else plan.seeds
            policy = load_expert(experts / plan.expert["name"], seeds)
            yield Group(policy, plan.seeds, float(plan.expert["cost_limit"]))

    done = 0
    with EpisodeWorkers(task_name, num_envs, processes) as workers:
        try:
            for number, episodes in zip(missing, workers.run(groups()), strict=True):
                shards.write(number, episodes)
                finished(number, episodes)
                done += 1
        except (SimulatorFault, WorkerDied) as error:
            expert = plans[missing[done]].expert
            raise type(error)(f"policy {expert['name']} ({expert['algorithm']}): {error}") from error


def facts_of(number: int, plan: Plan, episodes: Sequence[Episode]) -> list[Fact]:
    """The facts of a group's episodes."""
    return [
        Fact(
            group=number,
            place=place,
            policy=plan.expert["digest"],
            algorithm=plan.expert["algorithm"],
            cost_limit=float(plan.expert["cost_limit"]),
            seed=seed,
            deterministic=plan.deterministic,
            source=None,
            **sums(episode),
        )
        for place, (seed, episode) in enumerate(zip(plan.seeds, episodes, strict=True))
    ]


@dataclass(frozen=True)
class Selection:
    """What was kept of the episodes, and why.

    Attributes:
        kept: The facts of the episodes that are kept, in their order.
        decisions: Columns of the decisions table; empty columns where no rule is set.
        duplicates: How many episodes were the very bytes of an earlier one.
    """

    kept: list[Fact]
    decisions: dict[str, list[Any]]
    duplicates: int


def select(facts: Sequence[Fact], buffer: Buffer, seed: int) -> Selection:
    """Decides which episodes are kept, in the order in which they came.

    Args:
        facts: All episodes. Of several with the same id the first counts: ids are digests of content.
        buffer: Which of them to keep.
        seed: Seeds the thinnings; number i draws from ``[seed, i]``.
    """
    first: dict[str, Fact] = {}
    for fact in facts:
        first.setdefault(fact.id, fact)
    pool = list(first.values())
    decisions: dict[str, list[Any]] = {name: [] for name in ("id", "rule", "kept", "value", "threshold")}
    if buffer.keep is not None:
        judgements = filters.ranges(*_plane(pool), buffer.keep)
        for judgement in judgements:
            _record(decisions, judgement, pool)
        pool = [pool[position] for position in judgements[-1].survivors().tolist()]
    if not pool:
        raise BadInput("params.yaml: rl.collect.buffers: keep rejects every episode; widen its ranges")
    if buffer.max_episodes is not None:
        pool = _grow_and_thin(pool, buffer.max_episodes, seed, decisions)
    return Selection(pool, decisions, len(facts) - len(first))


def _grow_and_thin(pool: Sequence[Fact], size: int, seed: int, decisions: dict[str, list[Any]]) -> list[Fact]:
    """The buffer: grows to 1.5 times its size and is thinned to it, again and again, and at the end."""
    buffer: list[Fact] = []
    thinnings = 0
    for number, fact in enumerate(pool, start=1):
        buffer.append(fact)
        last = number == len(pool)
        if len(buffer) <= (size if last else int(GROWTH * size)):
            continue
        rng = np.random.default_rng([seed, thinnings])
        judgement = filters.thin(*_plane(buffer), filters.Thin(size), rng)
        # One row per episode: that of the thinning that dropped it, or of the last one that it survived.
        told = judgement if last else _dropped(judgement)
        _record(decisions, told, buffer)
        buffer = [buffer[position] for position in np.sort(judgement.survivors()).tolist()]
        thinnings += 1
    return buffer


def _dropped(judgement: filters.Judgement) -> filters.Judgement:
    gone = ~judgement.kept
    return filters.Judgement(
        judgement.rule, judgement.index[gone], judgement.kept[gone], judgement.value[gone], judgement.threshold[gone]
    )


def _plane(facts: Sequence[Fact]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    returns = np.array([fact.episode_return for fact in facts], dtype=np.float64)
    return returns, np.array([fact.cost_return for fact in facts], dtype=np.float64)


def _record(decisions: dict[str, list[Any]], judgement: filters.Judgement, facts: Sequence[Fact]) -> None:
    decisions["id"] += [facts[position].id for position in judgement.index.tolist()]
    decisions["rule"] += [judgement.rule] * len(judgement.index)
    for name in ("kept", "value", "threshold"):
        decisions[name] += getattr(judgement, name).tolist()


def stream(kept: Sequence[Fact], shards: Shards, imported: Path | None, drop_sub_costs: bool) -> Iterator[Episode]:
    """Yields the episodes of facts, group after group, so that one group is held at a time.

    Args:
        kept: The facts; those of a group follow each other, and imported ones are in their file's order.
        shards: The groups.
        imported: The imported data set, where there is one.
        drop_sub_costs: Whether sub-costs are left out.
    """
    for group, members in groupby(kept, key=lambda fact: fact.group):
        places = [fact.place for fact in members]
        if group >= 0:
            episodes = shards.load(group)
            chosen: Iterator[Episode] = (episodes[place] for place in places)
        else:
            assert imported is not None
            wanted = set(places)
            chosen = (episode for place, episode in enumerate(iter_episodes(imported)) if place in wanted)
        for episode in chosen:
            yield bare(episode) if drop_sub_costs else episode
