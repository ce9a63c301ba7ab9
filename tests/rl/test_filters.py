"""Every filter against hand-computed numbers, and the chain of them."""

from pathlib import Path

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.params import load
from springhead.rl import filters
from springhead.rl.dataset import read_dsrl, write_dsrl
from springhead.rl.filter_chain import apply
from springhead.rl.filters import Density, Epsilon, Inpaint, Noise, Outliers, Settings
from springhead.stage import for_test
from springhead.tables import read_table, write_table
from stages.rl import collect
from stages.rl import filter as filter_stage
from tests.rl.offline_data import BALL, dataset, spread

pytestmark = pytest.mark.unit


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_highest_value_belongs_to_the_last_cell() -> None:
    values = np.array([0.0, 2.4, 2.5, 9.9, 10.0])
    assert filters.cells(values, 0.0, 10.0, 4).tolist() == [0, 0, 1, 3, 3]


def test_the_released_code_gives_the_highest_value_a_cell_of_its_own() -> None:
    assert filters.cells(np.array([9.9, 10.0]), 0.0, 10.0, 4, released=True).tolist() == [3, 4]


def test_values_outside_the_grid_have_no_cell_and_equal_values_share_one() -> None:
    assert filters.cells(np.array([-1.0, 0.5, 3.0]), 0.0, 1.0, 2).tolist() == [-1, 1, -1]
    assert filters.cells(np.full(3, 7.0), 7.0, 7.0, 10).tolist() == [0, 0, 0]


def test_density_empties_sparse_cells_and_thins_crowded_ones() -> None:
    costs = np.array([0.0] * 5 + [10.0] * 2 + [5.0])
    returns = np.zeros(8)
    sparse, crowded = filters.density(returns, costs, Density(2, 1, max_per_cell=3, min_per_cell=2), rng())
    # Cells: [0, 5) with 5 episodes, [5, 10] with 3.
    assert sparse.value.tolist() == [5.0] * 5 + [3.0] * 3
    assert sparse.kept.all()
    assert crowded.kept[:5].sum() == 3
    assert crowded.kept[5:].all()
    assert sorted(crowded.value[:5]) == [1, 2, 3, 4, 5]
    assert (crowded.kept == (crowded.value <= crowded.threshold)).all()


def test_a_cell_with_exactly_the_least_number_is_emptied() -> None:
    sparse, crowded = filters.density(
        np.array([0.0, 0.0, 9.0, 9.0, 9.0]), np.zeros(5), Density(1, 2, max_per_cell=5, min_per_cell=2), rng()
    )
    assert sparse.kept.tolist() == [False, False, True, True, True]
    assert crowded.index.tolist() == [2, 3, 4]


def test_density_over_the_published_box_drops_what_lies_outside() -> None:
    settings = Density(2, 2, max_per_cell=9, box="task")
    sparse, _ = filters.density(
        np.array([0.0, 5.0, 11.0]), np.array([0.0, 1.0, 1.0]), settings, rng(), (0, 10), (0, 80)
    )
    assert sparse.kept.tolist() == [True, True, False]
    assert sparse.value[2] == 0
    with pytest.raises(BadInput, match="filter density"):
        filters.density(np.zeros(2), np.zeros(2), settings, rng())


def test_density_is_the_same_for_the_same_seed_and_differs_for_another() -> None:
    episodes = spread(60)
    settings = Settings(density=Density(2, 2, max_per_cell=4))
    first, again, other = (apply(episodes, settings, BALL, seed) for seed in (1, 1, 2))
    assert first.sources == again.sources != other.sources
    assert first.decisions == again.decisions


def test_outliers_are_drawn_from_high_cost_and_high_return() -> None:
    returns, costs = np.array([10.0, 10.0, 4.0, 5.0]), np.array([20.0, 9.0, 20.0, 10.0])
    drawn = filters.outliers(returns, costs, Outliers(0.25, 20), rng())
    candidates = {0, 3}  # cost at least 10 and return at least 5
    assert set(np.flatnonzero(~drawn.kept).tolist()) < candidates
    assert np.isnan(drawn.value[[1, 2]]).all()
    with pytest.raises(BadInput, match="filter outliers: 3 of 4"):
        filters.outliers(returns, costs, Outliers(0.8, 20), rng())


def test_a_falsified_episode_claims_more_reward_and_a_cost_below_the_limit() -> None:
    source = dataset([(100.0, 15)])[0]
    claimed = {filters.falsified(source, 4, np.random.default_rng(seed)).cost_return for seed in range(40)}
    assert claimed == {0.0, 1.0, 2.0, 3.0}
    changed = filters.falsified(source, 4, rng())
    assert changed.episode_return == pytest.approx(150.0)
    assert (changed.observations == source.observations).all()
    assert set(np.unique(changed.costs)) <= {0.0, 1.0}


def test_inpaint_measures_returns_within_the_strip_of_costs() -> None:
    costs = np.array([10.0, 20.0, 30.0, 40.0, 70.0])
    returns = np.array([0.0, 50.0, 80.0, 100.0, 1000.0])
    # Costs from 8 to 40 of 80; there returns go from 0 to 100, so 0.4 to 0.8 is 40 to 80.
    found = filters.inpaint(returns, costs, Inpaint(0.1, 0.5, 0.4, 0.8), (0.0, 80.0))
    assert found.kept.tolist() == [True, False, False, True, True]
    assert found.value[:4].tolist() == [0.0, 0.5, 0.8, 1.0]
    assert np.isnan(found.value[4])


def test_epsilon_cuts_the_best_safe_or_the_best_unsafe_episodes() -> None:
    costs, returns = np.array([5.0, 10.0, 11.0, 30.0]), np.array([50.0, 90.0, 300.0, 395.0])
    harder = filters.epsilon(returns, costs, Epsilon(40.0, 10.0))
    assert harder.kept.tolist() == [False, False, True, True]  # best safe 90, so 50 goes too
    easier = filters.epsilon(returns, costs, Epsilon(-94.0, 10.0))
    assert easier.kept.tolist() == [True, True, True, False]
    assert easier.threshold[3] == 301.0
    with pytest.raises(ValueError, match="neither side"):
        Epsilon(0.0, 10.0)


def test_epsilon_with_an_empty_side_keeps_everything() -> None:
    assert filters.epsilon(np.ones(3), np.full(3, 50.0), Epsilon(10.0, 10.0)).kept.all()


def test_noise_keeps_successors_equal_to_the_next_state() -> None:
    source = spread(2)[1]
    changed = filters.noisy(source, 0.5, rng())
    np.testing.assert_array_equal(changed.observations[1:], changed.next_observations[:-1])
    assert (changed.observations - source.observations).std() == pytest.approx(0.5, rel=0.2)
    released = filters.noisy(source, 0.5, rng(), released=True)
    assert (released.observations[1:] != released.next_observations[:-1]).any()


def test_the_noise_scale_counts_in_deviations_of_all_observation_entries() -> None:
    episodes = spread(3)
    entries = np.concatenate([e.observations for e in episodes])
    assert filters.observation_spread(episodes) == pytest.approx(entries.std(), rel=1e-6)
    left = apply(episodes, Settings(noise=Noise(0.1)), BALL, 0)
    assert left.decisions[0].value == pytest.approx(0.1 * entries.std(), rel=1e-6)


def test_changed_episodes_get_new_ids_and_the_decision_names_them() -> None:
    episodes = spread(10)
    left = apply(episodes, Settings(outliers=Outliers(0.2, 10), noise=Noise(0.1)), BALL, 0)
    assert len(left.episodes) == 10
    assert not {e.id for e in episodes} & {e.id for e in left.episodes}
    by_noise = {d.replaced_by for d in left.decisions if d.rule == "noise"}
    assert by_noise == {e.id for e in left.episodes}
    falsified = [d for d in left.decisions if d.rule == "outliers" and d.replaced_by]
    assert len(falsified) == 2
    assert all(not d.kept for d in falsified)


def test_falsified_episodes_survive_inpaint_and_epsilon() -> None:
    episodes = spread(12)
    settings = Settings(outliers=Outliers(0.1, 10), inpaint=(Inpaint(0, 1, 0.9, 1),), epsilon=Epsilon(15.0, 10.0))
    left = apply(episodes, settings, BALL, 0)
    planted = {d.replaced_by for d in left.decisions if d.replaced_by}
    assert planted <= {e.id for e in left.episodes}
    assert not planted & {d.id for d in left.decisions if d.rule in ("inpaint-1", "epsilon")}
    assert any(d.rule == "epsilon" and not d.kept for d in left.decisions)


def test_every_episode_that_is_gone_has_a_decision_that_dropped_it() -> None:
    episodes = spread(40)
    left = apply(episodes, Settings(density=Density(4, 4, 2, 1), epsilon=Epsilon(5.0, 10.0)), BALL, 3)
    gone = {e.id for e in episodes} - {e.id for e in left.episodes}
    assert gone == {d.id for d in left.decisions if not d.kept}
    assert gone


def test_the_order_is_a_parameter() -> None:
    order = ("noise", "density", "outliers", "inpaint", "epsilon")
    left = apply(spread(10), Settings(density=Density(), noise=Noise(0.1), order=order), BALL, 0)
    assert list(dict.fromkeys(d.rule for d in left.decisions)) == [
        "noise",
        "density-sparse",
        "density-crowded",
    ]
    with pytest.raises(ValueError, match="once"):
        Settings(order=("noise", "noise"))


def test_a_filter_that_leaves_nothing_is_named_with_its_counts() -> None:
    with pytest.raises(BadInput, match=r"filter density-sparse: none of its 6 episodes is left \(of 6"):
        apply(spread(6), Settings(density=Density(1, 1, max_per_cell=9, min_per_cell=9)), BALL, 0)
    with pytest.raises(BadInput, match="holds no episodes"):
        apply([], Settings(), BALL, 0)


def test_episodes_of_equal_cost_pass_the_grid() -> None:
    left = apply(dataset([(float(i), 3) for i in range(9)]), Settings(density=Density(10, 3, 2, 1)), BALL, 0)
    assert len(left.episodes) == 6  # three cells of three, two of each kept


def test_a_preset_takes_the_published_numbers_and_an_unknown_one_is_an_error() -> None:
    left = apply(spread(200), Settings(density=Density(preset="0.5")), BALL, 0)
    assert {d.threshold for d in left.decisions if d.rule == "density-crowded"} == {5.0}
    with pytest.raises(BadInput, match=r"no preset .0\.9.; it has 0\.5, 0\.75"):
        apply(spread(3), Settings(density=Density(preset="0.9")), BALL, 0)


def test_no_filter_still_gives_every_episode_a_decision() -> None:
    left = apply(spread(4), Settings(), BALL, 0)
    assert [(d.rule, d.kept) for d in left.decisions] == [("none", True)] * 4


def collected(folder: Path, episodes: list) -> Path:
    folder.mkdir()
    write_dsrl(folder / "dataset.hdf5", episodes)
    n = len(episodes)
    columns = {
        "id": [e.id for e in episodes], "parents": [[]] * n, "policy": ["p"] * n, "algorithm": ["ppo-lag"] * n,
        "cost_limit": [10.0] * n, "seed": list(range(n)), "deterministic": [False] * n,
        "episode_return": [e.episode_return for e in episodes], "cost_return": [e.cost_return for e in episodes],
        "length": [e.length for e in episodes], "index": list(range(n)),
    }  # fmt: skip
    write_table(folder / "rows.parquet", columns, collect.ROWS)
    return folder


def test_the_stage_writes_data_rows_decisions_and_plots(tmp_path: Path) -> None:
    episodes = spread(20)
    source = collected(tmp_path / "collected", episodes)
    block = {
        "density": {"cost_bins": 2, "return_bins": 2, "max_per_cell": 4},
        "outliers": {"fraction": 0.1, "cost_limit": 5},
    }
    params = load(filter_stage.Params, block, "params.yaml: rl.filter")
    outs = []
    for name in ("first", "second"):
        stage = for_test(params, tmp_path / name, {"collect": source}, {"task": "BallCircle"}, seed=5, stage="filter")
        filter_stage.run(stage)
        outs.append(tmp_path / name)
    for file in ("dataset.hdf5", "rows.parquet", "decisions.parquet", "scatter.csv", "scatter.png"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes(), file
    left = read_dsrl(outs[0] / "dataset.hdf5").episodes()
    rows = read_table(outs[0] / "rows.parquet").to_pylist()
    assert [row["id"] for row in rows] == [e.id for e in left]
    assert [row["index"] for row in rows] == list(range(len(left)))
    originals = {e.id for e in episodes}
    changed = [row for row in rows if row["id"] not in originals]
    assert len(changed) == 1
    assert changed[0]["parents"][0] in originals
    assert changed[0]["cost_return"] < 5
    assert stage.record.metrics["left"] == len(left) < 20


def test_the_stage_refuses_rows_that_belong_to_other_data(tmp_path: Path) -> None:
    source = collected(tmp_path / "collected", spread(5))
    write_dsrl(source / "dataset.hdf5", spread(6))
    stage = for_test(filter_stage.Params(), tmp_path / "out", {"collect": source}, {"task": "BallCircle"})
    with pytest.raises(BadInput, match="name different episodes"):
        filter_stage.run(stage)
