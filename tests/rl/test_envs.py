"""Environments: dimensions, real seeding, independent episodes, and batching that changes nothing."""

import gymnasium
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.rl import conduct, envs
from springhead.rl.tasks import TASKS, task

pytestmark = pytest.mark.unit

SAMPLE = ("BallRun", "AntCircle", "DroneRun", "PointGoal2", "CarPush1", "HalfCheetahVelocity", "Walker2dVelocity")
ELSEWHERE = ("BallRun", "PointGoal2")
"""Of the sample, those that run in another process too; the slow tests do that for all tasks, the benchmark's 38 and
five sparse ones."""


class Steering:
    """A deterministic policy whose arithmetic is row by row, so batch size cannot round it."""

    def __init__(self, action_dim):
        self.action_dim = action_dim
        self.seen = []

    def reset(self, num_envs, cost_limit):
        self.seen.append((num_envs, cost_limit))

    def act(self, observations):
        return np.tanh(3 * observations[:, : self.action_dim] + 0.2).astype(np.float32)

    def observe(self, rewards, costs):
        assert rewards.shape == costs.shape == (self.seen[-1][0],)


def episode(env, seed, actions):
    """The raw signals of one episode under fixed actions."""
    trace = [env.reset(seed=seed)[0]]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        trace += [observation, [reward, info["cost"]]]
        if terminated or truncated:
            break
    return np.concatenate(trace)


def slow_unless_sampled(name):
    return pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)


@pytest.mark.parametrize("name", [slow_unless_sampled(name) for name in TASKS])
def test_every_task_keeps_its_word(name):
    """Dimensions, horizon, costs and ends; the same seed gives the same episode, whatever ran before, anywhere."""
    known = task(name)
    if known.family == "metadrive":
        pytest.importorskip("metadrive")
    sample = name in SAMPLE
    seen = conduct.check(name, steps=150 if sample else known.horizon, other_process=not sample or name in ELSEWHERE)
    assert seen.steps >= 10
    if not sample:
        assert seen.ended in ("truncated", "terminated")
        print(
            f"{name}: {seen.steps} steps, {seen.ended}, return {seen.episode_return:.2f}, cost {seen.episode_cost:.2f}"
            f" {seen.sub_costs}, {seen.steps_per_second:.0f} steps/s, reset {1000 * seen.reset_seconds:.1f} ms"
        )


def test_a_check_of_one_step_is_a_check():
    seen = conduct.check("BallRun", steps=1, other_process=False)
    assert (seen.steps, seen.ended) == (1, "running")


@pytest.mark.parametrize("name", ["BallRun", "DroneRun"])
def test_nothing_of_short_episodes_is_left(name):
    """A robot that hardly moved keeps solver contacts at its start: the leak that is hardest to see."""
    generator = np.random.default_rng(4)
    env = envs.make(name)
    dim = task(name).action_dim
    actions = generator.uniform(-1, 1, (40, dim)).astype(np.float32)
    trace = episode(env, 5, actions)
    for length in [1, 2, 1, 3, 1, 5, 8, 1] * 3:
        seed = int(generator.choice([5, generator.integers(1000)]))
        episode(env, seed, generator.uniform(-1, 1, (length, dim)).astype(np.float32))
        np.testing.assert_array_equal(episode(env, 5, actions), trace)


def test_the_global_generator_is_left_alone():
    np.random.seed(42)
    before = np.random.get_state()
    env = envs.make("BallRun", seed=0)
    env.reset(seed=3)
    for _ in range(3):
        env.step(np.zeros(2, dtype=np.float32))
    after = np.random.get_state()
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_actions_are_clipped_and_costs_reported():
    env = envs.make("BallCircle")
    inside, outside = ([np.array([v, 0.0], dtype=np.float32)] * 80 for v in (1.0, 5.0))
    np.testing.assert_array_equal(episode(env, 2, inside), episode(env, 2, outside))
    assert episode(env, 2, inside)[-1] == 1.0  # pushed steadily out of the safe strip


def test_gymnasium_makes_the_tasks_by_id():
    env = gymnasium.make("springhead/DroneRun-v0")
    observation, info = env.reset(seed=1)
    assert observation.shape == (17,)
    assert info == {"cost": 0.0}


@pytest.mark.parametrize("name", ["BallRun", "DroneCircle"])
def test_an_episode_does_not_depend_on_its_batch(name):
    seeds = [5, 6, 7]
    policies = [Steering(task(name).action_dim) for _ in range(3)]
    together, pairs, alone = (
        envs.run_episodes(name, policy, seeds, 10.0, num_envs)
        for policy, num_envs in zip(policies, (3, 2, 1), strict=True)
    )
    assert [e.id for e in together] == [e.id for e in pairs] == [e.id for e in alone]
    assert len({e.id for e in together}) == 3
    # The last batch of two holds one episode, but the policy keeps acting for two.
    assert policies[1].seen == [(2, 10.0), (2, 10.0)]


def test_ends_are_told_apart():
    ball, drone = (
        envs.run_episodes(n, Steering(task(n).action_dim), [5], 10.0, 1)[0] for n in ("BallRun", "DroneCircle")
    )
    assert ball.length == 100
    assert ball.timeouts[-1]
    assert not ball.terminals.any()
    assert drone.length < 300
    assert drone.terminals[-1]
    assert not drone.timeouts.any()
    for e in (ball, drone):
        assert (e.terminals | e.timeouts).sum() == 1
        np.testing.assert_array_equal(e.next_observations[:-1], e.observations[1:])
        assert all(getattr(e, key).dtype == np.float32 for key in ("observations", "actions", "rewards", "costs"))


def test_bad_requests_are_named():
    with pytest.raises(BadInput, match="unknown task"):
        envs.make("Nowhere")
    with pytest.raises(BadInput, match="num_envs"):
        envs.EpisodeRunner("BallRun", 0)
    with pytest.raises(BadInput, match="3 seeds for 2 environments"):
        envs.EpisodeRunner("BallRun", 2).run(lambda o: o[:, :2], [1, 2, 3])


@pytest.mark.fault
def test_a_simulator_that_fails_in_an_episode_is_named_with_seed_and_step():
    runner = envs.EpisodeRunner("AntVelocity", 2)
    steps = 0

    def act(observations):
        nonlocal steps
        if steps == 3:
            runner._envs[1].unwrapped._simulator.data.qvel[:] = np.nan
        steps += 1
        return np.zeros((2, 8), dtype=np.float32)

    try:
        with pytest.raises(envs.SimulatorFault, match=r"AntVelocity: the simulation diverged .*seed 6, step 3\)"):
            runner.run(act, [5, 6])
    finally:
        envs.discard("AntVelocity")
