"""Collects one task's data set: episodes of every saved expert, so that returns and costs spread over the plane.

Every policy acts for the same number of episodes, most of them with sampled actions (spread around the policy) and
some by its mean (what it would do at its best). Writes DSRL's flat HDF5, the same episodes as a Minari data set, and
the row table that ties each episode to its policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.rl.dataset import Episode, write_dsrl, write_minari
from springhead.rl.envs import run_episodes
from springhead.rl.networks import load_expert
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage
from springhead.tables import write_table


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.collect``."""

    sampled_episodes: int
    """Episodes per policy with actions sampled from its distribution."""
    mean_episodes: int
    """Episodes per policy with its mean actions."""
    num_envs: int
    """Environments stepped together."""

    def __post_init__(self) -> None:
        if min(self.sampled_episodes, self.mean_episodes) < 0 or self.sampled_episodes + self.mean_episodes < 1:
            raise ValueError("sampled_episodes and mean_episodes must not be negative, and not both 0")
        if self.num_envs < 1:
            raise ValueError("num_envs must be at least 1")


ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("policy", pa.string()),
        ("algorithm", pa.string()),
        ("cost_limit", pa.float64()),
        ("seed", pa.int64()),
        ("deterministic", pa.bool_()),
        ("episode_return", pa.float64()),
        ("cost_return", pa.float64()),
        ("length", pa.int64()),
        ("index", pa.int64()),
    ]
)
"""The row table: one row per episode; ``seed`` is its reset seed, ``index`` its position in the HDF5 file."""


@dataclass(frozen=True)
class Row:
    """An episode and where it came from."""

    episode: Episode
    expert: Mapping[str, Any]
    seed: int
    deterministic: bool


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Reads the experts' index and checks every policy against its digest.

    Raises:
        BadInput: If there is no policy, or a policy's files are not those that were saved.
    """
    index: list[dict[str, Any]] = read_json(folder / "index.json")
    if not index:
        raise BadInput(f"{folder / 'index.json'}: names no policies; run the experts stage again")
    for expert in index:
        if tree_digest(folder / expert["name"]) != expert["digest"]:
            raise BadInput(f"{folder / expert['name']}: not the policy that was saved (digest differs); `dvc checkout`")
    return index


def roll_out(of: Task, folder: Path, expert: Mapping[str, Any], params: Params, seeds: list[int]) -> list[Row]:
    """All episodes of one policy: first the sampled ones, then those by its mean.

    Args:
        of: The task.
        folder: The policy's folder.
        expert: Its entry in the index.
        params: How many episodes of each kind.
        seeds: One reset seed per episode; a sampled episode also draws its actions from it.
    """
    rows: list[Row] = []
    sampled, by_mean = seeds[: params.sampled_episodes], seeds[params.sampled_episodes :]
    for start in range(0, len(sampled), params.num_envs):
        batch = sampled[start : start + params.num_envs]
        policy = load_expert(folder, episode_seeds=batch)
        episodes = run_episodes(of.name, policy, batch, float(expert["cost_limit"]), params.num_envs)
        rows += [Row(episode, expert, seed, False) for episode, seed in zip(episodes, batch, strict=True)]
    episodes = run_episodes(of.name, load_expert(folder), by_mean, float(expert["cost_limit"]), params.num_envs)
    rows += [Row(episode, expert, seed, True) for episode, seed in zip(episodes, by_mean, strict=True)]
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes the row table; an episode has no parent rows, what it came from is its policy."""
    episodes = [row.episode for row in rows]
    write_table(
        path,
        {
            "id": [episode.id for episode in episodes],
            "parents": [[] for _ in rows],
            "policy": [row.expert["digest"] for row in rows],
            "algorithm": [row.expert["algorithm"] for row in rows],
            "cost_limit": [float(row.expert["cost_limit"]) for row in rows],
            "seed": [row.seed for row in rows],
            "deterministic": [row.deterministic for row in rows],
            "episode_return": [episode.episode_return for episode in episodes],
            "cost_return": [episode.cost_return for episode in episodes],
            "length": [episode.length for episode in episodes],
            "index": list(range(len(rows))),
        },
        ROWS,
    )


def coverage(episodes: list[Episode], of: Task) -> dict[str, Any]:
    """How the episodes spread: overall ranges, and for each limit how many keep it and the best return of those."""
    returns = np.array([episode.episode_return for episode in episodes])
    costs = np.array([episode.cost_return for episode in episodes])
    figures: dict[str, Any] = {
        "episodes": len(episodes),
        "steps": int(sum(episode.length for episode in episodes)),
        "lowest_return": float(returns.min()),
        "highest_return": float(returns.max()),
        "lowest_cost": float(costs.min()),
        "highest_cost": float(costs.max()),
    }
    for limit in of.limits:
        safe = returns[costs <= limit]
        best = float(safe.max()) if len(safe) else float(returns.min())
        figures[f"limit_{limit:g}"] = {"safe_episodes": len(safe), "best_return": best}
    return figures


def run(stage: Stage[Params]) -> None:
    """Collects the task's episodes and writes them in both formats."""
    of = task(stage.item["task"])
    experts = stage.input("experts")
    index = read_index(experts)
    each = stage.params.sampled_episodes + stage.params.mean_episodes
    rows: list[Row] = []
    with stage.progress(len(index) * each, stage.name, "episodes") as bar:
        for number, expert in enumerate(index):
            seeds = [int(seed) for seed in np.random.default_rng([stage.seed, number]).integers(2**31, size=each)]
            rows += roll_out(of, experts / expert["name"], expert, stage.params, seeds)
            bar.advance(each)
    rows = unique(rows)
    episodes = [row.episode for row in rows]
    write_dsrl(stage.out / "dataset.hdf5", episodes)
    write_minari(stage.out / "minari", f"springhead/{of.name}-v0", episodes, of)
    write_rows(stage.out / "rows.parquet", rows)
    stage.dataset(stage.out / "dataset.hdf5", f"{of.name} episodes", len(rows), role="output")
    stage.metrics(coverage(episodes, of))


def unique(rows: list[Row]) -> list[Row]:
    """Drops an episode whose very bytes are there already: ids are content digests and must be unique."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(row.episode.id, row)
    return list(seen.values())


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
