"""What the off-policy algorithms share: networks, episodes into the replay buffer, Polyak averages, state.

An algorithm adds its gradient step (``sac_lag.py``, ``ddpg_lag.py``, ``cvpo.py``). Common to all of them, and other
than in the released code (FSRL) unless ``released`` is set:

1. Where there are two critics of the cost, the larger estimate counts. FSRL takes the smaller, as one does for
   rewards; for costs that is optimism where caution is meant.
2. Observations are standardised by running moments, which are saved with the policy. They move once per iteration,
   before its gradient steps, and the buffer holds raw observations. FSRL trains on raw ones.

Kept from FSRL: one multiplier update per collection, by the mean undiscounted cost of its episodes, and about one
gradient step per five environment steps. Other than FSRL's collector an iteration takes whole episodes only, so that
it begins with seeded resets and a killed run resumes to the same bytes. Critics of reward and cost are one ensemble:
one matrix product per layer for all.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from springhead.bounds import above_zero, at_least, fraction
from springhead.rl.acting import Activation, ExpertPolicy, Head
from springhead.rl.networks import Ensemble, GaussianActor, Moments
from springhead.rl.online.checkpoint import below, optimiser_tensors, restore_optimiser
from springhead.rl.online.contract import Figures, OnlineConfig
from springhead.rl.online.replay import Replay, Transitions
from springhead.rl.online.rollouts import check_workers, episode_seeds, expert, roll_out
from springhead.rl.tasks import task
from springhead.rl.workers import EpisodeWorkers


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(OnlineConfig):
    """What the off-policy algorithms are told; defaults are FSRL's where they fit.

    Attributes:
        activation: Between the layers of all networks.
        actor_lr: Adam's step size for the policy.
        critic_lr: Adam's step size for the critics.
        buffer_size: Transitions kept; the oldest go first.
        batch_size: Transitions per gradient step.
        updates_per_step: Gradient steps per environment step.
        n_step: Steps of rewards and costs that a target sums before it trusts a critic.
        tau: Share of the new weights in the moving average that target networks are.
        released: Brings back what the released code does differently; each algorithm's file lists it.
    """

    episodes_per_iteration: int = 5
    num_envs: int = 5
    hidden: tuple[int, ...] = (128, 128)
    discount: float = 0.97
    activation: Activation = "relu"
    actor_lr: float = 5e-4
    critic_lr: float = 1e-3
    buffer_size: int = 100_000
    batch_size: int = 256
    updates_per_step: float = 0.2
    n_step: int = 2
    tau: float = 0.05
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "buffer_size", "batch_size", "n_step")
        above_zero(self, "updates_per_step", "tau", "actor_lr", "critic_lr")
        fraction(self, "tau")


class OffPolicy(ABC):
    """A learner without its gradient step.

    Args:
        config: Hyper-parameters.
        workers: Run the episodes; made for the configuration's task and number of environments.

    Attributes:
        head: What the actor's output becomes.
        critics_per_signal: How many critics of the reward, and how many of the cost.
        actor: The policy network.
        critics: Critics of the reward, then those of the cost, of normalised observation and action.
        target_critics: Their moving average.
        targets: All moving averages, by the name of the network that they follow.
        own: The algorithm's own tensors, part of the state.
        optimisers: By name; all are part of the state.
        replay: The buffer.
    """

    algorithm: ClassVar[str]
    head: ClassVar[Head]
    critics_per_signal: ClassVar[int]
    state_dependent_std: ClassVar[bool]
    log_std_range: ClassVar[tuple[float, float]]

    def __init__(self, config: OffPolicyConfig, workers: EpisodeWorkers) -> None:
        check_workers(config, workers)
        self.config = config
        self.workers = workers
        self.task = task(config.task)
        self.iteration = 0
        self.env_steps = 0
        generator = torch.Generator().manual_seed(config.seed)
        dim, action_dim = self.task.observation_dim, self.task.action_dim
        self.actor = GaussianActor(
            dim, action_dim, config.hidden, generator, self.head, config.activation, self.state_dependent_std,
            self.log_std_range,
        )  # fmt: skip
        self.critics = Ensemble(
            2 * self.critics_per_signal, [dim + action_dim, *config.hidden], generator, config.activation
        )
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.targets = nn.ModuleDict({"critics": self.target_critics})
        self.optimisers = {
            "actor": self.adam(self.actor.parameters(), config.actor_lr),
            "critics": self.adam(self.critics.parameters(), config.critic_lr),
        }
        self.own = nn.ParameterDict()
        self.moments = Moments.of(dim)
        self.replay = Replay(config.buffer_size, dim, action_dim, config.n_step, config.discount)

    @abstractmethod
    def update_multiplier(self, cost_return: float, limit: float) -> None:
        """Takes in the mean undiscounted cost of an iteration's episodes and the limit in force."""

    @abstractmethod
    def step(self, batch: Transitions, noise: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step of all networks; target networks follow after it.

        Args:
            batch: A minibatch.
            noise: What random numbers come from.

        Returns:
            Figures as scalars without gradient, the same names at every call; one is ``multiplier``.
        """

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """What else of the algorithm's own changes during training, JSON-able."""

    @abstractmethod
    def restore_own(self, facts: dict[str, Any]) -> None:
        """Puts back what :meth:`own_state` returned."""

    @staticmethod
    def adam(parameters: Any, learning_rate: float) -> torch.optim.Adam:
        """Adam with one fused kernel for all parameters."""
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)

    def policy(self) -> ExpertPolicy:
        """The present policy; acts by its mean."""
        return expert(
            self, self.actor, self.moments, head=self.head, activation=self.config.activation,
            state_dependent_std=self.state_dependent_std, log_std_range=self.log_std_range,
        )  # fmt: skip

    def iterate(self) -> Figures:
        """One iteration: collect, move the multiplier and the moments, then the gradient steps."""
        limit = self.config.cost_limit(self.iteration)
        episodes = roll_out(self.workers, self.policy(), episode_seeds(self.config, self.iteration), limit)
        for episode in episodes:
            self.replay.add(episode)
        steps = sum(episode.length for episode in episodes)
        self.env_steps += steps
        cost_return = float(np.mean([episode.cost_return for episode in episodes]))
        self.update_multiplier(cost_return, limit)
        if not self.config.released:
            self.moments.update(np.concatenate([e.observations for e in episodes]).astype(np.float64))
        losses = self.learn(math.ceil(steps * self.config.updates_per_step))
        self.iteration += 1
        return Figures(
            env_steps=self.env_steps,
            episode_return=float(np.mean([episode.episode_return for episode in episodes])),
            cost_return=cost_return,
            cost_limit=limit,
            multiplier=losses.pop("multiplier"),
            losses=losses,
        )

    def learn(self, updates: int) -> dict[str, float]:
        """Takes gradient steps on minibatches of the buffer; returns the means of their figures."""
        noise = torch.Generator().manual_seed(int(self._generator(2).integers(2**62)))
        batches = self.replay.sample(updates, self.config.batch_size, self.moments, self._generator(1))
        sums: dict[str, torch.Tensor] = {}
        averages: list[torch.Tensor] = list(self.targets.parameters())
        weights = self._averaged()
        for batch in batches:
            figures = self.step(batch, noise)
            torch._foreach_lerp_(averages, weights, self.config.tau)
            # Sums stay tensors: asking for a number at every step would cost more than adding it.
            for name, value in figures.items():
                sums[name] = value + sums[name] if name in sums else value
        return {name: float(value) / updates for name, value in sums.items()}

    def fit_critics(self, batch: Transitions, next_values: torch.Tensor) -> torch.Tensor:
        """One step of all critics towards their n-step targets.

        Args:
            batch: A minibatch.
            next_values: Value of the successor in reward and in cost, (2, n).

        Returns:
            Mean squared errors of the reward and of the cost critics, (2,), without gradient.
        """
        wanted = batch.signals + batch.bootstrap * next_values
        values = self.critics(torch.cat([batch.observations, batch.actions], 1)).view(2, self.critics_per_signal, -1)
        errors: torch.Tensor = (values - wanted[:, None]).square().mean(2).sum(1)
        self.descend("critics", errors.sum())
        return errors.detach() / self.critics_per_signal

    def pessimistic(self, values: torch.Tensor) -> torch.Tensor:
        """The cautious estimate of several critics.

        Args:
            values: Of the reward critics and then of the cost critics, (2 * critics_per_signal, n).

        Returns:
            The smallest of the reward and the largest of the cost (``released``: the smallest too), (2, n).
        """
        by_signal = values.view(2, self.critics_per_signal, -1)
        if self.critics_per_signal == 1:
            return by_signal[:, 0]
        if self.config.released:
            return by_signal.amin(1)
        return torch.stack([by_signal[0].amin(0), by_signal[1].amax(0)])

    def descend(self, name: str, loss: torch.Tensor) -> None:
        """One gradient step of the optimiser ``name`` on a loss."""
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that changes during training, the buffer included. Draws come from (seed, iteration)."""
        tensors = {f"modules.{name}": value for name, value in self._modules().state_dict().items()}
        for name, optimiser in self.optimisers.items():
            tensors |= optimiser_tensors(optimiser, f"optimiser.{name}.")
        rows, ring = self.replay.state()
        tensors |= {f"replay.{name}": value for name, value in rows.items()}
        tensors["moments"] = torch.from_numpy(np.stack([self.moments.mean, self.moments.variance]))
        facts = {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "count": self.moments.count,
            "replay": ring,
            "own": self.own_state(),
        }
        return tensors, facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Puts back what :meth:`state` returned."""
        self._modules().load_state_dict(below(tensors, "modules."))
        for name, optimiser in self.optimisers.items():
            restore_optimiser(optimiser, below(tensors, f"optimiser.{name}."))
        self.replay.restore(below(tensors, "replay."), facts["replay"])
        self.moments.mean, self.moments.variance = tensors["moments"].numpy().copy()
        self.moments.count = facts["count"]
        self.iteration, self.env_steps = facts["iteration"], facts["env_steps"]
        self.restore_own(facts["own"])

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"actor": self.actor, "critics": self.critics, "targets": self.targets, "own": self.own})

    def _averaged(self) -> list[torch.Tensor]:
        """The weights that :attr:`targets` follow, in the same order."""
        return [weight.detach() for name in self.targets for weight in getattr(self, name).parameters()]

    def _generator(self, purpose: int) -> np.random.Generator:
        """A generator of this iteration's own, so that no generator state outlives an iteration."""
        return np.random.default_rng([self.config.seed, self.iteration, purpose])
