"""The parts of the offline actor-critic methods: networks, action model, Gaussian, multipliers, candidates."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from springhead.errors import BadInput
from springhead.params import load
from springhead.rl.lagrangian import PIDLagrangian, q_threshold
from springhead.rl.offline.algorithms import ALGORITHMS
from springhead.rl.offline.batches import Batch
from springhead.rl.offline.candidates import (
    CandidateSettings,
    choose,
    each_with,
    evaluate,
    extremes,
    goes_on,
    mixed,
    thresholds,
    with_actions,
)
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.gaussian import SquashedGaussian, log_slope, normal_log_prob
from springhead.rl.offline.multipliers import Multipliers
from springhead.rl.offline.stacked import MLP, Values, clip_members, frozen_copy, pair, polyak
from springhead.rl.offline.vae import ActionVAE, kl_from_prior
from tests.rl.offline_data import BALL
from tests.rl.offline_runs import by_hand

pytestmark = pytest.mark.unit


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Multipliers: costs less 10 are 2, 6, -4, -7 and 1.
COSTS, LIMIT = [12.0, 16.0, 6.0, 3.0, 11.0], 10.0
PID = {  # kp 0.1, ki 0.01, kd 0.5; integrals of the first two: 2, 8, 4, 0, 1; of the last: 2, 8, 4, -3, -2
    "signed": [0.2 + 0.02 + 1.0, 0.6 + 0.08 + 2.0, 0.0, 0.0, 0.1 + 0.01 + 4.0],
    "rectified": [0.2 + 0.02 + 1.0, 0.6 + 0.08 + 2.0, 0.04, 0.0, 0.1 + 0.01 + 4.0],
    "memory": [0.2 + 0.02 + 1.0, 0.6 + 0.08 + 2.0, 0.0, 0.0, 0.1 - 0.02 + 4.0],
}


@pytest.mark.parametrize("variant", ["signed", "rectified", "memory"])
def test_multipliers_follow_the_rule_computed_by_hand_and_the_scalar_class(variant: str) -> None:
    rule = PIDLagrangian(0.1, 0.01, 0.5, variant=variant)  # type: ignore[arg-type]
    multipliers, alone = Multipliers(2, rule), PIDLagrangian(0.1, 0.01, 0.5, variant=variant)  # type: ignore[arg-type]
    other = PIDLagrangian(0.1, 0.01, 0.5, variant=variant)  # type: ignore[arg-type]
    for cost, wanted in zip(COSTS, PID[variant], strict=True):
        found = multipliers.update(torch.tensor([cost, 2 * cost]), torch.tensor([LIMIT, 15.0])).tolist()
        assert found[0] == pytest.approx(wanted, abs=1e-6)
        assert found == pytest.approx([alone.update(cost, LIMIT), other.update(2 * cost, 15.0)], abs=1e-5)


def test_a_multiplier_stops_at_its_cap_and_its_memory_at_its_floor() -> None:
    multipliers = Multipliers(1, PIDLagrangian(1.0, 0.1, 0.0, variant="memory", cap=2.0))
    assert multipliers.update(torch.tensor([50.0]), 10.0).item() == 2.0
    multipliers.update(torch.tensor([0.0]), 1000.0)
    assert multipliers.integral.item() == pytest.approx(-3.0)  # -0.3 / 0.1


def test_the_threshold_of_the_benchmark_limit() -> None:
    assert q_threshold(10, 300, 0.99) == pytest.approx(3.1699, abs=1e-4)
    found = thresholds([Member(0, 10.0), Member(0, 40.0)], BALL, CandidateSettings())
    one = 10 * (1 - 0.99**BALL.horizon) / (0.01 * BALL.horizon)
    assert found.tolist() == pytest.approx([one, 4 * one], rel=1e-6)


# Stacked networks.


@pytest.mark.parametrize(("activation", "output"), [("relu", "none"), ("tanh", "tanh")])
def test_a_stack_of_networks_is_its_networks(activation: str, output: str) -> None:
    net = MLP(Generators([0, 1]), [4, 6, 5, 3], ensemble=3, activation=activation, output=output)  # type: ignore[arg-type]
    rows = noise(2, 7, 4)
    found = net(rows)
    assert found.shape == (2, 3, 7, 3)
    for member in range(2):
        for number in range(3):
            wanted = by_hand(net, 3 * member + number, rows[member].double().numpy())
            np.testing.assert_allclose(found[member, number].detach().numpy(), wanted, atol=1e-6)


def test_values_have_the_gradients_of_their_networks() -> None:
    net, rows = Values(Generators([0, 1]), [4, 6], ensemble=2), noise(2, 7, 4).requires_grad_()
    net(rows).square().sum().backward()
    for member in range(2):
        own = rows[member].detach().clone().requires_grad_()
        total = torch.zeros(())
        singles = []
        for number in range(2):
            index = 2 * member + number
            parts = [value[index].detach().clone().requires_grad_() for value in (*net.weights, *net.biases)]
            hidden = torch.relu(own @ parts[0] + parts[2])
            total = total + (hidden @ parts[1] + parts[3]).square().sum()
            singles.append((index, parts))
        total.backward()
        torch.testing.assert_close(rows.grad[member], own.grad)
        for index, parts in singles:
            for value, part in zip((*net.weights, *net.biases), parts, strict=True):
                torch.testing.assert_close(value.grad[index], part.grad)


def test_frozen_values_give_gradients_to_inputs_alone() -> None:
    net, rows = Values(Generators([0]), [4, 6]), noise(1, 7, 4).requires_grad_()
    net(rows, frozen=True).sum().backward()
    assert rows.grad is not None
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_member_does_not_depend_on_its_companions() -> None:
    together, alone = Values(Generators([3, 5]), [4, 6]), Values(Generators([5]), [4, 6])
    for name, value in alone.state_dict().items():
        assert torch.equal(together.member(1)[name], value)
    assert not torch.equal(together.weights[0][0], together.weights[0][2])


def test_gradients_are_clipped_for_each_member() -> None:
    net = MLP(Generators([0, 1]), [2, 2])
    net.weights[0].grad = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.1, 0.0], [0.0, 0.0]]])
    net.biases[0].grad = torch.tensor([[[0.0, 4.0]], [[0.0, 0.0]]])
    norms = clip_members(net.parameters(), 2, 1.0)
    assert norms.tolist() == pytest.approx([5.0, 0.1])
    assert net.weights[0].grad[:, 0, 0].tolist() == pytest.approx([0.6, 0.1], rel=1e-5)
    assert net.biases[0].grad[:, 0, 1].tolist() == pytest.approx([0.8, 0.0], rel=1e-5)


def test_a_target_begins_as_a_copy_and_follows_at_its_rate() -> None:
    source = MLP(Generators([0]), [2, 3])
    target = frozen_copy(source, MLP(Generators([9]), [2, 3]))
    before = [value.clone() for value in target.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))
    assert not any(value.requires_grad for value in target.parameters())
    with torch.no_grad():
        for value in source.parameters():
            value.add_(1.0)
    polyak(target, source, 0.1)
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


# Candidates.


@pytest.mark.parametrize(("ensemble", "only"), [(1, None), (4, None), (4, [0, 2])])
@pytest.mark.parametrize("rows", [5, 70_000 // 8])
def test_evaluation_in_blocks_equals_the_networks(ensemble: int, only: list[int] | None, rows: int) -> None:
    for outputs, activation, output in ((1, "relu", "none"), (2, "tanh", "tanh")):
        net = MLP(
            Generators([0, 1]),
            [3, 32, outputs],
            ensemble=ensemble,
            activation=activation,
            output=output,  # type: ignore[arg-type]
        )
        inputs = noise(2, rows, 3)
        whole = net(inputs).detach().view(2, ensemble, rows, outputs)
        found = evaluate(net, inputs, only)
        torch.testing.assert_close(found, whole if only is None else whole[:, only])
        assert not found.requires_grad


def test_extremes_and_their_gradients_equal_those_of_all_networks() -> None:
    net = Values(Generators([0, 1]), [3, 16, 8], ensemble=6)
    parts = [(0, 3, False), (3, 6, True), (0, 1, False)]
    inputs, plain = noise(2, 40, 3).requires_grad_(), noise(2, 40, 3).requires_grad_()
    weights = noise(2, 3, 40, seed=1)
    found, values = extremes(net, inputs, parts), net(plain)
    wanted = torch.stack([values[:, :3].amin(1), values[:, 3:].amax(1), values[:, 0]], dim=1)
    torch.testing.assert_close(found, wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(inputs.grad, plain.grad)
    assert len({tuple(row) for row in values[0, :3].argmin(0, keepdim=True).T.tolist()}) > 1  # several networks are hit


def test_mixes_of_two_groups_by_hand() -> None:
    values = torch.tensor([[[1.0], [4.0], [3.0], [2.0]]])  # groups (1, 4) and (3, 2)
    assert mixed(values, 0.75, "min").item() == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert mixed(values, 0.75, "max").item() == pytest.approx(0.75 * 4 + 0.25 * 3)


def test_the_choice_keeps_the_threshold_where_it_can() -> None:
    rewards = torch.tensor([[5.0, 9.0, 7.0], [5.0, 9.0, 7.0]])
    costs = torch.tensor([[1.0, 3.0, 2.0], [4.0, 3.0, 5.0]])
    assert choose(rewards, costs, 2.0).tolist() == [2, 1]  # the best of the two that keep it; the cheapest
    assert choose(rewards, costs, torch.tensor([[3.0], [4.5]])).tolist() == [1, 1]


def test_a_chosen_action_stands_beside_its_own_observation() -> None:
    observations, actions = noise(2, 3, 4), noise(2, 3 * 5, 2, seed=1)
    found = with_actions(observations, actions, torch.tensor([[0, 4, 2], [1, 1, 3]]))
    torch.testing.assert_close(found[0, 1], torch.cat([observations[0, 1], actions[0, 5 + 4]]))
    torch.testing.assert_close(found[1, 2], torch.cat([observations[1, 2], actions[1, 10 + 3]]))
    assert torch.equal(each_with(observations, 5)[0, 5:10], observations[0, 1].expand(5, -1))


def test_where_rewards_and_costs_go_on() -> None:
    ends = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    cut = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    empty = torch.zeros(1, 4)
    batch = Batch(empty, empty, empty, empty, empty, ends, cut, empty)
    rewards, costs = goes_on(batch, CandidateSettings())
    assert (rewards.tolist(), costs.tolist()) == ([[1, 0, 1, 0]], [[1, 0, 1, 0]])
    rewards, costs = goes_on(batch, CandidateSettings(timeouts="terminal", cost_terminals="ignored"))
    assert (rewards.tolist(), costs.tolist()) == ([[1, 0, 0, 0]], [[1, 1, 1, 1]])


# Action model.


def test_the_divergence_from_the_prior_is_that_of_normal_distributions() -> None:
    mean, log_std = noise(1, 1, 3), 0.5 * noise(1, 1, 3, seed=1)
    one = torch.distributions.Normal(mean, log_std.exp())
    wanted = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)).mean(-1)
    torch.testing.assert_close(kl_from_prior(mean, log_std), wanted)
    assert kl_from_prior(torch.tensor([[[2.0]]]), torch.tensor([[[0.0]]])).item() == pytest.approx(2.0)


def test_the_action_model_encodes_draws_and_decodes() -> None:
    vae = ActionVAE(Generators([0, 1]), 3, 2, (16, 16))
    observations, actions, drawn = noise(2, 5, 3), noise(2, 5, 2).tanh(), noise(2, 5, 4, seed=2)
    loss, divergence = vae.loss(observations, actions, drawn, beta=0.5)
    for member in range(2):
        inputs = torch.cat([observations, actions], -1)[member].double().numpy()
        mean, log_std = np.split(by_hand(vae.encoder, member, inputs), 2, axis=1)
        latent = mean + np.exp(log_std) * drawn[member].numpy()
        inputs = np.concatenate([observations[member].numpy(), latent], axis=1)
        error = (np.tanh(by_hand(vae.decoder, member, inputs)) - actions[member].numpy()) ** 2
        kl = 0.5 * (mean**2 + np.exp(2 * log_std) - 1 - 2 * log_std).mean(1)
        np.testing.assert_allclose(divergence[member].detach().numpy(), kl, atol=1e-5)
        assert loss[member].item() == pytest.approx(error.mean() + 0.5 * kl.mean(), abs=1e-5)


# Gaussian policy.


def test_the_slope_of_tanh_is_exact_also_far_out() -> None:
    x = torch.tensor([0.0, 0.5, -2.0, 20.0, -40.0])
    np.testing.assert_allclose(
        log_slope(x).numpy(),
        [0.0, np.log(1 - np.tanh(0.5) ** 2), np.log(1 - np.tanh(2.0) ** 2), np.log(4) - 40, np.log(4) - 80],
        rtol=1e-5,
        atol=1e-6,
    )


def test_densities_of_normals() -> None:
    found = normal_log_prob(torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([-0.5]))
    assert found.item() == pytest.approx(stats.norm(1.0, np.exp(-0.5)).logpdf(1.5), rel=1e-5)


def test_drawn_actions_have_the_density_that_is_told() -> None:
    policy = SquashedGaussian(Generators([0]), 3, 2, (8,))
    observations, drawn = noise(1, 6, 3), noise(1, 6, 2, seed=1)
    actions, before, log_prob = policy.sample(observations, drawn)
    torch.testing.assert_close(actions, before.tanh())
    torch.testing.assert_close(policy.log_prob(observations, actions), log_prob, rtol=1e-3, atol=1e-3)
    # One component on a fine grid: the density integrates to 1.
    one = SquashedGaussian(Generators([0]), 3, 1, (8,))
    grid = torch.linspace(-0.99999, 0.99999, 200_001)[None, :, None]
    density = one.log_prob(noise(1, 1, 3).expand(-1, 200_001, -1), grid).exp()
    assert torch.trapezoid(density[0], grid[0, :, 0]).item() == pytest.approx(1.0, abs=0.01)


def test_the_acting_network_is_the_mean_of_one_member() -> None:
    policy = SquashedGaussian(Generators([0, 1]), 3, 2, (8,))
    observations = noise(2, 4, 3)
    mean, log_std = policy(observations)
    assert log_std.shape == mean.shape == (2, 4, 2)
    alone = MLP(Generators([7]), [3, 8, 2])
    alone.load_state_dict(policy.acting(1))
    torch.testing.assert_close(alone(observations[1:]), mean[1:])


@pytest.mark.parametrize(
    "bad", [{"samples": 0}, {"reward_scale": 0.0}, {"vae_hidden": ()}, {"tau": 2.0}, {"tau": 0.0}, {"discount": 1.5}]
)
def test_settings_out_of_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        CandidateSettings(**bad)  # type: ignore[arg-type]


INFINITE = [
    ("bcq-lag", "kp"),
    ("bear-lag", "ki"),
    ("cdt", "weight_decay"),
    ("cdt", "cost_weight"),
    ("cql", "alpha"),
    ("cql", "threshold"),
]


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(("name", "key"), INFINITE)
def test_settings_that_are_not_finite_are_named(name: str, key: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"^here: {key} is {value}; use .*finite"):
        load(ALGORITHMS[name].settings_class(), {key: value}, "here")


def test_pairs_put_the_observation_first() -> None:
    assert pair(torch.zeros(1, 1, 2), torch.ones(1, 1, 1)).tolist() == [[[0.0, 0.0, 1.0]]]
