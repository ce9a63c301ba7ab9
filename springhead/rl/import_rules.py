"""Holds an imported episode to its task: the rules, in their order, and what becomes of an episode that breaks one.

What validation says of every episode of a collected data set (:mod:`springhead.rl.suite`) is asked here already, where
the episode still is one of a file that can be named: one bad import would make the whole collected data set red.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from springhead.lineage.digests import arrays_digest
from springhead.rl.episodes import EPISODE_KEYS, Episode
from springhead.rl.foreign import FLOATS, Found
from springhead.rl.tasks import ACTION_BOUND, Task


@dataclass(frozen=True)
class Decision:
    """What becomes of an episode, and why."""

    id: str
    rule: str
    kept: bool
    value: float | None
    threshold: float | None
    why: str = ""


@dataclass(frozen=True)
class _Broken:
    """A rule that an episode breaks, the value it has and the one that it should have, and that in words."""

    rule: str
    value: float
    threshold: float | None
    why: str


def judge(found: Found, of: Task, where: str) -> Decision:
    """Holds an episode to its task.

    Args:
        found: The episode.
        of: The task.
        where: How messages name the source.

    Returns:
        The first rule it breaks, in the order unfinished, one step, horizon, end flags, terminal, terminal cut, timeout
        before horizon, finite, action range, cost sign, cost kind.
    """
    episode = found.episode
    # Of one step without a successor the arrays differ in length; that is no reason for it to have no id.
    id_ = (
        episode.id if len(episode.next_observations) else arrays_digest({k: getattr(episode, k) for k in EPISODE_KEYS})
    )
    broken = _end(found, of) or _numbers(episode, of)
    if broken is not None:
        why = f"{where}: episode {found.index}: {broken.why}"
        return Decision(id_, broken.rule, False, broken.value, broken.threshold, why)
    return Decision(id_, "last step" if found.cut else "import", True, found.cut or None, None)


def _end(found: Found, of: Task) -> _Broken | None:
    """The first rule on an episode's length and end that it breaks.

    A time-out belongs at the horizon. An episode whose last step was cut off for want of its successor has one step
    less, here or in the tool that wrote the file, so one step less is the full length too; validation takes it from
    imported episodes likewise (``suite.episode_table``).
    """
    episode, horizon = found.episode, of.horizon
    steps = episode.length + (found.cut if len(episode.next_observations) else 0)
    if not found.finished:
        why = f"its {steps} steps are followed by no terminal and no time-out; set unfinished: drop to leave them out"
        return _Broken("unfinished", steps, None, why)
    if not len(episode.next_observations):
        return _Broken("one step", 1, 2, "has one step, whose successor the file does not have")
    if steps > horizon:
        return _Broken("horizon", steps, horizon, f"has {steps} steps; {of.name} ends at {horizon}")
    if episode.terminals[-1] and episode.timeouts[-1]:
        why = f"its last step, {steps - 1}, is terminal and time-out both; keep one of the two flags in the file"
        return _Broken("end flags", 2, 1, why)
    if found.terminal and not of.terminates:
        why = (
            f"ends with a terminal after {steps} steps; {of.name} never terminates, it ends by its horizon of "
            f"{horizon} alone: is it of another task? An end by time is a time-out in the file, not a terminal"
        )
        return _Broken("terminal", steps, horizon, why)
    if episode.terminals[-1] or episode.length >= horizon - 1:
        return None
    if found.terminal:
        why = (
            f"ends with a terminal after {steps} steps, which is cut off since the file does not have that step's "
            "successor; without it the episode ends for no reason. Add next_observations to the file"
        )
        return _Broken("terminal cut", steps, horizon, why)
    why = (
        f"has a time-out after {steps} steps; {of.name} runs for {horizon}: is it of another task, or of a shorter "
        "time limit?"
    )
    return _Broken("timeout before horizon", steps, horizon, why)


def _numbers(episode: Episode, of: Task) -> _Broken | None:
    """The first rule on an episode's numbers that it breaks."""
    for key in FLOATS:
        wrong = ~np.isfinite(getattr(episode, key).reshape(episode.length, -1)).all(axis=1)
        if wrong.any():
            why = f"{key} are not finite at step {np.argmax(wrong)} ({wrong.sum()} such steps)"
            return _Broken("finite", float(wrong.sum()), 0, why)
    extremes = np.abs(episode.actions).max(axis=1)
    if extremes.max() > ACTION_BOUND:
        step, value = int(extremes.argmax()), float(extremes.max())
        return _Broken("action range", value, ACTION_BOUND, f"actions reach {value:.9g} at step {step}, beyond 1")
    costs = episode.costs
    if costs.min() < 0:
        step, value = int(costs.argmin()), float(costs.min())
        return _Broken("cost sign", value, 0, f"costs are {value:g} at step {step}; costs are >= 0")
    other = (costs != 0) & (costs != 1)
    if of.cost_kind == "binary" and other.any():
        step = int(np.argmax(other))
        why = (
            f"the cost is {costs[step]:g} at step {step} ({other.sum()} such steps); {of.name} costs 0 or 1 per step: "
            "is it of another task, or are the costs scaled, or another array's?"
        )
        return _Broken("cost kind", float(costs[step]), 1, why)
    return None
