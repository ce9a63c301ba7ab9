"""The parts that on-policy learners share, each against a naive version or numbers worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from springhead.errors import BadInput
from springhead.params import load
from springhead.rl.lagrangian import PIDLagrangian
from springhead.rl.networks import Moments
from springhead.rl.online.advantages import gae, standardise
from springhead.rl.online.algorithms import ALGORITHMS, algorithm
from springhead.rl.online.contract import Figures
from springhead.rl.online.ppo_lag import PPOLagConfig
from springhead.rl.online.rollouts import sampled_actions
from springhead.rl.online.training import feasible_first
from springhead.rl.online.trust_region import conjugate_gradients, fisher_product, flat, line_search, mean_kl

pytestmark = pytest.mark.unit

COSTS = (30.0, 40.0, 12.0, 0.0, 25.0)  # under the limit 10: errors 20, 30, 2, -10, 15; rises 20, 10, 0, 0, 25


@pytest.mark.parametrize(
    "variant, gains, expected",
    [
        # integrals 20, 50, 52, 42, 57
        ("signed", (0.05, 0.0005, 0.1), [1.0 + 0.01 + 2.0, 1.5 + 0.025 + 1.0, 0.1 + 0.026, 0.0, 0.75 + 0.0285 + 2.5]),
        (
            "rectified",
            (0.1, 0.003, 0.001),
            [2.0 + 0.06 + 0.02, 3.0 + 0.15 + 0.01, 0.2 + 0.156, 0.126, 1.5 + 0.171 + 0.025],
        ),
        ("memory", (0.02, 0.005, 0.01), [0.4 + 0.1 + 0.2, 0.75, 0.04 + 0.26, 0.21 - 0.2, 0.75]),
    ],
)
def test_the_multiplier_follows_the_pid_rule_of_its_variant(variant, gains, expected):
    pid = PIDLagrangian(*gains, variant=variant, cap=0.75 if variant == "memory" else None)
    assert [pid.update(cost, 10.0) for cost in COSTS] == pytest.approx(expected, abs=1e-12)
    assert pid.integral == 57.0
    for _ in range(30):
        pid.update(0.0, 10.0)
    assert pid.value == 0.0
    assert pid.integral == pytest.approx(-60.0 if variant == "memory" else 0.0)  # -0.3 / 0.005


def test_the_limit_ramps_linearly_between_two_fractions():
    config = PPOLagConfig(
        task="BallRun", seed=0, iterations=11, cost_limit_start=100.0, cost_limit_end=0.0, ramp_from=0.2, ramp_until=0.7
    )
    assert [config.cost_limit(i) for i in range(11)] == pytest.approx([100, 100, 100, 80, 60, 40, 20, 0, 0, 0, 0])


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


def test_standardised_values_have_mean_zero_and_deviation_one_and_constants_vanish():
    values = standardise(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    np.testing.assert_allclose(values, (np.array([1, 2, 3, 6]) - 3) / np.sqrt(3.5), rtol=1e-6)
    assert standardise(torch.full((3,), 7.0)).tolist() == [0.0, 0.0, 0.0]


def test_running_moments_are_those_of_all_rows():
    rows = np.random.default_rng(1).normal(3.0, 2.0, size=(100, 4))
    moments = Moments.of(4)
    for part in (rows[:10], rows[10:11], rows[11:]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0))
    np.testing.assert_allclose(moments.std, rows.std(axis=0))


def test_sampled_actions_take_each_episodes_own_noise():
    means, stds = torch.arange(10.0).reshape(5, 2), torch.full((5, 2), 0.5)
    found = sampled_actions(means, stds, [8, 9], [2, 3])
    noise = [np.random.default_rng([seed, 1]).standard_normal((n, 2), dtype=np.float32) for seed, n in ((8, 2), (9, 3))]
    np.testing.assert_allclose(found, means.numpy() + 0.5 * np.concatenate(noise), rtol=1e-6)


def figures(episode_return, cost_return, limit=20.0):
    return Figures(0, episode_return, cost_return, limit, 0.0)


def test_the_chosen_policy_is_feasible_first_then_best():
    assert feasible_first([figures(9, 30), figures(5, 25), figures(7, 28)]) == 1  # none keeps it: the cheapest
    assert feasible_first([figures(9, 30), figures(5, 20), figures(7, 19), figures(7, 1)]) == 2  # the earlier at a tie
    moving = [figures(9, 50, 60.0), figures(5, 4, 5.0)]
    assert feasible_first(moving) == 1  # by the limit that is in force at the end
    assert feasible_first(moving, limit=60.0) == 0


def test_conjugate_gradients_solve_a_linear_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(12, dtype=torch.float64)
    target = torch.randn(12, generator=generator, dtype=torch.float64)
    solution = conjugate_gradients(lambda v: matrix @ v, target, steps=24, tolerance=1e-24)
    np.testing.assert_allclose(solution, torch.linalg.solve(matrix, target), rtol=1e-8)
    assert conjugate_gradients(lambda v: matrix @ v, torch.zeros(12, dtype=torch.float64), 5).abs().sum() == 0


def test_the_fisher_product_is_that_with_the_whole_hessian():
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(2, 3, generator=generator))
    log_std = nn.Parameter(torch.tensor([-0.5, 0.2]))
    rows = torch.randn(20, 3, generator=generator)

    def policy(flat_parameters):
        return Normal(rows @ flat_parameters[:6].reshape(2, 3).T, flat_parameters[6:].exp().expand(20, 2))

    here = flat([weight, log_std])
    old = policy(here.detach())
    hessian = torch.autograd.functional.hessian(lambda x: kl_divergence(old, policy(x)).sum(-1).mean(), here.detach())
    product = fisher_product(mean_kl(old, policy(here)), [weight, log_std], damping=0.3)
    for column, unit in enumerate(torch.eye(8)):
        np.testing.assert_allclose(product(unit), hessian[column] + 0.3 * unit, atol=1e-5)


@pytest.mark.parametrize("keep_failure", [False, True])
def test_a_line_search_shortens_the_step_or_restores_the_parameters(keep_failure):
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    step = torch.tensor([4.0, -8.0])

    def search(accept, trials):
        return line_search([parameter], step, accept, 0.5, trials, keep_failure)

    assert search(lambda: bool(parameter[0] <= 2.0), 5) == 0.25
    assert parameter.tolist() == [2.0, 0.0]
    assert search(lambda: False, 3) == 0.0
    assert parameter.tolist() == ([3.0, -2.0] if keep_failure else [2.0, 0.0])


def test_the_divergence_is_that_of_the_old_policy_from_the_new_one():
    """KL(old || new) of two Gaussians of unlike deviations; the other direction is another number."""
    old, new = Normal(torch.zeros(3, 2), torch.full((3, 2), 0.5)), Normal(torch.ones(3, 2), torch.full((3, 2), 2.0))
    by_hand = np.log(2.0 / 0.5) + (0.5**2 + 1.0) / (2 * 2.0**2) - 0.5
    assert float(mean_kl(old, new)) == pytest.approx(2 * by_hand, rel=1e-6)


OUT_OF_RANGE = [
    ("ppo-lag", "minibatch", 0),
    ("ppo-lag", "epochs", 0),
    ("ppo-lag", "discount", 1.5),
    ("ppo-lag", "discount", 0.0),
    ("ppo-lag", "hidden", ()),
    ("ppo-lag", "hidden", (8, 0)),
    ("ppo-lag", "seed", -1),
    ("ppo-lag", "learning_rate", -1.0),
    ("ppo-lag", "gae_lambda", 2.0),
    ("trpo-lag", "repeats", 0),
    ("trpo-lag", "target_kl", -1.0),
    ("cpo", "critic_minibatch", 0),
    ("cpo", "damping", -0.1),
    ("focops", "temperature", 0.0),
    ("sac-lag", "alpha", 0.0),
    ("sac-lag", "actor_lr", float("nan")),
    ("ddpg-lag", "pid_ki", -0.1),
    ("cvpo", "kl", 0.0),
    ("cvpo", "kl_mean", 0.0),
    ("cvpo", "kl_std", -0.1),
    ("trpo-lag", "shrink", 1.25),
    ("cpo", "shrink", 1.0),
    ("ppo-lag", "pid_kp", float("inf")),
    ("ppo-lag", "cost_limit_start", float("inf")),
    ("ppo-lag", "cost_limit_end", float("nan")),
    ("sac-lag", "target_entropy", float("nan")),
]


@pytest.mark.fault
@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyper_parameters_out_of_range_are_named_with_their_place(name, key, value):
    """Unchecked they would train on nonsense or end in an error of torch's or NumPy's."""
    config_class, _ = algorithm(name)
    values = {"task": "BallRun", "seed": 0, "iterations": 1, key: value}
    with pytest.raises(BadInput, match=f"^{key} is "):
        config_class(**values)
    with pytest.raises(BadInput, match=rf"^here\.{name}: {key} is .*use "):
        load(config_class, {**values, "hidden": list(values.get("hidden", (4,)))}, f"here.{name}")


def test_algorithms_are_found_by_name():
    config, learner = algorithm("ppo-lag")
    assert (config.__name__, learner.__name__) == ("PPOLagConfig", "PPOLag")
    for name in ALGORITHMS:
        assert algorithm(name)[1].algorithm == name
    with pytest.raises(BadInput, match="Did you mean trpo-lag"):
        algorithm("trpo-lg")
