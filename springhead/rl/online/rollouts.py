"""An iteration's policy, and its episodes: seeded by (run, iteration) alone and run in groups, in any processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from springhead.errors import BadInput
from springhead.rl.acting import ExpertConfig, ExpertPolicy, episode_noise
from springhead.rl.dataset import Episode
from springhead.rl.networks import Moments, weights_of
from springhead.rl.online.contract import Learner, OnlineConfig
from springhead.rl.tasks import task
from springhead.rl.workers import EpisodeWorkers, Group


def episode_seeds(config: OnlineConfig, iteration: int) -> tuple[int, ...]:
    """The reset seeds of an iteration's episodes, of 31 bits; they also seed the episodes' action noise."""
    generator = np.random.default_rng([config.seed, iteration, 0])
    return tuple(int(seed) for seed in generator.integers(2**31, size=config.episodes_per_iteration))


def expert(learner: Learner, actor: nn.Module, moments: Moments, **network: Any) -> ExpertPolicy:
    """The policy of a learner as it is now; acts by its mean.

    Args:
        learner: Says what the policy comes from.
        actor: Its network.
        moments: By which its observations are normalised.
        **network: What :class:`ExpertConfig` is to say of the network, where that is not the default.
    """
    config = learner.config
    return ExpertPolicy(
        ExpertConfig(
            task=config.task,
            algorithm=learner.algorithm,
            cost_limit=config.cost_limit(max(learner.iteration - 1, 0)),
            seed=config.seed,
            env_steps=learner.env_steps,
            observation_mean=tuple(float(x) for x in moments.mean.astype(np.float32)),
            observation_std=tuple(float(x) for x in moments.std.astype(np.float32)),
            hidden=config.hidden,
            action_dim=task(config.task).action_dim,
            **network,
        ),
        weights_of(actor),
    )


def roll_out(workers: EpisodeWorkers, policy: ExpertPolicy, seeds: Sequence[int], cost_limit: float) -> list[Episode]:
    """Runs one episode per seed with sampled actions, in groups of ``workers.num_envs``.

    Args:
        workers: Run the groups; how many they are changes no byte.
        policy: The policy to sample from.
        seeds: Reset seeds, which also seed the action noise.
        cost_limit: Told to the policy.

    Returns:
        The episodes, in the order of ``seeds``.

    Raises:
        SimulatorFault: If the simulator returns a number that is not finite.
    """
    size = workers.num_envs
    parts = (tuple(seeds[start : start + size]) for start in range(0, len(seeds), size))
    groups = (Group(policy.with_seeds(part), part, cost_limit) for part in parts)
    return [episode for group in workers.run(groups) for episode in group]


def check_workers(config: OnlineConfig, workers: EpisodeWorkers) -> None:
    """Makes sure that workers run what a configuration says.

    Raises:
        BadInput: If they are for another task or step another number of environments together.
    """
    if (workers.task_name, workers.num_envs) != (config.task, config.num_envs):
        raise BadInput(
            f"workers for {workers.num_envs} environments of {workers.task_name}, where the configuration asks for "
            f"{config.num_envs} of {config.task}; make EpisodeWorkers(config.task, config.num_envs)"
        )


def sampled_actions(
    means: torch.Tensor, stds: torch.Tensor, seeds: Sequence[int], lengths: Sequence[int]
) -> torch.Tensor:
    """The actions as a Gaussian policy sampled them; episodes hold the executed ones, clipped to [-1, 1].

    A density must be taken at the sampled action: clipping piles probability up at the bounds.

    Args:
        means: The policy's means at the episodes' observations, (n, action_dim), episode after episode.
        stds: Its standard deviations, (n, action_dim).
        seeds: The episodes' seeds.
        lengths: Their lengths, n in all.
    """
    action_dim = means.shape[1]
    noise = [episode_noise(seed, steps, action_dim) for seed, steps in zip(seeds, lengths, strict=True)]
    return means + stds * torch.from_numpy(np.concatenate(noise))
