"""CDT: relabelling and losses by hand, causality, the sampler, members, the learning curve, resuming, acting."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.params import load
from springhead.rl.dataset import Episode
from springhead.rl.offline import cdt
from springhead.rl.offline.batches import flatten
from springhead.rl.offline.contract import Generators, Member
from springhead.rl.offline.frontier import attainable
from springhead.rl.offline.relabelling import (
    Augmentation,
    Items,
    evened_out,
    infeasible_targets,
    plain,
    relabelled,
    safe_answers,
)
from springhead.rl.offline.sequences import Batch, Sampler, Scheme, to_go
from springhead.rl.offline.training import Trained, train
from springhead.rl.offline.transformer import Dropout, Outputs, Shape, Transformer
from springhead.rl.policy import load_policy, save_model
from springhead.rl.tasks import TASKS, task
from tests.rl.offline_data import BALL, dataset, spread

pytestmark = pytest.mark.unit
SMALL = cdt.CDTSettings(
    steps=10, batch_size=8, context=4, width=8, layers=2, heads=2, learning_rate=1e-2, warmup=2, decay=True,
    augmentation=Augmentation(min_per_cell=0), checkpoint_every=4, report_every=1,
)  # fmt: skip
RELEASED = replace(
    SMALL, entropy="per-dimension", clamp_cost=False, cost_head="truncated", cost_loss="padded", bounded=False,
    attention_start="released", decay=False, cost_reference=50.0, sampling_cap=70.0,
    augmentation=Augmentation(
        degree=1, min_return=1.0, pairs="grouped", extrapolate=True, grid="released", min_per_cell=0
    ),
)  # fmt: skip
OnStep = Callable[[int, dict[str, float]], None]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# -- augmentation -----------------------------------------------------------------------------


def test_targets_lie_above_the_frontier_and_costs_are_even() -> None:
    costs, returns = np.array([0.0, 10.0, 20.0, 15.0]), np.array([0.0, 50.0, 100.0, 10.0])
    settings = Augmentation(degree=1, max_return=120.0)
    target_returns, target_costs = infeasible_targets(returns, costs, 5, settings, rng())
    assert target_costs.tolist() == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert (target_returns >= 5 * target_costs - 1e-9).all()  # p(C) = 5 C through the three Pareto points
    assert (target_returns <= 120).all()
    assert (target_returns[:3] > 5 * target_costs[:3]).all()


def test_beyond_the_frontiers_costs_the_polynomial_is_held() -> None:
    # The frontier ends at cost 10; a line through it would ask for 300 at cost 30.
    costs, returns = np.array([0.0, 10.0, 30.0]), np.array([0.0, 100.0, 50.0])
    target_returns, _ = infeasible_targets(returns, costs, 4, Augmentation(degree=1, max_return=100.0), rng())
    assert target_returns[2:] == pytest.approx([100.0, 100.0])


@pytest.mark.parametrize("degree", [0, 2, 5])
def test_the_fit_survives_one_point_and_equal_costs(degree: int) -> None:
    settings = Augmentation(degree=degree)
    for returns, costs in ((np.array([5.0]), np.array([3.0])), (np.array([5.0, 2.0]), np.array([3.0, 3.0]))):
        target_returns, target_costs = infeasible_targets(returns, costs, 3, settings, rng())
        assert (target_costs == 3.0).all()
        assert (target_returns >= 5.0).all()


def test_each_target_is_answered_by_the_nearest_episode_within_its_cost() -> None:
    costs, returns = np.array([0.0, 10.0, 20.0]), np.array([10.0, 50.0, 100.0])
    answers = safe_answers(
        returns, costs, np.array([90.0, 90.0, 120.0]), np.array([5.0, 19.0, 25.0]), Augmentation(), rng()
    )
    assert answers.tolist() == [0, 1, 2]


def test_further_targets_get_substitutes_that_cost_no_more_and_return_little_less() -> None:
    costs = np.array([10.0, 9.0, 9.0, 11.0, 8.0])
    returns = np.array([100.0, 95.0, 70.0, 99.0, 91.0])
    targets = np.full(200, 120.0)
    settings = Augmentation(max_return_decrease=10.0)
    answers = safe_answers(returns, costs, targets, np.full(200, 10.5), settings, rng())
    assert answers[0] == 0
    # 2 returns too little, 3 costs more; of the others nearer ones come more often.
    counts = np.bincount(answers, minlength=5)
    assert counts[2] == counts[3] == 0
    assert counts[0] > counts[1] > counts[4] > 0


def test_the_released_code_groups_answers_by_the_episode_they_stand_for() -> None:
    costs, returns = np.array([0.0, 10.0, 20.0]), np.array([10.0, 50.0, 100.0])
    targets = np.array([120.0, 90.0, 120.0, 200.0]), np.array([25.0, 19.0, 25.0, 25.0])
    settings = Augmentation(max_return_decrease=60.0)
    own = safe_answers(returns, costs, *targets, settings, rng())
    grouped = safe_answers(returns, costs, *targets, replace(settings, pairs="grouped"), rng())
    assert own[:2].tolist() == [2, 1]
    assert grouped.tolist() == own[[0, 2, 3, 1]].tolist()


def test_the_released_code_extrapolates_and_reverses_the_interval() -> None:
    costs, returns = np.array([0.0, 10.0, 30.0]), np.array([0.0, 100.0, 50.0])
    settings = Augmentation(degree=1, max_return=100.0, extrapolate=True)
    target_returns, target_costs = infeasible_targets(returns, costs, 40, settings, rng())
    beyond = target_costs > 10
    assert (target_returns[beyond] > 100).all()
    assert (target_returns[beyond] < 10 * target_costs[beyond]).all()


class Middle:
    """A generator that draws the middle of every interval, and the most likely of several."""

    def random(self, number: int) -> np.ndarray:
        return np.full(number, 0.5)

    def choice(self, among: np.ndarray, p: np.ndarray) -> int:
        return int(among[np.argmax(p)])

    def integers(self, high: int) -> int:
        return 0


@pytest.mark.parametrize(("extrapolate", "last"), [(False, 105.0), (True, 107.5)])
def test_return_targets_begin_a_least_return_above_the_frontier(extrapolate: bool, last: float) -> None:
    costs, returns = np.array([0.0, 10.0, 20.0]), np.array([0.0, 50.0, 100.0])
    settings = Augmentation(degree=1, min_return=10.0, max_return=105.0, extrapolate=extrapolate)
    target_returns, _ = infeasible_targets(returns, costs, 3, settings, Middle())  # type: ignore[arg-type]
    assert target_returns == pytest.approx([57.5, 82.5, last])  # between 10, 60, 110 and 105


def test_the_released_grid_gives_the_highest_values_a_cell_of_their_own() -> None:
    costs, returns = np.array([0.0, 1.0, 2.0, 9.0, 10.0]), np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    settings = Augmentation(cost_bins=2, return_bins=1, min_per_cell=1)
    assert evened_out(returns, costs, settings, rng()).tolist() == [0, 1, 2, 3, 4]
    # Cells of five costs: the last holds 9 alone, and 10 is beyond it.
    assert evened_out(returns, costs, replace(settings, grid="released"), rng()).tolist() == [0, 1, 2]
    crowded = replace(settings, grid="released", max_per_cell=2)
    assert len(evened_out(returns, costs, crowded, rng())) == 2


def test_relabelling_in_the_released_mode_by_hand() -> None:
    """As OSRL's own augmentation gives it on these episodes, with its draws put in the middle too.

    The grid's cells are one cost and four returns wide, so the best episode is alone and left out. The frontier of the
    others, (0, 1) and (1, 4.5), is p(C) = 1 + 3.5 C. Targets lie between p(C) + 1 and 10, and the first episode but
    one answers three, since no other costs as little and returns at most .5 less.
    """
    costs, returns = np.array([0.0, 0.0, 1.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0, 4.5, 8.0])
    settings = Augmentation(
        share=1.0, degree=1, max_return=10.0, min_return=1.0, max_return_decrease=0.5, pairs="grouped",
        extrapolate=True, grid="released", cost_bins=2, return_bins=2, min_per_cell=1,
    )  # fmt: skip
    items = relabelled(returns, costs, settings, Middle())  # type: ignore[arg-type]
    assert items.episode.tolist() == [1, 1, 1, 3]
    assert items.target_cost == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert items.target_return == pytest.approx([6.0, 6 + 1.75 / 3, 6 + 3.5 / 3, 7.75])


def test_targets_keep_their_own_episode() -> None:
    """The pairs, not only the sets: every answered episode keeps the cost target beside it."""
    costs, returns = np.linspace(0, 20, 40), np.linspace(0, 100, 40)
    items = relabelled(returns, costs, Augmentation(share=1.0, min_per_cell=0), rng())
    assert len(items.episode) == 40
    assert (costs[items.episode] <= items.target_cost + 1e-9).all()
    assert (returns[items.episode] <= items.target_return + 1e-9).all()


def test_a_grid_that_empties_everything_is_an_error_that_names_the_key() -> None:
    with pytest.raises(BadInput, match=r"leaves none of 3 episodes.*augmentation\.min_per_cell"):
        relabelled(np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 9.0]), Augmentation(min_per_cell=1), rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.5}, "share is 1.5; use a number between 0 and 1"),
        ({"degree": -1}, "degree is -1; use at least 0"),
        ({"distance_offset": 0.0}, "distance_offset is 0.0; use more than 0"),
        ({"max_return_decrease": -1.0}, "max_return_decrease is -1.0; use at least 0"),
        ({"max_return": math.nan}, "max_return is nan; use a finite number"),
        ({"max_per_cell": 0}, "max_per_cell is 0; use at least 1"),
        ({"max_per_cell": 1}, "max_per_cell is 1, below min_per_cell, 2; raise it"),
    ],
)
def test_settings_of_the_augmentation_out_of_range_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Augmentation(**change)  # type: ignore[arg-type]


# -- sequences --------------------------------------------------------------------------------


def test_to_go_sums_each_episode_on_its_own() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    assert to_go(values, torch.tensor([3, 2])).tolist() == [6.0, 5.0, 3.0, 30.0, 20.0]


def sampler(*items: Items, cap: float = 70.0, size: int = 512) -> Sampler:
    return Sampler(flatten(DATA, BALL), items, Scheme(size, 3, 0.5, 1.0, 50.0, cap), Generators(range(len(items))))


DATA = dataset([(20.0, 2), (40.0, 5)], length=5)


def test_relabelling_shifts_the_whole_curve() -> None:
    items = Items(np.array([1]), np.array([100.0]), np.array([8.0]))
    batch = sampler(items).draw()
    first = int(torch.nonzero(batch.times[0, :, 0] == 0)[0])
    # Return 40 in steps of 8, asked for as 100: 100, 92, 84, half of it by the scale.
    assert batch.inputs[0, first, :, 0].tolist() == pytest.approx([50.0, 46.0, 42.0])
    # Cost 5, one at every step, asked for as 8: 50 - 8, 50 - 7, 50 - 6.
    assert batch.inputs[0, first, :, 1].tolist() == pytest.approx([42.0, 43.0, 44.0])
    assert batch.step_costs[0, first].tolist() == [1.0, 1.0, 1.0]
    data = DATA[1]
    np.testing.assert_array_equal(batch.inputs[0, first, :, 2:-2].numpy(), data.observations[:3])
    np.testing.assert_array_equal(batch.actions[0, first].numpy(), data.actions[:3])
    assert torch.equal(batch.inputs[..., -2:], batch.actions)


def test_sequences_are_padded_on_the_right_and_masked() -> None:
    batch = sampler(plain(np.array([20.0, 40.0]), np.array([2.0, 5.0]))).draw()
    last = batch.times[0, :, 0] == 4
    assert last.any()
    assert batch.mask[0, last].tolist() == [[1.0, 0.0, 0.0]] * int(last.sum())
    assert (batch.inputs[0, last][:, 1:] == 0).all()
    assert (batch.inputs[0, last][:, 0] != 0).all()
    assert batch.mask.sum(2).min() >= 1
    assert set(batch.times[0, :, 0].tolist()) == {0, 1, 2, 3, 4}


def test_each_member_draws_its_own_items_in_proportion_to_cap_less_cost() -> None:
    both = Items(np.array([0, 1]), np.array([20.0, 40.0]), np.array([10.0, 55.0]))
    one = Items(np.array([1]), np.array([40.0]), np.array([30.0]))
    batch = sampler(both, one, cap=70.0, size=4000).draw()
    # Costs-to-go at the first step tell the items apart: 60 against 15 of 75.
    starts = batch.times[..., 0] == 0
    share = (batch.inputs[0, starts[0]][:, 0, 1] == 50.0 - 10.0).float().mean()
    assert share == pytest.approx(0.8, abs=0.04)
    assert (batch.inputs[1, starts[1]][:, 0, 1] == 50.0 - 30.0).all()


def test_an_episode_at_the_cap_is_never_drawn_and_none_below_is_an_error() -> None:
    items = Items(np.array([0, 1]), np.array([20.0, 40.0]), np.array([10.0, 70.0]))
    batch = sampler(items, cap=70.0).draw()
    assert (batch.inputs[0, batch.times[0, :, 0] == 0][:, 0, 1] == 40.0).all()
    with pytest.raises(BadInput, match=r"sampling cap 10 \(the cheapest costs 10"):
        sampler(items, cap=10.0)


# -- network and losses -----------------------------------------------------------------------


SHAPE = Shape(observation_dim=8, action_dim=2, time_steps=30, width=16, layers=2, heads=4, cost_outputs=2)


def network(*seeds: int) -> Transformer:
    made = Transformer(Generators(seeds or (0,)), SHAPE)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():  # the small initial weights would make every difference tiny, and the norms start at 1 and 0
        for parameter in made.parameters():
            parameter.mul_(8.0).add_(torch.randn(parameter.shape, generator=g), alpha=0.1)
    return made


def tokens(batch: int = 2, steps: int = 6, members: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(members, batch, steps, 12, generator=g)
    return inputs, torch.arange(steps).expand(members, batch, steps)


def by_numpy(net: Transformer, inputs: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The network's outputs for one sequence (steps, 12), computed token by token in NumPy."""
    w = {name: value[0].numpy().astype(np.float64) for name, value in net.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"][0]

    x = []
    for row, time in zip(inputs, times, strict=True):
        kinds = (("return", row[:1]), ("cost", row[1:2]), ("state", row[2:10]), ("action", row[10:]))
        x += [linear(part, f"{kind}_token") + w["time"][time] for kind, part in kinds]
    h = norm(np.array(x), "norm_in")
    for block in ("blocks.0", "blocks.1"):
        query, key, value = np.split(linear(norm(h, f"{block}.norm_attention"), f"{block}.qkv"), 3, axis=-1)
        seen = np.zeros_like(h)
        for i in range(len(h)):
            for head in range(4):
                own = slice(4 * head, 4 * head + 4)
                scores = np.exp(key[: i + 1, own] @ query[i, own] / 2.0)
                seen[i, own] = scores / scores.sum() @ value[: i + 1, own]
        h = h + linear(seen, f"{block}.mix")
        up = linear(norm(h, f"{block}.norm_mlp"), f"{block}.up")
        gelu = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        h = h + linear(gelu, f"{block}.down")
    h = norm(h, "norm_out")
    return linear(h[2::4], "action_head"), linear(h[3::4], "cost_head")


def test_outputs_by_hand_and_of_each_member_alone() -> None:
    net = network(0, 1)
    inputs, times = tokens(members=2, batch=3)
    together = net(inputs, times)
    for number in range(2):
        alone = network(0)
        alone.load_state_dict(net.member(number))
        single = alone(inputs[number : number + 1], times[:1])
        torch.testing.assert_close(together.mean[number], single.mean[0])
        torch.testing.assert_close(together.cost[number], single.cost[0])
        torch.testing.assert_close(alone(inputs[number : number + 1], times[:1], costs=False).mean, single.mean)
        action, cost = by_numpy(alone, inputs[number, 1].double().numpy(), times[0, 1].numpy())
        np.testing.assert_allclose(single.mean[0, 1].detach(), action[:, :2], atol=1e-4)
        np.testing.assert_allclose(single.log_std[0, 1].detach(), action[:, 2:], atol=1e-4)
        np.testing.assert_allclose(single.cost[0, 1].detach(), cost, atol=1e-4)


def test_the_future_and_this_steps_action_do_not_change_an_action() -> None:
    net, (inputs, times) = network(), tokens()
    for drop in (None, Dropout(0.0, Generators([0]))):  # with dropout, attention is computed by other code
        before = net(inputs, times, drop)
        for columns in (slice(0, 1), slice(1, 2), slice(2, 10), slice(10, 12)):
            changed = inputs.clone()
            changed[:, :, 4:, columns] += 10.0
            after = net(changed, times, drop)
            torch.testing.assert_close(after.mean[:, :, :4], before.mean[:, :, :4])
            torch.testing.assert_close(after.cost[:, :, :4], before.cost[:, :, :4])
            if columns.start == 10:  # the action of step 4 shows from step 5 on
                torch.testing.assert_close(after.mean[:, :, 4], before.mean[:, :, 4])
            else:
                assert (after.mean[:, :, 4] - before.mean[:, :, 4]).abs().max() > 1e-3
            assert (after.mean[:, :, 5] - before.mean[:, :, 5]).abs().max() > 1e-3
    torch.testing.assert_close(before.mean, net(inputs, times).mean)  # dropout that drops nothing


def test_rows_of_a_batch_do_not_influence_each_other() -> None:
    net, (inputs, times) = network(), tokens(batch=3)
    together = net(inputs, times).mean
    torch.testing.assert_close(together[:, 1:2], net(inputs[:, 1:2], times[:, 1:2]).mean)


def test_dropout_keeps_the_mean_and_each_members_own_draws() -> None:
    drop = Dropout(0.1, Generators([3, 5]))
    kept = drop.kept((2, 101, 101))
    assert kept.unique().tolist() == [0.0, 1.0]
    assert float(drop.scale * kept.mean()) == pytest.approx(1.0, abs=0.01)
    assert drop.scale == pytest.approx(1 / 0.9, rel=1e-4)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(Dropout(0.1, Generators([5])).kept((1, 101, 101))[0], kept[1])


def batch_of(actions: torch.Tensor, step_costs: torch.Tensor, mask: torch.Tensor) -> Batch:
    """One member's batch of one sequence."""
    return Batch(torch.zeros(1, 1, len(mask), 12), actions[None, None], step_costs[None, None],
                 torch.arange(len(mask))[None, None], mask[None, None])  # fmt: skip


def test_losses_by_hand() -> None:
    mean, log_std = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, math.log(2.0)], [9.0, 9.0]]]])
    outputs = Outputs(mean, log_std, torch.tensor([[[[0.0, math.log(3.0)], [5.0, -5.0]]]]))
    batch = batch_of(torch.tensor([[1.0, 2.0], [7.0, 7.0]]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    log_two_pi = math.log(2 * math.pi)
    log_prob = -0.5 * (1 + log_two_pi) - 0.5 * (1 + log_two_pi) - math.log(2.0)
    entropy = (1 + log_two_pi) + math.log(2.0)
    one = torch.ones(1)
    joint = cdt.losses(outputs, batch, 0.1 * one, "joint", one)
    assert float(joint.entropy) == pytest.approx(entropy, rel=1e-5)
    assert float(joint.action) == pytest.approx(-(log_prob + 0.1 * entropy), rel=1e-5)
    assert float(joint.cost) == pytest.approx(-math.log(3 / 4), rel=1e-5)
    mean_of = cdt.losses(outputs, batch, 0.1 * one, "per-dimension", one)
    assert float(mean_of.entropy) == pytest.approx(entropy / 2, rel=1e-5)
    assert float(mean_of.action) == pytest.approx(float(joint.action) / 2, rel=1e-5)
    assert float(mean_of.cost) == pytest.approx(float(joint.cost), rel=1e-5)
    padded = cdt.losses(outputs, batch, 0.1 * one, "joint", one, places=2)  # one step of two places
    assert float(padded.cost) == pytest.approx(float(joint.cost) / 2, rel=1e-5)
    assert float(padded.action) == float(joint.action)


def test_a_continuous_cost_is_regressed() -> None:
    outputs = Outputs(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5]]]]))
    batch = batch_of(torch.zeros(1, 2), torch.tensor([2.5]), torch.ones(1))
    assert float(cdt.losses(outputs, batch, torch.ones(1), "joint", torch.ones(1)).cost) == pytest.approx(4.0)


def test_slices_of_a_batch_add_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_settings = replace(SMALL, dropout=0.0, batch_size=20)
    whole = run(tmp_path / "whole", plain_settings)
    monkeypatch.setattr(cdt, "_SLICE", 7)
    sliced = run(tmp_path / "sliced", plain_settings)
    for name, value in whole.files["policy.safetensors"].items():
        torch.testing.assert_close(sliced.files["policy.safetensors"][name], value, atol=1e-5, rtol=1e-4)
    assert sliced.history[-1] == pytest.approx(whole.history[-1], rel=1e-4)


def test_the_released_cost_loss_is_spread_over_padding_too() -> None:
    mask = learner().sampler.draw().mask
    steps, padded = (learner(replace(SMALL, cost_loss=which)).update(1) for which in ("steps", "padded"))
    assert 0.5 < float(mask.mean()) < 1
    assert float(padded["cost_loss"] / steps["cost_loss"]) == pytest.approx(float(mask.mean()), rel=1e-5)
    assert float(padded["loss"]) == float(steps["loss"])


@pytest.mark.parametrize(("entropy", "sign"), [(-1.9, 1.0), (-2.1, -1.0)])
def test_the_temperature_moves_by_the_joint_target(entropy: float, sign: float) -> None:
    gradient = cdt.temperature_gradient(torch.tensor([math.log(0.1)]), torch.tensor([entropy]), action_dim=2)
    assert float(gradient) == pytest.approx(0.1 * (entropy + 2), rel=1e-4)
    assert np.sign(float(gradient)) == sign  # a positive gradient lowers it


def learner(settings: cdt.CDTSettings = SMALL, seeds: Sequence[int] = (3,)) -> cdt.CDT:
    return cdt.CDT("cdt", flatten(spread(12), BALL), BALL, settings, [Member(seed) for seed in seeds])


def test_the_learning_rate_warms_up_and_decays() -> None:
    made = learner(replace(SMALL, steps=10, warmup=4, learning_rate=1.0))
    assert [made.rate(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert made.rate(7) == pytest.approx(0.5)
    assert made.rate(10) == pytest.approx(0.0)
    made.settings = replace(made.settings, decay=False)
    assert made.rate(10) == 1.0


def test_an_update_is_one_step_of_adamw_down_the_clipped_gradient() -> None:
    """The first step of AdamW moves each weight by the rate against its gradient's sign, after the weight decay."""
    made = learner(replace(SMALL, warmup=0, decay=False, learning_rate=0.01, dropout=0.0, weight_decay=0.1))
    before = {name: value.clone() for name, value in made.network.named_parameters()}
    figures = made.update(1)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in made.network.parameters()))
    assert clipped == pytest.approx(min(float(figures["gradient_norm"]), 0.25), rel=1e-4)
    for name, value in made.network.named_parameters():
        moved = 0.01 * value.grad / (value.grad.abs() + 1e-8) + 0.01 * 0.1 * before[name]
        torch.testing.assert_close(before[name] - value.detach(), moved, atol=1e-5, rtol=1e-3)
    assert float(figures["temperature"]) == pytest.approx(0.1)
    assert float(made.log_temperature) == pytest.approx(math.log(0.1) - 1e-4, abs=1e-6)


# -- training ---------------------------------------------------------------------------------


PINNED_RELEASED = [0.98683, 0.95399, 0.90072, 0.87391, 0.79735, 0.76972, 0.73607, 0.70644, 0.61534, 0.56156]
PINNED_RELEASED_COST = [
    0.628426,
    0.615653,
    0.676031,
    0.656415,
    0.575184,
    0.718797,
    0.692757,
    0.519901,
    0.637282,
    0.649863,
]
PINNED = [2.01519, 1.90751, 1.78428, 1.73343, 1.60752, 1.54959, 1.57904, 1.58618, 1.54245, 1.52699]


def run(
    folder: Path,
    settings: cdt.CDTSettings = SMALL,
    episodes: Sequence[Episode] | None = None,
    seed: int = 3,
    on_step: OnStep = lambda step, figures: None,
) -> Trained:
    return train("cdt", spread(12) if episodes is None else episodes, BALL, settings, [seed], folder, on_step)[0]


def test_the_first_losses_are_pinned(tmp_path: Path) -> None:
    found: list[float] = []
    run(tmp_path, on_step=lambda step, figures: found.append(figures["loss"]))
    assert found == pytest.approx(PINNED, rel=1e-4)


def test_the_first_losses_of_the_released_mode_are_pinned(tmp_path: Path) -> None:
    found: list[tuple[float, float]] = []
    run(tmp_path, RELEASED, on_step=lambda step, row: found.append((row["loss"], row["cost_loss"])))
    loss, cost_loss = zip(*found, strict=True)
    assert loss == pytest.approx(PINNED_RELEASED, rel=1e-4)
    assert cost_loss == pytest.approx(PINNED_RELEASED_COST, rel=1e-4)


def test_members_trained_together_equal_members_trained_alone(tmp_path: Path) -> None:
    together = train("cdt", spread(12), BALL, SMALL, [3, 4], tmp_path / "both")
    for seed, own in zip([3, 4], together, strict=True):
        alone = run(tmp_path / str(seed), seed=seed)
        assert own.config == alone.config
        assert own.history[-1] == pytest.approx(alone.history[-1], rel=1e-3)
        for name, value in alone.files["policy.safetensors"].items():
            torch.testing.assert_close(own.files["policy.safetensors"][name], value, atol=1e-4, rtol=1e-3)
    first, second = (own.files["policy.safetensors"]["action_head.weight"] for own in together)
    assert (first - second).abs().max() > 1e-2


def test_it_learns_actions_that_follow_from_states(tmp_path: Path) -> None:
    settings = replace(SMALL, steps=150, batch_size=32, width=16, warmup=10, dropout=0.0, checkpoint_every=150)
    losses: list[float] = []
    run(tmp_path, settings, spread(20), on_step=lambda step, figures: losses.append(figures["loss"]))
    assert losses[-1] < losses[0] - 1.0


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", on_step=stop)
    torch.rand(5)  # other use of torch's own generator must not matter
    seen: list[int] = []
    resumed = run(tmp_path / "cut", on_step=lambda step, figures: seen.append(step))
    assert seen == [4, 5, 6, 7, 8, 9, 10]
    assert resumed.history == whole.history
    for folder, trained in (("a", whole), ("b", resumed)):
        save_model(tmp_path / folder, trained.config, trained.files)
    for name in ("config.json", "policy.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context", "x"),
        ("cost_reference", None),
        ("cost_scale", []),
        ("return_scale", "x"),
        ("target_margin", math.nan),
        ("heads", -1),
        ("heads", "x"),
        ("return_targets", "x"),
        ("return_targets", [[1.0, 2.0, 3.0]]),
        ("attainable", []),
        ("attainable", [[1.0, None]]),
    ],
)
def test_a_configuration_of_wrong_types_is_named(tmp_path: Path, key: str, value: Any) -> None:
    trained = run(tmp_path / "run")
    save_model(tmp_path / "model", trained.config, trained.files)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadInput, match=r"config\.json: not a CDT configuration"):
        load_policy(tmp_path / "model")


def test_torchs_own_generator_is_not_used(tmp_path: Path) -> None:
    made = learner()
    before = torch.get_rng_state()
    made.update(1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "step-00000010" / "state.safetensors").write_bytes(b"short")
    with pytest.raises(BadInput, match="step-00000010: damaged checkpoint"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(tmp_path: Path) -> None:
    wild = replace(SMALL, learning_rate=1e38, steps=50, warmup=0)
    with pytest.raises(
        BadInput, match=r"not finite at step \d+; no state was kept yet. Lower the learning rates of cdt"
    ):
        run(tmp_path, wild)


def test_small_and_flat_data_sets_train(tmp_path: Path) -> None:
    one = replace(SMALL, steps=2)
    for number, episodes in enumerate((dataset([(1.0, 4), (2.0, 5)]), dataset([(2.0, 4), (2.0, 4), (2.0, 5)]))):
        assert run(tmp_path / str(number), one, episodes).history[-1]["step"] == 2


def test_continuous_costs_get_a_head_of_one_output_unless_they_are_to_be_truncated(tmp_path: Path) -> None:
    one = replace(SMALL, steps=1)
    half = [replace(e, costs=e.costs * np.float32(0.5)) for e in spread(6)]
    assert run(tmp_path / "a", one, half).config["cost_outputs"] == 1
    released = replace(one, cost_head="truncated")
    assert run(tmp_path / "b", released, half).config["cost_outputs"] == 2
    with pytest.raises(BadInput, match=r"classes 0 and 1, a step costs 2; use 'fitting'"):
        run(tmp_path / "c", released, [replace(e, costs=e.costs * np.float32(2.0)) for e in spread(6)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (64,)}, "hidden does not shape a transformer; remove it, and set width and layers"),
        ({"width": 9}, "width is 9; use a multiple of heads, 2"),
        ({"context": 0}, "context is 0; use at least 1"),
        ({"dropout": 1.0}, "dropout is 1; use a number below 1"),
        ({"target_margin": -0.1}, "target_margin is -0.1; use a number between 0 and 1"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0; use more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


# -- acting -----------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path: Path) -> cdt.CdtPolicy:
    trained = run(tmp_path / "s", replace(SMALL, target_margin=0.1))
    save_model(tmp_path / "m", trained.config, trained.files)
    loaded = load_policy(tmp_path / "m")
    assert isinstance(loaded, cdt.CdtPolicy)
    return loaded


def test_the_return_target_is_the_best_return_within_the_limit(policy: cdt.CdtPolicy) -> None:
    episodes = spread(12)
    for limit in (0.0, 3.0, 10.0, 100.0):
        best = max(e.episode_return for e in episodes if e.cost_return <= limit)
        assert policy.return_target(limit) == pytest.approx(best)


def test_a_quantile_of_the_returns_within_the_cost_never_falls_with_it() -> None:
    returns, costs = np.array([10.0, 20.0, 30.0, 5.0, 90.0]), np.array([0.0, 0.0, 4.0, 5.0, 9.0])
    assert attainable(returns, costs, 0.5) == [(0.0, 15.0), (4.0, 20.0)]  # then 15 and 20, which are no more
    assert attainable(returns, costs, 1.0) == [(0.0, 20.0), (4.0, 30.0), (9.0, 90.0)]


def test_the_quantile_is_acted_by(tmp_path: Path) -> None:
    trained = run(tmp_path / "s", replace(SMALL, steps=1, return_quantile=0.5))
    save_model(tmp_path / "m", trained.config, trained.files)
    within = [e.episode_return for e in spread(12) if e.cost_return <= 10]
    assert cdt.load(tmp_path / "m").return_target(10.0) == pytest.approx(float(np.median(within)))


@pytest.mark.parametrize(("clamp", "shown"), [(True, 50.0), (False, 53.0)])
def test_an_episode_over_its_target_is_asked_for_no_more_cost(tmp_path: Path, clamp: bool, shown: float) -> None:
    trained = run(tmp_path / "s", replace(SMALL, steps=1, clamp_cost=clamp))
    save_model(tmp_path / "m", trained.config, trained.files)
    loaded = cdt.load(tmp_path / "m")
    loaded.reset(1, 2.0)
    loaded.act(np.zeros((1, 8), dtype=np.float32))
    loaded.observe(np.array([0.0]), np.array([5.0]))
    loaded.act(np.zeros((1, 8), dtype=np.float32))
    assert float(loaded._past[-1][0, 1]) == pytest.approx(shown)


def test_a_table_of_return_targets_comes_first(tmp_path: Path) -> None:
    table = {"BallCircle": ((40.0, 800.0), (10.0, 700.0)), "CarRun": ((10.0, 575.0),)}
    trained = run(tmp_path / "s", replace(SMALL, steps=1, return_targets=table))
    save_model(tmp_path / "m", trained.config, trained.files)
    loaded = cdt.load(tmp_path / "m")
    assert [loaded.return_target(limit) for limit in (5, 10, 39, 40)] == [700.0, 700.0, 700.0, 800.0]


def test_the_published_table_is_that_of_the_released_configurations(tmp_path: Path) -> None:
    published = read_json(cdt.PUBLISHED_TARGETS)
    assert set(published) == {name for name, of in TASKS.items() if of.data_file}  # the benchmark's 38
    assert all(len(pairs) == 3 and sorted(pairs) == pairs for pairs in published.values())
    # OSRL's cdt_configs.py: the base class, whose third limit is not the benchmark's, and a task with half steps.
    assert published["CarCircle"] == [[10, 450], [20, 500], [50, 550]]
    assert published["PointCircle1"] == [[20, 50], [40, 52.5], [80, 55]]
    with pytest.raises(BadInput, match=r"expected dict, found 'public'.*is not one of 'published'"):
        load(cdt.CDTSettings, {"return_targets": "public"}, "p")
    settings = load(cdt.CDTSettings, {"return_targets": "published", "steps": 1}, "p")
    assert settings.return_targets == "published"
    trained = run(tmp_path / "s", replace(SMALL, steps=1, return_targets="published"))
    assert trained.config["return_targets"] == [[10.0, 700.0], [20.0, 750.0], [40.0, 800.0]]
    with pytest.raises(BadInput, match="cdt on MazeUMaze: no return targets are published for it; remove"):
        cdt._return_targets(settings, task("MazeUMaze"))


def test_an_episodes_actions_do_not_depend_on_its_neighbours(policy: cdt.CdtPolicy) -> None:
    g = np.random.default_rng(0)
    steps = [(g.normal(size=(3, 8)).astype(np.float32), g.random(3), g.random(3)) for _ in range(6)]

    def play(rows: list[int]) -> np.ndarray:
        policy.reset(len(rows), 20.0)
        actions = []
        for observations, rewards, costs in steps:
            actions.append(policy.act(observations[rows]))
            policy.observe(rewards[rows], costs[rows])
        return np.stack(actions)

    np.testing.assert_allclose(play([0, 1, 2])[:, 1], play([1])[:, 0], atol=1e-5)


def test_time_stands_still_behind_the_longest_episode(policy: cdt.CdtPolicy) -> None:
    """Rows of the time embeddings behind it were never trained; here they spoil what they touch."""
    policy._network.time[:, 20:] = torch.nan
    policy.reset(1, 20.0)
    for _ in range(30):
        assert np.isfinite(policy.act(np.zeros((1, 8), dtype=np.float32))).all()
        policy.observe(np.zeros(1), np.zeros(1))
    assert len(policy._past) == 4


def test_a_context_longer_than_any_episode_is_cut(tmp_path: Path) -> None:
    trained = run(tmp_path / "s", replace(SMALL, steps=1), dataset([(1.0, 1), (2.0, 2)], length=3))
    save_model(tmp_path / "m", trained.config, trained.files)
    loaded = cdt.load(tmp_path / "m")
    loaded._network.time[:, 3:] = torch.nan
    for _ in range(6):
        assert np.isfinite(loaded.act(np.zeros((1, 8), dtype=np.float32))).all()
        loaded.observe(np.zeros(1), np.zeros(1))
    assert len(loaded._past) == 3


def test_an_episode_that_is_never_drawn_trains_no_time() -> None:
    episodes = [*dataset([(1.0, 1), (2.0, 2)], length=5), *dataset([(9.0, 8)], length=9)]
    made = cdt.CDT("cdt", flatten(episodes, BALL), BALL, replace(SMALL, sampling_cap=8.0), [Member(0)])
    assert made.shape.time_steps == 5 + SMALL.context
    made = cdt.CDT("cdt", flatten(episodes, BALL), BALL, replace(SMALL, sampling_cap=9.0), [Member(0)])
    assert made.shape.time_steps == 9 + SMALL.context


def test_a_context_beyond_the_table_of_times_is_not_loaded(tmp_path: Path) -> None:
    trained = run(tmp_path / "s", replace(SMALL, steps=1))
    save_model(tmp_path / "m", {**trained.config, "context": 24}, trained.files)
    with pytest.raises(BadInput, match=r"config\.json: context is 24 of 24 time_steps"):
        cdt.load(tmp_path / "m")


def test_what_an_episode_earns_and_spends_changes_what_follows(policy: cdt.CdtPolicy) -> None:
    rows = np.ones((2, 8), dtype=np.float32)
    policy.reset(2, 20.0)
    policy.act(rows)
    policy.observe(np.array([0.0, 50.0]), np.array([0.0, 15.0]))
    actions = policy.act(rows)
    assert (actions[0] != actions[1]).any()


def test_acting_sees_the_targets_that_training_saw(policy: cdt.CdtPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float, int]] = []
    real = policy._network.forward

    def spy(inputs: torch.Tensor, times: torch.Tensor, costs: bool) -> Outputs:
        seen.append((float(inputs[0, 0, -1, 0]), float(inputs[0, 0, -1, 1]), inputs.shape[2]))
        assert times[0, 0].tolist() == list(range(len(seen) - inputs.shape[2], len(seen)))
        return real(inputs, times, costs=costs)

    monkeypatch.setattr(policy._network, "forward", spy)
    policy.reset(1, 10.0)
    target = policy.return_target(9.0)
    for _ in range(6):
        policy.act(np.zeros((1, 8), dtype=np.float32))
        policy.observe(np.array([2.0]), np.array([1.0]))
    # A tenth of the limit is held back; costs show as 50 less what is left; the context is 4 steps.
    assert seen[0] == pytest.approx((0.1 * target, 50 - 9.0, 1))
    assert seen[5] == pytest.approx((0.1 * (target - 10.0), 50 - 4.0, 4))
