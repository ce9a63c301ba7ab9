"""Collects one task's data set: what was imported for the task, and episodes of every saved expert.

Every policy acts for the same number of episodes (times its weight), most of them with sampled actions (spread
around the policy) and some by its mean (what it would do at its best). Writes DSRL's flat HDF5, the same episodes as
a Minari data set, the row table that ties each episode to its policy or to the file it was imported from, and, where
episodes are rejected or thinned, the decisions table. Killed at any instant and started again, it ends with the same
bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.rl.collection import Buffer, facts_of, make_plan, roll_out, select, stream
from springhead.rl.dsrl_file import iter_episodes, write_stream
from springhead.rl.episodes import EPISODE_KEYS, SUB_COSTS, Episode
from springhead.rl.facts import Fact, bare, sums, write_rows
from springhead.rl.minari_file import About, write_minari
from springhead.rl.shards import Shards
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage
from springhead.tables import read_table, write_table


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.collect``."""

    sampled_episodes: int
    """Episodes per policy with actions sampled from its distribution."""
    mean_episodes: int
    """Episodes per policy with its mean actions."""
    num_envs: int
    """Environments stepped together."""
    processes: int = 1
    """Worker processes; the bytes do not depend on them."""
    weights: dict[str, float] = field(default_factory=dict)
    """Factors on the episodes of a policy, by its name or its algorithm; 0 leaves it out."""
    buffers: dict[str, Buffer] = field(default_factory=dict)
    """By task, which episodes are kept; a task that is not named keeps all."""
    about: About = field(default_factory=About)
    """What the Minari data set says of its authors and code."""

    def __post_init__(self) -> None:
        if min(self.sampled_episodes, self.mean_episodes) < 0 or self.sampled_episodes + self.mean_episodes < 1:
            raise ValueError("sampled_episodes and mean_episodes must not be negative, and not both 0")
        if self.num_envs < 1 or self.processes < 0:
            raise ValueError("num_envs must be at least 1 and processes at least 0")
        if not all(0 <= weight < math.inf for weight in self.weights.values()):
            raise ValueError("weights must be finite and not negative; 0 leaves a policy out")


DECISIONS = pa.schema(
    [
        ("id", pa.string()),
        ("rule", pa.string()),
        ("kept", pa.bool_()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("replaced_by", pa.string()),
    ]
)
"""The decisions table, as the filter stage's; nothing is replaced here."""


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Reads the experts' index and checks every policy against its digest.

    Raises:
        BadInput: If a policy's files are not those that were saved.
    """
    index: list[dict[str, Any]] = read_json(folder / "index.json")
    for expert in index:
        if tree_digest(folder / expert["name"]) != expert["digest"]:
            raise BadInput(f"{folder / expert['name']}: not the policy that was saved (digest differs); `dvc checkout`")
    return index


def read_imported(folder: Path, drop_sub_costs: bool) -> list[Fact]:
    """The facts of the imported episodes, in the order of their file."""
    facts = []
    rows = read_table(folder / "rows.parquet").to_pylist()
    columns = ("policy", "algorithm", "cost_limit", "seed", "deterministic", "source")
    for row, episode in zip(rows, iter_episodes(folder / "dataset.hdf5"), strict=True):
        if row["id"] != episode.id:
            raise BadInput(f"{folder}: rows.parquet and dataset.hdf5 name different episodes; import them again")
        known = sums(bare(episode) if drop_sub_costs else episode)
        facts.append(Fact(group=-1, place=row["index"], **{key: row[key] for key in columns}, **known))
    return facts


def write_decisions(path: Path, decisions: Mapping[str, list[Any]]) -> None:
    """Writes the decisions table."""
    write_table(path, {**decisions, "replaced_by": [None] * len(decisions["id"])}, DECISIONS)


def coverage(facts: Sequence[Fact], of: Task) -> dict[str, Any]:
    """How the episodes spread: overall ranges, and for each limit how many keep it and, if any, their best return."""
    returns = np.array([fact.episode_return for fact in facts])
    costs = np.array([fact.cost_return for fact in facts])
    figures: dict[str, Any] = {
        "episodes": len(facts),
        "steps": sum(fact.length for fact in facts),
        "lowest_return": float(returns.min()),
        "highest_return": float(returns.max()),
        "lowest_cost": float(costs.min()),
        "highest_cost": float(costs.max()),
    }
    for limit in of.limits:
        safe = returns[costs <= limit]
        # With none there is no best: the best of the others is what the limit forbids.
        best = {"best_return": float(safe.max())} if len(safe) else {}
        figures[f"limit_{limit:g}"] = {"safe_episodes": len(safe), **best}
    return figures


def collect(stage: Stage[Params], of: Task, shards: Shards, drop_sub_costs: bool) -> list[Fact]:
    """Rolls the experts out, as far as it is not done yet; returns the facts of all episodes in order."""
    params, experts = stage.params, stage.input("experts")
    index = read_index(experts)
    plans = make_plan(index, params.sampled_episodes, params.mean_episodes, params.weights, params.num_envs, stage.seed)
    facts: dict[int, list[Fact]] = {}
    with stage.progress(sum(len(plan.seeds) for plan in plans), stage.name, "episodes") as bar:

        def finished(number: int, episodes: list[Episode]) -> None:
            chosen = [bare(episode) for episode in episodes] if drop_sub_costs else episodes
            facts[number] = facts_of(number, plans[number], chosen)
            bar.advance(len(episodes))

        roll_out(of.name, plans, experts, shards, params.num_envs, params.processes, finished)
    return [fact for number in range(len(plans)) for fact in facts[number]]


def run(stage: Stage[Params]) -> None:
    """Collects the task's episodes and writes them in both formats."""
    of = task(stage.item["task"])
    imported = next((path for folder in stage.inputs("imports") if (path := folder / "dataset.hdf5").exists()), None)
    # A data set has sub-costs for all episodes or for none, and imported files rarely have them.
    drop = imported is not None and bool(of.sub_costs) and next(iter_episodes(imported)).sub_costs is None
    shards = Shards(stage.scratch / "shards", lambda line: print(f"{stage.name}: {line}", file=sys.stderr))
    facts = read_imported(imported.parent, drop) if imported is not None else []
    facts += collect(stage, of, shards, drop)
    if not facts and read_json(stage.input("experts") / "index.json"):
        raise BadInput(
            f"params.yaml: rl.collect.weights leave out every expert of {of.name}, and nothing is imported for it, so "
            "there is nothing to collect; give one a weight above 0"
        )
    if not facts:
        raise BadInput(
            f"{stage.name}: no experts and nothing imported, so there is nothing to collect; set rl.experts.runs or "
            f"rl.imports.sources for {of.name}"
        )
    buffer = stage.params.buffers.get(of.name, Buffer())
    selection = select(facts, buffer, stage.seed)
    write(stage, of, selection.kept, shards, imported, drop)
    if selection.decisions["id"]:
        write_decisions(stage.out / "decisions.parquet", selection.decisions)
    kept = selection.kept
    stage.dataset(stage.out / "dataset.hdf5", f"{of.name} episodes", len(kept), role="output")
    dropped = len(facts) - selection.duplicates - len(kept)
    stage.metrics({**coverage(kept, of), "duplicates": selection.duplicates, "rejected": dropped})


def write(
    stage: Stage[Params], of: Task, kept: Sequence[Fact], shards: Shards, imported: Path | None, drop: bool
) -> None:
    """Writes the kept episodes in both formats, and their row table. One group is held at a time."""
    with_parts = bool(of.sub_costs) and not drop
    keys = (*EPISODE_KEYS, SUB_COSTS) if with_parts else EPISODE_KEYS
    steps = sum(fact.length for fact in kept)
    path = stage.out / "dataset.hdf5"
    write_stream(path, stream(kept, shards, imported, drop), steps, keys, of.sub_costs if with_parts else ())
    named = ("seed", "policy", "algorithm", "cost_limit", "deterministic", "source")
    write_minari(
        stage.out / "minari",
        f"springhead/{of.name}-v0",
        stream(kept, shards, imported, drop),
        of,
        stage.params.about,
        [{name: getattr(fact, name) for name in named} for fact in kept],
        list(dict.fromkeys(fact.algorithm for fact in kept)),
    )
    write_rows(stage.out / "rows.parquet", kept)


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
