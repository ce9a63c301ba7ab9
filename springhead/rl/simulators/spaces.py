"""Observation and action spaces of a task."""

from __future__ import annotations

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.rl.tasks import Task

Floats = npt.NDArray[np.float32]


def spaces(task: Task, bound: float = np.inf) -> tuple[gymnasium.Space[Floats], gymnasium.Space[Floats]]:
    """Returns the spaces of a task's observations, within ± ``bound``, and of its actions, within ± 1, both float32."""
    high, limit = np.full(task.observation_dim, bound, np.float32), np.ones(task.action_dim, np.float32)
    return (
        gymnasium.spaces.Box(-high, high, dtype=np.float32),
        gymnasium.spaces.Box(-limit, limit, dtype=np.float32),
    )
