"""Copies of episodes and noise on their states: the same numbers, however the work is divided."""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from springhead.rl import filter_arrays
from springhead.rl.dataset import Dataset
from springhead.rl.filter_arrays import Gather, draw, take, with_noise
from tests.rl.offline_data import spread

pytestmark = pytest.mark.unit

RAGGED = Dataset.of([*spread(5), *spread(4, length=7), *spread(3, length=31)])
EVEN = Dataset.of(spread(12))
SOME = np.array([7, 2, 3, 4, 11, 0])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_arrays, "_ENTRIES", 300)


def with_threads(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(filter_arrays, "threads", lambda: number)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("data", [RAGGED, EVEN], ids=["ragged", "even"])
def test_a_copy_has_the_episodes_in_the_order_asked_for(data: Dataset) -> None:
    assert len(Gather(data, SOME).blocks) > 2
    copied = take(data, SOME)
    assert [e.id for e in copied.episodes()] == [data.episode(int(i)).id for i in SOME]
    assert copied.starts[0] == 0
    np.testing.assert_array_equal(copied.starts[1:], copied.ends[:-1])
    assert take(data, np.arange(len(data))) is data


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("data", [RAGGED, EVEN], ids=["ragged", "even"])
def test_noise_does_not_depend_on_the_number_of_threads(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for number in (1, 2, 5):
        with_threads(monkeypatch, number)
        noisy, deviation = with_noise(data, SOME, 0.5, np.random.default_rng(3))
        made.append((noisy.observations.tobytes(), noisy.next_observations.tobytes(), deviation))
    assert made[0] == made[1] == made[2]
    other, _ = with_noise(data, SOME, 0.5, np.random.default_rng(4))
    assert other.observations.tobytes() != made[0][0]


@pytest.mark.usefixtures("small_blocks")
def test_every_state_has_noise_of_its_own() -> None:
    noisy, deviation = with_noise(EVEN, SOME, 0.5, np.random.default_rng(3))
    added = []
    for index, episode in enumerate(noisy.episodes()):
        source = EVEN.episode(int(SOME[index]))
        np.testing.assert_array_equal(episode.observations[1:], episode.next_observations[:-1])
        np.testing.assert_array_equal(episode.rewards, source.rewards)
        added.append(episode.observations - source.observations)
        added.append((episode.next_observations - source.next_observations)[-1:])
    everything = np.concatenate(added).reshape(-1)
    assert np.unique(everything).size > 0.99 * everything.size  # no block repeats another's numbers
    assert everything.std() == pytest.approx(deviation, rel=0.1)


def test_two_steps_of_noise_differ() -> None:
    rng = np.random.default_rng(3)
    first, second = (with_noise(EVEN, SOME, 0.5, rng)[0].observations for _ in range(2))
    assert not np.array_equal(first, second)


def test_noise_is_of_the_normal_distribution() -> None:
    levels = filter_arrays._quantiles()
    drawn = draw(levels, np.random.default_rng(0), (3, 70_001))
    assert drawn.shape == (3, 70_001) and drawn.dtype == np.dtype(np.float32)
    entries = np.sort(drawn.reshape(-1).astype(np.float64))
    steps = np.arange(1, entries.size + 1) / entries.size
    reached = np.array([NormalDist().cdf(x) for x in entries[::100]])
    assert np.abs(reached - steps[::100]).max() < 1.63 / entries.size**0.5  # Kolmogorov-Smirnov at 1 %
    assert entries[0] < -4 < 4 < entries[-1]
    assert (np.diff(levels) > 0).all() and levels.astype(np.float64).var() == pytest.approx(1.0, abs=1e-7)
    assert np.abs(np.corrcoef(drawn[:, 1:].reshape(-1), drawn[:, :-1].reshape(-1))[0, 1]) < 0.01


@pytest.mark.usefixtures("small_blocks")
def test_the_deviation_is_that_of_all_entries_together() -> None:
    entries = np.random.default_rng(0).normal(1000.0, 0.1, EVEN.observations.shape).astype(np.float32)
    shifted = Dataset(
        **{key: getattr(EVEN, key) for key in EVEN.keys} | {"observations": entries}, starts=EVEN.starts, ends=EVEN.ends
    )
    _, deviation = with_noise(shifted, np.arange(len(shifted)), 1.0, np.random.default_rng(0))
    assert deviation == pytest.approx(entries.std(dtype=np.float64), rel=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6 + 1 / 7])
def test_equal_states_have_no_deviation(value: float) -> None:
    arrays = {key: getattr(EVEN, key) for key in EVEN.keys}
    flat = {key: np.full_like(arrays[key], value) for key in ("observations", "next_observations")}
    noisy, deviation = with_noise(
        Dataset(**arrays | flat, starts=EVEN.starts, ends=EVEN.ends),
        np.arange(len(EVEN)), 1.0, np.random.default_rng(0),
    )  # fmt: skip
    assert 0 <= deviation <= 1e-6 * max(value, 1.0)
    assert np.isfinite(noisy.observations).all() and np.isfinite(noisy.next_observations).all()


def test_a_fault_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with_threads(monkeypatch, 2)
    fail: Callable[[int], float] = lambda job: 1 / (job - 3)  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        filter_arrays._each(fail, [1, 2, 3, 4])
