"""BC's selections by hand, its learning curve, and resuming."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.offline import bc, training
from springhead.rl.offline.contract import OnStep
from springhead.rl.offline.frontier import fit, fit_until, pareto
from springhead.rl.policy import load_policy, save_model
from tests.rl.offline_data import BALL, dataset, episode, spread

pytestmark = pytest.mark.unit
SMALL = bc.BCSettings(steps=6, batch_size=16, hidden=(8,), checkpoint_every=2, report_every=1)


def quiet(step: int, figures: dict[str, float]) -> None:
    pass


COSTS = np.array([0.0, 5.0, 5.5, 10.0, 15.0, 15.5, 19.5, 20.0])
RETURNS = np.arange(8.0)


@pytest.mark.parametrize(
    ("mode", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("safe", [0, 1, 2, 3]),  # C <= 10
        ("boundary", [2, 3, 4]),  # 5 < C <= 15
        ("risky", [7]),  # C >= 20
        ("multi-task", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_each_mode_selects_by_cost_with_its_own_borders(mode: str, chosen: list[int]) -> None:
    assert bc.select(mode, RETURNS, COSTS, 10.0).tolist() == chosen


def test_the_safety_margin_lowers_the_border() -> None:
    assert bc.select("safe", RETURNS, COSTS, 10.0, margin=0.5).tolist() == [0, 1]


def test_an_empty_selection_and_an_unknown_mode_are_named() -> None:
    with pytest.raises(BadInput, match=r"bc-safe: none of 3 episodes costs at most 10 \(costs from 11 to 13\)"):
        bc.select("safe", np.ones(3), np.array([11.0, 12.0, 13.0]), 10.0)
    with pytest.raises(BadInput, match="unknown BC mode 'bold'"):
        bc.select("bold", RETURNS, COSTS, 10.0)


def test_the_pareto_set_holds_what_nothing_beats_in_both() -> None:
    returns = np.array([1.0, 5.0, 4.0, 5.0, 9.0, 5.0])
    costs = np.array([0.0, 2.0, 1.0, 2.0, 9.0, 3.0])
    assert pareto(returns, costs).tolist() == [0, 2, 1, 4]  # of the two equal ones the first


def test_the_frontier_polynomial_rises_in_degree_until_it_explains_enough() -> None:
    costs = np.array([0.0, 1.0, 2.0, 3.0])
    assert fit_until(np.full(4, 3.0), costs).degree() == 0
    assert fit_until(2 * costs + 1, costs).degree() == 1
    square = fit_until(costs**2 * np.array([1, 1, 1, 1.0]) - 3 * costs, costs)
    assert square.degree() == 2
    assert square(4.0) == pytest.approx(4.0)


@pytest.mark.parametrize("degree", [0, 1, 2, 4])
def test_a_fit_never_has_more_coefficients_than_distinct_costs(degree: int) -> None:
    assert fit(np.array([3.0, 5.0]), np.array([1.0, 2.0]), degree).degree() <= 1
    assert fit(np.array([3.0, 5.0]), np.array([7.0, 7.0]), degree)(7.0) == 4.0
    assert fit(np.array([3.0]), np.array([7.0]), degree)(0.0) == 3.0


def test_the_frontier_mode_keeps_a_band_of_a_fifth_of_the_range() -> None:
    costs = np.array([0.0, 10.0, 20.0, 20.0, 20.0])
    returns = np.array([0.0, 50.0, 100.0, 81.0, 79.0])
    assert bc.select("frontier", returns, costs, 0.0).tolist() == [0, 1, 2, 3]


def test_one_episode_and_equal_costs_are_enough_for_the_frontier() -> None:
    assert bc.select("frontier", np.array([4.0]), np.array([3.0]), 0.0).tolist() == [0]
    assert bc.select("frontier", np.array([4.0, 4.0]), np.array([3.0, 3.0]), 0.0).tolist() == [0, 1]


def train(
    mode: str, episodes: list[Episode], settings: bc.BCSettings, seed: int, scratch: Path, on_step: OnStep = quiet
) -> training.Trained:
    return training.train(f"bc-{mode}", episodes, BALL, settings, [seed], scratch, on_step)[0]


def test_the_first_losses_are_pinned(tmp_path: Path) -> None:
    losses: list[float] = []
    ten = replace(SMALL, steps=10)
    train("safe", spread(12), ten, 3, tmp_path, lambda step, f: losses.append(f["loss-limit-10"]))
    assert losses == pytest.approx(PINNED, rel=1e-4)


PINNED = [0.330007, 0.517342, 0.383173, 0.46575, 0.444582, 0.469286, 0.451691, 0.355254, 0.416852, 0.403182]


def test_it_learns_actions_that_follow_from_states(tmp_path: Path) -> None:
    settings = replace(SMALL, steps=250, hidden=(32,), learning_rate=1e-2, decay=True, checkpoint_every=250)
    trained = train("safe", spread(30), settings, 0, tmp_path)
    assert trained.history[-1]["loss-limit-20"] < 0.02  # the actions' variance is about 0.4


@pytest.mark.parametrize("mode", ["safe", "multi-task"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, mode: str) -> None:
    whole = train(mode, spread(12), SMALL, 3, tmp_path / "whole")

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(mode, spread(12), SMALL, 3, tmp_path / "cut", stop)
    seen: list[int] = []
    resumed = train(mode, spread(12), SMALL, 3, tmp_path / "cut", lambda step, f: seen.append(step))
    assert seen == [4, 5, 6]  # told where it resumed, then the two steps left
    assert resumed.history == whole.history
    for folder, trained in (("a", whole), ("b", resumed)):
        save_model(tmp_path / folder, trained.config, trained.files)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(["config.json", *whole.files])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_acting_under_a_limit_uses_the_largest_trained_limit_below(tmp_path: Path) -> None:
    trained = train("safe", spread(12, 60), SMALL, 3, tmp_path / "s")
    save_model(tmp_path / "m", trained.config, trained.files)
    policy = load_policy(tmp_path / "m")
    observations = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)

    def act(limit: float) -> np.ndarray:
        policy.reset(3, limit)
        return policy.act(observations)

    np.testing.assert_array_equal(act(10), act(19.9))
    np.testing.assert_array_equal(act(40), act(1000))
    assert (act(10) != act(20)).any()
    assert (act(20) != act(40)).any()
    with pytest.raises(BadInput, match="trained for the cost limits 10, 20, 40; ask for at least 10, not 9"):
        policy.reset(1, 9)


def test_multi_task_acts_by_the_limit_it_is_given(tmp_path: Path) -> None:
    trained = train("multi-task", spread(12), SMALL, 3, tmp_path / "s")
    assert list(trained.files) == ["policy.safetensors"]
    save_model(tmp_path / "m", trained.config, trained.files)
    policy = load_policy(tmp_path / "m")
    rows = np.zeros((2, 8), dtype=np.float32)
    policy.reset(2, 0)
    low = policy.act(rows)
    policy.reset(2, 40)
    assert (policy.act(rows) != low).any()


def test_multi_task_takes_limits_of_ones_own(tmp_path: Path) -> None:
    dear = dataset([(9.0, 15), (9.5, 18)])
    with pytest.raises(
        BadInput, match=r"bc-multi-task on BallCircle: none of 2 episodes keeps the cost limit 10 .*set"
    ):
        train("multi-task", dear, SMALL, 0, tmp_path / "default")
    config = train("multi-task", dear, replace(SMALL, limits=(25.0, 15.0)), 0, tmp_path / "own").config
    assert (config["limits"], config["asked_limits"], config["cost_scale"]) == ([], [15.0, 25.0], 25.0)
    config = train("multi-task", spread(12), SMALL, 0, tmp_path / "task").config
    assert config["cost_scale"] == 40.0
    assert "asked_limits" not in config
    with pytest.raises(BadInput, match=r"bc-multi-task: limits are all 0.*name one above 0"):
        train("multi-task", spread(12), replace(SMALL, limits=(0.0,)), 0, tmp_path / "zero")
    raw = replace(SMALL, limits=(0.0,), cost_input="raw")  # nothing is divided by the highest limit
    assert train("multi-task", spread(12), raw, 0, tmp_path / "raw").config["asked_limits"] == [0.0]


def test_multi_task_may_see_costs_as_they_are(tmp_path: Path) -> None:
    raw = train("multi-task", spread(12), replace(SMALL, cost_input="raw"), 3, tmp_path / "raw")
    assert raw.config["cost_scale"] == 1.0
    scaled = train("multi-task", spread(12), SMALL, 3, tmp_path / "scaled")
    assert raw.history[0]["loss"] != scaled.history[0]["loss"]


def test_bad_data_are_named_before_training(tmp_path: Path) -> None:
    broken = episode(10.0, 3)
    broken.rewards[4] = np.nan
    with pytest.raises(BadInput, match=f"episode 1 .{broken.id[:12]}.*not finite"):
        train("all", [episode(5.0, 1), broken], SMALL, 0, tmp_path)
    with pytest.raises(BadInput, match="no episodes of BallCircle"):
        train("all", [], SMALL, 0, tmp_path)
    narrow = episode(1.0, 0)
    narrow = replace(narrow, observations=narrow.observations[:, :5])
    with pytest.raises(BadInput, match="train on this task's own data"):
        train("all", [narrow], SMALL, 0, tmp_path)
    with pytest.raises(BadInput, match="bc-safe: none of 2 episodes"):
        train("safe", dataset([(9.0, 18), (9.5, 19)]), SMALL, 0, tmp_path)


def test_data_that_say_nothing_of_costs_are_refused(tmp_path: Path) -> None:
    for mode in ("safe", "risky", "boundary", "multi-task"):
        with pytest.raises(BadInput, match=f"bc-{mode} on BallCircle: one episode only"):
            train(mode, [episode(5.0, 10)], SMALL, 0, tmp_path)
    with pytest.raises(BadInput, match="bc-multi-task on BallCircle: each of 2 episodes costs 3"):
        train("multi-task", dataset([(1.0, 3), (2.0, 3)]), SMALL, 0, tmp_path)
    # What does not look at costs needs no two of them.
    assert train("all", [episode(5.0, 1)], SMALL, 0, tmp_path).history[-1]["step"] == 6


def test_what_is_selected_is_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"bc-safe: none of 2 episodes costs at most 7 \(costs from 8 to 9\)"):
        train("safe", dataset([(1.0, 8), (2.0, 9)]), replace(SMALL, safety_margin=0.3), 0, tmp_path)
    with pytest.raises(BadInput, match="bc-risky: none of 2 episodes costs at least 80"):
        train("risky", dataset([(1.0, 8), (2.0, 9)]), SMALL, 0, tmp_path)


def test_weights_that_are_not_finite_stop_at_the_last_good_state(tmp_path: Path) -> None:
    fine = replace(SMALL, steps=2, checkpoint_every=1)
    train("all", spread(4), fine, 0, tmp_path / "fine")
    wild = replace(SMALL, learning_rate=1e38, steps=50, checkpoint_every=1)
    with pytest.raises(BadInput, match=r"weight\.\S+ is not finite at step \d+; .*rates of bc in rl.train.algorithms"):
        train("all", spread(4), wild, 0, tmp_path / "wild")
    for folder in (tmp_path / "wild").glob("step-*"):
        assert all(value.isfinite().all() for value in load_file(folder / "state.safetensors").values())
    # The last step is looked at as well, though no figure comes after it.
    with pytest.raises(BadInput, match="is not finite at step 1; no state was kept yet"):
        train("all", spread(4), replace(SMALL, learning_rate=1e39, steps=1), 0, tmp_path / "one")


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="safety_margin"):
        bc.BCSettings(safety_margin=1.0)
    with pytest.raises(ValueError, match="steps is 0; use at least 1"):
        bc.BCSettings(steps=0)
