"""CDE: its losses and unseen actions by hand, a small exact problem, pinned losses, resuming, members."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from springhead.rl.offline import training
from springhead.rl.offline.batches import flatten
from springhead.rl.offline.cde import CDE, CDESettings, apart
from springhead.rl.offline.contract import Member
from springhead.rl.policy import load_policy
from tests.rl.offline_data import BALL, spread
from tests.rl.offline_runs import check_resuming
from tests.rl.test_coptidice import GAMMA, GO, REWARDS, SHARES, STATES, Array, batch_of, chain, mlp

pytestmark = pytest.mark.unit
SMALL = CDESettings(steps=10, batch_size=16, hidden=(8, 8), alpha=0.1, checkpoint_every=3, report_every=1)


def learner(settings: CDESettings = SMALL, seeds: Sequence[int] = (3,)) -> CDE:
    return CDE("cde", flatten(spread(12), BALL), BALL, settings, [Member(seed) for seed in seeds])


def test_unseen_actions_fill_what_is_far_enough_evenly() -> None:
    uniform = (torch.arange(1000) + 0.5) / 1000
    # Around 0.3 at 0.1: [-1, 0.2] and [0.4, 1], together 1.8 long.
    found = apart(uniform, torch.tensor(0.3), 0.1)
    assert float((found - 0.3).abs().min()) >= 0.1 - 1e-6
    assert float((found < 0.2).float().mean()) == pytest.approx(1.2 / 1.8, abs=2e-3)
    assert float(found.min()) == pytest.approx(-1, abs=2e-3)
    assert float(found.max()) == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(apart(uniform, torch.tensor(0.3), 0.0), 2 * uniform - 1)
    edge = apart(uniform, torch.tensor(1.0), 0.1)
    assert -1 < float(edge.min()) < float(edge.max()) < 0.9


def test_losses_by_hand() -> None:
    made, batch = learner(), batch_of()
    first = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(5))
    unseen = torch.rand(1, 80, 2, generator=torch.Generator().manual_seed(6)) * 2 - 1
    made.sampler.draw = lambda: batch  # type: ignore[method-assign]
    made.sampler.draw_initial = lambda: first  # type: ignore[method-assign]
    made._unseen = lambda actions, mixture: unseen  # type: ignore[method-assign]
    with torch.no_grad():
        made.eta_v.fill_(0.2)
        made.eta_e.fill_(-0.1)
        made.advantage.biases[-1].sub_(0.1)
        made.advantage.weights[-1].mul_(100.0)
    v, v_next, v_first = (
        mlp(made.value, rows[0].numpy())[:, 0] for rows in (batch.observations, batch.next_observations, first)
    )
    e = mlp(made.advantage, torch.cat([batch.observations, batch.actions], -1)[0].numpy())[:, 0]
    repeated = np.tile(batch.observations[0].numpy(), (5, 1))
    others = mlp(made.advantage, np.concatenate([repeated, unseen[0].numpy()], 1))[:, 0]
    figures = made.update(1)
    a = batch.rewards[0].numpy() + 0.99 * (1 - batch.terminals[0].numpy()) * v_next - v
    y = (a - 0.2) / 0.1
    conjugate = np.where(y < 0, np.exp(np.minimum(y, 0)) - 1, y + 0.5 * y**2)
    assert float(figures["value_loss"]) == pytest.approx(0.1 * conjugate.mean() + 0.01 * v_first.mean(), rel=1e-4)
    assert float(figures["advantage_error"]) == pytest.approx(((e - a) ** 2).mean(), rel=1e-3)
    excess = (np.maximum(others + 0.1 - 0.1 * np.log(0.3), 0) ** 2).mean()  # f'(0.3) = log 0.3
    assert excess > 0
    assert float(figures["excess"]) == pytest.approx(excess, rel=1e-3)
    x = (e + 0.1) / 0.1
    w_e = np.where(x < 0, np.exp(np.minimum(x, 0)), x + 1)
    assert float(figures["mean_ratio"]) == pytest.approx(w_e.mean(), rel=1e-3)
    w_v = np.where(y < 0, np.exp(np.minimum(y, 0)), y + 1)
    assert float(made.eta_v) == pytest.approx(0.2 - 3e-4 * np.sign(1 - w_v.mean()), abs=1e-6)
    assert float(made.eta_e) == pytest.approx(-0.1 - 3e-4 * np.sign(1 - w_e.mean()), abs=1e-6)


def test_unseen_actions_keep_their_distance_in_each_component() -> None:
    made, batch = learner(), batch_of()
    _, mixture = made.extraction.imitate(batch)
    assert mixture is not None
    distance = mixture.spread().clamp(max=0.1)
    unseen = made._unseen(batch.actions, mixture).unflatten(1, (5, 16))
    assert unseen.shape == (1, 5, 16, 2)
    assert bool(((unseen - batch.actions[:, None]).abs() >= distance[:, None] - 1e-6).all())


def exact(alpha: float) -> Array:
    """The advantages less eta of the chain of test_coptidice, by a general solver over v and eta."""

    def gaps(x: Array) -> Array:
        v, eta = x[:-1], x[-1]
        found: Array = scaled + GAMMA * v[GO] - v[:, None] - eta
        return found

    def objective(x: Array) -> float:
        y = gaps(x) / alpha
        conjugate = np.where(y < 0, np.exp(np.minimum(y, 0)) - 1, y + 0.5 * y**2)
        return float(alpha * (SHARES * conjugate).sum() + x[-1] + (1 - GAMMA) * x[0])

    mean = (SHARES * REWARDS).sum()
    scaled = 0.1 * (REWARDS - mean) / np.sqrt((SHARES * (REWARDS - mean) ** 2).sum())
    found = minimize(objective, np.zeros(STATES + 1), method="BFGS", options={"gtol": 1e-9})
    return gaps(found.x)


def test_on_a_small_problem_the_ratios_are_exact_and_unseen_actions_are_bounded() -> None:
    task, flat = chain()
    settings = CDESettings(
        steps=600, batch_size=256, hidden=(32,), alpha=0.1, discount=GAMMA, learning_rate=1e-2, extraction="weighted-bc"
    )
    flat = replace(flat, starts=torch.tensor([0, 1]))  # both in state 0
    made = CDE("cde", flat, task, settings, [Member(0)])
    ratios, course = [], []
    shift, scale = made.moments
    rows = (torch.eye(STATES) - shift) / scale
    for step in range(1, 601):
        if step == 350:
            for group in made.optimisers["adam"].param_groups:
                group["lr"] *= 0.1
        figures = made.update(step)
        if step > 450:
            with torch.no_grad():
                v = made.value(rows[None])[0, 0].numpy()
            mean = (SHARES * REWARDS).sum()
            rewards = 0.1 * (REWARDS - mean) / np.sqrt((SHARES * (REWARDS - mean) ** 2).sum())
            y = (rewards + GAMMA * v[GO] - v[:, None] - float(figures["eta_v"])) / 0.1
            ratios.append(np.where(y < 0, np.exp(np.minimum(y, 0)), y + 1))
            course.append(float(figures["mean_ratio"]))
    y = exact(0.1) / 0.1
    wanted = np.where(y < 0, np.exp(np.minimum(y, 0)), y + 1)
    assert (SHARES * wanted).sum() == pytest.approx(1, abs=1e-3)  # what eta is for
    np.testing.assert_allclose(np.mean(ratios, axis=0), wanted, atol=0.12)
    assert np.mean(course) == pytest.approx(1, abs=0.1)
    # Far from the data's -.5 and .5, the estimated ratio is at most about the bound.
    with torch.no_grad():
        far = torch.cat([rows.repeat(2, 1), torch.tensor([-1.0, 1.0]).repeat_interleave(STATES)[:, None]], 1)
        estimates = made.advantage(far[None])[0, 0].numpy()
    at_most = float(made.eta_e) + 0.1 * np.log(0.3)
    without = CDE("cde", flat, task, replace(settings, zeta=1.0), [Member(0)])
    for step in range(1, 151):
        without.update(step)
    with torch.no_grad():
        free = without.advantage(far[None])[0, 0].numpy() - float(without.eta_e)
    assert (estimates < at_most + 0.1).all()
    assert free.max() > (estimates - float(made.eta_e)).max()


READINGS: dict[str, dict[str, str]] = {
    "info-projection": {},
    "weighted-bc": {"extraction": "weighted-bc"},
    "weighted-bc released": {"extraction": "weighted-bc", "weighting": "released"},
}


@pytest.mark.parametrize("reading", sorted(READINGS))
def test_the_first_losses_are_pinned(tmp_path: Path, reading: str) -> None:
    losses: list[float] = []

    def keep(step: int, figures: dict[str, float]) -> None:
        losses.append(figures["value_loss"] + figures["excess"] + figures["policy_loss"] + figures["behaviour_loss"])

    settings = replace(SMALL, **READINGS[reading])  # type: ignore[arg-type]
    training.train("cde", spread(12), BALL, settings, (3,), tmp_path, keep)
    assert losses == pytest.approx(PINNED[reading], rel=1e-3, abs=1e-4)


PINNED = {
    "info-projection": [1.54281, 1.39838, 0.7244, -0.19243, 0.27538, 0.05223, 0.19834, 1.05233, 0.57571, 0.28754],
    "weighted-bc": [0.05786, 0.08078, 1.17842, 0.38111, 0.48585, 0.08639, 0.08802, 0.85533, 0.83041, 0.64921],
    "weighted-bc released": [0.05786, 0.08078, 1.17468, 0.38349, 0.48414, 0.08439, 0.08782, 0.8553, 0.82563, 0.6414],
}


@pytest.mark.parametrize("extraction", ["info-projection", "weighted-bc"])
def test_killed_and_resumed_equals_uninterrupted_and_it_acts(tmp_path: Path, extraction: str) -> None:
    settings = replace(SMALL, extraction=extraction)  # type: ignore[arg-type]
    check_resuming("cde", settings, tmp_path, 8, 6, spread(12))
    policy = load_policy(tmp_path / "a")
    policy.reset(3, 20)
    actions = policy.act(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    assert actions.shape == (3, 2)
    assert (np.abs(actions) <= 1).all()


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


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"alpha": 0.0}, {"zeta": 0.0}, {"distance": 1.0}, {"unseen": 0}, {"warm_up": 1.5}, {"bound": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CDESettings(**wrong)  # type: ignore[arg-type]
