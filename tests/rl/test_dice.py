"""The soft chi-square by hand, the minimum of ensembles, mixtures, and how data are prepared for ratios."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.params import load
from springhead.rl.offline import dice
from springhead.rl.offline.algorithms import ALGORITHMS
from springhead.rl.offline.batches import flatten
from springhead.rl.offline.contract import Generators
from springhead.rl.offline.density import DensitySettings, prepare
from springhead.rl.offline.least import least
from springhead.rl.offline.mixture import Mixture, MixturePolicy
from springhead.rl.offline.stacked import Values
from tests.rl.offline_data import BALL, dataset

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("ratio", "value", "slope"),
    [
        (0.5, 0.5 * math.log(0.5) + 0.5, math.log(0.5)),
        (0.9, 0.9 * math.log(0.9) + 0.1, math.log(0.9)),
        (1.0, 0.0, 0.0),
        (1.5, 0.125, 0.5),
        (4.0, 4.5, 3.0),
    ],
)
def test_the_divergence_and_its_pairs_by_hand(ratio: float, value: float, slope: float) -> None:
    x, y = torch.tensor([ratio]), torch.tensor([slope])
    assert float(dice.f(x)) == pytest.approx(value, abs=1e-6)
    assert float(dice.f_slope(x)) == pytest.approx(slope, abs=1e-6)
    assert float(dice.ratio_of(y)) == pytest.approx(ratio, rel=1e-6)
    assert float(dice.log_ratio_of(y)) == pytest.approx(math.log(ratio), abs=1e-6)
    assert float(dice.f_of_slope(y)) == pytest.approx(value, abs=1e-6)
    assert float(dice.conjugate(y)) == pytest.approx(slope * ratio - value, abs=1e-6)


def test_the_conjugate_is_the_largest_gap_to_the_line() -> None:
    ratios = np.linspace(0.0, 8.0, 80001)
    values = dice.f(torch.from_numpy(ratios)).numpy()
    for slope in (-3.0, -0.4, 0.0, 0.7, 5.0):
        best = (slope * ratios - values).max()
        assert float(dice.conjugate(torch.tensor(slope))) == pytest.approx(best, abs=1e-4)


def test_slopes_far_out_have_finite_values_and_gradients() -> None:
    slopes = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    for function in (dice.ratio_of, dice.log_ratio_of, dice.f_of_slope, dice.conjugate):
        (gradient,) = torch.autograd.grad(function(slopes).sum(), slopes)
        assert torch.isfinite(gradient).all()
    (gradient,) = torch.autograd.grad(dice.conjugate(slopes).sum(), slopes)
    torch.testing.assert_close(gradient, dice.ratio_of(slopes))


@pytest.mark.parametrize(("groups", "ensemble"), [(2, 4), (1, 2), (1, 1), (1, 3)])
def test_the_smallest_values_and_their_gradients_equal_automatic_ones(groups: int, ensemble: int) -> None:
    networks = Values(Generators([1, 2]), [5, 16, 8], ensemble)
    inputs, into = torch.randn(2, 40, 5), torch.randn(2, groups, 40)
    found = least(networks, inputs, groups)
    (found * into).sum().backward()
    own = [parameter.grad for parameter in networks.parameters()]
    networks.zero_grad(set_to_none=True)
    plain = networks(inputs).unflatten(1, (groups, -1)).amin(2)
    (plain * into).sum().backward()
    torch.testing.assert_close(found, plain)
    for parameter, gradient in zip(networks.parameters(), own, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_network_that_is_never_the_smallest_gets_no_gradient() -> None:
    networks = Values(Generators([1]), [5, 8], 2)
    with torch.no_grad():
        networks.biases[-1][1] += 100.0
    least(networks, torch.randn(1, 7, 5), 1).sum().backward()
    for parameter in networks.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[1] == 0).all()
        assert (parameter.grad[0] != 0).any()


def test_a_mixtures_density_by_hand() -> None:
    weights, means = np.array([0.2, 0.8]), np.array([[-1.0, 0.5], [0.3, 0.0]])
    deviations = np.array([[0.5, 1.0], [0.2, 2.0]])
    mixture = Mixture(
        torch.tensor(np.log(weights)).float()[None, None],
        torch.tensor(means).float()[None, None],
        torch.tensor(np.log(deviations)).float()[None, None],
    )
    action = np.array([0.4, -0.7])
    before = np.arctanh(action)
    each = np.exp(-0.5 * ((before - means) / deviations) ** 2) / (deviations * np.sqrt(2 * np.pi))
    inside = math.log((weights * each.prod(1)).sum())
    assert float(mixture.log_prob_before(torch.tensor(before).float()[None, None])) == pytest.approx(inside, rel=1e-5)
    squashed = inside - np.log(1 - action**2).sum()
    assert float(mixture.log_prob(torch.tensor(action).float()[None, None])) == pytest.approx(squashed, rel=1e-5)
    torch.testing.assert_close(mixture.spread()[0, 0], torch.tensor([0.35, 1.5]))


def test_a_mixture_learns_two_peaks_that_one_gaussian_cannot() -> None:
    policy = MixturePolicy(Generators([0]), 1, 1, (16,), 3, (-5.0, 2.0))
    observations = torch.zeros(1, 200, 1)
    actions = torch.tensor([0.6, -0.6]).repeat(100)[None, :, None] + 0.02 * torch.randn(1, 200, 1)
    adam = torch.optim.Adam(policy.parameters(), lr=3e-2)
    for _ in range(200):
        loss = -policy(observations).log_prob(actions).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    at = torch.tensor([0.6, -0.6, 0.0])[None, :, None]
    peaks, other, valley = policy(observations[:, :3]).log_prob(at)[0].tolist()
    assert min(peaks, other) > valley + 2


def test_data_are_prepared_without_the_horizons_transitions() -> None:
    data = flatten(dataset([(1.0, 3), (2.0, 2)], length=4), BALL)
    rewards = torch.tensor([0.0, 0.0, 1.0, 9.0, 0.0, 3.0, 0.0, 9.0])
    data = replace(data, rewards=rewards)
    generators = Generators([0], stream=1)
    sampler, (shift, scale) = prepare("cde", data, DensitySettings(batch_size=400), generators)
    kept = [0, 1, 2, 4, 5, 6]  # both episodes end at the horizon
    expected = 0.1 * (rewards[kept] - rewards[kept].mean()) / rewards[kept].std(correction=0)
    drawn = sampler.draw()
    assert sorted(set(drawn.rewards[0].round(decimals=5).tolist())) == pytest.approx(
        sorted(set(expected.tolist())), abs=1e-5
    )
    assert (drawn.timeouts == 0).all()
    torch.testing.assert_close(shift, data.observations.mean(0), rtol=1e-4, atol=1e-5)
    back = drawn.observations[0] * scale + shift
    nearest = torch.cdist(back, data.observations[kept]).amin(1)
    assert float(nearest.max()) < 1e-3


def test_success_is_an_episodes_last_reward() -> None:
    data = flatten(dataset([(0.0, 3), (2.0, 5)], length=12), BALL)
    rewards = torch.zeros(24)
    rewards[3] = rewards[-1] = 1.0  # the first episode passed by, the second ended there
    data = replace(data, rewards=rewards)
    settings = DensitySettings(batch_size=300, policy_data="successes")
    sampler, moments = prepare("cde", data, settings, Generators([0]))
    drawn = sampler.draw()
    back = drawn.observations[0] * moments[1] + moments[0]
    episode = torch.cdist(back, data.observations).argmin(1) // 12
    assert set(drawn.costs[0].tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.costs[0], episode.float())
    none = prepare("cde", replace(data, rewards=rewards * 0), settings, Generators([0])).sampler.draw()
    assert (none.costs == 1).all()
    assert (none.rewards == 0).all()


def test_what_stands_for_the_initial_states_is_chosen() -> None:
    data = flatten(dataset([(0.0, 3), (2.0, 5)], length=12), BALL)
    found = {}
    for starts in ("episodes", "states"):
        settings = DensitySettings(batch_size=400, starts=starts)  # type: ignore[arg-type]
        sampler, (shift, scale) = prepare("cde", data, settings, Generators([0]))
        drawn = sampler.draw_initial()[0] * scale + shift
        found[starts] = set(torch.cdist(drawn, data.observations).argmin(1).tolist())
    assert found["episodes"] == {0, 12}
    assert found["states"] == set(range(24)) - {11, 23}  # not where the horizon cuts


@pytest.mark.parametrize("name", ["cde", "optidice"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"warm_up": 1.0}, "warm_up is 1.0; use a number of 0 or more and below 1"),
        ({"warm_up": 0.996, "steps": 100}, "warm_up is 0.996 of 100 steps, which leaves none"),
    ],
)
def test_a_warm_up_leaves_steps_for_the_policy(name: str, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(ALGORITHMS[name].settings_class(), bad, "here")


@pytest.mark.parametrize("name", ["cde", "optidice", "coptidice"])
def test_visitations_without_discount_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"discount is 1\.0; use a number of 0 or more and below 1"):
        load(ALGORITHMS[name].settings_class(), {"discount": 1.0}, "here")


def test_episodes_of_one_step_are_refused() -> None:
    with pytest.raises(BadInput, match="cde: every transition is cut by the horizon"):
        prepare("cde", flatten(dataset([(1.0, 1), (2.0, 0)], length=1), BALL), DensitySettings(), Generators([0]))
