"""PPO-Lagrangian: its parts against naive versions and pinned numbers, resume to the byte, and that it learns."""

import dataclasses

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.lineage.digests import tree_digest
from springhead.rl.envs import run_episodes
from springhead.rl.networks import ExpertPolicy, Moments, load_expert, save_expert, weights_of
from springhead.rl.online.lagrangian import PIDLagrangian
from springhead.rl.online.ppo_lag import PPOLag, PPOLagConfig, cost_limit_at, gae, load, train

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def config(**changes):
    small = PPOLagConfig(
        task="BallRun",
        seed=3,
        iterations=3,
        episodes_per_iteration=2,
        hidden=(16, 16),
        epochs=2,
        minibatch=50,
        cost_limit_start=20.0,
        cost_limit_end=5.0,
    )
    return dataclasses.replace(small, **changes)


def test_the_multiplier_follows_the_pid_rule():
    pid = PIDLagrangian(kp=0.05, ki=0.0005, kd=0.1)
    values = [pid.update(cost, 10.0) for cost in (30.0, 40.0, 12.0, 0.0, 25.0)]
    # errors 20, 30, 2, -10, 15; integrals 20, 50, 52, 42, 57; rises 20, 10, 0, 0, 25
    expected = [1.0 + 0.01 + 2.0, 1.5 + 0.025 + 1.0, 0.1 + 0.026, 0.0, 0.75 + 0.0285 + 2.5]
    assert values == pytest.approx(expected, abs=1e-12)
    assert pid.integral == 57.0
    for _ in range(30):
        pid.update(0.0, 10.0)
    assert pid.integral == 0.0
    assert pid.value == 0.0


def test_the_limit_ramps_linearly_between_two_fractions():
    ramp = config(iterations=11, cost_limit_start=100.0, cost_limit_end=0.0, ramp_from=0.2, ramp_until=0.7)
    limits = [cost_limit_at(ramp, i) for i in range(11)]
    assert limits == pytest.approx([100, 100, 100, 80, 60, 40, 20, 0, 0, 0, 0])


@pytest.mark.parametrize("terminal", [False, True])
def test_gae_is_the_discounted_sum_of_errors(terminal):
    generator = np.random.default_rng(0)
    steps, discount, lam = 12, 0.9, 0.8
    signals, values, after = generator.normal(size=(3, steps))
    terminals = np.zeros(steps, dtype=bool)
    terminals[-1] = terminal
    naive = np.zeros(steps)
    for t in range(steps):
        for k in range(t, steps):
            bootstrap = 0.0 if terminals[k] else discount * after[k]
            naive[t] += (discount * lam) ** (k - t) * (signals[k] + bootstrap - values[k])
    np.testing.assert_allclose(gae(signals, values, after, terminals, discount, lam), naive)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards, values = np.ones(5), np.full(5, 2.0)
    after = np.append(values[1:], 10.0)  # a truncated episode goes on, at a value of 10
    advantages = gae(rewards, values, after, np.zeros(5, dtype=bool), 0.5, 1.0)
    returns = [sum(0.5**k for k in range(5 - t)) + 0.5 ** (5 - t) * 10.0 for t in range(5)]
    np.testing.assert_allclose(advantages + values, returns)


def test_running_moments_are_those_of_all_rows():
    rows = np.random.default_rng(1).normal(3.0, 2.0, size=(100, 4))
    moments = Moments.of(4)
    for part in (rows[:10], rows[10:11], rows[11:]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0))
    np.testing.assert_allclose(moments.std, rows.std(axis=0))


def test_losses_of_the_first_iterations_are_pinned():
    """Any change of the algorithm shows here; change the numbers only together with the method page."""
    learner = PPOLag(config())
    figures = [learner.iterate() for _ in range(2)]
    found = [(f.policy_loss, f.reward_value_loss, f.cost_value_loss, f.episode_return, f.cost_return) for f in figures]
    pinned = [(-0.004838, 1.04883, 0.941949, -5.006924, 6.0), (-0.000833, 0.871712, 0.958931, 34.555873, 28.5)]
    np.testing.assert_allclose(found, pinned, rtol=1e-3, atol=1e-4)


def test_the_combined_loss_of_an_unchanged_policy_is_the_mean_advantage():
    learner = PPOLag(config())
    batch = learner.prepare(*learner.collect())
    learner.lagrangian.value = 3.0
    rows = torch.arange(len(batch.actions))
    policy_loss, _, _, kl = learner.losses(batch, rows)
    expected = -(batch.reward_advantages - 3.0 * batch.cost_advantages).mean() / 4.0
    assert policy_loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert kl == pytest.approx(0.0, abs=1e-6)


def test_a_large_multiplier_cannot_leave_the_trust_region():
    learner = PPOLag(config())
    batch = learner.prepare(*learner.collect())
    far = dataclasses.replace(batch, log_probs=batch.log_probs - 1.0)  # every ratio is e, far above 1.2
    learner.lagrangian.value = 100.0
    policy_loss, *_ = learner.losses(far, torch.arange(len(batch.actions)))
    advantages = (batch.reward_advantages - 100.0 * batch.cost_advantages) / 101.0
    expected = -torch.where(advantages > 0, 1.2 * advantages, float(np.e) * advantages).mean()
    assert policy_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def final_policy(folder, settings, scratch, stop_after=None):
    learner = None
    for learner, history in train(settings, scratch, checkpoint_every=2):  # noqa: B007
        if stop_after is not None and len(history) == stop_after:
            return None
    save_expert(folder, ExpertPolicy(learner.expert_config(5.0), weights_of(learner.actor)))
    return tree_digest(folder)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    settings = config(iterations=5)
    whole = final_policy(tmp_path / "whole", settings, tmp_path / "a")
    # Killed after iteration 3: the checkpoint of iteration 2 counts, and iteration 3 is done again.
    assert final_policy(tmp_path / "killed", settings, tmp_path / "b", stop_after=3) is None
    assert final_policy(tmp_path / "resumed", settings, tmp_path / "b") == whole
    # A half-written checkpoint is none.
    (tmp_path / "b" / "checkpoint-000005.safetensors").write_bytes(b"half")
    assert final_policy(tmp_path / "again", settings, tmp_path / "b") == whole
    # A checkpoint of other settings is not used.
    assert final_policy(tmp_path / "other", config(iterations=5, seed=4), tmp_path / "b") != whole


@pytest.mark.fault
def test_a_damaged_checkpoint_is_named(tmp_path):
    settings = config(iterations=5)
    final_policy(tmp_path / "killed", settings, tmp_path, stop_after=3)
    (tmp_path / "checkpoint-000002.safetensors").write_bytes(b"broken")
    with pytest.raises(BadInput, match="damaged checkpoint"):
        next(train(settings, tmp_path))


def test_a_saved_policy_acts_as_it_did(tmp_path):
    learner = PPOLag(config())
    learner.iterate()
    save_expert(tmp_path / "policy", ExpertPolicy(learner.expert_config(20.0), weights_of(learner.actor)))
    policy = load(tmp_path / "policy")
    assert (policy.task, policy.algorithm, policy.observation_dim, policy.action_dim) == ("BallRun", "ppo-lag", 7, 2)
    observations = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    policy.reset(4, 20.0)
    with torch.no_grad():
        expected = learner.actor.net(learner._normalise(observations)).numpy().clip(-1, 1)
    np.testing.assert_allclose(policy.act(observations), expected, atol=1e-5)
    sampled = [run_episodes("BallRun", load_expert(tmp_path / "policy", [8, 9]), [8, 9], 20.0, 2) for _ in range(2)]
    assert [e.id for e in sampled[0]] == [e.id for e in sampled[1]]
    by_mean = run_episodes("BallRun", policy, [8, 9], 20.0, 2)
    assert not {e.id for e in by_mean} & {e.id for e in sampled[0]}


@pytest.mark.fault
def test_broken_policy_folders_are_named(tmp_path):
    learner = PPOLag(config())
    save_expert(tmp_path / "policy", ExpertPolicy(learner.expert_config(20.0), weights_of(learner.actor)))
    weights = tmp_path / "policy" / "policy.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match=r"policy\.safetensors"):
        load_expert(tmp_path / "policy")
    weights.unlink()
    with pytest.raises(BadInput, match=r"policy\.safetensors"):
        load_expert(tmp_path / "policy")
    (tmp_path / "policy" / "policy.json").write_text("{}")
    with pytest.raises(BadInput, match="missing"):
        load_expert(tmp_path / "policy")


def test_it_learns_and_keeps_its_limit():
    """BallRun pays about 60 per metre forward, and costs as soon as the ball is fast, so return and cost conflict."""
    final = {}
    for limit, iterations in ((1000.0, 6), (0.0, 9)):
        settings = config(
            iterations=iterations,
            episodes_per_iteration=6,
            epochs=10,
            minibatch=100,
            cost_limit_start=limit,
            cost_limit_end=limit,
        )
        learner = PPOLag(settings)
        figures = [learner.iterate() for _ in range(iterations)]
        assert figures[-1].episode_return > figures[0].episode_return + 150
        final[limit] = np.mean([f.cost_return for f in figures[-3:]])
    assert final[0.0] < 0.5 * final[1000.0]
