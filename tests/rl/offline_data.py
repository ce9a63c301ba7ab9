"""Synthetic episodes for the offline tests: small, seeded, of a task's shapes."""

from collections.abc import Sequence

import numpy as np

from springhead.rl.dataset import Episode
from springhead.rl.tasks import task

BALL = task("BallCircle")


def episode(returns: float, cost: int, length: int = 20, seed: int = 0) -> Episode:
    """An episode of BallCircle's shapes with the given sums; its actions follow its states."""
    rng = np.random.default_rng([seed, int(cost), int(abs(returns) * 1000)])
    states = rng.normal(size=(length + 1, BALL.observation_dim)).astype(np.float32)
    costs = np.zeros(length, dtype=np.float32)
    costs[rng.choice(length, size=cost, replace=False)] = 1.0
    end = np.zeros(length, dtype=bool)
    end[-1] = True
    return Episode(
        observations=states[:-1],
        next_observations=states[1:],
        actions=np.tanh(states[:-1, :2]).astype(np.float32),
        rewards=np.full(length, returns / length, dtype=np.float32),
        costs=costs,
        terminals=np.zeros(length, dtype=bool),
        timeouts=end,
    )


def dataset(plane: Sequence[tuple[float, int]], length: int = 20) -> list[Episode]:
    """One episode for each (return, cost)."""
    return [episode(value, cost, length, number) for number, (value, cost) in enumerate(plane)]


def spread(number: int, length: int = 20) -> list[Episode]:
    """Episodes with costs from 0 to the length, and returns that grow with them."""
    costs = np.linspace(0, length, number).astype(int)
    return dataset([(10.0 + 2.0 * int(cost) + 0.1 * i, int(cost)) for i, cost in enumerate(costs)], length)
