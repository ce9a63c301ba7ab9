"""What others read: DSRL's own loader takes the HDF5 file, Minari its data set, both as their users call them."""

import gymnasium
import minari
import numpy as np
import pytest

from springhead.rl import envs
from springhead.rl.dataset import EPISODE_KEYS, write_dsrl, write_minari
from springhead.rl.tasks import task

pytestmark = pytest.mark.unit


class Still:
    def reset(self, num_envs, cost_limit):
        pass

    def act(self, observations):
        return np.full((len(observations), 2), 0.3, dtype=np.float32)

    def observe(self, rewards, costs):
        pass


@pytest.fixture(scope="module")
def episodes():
    return envs.run_episodes("BallCircle", Still(), [1, 2], 10.0, 2)


def test_dsrl_reads_the_hdf5_file(tmp_path, episodes, monkeypatch, capsys):
    monkeypatch.setenv("DSRL_SUPPRESS_IMPORT_ERROR", "1")
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    pytest.importorskip("dsrl")
    write_dsrl(tmp_path / "dataset.hdf5", episodes)
    with capsys.disabled():  # the simulator finds its output stream by the C name, which a captured one lacks
        env = gymnasium.make("OfflineBallCircle-v0").unwrapped
    data = env.get_dataset(h5path=str(tmp_path / "dataset.hdf5"))
    assert set(EPISODE_KEYS) <= set(data)
    np.testing.assert_array_equal(data["costs"], np.concatenate([e.costs for e in episodes]))
    assert data["observations"].shape == (400, 8)
    env.set_target_cost(20)
    score = env.get_normalized_score(episodes[0].episode_return, episodes[0].cost_return)
    ours = task("BallCircle")
    expected = ours.normalised_return(episodes[0].episode_return), ours.normalised_cost(episodes[0].cost_return, 20)
    assert score == pytest.approx(expected)


def test_minari_loads_the_data_set_and_recovers_the_environment(tmp_path, episodes, monkeypatch):
    root = tmp_path / "minari"
    write_minari(root, "springhead/BallCircle-v0", episodes, task("BallCircle"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    data = minari.load_dataset("springhead/BallCircle-v0")
    assert data.total_episodes == 2
    assert data.total_steps == 400
    for stored, episode in zip(data.iterate_episodes(), episodes, strict=True):
        np.testing.assert_array_equal(stored.observations[:-1], episode.observations)
        np.testing.assert_array_equal(stored.observations[1:], episode.next_observations)
        np.testing.assert_array_equal(stored.actions, episode.actions)
        np.testing.assert_array_equal(stored.rewards, episode.rewards)
        np.testing.assert_array_equal(stored.infos["cost"][1:], episode.costs)
        np.testing.assert_array_equal(stored.truncations, episode.timeouts)
    env = data.recover_environment()
    # The recovered environment replays the very episode.
    observation, _ = env.reset(seed=1)
    np.testing.assert_array_equal(observation, episodes[0].observations[0])
    observation, reward, *_, info = env.step(episodes[0].actions[0])
    np.testing.assert_array_equal(observation, episodes[0].next_observations[0])
    assert (np.float32(reward), info["cost"]) == (episodes[0].rewards[0], episodes[0].costs[0])
