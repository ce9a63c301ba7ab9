"""MetaDrive: driving over three kinds of road in three densities of traffic.

The nine tasks of the benchmark were made with a fork of MetaDrive 0.2.5 that is no longer installable. This module
sets MetaDrive 0.4.3 up in the same way and computes the benchmark's cost, but the vehicle model and the traffic are
those of 0.4.3: returns and costs differ from the published data sets'. What is the same, what is inferred and what
differs is in ``docs/methods/tasks.md``.

MetaDrive holds one simulation per process, draws its traffic from entropy, and lets an episode leak into the next
one. So each episode has a process of its own, a fork of one that has MetaDrive loaded and its engine started and that
never steps (:func:`serve`). An episode thus begins from the same memory whatever ran before it, and as many as one
likes run side by side. A step crosses a pipe twice, which is less than a tenth of its time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from importlib import metadata
from multiprocessing.connection import Connection, Pipe
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput, SpringheadError
from springhead.rl.simulators.isolation import HEIGHT, WIDTH
from springhead.rl.simulators.spaces import spaces
from springhead.rl.tasks import task

Floats = npt.NDArray[np.float32]

_VERSION = "0.4.3"
_ROADS = {"easy": ("SCS", 0), "medium": ("XST", 100), "hard": ("TRO", 200)}
"""Blocks of the road (Straight, Curve, crossing X, T-junction, Ramp, rOundabout) and the map's seed."""
_TRAFFIC = {"sparse": 0.1, "mean": 0.15, "dense": 0.2}
_LIDAR = 240  # the last numbers of an observation: free distance in each direction, 1 for 50 metres
_SAFE_SPEED = 10.0  # km/h
_SAFE_DISTANCE = 0.1  # of the lidar's range
_PRICE = 1e-2  # of a km/h above the safe speed, and of a squared fraction of range below the safe distance


class MetaDriveEnv(gymnasium.Env[Floats, Floats]):
    """One of the nine driving tasks; every episode runs in a process of its own.

    Observations are float32 (261,), raw and un-normalised: the car's size (2) and state (9), the way (10), the lidar
    (240). Actions, steering and throttle, are clipped to [-1, 1]. ``info["sub_costs"]`` is float32 (3,): collision
    (1 where the car hits something or leaves the road), velocity (0.01 per km/h above 10) and proximity (0.01 times
    the square of what the nearest obstacle lacks of a tenth of the lidar's range); ``info["cost"]`` is their sum.
    ``terminated`` means that the car arrived, hit something or left the road.

    Args:
        task_name: A task of the catalogue.
        render_mode: ``rgb_array`` to draw pictures; nothing else differs.

    Raises:
        BadInput: If MetaDrive is not installed, or another version.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        self.task = task(task_name)
        self.render_mode = render_mode
        _check_version(task_name)
        self._episode: Connection | None = None
        self.observation_space, self.action_space = spaces(self.task, 1.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Decides the traffic; None continues this environment's own stream. The road is the task's.
            options: Not used; present for gymnasium.

        Returns:
            The first observation, float32 (261,), and an info dictionary with cost 0.
        """
        super().reset(seed=seed, options=options)
        self.close()
        self._episode = _simulator(self.task.name).begin(int(self.np_random.integers(2**31)))
        return np.frombuffer(self._receive(), dtype=np.float64).astype(np.float32), {"cost": 0.0}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Takes one step of 0.1 seconds.

        Args:
            action: (2,): steering and throttle; components outside [-1, 1] are clipped.

        Returns:
            Observation float32 (261,), reward, terminated, False, and info with ``cost`` and ``sub_costs``.

        Raises:
            SpringheadError: If the simulator died or failed.
        """
        clipped = np.clip(np.asarray(action, dtype=np.float32).reshape(self.task.action_dim), -1.0, 1.0)
        reply = np.frombuffer(self._ask(clipped.tobytes()), dtype=np.float64)
        sub_costs = reply[-3:]
        info = {"cost": float(sub_costs.sum()), "sub_costs": sub_costs.astype(np.float32)}
        return reply[:-5].astype(np.float32), float(reply[-5]), bool(reply[-4]), False, info

    def render(self) -> npt.NDArray[np.uint8]:
        """Returns a picture of the road around the car from above, uint8 (240, 320, 3)."""
        return np.frombuffer(self._ask(_PICTURE), dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)

    def close(self) -> None:
        """Ends the episode's process."""
        if self._episode is not None:
            self._episode.close()
            self._episode = None

    def _ask(self, message: bytes) -> bytes:
        if self._episode is None:
            raise BadInput(f"task {self.task.name}: no episode is under way; call reset first")
        with contextlib.suppress(OSError):  # a dead simulator is reported by the attempt to receive
            self._episode.send_bytes(message)
        return self._receive()

    def _receive(self) -> bytes:
        assert self._episode is not None
        try:
            message = self._episode.recv_bytes()
        except (EOFError, OSError):
            self.close()
            raise SpringheadError(f"task {self.task.name}: the simulator's process died; run it again") from None
        if message[:1] != _GOOD:
            self.close()
            raise SpringheadError(f"task {self.task.name}: the simulator failed: {message[1:].decode()}")
        return message[1:]


def _check_version(task_name: str) -> None:
    """Refuses another MetaDrive: no stage depends on its lock file, so the version is part of this file."""
    wanted = f"task {task_name} needs MetaDrive {_VERSION}, %s; run `make drive`, or pip install -e '.[drive]'"
    try:
        found = metadata.version("metadrive-simulator")
    except metadata.PackageNotFoundError:
        raise BadInput(wanted % "which is not installed") from None
    if found != _VERSION:
        raise BadInput(wanted % f"found {found}")


_GOOD, _BAD = b"+", b"-"  # how a reply begins
_PICTURE = b"picture"  # asks for one; every other message to an episode is an action


class _Simulator:
    """A process that has MetaDrive loaded and forks one process for each episode."""

    def __init__(self, task_name: str) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", __name__, task_name, str(theirs.fileno())]
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "SDL_VIDEODRIVER": "dummy",  # pictures are drawn without a screen
        }
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._control = ours
        answer = ours.recv(1 << 16)
        if answer[:1] != _GOOD:
            reason = answer[1:].decode() or f"it ended with code {self._process.wait()}"
            raise SpringheadError(f"task {task_name}: MetaDrive does not start: {reason}")

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def begin(self, seed: int) -> Connection:
        """Starts an episode; its first message is the first observation."""
        ours, theirs = Pipe()
        socket.send_fds(self._control, [seed.to_bytes(8, "little")], [theirs.fileno()])
        theirs.close()
        return ours

    def close(self) -> None:
        """Ends the process. Episodes under way are not affected."""
        self._control.close()
        self._process.wait()


_SIMULATORS: dict[str, _Simulator] = {}
"""The simulator of this process, by its task: a start takes some seconds. It ends when this process ends."""


def _simulator(task_name: str) -> _Simulator:
    if task_name not in _SIMULATORS or not _SIMULATORS[task_name].alive:
        _close_all()  # one at a time: each holds half a gigabyte
        _SIMULATORS[task_name] = _Simulator(task_name)
    return _SIMULATORS[task_name]


@atexit.register
def _close_all() -> None:
    while _SIMULATORS:
        _SIMULATORS.popitem()[1].close()


# -- in the simulator's process -------------------------------------------------------------------


def _build(task_name: str) -> Any:
    """Starts MetaDrive's engine on a task's road.

    The benchmark's wrapper also names a target speed and two acceleration factors for other drivers, which nothing
    in its fork reads for traffic; they are left out.
    """
    import logging

    from metadrive.engine.base_engine import BaseEngine
    from metadrive.envs.safe_metadrive_env import SafeMetaDriveEnv
    from metadrive.manager.traffic_manager import TrafficMode

    # Pictures and models for drawing would be downloaded here; physics needs none of them.
    BaseEngine.try_pull_asset = staticmethod(lambda: None)
    road = next(kind for kind in _ROADS if task_name.startswith(kind))
    blocks, map_seed = _ROADS[road]
    settings = {
        "start_seed": map_seed,
        "num_scenarios": 1,
        "map": 3,
        "map_config": {"type": "block_sequence", "config": blocks},
        "traffic_density": _TRAFFIC[task_name.removeprefix(road)],
        "traffic_mode": TrafficMode.Hybrid,
        "random_traffic": True,
        "accident_prob": 0.0,
        "crash_vehicle_penalty": 0.0,
        "horizon": task(task_name).horizon,
        "random_agent_model": True,  # adds the car's length and width to the observation: 261 numbers, not 259
        "log_level": logging.ERROR,
    }
    env = SafeMetaDriveEnv(settings)
    env.lazy_init()
    return env


def _run_episode(env: Any, seed: int, connection: Connection) -> None:
    """Runs one episode: sends the first observation, then the outcome of each action, or a picture."""
    from metadrive.manager.base_manager import BaseManager

    np.random.seed(seed)
    random.seed(seed)
    # The traffic manager refuses to be seeded where traffic is random; its base class does not.
    BaseManager.seed(env.engine.managers["traffic_manager"], seed)
    observation, _ = env.reset()
    connection.send_bytes(_GOOD + observation.astype(np.float64).tobytes())
    while True:
        message = connection.recv_bytes()
        if message == _PICTURE:
            picture = env.render(mode="topdown", window=False, screen_size=(WIDTH, HEIGHT), scaling=4)
            connection.send_bytes(_GOOD + np.ascontiguousarray(picture, dtype=np.uint8).tobytes())
            continue
        action = np.frombuffer(message, dtype=np.float32)
        observation, reward, _, _, info = env.step(action)
        over = info["arrive_dest"] or info["crash"] or info["out_of_road"]
        velocity = _PRICE * max(0.0, env.agent.speed_km_h - _SAFE_SPEED)
        proximity = _PRICE * max(0.0, _SAFE_DISTANCE - float(observation[-_LIDAR:].min())) ** 2
        signals = [reward, over, info["cost"], velocity, proximity]
        connection.send_bytes(_GOOD + np.concatenate([observation, signals]).astype(np.float64).tobytes())


def serve(task_name: str, descriptor: int) -> None:
    """Is the simulator's process: forks one process for each episode that is asked for, until its parent is gone.

    Args:
        task_name: A task of the catalogue.
        descriptor: A socket. Each message on it is an episode's seed and the pipe that the episode speaks on.
    """
    control = socket.socket(fileno=descriptor)
    try:
        env = _build(task_name)
    except BaseException as error:
        control.sendall(_BAD + f"{type(error).__name__}: {error}".encode())
        raise
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for an episode's process
    control.sendall(_GOOD)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 8, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _serve_episode(env, int.from_bytes(message, "little"), Connection(descriptors[0]))
        os.close(descriptors[0])


def _serve_episode(env: Any, seed: int, connection: Connection) -> None:
    """Runs an episode and ends this process, without what an interpreter does at its end: it is a fork."""
    try:
        _run_episode(env, seed, connection)
    except (EOFError, OSError):
        os._exit(0)  # the episode is over for the parent, or the parent is gone
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send_bytes(_BAD + traceback.format_exc().encode())
        os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
