"""`released: true` against the released package itself, run beside it on the same file: the same arrays come out."""

import random
from pathlib import Path
from typing import Any

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.rl import filters
from springhead.rl.dataset import EPISODE_KEYS, Dataset, Episode, read_dsrl, write_dsrl
from springhead.rl.filter_chain import Settings, Step, apply
from springhead.rl.filter_state import Filtered
from springhead.rl.filters import Density, Epsilon, Inpaint, Noise, Outliers, Ranges, Thin
from tests.rl.offline_data import BALL, dataset

pytestmark = pytest.mark.unit
LIMIT = 20


def plane(number: int = 400) -> list[Episode]:
    """Episodes of several lengths, spread over the published plane, with returns that have no short decimal."""
    rng = np.random.default_rng(3)
    episodes = []
    for _ in range(number):
        cost = int(rng.integers(0, 81))
        value = float(rng.uniform(0.4, 880.0))
        [made] = dataset([(value, cost)], length=int(rng.integers(81, 90)))
        episodes.append(Episode(**{**vars(made), "rewards": rng.random(made.length, np.float32) * value / 45}))
    return episodes


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "data.hdf5"
    write_dsrl(path, plane())
    return path


def theirs(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, **arguments: Any) -> dict[str, Any]:
    """What dsrl's own function makes of the file."""
    from dsrl.offline_env import OfflineEnv

    monkeypatch.chdir(folder)  # it writes a picture to the working folder
    env = OfflineEnv(
        max_episode_reward=BALL.return_range[1],
        min_episode_reward=BALL.return_range[0],
        max_episode_cost=BALL.cost_range[1],
        min_episode_cost=BALL.cost_range[0],
    )
    env.set_target_cost(LIMIT)
    with h5py.File(file) as opened:
        data = {key: opened[key][()] for key in EPISODE_KEYS}
    random.seed(seed)
    try:
        found: dict[str, Any] = env.pre_process_data(data, **arguments)
    finally:
        plt.close("all")
    return found


def ours(data: Dataset, seed: int, *steps: dict[str, Any]) -> Filtered:
    return apply(data, Settings(tuple(Step(**step) for step in steps), released=True), BALL, seed)


DENSITY = {"density": Density(10, 20, 3, 1)}, {"density": 0.5, "cbins": 10, "rbins": 20, "max_npb": 3, "min_npb": 1}
OUTLIERS = {"outliers": Outliers(0.05, LIMIT)}, {"outliers_percent": 0.05}
INPAINT = {"inpaint": Inpaint(0.0, 0.4, 0.5, 1.0)}, {"inpaint_ranges": [(0.0, 0.4, 0.5, 1.0)]}
HARDER = {"epsilon": Epsilon(300.0, LIMIT)}, {"epsilon": 300.0}
EASIER = {"epsilon": Epsilon(-150.0, LIMIT)}, {"epsilon": -150.0}
NOISE = {"noise": Noise(0.1)}, {"noise_scale": 0.1}


@pytest.mark.parametrize(
    "parts",
    [
        (DENSITY,),
        (OUTLIERS,),
        (INPAINT,),
        (HARDER,),
        (EASIER,),
        (NOISE,),
        (DENSITY, OUTLIERS),
        (OUTLIERS, INPAINT),
        (OUTLIERS, EASIER),
        (DENSITY, HARDER, NOISE),
        (DENSITY, OUTLIERS, INPAINT, NOISE),
    ],
    ids=lambda parts: "+".join(next(iter(ours_step)) for ours_step, _ in parts),
)
def test_the_package_gives_the_same_arrays(
    parts: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {key: value for _, theirs_step in parts for key, value in theirs_step.items()}
    expected = theirs(file, tmp_path, monkeypatch, 7, **arguments)
    found = ours(read_dsrl(file), 7, *(step for step, _ in parts))
    for key in EPISODE_KEYS:
        np.testing.assert_array_equal(getattr(found.dataset, key), expected[key], err_msg=key)
    assert len(found.sources) < 400 or found.changed.any()  # each of these does something
    rows = found.decisions(found.ids())
    gone = {i for i, kept, new in zip(rows["id"], rows["kept"], rows["replaced_by"], strict=True) if not (kept or new)}
    left = set(found.left(found.ids()))
    assert not gone & left


def test_falsified_episodes_that_inpaint_would_drop_come_back_at_the_end(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its epsilon then judges other episodes than it names, as the package does."""
    low = {"inpaint": Inpaint(0.0, 0.2, 0.6, 1.0)}
    arguments = {"outliers_percent": 0.05, "inpaint_ranges": [(0.0, 0.2, 0.6, 1.0)]}
    both = ours(read_dsrl(file), 0, OUTLIERS[0], low)
    expected = theirs(file, tmp_path, monkeypatch, 0, **arguments)
    np.testing.assert_array_equal(both.dataset.rewards, expected["rewards"])
    moved = np.flatnonzero(np.diff(both.sources) < 0)
    assert len(moved)
    assert both.changed[moved[0] + 1 :].all()  # those behind the first break are put back
    assert (~both.looks[-1].judgement.kept).sum() > 0


def test_epsilon_after_inpaint_drops_by_the_wrong_positions_or_crashes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_dsrl(file)
    keep_last = dataset([(1.0, 80)] * 120, length=80)  # unsafe ones at the end, so that positions of safe ones exist
    longer = tmp_path / "longer.hdf5"
    write_dsrl(longer, [*data.episodes(), *keep_last])
    inpaint = {"inpaint_ranges": [(0.5, 0.7, 0.0, 0.5)]}, {"inpaint": Inpaint(0.5, 0.7, 0.0, 0.5)}
    expected = theirs(longer, tmp_path, monkeypatch, 0, **inpaint[0], epsilon=300.0)
    found = ours(read_dsrl(longer), 0, inpaint[1], HARDER[0])
    np.testing.assert_array_equal(found.dataset.observations, expected["observations"])
    dropped = found.looks[-1]
    assert (dropped.costs[dropped.judgement.fallen()] > LIMIT).any()  # unsafe ones, which the rule does not mean
    with pytest.raises(IndexError):
        theirs(file, tmp_path, monkeypatch, 0, inpaint_ranges=[(0.0, 1.0, 0.0, 0.5)], epsilon=300.0)
    with pytest.raises(BadInput, match="filter epsilon: its positions exceed what is left"):
        ours(data, 0, {"inpaint": Inpaint(0.0, 1.0, 0.0, 0.5)}, HARDER[0])


def test_the_highest_value_has_a_cell_of_its_own_and_equal_values_have_one_each() -> None:
    data = Dataset.of(dataset([(float(value), 3) for value in (0, 0, 5, 10)]))
    # All costs are equal, so that every episode is alone in its cell: cells of one are emptied, all of them.
    assert len(ours(data, 0, {"density": Density(1, 2, 9, 0)}).sources) == 4
    with pytest.raises(BadInput, match="none of its 4 episodes"):
        ours(data, 0, {"density": Density(1, 2, 9, 1)})
    values = np.array([0.0, 0.0, 5.0, 10.0])
    assert filters.released_cells(values, values, Density(2, 2)) == [[0, 1], [2], [3]]
    assert filters.released_cells(values, values, Density(2, 2), ((0.0, 7.0), (0.0, 10.0))) == [[0, 1], [2]]


def test_the_later_code_s_box_is_the_published_range() -> None:
    data = Dataset.of(dataset([(900.0, 10), (800.0, 85), (400.0, 40), (500.0, 50)], length=90))
    left = ours(data, 0, {"density": Density(4, 4, 5, 0, box="task")})
    assert left.sources.tolist() == [2, 3]
    # A fifth to two fifths of the published costs (0 … 80) holds 16 … 32, of the data's (10 … 85) 25 … 40.
    assert ours(data, 0, {"inpaint": Inpaint(0.2, 0.4, 0, 1)}).sources.tolist() == [0, 1, 3]
    with pytest.raises(BadInput, match="no episode has a cost in the strip, where the released code crashes"):
        ours(data, 0, {"inpaint": Inpaint(0.2, 0.4, 0, 1, box="task")})


def test_thinning_as_it_was_done_while_collecting() -> None:
    values = [(float(v), v) for v in (0, 0, 0, 1, 1, 4, 9, 9)]
    data = Dataset.of(dataset(values))
    left = ours(data, 5, {"range": Ranges(cost_max=9.0)}, {"thin": Thin(4)})
    # Two cells a side and one more for the highest value: 0 … 4.5 and 9; the last of each, then two at random.
    draws, cell, kept = random.Random(5), {"low": [0, 1, 2, 3, 4], "high": [6]}, [5, 7]
    while len(kept) < 4:
        name = draws.choice(list(cell))
        kept.append(cell[name].pop())
        if not cell[name]:
            del cell[name]
    assert left.sources.tolist() == sorted(kept)


def test_an_outlier_cannot_claim_more_than_its_steps() -> None:
    short = Dataset.of(dataset([(900.0, 50)] * 6, length=60))
    data = Dataset.of(
        [Episode(**{k: v[-3:] for k, v in vars(e).items() if k in EPISODE_KEYS}) for e in short.episodes()]
    )
    costly = Dataset(**{**vars(data), "costs": np.full(18, 30.0, np.float32), "rewards": np.full(18, 300, np.float32)})
    with pytest.raises(BadInput, match="an episode of 3 steps cannot claim a cost of"):
        ours(costly, 0, {"outliers": Outliers(0.9, 40)})
