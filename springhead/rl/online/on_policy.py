"""What the on-policy algorithms share: networks, episodes turned into a batch, fitting of critics, state.

An algorithm adds its update (``ppo_lag.py``, ``trpo_lag.py``, ``cpo.py``, ``focops.py``). Common to all of them, and
other than in the released code unless ``released`` is set:

1. Critics predict returns standardised by running moments, since returns of these tasks reach 1000.
2. Observations are standardised by running moments, which are saved with the policy.

With ``released`` both moments stay at mean 0 and deviation 1, that is, everything is raw, as FSRL trains by default.
Advantages are generalised advantage estimates (Schulman et al. 2016, eq. 16) for reward and cost alike. A truncated
episode bootstraps from the value of its last successor; only a terminated one has no future.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from springhead.bounds import fraction
from springhead.rl.acting import Activation, ExpertPolicy
from springhead.rl.dataset import Episode
from springhead.rl.networks import GaussianActor, Moments, mlp
from springhead.rl.online.advantages import Batch, Doubles, gae
from springhead.rl.online.checkpoint import below, optimiser_tensors, restore_optimiser
from springhead.rl.online.contract import Figures, OnlineConfig
from springhead.rl.online.rollouts import check_workers, episode_seeds, expert, roll_out, sampled_actions
from springhead.rl.tasks import task
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(OnlineConfig):
    """What the on-policy algorithms are told.

    Attributes:
        gae_lambda: Weight decay of longer-horizon errors in advantages.
        activation: Between the layers of all networks; FSRL uses ``relu``.
        released: Brings back what the released code does differently; each algorithm's file lists it.
    """

    gae_lambda: float = 0.95
    activation: Activation = "tanh"
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self, "gae_lambda")


class OnPolicy(ABC):
    """A learner without its update.

    Args:
        config: Hyper-parameters.
        workers: Run the episodes; made for the configuration's task and number of environments.

    Attributes:
        actor: The policy network.
        reward_critic: Predicts the discounted return.
        cost_critic: Predicts the discounted cost.
        modules: All three.
        optimisers: By name; the algorithm puts its own here, and they are part of the state.
    """

    algorithm: ClassVar[str]

    def __init__(self, config: OnPolicyConfig, workers: EpisodeWorkers) -> None:
        check_workers(config, workers)
        self.config = config
        self.workers = workers
        self.task = task(config.task)
        self.iteration = 0
        self.env_steps = 0
        generator = torch.Generator().manual_seed(config.seed)
        dim, sizes = self.task.observation_dim, (self.task.observation_dim, *config.hidden, 1)
        self.actor = GaussianActor(dim, self.task.action_dim, config.hidden, generator, activation=config.activation)
        self.reward_critic = mlp(sizes, generator, 1.0, config.activation)
        self.cost_critic = mlp(sizes, generator, 1.0, config.activation)
        self.modules = nn.ModuleDict(
            {"actor": self.actor, "reward_critic": self.reward_critic, "cost_critic": self.cost_critic}
        )
        self.optimisers: dict[str, torch.optim.Adam] = {}
        self.observation_moments = Moments.of(dim)
        self.value_moments = Moments.of(2)  # column 0 rewards, column 1 costs

    @abstractmethod
    def update(self, batch: Batch, cost_return: float, limit: float) -> tuple[float, dict[str, float]]:
        """Moves the multiplier and updates the networks.

        Args:
            batch: The iteration's transitions.
            cost_return: Mean undiscounted cost of its episodes.
            limit: The limit in force.

        Returns:
            The cost multiplier and the algorithm's figures.
        """

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """What of the algorithm's own changes during training, beside networks and optimisers; JSON-able."""

    @abstractmethod
    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts back what :meth:`own_state` returned."""

    def generator(self, purpose: int) -> np.random.Generator:
        """A generator of this iteration's own, so that no generator state outlives an iteration."""
        return np.random.default_rng([self.config.seed, self.iteration, purpose])

    def policy(self) -> ExpertPolicy:
        """The present policy; acts by its mean."""
        return expert(self, self.actor, self.observation_moments, activation=self.config.activation)

    def collect(self) -> tuple[list[Episode], tuple[int, ...]]:
        """Runs this iteration's episodes with sampled actions; returns them and their seeds."""
        seeds = episode_seeds(self.config, self.iteration)
        limit = self.config.cost_limit(self.iteration)
        return roll_out(self.workers, self.policy(), seeds, limit), seeds

    def prepare(self, episodes: Sequence[Episode], seeds: Sequence[int]) -> Batch:
        """Turns episodes into a batch; the running moments of the value targets take it into account."""
        observations = self._normalise(np.concatenate([episode.observations for episode in episodes]))
        ends = self._normalise(np.concatenate([episode.next_observations[-1:] for episode in episodes]))
        reward_advantages, reward_targets = self._estimate(0, episodes, observations, ends)
        cost_advantages, cost_targets = self._estimate(1, episodes, observations, ends)
        targets = np.stack([reward_targets, cost_targets], axis=1)
        if not self.config.released:
            self.value_moments.update(targets)
        scaled = ((targets - self.value_moments.mean) / self.value_moments.std).astype(np.float32)
        lengths = [episode.length for episode in episodes]
        with torch.no_grad():
            old = self.actor(observations)
            actions = sampled_actions(old.mean, old.stddev, seeds, lengths)
            log_probs = old.log_prob(actions).sum(-1)
        return Batch(
            observations=observations,
            actions=actions,
            means=old.mean,
            stds=old.stddev,
            log_probs=log_probs,
            reward_advantages=torch.from_numpy(reward_advantages.astype(np.float32)),
            cost_advantages=torch.from_numpy(cost_advantages.astype(np.float32)),
            reward_targets=torch.from_numpy(scaled[:, 0].copy()),
            cost_targets=torch.from_numpy(scaled[:, 1].copy()),
            mean_length=float(np.mean(lengths)),
        )

    def critic_losses(self, batch: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared errors of the reward and the cost critic over some rows of a batch."""
        observations = batch.observations[rows]
        reward_error = self.reward_critic(observations).squeeze(-1) - batch.reward_targets[rows]
        cost_error = self.cost_critic(observations).squeeze(-1) - batch.cost_targets[rows]
        return reward_error.square().mean(), cost_error.square().mean()

    def fit_critics(
        self, batch: Batch, optimiser: torch.optim.Adam, minibatches: Sequence[torch.Tensor], l2: float
    ) -> tuple[float, float]:
        """Takes one gradient step of both critics per minibatch.

        Args:
            batch: The iteration's transitions.
            optimiser: Of both critics' parameters.
            minibatches: Row indices of each.
            l2: Weight of the squared parameters, added to the loss.

        Returns:
            Mean losses of the reward and the cost critic, without the penalty.
        """
        critics = [*self.reward_critic.parameters(), *self.cost_critic.parameters()]
        sums = np.zeros(2)
        for rows in minibatches:
            reward_loss, cost_loss = self.critic_losses(batch, rows)
            loss = reward_loss + cost_loss
            if l2:
                loss = loss + l2 * sum((parameter.square().sum() for parameter in critics), torch.zeros(()))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            sums += [reward_loss.item(), cost_loss.item()]
        reward_mean, cost_mean = (float(x) for x in sums / max(len(minibatches), 1))
        return reward_mean, cost_mean

    def mean_std(self) -> float:
        """The policy's mean deviation over action components, for the figures."""
        with torch.no_grad():
            return float(self.actor(torch.zeros(1, self.task.observation_dim)).stddev.mean())

    def minibatches(self, generator: np.random.Generator, rows: int, size: int) -> list[torch.Tensor]:
        """One pass over a batch: shuffled row indices in parts of ``size``."""
        return list(torch.from_numpy(generator.permutation(rows)).split(size))

    def iterate(self) -> Figures:
        """One iteration: collect, update multiplier and networks, then the observation moments."""
        limit = self.config.cost_limit(self.iteration)
        episodes, seeds = self.collect()
        self.env_steps += sum(episode.length for episode in episodes)
        cost_return = float(np.mean([episode.cost_return for episode in episodes]))
        multiplier, losses = self.update(self.prepare(episodes, seeds), cost_return, limit)
        # After the update: the batch's log probabilities belong to the moments it was collected with.
        if not self.config.released:
            self.observation_moments.update(np.concatenate([e.observations for e in episodes]).astype(np.float64))
        self.iteration += 1
        return Figures(
            env_steps=self.env_steps,
            episode_return=float(np.mean([episode.episode_return for episode in episodes])),
            cost_return=cost_return,
            cost_limit=limit,
            multiplier=multiplier,
            losses=losses,
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that changes during training. No generator is among it: draws come from (seed, iteration)."""
        tensors = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        for kind, optimiser in self.optimisers.items():
            tensors |= optimiser_tensors(optimiser, f"optimiser.{kind}.")
        for name, moments in self._moments().items():
            tensors[f"moments.{name}"] = torch.from_numpy(np.stack([moments.mean, moments.variance]))
        facts = {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "counts": {name: moments.count for name, moments in self._moments().items()},
            "own": self.own_state(),
        }
        return tensors, facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Puts back what :meth:`state` returned."""
        self.modules.load_state_dict(below(tensors, "modules."))
        for kind, optimiser in self.optimisers.items():
            restore_optimiser(optimiser, below(tensors, f"optimiser.{kind}."))
        for name, moments in self._moments().items():
            moments.mean, moments.variance = tensors[f"moments.{name}"].numpy().copy()
            moments.count = facts["counts"][name]
        self.iteration, self.env_steps = facts["iteration"], facts["env_steps"]
        self.restore_own(facts["own"])

    def _moments(self) -> dict[str, Moments]:
        return {"observation": self.observation_moments, "value": self.value_moments}

    def _normalise(self, observations: np.ndarray) -> torch.Tensor:
        # In float32 and as the policy does it, so that the means are those that were acted by.
        mean, std = (x.astype(np.float32) for x in (self.observation_moments.mean, self.observation_moments.std))
        return torch.from_numpy((observations - mean) / std)

    def _estimate(
        self, column: int, episodes: Sequence[Episode], observations: torch.Tensor, ends: torch.Tensor
    ) -> tuple[Doubles, Doubles]:
        """Advantages and value targets of all transitions, in the signal's own units; column 0 rewards, 1 costs."""
        critic = self.cost_critic if column else self.reward_critic
        with torch.no_grad():
            scaled = critic(torch.cat([observations, ends])).squeeze(-1).double().numpy()
        values = scaled * self.value_moments.std[column] + self.value_moments.mean[column]
        advantages, start = [], 0
        for number, episode in enumerate(episodes):
            signals = (episode.costs if column else episode.rewards).astype(np.float64)
            here = values[start : start + episode.length]
            after = np.append(here[1:], values[len(observations) + number])
            start += episode.length
            estimate = gae(signals, here, after, episode.terminals, self.config.discount, self.config.gae_lambda)
            advantages.append(estimate)
        found = np.concatenate(advantages)
        return found, found + values[: len(observations)]
