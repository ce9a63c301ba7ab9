"""Data sets of the sparse locomotion tasks, by experts of our own.

    python benchmarks/sparse_locomotion.py train      # SAC-Lag without a limit that binds; goes on where it was stopped
    python benchmarks/sparse_locomotion.py collect    # episodes of its later policies; the threshold; the sparse data

The policies of the last six tenths of a training act with sampled actions, so the data are of medium quality and no
episode is the best that can be. The threshold is the 75th percentile of the episodes' returns: it belongs into the
task's ``options`` in ``springhead/rl/tasks.json``, and ``collect`` says what it is.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from springhead.lineage.digests import file_digest, tree_digest
from springhead.progress import Progress
from springhead.rl.acting import save_expert
from springhead.rl.collection import Plan, facts_of, make_plan, roll_out
from springhead.rl.dsrl_file import write_dsrl
from springhead.rl.episodes import Episode
from springhead.rl.facts import sums, write_rows
from springhead.rl.online.sac_lag import SACLag, SACLagConfig
from springhead.rl.online.training import train
from springhead.rl.shards import Shards
from springhead.rl.simulators.sparse import sparse
from springhead.rl.workers import EpisodeWorkers

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".springhead/sparse-locomotion"
ITERATIONS = {"HalfCheetahVelocity": 40, "HopperVelocity": 200}
"""By dense task; an iteration is two episodes, short ones for a hopper that falls."""
NO_LIMIT = 1e6
EPISODES = 20  # of each policy
NUM_ENVS = 10
SEED = 0


def config_of(dense: str, seed: int) -> SACLagConfig:
    """Small networks and few updates: minutes on one core."""
    return SACLagConfig(
        task=dense,
        seed=seed,
        iterations=ITERATIONS[dense],
        episodes_per_iteration=2,
        num_envs=2,
        hidden=(64, 64),
        discount=0.99,
        n_step=3,
        updates_per_step=0.4,
        buffer_size=200_000,
        cost_limit_start=NO_LIMIT,
        cost_limit_end=NO_LIMIT,
    )


def train_experts(dense: str, folder: Path) -> None:
    """Trains, and saves the policy after every tenth of the training."""
    config = config_of(dense, SEED)
    every = config.iterations // 10
    with EpisodeWorkers(dense, config.num_envs) as workers, Progress(config.iterations, dense) as bar:
        learner = SACLag(config, workers)
        for history in train(learner, folder / "checkpoints", checkpoint_every=every):
            if len(history) % every == 0:
                place = folder / "experts" / f"{len(history):05d}"
                shutil.rmtree(place, ignore_errors=True)  # half-written when a run was killed
                save_expert(place, learner.policy())
            bar.advance(len(history) - bar.done, episode_return=history[-1].episode_return)


def collect(dense: str, folder: Path) -> None:
    """Rolls the later policies out, and writes the sparse data set and its row table."""
    every = ITERATIONS[dense] // 10
    experts = [folder / "experts" / f"{every * tenth:05d}" for tenth in range(5, 11)]
    index: list[dict[str, Any]] = [
        {"name": path.name, "algorithm": "sac-lag", "digest": tree_digest(path), "cost_limit": NO_LIMIT}
        for path in experts
    ]
    plans: list[Plan] = make_plan(index, EPISODES, 0, {}, NUM_ENVS, SEED)
    groups: dict[int, list[Episode]] = {}
    shards = Shards(folder / "shards", print)
    with Progress(len(plans), f"{dense} collect") as bar:

        def finished(number: int, episodes: list[Episode]) -> None:
            groups[number] = episodes
            bar.advance(1)

        roll_out(dense, plans, folder / "experts", shards, NUM_ENVS, 1, finished)
    returns = np.array([episode.episode_return for number in sorted(groups) for episode in groups[number]])
    threshold = round(float(np.percentile(returns, 75)), 3)
    paid, facts = [], []
    for number in sorted(groups):
        for fact, episode in zip(facts_of(number, plans[number], groups[number]), groups[number], strict=True):
            paid.append(sparse(episode, threshold))
            facts.append(replace(fact, cost_limit=None, **sums(paid[-1])))
    write_dsrl(folder / "dataset.hdf5", paid)
    write_rows(folder / "rows.parquet", facts)
    successes = np.mean([episode.episode_return > 0 for episode in paid])
    print(
        f"{dense}: {len(paid)} episodes, {sum(e.length for e in paid)} steps; dense returns {returns.min():.1f} to "
        f"{returns.max():.1f}, mean {returns.mean():.1f}; threshold {threshold}; {100 * successes:.0f} % succeed; "
        f"{folder / 'dataset.hdf5'}: sha256 {file_digest(folder / 'dataset.hdf5')}"
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "collect"))
    parser.add_argument("--task", action="append", choices=ITERATIONS, help="only this one; may be given again")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="policies, checkpoints and data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dense in arguments.task or ITERATIONS:
        step = train_experts if arguments.command == "train" else collect
        step(dense, arguments.folder / dense)


if __name__ == "__main__":
    main()
