"""BEAR-Lag: its discrepancy, targets and policy's loss by hand, its steps pinned, resumed and side by side."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.offline.bear_lag import BEARLagSettings, mmd
from tests.rl.offline_runs import (
    batch_with_ends,
    by_hand,
    curve,
    learner,
    moved_targets,
)

pytestmark = pytest.mark.unit
SMALL = BEARLagSettings(
    steps=6, batch_size=16, hidden=(8, 8), vae_hidden=(8, 8), samples=3, checkpoint_every=2, report_every=1
)
RELEASED: dict[str, Any] = {
    "target_action": "extremes", "cost_ensemble": "min", "timeouts": "terminal", "cost_terminals": "ignored",
}  # fmt: skip
LOSSES = ("vae_loss", "reward_critic_loss", "cost_critic_loss", "policy_loss", "mmd", "alpha")
BOTH = pytest.mark.parametrize("settings", [SMALL, replace(SMALL, **RELEASED)], ids=["intended", "released"])


def discrepancy(one: np.ndarray, other: np.ndarray, kernel: str, sigma: float) -> float:
    """The definition, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        power = 2 if kernel == "gaussian" else 1
        return float(np.mean([np.exp(-(np.abs(x - y) ** power).sum() / (2 * sigma)) for x in a for y in b]))

    return float(np.sqrt(mean(one, one) + mean(other, other) - 2 * mean(one, other) + 1e-6))


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian"])
@pytest.mark.parametrize("sigma", [0.3, 20.0])
def test_the_discrepancy_by_hand(kernel: Any, sigma: float) -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 5, 4, 3)), np.random.default_rng(1).normal(size=(2, 5, 6, 3))
    found = mmd(torch.from_numpy(one), torch.from_numpy(other), kernel, sigma)
    for place in itertools.product(range(2), range(5)):
        assert found[place].item() == pytest.approx(discrepancy(one[place], other[place], kernel, sigma), rel=1e-5)
    same = torch.from_numpy(one)
    np.testing.assert_allclose(mmd(same, same, kernel, sigma).numpy(), 1e-3, rtol=1e-3)  # sqrt(1e-6)


def test_two_points_by_hand() -> None:
    found = mmd(torch.zeros(1, 1), torch.tensor([[2.0]]), "gaussian", 4.0)
    assert found.item() == pytest.approx(np.sqrt(2 - 2 * np.exp(-0.5) + 1e-6), rel=1e-5)
    found = mmd(torch.zeros(1, 1), torch.tensor([[2.0]]), "laplacian", 4.0)
    assert found.item() == pytest.approx(np.sqrt(2 - 2 * np.exp(-0.25) + 1e-6), rel=1e-5)


@BOTH
def test_the_targets_by_hand(settings: BEARLagSettings) -> None:
    made = learner("bear-lag", settings)
    moved_targets(made.target_actor, made.target_critics)
    released = settings.target_action == "extremes"
    number = 3 if released else 1
    batch, noise = batch_with_ends(made), torch.randn(2, 16, number, 2, generator=torch.Generator().manual_seed(0))
    found = made.targets(batch, noise).numpy()
    for member, row in itertools.product(range(2), range(16)):
        state = batch.next_observations[member, row].double().numpy()
        mean, log_std = np.split(by_hand(made.target_actor.net, member, state), 2)
        q, qc = [], []
        for sample in range(number):
            action = np.tanh(mean + np.exp(log_std) * noise[member, row, sample].numpy())
            both = np.concatenate([state, action])
            values = [by_hand(made.target_critics, 8 * member + k, both).item() for k in range(8)]
            first, second = min(values[:2]), min(values[2:4])
            q.append(0.75 * min(first, second) + 0.25 * max(first, second))
            if released:
                first, second = min(values[4:6]), min(values[6:])
                qc.append(0.75 * min(first, second) + 0.25 * max(first, second))
            else:
                first, second = max(values[4:6]), max(values[6:])
                qc.append(0.75 * max(first, second) + 0.25 * min(first, second))
        on, cost_on = float(row != 0 and not (released and row == 1)), float(released or row != 0)
        reward, cost = float(batch.rewards[member, row]), float(batch.costs[member, row])
        wanted = [reward + 0.99 * on * max(q), cost + 0.99 * cost_on * max(qc)]
        np.testing.assert_allclose(found[member, :, row], wanted, atol=1e-5)


@pytest.mark.parametrize("imitation_steps", [0, 5])
@BOTH
def test_the_policy_follows_reward_cost_and_support(settings: BEARLagSettings, imitation_steps: int) -> None:
    """One step of the policy from known networks: the loss and both multipliers are NumPy's."""
    settings = replace(
        settings, critic_learning_rate=1e-12, vae_learning_rate=1e-12, kp=2.0, ki=0.5, sigma=0.5,
        imitation_steps=imitation_steps, alpha_learning_rate=0.1,
    )  # fmt: skip
    made, twin = learner("bear-lag", settings), learner("bear-lag", settings)
    made.threshold = torch.tensor([-1.0, 1.0])  # the new networks' values are about 0: one limit is broken, one kept
    released = settings.target_action == "extremes"
    batch, noise = twin.sampler.draw(), twin.generators["noise"]
    noise.normal(16, 4), noise.normal(16, 3 if released else 1, 2)  # those of the action model and of the targets
    latent = noise.normal(16 * 3, 4).clamp(-0.5, 0.5).double().numpy()
    drawn = noise.normal(16, 3, 2).double().numpy()
    figures = made.update(1)
    for member, threshold in enumerate((-1.0, 1.0)):
        states = batch.observations[member].double().numpy()
        mean, log_std = np.split(by_hand(twin.actor.net, member, states), 2, axis=1)
        before = mean[:, None] + np.exp(log_std)[:, None] * drawn[member]
        stacked = np.concatenate([states.repeat(3, 0), latent[member]], 1)
        modelled = by_hand(made.vae.decoder, member, stacked).reshape(16, 3, 2)
        distance = np.mean([discrepancy(a, b, "gaussian", 0.5) for a, b in zip(modelled, before, strict=True)])
        pairs = np.concatenate([states, np.tanh(before[:, 0])], 1)
        values = np.stack([by_hand(made.critics, 8 * member + k, pairs)[:, 0] for k in range(8)])
        value, cost = values[:4].min(0).mean(), (values[4:].min(0) if released else values[4:].max(0)).mean()
        error = cost - threshold
        multiplier = max(0.0, 2.0 * max(error, 0) + 0.5 * max(error, 0) + 0.001 * max(error, 0))
        loss = multiplier * error + (distance - 0.05) - (0 if imitation_steps else value)
        assert figures["mmd"][member].item() == pytest.approx(distance, rel=1e-4)
        assert figures["multiplier"][member].item() == pytest.approx(multiplier, rel=1e-4)
        assert figures["policy_loss"][member].item() == pytest.approx(loss, abs=1e-4)
        log_alpha = made.modules.get_buffer("log_alpha")[member].item()
        assert log_alpha == pytest.approx(0.1 * (distance - 0.05), rel=1e-4)


def test_alpha_stays_within_its_range() -> None:
    made = learner("bear-lag", replace(SMALL, alpha_learning_rate=1e9))
    made.update(1)
    assert made.modules.get_buffer("log_alpha").abs().tolist() == [5.0, 5.0]


def test_the_support_bound_pulls_the_policy_to_the_data(tmp_path: Path) -> None:
    settings = replace(
        SMALL, steps=150, sigma=1.0, imitation_steps=150, actor_learning_rate=0.01, vae_learning_rate=0.01
    )
    found = curve("bear-lag", settings, tmp_path, ("mmd",))
    assert np.mean(found[-10:]) < 0.7 * np.mean(found[:10])


def test_the_first_losses_are_pinned(tmp_path: Path) -> None:
    found = curve("bear-lag", replace(SMALL, steps=10), tmp_path / "a", LOSSES)
    assert found == pytest.approx(PINNED, rel=2e-4)
    found = curve("bear-lag", replace(SMALL, steps=10, **RELEASED), tmp_path / "b", LOSSES)
    assert found == pytest.approx(PINNED_RELEASED, rel=2e-4)


PINNED = [3.63502, 3.7225, 4.18301, 5.5536, 4.40477, 3.69867, 4.17525, 4.26475, 4.23305, 4.13885]
PINNED_RELEASED = [3.17143, 3.39725, 3.70229, 4.51532, 3.57381, 3.20077, 3.5113, 3.7939, 3.69374, 3.59004]


@pytest.mark.parametrize("bad", [{"critics": 0}, {"sigma": 0.0}, {"divergence": -1.0}, {"imitation_steps": -1}])
def test_settings_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        BEARLagSettings(**bad)
