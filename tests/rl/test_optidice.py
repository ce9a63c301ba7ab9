"""OptiDICE: its losses by hand in NumPy, pinned losses, resuming, members, and acting."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.offline import training
from springhead.rl.offline.batches import flatten, moments
from springhead.rl.offline.contract import Member
from springhead.rl.offline.optidice import OptiDICE, OptiDICESettings
from springhead.rl.policy import load_policy
from tests.rl.offline_data import BALL, spread
from tests.rl.offline_runs import check_resuming
from tests.rl.test_coptidice import batch_of, mlp

pytestmark = pytest.mark.unit
SMALL = OptiDICESettings(steps=10, batch_size=16, hidden=(8, 8), alpha=0.1, checkpoint_every=3, report_every=1)


def learner(settings: OptiDICESettings = SMALL, seeds: Sequence[int] = (3,)) -> OptiDICE:
    return OptiDICE("optidice", flatten(spread(12), BALL), BALL, settings, [Member(seed) for seed in seeds])


def test_losses_by_hand() -> None:
    made, batch = learner(), batch_of()
    first = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(5))
    made.sampler.draw = lambda: batch  # type: ignore[method-assign]
    made.sampler.draw_initial = lambda: first  # type: ignore[method-assign]
    with torch.no_grad():
        made.eta.fill_(0.2)
        made.value.biases[-1].add_(0.3)
    v, v_next, v_first = (
        mlp(made.value, rows[0].numpy())[:, 0] for rows in (batch.observations, batch.next_observations, first)
    )
    e = mlp(made.advantage, torch.cat([batch.observations, batch.actions], -1)[0].numpy())[:, 0]
    figures = made.update(1)  # of the warm-up
    a = batch.rewards[0].numpy() + 0.99 * (1 - batch.terminals[0].numpy()) * v_next - v
    y = (a - 0.2) / 0.1
    w = np.where(y < 0, np.exp(np.minimum(y, 0)), y + 1)
    g = np.where(y < 0, (np.minimum(y, 0) - 1) * np.exp(np.minimum(y, 0)) + 1, 0.5 * y**2)
    assert float(figures["value_loss"]) == pytest.approx(
        (w * (a - 0.2) - 0.1 * g).mean() + 0.01 * v_first.mean(), rel=1e-4
    )
    assert float(figures["mean_ratio"]) == pytest.approx(w.mean(), rel=1e-4)
    assert float(figures["advantage_error"]) == pytest.approx(((e - a) ** 2).mean(), rel=1e-4)
    # eta's slope is 1 - E[w]; Adam's first step is the learning rate against its sign.
    assert float(made.eta) == pytest.approx(0.2 - 3e-4 * np.sign(1 - w.mean()), abs=1e-6)
    assert float(figures["policy_loss"]) == float(figures["entropy"]) == 0.0


@pytest.mark.parametrize(("share", "weighted"), [(1.0, False), (0.9, True)])
def test_the_projection_by_hand(share: float, weighted: bool) -> None:
    made, batch = learner(), batch_of()
    weights = torch.linspace(0, 2, 16)[None] if weighted else torch.ones(1, 16)
    batch = batch._replace(costs=weights)
    noise = torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(1))
    made.generators["noise"].normal = lambda *shape: noise  # type: ignore[method-assign]
    _, mixture = made.extraction.imitate(batch)
    loss, entropy = made.extraction.project(batch, weights, lambda actions: actions.sum(-1), mixture, share)
    mean, log_std = np.split(mlp(made.extraction.actor.net, batch.observations[0].numpy()), 2, axis=1)
    before = mean + np.exp(log_std) * noise[0].numpy()
    own = (-0.5 * noise[0].numpy() ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(1)
    assert mixture is not None
    behaviour = mixture.log_prob_before(torch.from_numpy(before).float()[None])[0].numpy()
    squashed = own - np.log(1 - np.tanh(before) ** 2).sum(1)
    gain = weights[0].numpy() * (np.tanh(before).sum(1) - own + share * behaviour)
    # The temperature begins at 1; its own loss, log 1 times the gap, is 0.
    assert float(loss.detach()) == pytest.approx((squashed - gain).mean(), rel=1e-3)
    assert float(entropy) == pytest.approx(-squashed.mean(), rel=1e-3)
    loss.sum().backward()
    slope = made.extraction.log_temperature.grad
    assert slope is not None
    assert float(slope) == pytest.approx(-squashed.mean() + 2, rel=1e-3)  # the target is -|A|


@pytest.mark.parametrize("weighting", ["each", "released"])
def test_weighted_imitation_by_hand(weighting: str) -> None:
    settings = replace(SMALL, extraction="weighted-bc", weighting=weighting, entropy=False)  # type: ignore[arg-type]
    made, batch = learner(settings), batch_of()
    ratios = torch.linspace(0, 3, 16)[None]
    nothing, mixture = made.extraction.imitate(batch)
    assert mixture is None
    assert float(nothing) == 0.0
    loss, _ = made.extraction.project(batch, ratios, lambda actions: actions.sum(-1), mixture)
    mean, log_std = np.split(mlp(made.extraction.actor.net, batch.observations[0].numpy()), 2, axis=1)
    actions = batch.actions[0].numpy()
    at = np.arctanh(actions)
    log_prob = -0.5 * ((at - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - actions**2)
    w, likelihood = ratios[0].numpy(), log_prob.sum(1)
    expected = (w * likelihood).mean() if weighting == "each" else w.mean() * likelihood.mean()
    assert float(loss.detach()) == pytest.approx(-expected, rel=1e-3)
    assert (w * likelihood).mean() != pytest.approx(w.mean() * likelihood.mean(), rel=1e-2)


def test_the_policy_waits_for_the_warm_up() -> None:
    made = learner(replace(SMALL, warm_up=0.5))
    before = {name: tensor.clone() for name, tensor in made.weights(0).items()}
    for step in range(1, 6):
        made.update(step)
    assert all((tensor == before[name]).all() for name, tensor in made.weights(0).items())
    made.update(6)
    assert any((tensor != before[name]).any() for name, tensor in made.weights(0).items())


READINGS: dict[str, dict[str, str]] = {
    "info-projection": {},
    "weighted-bc": {"extraction": "weighted-bc"},
    "weighted-bc released": {"extraction": "weighted-bc", "weighting": "released"},
}


@pytest.mark.parametrize("reading", sorted(READINGS))
def test_the_first_losses_are_pinned(tmp_path: Path, reading: str) -> None:
    losses: list[float] = []

    def keep(step: int, figures: dict[str, float]) -> None:
        losses.append(
            figures["value_loss"] + figures["advantage_error"] + figures["policy_loss"] + figures["behaviour_loss"]
        )

    settings = replace(SMALL, **READINGS[reading])  # type: ignore[arg-type]
    training.train("optidice", spread(12), BALL, settings, (3,), tmp_path, keep)
    assert losses == pytest.approx(PINNED[reading], rel=1e-3, abs=1e-4)


PINNED = {
    "info-projection": [1.53978, 1.39179, 1.06869, 0.05341, 0.59896, 0.34263, 0.45298, 1.34489, 0.86749, 0.60647],
    "weighted-bc": [0.05483, 0.07419, 1.17278, 0.3742, 0.475, 0.07823, 0.07549, 0.83599, 0.80799, 0.62355],
    "weighted-bc released": [0.05483, 0.07419, 1.16938, 0.37667, 0.47392, 0.07644, 0.07566, 0.83618, 0.80589, 0.62091],
}


def test_states_are_not_chosen_for_an_imitation_that_has_no_projection() -> None:
    with pytest.raises(BadInput, match=r"policy_data is 'successes'.*weighted-bc has none: use"):
        replace(SMALL, policy_data="successes", extraction="weighted-bc")


def test_killed_and_resumed_equals_uninterrupted_and_it_acts(tmp_path: Path) -> None:
    whole = check_resuming("optidice", SMALL, tmp_path, 8, 6, spread(12))
    policy = load_policy(tmp_path / "a")
    policy.reset(3, 20)
    observations = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    shift, scale = (each.numpy() for each in moments(flatten(spread(12), BALL)))
    rows, tensors = (observations - shift) / scale, whole.files["policy.safetensors"]
    for layer in range(3):
        rows = rows @ tensors[f"weights.{layer}"][0].numpy() + tensors[f"biases.{layer}"][0].numpy()
        rows = np.maximum(rows, 0) if layer < 2 else np.tanh(rows)
    np.testing.assert_allclose(policy.act(observations), rows, rtol=1e-4, atol=1e-6)


def test_members_together_equal_members_alone() -> None:
    together = learner(seeds=(3, 4))
    for step in range(1, 6):
        figures = together.update(step)
    for number, seed in enumerate((3, 4)):
        alone = learner(seeds=(seed,))
        for step in range(1, 6):
            own = alone.update(step)
        for name, figure in own.items():
            torch.testing.assert_close(figures[name][number], figure[0], rtol=1e-3, atol=1e-4)
