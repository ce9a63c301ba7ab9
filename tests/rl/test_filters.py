"""Every filter against hand-computed numbers, and the chain of them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.params import load
from springhead.rl import facts, filters
from springhead.rl.dataset import Dataset, Episode, read_dsrl, write_dsrl
from springhead.rl.filter_chain import Settings, Step, apply
from springhead.rl.filter_state import Filtered
from springhead.rl.filters import Density, Epsilon, Inpaint, Noise, Outliers, Ranges, Thin
from springhead.stage import for_test
from springhead.tables import read_table, write_table
from stages.rl import filter as filter_stage
from tests.rl.offline_data import BALL, dataset, spread

pytestmark = pytest.mark.unit


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def chain(episodes: list[Episode], seed: int = 0, *steps: dict[str, Any], **step: Any) -> Filtered:
    """Runs steps over BallCircle episodes."""
    listed = tuple(Step(**s) for s in (*steps, *([step] if step else [])))
    return apply(Dataset.of(episodes), Settings(listed), BALL, seed)


def decisions(left: Filtered) -> list[dict[str, Any]]:
    """The decisions table, row by row; NaN as None, so that rows compare."""
    columns = {k: v.tolist() for k, v in left.decisions(left.ids()).items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{k: None if v != v else v for k, v in row.items()} for row in rows]


def test_the_highest_value_belongs_to_the_last_cell() -> None:
    values = np.array([0.0, 2.4, 2.5, 9.9, 10.0])
    assert filters.cells(values, 0.0, 10.0, 4).tolist() == [0, 0, 1, 3, 3]


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
    first, again, other = (chain(spread(60), seed, density=Density(2, 2, max_per_cell=4)) for seed in (1, 1, 2))
    assert first.sources.tolist() == again.sources.tolist() != other.sources.tolist()
    assert decisions(first) == decisions(again)


def test_ranges_keep_what_lies_on_their_bounds() -> None:
    returns, costs = np.array([0.0, 1.0, 2.0, 3.0]), np.array([9.0, 20.0, 21.0, 0.0])
    high, low = filters.ranges(returns, costs, Ranges(cost_max=20.0, return_min=1.0))
    assert (high.rule, high.index.tolist(), high.kept.tolist()) == ("range-cost-max", [0, 1, 2, 3], [1, 1, 0, 1])
    assert (low.rule, low.index.tolist(), low.kept.tolist()) == ("range-return-min", [0, 1, 3], [0, 1, 1])
    assert set(high.threshold) == {20.0}
    assert low.value.tolist() == [0.0, 1.0, 3.0]


def test_thinning_keeps_the_last_of_every_cell_and_fills_cells_alike() -> None:
    # Four cells of a two by two grid: 60, 3, 2 and 1 episodes.
    sizes = [((0.0, 0.0), 60), ((0.0, 9.0), 3), ((9.0, 0.0), 2), ((9.0, 9.0), 1)]
    costs, returns = (np.repeat([x[axis] for x, _ in sizes], [n for _, n in sizes]) for axis in (0, 1))
    last = np.cumsum([n for _, n in sizes]) - 1
    few = filters.thin(returns, costs, Thin(4), rng())
    assert few.survivors().tolist() == last.tolist()
    # One more: a cell that has any left is as likely as another, though one has 59 and one has 1.
    extra = [set(filters.thin(returns, costs, Thin(5), np.random.default_rng(seed)).survivors()) for seed in range(300)]
    grids = [filters.thin(returns, costs, Thin(5), np.random.default_rng(seed)) for seed in range(300)]
    assert all(len(kept) == 5 for kept in extra)
    assert all((g.kept == (g.value <= 5)).all() for g in grids)
    # Thin(5) has three cells a side, but these four corners stay four cells.
    drawn = np.array([(kept - set(last.tolist())).pop() for kept in extra])
    shares = [np.mean(drawn == 58), np.mean(drawn == 61), np.mean(drawn == 63)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.09)  # three standard errors of 300 draws
    everything = filters.thin(returns, costs, Thin(66), rng())
    assert everything.kept.all()


def test_thinning_to_less_than_there_are_cells_draws_cells() -> None:
    values = np.arange(9.0)
    kept = {tuple(filters.thin(values, values, Thin(2), np.random.default_rng(s)).survivors()) for s in range(30)}
    assert len(kept) == 1  # two cells a side: one of either half, its last
    grid = np.array([0.0, 0.0, 9.0, 9.0]), np.array([0.0, 9.0, 0.0, 9.0])
    drawn = {tuple(filters.thin(*grid, Thin(2), np.random.default_rng(s)).survivors()) for s in range(60)}
    assert len(drawn) == 6  # any two of four cells


def test_outliers_are_drawn_from_high_cost_and_high_return() -> None:
    returns, costs = np.array([10.0, 10.0, 4.0, 5.0]), np.array([20.0, 9.0, 20.0, 10.0])
    drawn = filters.outliers(returns, costs, Outliers(0.25, 20), rng(), (20.0, 10.0))
    candidates = {0, 3}  # cost at least 10 and return at least 5
    assert set(np.flatnonzero(~drawn.kept).tolist()) < candidates
    assert np.isnan(drawn.value[[1, 2]]).all()
    with pytest.raises(BadInput, match=r"filter outliers: 3 of 4.*only 2 .*rl\.filter\.steps lower its fraction"):
        filters.outliers(returns, costs, Outliers(0.8, 20), rng(), (20.0, 10.0))


def test_a_falsified_episode_claims_more_reward_and_a_cost_below_the_limit() -> None:
    source = dataset([(100.0, 15)])
    claimed = set()
    for seed in range(40):
        left = chain(source, seed, outliers=Outliers(0.5, 4))
        [changed] = left.dataset.episodes()
        claimed.add(changed.cost_return)
        assert changed.episode_return == pytest.approx(150.0)
        assert (changed.observations == source[0].observations).all()
        assert set(np.unique(changed.costs)) <= {0.0, 1.0}
    assert claimed == {0.0, 1.0, 2.0, 3.0}
    assert source[0].cost_return == 15  # the input is left as it was


def test_a_task_s_published_maxima_can_decide_who_is_an_outlier() -> None:
    episodes = dataset([(10.0, 10)] * 4)
    assert chain(episodes, outliers=Outliers(0.3, 4)).changed.sum() == 1
    with pytest.raises(BadInput, match=r"only 0 .*highest return, 881\.463; in rl\.filter\.steps use another box"):
        chain(episodes, outliers=Outliers(0.3, 4, box="task"))


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
    episodes = [*spread(3), *dataset([(1.0, 2)], length=7)]
    left = chain(episodes, noise=Noise(0.5))
    entries = np.concatenate([e.observations for e in episodes])
    size = 0.5 * entries.std()
    for before, after in zip(episodes, left.dataset.episodes(), strict=True):
        np.testing.assert_array_equal(after.observations[1:], after.next_observations[:-1])
        assert (after.observations != before.observations).all()
        assert (after.next_observations[-1] != before.next_observations[-1]).all()
    added = left.dataset.observations - entries
    assert added.std() == pytest.approx(size, rel=0.1)
    assert abs(added.mean()) < 0.1
    assert left.looks[0].judgement.value == pytest.approx(size, rel=1e-6)


def test_changed_episodes_get_new_ids_and_the_decision_names_them() -> None:
    episodes = spread(10)
    left = chain(episodes, 0, {"outliers": Outliers(0.2, 10)}, {"noise": Noise(0.1)})
    final = {e.id for e in left.dataset.episodes()}
    assert len(final) == 10
    assert left.changed.all()
    assert not {e.id for e in episodes} & final
    rows = decisions(left)
    assert {r["replaced_by"] for r in rows if r["rule"] == "noise"} == final
    falsified = {r["id"]: r for r in rows if r["rule"] == "outliers" and r["replaced_by"]}
    assert len(falsified) == 2
    assert not any(r["kept"] for r in falsified.values())
    # A falsified episode is what noise changed next: the chain of ids has no gap.
    assert {r["replaced_by"] for r in falsified.values()} <= {r["id"] for r in rows if r["rule"] == "noise"}


def test_sub_costs_go_where_their_episodes_go_and_agree_with_a_lie() -> None:
    episodes = [
        replace(e, sub_costs=np.stack([np.zeros(e.length), e.costs], axis=1).astype(np.float32)) for e in spread(12)
    ]
    left = chain(episodes, 3, {"outliers": Outliers(0.1, 9)}, {"range": Ranges(cost_max=17.0)}, {"noise": Noise(0.1)})
    made = left.dataset
    assert made.sub_costs is not None
    np.testing.assert_array_equal(made.sub_costs.max(axis=1), made.costs)
    lies = made.sub_costs[:, 0].sum()  # the first constraint costs something in the falsified episode alone
    changed = [n for n, source in enumerate(left.sources) if made.cost_returns[n] != episodes[source].cost_return]
    assert lies == made.cost_returns[changed].sum() > 0
    assert left.left(left.ids()).tolist() == [e.id for e in made.episodes()]
    assert all(e.sub_costs is not None and e.sub_costs[:, 0].sum() == 0 for e in episodes)  # the input keeps its own


def test_ids_of_untouched_episodes_are_the_given_ones() -> None:
    left = chain(spread(6), outliers=Outliers(0.2, 10))
    ids = left.ids([f"id-{i}" for i in range(6)])
    changed = int(np.flatnonzero(left.changed)[0])
    assert ids[:6].tolist() == [f"id-{i}" for i in range(6)]
    assert left.left(ids)[changed] == left.dataset.episode(changed).id
    assert [i for i in left.left(ids) if i.startswith("id-")] == [f"id-{i}" for i in range(6) if i != changed]


def test_falsified_episodes_survive_inpaint_and_epsilon() -> None:
    steps = {"outliers": Outliers(0.1, 10)}, {"inpaint": Inpaint(0, 1, 0.9, 1)}, {"epsilon": Epsilon(15.0, 10.0)}
    left = chain(spread(12), 0, *steps)
    rows = decisions(left)
    planted = {r["replaced_by"] for r in rows if r["replaced_by"]}
    assert planted <= {e.id for e in left.dataset.episodes()}
    assert not planted & {r["id"] for r in rows if r["rule"] in ("inpaint-1", "epsilon")}
    assert any(r["rule"] == "epsilon" and not r["kept"] for r in rows)


def test_where_only_falsified_episodes_are_left_inpaint_and_epsilon_judge_none() -> None:
    episodes = dataset([(10.0, 10)] + [(9.0, 1)] * 3)
    left = chain(
        episodes,
        0,
        {"outliers": Outliers(0.1, 10)},
        {"range": Ranges(return_min=11.0)},
        {"inpaint": Inpaint(0.0, 1.0, 0.0, 1.0)},
        {"epsilon": Epsilon(1.0, 10)},
    )
    assert left.changed.tolist() == [True]
    assert {row["rule"] for row in decisions(left)} == {"outliers", "range-return-min"}


def test_every_episode_that_is_gone_has_a_decision_that_dropped_it() -> None:
    episodes = spread(40)
    steps = {"range": Ranges(cost_max=18.0)}, {"density": Density(4, 4, 2, 1)}, {"epsilon": Epsilon(5.0, 10.0)}
    left = chain(episodes, 3, *steps, {"thin": Thin(4)})
    gone = {e.id for e in episodes} - {e.id for e in left.dataset.episodes()}
    assert gone == {r["id"] for r in decisions(left) if not r["kept"]}
    assert len(left.dataset) == 4
    assert (np.diff(left.sources) > 0).all()


def test_episodes_of_different_lengths_are_laid_end_to_end_in_order() -> None:
    episodes = [e for n in range(8) for e in dataset([(float(n), n % 3)], length=5 + n % 4)]
    left = chain(episodes, range=Ranges(return_min=1.0, return_max=6.5))
    assert [e.id for e in left.dataset.episodes()] == [e.id for e in episodes[1:7]]
    some = chain(episodes, range=Ranges(cost_max=1.0))
    assert [e.id for e in some.dataset.episodes()] == [e.id for n, e in enumerate(episodes) if n % 3 < 2]


def test_steps_run_in_their_order_and_as_often_as_listed() -> None:
    grid = {"density": Density(3, 3, 2)}
    left = chain(spread(20), 0, {"noise": Noise(0.1)}, grid, {"inpaint": Inpaint(0, 0.4, 0, 0.5)}, grid)
    names = ["noise", "density-sparse", "density-crowded", "inpaint-1", "density-sparse", "density-crowded"]
    assert [look.judgement.rule for look in left.looks] == names


def test_a_filter_that_leaves_nothing_is_named_with_its_counts() -> None:
    with pytest.raises(BadInput, match=r"filter density-sparse: none of its 6 episodes is left \(of 6"):
        chain(spread(6), density=Density(1, 1, max_per_cell=9, min_per_cell=9))
    with pytest.raises(BadInput, match=r"filter range-cost-max: none.*rl\.filter\.steps"):
        chain(spread(6), range=Ranges(cost_max=-1.0))


def test_subsampling_takes_whole_episodes_in_random_order_until_the_share_is_reached() -> None:
    lengths = np.array([10, 20, 30, 40])
    order = rng().permutation(4)
    found = filters.subsample(lengths, filters.Subsample(0.5), rng())
    taken = [i for place, i in enumerate(order) if lengths[order[:place]].sum() < 50]
    assert found.survivors().tolist() == sorted(taken)
    assert 50 <= lengths[found.survivors()].sum() < 50 + lengths[taken[-1]]
    assert found.value[order].tolist() == [lengths[order[:place]].sum() / 100 for place in range(4)]
    assert filters.subsample(lengths, filters.Subsample(1.0), rng()).kept.all()


def test_a_smaller_share_is_a_part_of_a_greater_one_and_another_seed_draws_others() -> None:
    episodes = spread(100)
    ids = {
        (ratio, seed): {e.id for e in chain(episodes, seed, subsample=filters.Subsample(ratio)).dataset.episodes()}
        for ratio in (0.01, 0.1, 1.0)
        for seed in (0, 1)
    }
    assert ids[0.01, 0] < ids[0.1, 0] < ids[1.0, 0] == ids[1.0, 1]
    assert ids[0.1, 0] != ids[0.1, 1]
    assert len(ids[0.1, 0]) == 10


def test_episodes_of_equal_cost_pass_the_grid() -> None:
    left = chain(dataset([(float(i), 3) for i in range(9)]), density=Density(10, 3, 2, 1))
    assert len(left.dataset) == 6  # three cells of three, two of each kept


def test_a_preset_takes_the_published_numbers_and_an_unknown_one_is_an_error() -> None:
    left = chain(spread(200), density=Density(preset="0.5"))
    assert {r["threshold"] for r in decisions(left) if r["rule"] == "density-crowded"} == {5.0}
    with pytest.raises(BadInput, match=r"no preset .0\.9.; it has 0\.5, 0\.75"):
        chain(spread(3), density=Density(preset="0.9"))


def test_no_step_still_gives_every_episode_a_decision() -> None:
    data = Dataset.of(spread(4))
    left = apply(data, Settings(), BALL, 0)
    assert [(r["rule"], r["kept"], r["replaced_by"]) for r in decisions(left)] == [("none", True, None)] * 4
    assert left.dataset.observations is data.observations  # nothing is copied for nothing


STEPS = "params.yaml: rl.filter.steps"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"steps": [{"desnity": {}}]}, rf"{STEPS}\[0\]\.desnity: unknown parameter; did you mean 'density'"),
        ({"steps": [{}]}, rf"{STEPS}\[0\]: a step names exactly one of range, .*found none"),
        ({"steps": [{"thin": {"max_episodes": 3}, "noise": {"scale": 1.0}}]}, r"found thin and noise"),
        ({"steps": [{"density": {"cost_bins": 0}}]}, rf"{STEPS}\[0\]\.density: cost_bins and return_bins"),
        ({"steps": [{"range": {}}]}, rf"{STEPS}\[0\]\.range: needs at least one of cost_min"),
        ({"steps": [{"range": {"cost_min": 3, "cost_max": 2}}]}, r"cost_min 3 is above cost_max 2"),
        ({"steps": [{"thin": {"max_episodes": 0}}]}, r"\.thin: max_episodes must be at least 1"),
        ({"steps": [{"noise": {"scale": 0}}]}, r"\.noise: scale must be above 0"),
        ({"steps": [{"epsilon": {"epsilon": 0, "cost_limit": 10}}]}, r"\.epsilon: epsilon: 0 names neither side"),
        ({"steps": [{"inpaint": {"cost_from": 0.5}}]}, r"steps\[0\]\.inpaint\.cost_to: missing parameter"),
        ({"steps": [{"outliers": {"fraction": 1, "cost_limit": 9}}]}, r"\.outliers: needs 0 < fraction < 1"),
        (
            {"steps": [{"noise": {"scale": 1}}, {"density": {}}], "released": True},
            r"rl\.filter: steps: the released code cannot run density after noise",
        ),
        ({"steps": [{"subsample": {"ratio": 0}}]}, r"\.subsample: ratio is 0; it must be above 0 and at most 1"),
        ({"steps": [{"subsample": {"ratio": 0.1}}], "released": True}, "steps: the released code has no subsample"),
        ({"steps": [{"density": {}}, {"density": {}}], "released": True}, "cannot run density after density"),
        (
            {"steps": [{"epsilon": {"epsilon": 1.0, "cost_limit": -5.0}}]},
            r"\.epsilon: cost_limit is -5\.0; use at least 0",
        ),
        *(
            ({"steps": [{rule: {**settings, key: value}}]}, rf"\.{rule}: {key} is {value}; use ")
            for value in (math.nan, math.inf)
            for rule, settings, key in (
                ("epsilon", {"cost_limit": 10.0}, "epsilon"),
                ("epsilon", {"epsilon": 1.0}, "cost_limit"),
                ("outliers", {"fraction": 0.1}, "cost_limit"),
                ("range", {"cost_min": 0.0}, "cost_max"),
                ("range", {"cost_min": 0.0}, "return_min"),
            )
        ),
        ({"steps": [{"noise": {"scale": math.inf}}]}, r"\.noise: scale is inf; use a finite number"),
    ],
)
def test_bad_settings_are_refused_by_name(block: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(filter_stage.Params, block, "params.yaml: rl.filter")


def collected(folder: Path, episodes: list) -> Path:
    folder.mkdir()
    write_dsrl(folder / "dataset.hdf5", episodes)
    n = len(episodes)
    columns = {
        "id": [e.id for e in episodes], "parents": [[]] * n, "policy": ["p"] * n, "algorithm": ["ppo-lag"] * n,
        "cost_limit": [10.0] * n, "seed": list(range(n)), "deterministic": [False] * n, "source": [None] * n,
        "sub_cost_returns": [e.sub_cost_returns for e in episodes],
        "episode_return": [e.episode_return for e in episodes], "cost_return": [e.cost_return for e in episodes],
        "length": [e.length for e in episodes], "index": list(range(n)),
    }  # fmt: skip
    write_table(folder / "rows.parquet", columns, facts.ROWS)
    return folder


def test_the_stage_writes_data_rows_decisions_and_plots(tmp_path: Path) -> None:
    episodes = spread(20)
    source = collected(tmp_path / "collected", episodes)
    steps = [
        {"density": {"cost_bins": 2, "return_bins": 2, "max_per_cell": 4}},
        {"outliers": {"fraction": 0.1, "cost_limit": 5}},
    ]
    params = load(filter_stage.Params, {"steps": steps}, "params.yaml: rl.filter")
    outs = []
    for name in ("first", "second"):
        stage = for_test(params, tmp_path / name, {"collect": source}, {"task": "BallCircle"}, seed=5, stage="filter")
        filter_stage.run(stage)
        outs.append(tmp_path / name)
    pictures = ("scatter.png", "steps.png", "coverage.png")
    for file in ("dataset.hdf5", "rows.parquet", "decisions.parquet", "scatter.csv", *pictures):
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
    drawn = [line.rpartition(",")[2] for line in (outs[0] / "scatter.csv").read_text().splitlines()[1:]]
    assert len(drawn) == 20
    assert {name: drawn.count(name) for name in set(drawn)} == {
        "kept": len(left) - 1,
        "changed": 1,
        "density-crowded": 20 - len(left),
    }
    for name in pictures:
        pixels = plt.imread(outs[0] / name)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50  # something is drawn


def test_an_episode_is_marked_by_the_rule_that_dropped_it_and_panels_show_what_each_rule_saw() -> None:
    episodes = spread(10)
    left = chain(episodes, 0, {"outliers": Outliers(0.1, 5)}, {"range": Ranges(cost_min=3.0, cost_max=18.0)})
    became = filter_stage.outcomes(10, left)
    falsified = int(left.looks[0].judgement.fallen()[0])
    costs = [e.cost_return for e in episodes]
    lied = left.looks[1].costs[falsified]
    for number, (cost, name) in enumerate(zip(costs, became, strict=True)):
        seen = lied if number == falsified else cost
        kept = "changed" if number == falsified else "kept"
        assert name == ("range-cost-min" if seen < 3 else "range-cost-max" if seen > 18 else kept)
    first, second, third = filter_stage.panels(left)
    assert (first.title, first.outcome.tolist().count(2), len(first.costs)) == ("outliers", 1, 10)
    assert second.costs[falsified] == lied != first.costs[falsified]
    assert len(third.costs) == int((second.outcome == 1).sum())


def test_the_stage_refuses_rows_that_belong_to_other_data(tmp_path: Path) -> None:
    source = collected(tmp_path / "collected", spread(5))
    write_dsrl(source / "dataset.hdf5", spread(6))
    stage = for_test(filter_stage.Params(), tmp_path / "out", {"collect": source}, {"task": "BallCircle"})
    with pytest.raises(BadInput, match="name different episodes"):
        filter_stage.run(stage)
