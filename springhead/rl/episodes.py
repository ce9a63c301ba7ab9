"""Episodes, and data sets of episodes laid end to end, as the arrays of DSRL's schema (Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.lineage.digests import arrays_digest

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

WIDE_KEYS = ("observations", "next_observations", "actions")
FLOAT_KEYS = (*WIDE_KEYS, "rewards", "costs")
FLAG_KEYS = ("terminals", "timeouts")
EPISODE_KEYS = FLOAT_KEYS + FLAG_KEYS
"""The seven arrays of DSRL's schema."""
SUB_COSTS = "sub_costs"
"""The optional eighth array: the separate constraint signals behind ``costs``."""


@dataclass(frozen=True)
class Episode:
    """One whole episode of T steps.

    Attributes:
        observations: float32 (T, observation_dim), raw.
        next_observations: float32 (T, observation_dim), the true successors.
        actions: float32 (T, action_dim), as executed, in [-1, 1].
        rewards: float32 (T,), unscaled.
        costs: float32 (T,), at least 0.
        terminals: bool (T,), True at the last step where the environment ended the episode.
        timeouts: bool (T,), True at the last step where the horizon ended it.
        sub_costs: float32 (T, K), the separate constraint signals behind ``costs``, where the task has several.
    """

    observations: Floats
    next_observations: Floats
    actions: Floats
    rewards: Floats
    costs: Floats
    terminals: Flags
    timeouts: Flags
    sub_costs: Floats | None = None

    @property
    def length(self) -> int:
        """Number of steps."""
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards, added in float64."""
        return float(self.rewards.sum(dtype=np.float64))

    @property
    def cost_return(self) -> float:
        """Undiscounted sum of the costs, added in float64."""
        return float(self.costs.sum(dtype=np.float64))

    @property
    def sub_cost_returns(self) -> list[float]:
        """Undiscounted sum of each constraint signal, added in float64; empty where there are none."""
        if self.sub_costs is None:
            return []
        return [float(value) for value in self.sub_costs.sum(axis=0, dtype=np.float64)]

    @property
    def keys(self) -> tuple[str, ...]:
        """The arrays it has: the seven of the schema, and the sub-costs where there are any."""
        return EPISODE_KEYS if self.sub_costs is None else (*EPISODE_KEYS, SUB_COSTS)

    @cached_property
    def id(self) -> str:
        """SHA-256 over the seven arrays, and the sub-costs where there are any: its identity in every row table."""
        return arrays_digest({key: getattr(self, key) for key in self.keys})


@dataclass(frozen=True)
class Dataset:
    """Episodes laid end to end, N steps in all.

    Attributes:
        observations: float32 (N, observation_dim).
        next_observations: float32 (N, observation_dim).
        actions: float32 (N, action_dim).
        rewards: float32 (N,).
        costs: float32 (N,).
        terminals: bool (N,).
        timeouts: bool (N,).
        starts: int64 (episodes,), index of each episode's first step.
        ends: int64 (episodes,), index after each episode's last step.
        sub_costs: float32 (N, K), or None where the task has one cost only.
    """

    observations: Floats
    next_observations: Floats
    actions: Floats
    rewards: Floats
    costs: Floats
    terminals: Flags
    timeouts: Flags
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    sub_costs: Floats | None = None

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Dataset:
        """Lays episodes end to end.

        Raises:
            BadInput: If there are no episodes, or only some of them have sub-costs.
        """
        keys = common_keys(episodes)
        arrays: dict[str, Any] = {key: np.concatenate([getattr(e, key) for e in episodes]) for key in keys}
        ends = np.cumsum([episode.length for episode in episodes], dtype=np.int64)
        return cls(**arrays, starts=np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends=ends)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.starts)

    @property
    def num_steps(self) -> int:
        """Number of steps of all episodes."""
        return len(self.rewards)

    @property
    def keys(self) -> tuple[str, ...]:
        """The arrays it has: the seven of the schema, and the sub-costs where there are any."""
        return EPISODE_KEYS if self.sub_costs is None else (*EPISODE_KEYS, SUB_COSTS)

    def episode(self, index: int) -> Episode:
        """The episode at a position; its arrays are views into the data set."""
        rows = slice(int(self.starts[index]), int(self.ends[index]))
        return Episode(**{key: getattr(self, key)[rows] for key in self.keys})

    def episodes(self) -> list[Episode]:
        """All episodes, in order."""
        return [self.episode(index) for index in range(len(self))]

    @cached_property
    def episode_returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted return of every episode, (episodes,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    @cached_property
    def cost_returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted cost return of every episode, (episodes,)."""
        return np.add.reduceat(self.costs.astype(np.float64), self.starts)


def common_keys(episodes: Sequence[Episode]) -> tuple[str, ...]:
    """The arrays that all of the episodes have.

    Raises:
        BadInput: If there are no episodes, or only some of them have sub-costs.
    """
    if not episodes:
        raise BadInput("a data set needs at least one episode, got none")
    kinds = {episode.keys for episode in episodes}
    if len(kinds) > 1:
        number = sum(episode.sub_costs is None for episode in episodes)
        raise BadInput(
            f"{number} of {len(episodes)} episodes have no sub_costs and the others do; a data set has them for all "
            "episodes or for none, so leave them out of all"
        )
    return kinds.pop()
