"""The gradient steps of SAC-Lag, DDPG-Lag and CVPO: densities, targets and losses against naive versions, flags."""

import numpy as np
import pytest
import scipy.optimize
import torch

from springhead.errors import BadInput
from springhead.rl.lagrangian import q_threshold
from springhead.rl.online import cvpo
from springhead.rl.online.replay import Transitions
from tests.rl.test_off_policy import learner

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def batch_of(trained, rows=6, terminal=2):
    generator = torch.Generator().manual_seed(5)
    dim, actions = trained.task.observation_dim, trained.task.action_dim
    bootstrap = torch.full((rows,), 0.9)
    bootstrap[terminal] = 0.0
    return Transitions(
        observations=torch.randn(rows, dim, generator=generator),
        actions=torch.rand(rows, actions, generator=generator) * 2 - 1,
        signals=torch.rand(2, rows, generator=generator),
        bootstrap=bootstrap,
        next_observations=torch.randn(rows, dim, generator=generator),
    )


def noise(seed=8):
    return torch.Generator().manual_seed(seed)


def spread_critics(trained):
    """Makes the members of each ensemble disagree, and the temperature matter."""
    with torch.no_grad():
        for ensemble in (trained.critics, trained.target_critics):
            ensemble.biases[-1].copy_(torch.tensor([1.0, 3.0, 5.0, 2.0]).view(4, 1, 1))


def test_the_squashed_density_is_the_transformed_one():
    trained = learner("sac-lag")
    with torch.no_grad():
        trained.actor.net[-1].weight.mul_(100.0)
    observations = batch_of(trained).observations
    actions, log_probs = trained.sample(observations, noise())
    mean, std = trained.actor.mean_and_std(observations)
    base = torch.distributions.Normal(mean.double(), std.double())
    squashed = torch.distributions.TransformedDistribution(base, [torch.distributions.TanhTransform(cache_size=1)])
    with torch.no_grad():
        before = mean.double() + std.double() * torch.randn(mean.shape, generator=noise()).double()
        expected = squashed.log_prob(squashed.transforms[0](before)).sum(1)
    torch.testing.assert_close(log_probs.detach().double(), expected, rtol=1e-3, atol=1e-3)
    assert actions.abs().max() <= 1.0


def test_the_density_stays_finite_where_tanh_rounds_to_one():
    trained = learner("sac-lag")
    with torch.no_grad():
        trained.actor.net[-1].bias[:2].fill_(30.0)
    actions, log_probs = trained.sample(batch_of(trained).observations, noise())
    assert (actions == 1.0).all()
    assert torch.isfinite(log_probs).all()
    log_probs.sum().backward()
    assert torch.isfinite(trained.actor.net[-1].bias.grad).all()


@pytest.mark.parametrize("released", [False, True])
def test_entropy_belongs_to_reward_targets_and_costs_are_pessimistic(released):
    trained = learner("sac-lag", released=released)
    spread_critics(trained)
    batch = batch_of(trained)
    found = trained.next_values(batch, noise())
    actions, log_probs = trained.sample(batch.next_observations, noise())
    with torch.no_grad():
        q = trained.target_critics(torch.cat([batch.next_observations, actions], 1))
        entropy = 0.2 * log_probs
        cost = torch.minimum(q[2], q[3]) - entropy if released else torch.maximum(q[2], q[3])
        torch.testing.assert_close(found, torch.stack([torch.minimum(q[0], q[1]) - entropy, cost]))


def test_critics_go_to_their_n_step_targets_and_nothing_follows_a_fall():
    trained = learner("sac-lag", critic_lr=1e-2)
    batch = batch_of(trained)
    next_values = torch.stack([torch.full((6,), 10.0), torch.full((6,), 20.0)])
    wanted = batch.signals + batch.bootstrap * next_values
    torch.testing.assert_close(wanted[:, 2], batch.signals[:, 2])
    inputs = torch.cat([batch.observations, batch.actions], 1)
    with torch.no_grad():
        values = trained.critics(inputs)
        expected = torch.stack([(values[:2] - wanted[0]).square().mean(), (values[2:] - wanted[1]).square().mean()])
    torch.testing.assert_close(trained.fit_critics(batch, next_values), expected)
    for _ in range(300):
        trained.fit_critics(batch, next_values)
    with torch.no_grad():
        values = trained.critics(inputs)
    torch.testing.assert_close(values, wanted.repeat_interleave(2, 0), atol=0.3, rtol=0.0)


def test_temperature_rises_while_entropy_is_below_its_target():
    for target, sign in ((5.0, 1.0), (-5.0, -1.0)):
        trained = learner("sac-lag", target_entropy=target, alpha_lr=0.01)
        before = float(trained.log_alpha.detach())
        trained.step(batch_of(trained), noise())
        assert sign * (float(trained.log_alpha.detach()) - before) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("multiplier", [0.0, 3.0])
def test_the_deterministic_policy_descends_its_critics(multiplier):
    trained = learner("ddpg-lag")
    trained.lagrangian.value = multiplier
    batch = batch_of(trained)
    trained.optimisers["critics"].param_groups[0]["lr"] = 0.0
    mean = trained.actor.net(batch.observations).tanh()
    reward, cost = trained.critics(torch.cat([batch.observations, mean], 1))
    expected = ((multiplier * cost - reward) / (1.0 + multiplier)).mean()
    gradients = torch.autograd.grad(expected, list(trained.actor.net.parameters()))
    figures = trained.step(batch, noise())
    torch.testing.assert_close(figures["policy_loss"], expected.detach())
    for weight, gradient in zip(trained.actor.net.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert trained.actor.log_std.grad is None


def test_exploration_noise_has_the_deviation_asked_for():
    trained = learner("ddpg-lag", exploration=0.3, exploration_start=0.9, exploration_until=0.5, iterations=10)
    for iteration, expected in ((0, 0.9), (2, 0.66), (5, 0.3), (10, 0.3)):
        trained.iteration = iteration
        _, std = trained.policy().mean_and_std(np.zeros((2, 7), np.float32))
        np.testing.assert_allclose(std, expected, rtol=1e-5)
    with pytest.raises(BadInput, match="exploration"):
        learner("ddpg-lag", exploration=0.0)


def test_an_episode_limit_as_a_discounted_cost_to_go():
    assert q_threshold(10.0, 300, 0.99) == pytest.approx(3.1699, abs=1e-4)
    assert q_threshold(10.0, 300, 1.0) == 10.0
    spread = 10.0 / 300 * sum(0.97**t for t in range(300))
    assert q_threshold(10.0, 300, 0.97) == pytest.approx(spread)


def values_of(seed, states=20, actions=8, scale=1.0):
    generator = np.random.default_rng(seed)
    better = generator.normal(size=(states, actions))
    reward = scale * (better + generator.normal(size=(states, 1)))
    return reward, np.abs(generator.normal(1.0, 1.0, size=(states, actions)) + 0.5 * better)


def test_the_duals_derivatives_are_those_of_its_value():
    reward, cost = values_of(0)
    point, step = np.array([0.7, 1.3]), 1e-5
    value, gradient, hessian = cvpo.dual(point, reward, cost, 0.8, 0.02)
    by_hand = point[0] * 0.02 + point[1] * 0.8
    by_hand += point[0] * np.mean(np.log(np.mean(np.exp((reward - point[1] * cost) / point[0]), axis=1)))
    assert value == pytest.approx(by_hand)
    for i in range(2):
        shift = step * np.eye(2)[i]
        (up, gradient_up, _), (down, gradient_down, _) = (
            cvpo.dual(point + sign * shift, reward, cost, 0.8, 0.02) for sign in (1, -1)
        )
        assert gradient[i] == pytest.approx((up - down) / (2 * step), abs=1e-6)
        np.testing.assert_allclose(hessian[i], (gradient_up - gradient_down) / (2 * step), atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
@pytest.mark.parametrize(
    ("threshold", "kl", "held"), [(1.0, 0.1, ""), (5.0, 0.1, "low"), (0.2, 0.02, "high"), (0.8, 0.5, "")]
)
def test_the_solved_dual_is_scipys_minimum_and_its_distribution_keeps_both_bounds(scale, threshold, kl, held):
    low, high = np.array([1e-3, 0.0]), np.array([1e3 * max(scale, 1.0), 20.0 * scale])
    for seed in range(4):
        reward, cost = values_of(seed, scale=scale)
        found = cvpo.solve_dual(np.ones(2), reward, cost, threshold, kl, low, high)
        value, _, _ = cvpo.dual(found, reward, cost, threshold, kl)
        best = min(
            scipy.optimize.minimize(
                lambda x: cvpo.dual(x, reward, cost, threshold, kl)[0],  # noqa: B023
                start,
                method="SLSQP",
                bounds=list(zip(low, high, strict=True)),
                options={"ftol": 1e-12, "maxiter": 500},
            ).fun
            for start in ([1.0, 1.0], [10.0 * scale, 2.0 * scale], found)
        )
        assert value <= best + 1e-5 * scale
        assert held != "low" or found[1] == 0.0
        assert (held == "high") == (found[1] == high[1])
        weights = np.exp((reward - found[1] * cost) / found[0])
        weights /= weights.sum(axis=1, keepdims=True)
        divergence = (weights * np.log(weights * weights.shape[1])).sum(axis=1).mean()
        assert divergence == pytest.approx(kl, abs=1e-3)
        if held != "high":
            assert (weights * cost).sum(axis=1).mean() <= threshold + 1e-3
        # It goes on from its own solution without moving.
        np.testing.assert_allclose(
            cvpo.solve_dual(found, reward, cost, threshold, kl, low, high), found, rtol=1e-3, atol=1e-6
        )


def test_the_e_step_weighs_by_the_solved_dual_and_the_released_one_subtracts_the_cost_twice():
    for released in (False, True):
        trained = learner("cvpo", released=released)
        spread_critics(trained)
        trained.threshold = 5.0
        assert trained.own["dual"].tolist() == ([1.0, 0.0] if released else [1.0, 1.0])
        trained.own["dual"].data.fill_(1.0)
        observations = batch_of(trained).observations
        before = trained.own["dual"].detach().clone()
        actions, weights, mean, std = trained.expectation(observations, noise())
        eta, multiplier = trained.own["dual"].detach()
        expected = mean + std * torch.randn((4, *mean.shape), generator=noise())
        torch.testing.assert_close(actions, expected)
        inputs = torch.cat([observations.expand(4, *observations.shape), actions.clamp(-1, 1)], 2)
        with torch.no_grad():
            q = trained.critics(inputs.view(24, -1)).view(4, 4, 6)
        reward, cost = torch.minimum(q[0], q[1]), (torch.minimum if released else torch.maximum)(q[2], q[3])
        if released:
            # Adam's first step has the length of the learning rate, whatever the gradient.
            torch.testing.assert_close((trained.own["dual"].detach() - before).abs(), torch.full((2,), 0.02).double())
            exponent = (reward - (before[1] + multiplier) * cost) / eta
        else:
            exponent = (reward - multiplier * cost) / eta
        torch.testing.assert_close(weights, torch.softmax(exponent, 0).float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights.sum(0), torch.ones(6))


def test_the_m_step_is_the_weighted_likelihood_of_the_sampled_actions():
    trained = learner("cvpo")
    with torch.no_grad():  # the policy has moved away from the old one
        trained.actor.net[-1].bias.add_(0.2)
        trained.own["alpha"].copy_(torch.tensor([0.3, 0.2]))
    observations = batch_of(trained).observations
    actions, weights, old_mean, old_std = trained.expectation(observations, noise())
    loss, divergences = trained.maximisation(observations, actions, weights, old_mean, old_std)
    mean, std = trained.actor.mean_and_std(observations)
    normal = torch.distributions.Normal
    fits = normal(mean, old_std).log_prob(actions) + normal(old_mean, std).log_prob(actions)
    kl = torch.distributions.kl_divergence
    apart = torch.stack(
        [
            kl(normal(old_mean, old_std), normal(mean, old_std)).sum(1).mean(),
            kl(normal(old_mean, old_std), normal(old_mean, std)).sum(1).mean(),
        ]
    )
    torch.testing.assert_close(divergences, apart.detach())
    naive = -(weights * fits.sum(2)).sum(0).mean() + torch.tensor([0.3, 0.2]) @ apart
    parameters = list(trained.actor.parameters())
    for found, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(naive, parameters), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_m_steps_multipliers_follow_their_bounds():
    trained = learner("cvpo", kl_std=1.0, alpha_lr=0.4)
    object.__setattr__(trained.config, "kl_mean", -1.0)  # out of range, so that the first step breaks it
    trained.update_multiplier(0.0, 20.0)
    trained.own["alpha"].fill_(0.1)
    trained.step(batch_of(trained, rows=32), noise())
    # Divergences of an unchanged policy are 0: one bound is broken by 1, the other kept by 1; the sum is cut at 0.5.
    torch.testing.assert_close(trained.own["alpha"].detach(), torch.tensor([0.5, 0.0]), atol=1e-5, rtol=0.0)


def test_cvpo_names_settings_out_of_range():
    with pytest.raises(BadInput, match="states"):
        learner("cvpo", states=33)
    with pytest.raises(BadInput, match="actions"):
        learner("cvpo", actions=1)


@pytest.mark.parametrize("name", ["sac-lag", "ddpg-lag", "cvpo"])
def test_released_trains_on_raw_observations(name):
    for released in (False, True):
        trained = learner(name, released=released, n_step=1)
        trained.iterate()
        assert (trained.moments.count == 0.0) == released
        assert (trained.policy().config.observation_mean == (0.0,) * 7) == released
