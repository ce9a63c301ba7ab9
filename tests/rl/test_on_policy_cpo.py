"""CPO's step against numerical solutions of the same small problems, and what the two trust-region methods may do."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from springhead.rl.online.cpo import CPO, CPOConfig, solve_dual
from springhead.rl.online.trpo_lag import TRPOLag, TRPOLagConfig
from springhead.rl.online.trust_region import mean_kl
from springhead.rl.workers import EpisodeWorkers

pytestmark = pytest.mark.unit

DELTA = 0.05


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def problem(seed, excess):
    """A random H, g and b, and the c that lies ``excess`` boundaries of the trust region beyond the limit."""
    generator = np.random.default_rng(seed)
    dim = int(generator.integers(2, 6))
    root = generator.normal(size=(dim, dim))
    hessian = root @ root.T + 0.1 * np.eye(dim)
    g, b = generator.normal(size=(2, dim))
    reach = np.sqrt(2 * DELTA * b @ np.linalg.solve(hessian, b))  # how much b'x the trust region can save
    return hessian, g, b, excess * reach


def step_of(hessian, g, b, c):
    u, v = np.linalg.solve(hessian, g), np.linalg.solve(hessian, b)
    dual = solve_dual(float(g @ u), float(g @ v), float(b @ v), float(c), DELTA)
    return dual, dual.step(torch.from_numpy(u), torch.from_numpy(v)).numpy()


def numerically(hessian, objective, constraints):
    """Maximises ``objective @ x`` in the trust region from several starts, by SLSQP."""
    region = {"type": "ineq", "fun": lambda x: DELTA - 0.5 * x @ hessian @ x, "jac": lambda x: -hessian @ x}
    best = -np.inf
    for start in np.random.default_rng(0).normal(size=(8, len(objective))) * 0.1:
        found = minimize(
            lambda x: -objective @ x, start, jac=lambda x: -objective, method="SLSQP",
            constraints=[region, *constraints], options={"maxiter": 500, "ftol": 1e-12},
        )  # fmt: skip
        if found.success:
            best = max(best, -found.fun)
    return best


@pytest.mark.parametrize("excess", [-2.0, -1.1, -0.9, -0.5, -0.01, 0.0, 0.01, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(8))
def test_the_step_solves_the_linearised_problem(seed, excess):
    hessian, g, b, c = problem(seed, excess)
    dual, step = step_of(hessian, g, b, c)
    assert dual.case == (3 if excess < -1 else 2 if excess < 0 else 1)
    assert 0.5 * step @ hessian @ step <= DELTA * (1 + 1e-6)
    assert c + b @ step <= 1e-6 * (1 + abs(c))
    limit = {"type": "ineq", "fun": lambda x: -(c + b @ x), "jac": lambda x: -b}
    assert g @ step == pytest.approx(numerically(hessian, g, [limit]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_recovery_saves_as_much_cost_as_the_trust_region_can(seed):
    hessian, g, b, c = problem(seed, 1.5)
    dual, step = step_of(hessian, g, b, c)
    assert dual.case == 0
    assert 0.5 * step @ hessian @ step == pytest.approx(DELTA)
    assert -b @ step == pytest.approx(numerically(hessian, -b, []), rel=1e-5)


@pytest.mark.parametrize("c", [-5.0, 0.0, 5.0])
def test_without_a_gradient_of_the_cost_the_step_is_the_natural_gradient(c):
    hessian, g, _, _ = problem(0, 0.0)
    dual, step = step_of(hessian, g, np.zeros_like(g), c)
    assert dual.case == 4
    assert g @ step == pytest.approx(numerically(hessian, g, []), rel=1e-5)


@pytest.mark.parametrize("excess", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reward_and_cost_with_one_gradient(excess, sign):
    """Cauchy-Schwarz holds with equality: A is 0, and the cost's boundary is as far as one can go."""
    hessian, g, _, _ = problem(3, 0.0)
    c = excess * np.sqrt(2 * DELTA * g @ np.linalg.solve(hessian, g))
    _, step = step_of(hessian, g, sign * g, c)
    limit = {"type": "ineq", "fun": lambda x: -(c + sign * g @ x), "jac": lambda x: -sign * g}
    assert g @ step == pytest.approx(numerically(hessian, g, [limit]), rel=1e-4, abs=1e-5)
    assert 0.5 * step @ hessian @ step <= DELTA * (1 + 1e-6)


SMALL = {"task": "BallRun", "seed": 3, "iterations": 3, "episodes_per_iteration": 4, "num_envs": 4, "hidden": (16, 16)}


def learner_of(kind, config_class, **changes):
    config = config_class(**{**SMALL, **changes})
    return kind(config, EpisodeWorkers(config.task, config.num_envs))


def moved(learner, before):
    return float((torch.cat([p.detach().reshape(-1) for p in learner.actor.parameters()]) - before).norm())


def flat_of(learner):
    return torch.cat([p.detach().reshape(-1).clone() for p in learner.actor.parameters()])


@pytest.mark.parametrize("excess", [-30.0, -1.0, 1.0, 30.0])
def test_a_step_of_cpo_stays_within_the_trust_region_and_trades_as_it_must(excess):
    learner = learner_of(CPO, CPOConfig, target_kl=0.01)
    batch = learner.prepare(*learner.collect())
    scaled = dataclasses.replace(batch.standardised(), cost_advantages=batch.cost_advantages)
    before = learner.surrogates(scaled, batch.old)
    taken = learner.policy_step(scaled, excess)
    with torch.no_grad():
        now = learner.actor(batch.observations)
        after = learner.surrogates(scaled, now)
    assert taken["step_fraction"] > 0
    assert 0 < float(mean_kl(batch.old, now)) <= 0.01
    if excess > 0:
        assert after[1] < before[1]  # over the limit: the cost falls
    else:
        assert after[0] > before[0]  # below it: the return rises, and the cost by no more than there is room for
        assert float(after[1] - before[1]) <= -excess


def test_cpo_keeps_the_limit_in_force_where_the_released_code_keeps_the_first():
    excess = {}
    for released in (False, True):
        learner = learner_of(CPO, CPOConfig, cost_limit_start=40.0, cost_limit_end=0.0, ramp_from=0.0, ramp_until=0.0,
                             released=released)  # fmt: skip
        learner.iteration = 2
        batch = learner.prepare(*learner.collect())
        _, losses = learner.update(batch, 30.0, learner.config.cost_limit(2))
        excess[released] = losses["excess"]
    assert excess[False] == pytest.approx(30.0)
    assert excess[True] == pytest.approx(-10.0, abs=0.5)  # 30 - 40, after four steps' changes of the surrogate


def test_the_released_step_of_cpo_has_unit_length():
    learner = learner_of(CPO, CPOConfig, released=True, backtracks=1)
    batch = learner.prepare(*learner.collect())
    before = flat_of(learner)
    taken = learner.policy_step(batch.standardised(), -30.0)
    assert moved(learner, before) == pytest.approx(1.0, rel=1e-4)
    assert taken["kl"] > 0.01  # far outside the trust region, and kept although the line search refused it
    assert taken["step_fraction"] == 0.0


@pytest.mark.parametrize("released", [False, True])
def test_a_failed_line_search_of_trpo_restores_the_policy_unless_released(released):
    # So long a step that the divergence is far from its quadratic model, and one trial only.
    learner = learner_of(TRPOLag, TRPOLagConfig, released=released, target_kl=3.0, damping=0.0, backtracks=1)
    batch = learner.prepare(*learner.collect()).standardised()
    before = flat_of(learner)
    fraction, kl, _ = learner.policy_step(batch)
    assert fraction == 0.0
    assert (moved(learner, before) > 0) is released
    assert (kl > 0) is released


def test_a_step_of_trpo_gains_within_its_bound():
    learner = learner_of(TRPOLag, TRPOLagConfig, target_kl=0.005)
    batch = learner.prepare(*learner.collect()).standardised()
    learner.lagrangian.value = 2.0
    combined = (batch.reward_advantages - 2.0 * batch.cost_advantages) / 3.0
    assert float(learner.objective(batch, batch.old)) == pytest.approx(float(combined.mean()), abs=1e-6)
    fraction, kl, gain = learner.policy_step(batch)
    assert fraction > 0
    assert 0.0005 < kl <= 0.005
    assert gain > 0
