"""BCQ-Lag: its targets and its policy's loss by hand, its steps pinned, resumed and side by side, and how it acts."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.rl.lagrangian import q_threshold
from springhead.rl.offline import training
from springhead.rl.offline.bcq_lag import BCQLagSettings
from springhead.rl.policy import load_policy, save_model
from tests.rl.offline_data import BALL
from tests.rl.offline_runs import (
    EPISODES,
    batch_with_ends,
    by_hand,
    check_acting,
    curve,
    learner,
    moved_targets,
    trained_policy,
)

pytestmark = pytest.mark.unit
SMALL = BCQLagSettings(
    steps=6, batch_size=16, hidden=(8, 8), vae_hidden=(8, 8), samples=3, checkpoint_every=2, report_every=1
)
RELEASED: dict[str, Any] = {
    "target_action": "extremes", "actor_value": "lowest", "acting": "random", "cost_ensemble": "min",
    "timeouts": "terminal", "cost_terminals": "ignored",
}  # fmt: skip
LOSSES = ("vae_loss", "reward_critic_loss", "cost_critic_loss", "policy_loss")
BOTH = pytest.mark.parametrize("settings", [SMALL, replace(SMALL, **RELEASED)], ids=["intended", "released"])


@BOTH
def test_the_targets_by_hand(settings: BCQLagSettings) -> None:
    made = learner("bcq-lag", settings)
    moved_targets(made.target_actor, made.target_critics)
    batch, latent = batch_with_ends(made), torch.randn(2, 16 * 3, 4, generator=torch.Generator().manual_seed(0))
    values = np.zeros((2, 16, 3, 8))
    for member, row, sample in itertools.product(range(2), range(16), range(3)):
        state, z = batch.next_observations[member, row].double().numpy(), latent[member, 3 * row + sample].numpy()
        action = np.tanh(by_hand(made.vae.decoder, member, np.concatenate([state, z])))
        action = action + 0.05 * by_hand(made.target_actor, member, np.concatenate([state, action]))
        both = np.concatenate([state, np.clip(action, -1, 1)])
        values[member, row, sample] = [by_hand(made.target_critics, 8 * member + k, both).item() for k in range(8)]
    thresholds = np.median(values[..., 4].min(2), axis=1)  # kept by a candidate in half of the rows
    made.threshold = torch.tensor(thresholds, dtype=torch.float32)
    found = made.targets(batch, latent).numpy()

    def mix(
        four: np.ndarray, group: Callable[..., float], heavy: Callable[..., float], light: Callable[..., float]
    ) -> float:
        first, second = group(four[:2]), group(four[2:])
        return 0.75 * heavy(first, second) + 0.25 * light(first, second)

    released = settings.target_action == "extremes"
    for member, row in itertools.product(range(2), range(16)):
        q, qc = values[member, row, :, :4], values[member, row, :, 4:]
        rewards = [mix(four, min, min, max) for four in q]
        if released:
            following, costly = max(rewards), max(mix(four, min, min, max) for four in qc)
        else:
            safe = [k for k in range(3) if qc[k][0] <= thresholds[member]]
            best = max(safe, key=lambda k: q[k][0]) if safe else min(range(3), key=lambda k: qc[k][0])
            following, costly = rewards[best], mix(qc[best], max, max, min)
        on, cost_on = float(row != 0 and not (released and row == 1)), float(released or row != 0)
        reward, cost = float(batch.rewards[member, row]), float(batch.costs[member, row])
        wanted = [reward + 0.99 * on * following, cost + 0.99 * cost_on * costly]
        np.testing.assert_allclose(found[member, :, row], wanted, atol=1e-5)


def test_rewards_are_scaled_and_costs_are_not() -> None:
    batch = learner("bcq-lag", SMALL).sampler.draw()
    assert set(batch.costs.unique().tolist()) <= {0.0, 1.0}
    rates = {round(float(each.rewards[0]) * 0.1, 5) for each in EPISODES}
    assert {round(value, 5) for value in batch.rewards.unique().tolist()} <= rates


@BOTH
def test_the_policy_follows_reward_and_multiplied_cost(settings: BCQLagSettings) -> None:
    """One step of the perturbation from known networks: the loss, the multiplier and the direction are NumPy's."""
    settings = replace(settings, critic_learning_rate=1e-12, vae_learning_rate=1e-12, kp=2.0, ki=0.5)
    made, twin = learner("bcq-lag", settings), learner("bcq-lag", settings)
    made.threshold = torch.tensor([-1.0, 1.0])  # the new networks' values are about 0: one limit is broken, one kept
    batch = twin.sampler.draw()
    noise = twin.generators["noise"]
    noise.normal(16, 4), noise.normal(16 * 3, 4)  # those of the action model and of the targets
    latent = noise.normal(16, 4).clamp(-0.5, 0.5).double().numpy()
    figures = made.update(1)
    for member, threshold in enumerate((-1.0, 1.0)):
        states = batch.observations[member].double().numpy()
        decoded = np.tanh(by_hand(made.vae.decoder, member, np.concatenate([states, latent[member]], 1)))
        moved = by_hand(twin.actor, member, np.concatenate([states, decoded], 1))
        pairs = np.concatenate([states, np.clip(decoded + 0.05 * moved, -1, 1)], 1)
        values = np.stack([by_hand(made.critics, 8 * member + k, pairs)[:, 0] for k in range(8)])
        released = settings.actor_value == "lowest"
        value = (values[:4].min(0) if released else values[0]).mean()
        cost = (values[4:].min(0) if released else values[4:].max(0)).mean()
        multiplier = max(0.0, 2.5 * (cost - threshold) + 0.001 * (cost - threshold)) if cost > threshold else 0.0
        assert figures["multiplier"][member].item() == pytest.approx(multiplier, rel=1e-4)
        assert figures["policy_loss"][member].item() == pytest.approx(
            -value + multiplier * (cost - threshold), abs=1e-4
        )
    assert figures["multiplier"][0] > 1
    assert figures["multiplier"][1] == 0


def test_the_threshold_is_that_of_the_horizon() -> None:
    made = learner("bcq-lag", SMALL)
    assert made.threshold.tolist() == pytest.approx([q_threshold(limit, BALL.horizon, 0.99) for limit in (10, 40)])


def test_the_first_losses_are_pinned(tmp_path: Path) -> None:
    found = curve("bcq-lag", replace(SMALL, steps=10), tmp_path / "a", LOSSES)
    assert found == pytest.approx(PINNED, rel=2e-4)
    found = curve("bcq-lag", replace(SMALL, steps=10, **RELEASED), tmp_path / "b", LOSSES)
    assert found == pytest.approx(PINNED_RELEASED, rel=2e-4)


PINNED = [2.60005, 3.57051, 3.80998, 5.82488, 4.15343, 2.99163, 4.07333, 3.95062, 4.12862, 3.98455]
PINNED_RELEASED = [1.88868, 2.2347, 2.1612, 2.55114, 2.24187, 1.72603, 2.02916, 2.0773, 2.09793, 1.86498]


@BOTH
def test_it_acts(settings: BCQLagSettings, tmp_path: Path) -> None:
    check_acting(
        trained_policy(
            "bcq-lag",
            replace(settings, steps=12, discount=0.5, actor_learning_rate=0.05, critic_learning_rate=0.05),
            tmp_path,
        )
    )


def test_it_takes_the_best_candidate_that_keeps_the_limit(tmp_path: Path) -> None:
    """The critics of the folder are replaced by ones whose answer is known: Q = a_0, Qc = 10 a_1."""
    trained = training.train("bcq-lag", EPISODES, BALL, SMALL, (3,), tmp_path / "scratch")[0]
    obs, act = BALL.observation_dim, BALL.action_dim
    for tensors in trained.files.values():
        first = torch.zeros(5, obs + act, 8)
        first[0, obs, 0], first[0, obs, 1] = 1.0, -1.0
        first[1:, obs + 1, 0], first[1:, obs + 1, 1] = 10.0, -10.0
        second = torch.zeros(5, 8, 8)
        second[:, 0, 0] = second[:, 1, 1] = 1.0
        third = torch.zeros(5, 8, 1)
        third[:, 0], third[:, 1] = 1.0, -1.0
        tensors |= {"critics.weights.0": first, "critics.weights.1": second, "critics.weights.2": third}  # type: ignore[operator]
        tensors |= {f"critics.biases.{i}": torch.zeros(5, 1, 1 if i == 2 else 8) for i in range(3)}  # type: ignore[operator]
    rows = np.random.default_rng(0).normal(size=(6, obs)).astype(np.float32)

    def taken(threshold: float) -> tuple[np.ndarray, np.ndarray]:
        save_model(tmp_path / "model", trained.config | {"thresholds": [threshold] * 3}, trained.files)
        policy: Any = load_policy(tmp_path / "model")
        policy.reset(6, 10)
        networks, number = policy._networks[0], len(policy._latent)
        states = torch.from_numpy(rows).repeat_interleave(number, 0)[None]
        candidates = policy._decode(networks, states, policy._latent.repeat(6, 1)[None])[0].view(6, number, act)
        return policy.act(rows), candidates.numpy()

    actions, candidates = taken(1e9)
    np.testing.assert_array_equal(actions, candidates[np.arange(6), candidates[:, :, 0].argmax(1)])
    actions, candidates = taken(-1e9)
    np.testing.assert_array_equal(actions, candidates[np.arange(6), candidates[:, :, 1].argmin(1)])
    middle = float(np.median(candidates[..., 1]))
    actions, candidates = taken(10 * middle)
    for action, choices in zip(actions, candidates, strict=True):
        safe = choices[10 * choices[:, 1] <= 10 * middle + 1e-6]
        wanted = safe[safe[:, 0].argmax()] if len(safe) else choices[choices[:, 1].argmin()]
        np.testing.assert_allclose(action, wanted)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    trained_policy("bcq-lag", SMALL, tmp_path)
    config = read_json(tmp_path / "model/config.json")
    write_json(tmp_path / "model/config.json", config | {"thresholds": [1.0]})
    with pytest.raises(BadInput, match=r"not a configuration of BCQ-Lag.*1 thresholds for 3 limits"):
        load_policy(tmp_path / "model")
    write_json(tmp_path / "model/config.json", config | {"hidden": [9, 8]})
    with pytest.raises(BadInput, match=r"config\.json asks for"):
        load_policy(tmp_path / "model")
    for key, value in (("perturbation", None), ("acting_samples", "x"), ("cost_ensemble", "mean")):
        write_json(tmp_path / "model/config.json", config | {key: value})
        with pytest.raises(BadInput, match=f"not a configuration of BCQ-Lag.*{key} is "):
            load_policy(tmp_path / "model")
    write_json(tmp_path / "model/config.json", config)
    (tmp_path / "model/limit-20.safetensors").unlink()
    with pytest.raises(BadInput, match="no such file"):
        load_policy(tmp_path / "model")


@pytest.mark.parametrize(
    "bad", [{"critics": 0}, {"perturbation": 0.0}, {"low_weight": 1.5}, {"acting_samples": 0}, {"kp": -1}]
)
def test_settings_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        BCQLagSettings(**bad)
