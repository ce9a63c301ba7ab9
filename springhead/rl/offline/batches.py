"""Episodes as flat tensors that stay on the device, checked once before training, and batches drawn from them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.offline.contract import Generators
from springhead.rl.tasks import Task


@dataclass(frozen=True)
class Flat:
    """All N transitions of a data set, one after the other.

    Attributes:
        observations: float32 (N, observation_dim).
        next_observations: float32 (N, observation_dim).
        actions: float32 (N, action_dim).
        rewards: float32 (N,).
        costs: float32 (N,).
        terminals: float32 (N,), 1 where the environment ended the episode.
        timeouts: float32 (N,), 1 where the horizon did.
        starts: int64 (episodes,), position of each episode's first transition.
        lengths: int64 (episodes,).
        returns: float64 (episodes,), undiscounted sums of rewards.
        cost_returns: float64 (episodes,), undiscounted sums of costs.
    """

    observations: torch.Tensor
    next_observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    costs: torch.Tensor
    terminals: torch.Tensor
    timeouts: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    returns: npt.NDArray[np.float64]
    cost_returns: npt.NDArray[np.float64]

    def transitions(self, episodes: npt.NDArray[np.intp]) -> torch.Tensor:
        """Returns the positions of all transitions of the given episodes, int64."""
        spans = [torch.arange(int(self.starts[i]), int(self.starts[i] + self.lengths[i])) for i in episodes.tolist()]
        return torch.cat(spans)


class Batch(NamedTuple):
    """One batch of transitions for each of M members; ``initial`` is 1 at an episode's first step."""

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    costs: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    timeouts: torch.Tensor
    initial: torch.Tensor


class Sampler:
    """Draws transitions uniformly from data that stay on the device: one gather per batch.

    Args:
        data: The data set.
        generators: The members' random numbers, on the device that shall hold the data.
        batch_size: Transitions per member.
        pools: For each member the positions it may draw, None for all.
        reward_scale: Rewards are multiplied by this.
        moments: Subtracted from observations, and then divided by; None leaves them raw.
        starts: Positions that :meth:`draw_initial` draws; None for the first of every episode.
    """

    def __init__(
        self,
        data: Flat,
        generators: Generators,
        batch_size: int,
        pools: Sequence[torch.Tensor] | None = None,
        reward_scale: float = 1.0,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
        starts: torch.Tensor | None = None,
    ) -> None:
        shift, scale = moments or (torch.zeros(1), torch.ones(1))
        initial = torch.zeros(len(data.rewards))
        initial[data.starts] = 1.0
        columns = (
            (data.observations - shift) / scale,
            data.actions,
            (data.rewards * reward_scale)[:, None],
            data.costs[:, None],
            (data.next_observations - shift) / scale,
            data.terminals[:, None],
            data.timeouts[:, None],
            initial[:, None],
        )
        self.generators, self.batch_size = generators, batch_size
        self._widths = [column.shape[1] for column in columns]
        self._table = torch.cat(columns, dim=1).to(generators.device)
        self._starts = (data.starts if starts is None else starts).to(generators.device)
        self._pools = None
        self._highs = [len(data.rewards)] * len(generators)
        if pools is not None:
            self._highs = [len(pool) for pool in pools]
            self._pools = torch.zeros(len(pools), max(self._highs), dtype=torch.int64)
            for row, pool in zip(self._pools, pools, strict=True):
                row[: len(pool)] = pool
            self._pools = self._pools.to(generators.device)

    def draw(self) -> Batch:
        """Draws one batch for each member, with replacement: tensors (members, batch, width) and (members, batch)."""
        rows = self.generators.integers(self._highs, self.batch_size)
        if self._pools is not None:
            rows = self._pools.gather(1, rows)
        parts = self._table[rows].split(self._widths, dim=-1)
        observations, actions, rewards, costs, following, terminals, timeouts, initial = parts
        return Batch(
            observations,
            actions,
            rewards.squeeze(-1),
            costs.squeeze(-1),
            following,
            terminals.squeeze(-1),
            timeouts.squeeze(-1),
            initial.squeeze(-1),
        )

    def draw_initial(self) -> torch.Tensor:
        """Draws observations that episodes start from, (members, batch, observation_dim), with replacement."""
        highs = [len(self._starts)] * len(self.generators)
        return self._table[self._starts[self.generators.integers(highs, self.batch_size)]][..., : self._widths[0]]


def going_on(batch: Batch, timeouts: Literal["bootstrap", "terminal"]) -> torch.Tensor:
    """1 where a value follows a transition and 0 where the episode is over, (members, batch).

    Args:
        batch: Transitions.
        timeouts: Whether a state after the horizon has a value, or the horizon ends the episode.
    """
    over = batch.terminals if timeouts == "bootstrap" else (batch.terminals + batch.timeouts).clamp(max=1)
    return 1 - over


def flatten(episodes: Sequence[Episode], task: Task) -> Flat:
    """Puts episodes into flat tensors.

    Raises:
        BadInput: If there are none, one does not fit the task's shapes, or one holds a value that is
            not finite or a negative cost; the message names the episode.
    """
    if not episodes:
        raise BadInput(f"no episodes of {task.name} to train on; loosen the filters or collect more")
    for number, episode in enumerate(episodes):
        length = len(episode.observations)
        shapes = {
            **dict.fromkeys(("observations", "next_observations"), (length, task.observation_dim)),
            "actions": (length, task.action_dim),
            **dict.fromkeys(("rewards", "costs", "terminals", "timeouts"), (length,)),
        }
        for key, wanted in shapes.items():
            if (found := np.shape(getattr(episode, key))) != wanted:
                raise BadInput(
                    f"episode {number} of {task.name}: {key} have shape {found}, {wanted} was expected; "
                    "train on this task's own data"
                )
        if np.abs(episode.actions).max(initial=0) > 1 + 1e-4:
            raise BadInput(
                f"episode {number} ({episode.id[:12]}): an action of size {np.abs(episode.actions).max():g}; "
                "actions lie in [-1, 1], scale them when importing"
            )
        arrays = (episode.observations, episode.next_observations, episode.actions, episode.rewards, episode.costs)
        if not all(np.isfinite(array).all() for array in arrays) or (episode.costs < 0).any():
            raise BadInput(
                f"episode {number} ({episode.id[:12]}): holds a value that is not finite, or a negative cost; "
                "the validate stage quarantines such episodes, train on validated data"
            )
    lengths = np.array([episode.length for episode in episodes])

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(e, name) for e in episodes]).astype(np.float32))

    return Flat(
        observations=joined("observations"),
        next_observations=joined("next_observations"),
        actions=joined("actions"),
        rewards=joined("rewards"),
        costs=joined("costs"),
        terminals=joined("terminals"),
        timeouts=joined("timeouts"),
        starts=torch.from_numpy(np.cumsum(lengths) - lengths),
        lengths=torch.from_numpy(lengths),
        returns=np.array([episode.episode_return for episode in episodes]),
        cost_returns=np.array([episode.cost_return for episode in episodes]),
    )


def moments(data: Flat) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the observations, (observation_dim,) each; a constant component's deviation counts as 1."""
    rows = data.observations.double()
    deviation = rows.std(0, correction=0)
    return rows.mean(0).float(), torch.where(deviation < 1e-6, 1.0, deviation).float()


def check_constraint(algorithm: str, data: Flat, task: Task, limits: Sequence[float]) -> None:
    """Makes sure that a constraint on the cost can be learned from the data.

    Args:
        algorithm: For the message.
        data: The data set.
        task: Its task.
        limits: The episode cost limits to train for.

    Raises:
        BadInput: If there is one episode only, all costs are equal, or no episode keeps the lowest limit.
    """
    costs = data.cost_returns
    where = f"{algorithm} on {task.name}"
    if len(costs) == 1:
        raise BadInput(f"{where}: one episode only; a constraint is learned from several, collect more")
    if (costs == costs[0]).all():
        raise BadInput(
            f"{where}: each of {len(costs)} episodes costs {costs[0]:g}; a constraint is learned from costs that "
            "differ. Collect under several cost limits, or use a method without a constraint"
        )
    if (costs > min(limits)).all():
        raise BadInput(
            f"{where}: none of {len(costs)} episodes keeps the cost limit {min(limits):g} (the cheapest costs "
            f"{costs.min():g}); collect safer episodes, or set `limits` in rl.train to what the data can keep"
        )


def check_device(name: str) -> None:
    """Raises BadInput if a torch device cannot be used on this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"rl.train: device {name!r} cannot be used here ({reason}); set it to 'cpu'") from None


def write_history(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Writes a learning curve as CSV, one column per figure."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
