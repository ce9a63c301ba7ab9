"""The simulators behind the tasks: numbers unchanged, costs as published, nothing left patched, pictures."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest

from springhead.errors import BadInput, SpringheadError
from springhead.rl import envs
from springhead.rl.simulators import bullet, mujoco_camera
from springhead.rl.simulators import metadrive as driving
from springhead.rl.simulators import safety_gymnasium as safety
from springhead.rl.tasks import task

pytestmark = pytest.mark.unit

V1_THRESHOLDS = {  # of Safety-Gymnasium's velocity tasks, version 1
    "AntVelocity": 2.6222,
    "HalfCheetahVelocity": 3.2096,
    "HopperVelocity": 0.7402,
    "SwimmerVelocity": 0.2282,
    "Walker2dVelocity": 2.3415,
}


def episode(env, seed, actions):
    """The raw signals of one episode under fixed actions."""
    trace = [env.reset(seed=seed)[0]]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        trace += [observation, [reward, info["cost"]]]
        if terminated or truncated:
            break
    return np.concatenate(trace)


def held(seed, steps, dim, each=25):
    """Actions that keep a direction for a while, so that the robot gets somewhere."""
    generator = np.random.default_rng(seed)
    aims = generator.uniform(-1, 1, (steps // each + 1, dim)).repeat(each, axis=0)[:steps]
    return (aims + generator.normal(0, 0.1, aims.shape)).clip(-1, 1).astype(np.float32)


class Held:
    """A policy of such actions."""

    def __init__(self, dim):
        self.dim = dim

    def reset(self, num_envs, cost_limit):
        self.actions, self.step = held(4, 1000, self.dim), 0

    def act(self, observations):
        self.step += 1
        return self.actions[self.step - 1][None].repeat(len(observations), axis=0)

    def observe(self, rewards, costs):
        assert rewards.dtype == costs.dtype == np.float32


# -- Bullet -------------------------------------------------------------------------------------


def test_bullet_is_not_changed(monkeypatch):
    """Reading the base state once per step must give the numbers that the package alone gives."""
    actions = held(1, 60, 2)
    ours = {name: episode(envs.make(name), 5, actions) for name in ("BallCircle", "CarRun")}

    class ReadEveryTime:
        def __init__(self, agent):
            pass

        def forget(self, until_step):
            pass

    monkeypatch.setattr(bullet, "_BaseState", ReadEveryTime)
    for name, trace in ours.items():
        np.testing.assert_array_equal(episode(envs.make(name), 5, actions), trace)


def test_the_run_tasks_tell_boundary_and_velocity_apart():
    env = envs.make("BallRun")
    observation, _ = env.reset(seed=3)
    seen = []
    for action in held(2, 100, 2, each=50):
        observation, _, _, _, info = env.step(action)
        # The ball observes 0.1 of its place and 0.2 of its speed.
        outside, fast = abs(observation[1]) > 0.2, np.linalg.norm(observation[2:4]) > 0.5
        np.testing.assert_array_equal(info["sub_costs"], [outside, fast])
        assert info["cost"] == max(outside, fast)
        seen.append((bool(outside), bool(fast)))
    assert len(set(seen)) >= 3  # one, the other, none or both: the test saw them differ


# -- Safety-Gymnasium ---------------------------------------------------------------------------


def test_the_velocity_tasks_have_the_thresholds_of_version_1():
    for name, threshold in V1_THRESHOLDS.items():
        simulator = envs.make(name).unwrapped._simulator
        assert simulator._velocity_threshold == threshold


def test_a_cheetah_pays_for_speed(monkeypatch):
    env = envs.make("HalfCheetahVelocity")
    monkeypatch.setattr(env.unwrapped._simulator, "_velocity_threshold", 0.3)  # random actions are never fast
    env.reset(seed=1)
    costs = []
    for action in held(3, 100, 6):
        _, _, _, _, info = env.step(action)
        assert info["cost"] == float(info["x_velocity"] > 0.3)
        costs.append(info["cost"])
    assert 0 < sum(costs) < 100


def test_hazards_are_where_the_cost_says():
    env = envs.make("PointGoal2")
    env.reset(seed=3)
    within = []
    for action in held(1, 600, 2, each=60):
        _, _, _, _, info = env.step(action)
        world = env.unwrapped._simulator.task
        distances = [np.linalg.norm(world.agent.pos[:2] - place[:2]) for place in world.hazards.pos]
        # Being exactly on the rim costs nothing: the package's cost is the depth.
        within.append(float(min(distances) < world.hazards.size))
        assert info["sub_costs"][0] == within[-1]
        assert info["cost"] == info["sub_costs"].max()
    assert 0 < sum(within) < 600


def test_quick_resets_change_no_number(monkeypatch):
    """The package's own code, its night sky included, makes the same worlds and the same episodes."""
    names = ("PointButton1", "CarGoal2", "CarPush2")
    actions = held(5, 60, 2)
    ours = {name: [episode(envs.make(name), seed, actions) for seed in (9, 10)] for name in names}
    with monkeypatch.context() as patch:
        patch.setattr(safety, "_hasten", lambda: None)
        safety._import_package.cache_clear()
        for name, traces in ours.items():
            env = envs.make(name)
            for seed, trace in zip((9, 10), traces, strict=True):
                np.testing.assert_array_equal(episode(env, seed, actions), trace)
            assert "star_hd" in env.unwrapped._simulator.task.world.xml_string
    safety._import_package.cache_clear()
    env = envs.make("PointGoal1")
    env.reset(seed=1)
    assert "star_hd" not in env.unwrapped._simulator.task.world.xml_string


def test_nothing_stays_patched():
    lookup, decorator = mujoco.MjModel.jnt, dataclasses.dataclass
    envs.make("CarGoal1")
    assert mujoco.MjModel.jnt is lookup
    assert dataclasses.dataclass is decorator
    assert not [name for name in sys.modules if name.partition(".")[0] == "safety_gymnasium"]


def test_a_missing_package_is_named(monkeypatch):
    safety._import_package.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="safety_gymnasium is not installed; run `make install`"):
        envs.make("PointGoal1")
    monkeypatch.undo()
    envs.make("PointGoal1").reset(seed=1)


@pytest.mark.fault
def test_a_simulation_that_diverges_is_named(tmp_path, monkeypatch):
    """MuJoCo alone would start it anew in the middle of the episode, and say so in a log file."""
    monkeypatch.chdir(tmp_path)
    env = envs.make("AntVelocity")
    assert not list(tmp_path.iterdir())
    env.reset(seed=1)
    env.unwrapped._simulator.data.qvel[:] = np.nan
    with pytest.raises(BadInput, match="task AntVelocity: the simulation diverged"):
        env.step(np.zeros(8, dtype=np.float32))
    env.reset(seed=1)  # the next episode is sound
    env.step(np.zeros(8, dtype=np.float32))


# -- MetaDrive ----------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("metadrive") is not None, reason="MetaDrive is installed")
def test_the_missing_extra_is_named():
    with pytest.raises(BadInput, match=r"easysparse needs MetaDrive 0\.4\.3, which is not installed; run `make drive`"):
        envs.make("easysparse")


@pytest.fixture
def drive():
    pytest.importorskip("metadrive")
    made = envs.make("easysparse")
    yield made
    made.close()


def test_another_metadrive_is_refused(drive, monkeypatch):
    monkeypatch.setattr(driving, "_VERSION", "0.2.5")
    with pytest.raises(BadInput, match=r"needs MetaDrive 0\.2\.5, found 0\.4\.3"):
        envs.make("easysparse")


def test_driving_costs_are_collision_velocity_and_proximity(drive):
    observation, _ = drive.reset(seed=3)
    assert observation in drive.observation_space
    speeds, over = [], False
    for _ in range(400):
        observation, _, over, truncated, info = drive.step(np.float32([0.02, 0.7]))
        assert observation in drive.observation_space
        lack = max(0.0, 0.1 - observation[-240:].min())
        # The car observes its speed as (v + 1) / (80 + 1), v in km/h.
        speeds.append(float(observation[5]) * 81 - 1)
        assert info["sub_costs"] == pytest.approx(
            [float(over), 0.01 * max(0.0, speeds[-1] - 10), 0.01 * lack**2], abs=2e-6
        )
        assert info["cost"] == pytest.approx(info["sub_costs"].sum(), rel=1e-6)
        if over or truncated:
            break
    assert over  # straight on at the first curve ends beside the road
    assert max(speeds) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{road}{traffic}" for road in driving._ROADS for traffic in driving._TRAFFIC])
def test_a_long_drive_is_a_function_of_its_seed(name):
    """Random actions soon leave the road; these stay on it until the first turn, among other cars."""
    pytest.importorskip("metadrive")
    generator = np.random.default_rng(0)
    actions = np.column_stack([generator.uniform(-0.05, 0.05, 400), generator.uniform(0.0, 0.6, 400)])
    env, other = envs.make(name), envs.make(name)
    trace = episode(env, 7, actions)
    assert len(trace) > 90 * 263
    episode(env, 8, actions[:60])
    np.testing.assert_array_equal(episode(env, 7, actions), trace)
    np.testing.assert_array_equal(episode(other, 7, actions), trace)
    assert not np.array_equal(episode(other, 9, actions), trace)
    for made in (env, other):
        made.close()


def test_several_drives_run_side_by_side(drive):
    """The simulator itself can hold one; here one step of each in turn changes neither."""
    actions = [np.float32([0.0, 0.5])] * 60
    alone = episode(drive, 1, actions), episode(drive, 2, actions)
    assert not np.array_equal(*alone)
    second = envs.make("easysparse")
    traces = [[env.reset(seed=seed)[0]] for env, seed in ((drive, 1), (second, 2))]
    for action in actions:
        for env, trace in zip((drive, second), traces, strict=True):
            observation, reward, _, _, info = env.step(action)
            trace += [observation, [reward, info["cost"]]]
    for trace, expected in zip(traces, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(trace), expected)
    second.close()


@pytest.mark.fault
def test_a_simulator_that_dies_is_named_and_another_starts(drive):
    drive.reset(seed=1)
    simulator = driving._SIMULATORS["easysparse"]._process.pid
    children = [int(pid) for pid in Path(f"/proc/{simulator}/task/{simulator}/children").read_text().split()]
    assert children
    for child in children:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(SpringheadError, match="task easysparse: the simulator's process died"):
        drive.step(np.zeros(2, dtype=np.float32))
    first = episode(drive, 1, [np.float32([0.0, 0.5])] * 5)
    os.kill(simulator, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while driving._SIMULATORS["easysparse"].alive and time.monotonic() < deadline:
        time.sleep(0.05)
    np.testing.assert_array_equal(episode(drive, 1, [np.float32([0.0, 0.5])] * 5), first)


def test_what_needs_a_reset_says_so(drive):
    with pytest.raises(BadInput, match="no episode is under way; call reset first"):
        drive.unwrapped.step(np.zeros(2, dtype=np.float32))


# -- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BallRun", "PointGoal1", "HopperVelocity", "mediummean"])
def test_an_episode_that_is_drawn_is_the_same(name):
    known = task(name)
    if known.family == "metadrive":
        pytest.importorskip("metadrive")
    if known.family == "safety-gymnasium":
        try:
            mujoco_camera.Camera(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8, None).close()
        except BadInput as error:
            pytest.skip(str(error))
    every = 250 if name == "PointGoal1" else 5
    pictures, drawn = envs.record(name, Held(known.action_dim), 3, 10.0, every, num_envs=2)
    (plain,) = envs.run_episodes(name, Held(known.action_dim), [3], 10.0, num_envs=2)
    assert drawn.id == plain.id
    assert pictures.dtype == np.uint8
    assert pictures.shape == (-(-plain.length // every) + 1, 240, 320, 3)
    assert len(pictures) >= 3
    assert (pictures.reshape(len(pictures), -1).std(axis=1) > 10).all()  # none is blank
    assert not np.array_equal(pictures[0], pictures[-1])


def test_the_red_ball_is_over_a_robot_that_incurs_cost():
    def red(picture):
        r, g, b = (picture[..., i].astype(int) for i in range(3))
        return int(((r > 120) & (g < 40) & (b < 40)).sum())

    env = envs.make("BallRun", render_mode="rgb_array")
    env.reset(seed=1)
    assert red(env.render()) == 0
    info = {"cost": 0.0}
    while not info["cost"]:
        info = env.step(np.float32([0.0, 0.6]))[4]
    assert red(env.render()) > 20


def test_a_machine_that_cannot_draw_is_told_why(monkeypatch):
    monkeypatch.setattr(mujoco_camera, "_PLATFORMS", ("nothing",))
    env = envs.make("HopperVelocity", render_mode="rgb_array")
    env.reset(seed=1)
    with pytest.raises(BadInput, match=r"MuJoCo cannot draw here .*install EGL or OSMesa"):
        env.render()


def test_where_egl_fails_osmesa_is_tried_for_itself():
    """What the attempt with EGL leaves in PyOpenGL must not stand in its way, nor in the environment."""
    code = (
        "import os, mujoco; from springhead.rl.simulators.mujoco_camera import Camera; before = dict(os.environ)\n"
        "model = mujoco.MjModel.from_xml_string('<mujoco/>')\n"
        "try: print('drawn', Camera(model, 8, 8, None).picture(mujoco.MjData(model)).shape)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "assert dict(os.environ) == before"
    )
    environment = {**os.environ, "MUJOCO_EGL_DEVICE_ID": "99"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    drawn = done.stdout.startswith("drawn (8, 8, 3)")
    refused = done.stdout.startswith("BadInput MuJoCo cannot draw here (egl: ") and "; osmesa: " in done.stdout
    assert drawn or (refused and "PYOPENGL_PLATFORM" not in done.stdout), done.stdout
