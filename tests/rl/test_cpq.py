"""CPQ: its targets, unsupported actions and policy's loss by hand, its steps pinned, resumed and side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.offline.cpq import CPQSettings
from tests.rl.offline_runs import (
    batch_with_ends,
    by_hand,
    curve,
    learner,
    moved_targets,
)

pytestmark = pytest.mark.unit
SMALL = CPQSettings(
    steps=6, batch_size=16, hidden=(8, 8), vae_hidden=(8, 8), samples=4, checkpoint_every=2, report_every=1
)
RELEASED: dict[str, Any] = {
    "unsupported": "released", "actor_gradient": "indicator", "cost_ensemble": "min", "timeouts": "terminal",
    "cost_terminals": "ignored",
}  # fmt: skip
LOSSES = ("vae_loss", "reward_critic_loss", "cost_critic_loss", "policy_loss", "alpha")
BOTH = pytest.mark.parametrize("settings", [SMALL, replace(SMALL, **RELEASED)], ids=["intended", "released"])


def divergences(made: Any, member: int, pairs: np.ndarray) -> np.ndarray:
    mean, log_std = np.split(by_hand(made.vae.encoder, member, pairs), 2, axis=1)
    found: np.ndarray = 0.5 * (mean**2 + np.exp(2 * log_std) - 1 - 2 * log_std).mean(1)
    return found


@BOTH
def test_the_targets_by_hand(settings: CPQSettings) -> None:
    made = learner("cpq", settings)
    moved_targets(made.target_critics, made.target_cost_critics)
    generator = torch.Generator().manual_seed(0)
    batch, noise = batch_with_ends(made), torch.randn(2, 16, 2, generator=generator)
    latent = torch.randn(2, 16, 4, generator=generator).clamp(-0.5, 0.5)
    released, q, qc = settings.cost_ensemble == "min", np.zeros((2, 16)), np.zeros((2, 16))
    supported, bounds = np.ones((2, 16), dtype=bool), np.zeros((2, 1))
    for member in range(2):
        states = batch.next_observations[member].double().numpy()
        mean, log_std = np.split(by_hand(made.actor.net, member, states), 2, axis=1)
        actions = np.tanh(mean + np.exp(log_std) * noise[member].numpy())
        both = np.concatenate([states, actions], 1)
        q[member] = np.min([by_hand(made.target_critics, 2 * member + k, both)[:, 0] for k in range(2)], axis=0)
        divergence = divergences(made, member, both)
        bounds[member] = np.median(divergence)  # half of the actions are supported
        if not released:
            supported[member] = divergence < bounds[member]
            decoded = np.tanh(by_hand(made.vae.decoder, member, np.concatenate([states, latent[member].numpy()], 1)))
            both = np.concatenate([states, np.where(supported[member][:, None], actions, decoded)], 1)
        costs = [by_hand(made.target_cost_critics, 2 * member + k, both)[:, 0] for k in range(2)]
        qc[member] = np.min(costs, axis=0) if released else np.max(costs, axis=0)
    thresholds = np.median(qc, axis=1)  # kept in half of the rows
    made.threshold = torch.tensor(thresholds, dtype=torch.float32)
    bound = torch.tensor(bounds, dtype=torch.float32)
    rewards, costs_found = (found.numpy() for found in made.targets(batch, noise, latent, bound))
    on, cost_on = np.ones((2, 16)), np.ones((2, 16))
    on[:, 0] = 0
    on[:, 1] = 0 if released else 1
    cost_on[:, 0] = 1 if released else 0
    safe = supported & (qc <= thresholds[:, None])
    assert 0 < safe.sum() < supported.sum()
    np.testing.assert_allclose(rewards, batch.rewards.numpy() + 0.99 * on * safe * q, atol=1e-5)
    np.testing.assert_allclose(costs_found, batch.costs.numpy() + 0.99 * cost_on * qc, atol=1e-5)


def test_suspects_are_the_actions_of_the_highest_divergence() -> None:
    made = learner("cpq", SMALL)
    observations, noise = torch.randn(2, 16, 8), torch.randn(2, 16, 4, 2)
    with torch.no_grad():
        mean, log_std = made.actor(observations)
    found, highest = made.suspects(observations, mean, log_std, noise)
    assert found.shape == (2, 16, 10)
    actions = torch.tanh(mean[:, :, None] + log_std.exp()[:, :, None] * noise).numpy()
    for member in range(2):
        pairs = np.concatenate([observations[member].numpy().repeat(4, 0), actions[member].reshape(64, 2)], 1)
        kl = divergences(made, member, pairs)
        chosen = np.argsort(kl)[-16:]
        np.testing.assert_allclose(np.sort(highest[member].numpy()), kl[chosen], atol=1e-5)
        order, others = np.lexsort(found[member].numpy().T), np.lexsort(pairs[chosen].T)
        np.testing.assert_allclose(found[member].numpy()[order], pairs[chosen][others], atol=1e-6)


def cost_critics_after_a_step(settings: CPQSettings, log_alpha: float) -> list[torch.Tensor]:
    made = learner("cpq", settings)
    made.modules.get_buffer("log_alpha").fill_(log_alpha)
    made.update(1)
    return [value.detach().clone() for value in made.cost_critics.parameters()]


def test_the_constraint_on_unsupported_actions_binds_and_the_released_one_does_not() -> None:
    half = replace(SMALL, quantile=0.5)  # a new action model's divergences are all alike
    weak, strong = (cost_critics_after_a_step(half, value) for value in (-5.0, 5.0))
    assert any(not torch.equal(a, b) for a, b in zip(weak, strong, strict=True))
    weak, strong = (cost_critics_after_a_step(replace(SMALL, **RELEASED), value) for value in (-5.0, 5.0))
    assert all(torch.equal(a, b) for a, b in zip(weak, strong, strict=True))


def test_unsupported_actions_become_dearer_than_those_of_the_data() -> None:
    """The data's actions follow from the states; the opposite ones are never seen."""
    settings = replace(SMALL, hidden=(16, 16), critic_learning_rate=1e-2, vae_learning_rate=1e-2)
    differences = {}
    for name, chosen in (("intended", settings), ("released", replace(settings, **RELEASED))):
        made = learner("cpq", chosen, limits=(10.0,))
        for step in range(1, 121):
            made.update(step)
        batch = made.sampler.draw()
        with torch.no_grad():
            unseen, seen = (
                made.cost_critics(torch.cat([batch.observations, actions], -1)).mean()
                for actions in (-0.9 * batch.actions.sign(), batch.actions)
            )
        differences[name] = float(unseen - seen)
    assert differences["intended"] > differences["released"] + 1.0


@BOTH
def test_the_policy_follows_safe_values_and_flees_from_unsafe_ones(settings: CPQSettings) -> None:
    """One step of all networks from known ones: losses, gradient of the policy and alpha are computed independently."""
    settings = replace(
        settings, critic_learning_rate=1e-12, vae_learning_rate=1e-12, alpha_learning_rate=0.1, quantile=0.5
    )
    made, twin = learner("cpq", settings), learner("cpq", settings)
    batch, noise = twin.sampler.draw(), twin.generators["noise"]
    drawn_for_vae = noise.normal(16, 4)
    noise.normal(16, 4), noise.normal(16, 2)  # those of the targets
    intended = settings.actor_gradient == "penalty"
    drawn = noise.normal(16, 4, 2) if intended else None
    last = noise.normal(16, 2)
    mean, log_std = twin.actor(batch.observations)
    inputs = torch.cat([batch.observations, torch.tanh(mean + log_std.exp() * last)], -1)
    value, both = twin.critics(inputs).amin(1), twin.cost_critics(inputs)
    cost = both.amax(1) if intended else both.amin(1)
    made.threshold = cost.detach().median(1).values
    threshold = made.threshold[:, None]
    loss = -torch.where(cost <= threshold, value, 0.0).mean(1)
    if intended:
        loss = loss + value.detach().abs().mean(1) * torch.where(cost > threshold, cost - threshold, 0.0).mean(1)
    _, known = twin.vae.loss(batch.observations, batch.actions, drawn_for_vae, 0.5)
    figures = made.update(1)
    torch.testing.assert_close(figures["policy_loss"], loss.detach(), rtol=1e-4, atol=1e-5)
    assert figures["safe"].tolist() == pytest.approx([0.5, 0.5])
    loss.sum().backward()
    for own, other in zip(made.actor.parameters(), twin.actor.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-2, atol=1e-4)
    if drawn is not None:
        with torch.no_grad():
            pairs, highest = made.suspects(batch.observations, *twin.actor(batch.observations), drawn)
        for member in range(2):
            bound = np.quantile(known[member].detach().numpy(), 0.5)
            beyond = (highest[member].numpy() >= bound).nonzero()[0]
            assert len(beyond) > 0
            assert figures["unsupported"][member].item() == pytest.approx(len(beyond) / 64)
            both = [by_hand(twin.cost_critics, 2 * member + k, pairs[member].numpy()[beyond]).mean() for k in range(2)]
            excess = np.mean(both) - 1.5 * float(made.threshold[member])
            assert figures["unsupported_excess"][member].item() == pytest.approx(excess, abs=1e-4)
            assert made.modules.get_buffer("log_alpha")[member].item() == pytest.approx(-0.1 * excess, abs=1e-5)


def test_an_unsafe_action_moves_in_the_intended_reading_alone() -> None:
    for chosen, moves in ((SMALL, True), (replace(SMALL, **RELEASED), False)):
        made = learner("cpq", chosen)
        made.threshold = torch.tensor([-1e3, -1e3])  # every action is unsafe
        made.update(1)
        assert any(bool(parameter.grad.any()) for parameter in made.actor.parameters()) == moves


def test_the_first_losses_are_pinned(tmp_path: Path) -> None:
    found = curve("cpq", replace(SMALL, steps=10), tmp_path / "a", LOSSES)
    assert found == pytest.approx(PINNED, rel=2e-4)
    found = curve("cpq", replace(SMALL, steps=10, **RELEASED), tmp_path / "b", LOSSES)
    assert found == pytest.approx(PINNED_RELEASED, rel=2e-4)


PINNED = [2.27483, 2.52253, 2.70653, 3.29213, 2.66725, 2.40058, 2.64978, 2.83885, 2.70934, 2.73481]
PINNED_RELEASED = [2.12745, 2.29614, 2.42374, 2.78131, 2.39062, 2.24906, 2.37766, 2.51816, 2.46082, 2.52047]


@pytest.mark.parametrize(
    "bad", [{"critics": 0}, {"quantile": 1.5}, {"share": -0.5}, {"margin": 0.0}, {"alpha_learning_rate": -1.0}]
)
def test_settings_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        CPQSettings(**bad)
