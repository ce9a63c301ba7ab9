"""The training loop of all online algorithms: checkpoints, resume, a stop at numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from springhead.errors import BadInput
from springhead.rl.online.checkpoint import load_checkpoint, save_checkpoint
from springhead.rl.online.contract import Figures, Learner


def train(learner: Learner, scratch: Path, checkpoint_every: int = 10) -> Iterator[list[Figures]]:
    """Trains, or goes on training, and yields after every iteration.

    Killed at any point and called again with a new learner of the same configuration and with the same folder, it
    yields the iterations after the last checkpoint as if nothing had happened.

    Args:
        learner: A learner that has not trained yet.
        scratch: Where the checkpoints of this run go.
        checkpoint_every: Iterations between checkpoints.

    Yields:
        The figures of all iterations so far; the learner is in the state after the last of them.

    Raises:
        BadInput: If the checkpoint is damaged, or a loss or weight is not finite; the last good checkpoint stays.
    """
    config = {"algorithm": learner.algorithm, **asdict(learner.config)}
    history: list[Figures] = []
    saved = load_checkpoint(scratch, config)
    if saved is not None:
        tensors, facts = saved
        learner.restore(tensors, facts["learner"])
        history = [Figures(**figures) for figures in facts["history"]]
    while learner.iteration < learner.config.iterations:
        history.append(learner.iterate())
        _check_figures(learner, history[-1])
        yield history
        # After the yield, so that what the caller keeps of an iteration is there before the checkpoint skips it. Not
        # after the last one: a run that is asked for again must yield something.
        if learner.iteration % checkpoint_every == 0 and learner.iteration < learner.config.iterations:
            tensors, facts = learner.state()
            _check_tensors(learner, tensors)
            rows = [asdict(figures) for figures in history]
            save_checkpoint(scratch, learner.iteration, tensors, {"config": config, "learner": facts, "history": rows})


def feasible_first(history: Sequence[Figures], limit: float | None = None) -> int:
    """Chooses a policy by what its own episodes did: any that keeps the limit beats any that does not.

    Among those that keep it the highest return wins, among the others the lowest cost (FSRL's rule); the earlier one
    at a tie.

    Args:
        history: The candidates' figures, at least one: of the episodes that each ran itself. An iteration's are those
            of the policy before its update, which are no evidence about the one after it.
        limit: The mean episode cost to keep; None for the limit in force at the last candidate.

    Returns:
        The candidate's position in ``history``.
    """
    keep = history[-1].cost_limit if limit is None else limit

    def rank(index: int) -> tuple[bool, float]:
        figures = history[index]
        feasible = figures.cost_return <= keep
        return feasible, figures.episode_return if feasible else -figures.cost_return

    return max(range(len(history)), key=rank)


def _check_figures(learner: Learner, figures: Figures) -> None:
    named = {name: value for name, value in asdict(figures).items() if name != "losses"}
    for name, value in {**named, **figures.losses}.items():
        if not math.isfinite(value):
            raise _diverged(learner, f"{name} is {value}")


def _check_tensors(learner: Learner, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise _diverged(learner, f"{name} holds a number that is not finite")


def _diverged(learner: Learner, what: str) -> BadInput:
    return BadInput(
        f"task {learner.config.task}, algorithm {learner.algorithm}, iteration {learner.iteration}: {what}; the "
        "training has diverged. The last checkpoint before it is kept; lower the learning rates or the step size"
    )
