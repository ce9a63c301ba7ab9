"""The replay buffer of the off-policy algorithms: n-step transitions of whole episodes, sampled uniformly.

An episode is turned into n-step transitions once, when it is added. With m = min(n, steps left in the episode), the
transition of step t holds the discounted sums of the next m rewards and costs, the observation m steps later, and
the weight of that observation's value in the target:

    y_t = sum_{k<m} gamma^k x_{t+k} + w_t Q(s_{t+m}, .),   w_t = gamma^m, or 0 where step t + m - 1 was terminal

Hence a return never reaches into the next episode, a truncated episode bootstraps from its last successor, and only
a terminated one has no future. From then on rows are independent of each other; the oldest are overwritten first,
one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.networks import Moments

Floats = npt.NDArray[np.float32]
_BLOCK = 32  # minibatches gathered at once: a gather has a fixed price that is larger than a minibatch's own


@dataclass(frozen=True)
class Transitions:
    """A minibatch of n transitions; float32 tensors, observations normalised.

    Attributes:
        observations: (n, observation_dim).
        actions: As executed, (n, action_dim).
        signals: n-step sums of rewards and costs, (2, n).
        bootstrap: Weight of the successor's value, (n,); 0 where nothing follows.
        next_observations: (n, observation_dim).
    """

    observations: torch.Tensor
    actions: torch.Tensor
    signals: torch.Tensor
    bootstrap: torch.Tensor
    next_observations: torch.Tensor


def n_step(episode: Episode, steps: int, discount: float) -> tuple[Floats, Floats, npt.NDArray[np.intp]]:
    """The n-step sums of an episode.

    Args:
        episode: T steps.
        steps: n, at least 1.
        discount: gamma.

    Returns:
        Discounted sums of rewards and costs (T, 2), the weights of the successors' values (T,), and for each step
        the last step that its sum covers (T,).
    """
    length = episode.length
    signals = np.stack([episode.rewards, episode.costs], axis=1).astype(np.float64)
    sums = np.zeros((length, 2))
    for k in range(min(steps, length)):
        sums[: length - k] += discount**k * signals[k:]
    last = np.minimum(np.arange(length) + steps, length) - 1
    weights = discount ** (last - np.arange(length) + 1.0) * ~episode.terminals[last]
    return sums.astype(np.float32), weights.astype(np.float32), last


class Replay:
    """A ring of at most ``capacity`` transitions in one preallocated array.

    Args:
        capacity: Rows.
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        steps: n of the n-step sums.
        discount: Of the n-step sums.

    Attributes:
        rows: float32 (capacity, row length): observation, action, reward sum, cost sum, weight, next observation.
        size: Rows in use, the first of the array.
        position: Where the next row goes.
    """

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, steps: int, discount: float) -> None:
        if capacity < 1:
            raise BadInput(f"buffer_size is {capacity}; use at least 1")
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.steps, self.discount = steps, discount
        # Zeros are handed out by the system page by page, so a buffer takes memory only as it fills.
        self.rows = np.zeros((capacity, 2 * observation_dim + action_dim + 3), dtype=np.float32)
        self.size = 0
        self.position = 0

    def add(self, episode: Episode) -> None:
        """Adds the transitions of a whole episode, over the oldest ones if there is no room."""
        sums, weights, last = n_step(episode, self.steps, self.discount)
        new = np.concatenate(
            [episode.observations, episode.actions, sums, weights[:, None], episode.next_observations[last]], axis=1
        )
        capacity = len(self.rows)
        new = new[-capacity:]
        at = (self.position + np.arange(len(new))) % capacity
        self.rows[at] = new
        self.position = int((self.position + len(new)) % capacity)
        self.size = min(self.size + len(new), capacity)

    def sample(
        self, batches: int, size: int, moments: Moments, generator: np.random.Generator
    ) -> Iterator[Transitions]:
        """Yields minibatches drawn uniformly, with replacement.

        Args:
            batches: How many.
            size: Transitions in each.
            moments: Normalise the observations; must not change meanwhile.
            generator: Draws the rows.

        Raises:
            BadInput: If the buffer is empty.
        """
        if self.size == 0:
            raise BadInput("the replay buffer is empty; add episodes before sampling")
        dim, end = self.observation_dim, self.observation_dim + self.action_dim
        shift, scale = np.zeros(self.rows.shape[1], np.float32), np.ones(self.rows.shape[1], np.float32)
        for columns in (slice(0, dim), slice(end + 3, None)):
            shift[columns], scale[columns] = moments.mean, moments.std
        for start in range(0, batches, _BLOCK):
            number = min(_BLOCK, batches - start)
            drawn = self.rows[generator.integers(self.size, size=number * size)]
            drawn -= shift
            drawn /= scale
            for batch in torch.from_numpy(drawn).split(size):
                yield Transitions(
                    observations=batch[:, :dim],
                    actions=batch[:, dim:end],
                    signals=batch[:, end : end + 2].T,
                    bootstrap=batch[:, end + 2],
                    next_observations=batch[:, end + 3 :],
                )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The rows in use, as a copy, and where the ring stands."""
        return {"rows": torch.from_numpy(self.rows[: self.size].copy())}, {"position": self.position}

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, int]) -> None:
        """Puts back what :meth:`state` returned."""
        self.size, self.position = len(tensors["rows"]), facts["position"]
        self.rows[: self.size] = tensors["rows"].numpy()
