"""Locomotion with a sparse reward: 1 for every step after the episode's return has passed a threshold.

Source: Cen et al. 2024, "Learning from Sparse Offline Datasets via Conservative Density Estimation" (ICLR), its sparse
MuJoCo tasks: the threshold is the 75th percentile of the returns of the data, and an episode succeeds where its return
passes it, hence where its sparse return is above 0. The robot, its observations and its ends are those of another task
of the catalogue, which ``env_id`` names; costs are left out. The reward depends on what the episode has collected so
far, which the observation does not show; so it is in the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.rl.episodes import Episode
from springhead.rl.simulators.safety_gymnasium import SafetyGymnasiumEnv
from springhead.rl.tasks import task

Floats = npt.NDArray[np.float32]


def sparse(episode: Episode, threshold: float) -> Episode:
    """The episode as the sparse task would have paid it: without costs.

    Args:
        episode: An episode of the dense task.
        threshold: The return to pass.
    """
    passed = np.cumsum(episode.rewards, dtype=np.float64) > threshold
    return replace(
        episode, rewards=passed.astype(np.float32), costs=np.zeros(episode.length, dtype=np.float32), sub_costs=None
    )


class SparseEnv(gymnasium.Env[Floats, Floats]):
    """A locomotion task with a sparse reward and no cost.

    Args:
        task_name: A sparse task of the catalogue; its options have ``threshold``.
        render_mode: ``rgb_array`` to draw pictures; nothing else differs.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        self.task = task(task_name)
        self.render_mode = render_mode
        self._dense = SafetyGymnasiumEnv(self.task.env_id, render_mode)
        self._threshold = float(self.task.options["threshold"])
        self._return = 0.0
        self.observation_space = self._dense.observation_space
        self.action_space = self._dense.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts an episode, the one that the dense task starts from the same seed."""
        self._return = 0.0
        return self._dense.reset(seed=seed, options=options)

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Args:
            action: (action_dim,); components outside [-1, 1] are clipped.

        Returns:
            Observation float32 (observation_dim,), reward 0 or 1, terminated, False, and info with ``cost`` 0.

        Raises:
            BadInput: If the simulation diverged.
        """
        observation, reward, terminated, truncated, _ = self._dense.step(action)
        self._return += float(np.float32(reward))  # as data sets hold it, so that both pass the threshold together
        return observation, float(self._return > self._threshold), terminated, truncated, {"cost": 0.0}

    def render(self) -> npt.NDArray[np.uint8]:
        """Returns a picture of the present state, uint8 (240, 320, 3), as the dense task draws it."""
        return self._dense.render()

    def close(self) -> None:
        """Releases the simulation."""
        self._dense.close()
