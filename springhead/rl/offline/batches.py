"""Episodes as flat tensors, checked once before training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.tasks import Task


@dataclass(frozen=True)
class Flat:
    """All transitions of a data set, one after the other.

    Attributes:
        observations: float32 (N, observation_dim).
        actions: float32 (N, action_dim).
        rewards: float32 (N,).
        costs: float32 (N,).
        starts: int64 (episodes,), position of each episode's first transition.
        lengths: int64 (episodes,).
        returns: float64 (episodes,), undiscounted sums of rewards.
        cost_returns: float64 (episodes,), undiscounted sums of costs.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    costs: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    returns: npt.NDArray[np.float64]
    cost_returns: npt.NDArray[np.float64]

    def transitions(self, episodes: npt.NDArray[np.intp]) -> torch.Tensor:
        """Returns the positions of all transitions of the given episodes, int64."""
        spans = [torch.arange(int(self.starts[i]), int(self.starts[i] + self.lengths[i])) for i in episodes.tolist()]
        return torch.cat(spans)


@dataclass(frozen=True)
class Trained:
    """What training returns: a model folder's content and the learning curve."""

    config: dict[str, Any]
    files: Mapping[str, Mapping[str, torch.Tensor]]
    history: list[dict[str, float]]


def flatten(episodes: Sequence[Episode], task: Task) -> Flat:
    """Puts episodes into flat tensors.

    Raises:
        BadInput: If there are none, one does not fit the task's shapes, or one holds a value that is
            not finite or a negative cost; the message names the episode.
    """
    if not episodes:
        raise BadInput(f"no episodes of {task.name} to train on; loosen the filters or collect more")
    for number, episode in enumerate(episodes):
        wanted = (task.observation_dim, task.action_dim)
        found = (episode.observations.shape[-1], episode.actions.shape[-1])
        if found != wanted:
            raise BadInput(
                f"episode {number} ({episode.id[:12]}): observation and action lengths {found}, "
                f"task {task.name} has {wanted}; train on this task's own data"
            )
        arrays = (episode.observations, episode.actions, episode.rewards, episode.costs)
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
        actions=joined("actions"),
        rewards=joined("rewards"),
        costs=joined("costs"),
        starts=torch.from_numpy(np.cumsum(lengths) - lengths),
        lengths=torch.from_numpy(lengths),
        returns=np.array([episode.episode_return for episode in episodes]),
        cost_returns=np.array([episode.cost_return for episode in episodes]),
    )


def check_device(name: str) -> None:
    """Raises BadInput if a torch device cannot be used on this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"rl.train.cdt.device: {name!r} cannot be used here ({reason}); set it to 'cpu'") from None


def write_history(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Writes a learning curve as CSV, one column per figure."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
