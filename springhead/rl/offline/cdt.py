"""The Constrained Decision Transformer (CDT).

Source: Liu et al. 2023, "Constrained Decision Transformer for Offline Safe Reinforcement Learning". Its text
was not at hand, so equations bear no numbers: OSRL's code was followed, read and not copied. A sequence
model predicts actions from the return and the cost still to come; one model serves all cost
limits. Its three parts are a stochastic policy with an entropy constraint, training items that pair
infeasible targets with safe episodes (``relabelling.py``), and tokens for both targets.

Deviations from the released code, with reasons in ``docs/methods/cdt.md``:
  1. The entropy and its target -|A| are both joint over action dimensions (``entropy="joint"``).
  2. The temperature is part of the checkpoints.
  3. Cost token and sampling cap are derived from the task's limits: 1.25 and 1.75 times the highest,
     which is the released 50 and 70 for limits of 10, 20, 40.
  4. Return targets come from the data's frontier, not from a hand-made table (``return_targets``
     takes a table, or "published" for the released one).
  5. Augmented targets keep their own episode; frontier fits and grids have guards.
  6. Continuous costs train a regression head; the released code truncates them (``cost_head="truncated"``).
  7. The state-prediction head, whose published weight is 0, is left out.
  8. The log standard deviation is clamped (``bounded``); the learning rate may decay (``decay``).
  9. All weights start alike (``attention_start``), augmented return targets begin at the frontier and not 1 above it
     (``augmentation.min_return``), the augmentation's grid has no cells for the highest values alone
     (``augmentation.grid``), and the cost's loss is a mean over steps that exist, not over padding too (``cost_loss``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from springhead.bounds import OutOfRange, above_zero, at_least, fraction
from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.rl.offline.batches import Flat, check_constraint
from springhead.rl.offline.contract import Generators, Member, Settings
from springhead.rl.offline.frontier import attainable
from springhead.rl.offline.relabelling import Augmentation, Items, joined, plain, relabelled
from springhead.rl.offline.sequences import Batch, Sampler, Scheme
from springhead.rl.offline.stacked import clip_members
from springhead.rl.offline.transformer import Dropout, Outputs, Shape, Transformer
from springhead.rl.policy import read_config, read_tensors, require_numbers
from springhead.rl.tasks import TASKS, Task

PUBLISHED_TARGETS = Path(__file__).with_name("cdt_targets.json")
"""By task, the (cost limit, return target) pairs of OSRL 03a4586, examples/configs/cdt_configs.py."""

LOG_STD_RANGE = (-5.0, 2.0)
"""Bounds of the log standard deviation. Without any, a deterministic data set drives the likelihood to infinity."""

_SLICE = 64
"""Sequences that pass the network together on a CPU: their activations stay in its cache."""


@dataclass(frozen=True, kw_only=True)
class CDTSettings(Settings):
    """Hyper-parameters of CDT. Numbers left at null are derived from the task or the data.

    ``hidden`` must stay as it is: a transformer is shaped by ``width`` and ``layers``.
    """

    batch_size: int = 2048
    """Sequences per step."""
    context: int = 10
    """Steps of a sequence, in training and when acting."""
    width: int = 128
    """Token width."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 8
    """Attention heads; they divide the width."""
    dropout: float = 0.1
    """Probability, on the sequence, in attention and on residuals."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    temperature_rate: float = 1e-4
    """Learning rate of the entropy temperature."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    warmup: int = 500
    """Steps over which the learning rate rises linearly to its value."""
    decay: bool = False
    """Let the learning rate fall to 0 afterwards, along a cosine."""
    gradient_clip: float = 0.25
    """Largest norm of a step's gradient."""
    cost_weight: float = 0.02
    """Weight of predicting each step's cost; at 0 the cost is not predicted."""
    cost_head: Literal["fitting", "truncated"] = "fitting"
    """Classes for binary costs and regression for others, or classes of truncated costs as in the released code."""
    cost_loss: Literal["steps", "padded"] = "steps"
    """The cost's loss is a mean over steps that exist, or over all places, padding included, as in the released code:
    padding adds nothing and counts."""
    entropy: Literal["joint", "per-dimension"] = "joint"
    """What is compared with -|A|: the joint entropy, or its mean over dimensions as in the released code."""
    attention_start: Literal["normal", "released"] = "normal"
    """First weights of queries, keys and values: like all others, or Xavier-uniform as PyTorch's own attention."""
    bounded: bool = True
    """Clamp the log standard deviation; the released code declares bounds and does not use them."""
    return_scale: float | None = 0.1
    """Return tokens are multiplied by this; derived: 2 / the highest size of a return in the data."""
    cost_scale: float | None = 1.0
    """Cost tokens are multiplied by this; derived: 2 / cost_reference."""
    cost_reference: float | None = None
    """Cost tokens see this less the cost-to-go; derived: 1.25 x the highest limit."""
    sampling_cap: float | None = None
    """Items are sampled in proportion to this less their cost; derived: 1.75 x the highest limit."""
    target_margin: float = 0.0
    """Act under a cost target of (1 - margin) x limit."""
    clamp_cost: bool = True
    """An episode that is over its cost target is asked for no more cost; in the released code the cost-to-go falls
    below 0, which no episode of the data has."""
    return_quantile: float = 1.0
    """Act under this quantile of the returns of all episodes within the cost target; at 1 the frontier's return."""
    return_targets: dict[str, tuple[tuple[float, float], ...]] | Literal["published"] = field(default_factory=dict)
    """By task, (cost limit, return target) pairs to act by instead of the data's frontier; limits without margin.
    ``published``: OSRL's, of ``cdt_targets.json``."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Training items with infeasible targets."""
    checkpoint_every: int = 500
    """Steps between resume checkpoints, and between points of the learning curve's file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden != Settings().hidden:
            raise OutOfRange("hidden does not shape a transformer; remove it, and set width and layers")
        at_least(1, self, "context", "width", "layers", "heads")
        above_zero(self, "learning_rate", "gradient_clip")
        at_least(0, self, "temperature_rate", "weight_decay", "warmup", "cost_weight")
        fraction(self, "dropout", "target_margin", "return_quantile")
        for name in ("return_scale", "cost_scale", "cost_reference", "sampling_cap"):
            if getattr(self, name) is not None:
                above_zero(self, name)
        if self.limits and not max(self.limits):
            raise OutOfRange("limits are all 0; CDT's scales are derived from the highest, name one above 0")
        unknown = [] if self.return_targets == "published" else sorted(set(self.return_targets) - set(TASKS))
        if unknown:
            raise OutOfRange(f"return_targets name unknown tasks: {', '.join(unknown)}")
        if self.width % self.heads:
            raise OutOfRange(f"width is {self.width}; use a multiple of heads, {self.heads}")
        for name in ("dropout", "target_margin"):
            if getattr(self, name) == 1:
                raise OutOfRange(f"{name} is 1; use a number below 1")


class Losses(NamedTuple):
    """The terms of the loss, each (members,)."""

    action: torch.Tensor
    cost: torch.Tensor
    entropy: torch.Tensor


def losses(
    outputs: Outputs,
    batch: Batch,
    temperature: torch.Tensor,
    entropy: str,
    steps: torch.Tensor,
    places: int | None = None,
) -> Losses:
    """Computes the loss terms, summed over the steps that exist and divided by ``steps``.

    action: -(log N(a; mean, std) + temperature x entropy), both joint over action dimensions, or both
    averaged over them for ``entropy="per-dimension"``. cost: cross-entropy of "this step costs", or the
    squared error for a head of one output. entropy: of the action distribution, for the temperature.

    Args:
        outputs: Of the network.
        batch: What it saw.
        temperature: (members,), without gradient.
        entropy: As in :class:`CDTSettings`.
        steps: (members,), how many steps exist, in the whole batch where this is a slice of it.
        places: What the cost's sum is divided by instead.
    """
    share = 1.0 if entropy == "joint" else 1.0 / batch.actions.shape[-1]
    weight = batch.mask * (share / steps)[:, None, None]
    scaled = (batch.actions - outputs.mean) * torch.exp(-outputs.log_std)
    spread = outputs.log_std.sum(-1)
    constant = 0.5 * math.log(2 * math.pi) * batch.actions.shape[-1]
    mean_log_prob = (weight * (-0.5 * scaled.square().sum(-1) - spread - constant)).sum((1, 2))
    mean_entropy = (weight * (spread + constant + 0.5 * batch.actions.shape[-1])).sum((1, 2))
    action = -(mean_log_prob + temperature * mean_entropy)
    if outputs.cost is None:
        return Losses(action, torch.zeros_like(action), mean_entropy)
    if outputs.cost.shape[-1] == 2:
        margin = outputs.cost[..., 1] - outputs.cost[..., 0]
        errors = F.binary_cross_entropy_with_logits(margin, (batch.step_costs >= 1).float(), reduction="none")
    else:
        errors = (outputs.cost[..., 0] - batch.step_costs).square()
    return Losses(action, (errors * batch.mask).sum((1, 2)) / (places or steps), mean_entropy)


def temperature_gradient(log_temperature: torch.Tensor, entropy: torch.Tensor, action_dim: int) -> torch.Tensor:
    """Gradient by log T of T (entropy + |A|): T falls while the entropy is above its target -|A|, and rises below."""
    return log_temperature.exp() * (entropy + action_dim)


class CDT:
    """One transformer for each seed, each with batches, augmentation and dropout of its own."""

    def __init__(self, name: str, data: Flat, task: Task, settings: CDTSettings, members: Sequence[Member]) -> None:
        check_constraint(name, data, task, settings.limits or task.limits)
        self.members, self.task, self.settings = members, task, settings
        seeds = [member.seed for member in members]
        self.scheme = _scheme(settings, task, float(np.abs(data.returns).max()))
        self.generators = {
            name: Generators(seeds, settings.device, i) for i, name in enumerate(("batches", "dropout"), 1)
        }
        items = [_items(data, settings, seed) for seed in seeds]
        self.sampler = Sampler(data, items, self.scheme, self.generators["batches"])
        self.shape = Shape(
            observation_dim=task.observation_dim,
            action_dim=task.action_dim,
            time_steps=self.sampler.longest + settings.context,
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            cost_outputs=_cost_outputs(settings, data),
        )
        bounds = LOG_STD_RANGE if settings.bounded else None
        released = settings.attention_start == "released"
        self.network = Transformer(Generators(seeds), self.shape, bounds, released).to(settings.device)
        self.log_temperature = nn.Parameter(torch.full((len(seeds),), math.log(0.1), device=settings.device))
        self.modules: nn.Module = nn.Module()
        self.modules.network = self.network
        self.modules.log_temperature = self.log_temperature
        parts = [
            {"params": list(self.network.parameters()), "lr": settings.learning_rate},
            {"params": [self.log_temperature], "lr": settings.temperature_rate, "weight_decay": 0.0},
        ]
        self.optimisers = {"adamw": torch.optim.AdamW(parts, weight_decay=settings.weight_decay, fused=True)}
        self.drop = Dropout(settings.dropout, self.generators["dropout"]) if settings.dropout else None
        self.targets = _return_targets(settings, task)
        self.attainable = attainable(data.returns, data.cost_returns, settings.return_quantile)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        settings = self.settings
        share = min(1.0, step / settings.warmup) if settings.warmup else 1.0
        if settings.decay and step > settings.warmup:
            done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
            share = 0.5 * (1 + math.cos(math.pi * done))
        return settings.learning_rate * share

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """Takes one step of the networks and one of the temperatures."""
        settings, adamw = self.settings, self.optimisers["adamw"]
        adamw.param_groups[0]["lr"] = self.rate(step)
        adamw.zero_grad()
        batch = self.sampler.draw()
        steps, temperature = batch.mask.sum((1, 2)), self.log_temperature.detach().exp()
        places = batch.mask[0].numel() if settings.cost_loss == "padded" else None
        prepared = self.network.prepare(self.drop)
        weights = prepared.detached()
        terms = []
        for part in batch.slices(_SLICE if settings.device == "cpu" else settings.batch_size):
            outputs = self.network(part.inputs, part.times, self.drop, settings.cost_weight > 0, weights)
            found = losses(outputs, part, temperature, settings.entropy, steps, places)
            (found.action + settings.cost_weight * found.cost).sum().backward()
            terms.append(torch.stack(found).detach())
        pairs = zip(prepared.tensors(), weights.tensors(), strict=True)
        used = [(made, leaf.grad) for made, leaf in pairs if leaf.grad is not None]
        torch.autograd.backward([made for made, _ in used], [gradient for _, gradient in used])
        action, cost, entropy = torch.stack(terms).sum(0)
        norm = clip_members(self.network.parameters(), len(self.members), settings.gradient_clip)
        self.log_temperature.grad = temperature_gradient(self.log_temperature.detach(), entropy, self.task.action_dim)
        adamw.step()
        figures = {"loss": action, "cost_loss": cost, "entropy": entropy, "gradient_norm": norm}
        return {**figures, "temperature": temperature}

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """The tensors of one member's network."""
        return self.network.member(member)

    def config(self, member: int) -> dict[str, Any]:
        """What shapes its network, and its targets."""
        settings = self.settings
        return {
            **asdict(self.shape),
            "context": settings.context,
            "return_scale": self.scheme.return_scale,
            "cost_scale": self.scheme.cost_scale,
            "cost_reference": self.scheme.cost_reference,
            "target_margin": settings.target_margin,
            "clamp_cost": settings.clamp_cost,
            "attainable": [list(pair) for pair in self.attainable],
            "return_targets": [list(pair) for pair in sorted(self.targets)],
            **settings.asked_limits(),
        }


def _items(data: Flat, settings: CDTSettings, seed: int) -> Items:
    """What a seed samples: every episode, and augmented ones that are its own."""
    items = plain(data.returns, data.cost_returns)
    if settings.augmentation.share == 0:
        return items
    rng = np.random.default_rng([seed, 1])
    return joined(items, relabelled(data.returns, data.cost_returns, settings.augmentation, rng))


def _return_targets(settings: CDTSettings, task: Task) -> tuple[tuple[float, float], ...]:
    """The task's (cost limit, return target) pairs of the chosen table; none where there is no table."""
    if isinstance(settings.return_targets, dict):
        return settings.return_targets.get(task.name, ())
    published = read_json(PUBLISHED_TARGETS)
    if task.name not in published:
        raise BadInput(
            f"cdt on {task.name}: no return targets are published for it; remove `return_targets: published` from "
            "rl.train, or name pairs of your own"
        )
    return tuple((float(limit), float(target)) for limit, target in published[task.name])


def _cost_outputs(settings: CDTSettings, data: Flat) -> int:
    if settings.cost_head == "truncated":
        if float(data.costs.max()) >= 2:
            raise BadInput(
                f"cdt: cost_head 'truncated' knows the classes 0 and 1, a step costs {float(data.costs.max()):g}; "
                "use 'fitting' in rl.train"
            )
        return 2
    return 2 if bool(((data.costs == 0) | (data.costs == 1)).all()) else 1


def _scheme(settings: CDTSettings, task: Task, largest_return: float) -> Scheme:
    highest = max(settings.limits or task.limits)
    reference = 1.25 * highest if settings.cost_reference is None else settings.cost_reference
    derived_scale = 2.0 / largest_return if largest_return > 0 else 1.0
    return Scheme(
        batch_size=settings.batch_size,
        context=settings.context,
        return_scale=derived_scale if settings.return_scale is None else settings.return_scale,
        cost_scale=2.0 / reference if settings.cost_scale is None else settings.cost_scale,
        cost_reference=reference,
        sampling_cap=1.75 * highest if settings.sampling_cap is None else settings.sampling_cap,
    )


class CdtPolicy:
    """Acts by the mean action, under targets that shrink by what each episode has got and spent.

    In an episode that outlasts all that were trained on, time stands still at the last step of the longest.

    The return target for a cost limit is what the data's episodes attain within it, or that of the table
    given in training.
    """

    def __init__(self, config: dict[str, Any], network: Transformer) -> None:
        self.task: str = config["task"]
        self.algorithm: str = config["algorithm"]
        self.observation_dim: int = config["observation_dim"]
        self.action_dim: int = config["action_dim"]
        self._config = config
        self._network = network.requires_grad_(False)
        # Embeddings of later steps were never trained: the rows behind the longest episode are those of padding.
        self._longest: int = config["time_steps"] - config["context"]
        self._context: int = min(config["context"], self._longest)
        self.reset(1, 0.0)

    def return_target(self, cost_limit: float) -> float:
        """Returns the return to ask for under a cost limit.

        From the table: the pair with the largest limit not above this one, else the first. From the data: the
        best return (or ``return_quantile``) among episodes within the limit, else among the cheapest.
        """
        pairs = self._config["return_targets"] or self._config["attainable"]
        within = [target for limit, target in pairs if limit <= cost_limit]
        return float(within[-1] if within else pairs[0][1])

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Begins new episodes."""
        budget = (1 - self._config["target_margin"]) * cost_limit
        self._time = 0
        target = self.return_target(cost_limit if self._config["return_targets"] else budget)
        self._return = torch.full((num_envs,), target, dtype=torch.float64)
        self._cost = torch.full((num_envs,), float(budget), dtype=torch.float64)
        self._past: list[torch.Tensor] = []

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Maps observations (n, observation_dim) to actions (n, action_dim)."""
        rows = torch.from_numpy(np.asarray(observations, dtype=np.float32))
        returns = (self._return * self._config["return_scale"]).float()
        budget = self._cost.clamp(min=0.0) if self._config["clamp_cost"] else self._cost
        costs = ((self._config["cost_reference"] - budget) * self._config["cost_scale"]).float()
        now = torch.cat([returns[:, None], costs[:, None], rows, torch.zeros(len(rows), self.action_dim)], dim=1)
        self._past = [*self._past, now][-self._context :]
        step = min(self._time, self._longest - 1)
        times = torch.arange(step + 1 - len(self._past), step + 1).expand(1, len(rows), -1)
        action = self._network(torch.stack(self._past, dim=1)[None], times, costs=False).mean[0, :, -1].clamp(-1.0, 1.0)
        now[:, -self.action_dim :] = action
        actions: np.ndarray = action.numpy()
        return actions

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Takes rewards (n,) and costs (n,) off the targets."""
        self._return = self._return - torch.from_numpy(np.asarray(rewards, dtype=np.float64))
        self._cost = self._cost - torch.from_numpy(np.asarray(costs, dtype=np.float64))
        self._time += 1


def _require_pairs(key: str, pairs: Any) -> None:
    """Makes sure that targets are (cost limit, return) pairs, of which the data attain at least one.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(pairs, list) or (key == "attainable" and not pairs):
        raise ValueError(f"{key} is {pairs!r}, not a list of pairs")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{key} has {pair!r}, not a pair")
        named = dict(zip((f"a cost limit of {key}", f"a return of {key}"), pair, strict=True))
        require_numbers(named, *named)


def load(folder: Path) -> CdtPolicy:
    """Loads a CDT model folder.

    Raises:
        BadInput: If a file is missing, damaged, or does not fit the configuration.
    """
    config = read_config(folder)
    numbers = ("context", "return_scale", "cost_scale", "cost_reference", "target_margin")
    needed = (*numbers, "clamp_cost", "attainable", "return_targets")
    missing = [key for key in needed if key not in config]
    try:
        shape = Shape(**{entry.name: config[entry.name] for entry in fields(Shape)})
        require_numbers(config, *(key for key in numbers if key not in missing))
        if shape.heads < 1 or shape.width % shape.heads:
            raise ValueError(f"width is {shape.width!r}, not a multiple of heads, {shape.heads!r}")
        for key in ("attainable", "return_targets"):
            if key not in missing:
                _require_pairs(key, config[key])
        network = Transformer(Generators([0]), shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder / 'config.json'}: not a CDT configuration ({error!r}); train it again") from None
    if missing:
        raise BadInput(f"{folder / 'config.json'}: missing {', '.join(missing)}; train the model again")
    if not 0 < config["context"] < shape.time_steps:
        raise BadInput(
            f"{folder / 'config.json'}: context is {config['context']} of {shape.time_steps} time_steps, which no "
            "training writes; train the model again"
        )
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict(read_tensors(folder / "policy.safetensors", shapes))
    return CdtPolicy(config, network)
