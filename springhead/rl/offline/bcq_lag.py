"""BCQ-Lag: batch-constrained Q-learning with a multiplier for the cost.

Source: Fujimoto, Meger, Precup 2019, "Off-Policy Deep Reinforcement Learning without Exploration" (BCQ: algorithm 1,
equation 13, appendix D for the networks), with the PID multiplier of Stooke et al. 2020 and critics of the cost, as the
baseline of Liu et al. 2023 (DSRL) in OSRL, whose code was read, not copied. With an action model G(s, z), z drawn from
N(0, 1) and cut at 0.5, a perturbation xi of at most 0.05, a_i = clip(G(s', z_i) + 0.05 xi'(s', G(s', z_i))), i = 1..10:

  critics  y = r + gamma mix(Q')(s', a*),  y_c = c + gamma mix(Qc')(s', a*),  mix = 0.75 low + 0.25 high of two groups
  xi       maximises Q(s, a) - lambda (Qc(s, a) - q), a one perturbed decode; q the threshold of the episode limit
  lambda   rectified PID (0.1, 0.003, 0.001) on the batch's mean of Qc(s, a) - q

Deviations, with reasons in ``docs/methods/bcq_lag.md``; settings bring OSRL's behaviour back:
  1. The critics evaluate the action that the policy would take (``target_action``): of the candidates whose cost value
     keeps q the one of highest reward value, else the one of lowest cost value, both by the first critic of each kind,
     and valued by all of them. BCQ takes the highest mix; OSRL too, and for the cost also the highest, so that its cost
     critics learn the cost of the worst candidate at every step.
  2. The same choice acts (``acting``), among 50 candidates by the first reward critic, as in BCQ, and the highest cost
     critic; OSRL acts by one random decode.
  3. Of the cost critics the highest counts (``cost_ensemble``).
  4. xi follows the first reward critic as in BCQ (``actor_value``); OSRL's follows the lowest.
  5. Episodes cut by the horizon go on (``timeouts``); costs end where the environment ends (``cost_terminals``).
  6. Reward and cost critics see the same candidates. They are independent otherwise, so OSRL's second draw of its own
     changes nothing but the time.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from springhead.bounds import above_zero, at_least, fraction
from springhead.errors import BadInput
from springhead.rl.lagrangian import PIDLagrangian
from springhead.rl.offline.actor_policy import chosen_limit
from springhead.rl.offline.batches import Batch, Flat, Sampler, check_constraint
from springhead.rl.offline.candidates import (
    CandidateSettings,
    choose,
    each_with,
    evaluate,
    extremes,
    goes_on,
    mixed,
    thresholds,
    with_actions,
)
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.multipliers import Multipliers
from springhead.rl.offline.stacked import MLP, Values, frozen_copy, pair, polyak
from springhead.rl.offline.vae import PRIOR_CLIP, ActionVAE
from springhead.rl.policy import read_config, read_tensors, require_numbers
from springhead.rl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class BCQLagSettings(CandidateSettings):
    """Hyper-parameters of BCQ-Lag; the defaults are those of OSRL's experiments."""

    critics: int = 2
    """Networks in each of the two groups, for rewards and again for costs."""
    low_weight: float = 0.75
    """Weight of the pessimistic group in the critics' targets."""
    perturbation: float = 0.05
    """How far the policy may move an action of the action model, in each component."""
    kp: float = 0.1
    """Proportional gain of the multiplier."""
    ki: float = 0.003
    """Integral gain of the multiplier."""
    kd: float = 0.001
    """Derivative gain of the multiplier."""
    target_action: Literal["policy", "extremes"] = "policy"
    """Next action of the targets: the one the policy would take, or for each kind the highest, as in OSRL."""
    actor_value: Literal["first", "lowest"] = "first"
    """Reward critic that the perturbation follows: the first, or the lowest as in OSRL."""
    acting: Literal["chosen", "random"] = "chosen"
    """Acts by the best of ``acting_samples`` candidates, or by one random candidate as in OSRL."""
    acting_samples: int = 50
    """Candidates when acting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "critics", "acting_samples")
        at_least(0, self, "kp", "ki", "kd")
        above_zero(self, "perturbation")
        fraction(self, "low_weight")


class BCQLag:
    """Action model, perturbation, critics and multipliers of all members."""

    def __init__(self, name: str, data: Flat, task: Task, settings: BCQLagSettings, members: Sequence[Member]) -> None:
        check_constraint(name, data, task, [member.cost_limit or 0.0 for member in members])
        self.members, self.task, self.settings = members, task, settings
        seeds, width = [member.seed for member in members], task.observation_dim + task.action_dim
        # The first half of the critics is of rewards, the second of costs: one product for both.
        self.half = 2 * settings.critics

        def networks(weights: Generators) -> tuple[MLP, Values]:
            actor = MLP(weights, [width, *settings.hidden, task.action_dim], activation="tanh", output="tanh")
            return actor, Values(weights, [width, *settings.hidden], ensemble=2 * self.half)

        weights = Generators(seeds)
        self.actor, self.critics = networks(weights)
        self.vae = ActionVAE(weights, task.observation_dim, task.action_dim, settings.vae_hidden)
        target_actor, target_critics = networks(Generators(seeds))
        self.multipliers = Multipliers(
            len(members), PIDLagrangian(settings.kp, settings.ki, settings.kd, variant="rectified")
        )
        self.modules: nn.Module = nn.ModuleDict(
            {
                "actor": self.actor,
                "critics": self.critics,
                "vae": self.vae,
                "target_actor": frozen_copy(self.actor, target_actor),
                "target_critics": frozen_copy(self.critics, target_critics),
                "multipliers": self.multipliers,
            }
        ).to(settings.device)
        self.target_actor, self.target_critics = target_actor, target_critics
        self.threshold = thresholds(members, task, settings).to(settings.device)
        self.optimisers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=settings.actor_learning_rate, fused=True),
            "critics": torch.optim.Adam(self.critics.parameters(), lr=settings.critic_learning_rate, fused=True),
            "vae": torch.optim.Adam(self.vae.parameters(), lr=settings.vae_learning_rate, fused=True),
        }
        self.generators = {
            "batches": Generators(seeds, settings.device, stream=1),
            "noise": Generators(seeds, settings.device, stream=2),
        }
        self.sampler = Sampler(
            data, self.generators["batches"], settings.batch_size, reward_scale=settings.reward_scale
        )

    def candidates(self, actor: MLP, observations: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Perturbed decoded actions without gradients, (members, rows, action_dim).

        Args:
            actor: The perturbation.
            observations: (members, rows, observation_dim).
            latent: (members, rows, latent_dim).
        """
        actions = evaluate(self.vae.decoder, pair(observations, latent))[:, 0].tanh_()
        moved = evaluate(actor, pair(observations, actions))[:, 0]
        return actions.add_(moved, alpha=self.settings.perturbation).clamp_(-1.0, 1.0)

    @torch.no_grad()
    def targets(self, batch: Batch, latent: torch.Tensor) -> torch.Tensor:
        """Targets of reward and cost critics, (members, 2, batch).

        Args:
            batch: Transitions.
            latent: Of the candidates, (members, batch * samples, latent_dim).
        """
        settings, half = self.settings, self.half
        states = each_with(batch.next_observations, settings.samples)
        actions = self.candidates(self.target_actor, states, latent)
        inputs = pair(states, actions)
        size = (settings.batch_size, settings.samples)
        if settings.target_action == "extremes":
            values = evaluate(self.target_critics, inputs).squeeze(-1)
            following, costly = (value.unflatten(1, size).amax(2) for value in self._mixes(values))
        else:
            first = evaluate(self.target_critics, inputs, only=[0, half]).squeeze(-1).unflatten(2, size)
            chosen = choose(first[:, 0], first[:, 1], self.threshold[:, None, None])
            taken = with_actions(batch.next_observations, actions, chosen)
            following, costly = self._mixes(evaluate(self.target_critics, taken).squeeze(-1))
        rewards_go_on, costs_go_on = goes_on(batch, settings)
        return torch.stack(
            [
                batch.rewards + settings.discount * rewards_go_on * following,
                batch.costs + settings.discount * costs_go_on * costly,
            ],
            dim=1,
        )

    def _mixes(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed values of rewards and costs, (members, rows), of all networks' (members, networks, rows)."""
        rewards, costs = values.split(self.half, dim=1)
        weight, hopeful = self.settings.low_weight, self.settings.cost_ensemble == "min"
        return mixed(rewards, weight, "min"), mixed(costs, weight, "min" if hopeful else "max")

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the action model, the critics, the perturbation and the multiplier, in this order."""
        settings, noise, half = self.settings, self.generators["noise"], self.half
        rows, latent_dim = settings.batch_size, self.vae.latent_dim
        batch = self.sampler.draw()
        vae_loss, _ = self.vae.loss(
            batch.observations, batch.actions, noise.normal(rows, latent_dim), settings.vae_beta
        )
        self._descend("vae", vae_loss)

        wanted = self.targets(batch, noise.normal(rows * settings.samples, latent_dim).clamp_(-PRIOR_CLIP, PRIOR_CLIP))
        values = self.critics(pair(batch.observations, batch.actions)).unflatten(1, (2, half))
        errors = (values - wanted.unsqueeze(2)).square().mean(3).sum(2)
        self._descend("critics", errors.sum(1))

        latent = noise.normal(rows, latent_dim).clamp_(-PRIOR_CLIP, PRIOR_CLIP)
        with torch.no_grad():
            decoded = self.vae.decode(batch.observations, latent)
        moved = self.actor(pair(batch.observations, decoded))
        actions = (decoded + settings.perturbation * moved).clamp(-1.0, 1.0)
        last = 1 if settings.actor_value == "first" else half
        parts = [(0, last, False), (half, 2 * half, settings.cost_ensemble == "max")]
        value, cost = extremes(self.critics, pair(batch.observations, actions), parts).mean(2).unbind(1)
        multiplier = self.multipliers.update(cost.detach(), self.threshold)
        actor_loss = -value + multiplier * (cost - self.threshold)
        self._descend("actor", actor_loss)

        polyak(self.target_critics, self.critics, settings.tau)
        polyak(self.target_actor, self.actor, settings.tau)
        return {
            "vae_loss": vae_loss.detach(),
            "reward_critic_loss": errors[:, 0].detach(),
            "cost_critic_loss": errors[:, 1].detach(),
            "policy_loss": actor_loss.detach(),
            "cost_value": cost.detach(),
            "multiplier": multiplier.clone(),
        }

    def _descend(self, name: str, losses: torch.Tensor) -> None:
        self.optimisers[name].zero_grad()
        losses.sum().backward()
        self.optimisers[name].step()

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """What one member acts by: decoder and perturbation, to choose also the first reward and all cost critics."""
        parts = {"decoder": self.vae.decoder.member(member), "actor": self.actor.member(member)}
        if self.settings.acting == "chosen":
            judges = [0, *range(self.half, 2 * self.half)]
            parts["critics"] = {name: value[judges] for name, value in self.critics.member(member).items()}
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def config(self, member: int) -> dict[str, Any]:
        """What shapes its networks, and how it acts."""
        settings = self.settings
        own = [number for number, one in enumerate(self.members) if one.seed == self.members[member].seed]
        return {
            "observation_dim": self.task.observation_dim,
            "action_dim": self.task.action_dim,
            "hidden": list(settings.hidden),
            "vae_hidden": list(settings.vae_hidden),
            "cost_critics": self.half if settings.acting == "chosen" else 0,
            "cost_ensemble": settings.cost_ensemble,
            "perturbation": settings.perturbation,
            "acting_samples": settings.acting_samples,
            "thresholds": [round(float(self.threshold[number]), 6) for number in own],
        }


@dataclass(frozen=True)
class _Networks:
    """What one limit's policy acts by."""

    decoder: MLP
    actor: MLP
    critics: Values | None
    threshold: float


class BCQPolicy:
    """Chooses among decoded actions by the critics, or takes one random decode.

    All rows meet the same candidates' latent variables, so that rows do not influence each other. The random decode of
    a row follows from its first observation, so it is the same wherever and whenever the episode is run again.
    """

    def __init__(self, config: dict[str, Any], networks: Sequence[_Networks]) -> None:
        self.task: str = config["task"]
        self.algorithm: str = config["algorithm"]
        self.observation_dim: int = config["observation_dim"]
        self.action_dim: int = config["action_dim"]
        self.limits: tuple[float, ...] = tuple(config["limits"])
        self._networks = networks
        self._perturbation: float = config["perturbation"]
        self._hopeful = config["cost_ensemble"] == "min"
        latent = Generators([0]).normal(config["acting_samples"], 2 * self.action_dim)
        self._latent = latent[0].clamp_(-PRIOR_CLIP, PRIOR_CLIP)
        self._number = 0
        self._rows: list[np.random.Generator] = []

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Chooses the networks.

        Raises:
            BadInput: If every trained limit is above the one asked for.
        """
        self._number = chosen_limit(self.limits, cost_limit, f"{self.algorithm} for {self.task}")
        self._rows = []

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """Maps observations (n, observation_dim) to actions (n, action_dim)."""
        networks, rows = self._networks[self._number], np.ascontiguousarray(observations, dtype=np.float32)
        states = torch.from_numpy(rows)[None]
        if networks.critics is None:
            actions = self._decode(networks, states, self._random(rows))
            return actions[0].numpy()
        number = len(self._latent)
        candidates = each_with(states, number)
        actions = self._decode(networks, candidates, self._latent.repeat(len(rows), 1)[None])
        values = evaluate(networks.critics, pair(candidates, actions)).squeeze(-1)[0].unflatten(1, (len(rows), number))
        costs = values[1:].amin(0) if self._hopeful else values[1:].amax(0)
        chosen = choose(values[0], costs, networks.threshold)
        taken: np.ndarray = actions[0].unflatten(0, (len(rows), number))[torch.arange(len(rows)), chosen].numpy()
        return taken

    def _decode(self, networks: _Networks, states: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        actions = evaluate(networks.decoder, pair(states, latent))[:, 0].tanh_()
        moved = evaluate(networks.actor, pair(states, actions))[:, 0]
        return actions.add_(moved, alpha=self._perturbation).clamp_(-1.0, 1.0)

    def _random(self, rows: np.ndarray) -> torch.Tensor:
        """Latent variables (1, n, latent_dim), from a generator of each row's own."""
        if not self._rows:
            self._rows = [np.random.default_rng(zlib.crc32(row.tobytes())) for row in rows]
        drawn = np.stack([generator.standard_normal(2 * self.action_dim) for generator in self._rows])
        return torch.from_numpy(drawn.clip(-PRIOR_CLIP, PRIOR_CLIP).astype(np.float32))[None]

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Nothing to remember."""


def load(folder: Path) -> BCQPolicy:
    """Loads a model folder.

    Raises:
        BadInput: If a file is missing, damaged, or does not fit the configuration.
    """
    config = read_config(folder)
    try:
        limits, thresholds = config["limits"], config["thresholds"]
        require_numbers(config, "perturbation", "acting_samples")
        if config["cost_ensemble"] not in ("max", "min"):
            raise ValueError(f"cost_ensemble is {config['cost_ensemble']!r}, not max or min")
        if len(thresholds) != len(limits):
            raise ValueError(f"{len(thresholds)} thresholds for {len(limits)} limits")
        networks = [_networks(config, threshold) for threshold in thresholds]
        policy = BCQPolicy(config, networks)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"{folder / 'config.json'}: not a configuration of BCQ-Lag ({error!r}); train it again"
        ) from None
    for limit, own in zip(limits, networks, strict=True):
        parts = {"decoder": own.decoder, "actor": own.actor} | ({} if own.critics is None else {"critics": own.critics})
        shapes = {f"{part}.{name}": v.shape for part, net in parts.items() for name, v in net.state_dict().items()}
        tensors = read_tensors(folder / f"limit-{limit:g}.safetensors", shapes)
        for part, net in parts.items():
            start = f"{part}."
            net.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    return policy


def _networks(config: dict[str, Any], threshold: float) -> _Networks:
    """Networks of a configuration's shapes, without their weights."""
    observation_dim, action_dim, generators = config["observation_dim"], config["action_dim"], Generators([0])
    width = observation_dim + action_dim
    decoder = ActionVAE(generators, observation_dim, action_dim, config["vae_hidden"]).decoder
    actor = MLP(generators, [width, *config["hidden"], action_dim], activation="tanh", output="tanh")
    number = config["cost_critics"]
    critics = Values(generators, [width, *config["hidden"]], ensemble=1 + number) if number else None
    return _Networks(decoder, actor, critics, float(threshold))
