"""PPO-Lagrangian: proximal policy optimisation with a cost limit that may move during training.

Papers: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7 (clipped surrogate); Schulman et al.
2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16; Stooke et al. 2020,
"Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", algorithm 1 (the multiplier, and the loss
divided by 1 + lambda); Liu et al. 2023, DSRL, appendix on data collection (the moving cost limit).

Deviations, each on purpose:

1. One clipped surrogate of the combined advantage (A_r - lambda A_c) / (1 + lambda). FSRL, whose experts made the
   DSRL data, clips the reward part only, so that a large multiplier can carry the policy far outside the trust region.
2. The proportional term of the multiplier uses the signed error and lambda has no cap, as in FSRL; Stooke et al.
   rectify the error. The signed term lets go of the multiplier as soon as the policy is safer than its limit.
3. Critics predict returns standardised by running moments, since returns of these tasks reach 1000.
4. Observations are standardised by running moments, which are saved with the policy.
5. A truncated episode bootstraps from the value of its last successor state, for reward and cost alike; only
   a terminated episode has no future.
6. An iteration collects whole episodes, one per environment, from resets seeded by (seed, iteration, environment).
   So there is no simulator state to save: a checkpoint between iterations resumes to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from springhead.rl.dataset import Episode
from springhead.rl.envs import EpisodeRunner
from springhead.rl.networks import ExpertConfig, ExpertPolicy, GaussianActor, Moments, load_expert, mlp
from springhead.rl.online.checkpoint import below, load_checkpoint, save_checkpoint
from springhead.rl.online.lagrangian import PIDLagrangian, ramp
from springhead.rl.tasks import task

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PPOLagConfig:
    """Hyper-parameters. Fractions are of the whole training."""

    task: str
    seed: int
    iterations: int
    episodes_per_iteration: int = 20
    cost_limit_start: float = 5.0
    cost_limit_end: float = 100.0
    ramp_from: float = 0.1
    ramp_until: float = 0.9
    hidden: tuple[int, ...] = (64, 64)
    learning_rate: float = 1e-3
    epochs: int = 10
    minibatch: int = 500
    clip: float = 0.2
    target_kl: float = 0.03
    discount: float = 0.99
    gae_lambda: float = 0.95
    max_gradient_norm: float = 0.5
    pid_kp: float = 0.05
    pid_ki: float = 0.005
    pid_kd: float = 0.1


def cost_limit_at(config: PPOLagConfig, iteration: int) -> float:
    """The cost limit in force at an iteration, counted from 0."""
    fraction = iteration / max(config.iterations - 1, 1)
    return ramp(config.cost_limit_start, config.cost_limit_end, config.ramp_from, config.ramp_until, fraction)


def gae(
    signals: Doubles,
    values: Doubles,
    next_values: Doubles,
    terminals: npt.NDArray[np.bool_],
    discount: float,
    lam: float,
) -> Doubles:
    """Generalised advantage estimates of one whole episode (Schulman et al. 2016, eq. 16).

    Args:
        signals: Rewards or costs, (T,).
        values: Value of each observation, (T,).
        next_values: Value of each successor, (T,); at a truncated end this is the bootstrap value.
        terminals: (T,); True removes the successor's value, because nothing follows.
        discount: Discount factor.
        lam: Weight decay of longer-horizon errors.

    Returns:
        Advantages (T,). Adding ``values`` gives the value targets.
    """
    errors = signals + discount * np.where(terminals, 0.0, next_values) - values
    advantages = np.empty_like(errors)
    carry = 0.0
    for step in range(len(errors) - 1, -1, -1):
        carry = errors[step] + discount * lam * carry
        advantages[step] = carry
    return advantages


@dataclass(frozen=True)
class Batch:
    """One iteration's transitions, ready for the update; all float32 tensors of n rows."""

    observations: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    reward_advantages: torch.Tensor
    cost_advantages: torch.Tensor
    reward_targets: torch.Tensor
    cost_targets: torch.Tensor


@dataclass(frozen=True)
class Figures:
    """What one iteration reports."""

    env_steps: int
    episode_return: float
    cost_return: float
    cost_limit: float
    multiplier: float
    policy_loss: float
    reward_value_loss: float
    cost_value_loss: float
    kl: float
    std: float


class PPOLag:
    """The learner: everything that changes during training, and one method per phase of an iteration."""

    def __init__(self, config: PPOLagConfig) -> None:
        self.config = config
        self.task = task(config.task)
        self.iteration = 0
        generator = torch.Generator().manual_seed(config.seed)
        dim = self.task.observation_dim
        self.actor = GaussianActor(dim, self.task.action_dim, config.hidden, generator)
        self.reward_critic = mlp([dim, *config.hidden, 1], generator, output_gain=1.0)
        self.cost_critic = mlp([dim, *config.hidden, 1], generator, output_gain=1.0)
        self.modules = nn.ModuleDict(
            {"actor": self.actor, "reward_critic": self.reward_critic, "cost_critic": self.cost_critic}
        )
        self.optimiser = torch.optim.Adam(self.modules.parameters(), lr=config.learning_rate, eps=1e-5)
        self.lagrangian = PIDLagrangian(config.pid_kp, config.pid_ki, config.pid_kd)
        self.observation_moments = Moments.of(dim)
        self.value_moments = Moments.of(2)  # column 0 rewards, column 1 costs
        self.runner = EpisodeRunner(config.task, config.episodes_per_iteration)
        self.env_steps = 0

    def expert_config(self, cost_limit: float) -> ExpertConfig:
        """The facts to save the present policy with."""
        return ExpertConfig(
            task=self.config.task,
            algorithm="ppo-lag",
            cost_limit=cost_limit,
            seed=self.config.seed,
            env_steps=self.env_steps,
            observation_mean=tuple(float(x) for x in self.observation_moments.mean.astype(np.float32)),
            observation_std=tuple(float(x) for x in self.observation_moments.std.astype(np.float32)),
            hidden=self.config.hidden,
            action_dim=self.task.action_dim,
        )

    def _generator(self, purpose: int) -> np.random.Generator:
        """A generator of this iteration's own, so that no generator state outlives an iteration."""
        return np.random.default_rng([self.config.seed, self.iteration, purpose])

    def _normalise(self, observations: Floats) -> torch.Tensor:
        scaled = (observations - self.observation_moments.mean) / self.observation_moments.std
        return torch.from_numpy(scaled.astype(np.float32))

    def collect(self) -> tuple[list[Episode], list[Floats]]:
        """Runs one episode per environment; returns them with the sampled, not yet clipped, actions."""
        generator = self._generator(0)
        rows = self.config.episodes_per_iteration
        seeds = [int(seed) for seed in generator.integers(2**31, size=rows)]
        taken: list[Floats] = []
        std = self.actor(torch.zeros(1, self.task.observation_dim)).stddev.detach().numpy()

        def act(observations: Floats) -> Floats:
            with torch.no_grad():
                mean = self.actor.net(self._normalise(observations)).numpy()
            taken.append(mean + std * generator.standard_normal(mean.shape, dtype=np.float32))
            return taken[-1]

        episodes = self.runner.run(act, seeds)
        sampled = np.stack(taken, axis=1)
        return episodes, [sampled[row, : episode.length] for row, episode in enumerate(episodes)]

    def _values(self, critic: nn.Module, column: int, observations: Floats) -> Doubles:
        with torch.no_grad():
            scaled = critic(self._normalise(observations)).squeeze(-1).double().numpy()
        return np.asarray(scaled * self.value_moments.std[column] + self.value_moments.mean[column])

    def _estimate(self, critic: nn.Module, column: int, episodes: Sequence[Episode]) -> tuple[Doubles, Doubles]:
        """Advantages and value targets, in the signal's own units, of all transitions of the episodes."""
        advantages, targets = [], []
        for episode in episodes:
            signals = (episode.rewards if column == 0 else episode.costs).astype(np.float64)
            values = self._values(critic, column, episode.observations)
            next_values = np.append(values[1:], self._values(critic, column, episode.next_observations[-1:]))
            estimate = gae(
                signals, values, next_values, episode.terminals, self.config.discount, self.config.gae_lambda
            )
            advantages.append(estimate)
            targets.append(estimate + values)
        return np.concatenate(advantages), np.concatenate(targets)

    def prepare(self, episodes: Sequence[Episode], sampled: Sequence[Floats]) -> Batch:
        """Turns episodes into a batch; the running moments of the value targets take it into account."""
        reward_advantages, reward_targets = self._estimate(self.reward_critic, 0, episodes)
        cost_advantages, cost_targets = self._estimate(self.cost_critic, 1, episodes)
        targets = np.stack([reward_targets, cost_targets], axis=1)
        self.value_moments.update(targets)
        scaled = (targets - self.value_moments.mean) / self.value_moments.std
        observations = self._normalise(np.concatenate([episode.observations for episode in episodes]))
        actions = torch.from_numpy(np.concatenate(sampled))
        with torch.no_grad():
            log_probs = self.actor(observations).log_prob(actions).sum(-1)

        def column(values: Doubles) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.float32))

        return Batch(
            observations=observations,
            actions=actions,
            log_probs=log_probs,
            reward_advantages=column(_standardise(reward_advantages)),
            cost_advantages=column(_standardise(cost_advantages)),
            reward_targets=column(scaled[:, 0]),
            cost_targets=column(scaled[:, 1]),
        )

    def losses(self, batch: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Policy, reward value and cost value losses of some rows of a batch, and their KL estimate."""
        observations = batch.observations[rows]
        log_ratio = self.actor(observations).log_prob(batch.actions[rows]).sum(-1) - batch.log_probs[rows]
        ratio = log_ratio.exp()
        multiplier = self.lagrangian.value
        advantages = (batch.reward_advantages[rows] - multiplier * batch.cost_advantages[rows]) / (1.0 + multiplier)
        clipped = ratio.clamp(1.0 - self.config.clip, 1.0 + self.config.clip)
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        reward_error = self.reward_critic(observations).squeeze(-1) - batch.reward_targets[rows]
        cost_error = self.cost_critic(observations).squeeze(-1) - batch.cost_targets[rows]
        # k3 of Schulman's note on approximating KL: unbiased and never negative.
        kl = float((ratio - 1.0 - log_ratio).mean().detach())
        return policy_loss, reward_error.square().mean(), cost_error.square().mean(), kl

    def update(self, batch: Batch) -> tuple[float, float, float, float]:
        """Several epochs of minibatch steps; the policy stops early where it has moved too far, critics go on.

        Returns:
            Means over the minibatches of the policy, reward value and cost value losses, and the last KL.
        """
        generator = self._generator(1)
        sums, steps, kl, policy_learns = np.zeros(3), 0, 0.0, True
        number = len(batch.actions)
        for _ in range(self.config.epochs):
            order = torch.from_numpy(generator.permutation(number))
            for rows in order.split(self.config.minibatch):
                policy_loss, reward_loss, cost_loss, kl_now = self.losses(batch, rows)
                if policy_learns:
                    kl, policy_learns = kl_now, kl_now <= 1.5 * self.config.target_kl
                loss = 0.5 * (reward_loss + cost_loss) + (policy_loss if policy_learns else 0.0)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.modules.parameters(), self.config.max_gradient_norm)
                self.optimiser.step()
                sums += [policy_loss.item(), reward_loss.item(), cost_loss.item()]
                steps += 1
        policy_mean, reward_mean, cost_mean = (float(x) for x in sums / steps)
        return policy_mean, reward_mean, cost_mean, kl

    def iterate(self) -> Figures:
        """One iteration: collect, move the multiplier, update the networks, then the observation moments."""
        limit = cost_limit_at(self.config, self.iteration)
        episodes, sampled = self.collect()
        self.env_steps += sum(episode.length for episode in episodes)
        cost_return = float(np.mean([episode.cost_return for episode in episodes]))
        self.lagrangian.update(cost_return, limit)
        policy_loss, reward_loss, cost_loss, kl = self.update(self.prepare(episodes, sampled))
        # After the update: the batch's log probabilities belong to the moments it was collected with.
        self.observation_moments.update(np.concatenate([e.observations for e in episodes]).astype(np.float64))
        self.iteration += 1
        return Figures(
            env_steps=self.env_steps,
            episode_return=float(np.mean([episode.episode_return for episode in episodes])),
            cost_return=cost_return,
            cost_limit=limit,
            multiplier=self.lagrangian.value,
            policy_loss=policy_loss,
            reward_value_loss=reward_loss,
            cost_value_loss=cost_loss,
            kl=kl,
            std=float(self.actor.log_std.detach().exp().mean()),
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that changes during training. No generator is among it: draws come from (seed, iteration)."""
        tensors = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in slots.items()}
        for name, moments in self._moments().items():
            tensors[f"moments.{name}"] = torch.from_numpy(np.stack([moments.mean, moments.variance]))
        facts = {
            "config": asdict(self.config),
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "lagrangian": asdict(self.lagrangian),
            "counts": {name: moments.count for name, moments in self._moments().items()},
        }
        return tensors, facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Puts back what :meth:`state` returned."""
        self.modules.load_state_dict(below(tensors, "modules."))
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in below(tensors, "optimiser.").items():
            index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        for name, moments in self._moments().items():
            moments.mean, moments.variance = tensors[f"moments.{name}"].numpy().copy()
            moments.count = facts["counts"][name]
        self.lagrangian = PIDLagrangian(**facts["lagrangian"])
        self.iteration, self.env_steps = facts["iteration"], facts["env_steps"]

    def _moments(self) -> dict[str, Moments]:
        return {"observation": self.observation_moments, "value": self.value_moments}


def _standardise(values: Doubles) -> Doubles:
    return np.asarray((values - values.mean()) / (values.std() + 1e-8))


def train(config: PPOLagConfig, scratch: Path, checkpoint_every: int = 10) -> Iterator[tuple[PPOLag, list[Figures]]]:
    """Trains, or goes on training, and yields after every iteration.

    Killed at any point and called again with the same configuration and folder, it yields the iterations after the
    last checkpoint as if nothing had happened.

    Args:
        config: Hyper-parameters.
        scratch: Where checkpoints go.
        checkpoint_every: Iterations between checkpoints.

    Yields:
        The learner and the figures of all iterations so far.

    Raises:
        BadInput: If the checkpoint is damaged.
    """
    learner, history = PPOLag(config), []
    saved = load_checkpoint(scratch, asdict(config))
    if saved is not None:
        learner.restore(*saved)
        history = [Figures(**figures) for figures in saved[1]["history"]]
    while learner.iteration < config.iterations:
        history.append(learner.iterate())
        yield learner, history
        # Not after the last one: a run that is asked for again must yield something.
        if learner.iteration % checkpoint_every == 0 and learner.iteration < config.iterations:
            tensors, facts = learner.state()
            rows = [asdict(figures) for figures in history]
            save_checkpoint(scratch, learner.iteration, tensors, {**facts, "history": rows})


def load(folder: Path) -> ExpertPolicy:
    """Loads a saved expert; it acts by the mean of its distribution.

    Raises:
        BadInput: If the folder is no readable policy.
    """
    return load_expert(folder)
