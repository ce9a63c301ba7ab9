"""Policies that worker processes import: of their own module, so that they cost a worker no test framework."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from springhead.rl import envs


class Wander:
    """Random actions that go on from one reset to the next: whoever shares it between groups shows it."""

    def __init__(self, seed: int, action_dim: int = 2) -> None:
        self.action_dim = action_dim
        self.generator = np.random.default_rng(seed)

    def reset(self, num_envs, cost_limit):
        self.drift = self.generator.uniform(-0.2, 0.2, (num_envs, self.action_dim))

    def act(self, observations):
        noise = self.generator.uniform(-1.0, 1.0, (len(observations), self.action_dim))
        return (noise + self.drift + 0.1 * np.tanh(observations[:, :1])).astype(np.float32)

    def observe(self, rewards, costs):
        self.drift = self.drift * 0.99 + 0.01 * rewards[:, None]


class Dies(Wander):
    """Ends its own process at a step, as often as it is told."""

    def __init__(self, seed: int, marks: Path, times: int, how: str) -> None:
        super().__init__(seed)
        self.marks, self.times, self.how, self.step = marks, times, how, 0

    def act(self, observations):
        self.step += 1
        if self.step == 20 and len(list(self.marks.iterdir())) < self.times:
            (self.marks / str(os.getpid())).touch()
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(observations)


class Breaks(Wander):
    """Gives the robot of one episode an impossible velocity, so that the simulator itself returns nonsense."""

    def __init__(self, row: int, at: int) -> None:
        super().__init__(0)
        self.row, self.at, self.step = row, at, 0

    def act(self, observations):
        if self.step == self.at:
            agent = envs._POOL["BallCircle"][self.row].unwrapped._simulator.agent
            agent.bc.resetBaseVelocity(agent.body_id, [float("nan")] * 3, [0.0] * 3)
        self.step += 1
        return super().act(observations)


class Diverged(Wander):
    """Acts by a number that is not one."""

    def act(self, observations):
        actions = super().act(observations)
        actions[1] = np.inf
        actions[1, 1] = np.nan
        return actions


class Raises(Wander):
    def act(self, observations):
        raise ZeroDivisionError("a defect of this policy")


class Slow(Wander):
    """Takes minutes for an episode, and says where it runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self.folder = folder

    def act(self, observations):
        (self.folder / str(os.getpid())).touch()
        time.sleep(5.0)
        return super().act(observations)


class Loaded(Wander):
    """Acts by whether its process has imported what it does not need."""

    def act(self, observations):
        burden = [name for name in ("torch", "pytest", "mlflow", "pandas") if name in sys.modules]
        return np.full((len(observations), 2), 0.1 * len(burden), dtype=np.float32)


class Reads(Wander):
    """Reads a file that its stage did not declare."""

    def __init__(self, path: Path) -> None:
        super().__init__(0)
        self.path = path

    def act(self, observations):
        self.path.read_text()
        return super().act(observations)


class Sleeps(Wander):
    """Sleeps before some of its steps, each time so long."""

    def __init__(self, seed: int, steps: range, seconds: float) -> None:
        super().__init__(seed)
        self.steps, self.seconds, self.step = steps, seconds, 0

    def act(self, observations):
        if self.step in self.steps:
            time.sleep(self.seconds)
        self.step += 1
        return super().act(observations)
