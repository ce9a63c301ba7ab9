"""What is left of a data set between two filter rules, and everything that was decided so far.

Episodes stay where they are, in flat arrays: rules see returns and costs only, and what is left is a list of positions.
Arrays are copied where a rule changes them, and otherwise only if the outcome is asked for as a data set of its own:
writing it to a file needs its episodes one by one. Ids are digests of arrays, so those of changed episodes are computed
when the decisions table is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl.dataset import Dataset, Episode
from springhead.rl.filter_arrays import take
from springhead.rl.filters import Flags, Floats, Judgement, Positions
from springhead.rl.tasks import Task

Versions = npt.NDArray[np.int64]
"""Numbers of versions of episodes: 0 … n - 1 for the input's episodes, higher ones for those that rules made."""


@dataclass(frozen=True)
class Look:
    """The plane as one rule found it, for plots.

    Attributes:
        judgement: What the rule decided; its index counts in ``returns`` and ``costs``.
        returns: (m,) returns of the episodes that were left when it ran.
        costs: (m,) their costs.
        sources: (m,) the positions in the input of the episodes they came from.
        changed: Whether the rule replaces what it does not keep, instead of dropping it.
    """

    judgement: Judgement
    returns: Floats
    costs: Floats
    sources: Positions
    changed: bool


@dataclass(frozen=True)
class Filtered:
    """The outcome of all steps.

    Attributes:
        sources: (m,) for each episode left, the position in the input of the one it came from; in the input's order
            unless the released code's was asked for.
        looks: What every rule found and decided, in order.
        episode_returns: (m,) their undiscounted returns.
        cost_returns: (m,) their undiscounted costs.
    """

    sources: Positions
    looks: list[Look]
    episode_returns: Floats
    cost_returns: Floats
    _at: Positions = field(repr=False)
    _data: Dataset = field(repr=False)
    _final: Versions = field(repr=False)
    _judged: list[tuple[Versions, Versions | None]] = field(repr=False)
    _versions: list[tuple[Dataset, Positions]] = field(repr=False)

    def __len__(self) -> int:
        """Number of episodes left."""
        return len(self.sources)

    def episode(self, index: int) -> Episode:
        """One of the episodes left; its arrays are views."""
        return self._data.episode(int(self._at[index]))

    def episodes(self) -> list[Episode]:
        """All of them, in order."""
        return [self.episode(index) for index in range(len(self))]

    @cached_property
    def dataset(self) -> Dataset:
        """What is left, laid end to end; the input's own arrays where nothing was dropped or changed."""
        return take(self._data, self._at)

    @property
    def changed(self) -> Flags:
        """Which of the episodes left are no longer as they were collected, (m,)."""
        return self._final >= len(self._versions[0][1])

    def ids(self, known: Sequence[str] | None = None) -> npt.NDArray[np.object_]:
        """The id of every version of every episode: the input's, then those that steps made, in order.

        Args:
            known: Ids of the input's episodes, from its row table; computed from the arrays if left out.
        """
        made = [] if known is None else [np.array(known, dtype=object)]
        for data, at in self._versions[len(made) :]:
            made.append(np.array([data.episode(int(i)).id for i in at], dtype=object))
        return np.concatenate(made)

    def left(self, ids: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
        """Ids of the episodes left, given those of all versions."""
        return ids[self._final]

    def decisions(self, ids: npt.NDArray[np.object_]) -> dict[str, npt.NDArray[Any]]:
        """The decisions table: one row per rule and episode it looked at, in order.

        Args:
            ids: Ids of all versions, see ``ids``.

        Returns:
            Columns ``id``, ``rule``, ``kept``, ``value`` and ``threshold`` (NaN where the rule does not apply) and
            ``replaced_by``, the id of the changed episode that took the place of this one, or None.
        """
        judged = [look.judgement for look in self.looks]
        named = np.append(ids, np.array([None], dtype=object))
        before = np.concatenate([versions for versions, _ in self._judged])
        after = np.concatenate([np.full(len(v), -1) if new is None else new for v, new in self._judged])
        return {
            "id": ids[before],
            "rule": np.repeat(np.array([j.rule for j in judged], dtype=object), [len(j.index) for j in judged]),
            "kept": np.concatenate([j.kept for j in judged]),
            "value": np.concatenate([j.value for j in judged]),
            "threshold": np.concatenate([j.threshold for j in judged]),
            "replaced_by": named[after],
        }


class State:
    """What is left between two rules, and everything that was decided so far.

    Attributes:
        data: The arrays that hold the episodes left, and perhaps others.
        at: (m,) positions in ``data`` of the episodes left, in the order of the output.
        returns: (m,) their returns.
        costs: (m,) their costs.
        planted: (m,) which of them are falsified.
    """

    def __init__(self, data: Dataset, task: Task) -> None:
        self.task = task
        self.data = data
        self.at = np.arange(len(data))
        self.returns, self.costs = data.episode_returns, data.cost_returns
        self.planted = np.zeros(len(data), dtype=bool)
        self._sources = np.arange(len(data))
        self._version = np.arange(len(data))
        self._versions = [(data, self.at)]
        self._made = len(data)
        self._looks: list[Look] = []
        self._judged: list[tuple[Versions, Versions | None]] = []

    def judge(self, judgement: Judgement, order: Positions | None = None) -> None:
        """Records a judgement and drops what it did not keep.

        Args:
            judgement: Its index counts in the episodes left.
            order: What is left after it, where that is in an order of its own.

        Raises:
            BadInput: If nothing is left.
        """
        self._record(judgement, None)
        if order is None:
            stays = np.ones(len(self.at), dtype=bool)
            stays[judgement.fallen()] = False
            if stays.all():
                return
            order = np.flatnonzero(stays)
        if not len(order):
            raise BadInput(
                f"filter {judgement.rule}: none of its {len(self.at)} episodes is left "
                f"(of {len(self._versions[0][1])} at the start); loosen its settings in rl.filter.steps"
            )
        for name in ("at", "returns", "costs", "planted", "_sources", "_version"):
            setattr(self, name, getattr(self, name)[order])

    def change(self, judgement: Judgement, data: Dataset, at: Positions) -> None:
        """Records a judgement and puts changed episodes in the place of those that it did not keep.

        Args:
            judgement: Its index counts in the episodes left.
            data: Arrays that hold every episode left, the changed ones as they are now.
            at: (m,) where in ``data`` the episodes left are.
        """
        fallen = judgement.fallen()
        made = np.full(len(judgement.index), -1)
        made[~judgement.kept] = np.arange(self._made, self._made + len(fallen))
        self._record(judgement, made)
        self._made += len(fallen)
        self._versions.append((data, at[fallen]))
        self._version = self._version.copy()
        self._version[fallen] = made[~judgement.kept]
        self.data, self.at = data, at

    def _record(self, judgement: Judgement, made: Versions | None) -> None:
        self._judged.append((self._version[judgement.index], made))
        self._looks.append(Look(judgement, self.returns, self.costs, self._sources, made is not None))

    def outcome(self) -> Filtered:
        """What is left and why."""
        if not self._looks:
            # No rule ran: say so for every episode, since lineage asks for a row each.
            nothing = np.full(len(self.at), np.nan)
            self.judge(Judgement("none", self.at, np.ones(len(self.at), dtype=bool), nothing, nothing))
        return Filtered(
            self._sources, self._looks, self.returns, self.costs, self.at, self.data, self._version, self._judged,
            self._versions,
        )  # fmt: skip


def falsify(state: State, drawn: Judgement, claims: Sequence[tuple[int, Positions]]) -> None:
    """Replaces the episodes that were drawn by ones that claim half again their rewards and other costs.

    Args:
        state: What is left.
        drawn: Its fallen are falsified.
        claims: For each of those, its position and the steps at which it claims a cost of 1; elsewhere 0.
    """
    data = state.data
    fresh = {key: getattr(data, key).copy() for key in data.keys if key in ("rewards", "costs", "sub_costs")}
    returns, costs, planted = state.returns.copy(), state.costs.copy(), state.planted.copy()
    for position, steps in claims:
        rows = slice(int(data.starts[state.at[position]]), int(data.ends[state.at[position]]))
        fresh["rewards"][rows] *= np.float32(1.5)
        fresh["costs"][rows] = 0.0
        fresh["costs"][rows][steps] = 1.0
        if "sub_costs" in fresh:  # the lie is about the first constraint
            fresh["sub_costs"][rows] = 0.0
            fresh["sub_costs"][rows][steps, 0] = 1.0
        returns[position] = fresh["rewards"][rows].sum(dtype=np.float64)
        costs[position], planted[position] = len(steps), True
    state.change(drawn, replace(data, **fresh), state.at)
    state.returns, state.costs, state.planted = returns, costs, planted


def noisy(state: State, data: Dataset, deviation: float) -> None:
    """Replaces all episodes by those of ``data``, whose observations carry noise of this deviation."""
    size = np.full(len(state.at), deviation)
    everything = np.arange(len(state.at))
    state.change(Judgement("noise", everything, np.zeros(len(size), dtype=bool), size, size), data, everything)
