"""CDT: relabelling and losses by hand, causality, the sampler, the learning curve, resuming, acting."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.offline import cdt
from springhead.rl.offline.batches import flatten
from springhead.rl.offline.relabelling import (
    Augmentation,
    Items,
    infeasible_targets,
    plain,
    relabelled,
    safe_answers,
)
from springhead.rl.offline.sequences import Batch, Sampler, Scheme, to_go
from springhead.rl.offline.transformer import Outputs, Transformer
from springhead.rl.policy import load_policy, save_model
from tests.rl.offline_data import BALL, dataset, episode, spread

pytestmark = pytest.mark.unit
SMALL = cdt.Settings(
    steps=6, batch_size=8, context=4, width=8, layers=1, heads=2, learning_rate=1e-2, warmup=2, decay=True,
    augmentation=Augmentation(min_per_cell=0), checkpoint_every=2,
)  # fmt: skip
PINNED = [1.93651, 1.83214, 1.72447, 1.65675, 1.60585, 1.58313]


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


# -- sequences --------------------------------------------------------------------------------


def test_to_go_sums_each_episode_on_its_own() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    assert to_go(values, torch.tensor([3, 2])).tolist() == [6.0, 5.0, 3.0, 30.0, 20.0]


def sampler(items: Items, cap: float = 70.0, size: int = 512) -> Sampler:
    return Sampler(flatten(DATA, BALL), items, Scheme(size, 3, 0.5, 1.0, 50.0, cap, "cpu"))


DATA = dataset([(20.0, 2), (40.0, 5)], length=5)


def test_relabelling_shifts_the_whole_curve() -> None:
    items = Items(np.array([1]), np.array([100.0]), np.array([8.0]))
    batch = sampler(items).draw(torch.Generator().manual_seed(0))
    first = int(torch.nonzero(batch.times[:, 0] == 0)[0])
    # Return 40 in steps of 8, asked for as 100: 100, 92, 84, half of it by the scale.
    assert batch.returns[first].tolist() == pytest.approx([50.0, 46.0, 42.0])
    # Cost 5, one at every step, asked for as 8: 50 - 8, 50 - 7, 50 - 6.
    assert batch.costs[first].tolist() == pytest.approx([42.0, 43.0, 44.0])
    assert batch.step_costs[first].tolist() == [1.0, 1.0, 1.0]


def test_sequences_are_padded_on_the_right_and_masked() -> None:
    batch = sampler(plain(np.array([20.0, 40.0]), np.array([2.0, 5.0]))).draw(torch.Generator().manual_seed(0))
    last = batch.times[:, 0] == 4
    assert last.any()
    assert batch.mask[last].tolist() == [[1.0, 0.0, 0.0]] * int(last.sum())
    assert (batch.observations[last][:, 1:] == 0).all()
    assert batch.mask.sum(1).min() >= 1


def test_episodes_are_drawn_in_proportion_to_cap_less_cost() -> None:
    items = Items(np.array([0, 1]), np.array([20.0, 40.0]), np.array([10.0, 55.0]))
    batch = sampler(items, cap=70.0, size=4000).draw(torch.Generator().manual_seed(0))
    # Costs-to-go at the first step tell the items apart: 60 against 15 of 75.
    starts = batch.times[:, 0] == 0
    share = (batch.costs[starts][:, 0] == 50.0 - 10.0).float().mean()
    assert share == pytest.approx(0.8, abs=0.04)


def test_an_episode_at_the_cap_is_never_drawn_and_none_below_is_an_error() -> None:
    items = Items(np.array([0, 1]), np.array([20.0, 40.0]), np.array([10.0, 70.0]))
    batch = sampler(items, cap=70.0).draw(torch.Generator().manual_seed(0))
    assert (batch.costs[batch.times[:, 0] == 0][:, 0] == 40.0).all()
    with pytest.raises(BadInput, match=r"sampling cap 10 \(the cheapest costs 10"):
        sampler(items, cap=10.0)


# -- network and losses -----------------------------------------------------------------------


def network(**changes: int) -> Transformer:
    shape = {"observation_dim": 8, "action_dim": 2, "time_steps": 30, "width": 16, "layers": 2, "heads": 4}
    made = Transformer(
        **{**shape, "cost_outputs": 2, **changes}, dropout=0.1, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():  # the small initial weights would make every difference tiny
        for parameter in made.parameters():
            parameter.mul_(8.0)
    return made.eval()


def tokens(batch: int = 2, steps: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    floats = [torch.randn(batch, steps, *more, generator=g) for more in ((), (), (8,), (2,))]
    return [*floats, torch.arange(steps).expand(batch, steps)]


def test_the_future_and_this_steps_action_do_not_change_an_action() -> None:
    net, inputs = network(), tokens()
    before = net(*inputs)
    for number in range(4):
        changed = [value.clone() for value in inputs]
        changed[number][:, 4:] += 10.0
        after = net(*changed)
        torch.testing.assert_close(after.mean[:, :4], before.mean[:, :4])
        torch.testing.assert_close(after.cost[:, :4], before.cost[:, :4])
        if number == 3:  # the action of step 4 shows from step 5 on
            torch.testing.assert_close(after.mean[:, 4], before.mean[:, 4])
        else:
            assert (after.mean[:, 4] - before.mean[:, 4]).abs().max() > 1e-3
        assert (after.mean[:, 5] - before.mean[:, 5]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_influence_each_other() -> None:
    net, inputs = network(), tokens(batch=3)
    together = net(*inputs).mean
    alone = net(*[value[1:2] for value in inputs]).mean
    torch.testing.assert_close(together[1:2], alone)


def test_losses_by_hand() -> None:
    mean, log_std = torch.zeros(1, 2, 2), torch.tensor([[[0.0, math.log(2.0)], [9.0, 9.0]]])
    outputs = Outputs(mean, log_std, torch.tensor([[[0.0, math.log(3.0)], [5.0, -5.0]]]))
    zeros = torch.zeros(1, 2)
    batch = Batch(
        returns=zeros, costs=zeros, observations=torch.zeros(1, 2, 8),
        actions=torch.tensor([[[1.0, 2.0], [7.0, 7.0]]]), times=torch.zeros(1, 2, dtype=torch.long),
        step_costs=torch.tensor([[1.0, 0.0]]), mask=torch.tensor([[1.0, 0.0]]),
    )  # fmt: skip
    log_two_pi = math.log(2 * math.pi)
    log_prob = -0.5 * (1 + log_two_pi) - 0.5 * (1 + log_two_pi) - math.log(2.0)
    entropy = (1 + log_two_pi) + math.log(2.0)
    joint = cdt.losses(outputs, batch, torch.tensor(0.1), "joint")
    assert float(joint.entropy) == pytest.approx(entropy, rel=1e-5)
    assert float(joint.action) == pytest.approx(-(log_prob + 0.1 * entropy), rel=1e-5)
    assert float(joint.cost) == pytest.approx(-math.log(3 / 4), rel=1e-5)
    mean_of = cdt.losses(outputs, batch, torch.tensor(0.1), "per-dimension")
    assert float(mean_of.entropy) == pytest.approx(entropy / 2, rel=1e-5)
    assert float(mean_of.action) == pytest.approx(float(joint.action) / 2, rel=1e-5)


def test_a_continuous_cost_is_regressed() -> None:
    outputs = Outputs(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([[[0.5]]]))
    one = torch.ones(1, 1)
    batch = Batch(one, one, torch.zeros(1, 1, 8), torch.zeros(1, 1, 2), one.long(), torch.tensor([[2.5]]), one)
    assert float(cdt.losses(outputs, batch, torch.tensor(0.1), "joint").cost) == pytest.approx(4.0)


@pytest.mark.parametrize(("entropy", "sign"), [(-1.9, 1.0), (-2.1, -1.0)])
def test_the_temperature_moves_by_the_joint_target(entropy: float, sign: float) -> None:
    log = torch.tensor(math.log(0.1), requires_grad=True)
    cdt.temperature_loss(log, torch.tensor(entropy), action_dim=2).backward()
    assert float(log.grad) == pytest.approx(0.1 * (entropy + 2), rel=1e-4)
    assert np.sign(float(log.grad)) == sign  # a positive gradient lowers it


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = replace(SMALL, steps=10, warmup=4, learning_rate=1.0)
    learner = cdt.Learner(network(), settings, 2, torch.Generator())
    assert [learner.rate(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert learner.rate(7) == pytest.approx(0.5)
    assert learner.rate(10) == pytest.approx(0.0)
    learner.settings = replace(settings, decay=False)
    assert learner.rate(10) == 1.0


# -- training ---------------------------------------------------------------------------------


def test_the_first_losses_are_pinned(tmp_path: Path) -> None:
    found: list[float] = []
    cdt.train(spread(12), BALL, SMALL, 3, tmp_path, lambda step, figures: found.append(figures["loss"]))
    assert found == pytest.approx(PINNED, rel=1e-4)


def test_it_learns_actions_that_follow_from_states(tmp_path: Path) -> None:
    settings = replace(SMALL, steps=150, batch_size=32, width=16, warmup=10, dropout=0.0, checkpoint_every=150)
    losses: list[float] = []
    cdt.train(spread(20), BALL, settings, 0, tmp_path, lambda step, figures: losses.append(figures["loss"]))
    assert losses[-1] < losses[0] - 1.0


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = cdt.train(spread(12), BALL, SMALL, 3, tmp_path / "whole")

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cdt.train(spread(12), BALL, SMALL, 3, tmp_path / "cut", stop)
    torch.rand(5)  # other use of torch's own generator must not matter
    seen: list[int] = []
    resumed = cdt.train(spread(12), BALL, SMALL, 3, tmp_path / "cut", lambda step, figures: seen.append(step))
    assert seen == [4, 5, 6]
    assert resumed.history == whole.history
    for folder, trained in (("a", whole), ("b", resumed)):
        save_model(tmp_path / folder, trained.config, trained.files)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_training_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    cdt.train(spread(6), BALL, replace(SMALL, steps=1), 0, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    cdt.train(spread(6), BALL, SMALL, 0, tmp_path)
    (tmp_path / "step-00000006" / "state.safetensors").write_bytes(b"short")
    with pytest.raises(BadInput, match="step-00000006: damaged checkpoint"):
        cdt.train(spread(6), BALL, SMALL, 0, tmp_path)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(tmp_path: Path) -> None:
    wild = replace(SMALL, learning_rate=1e38, steps=50, warmup=0)
    with pytest.raises(BadInput, match=r"not finite at step \d+; the last good state"):
        cdt.train(spread(4), BALL, wild, 0, tmp_path)


def test_small_and_flat_data_sets_train(tmp_path: Path) -> None:
    one = replace(SMALL, steps=2)
    for number, episodes in enumerate(([episode(5.0, 1)], dataset([(1.0, 4), (2.0, 4), (3.0, 4)]))):
        assert cdt.train(episodes, BALL, one, 0, tmp_path / str(number)).history[-1]["step"] == 2


def test_continuous_costs_get_a_head_of_one_output(tmp_path: Path) -> None:
    half = [replace(e, costs=e.costs * np.float32(0.5)) for e in spread(6)]
    assert cdt.train(half, BALL, replace(SMALL, steps=1), 0, tmp_path).config["cost_outputs"] == 1


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"rl\.train\.cdt\.device: 'abacus' cannot be used here"):
        cdt.train(spread(4), BALL, replace(SMALL, device="abacus"), 0, tmp_path)


# -- acting -----------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path: Path) -> cdt.CdtPolicy:
    trained = cdt.train(spread(12), BALL, replace(SMALL, target_margin=0.1), 3, tmp_path / "s")
    save_model(tmp_path / "m", trained.config, trained.files)
    loaded = load_policy(tmp_path / "m")
    assert isinstance(loaded, cdt.CdtPolicy)
    return loaded


def test_the_return_target_is_the_best_return_within_the_limit(policy: cdt.CdtPolicy) -> None:
    episodes = spread(12)
    for limit in (0.0, 3.0, 10.0, 100.0):
        best = max(e.episode_return for e in episodes if e.cost_return <= limit)
        assert policy.return_target(limit) == pytest.approx(best)


def test_a_table_of_return_targets_comes_first(tmp_path: Path) -> None:
    table = {"BallCircle": ((40.0, 800.0), (10.0, 700.0)), "CarRun": ((10.0, 575.0),)}
    trained = cdt.train(spread(5), BALL, replace(SMALL, steps=1, return_targets=table), 0, tmp_path / "s")
    save_model(tmp_path / "m", trained.config, trained.files)
    loaded = cdt.load(tmp_path / "m")
    assert [loaded.return_target(limit) for limit in (5, 10, 39, 40)] == [700.0, 700.0, 700.0, 800.0]


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

    def spy(returns: torch.Tensor, costs: torch.Tensor, *rest: torch.Tensor) -> Outputs:
        seen.append((float(returns[0, -1]), float(costs[0, -1]), returns.shape[1]))
        return real(returns, costs, *rest)

    monkeypatch.setattr(policy._network, "forward", spy)
    policy.reset(1, 10.0)
    target = policy.return_target(9.0)
    for _ in range(6):
        policy.act(np.zeros((1, 8), dtype=np.float32))
        policy.observe(np.array([2.0]), np.array([1.0]))
    # A tenth of the limit is held back; costs show as 50 less what is left; the context is 4 steps.
    assert seen[0] == pytest.approx((0.1 * target, 50 - 9.0, 1))
    assert seen[5] == pytest.approx((0.1 * (target - 10.0), 50 - 4.0, 4))
