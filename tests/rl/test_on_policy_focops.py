"""FOCOPS: its loss and its multiplier against numbers computed here."""

import dataclasses

import numpy as np
import pytest
import torch

from springhead.rl.online.focops import FOCOPS, FOCOPSConfig
from springhead.rl.workers import EpisodeWorkers

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def learner_of(**changes):
    small = {"task": "BallRun", "seed": 3, "iterations": 3, "episodes_per_iteration": 2, "num_envs": 2, "hidden": (16,)}
    config = FOCOPSConfig(**{**small, **changes})
    return FOCOPS(config, EpisodeWorkers(config.task, config.num_envs))


def shifted(learner, shift):
    """A batch as if the policy that collected it had had other means and wider deviations in the first rows."""
    batch = learner.prepare(*learner.collect())
    means, stds = batch.means.clone(), batch.stds.clone()
    means[:20] -= shift
    stds[:20] *= 1.1
    log_probs = torch.distributions.Normal(means, stds).log_prob(batch.actions).sum(-1)
    return dataclasses.replace(batch, means=means, stds=stds, log_probs=log_probs)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("shift, near", [(0.1, True), (0.5, False)])
def test_the_loss_is_divergence_less_advantage_where_the_policy_is_near(shift, near, released):
    learner = learner_of(released=released, eta=0.05)
    learner.nu = 0.7
    batch = shifted(learner, shift)
    rows = torch.arange(10, 30)  # the policy has moved at half of them
    now, old = (x.numpy().astype(np.float64) for x in (batch.stds[-1], batch.stds[0]))
    apart = np.log(old / now) + (now**2 + shift**2) / (2 * old**2) - 0.5  # KL(now || old), not the other way round
    kl = np.where(rows.numpy() < 20, apart.sum(), 0.0)
    assert bool(kl.max() <= 0.05) is near
    with torch.no_grad():
        log_new = learner.actor(batch.observations[rows]).log_prob(batch.actions[rows]).sum(-1).numpy()
    reward, cost = (x[rows].numpy() for x in (batch.reward_advantages, batch.cost_advantages))
    temperature = 1.5
    if released:
        temperature = 0.95
        reward, cost = ((x - x.mean()) / (x.std() + 1e-8) for x in (reward, cost))
    terms = kl - np.exp(log_new - batch.log_probs[rows].numpy()) * (reward - 0.7 * cost) / temperature
    loss, divergence = learner.policy_loss(batch, rows)
    assert divergence == pytest.approx(kl.mean(), rel=1e-4)
    assert loss.item() == pytest.approx((terms * (kl <= 0.05)).mean(), rel=1e-3, abs=1e-5)


def test_the_multiplier_integrates_the_excess_between_its_bounds():
    learner = learner_of(nu_learning_rate=0.01, nu_max=1.0, epochs=1)
    batch = learner.prepare(*learner.collect())
    found = [learner.update(batch, cost, 20.0)[0] for cost in (50.0, 10.0, 200.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    assert found == pytest.approx([0.3, 0.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0], abs=1e-9)


def test_the_policy_stops_when_it_has_moved_too_far_and_the_critics_go_on():
    learner = learner_of(epochs=30, learning_rate=0.05, target_kl=0.02, minibatch=50)
    batch = learner.prepare(*learner.collect())
    _, losses = learner.update(batch, 0.0, 20.0)
    assert losses["kl"] > 0.02
    steps = {kind: int(optimiser.state_dict()["state"][0]["step"]) for kind, optimiser in learner.optimisers.items()}
    assert steps["critics"] == 30 * 4  # 200 transitions
    assert 1 <= steps["actor"] < 60
