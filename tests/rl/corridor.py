"""A small environment for the tests of custom tasks: a point slides along a corridor and pays near its walls.

Its faults can be chosen, so that each is seen by the check that is there for it.
"""

import gymnasium
import numpy as np


class Corridor(gymnasium.Env):
    """Observes place and speed (4,), takes a push (2,) of at most 2, pays ``cost_wall`` and ``cost_fast``."""

    leftover = 0.0  # what the faulty kind takes from one episode into the next

    def __init__(self, fault="", render_mode=None):
        self.fault = fault
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float64)
        self.action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), dtype=np.float64)
        if fault == "discrete":
            self.action_space = gymnasium.spaces.Discrete(3)
        if fault == "unbounded":
            self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.uniform(-0.1, 0.1, 2), np.zeros(2)])
        if self.fault == "deaf":
            self.state[:] = 0.0
        if self.fault == "leaky":
            self.state[0] += Corridor.leftover
        if self.fault == "entropy":
            self.state[0] += np.random.default_rng().uniform()
        return self.state, {}

    def step(self, action):
        assert action.dtype == np.float64
        assert np.abs(action).max() <= 2.0
        before = self.state[0]
        self.state = self.state + 0.05 * np.concatenate([self.state[2:], action])
        Corridor.leftover = float(self.state[0])
        wall, fast = float(abs(self.state[1]) > 0.3), float(np.linalg.norm(self.state[2:]) > 1.0)
        info = {"price": max(wall, fast), "cost_wall": wall, "cost_fast": fast}
        if self.fault == "costless":
            del info["price"]
        if self.fault == "refund":
            info["price"] = -1.0
        if self.fault == "dear":
            info["price"] = info["cost_wall"] = 3.0
        if self.fault == "odd":
            info["price"] = 1.0 - info["price"]
        return self.state, float(self.state[0] - before), self.fault == "ends", self.fault == "impatient", info

    def render(self):
        picture = np.full((40, 60, 3), 255, dtype=np.uint8)
        x, y = int(30 + 10 * self.state[0]), int(20 + 20 * self.state[1])
        picture[np.clip(y, 0, 38) : np.clip(y, 0, 38) + 2, np.clip(x, 0, 58) : np.clip(x, 0, 58) + 2] = 0
        return picture


# Registered with a limit of its own, which a task's horizon replaces.
gymnasium.register(id="Corridor-v3", entry_point=Corridor, max_episode_steps=7)
