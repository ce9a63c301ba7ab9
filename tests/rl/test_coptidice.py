"""COptiDICE's losses and thresholds by hand, that its constraint binds, and that it finds a known optimum."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.offline import training
from springhead.rl.offline.batches import Batch, Flat, flatten
from springhead.rl.offline.contract import Member, OnStep
from springhead.rl.offline.coptidice import COptiDICE, COptiDICESettings, step_threshold
from springhead.rl.policy import load_policy, save_model
from springhead.rl.tasks import Task
from tests.rl.offline_data import BALL, dataset, episode, spread

pytestmark = pytest.mark.unit
SMALL = COptiDICESettings(steps=10, batch_size=16, hidden=(8, 8), checkpoint_every=3, report_every=1)
RELEASED = {
    "threshold": "released",
    "likelihood": "released",
    "timeouts": "terminal",
    "initial": "marked",
    "chi_slope": "released",
}
Array = np.ndarray[Any, Any]


def quiet(step: int, figures: dict[str, float]) -> None:
    pass


def learner(settings: COptiDICESettings = SMALL, members: Sequence[Member] = (Member(3, 10.0),)) -> COptiDICE:
    return COptiDICE("coptidice", flatten(spread(12), BALL), BALL, settings, members)


def train(
    scratch: Path, settings: COptiDICESettings = SMALL, on_step: OnStep = quiet, seeds: Sequence[int] = (3,)
) -> list[training.Trained]:
    return training.train("coptidice", spread(12), BALL, settings, seeds, scratch, on_step)


def soft(x: float) -> float:
    return float(np.log1p(np.exp(x)))


def mlp(net: Any, inputs: Array, number: int = 0) -> Array:
    """One network in NumPy."""
    rows = inputs
    for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        rows = rows @ weight[number].detach().numpy() + bias[number].detach().numpy()
        rows = np.maximum(rows, 0) if layer < len(net.weights) - 1 else rows
    return rows


def batch_of(size: int = 16) -> Batch:
    rng = np.random.default_rng(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(1, size, *shape)).astype(np.float32))

    terminals, timeouts, initial = (torch.zeros(1, size) for _ in range(3))
    terminals[0, 1] = timeouts[0, 2] = initial[0, 0] = initial[0, 3] = 1.0
    costs = (rows() > 0).float()
    return Batch(rows(8), 0.9 * rows(2).tanh(), rows(), costs, rows(8), terminals, timeouts, initial)


def test_the_threshold_is_on_the_scale_of_a_steps_cost() -> None:
    assert step_threshold(10, 300, COptiDICESettings()) == pytest.approx(10 / 300)
    cut = COptiDICESettings(timeouts="terminal")
    assert step_threshold(10, 300, cut) == pytest.approx(0.031699, abs=1e-6)  # (1 - gamma) q_thr
    assert step_threshold(10, 300, COptiDICESettings(threshold="released")) == pytest.approx(3.1699, abs=1e-4)


@pytest.mark.parametrize("released", [False, True])
def test_losses_and_ratios_by_hand(released: bool) -> None:
    settings = replace(SMALL, **(RELEASED if released else {"first_observations": 4}))  # type: ignore[arg-type]
    made = learner(settings)
    with torch.no_grad():
        made.raw_lambda.fill_(0.3)
        made.raw_tau.fill_(-0.5)
        made.values.biases[-1].add_(torch.tensor([0.1, 0.0, 0.4, 0.3])[:, None, None])
    batch = batch_of()
    first = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(5))
    made.sampler.draw_initial = lambda: first  # type: ignore[method-assign]
    loss, ratios, figures = made._ratio_loss(batch)

    def value(rows: torch.Tensor, kind: int) -> Array:
        return np.minimum(*(mlp(made.values, rows[0].numpy(), 2 * kind + i)[:, 0] for i in (0, 1)))

    b = Batch(*(part[0].numpy() for part in batch))
    going_on = 1 - b.terminals - (b.timeouts if released else 0)
    nu, nu_next = value(batch.observations, 0), value(batch.next_observations, 0)
    chi, chi_next = value(batch.observations, 1), value(batch.next_observations, 1)
    if released:
        nu_first, chi_first = (v * b.initial / (12 / 240) for v in (nu, chi))  # 12 episodes of 20 steps
    else:
        nu_first, chi_first = (np.tile(value(first[:, :4], kind), 4) for kind in (0, 1))
    weight, tau = soft(0.3), soft(-0.5)
    e = b.rewards - weight * b.costs + 0.99 * going_on * nu_next - nu
    w = np.where(e < 0, np.exp(np.minimum(e, 0) / 0.5), e / 0.5 + 1)
    f = np.where(w < 1, w * np.log(w) - w + 1, 0.5 * (w - 1) ** 2)
    np.testing.assert_allclose(ratios[0].numpy(), w, rtol=1e-4)
    nu_loss = 0.01 * nu_first.mean() + (w * e - 0.5 * f).mean()
    assert float(figures["nu_loss"]) == pytest.approx(nu_loss, rel=1e-4)
    ell = 0.01 * chi_first + w * (b.costs + 0.99 * going_on * chi_next - chi)
    share = np.exp(ell / tau - (ell / tau).max())
    share /= share.sum()
    divergence = (16 * share * np.log(16 * share) - 16 * share + 1).mean()
    cost = (share * w * b.costs).sum()
    assert float(figures["cost"]) == pytest.approx(cost, rel=1e-4)
    chi_loss = (share * ell).sum()
    threshold = float(made.limit[0])
    expected = nu_loss + chi_loss + tau * (0.01 - divergence) + weight * (threshold - cost)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    # The slopes of the multipliers: softplus' times what their loss multiplies.
    loss.sum().backward()
    sigmoid = 1 / (1 + np.exp(-np.array([0.3, -0.5])))
    assert made.raw_lambda.grad is not None
    assert made.raw_tau.grad is not None
    assert float(made.raw_lambda.grad) == pytest.approx(sigmoid[0] * (threshold - cost), rel=1e-3)
    assert float(made.raw_tau.grad) == pytest.approx(sigmoid[1] * (0.01 - divergence), rel=1e-3)
    # chi's bias in the smaller network moves l by (1 - gamma) or by w (gamma - 1), each weighted by the softmax.
    part = share if not released else share * (1 + (ell - chi_loss) / tau)
    push = 0.01 * (b.initial / 0.05 if released else 1) + w * (0.99 * going_on * 1.0 - 1.0)
    found = made.values.biases[-1].grad
    assert found is not None
    assert float(found[2:].sum()) == pytest.approx((part * push).sum(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("likelihood", ["squashed", "released"])
def test_the_policys_loss_by_hand(likelihood: str) -> None:
    made = learner(replace(SMALL, likelihood=likelihood))  # type: ignore[arg-type]
    batch, ratios = batch_of(), torch.linspace(0.0, 3.0, 16)[None]
    noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(1))
    made.generators["noise"].normal = lambda *shape: noise  # type: ignore[method-assign]
    data = flatten(spread(12), BALL)
    shaken = 0.1 * np.concatenate([data.observations.numpy().std(0), data.actions.numpy().std(0)]) * noise[0].numpy()
    mean, log_std = np.split(mlp(made.actor.net, batch.observations[0].numpy() + shaken[:, :8]), 2, axis=1)
    actions = batch.actions[0].numpy() + shaken[:, 8:]
    at = actions if likelihood == "released" else np.arctanh(np.clip(actions, -1 + 1e-6, 1 - 1e-6))
    log_prob = -0.5 * ((at - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    if likelihood == "squashed":
        log_prob -= np.log(1 - np.tanh(at) ** 2)
    expected = -(ratios[0].numpy() * log_prob.sum(1)).mean()
    assert float(made._actor_loss(batch, ratios)) == pytest.approx(expected, rel=1e-3)


def costly(cost: int) -> list[Episode]:
    """Episodes that all cost something at every step but one, and one free one so that a limit can be kept."""
    return [*dataset([(10.0 + i, cost) for i in range(8)]), episode(9.0, 0, seed=99)]


@pytest.mark.parametrize(("mode", "rises"), [("visitation", True), ("released", False)])
def test_where_every_step_costs_lambda_rises(mode: str, rises: bool) -> None:
    settings = replace(SMALL, hidden=(16,), threshold=mode, critic_learning_rate=3e-2, discount=0.8)  # type: ignore[arg-type]
    short = replace(BALL, horizon=20)  # so that the limit 10 is half of the steps
    made = COptiDICE("coptidice", flatten(costly(20), short), short, settings, [Member(0, 10.0)])
    course = [float(made.update(step)["multiplier"]) for step in range(1, 121)]
    # The ratios' mean begins at exp(-lambda / alpha) and first has to come up to 1: nu falls to -lambda / (1 - gamma).
    assert (np.diff(course[60:]) > 0).all() == rises
    assert (np.diff(course) < 0).all() != rises


# -- a CMDP with a known optimum ----------------------------------------------------------------

STATES = 3
GAMMA = 0.9
GO = np.array([[0, 1], [1, 2], [2, 0]])  # action 0 stays, action 1 moves on
REWARDS = np.array([[0.0, 0.5], [1.0, 0.0], [0.2, 0.3]])
COSTS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
SHARES = np.array([[0.2, 0.2], [0.15, 0.15], [0.1, 0.2]])  # of states and actions in the data


def chain() -> tuple[Task, Flat]:
    """Every transition as often as its share, from the data's own start state 0; one-hot states, actions -.5 and .5."""
    counts = np.rint(SHARES * 200).astype(int)
    pairs = np.array([(s, a) for s in range(STATES) for a in (0, 1) for _ in range(counts[s, a])])
    eye = torch.eye(STATES)
    ends = torch.zeros(len(pairs))
    # Two "episodes", so that there are costs to compare; where they begin only matters for first observations.
    starts = torch.tensor([0, 1])
    rewards, costs = REWARDS[tuple(pairs.T)], COSTS[tuple(pairs.T)]
    flat = Flat(
        observations=eye[pairs[:, 0]],
        next_observations=eye[GO[tuple(pairs.T)]],
        actions=torch.from_numpy(pairs[:, 1:] - 0.5).float(),
        rewards=torch.from_numpy(rewards).float(),
        costs=torch.from_numpy(costs).float(),
        terminals=ends,
        timeouts=ends,
        starts=starts,
        lengths=torch.tensor([1, len(pairs) - 1]),
        returns=np.array([rewards[0], rewards[1:].sum()]),
        cost_returns=np.array([costs[0], costs[1:].sum()]),
    )
    return replace(BALL, observation_dim=STATES, action_dim=1, horizon=100), flat


def optimum(alpha: float, limit: float) -> Array:
    """The constrained visitation by a general solver: max E_d[r] - alpha D_f(d, D) under the flow and the cost."""

    def divergence(d: Array) -> float:
        x = np.maximum(d / SHARES.ravel(), 1e-12)
        return float((SHARES.ravel() * np.where(x < 1, x * np.log(x) - x + 1, 0.5 * (x - 1) ** 2)).sum())

    def flow(d: Array) -> Array:
        arrives = np.zeros(STATES)
        np.add.at(arrives, GO.ravel(), d)
        return d.reshape(STATES, 2).sum(1) - (1 - GAMMA) * np.eye(STATES)[0] - GAMMA * arrives

    found = minimize(
        lambda d: -(d @ REWARDS.ravel()) + alpha * divergence(d),
        SHARES.ravel(),
        bounds=[(1e-9, 1)] * 6,
        constraints=[{"type": "eq", "fun": flow}, {"type": "ineq", "fun": lambda d: limit - d @ COSTS.ravel()}],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    visits: Array = found.x.reshape(STATES, 2)
    return visits


@pytest.mark.parametrize("limit", [10.0, 30.0])
def test_on_a_small_cmdp_the_weights_are_those_of_the_constrained_optimum(limit: float) -> None:
    task, flat = chain()
    settings = COptiDICESettings(
        batch_size=256, hidden=(16,), alpha=0.2, discount=GAMMA, reward_scale=1.0, ensemble=1, bound_divergence=0.0,
        critic_learning_rate=2e-2, scalar_learning_rate=2e-2, first_observations=1,
    )  # fmt: skip
    made = COptiDICE("coptidice", flat, task, settings, [Member(0, limit)])
    ratios = []
    for step in range(1, 701):
        if step == 420:
            for group in made.optimisers["adam"].param_groups:
                group["lr"] *= 0.1
        figures = made.update(step)
        if step > 550:
            with torch.no_grad():
                nu = made.values(torch.eye(STATES)[None])[0, 0].numpy()
            e = REWARDS - float(figures["multiplier"]) * COSTS + GAMMA * nu[GO] - nu[:, None]
            ratios.append(np.where(e < 0, np.exp(np.minimum(e, 0) / 0.2), e / 0.2 + 1))
    found, wanted = SHARES * np.mean(ratios, axis=0), optimum(0.2, limit / 100)
    free = optimum(0.2, 1.0)
    assert (free * COSTS).sum() > 1.1 * limit / 100  # the constraint matters
    assert np.abs(found - wanted).sum() < 0.05
    assert np.abs(free - wanted).sum() > 3 * np.abs(found - wanted).sum()
    assert (found * COSTS).sum() == pytest.approx(limit / 100, abs=0.015)


# -- the trainer's contract ---------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
def test_the_first_losses_are_pinned(tmp_path: Path, released: bool) -> None:
    losses: list[float] = []

    def keep(step: int, figures: dict[str, float]) -> None:
        losses.append(figures["nu_loss-limit-10"] + figures["chi_loss-limit-20"] + figures["policy_loss-limit-40"])

    train(tmp_path, replace(SMALL, **(RELEASED if released else {})), keep)  # type: ignore[arg-type]
    assert losses == pytest.approx(PINNED[released], rel=1e-3, abs=1e-4)


PINNED = {
    False: [2.23758, 1.19925, 1.68666, 1.3656, 1.6031, 2.05698, 1.23242, 1.13078, 1.99338, 1.08711],
    True: [2.23729, 2.06145, 1.1609, 1.29233, 1.69038, 1.472, 1.47425, 1.18513, 1.59205, 1.15409],
}


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    (whole,) = train(tmp_path / "whole")

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", on_step=stop)
    seen: list[int] = []
    (resumed,) = train(tmp_path / "cut", on_step=lambda step, f: seen.append(step))
    assert seen == [6, 7, 8, 9, 10]
    assert resumed.history == whole.history
    for folder, trained in (("a", whole), ("b", resumed)):
        save_model(tmp_path / folder, trained.config, trained.files)
    for file in (*whole.files, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_members_together_equal_members_alone() -> None:
    members = [Member(3, 10.0), Member(3, 40.0), Member(4, 10.0)]
    together = learner(members=members)
    for step in range(1, 6):
        figures = together.update(step)
    for number, member in enumerate(members):
        alone = learner(members=[member])
        for step in range(1, 6):
            own = alone.update(step)
        for name, figure in own.items():
            torch.testing.assert_close(figures[name][number], figure[0], rtol=1e-3, atol=1e-4)
        for name, tensor in alone.weights(0).items():
            torch.testing.assert_close(together.weights(number)[name], tensor, rtol=1e-3, atol=1e-5)


def test_it_acts_by_tanh_of_the_mean_under_each_limit(tmp_path: Path) -> None:
    (trained,) = train(tmp_path / "s")
    save_model(tmp_path / "m", trained.config, trained.files)
    policy = load_policy(tmp_path / "m")
    observations = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    policy.reset(3, 20)
    tensors = trained.files["limit-20.safetensors"]
    rows = observations
    for layer in range(3):
        rows = rows @ tensors[f"weights.{layer}"][0].numpy() + tensors[f"biases.{layer}"][0].numpy()
        rows = np.maximum(rows, 0) if layer < 2 else np.tanh(rows)
    np.testing.assert_allclose(policy.act(observations), rows, rtol=1e-4, atol=1e-6)
    assert rows.shape == (3, 2)


def test_data_that_cannot_teach_a_constraint_are_refused(tmp_path: Path) -> None:
    for episodes, message in (
        ([episode(1.0, 5)], "one episode only"),
        (dataset([(1.0, 5), (2.0, 5)]), "each of 2 episodes costs 5"),
        (dataset([(1.0, 15), (2.0, 18)]), "none of 2 episodes keeps the cost limit 10"),
    ):
        with pytest.raises(BadInput, match=f"coptidice on BallCircle: {message}"):
            training.train("coptidice", episodes, BALL, SMALL, (0,), tmp_path)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"alpha": 0.0}, {"ensemble": 0}, {"bound_divergence": -1.0}, {"discount": 1.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            COptiDICESettings(**wrong)  # type: ignore[arg-type]
