"""The one training loop of all offline algorithms: resume, figures, the guard against numbers that are not finite.

Killed and resumed training equals uninterrupted training, byte for byte on a CPU. Between two reports nothing is
copied from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.rl.dataset import Episode
from springhead.rl.offline import checkpoint
from springhead.rl.offline.algorithms import Entry, entry
from springhead.rl.offline.batches import check_device, flatten
from springhead.rl.offline.contract import Learner, Member, OnStep, Settings
from springhead.rl.tasks import Task

Weights = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Trained:
    """One seed's model.

    Attributes:
        config: The model folder's configuration.
        files: Its tensors by file name, at the last step.
        history: The learning curve.
        policies: The tensors at earlier steps, by step, where ``Settings.policies`` asks for some.
    """

    config: dict[str, Any]
    files: Weights
    history: list[dict[str, float]]
    policies: dict[int, Weights] = field(default_factory=dict)


def train(
    name: str,
    episodes: Sequence[Episode],
    task: Task,
    settings: Settings,
    seeds: Sequence[int],
    scratch: Path,
    on_step: OnStep = lambda step, figures: None,
) -> list[Trained]:
    """Trains an algorithm for all seeds and limits at once, or resumes the training from a checkpoint.

    Args:
        name: The algorithm.
        episodes: The data set.
        task: Its task.
        settings: Of the algorithm's own class.
        seeds: One model for each, in their order.
        scratch: Folder for resume checkpoints. A checkpoint of another run in it (algorithm, task, settings, seeds,
            limits or data) is refused.
        on_step: Told about progress every ``report_every`` steps, and once when resuming.

    Returns:
        One entry per seed.

    Raises:
        BadInput: If there is no such algorithm, the data do not fit it, the scratch folder holds another run's
            checkpoint, or a figure or a weight stops being finite.
    """
    found = entry(name)
    check_device(settings.device)
    members = members_of(found, task, settings, seeds)
    learner = found.learner()(name, flatten(episodes, task), task, settings, members)
    run = {
        "algorithm": name,
        "task": task.name,
        "settings": json_digest(asdict(settings)),
        "seeds and limits": json_digest([asdict(member) for member in members]),
        "data": json_digest([episode.id for episode in episodes]),
    }
    history = fit(learner, run, settings, scratch, on_step)
    last = _unpacked(_packed(learner), members)
    kept = {
        step: _unpacked(load_file(scratch / f"policies-{step:08d}.safetensors"), members)
        for step in policy_steps(settings)
    }
    trained = []
    for seed in seeds:
        own = [number for number, member in enumerate(members) if member.seed == seed]
        limits = [limit for number in own if (limit := members[number].cost_limit) is not None]
        config = {"algorithm": name, "task": task.name, "seed": seed, "limits": limits, **learner.config(own[0])}
        if settings.precision != "float32":
            config["precision"] = settings.precision
        trained.append(
            Trained(
                config,
                {members[number].file: last[number] for number in own},
                [_own_figures(row, members, own) for row in history],
                {step: {members[number].file: each[number] for number in own} for step, each in kept.items()},
            )
        )
    return trained


def members_of(found: Entry, task: Task, settings: Settings, seeds: Sequence[int]) -> list[Member]:
    """One member for each seed and, where the algorithm is trained for one limit, each limit.

    Raises:
        BadInput: If there is no seed, or one is named twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise BadInput(f"seeds are {list(seeds)}; name at least one, and each once")
    if not found.by_limit:
        return [Member(seed) for seed in seeds]
    return [Member(seed, limit) for seed in seeds for limit in sorted(settings.limits or task.limits)]


def policy_steps(settings: Settings) -> list[int]:
    """The steps after which policies are kept on the way: evenly spaced, before the last."""
    count = settings.policies
    return sorted({round(settings.steps * (i + 1) / (count + 1)) for i in range(count)} - {0, settings.steps})


def fit(
    learner: Learner, run: Mapping[str, str], settings: Settings, scratch: Path, on_step: OnStep
) -> list[dict[str, float]]:
    """Takes all steps; returns the learning curve, a figure of each member per column.

    Args:
        learner: What is trained.
        run: What tells this run from others, by what it is; the algorithm's name among it.
        settings: Of the run.
        scratch: See :func:`train`.
        on_step: See :func:`train`.

    Raises:
        BadInput: If the checkpoint is another run's, or a figure or a weight is not finite; the last good state is
            kept in ``scratch``.
    """
    first, history, saved = 0, list[dict[str, float]](), 0
    name = run["algorithm"]

    def check(values: Mapping[str, bool], step: int) -> None:
        if (bad := next((key for key, finite in values.items() if not finite), None)) is not None:
            where = f"the last good state, of step {saved}, is kept in {scratch}" if saved else "no state was kept yet"
            raise BadInput(
                f"{name}: {bad} is not finite at step {step}; {where}. Lower the learning rates of "
                f"{entry(name).block} in rl.train.algorithms and train again, from the start"
            )

    if (state := checkpoint.latest(scratch)) is not None:
        other = [key for key, value in run.items() if state.facts.get("run", {}).get(key) != value]
        if other:
            raise BadInput(f"{scratch}: holds a checkpoint with other {', '.join(other)}; remove it, or name another")
        checkpoint.unpack(state.tensors, learner)
        first, history = state.step, state.facts["history"]
        saved = first
        on_step(first, {})
    keep = set(policy_steps(settings))
    for step in range(first + 1, settings.steps + 1):
        with arithmetic(settings.precision):
            figures = learner.update(step)
        last, due = step == settings.steps, step % settings.checkpoint_every == 0
        if not (last or due or step in keep or step % settings.report_every == 0):
            continue
        row = _readable(learner.members, figures)
        check({key: bool(np.isfinite(value)) for key, value in row.items()}, step)
        tensors = checkpoint.pack(learner) if last or due or step in keep else {}
        # Figures are of before the step, these of after it.
        check({key: bool(value.isfinite().all()) for key, value in tensors.items()}, step)
        if step in keep:
            scratch.mkdir(parents=True, exist_ok=True)
            save_file(_packed(learner), scratch / f"policies-{step:08d}.safetensors")
        if last or due:
            history.append({"step": step, **row})
            checkpoint.save(scratch, step, tensors, {"history": history, "run": dict(run)})
            saved = step
        on_step(step, row)
    return history


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within it CUDA's matrix products have a precision, see ``Settings.precision``."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        if precision == "tf32":
            products.fp32_precision = "tf32"
        if precision == "bfloat16":
            # Without the cache of cast weights: an update takes several steps, and the cache would keep those before.
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                yield
        else:
            yield
    finally:
        if precision == "tf32":
            products.fp32_precision = before


def label(members: Sequence[Member], number: int) -> str:
    """What tells a member's figures from its companions': the limit, and the seed where there are several."""
    member = members[number]
    parts = [] if member.cost_limit is None else [member.name]
    if len({one.seed for one in members}) > 1:
        parts.append(f"seed-{member.seed}")
    return "".join(f"-{part}" for part in parts)


def _readable(members: Sequence[Member], figures: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """All members' figures on the host, by one copy."""
    values = torch.stack([figure.detach() for figure in figures.values()]).tolist()
    return {
        f"{name}{label(members, number)}": value
        for name, row in zip(figures, values, strict=True)
        for number, value in enumerate(row)
    }


def _own_figures(row: Mapping[str, float], members: Sequence[Member], own: Sequence[int]) -> dict[str, float]:
    """The columns of one seed, under the names they have when it is trained alone."""
    found = {"step": row["step"]}
    alone = [members[number] for number in own]
    others = {label(members, number): label(alone, place) for place, number in enumerate(own)}
    for name, value in row.items():
        for long, short in others.items():
            stem = name.removesuffix(long) if long else name
            if name != "step" and name.endswith(long):
                found[f"{stem}{short}"] = value
    return found


def _packed(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": value.detach().cpu().clone().contiguous()
        for number in range(len(learner.members))
        for name, value in learner.weights(number).items()
    }


def _unpacked(tensors: Mapping[str, torch.Tensor], members: Sequence[Member]) -> list[dict[str, torch.Tensor]]:
    return [
        {name.removeprefix(f"{i}."): value for name, value in tensors.items() if name.startswith(f"{i}.")}
        for i in range(len(members))
    ]
