"""PPO-Lagrangian: its loss against numbers computed here, pinned figures, and that it learns."""

import dataclasses

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.envs import run_episodes
from springhead.rl.networks import load_expert, save_expert
from springhead.rl.online.advantages import standardise
from springhead.rl.online.ppo_lag import PPOLag, PPOLagConfig
from springhead.rl.workers import EpisodeWorkers

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def learner_of(**changes):
    small = PPOLagConfig(
        task="BallRun",
        seed=3,
        iterations=3,
        episodes_per_iteration=2,
        num_envs=2,
        hidden=(16, 16),
        learning_rate=1e-3,
        epochs=2,
        minibatch=50,
        cost_limit_start=20.0,
        cost_limit_end=5.0,
    )
    config = dataclasses.replace(small, **changes)
    return PPOLag(config, EpisodeWorkers(config.task, config.num_envs))


def test_the_combined_loss_of_an_unchanged_policy_is_the_mean_advantage():
    learner = learner_of()
    batch = learner.prepare(*learner.collect())
    learner.lagrangian.value = 3.0
    policy_loss, kl = learner.policy_loss(batch, torch.arange(len(batch.actions)))
    expected = -(batch.reward_advantages - 3.0 * batch.cost_advantages).mean() / 4.0
    assert policy_loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("released", [False, True])
def test_a_large_multiplier_leaves_the_trust_region_in_the_released_loss_alone(released):
    learner = learner_of(released=released)
    batch = learner.prepare(*learner.collect()).standardised()
    far = dataclasses.replace(batch, log_probs=batch.log_probs - 1.0)  # every ratio is e, far above 1.2
    learner.lagrangian.value = 100.0
    policy_loss, _ = learner.policy_loss(far, torch.arange(len(batch.actions)))
    reward, cost, e = batch.reward_advantages, batch.cost_advantages, float(np.e)
    if released:
        clipped = torch.where(reward > 0, 1.2 * reward, e * reward)
        expected = -(clipped - 100.0 * e * cost).mean() / 101.0
    else:
        combined = (reward - 100.0 * cost) / 101.0
        expected = -torch.where(combined > 0, 1.2 * combined, e * combined).mean()
    assert policy_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_released_loss_standardises_within_the_minibatch():
    learner = learner_of(released=True)
    batch = learner.prepare(*learner.collect())
    learner.lagrangian.value = 2.0
    rows = torch.arange(40)
    policy_loss, _ = learner.policy_loss(batch, rows)
    reward, cost = standardise(batch.reward_advantages[rows]), standardise(batch.cost_advantages[rows])
    ratio = torch.exp(
        learner.actor(batch.observations[rows]).log_prob(batch.actions[rows]).sum(-1) - batch.log_probs[rows]
    )
    assert policy_loss.item() == pytest.approx(-(ratio * (reward - 2.0 * cost)).mean().item() / 3.0, abs=1e-6)


def test_the_released_code_leaves_observations_and_returns_raw():
    learner = learner_of(released=True)
    learner.iterate()
    policy = learner.policy()
    assert set(policy.config.observation_mean) == {0.0}
    assert set(policy.config.observation_std) == {1.0}
    assert learner.value_moments.count == 0
    assert learner_of().iterate() != learner_of(released=True).iterate()


def test_a_saved_policy_acts_as_it_did(tmp_path):
    learner = learner_of()
    learner.iterate()
    save_expert(tmp_path / "policy", learner.policy())
    policy = load_expert(tmp_path / "policy")
    assert (policy.task, policy.algorithm, policy.observation_dim, policy.action_dim) == ("BallRun", "ppo-lag", 7, 2)
    assert policy.config.cost_limit == 20.0  # that of the iteration it came out of
    observations = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    policy.reset(4, 20.0)
    with torch.no_grad():
        expected = learner.actor(learner._normalise(observations)).mean.numpy().clip(-1, 1)
    np.testing.assert_allclose(policy.act(observations), expected, atol=1e-5)
    sampled = [run_episodes("BallRun", load_expert(tmp_path / "policy", [8, 9]), [8, 9], 20.0, 2) for _ in range(2)]
    assert [e.id for e in sampled[0]] == [e.id for e in sampled[1]]
    by_mean = run_episodes("BallRun", policy, [8, 9], 20.0, 2)
    assert not {e.id for e in by_mean} & {e.id for e in sampled[0]}


@pytest.mark.fault
def test_broken_policy_folders_are_named(tmp_path):
    save_expert(tmp_path / "policy", learner_of().policy())
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
        learner = learner_of(
            iterations=iterations,
            episodes_per_iteration=6,
            num_envs=6,
            epochs=10,
            minibatch=100,
            target_kl=0.03,
            pid_ki=0.005,
            cost_limit_start=limit,
            cost_limit_end=limit,
        )
        figures = [learner.iterate() for _ in range(iterations)]
        assert figures[-1].episode_return > figures[0].episode_return + 150
        final[limit] = np.mean([f.cost_return for f in figures[-3:]])
    assert final[0.0] < 0.5 * final[1000.0]
