"""What others read: DSRL, Minari and OSRL take our data sets unchanged, each as its users call it."""

import json
import os
import subprocess
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest

from springhead.rl import envs
from springhead.rl.dataset import EPISODE_KEYS, write_dsrl, write_minari
from springhead.rl.tasks import task

pytestmark = pytest.mark.unit

TASKS = ["BallCircle", "BallRun", "SwimmerVelocity"]
"""One task of Bullet with one cost, one with several constraints, and one of Safety-Gymnasium."""
PEERS = Path(__file__).parents[2] / ".venv-peers/bin/python"


class Steady:
    """Constant actions; it stands for any policy."""

    def __init__(self, action_dim):
        self.action_dim = action_dim

    def reset(self, num_envs, cost_limit):
        pass

    def act(self, observations):
        return np.full((len(observations), self.action_dim), 0.3, dtype=np.float32)

    def observe(self, rewards, costs):
        pass


@pytest.fixture(scope="module", params=TASKS)
def written(request, tmp_path_factory):
    """A task, three episodes of it, and the folder with both formats."""
    of = task(request.param)
    episodes = envs.run_episodes(of.name, Steady(of.action_dim), [1, 2, 3], 10.0, 3)
    folder = tmp_path_factory.mktemp(of.name)
    write_dsrl(folder / "dataset.hdf5", episodes, of.sub_costs)
    write_minari(folder / "minari", f"springhead/{of.name}-v0", episodes, of)
    return of, episodes, folder


def joined(episodes, key):
    return np.concatenate([getattr(episode, key) for episode in episodes])


def offline_env(of, monkeypatch, capsys):
    """DSRL's environment of a task, or, where its simulator cannot be imported here, the loader that all share."""
    monkeypatch.setenv("DSRL_SUPPRESS_IMPORT_ERROR", "1")
    dsrl = pytest.importorskip("dsrl.offline_env")
    if of.family == "bullet-safety-gym":
        with capsys.disabled():  # the simulator finds its output stream by the C name, which a captured one lacks
            return gymnasium.make(f"Offline{of.name}-v0").unwrapped
    env = dsrl.OfflineEnv(of.return_range[1], of.return_range[0], of.cost_range[1], of.cost_range[0])
    env.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (of.observation_dim,), np.float32)
    env.action_space = gymnasium.spaces.Box(-1.0, 1.0, (of.action_dim,), np.float32)
    return env


def test_dsrl_loads_scores_and_filters_the_hdf5_file(written, tmp_path, monkeypatch, capsys):
    of, episodes, folder = written
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # pre_process_data leaves a plot there
    monkeypatch.setenv("MPLBACKEND", "agg")
    env = offline_env(of, monkeypatch, capsys)
    data = env.get_dataset(h5path=str(folder / "dataset.hdf5"))
    assert set(data) == {*EPISODE_KEYS, *(["sub_costs"] if of.sub_costs else [])}
    for key in data:
        np.testing.assert_array_equal(data[key], joined(episodes, key))
    env.set_target_cost(20)
    score = env.get_normalized_score(episodes[0].episode_return, episodes[0].cost_return)
    expected = of.normalised_return(episodes[0].episode_return), of.normalised_cost(episodes[0].cost_return, 20)
    assert score == pytest.approx(expected)
    # Its filters: every episode is in a cell of its own, so a density filter that empties no cell keeps all.
    left = env.pre_process_data(data, density=0.5, cbins=10, rbins=10, max_npb=5, min_npb=0)
    assert {key: len(value) for key, value in left.items()} == {key: len(data["rewards"]) for key in data}
    noisy = env.pre_process_data(data, noise_scale=0.1)
    assert 0 < np.abs(noisy["observations"] - data["observations"]).max() < 10 * data["observations"].std()
    np.testing.assert_array_equal(noisy["costs"], data["costs"])


def test_minari_loads_the_data_set_and_recovers_the_environment(written, monkeypatch):
    of, episodes, folder = written
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    data = minari.load_dataset(f"springhead/{of.name}-v0")
    assert data.total_episodes == 3
    assert data.total_steps == sum(episode.length for episode in episodes)
    for stored, episode in zip(data.iterate_episodes(), episodes, strict=True):
        np.testing.assert_array_equal(stored.observations[:-1], episode.observations)
        np.testing.assert_array_equal(stored.observations[1:], episode.next_observations)
        np.testing.assert_array_equal(stored.actions, episode.actions)
        np.testing.assert_array_equal(stored.rewards, episode.rewards)
        np.testing.assert_array_equal(stored.infos["cost"][1:], episode.costs)
        np.testing.assert_array_equal(stored.truncations, episode.timeouts)
        np.testing.assert_array_equal(stored.terminations, episode.terminals)
        for column, name in enumerate(of.sub_costs):
            np.testing.assert_array_equal(stored.infos[f"cost_{name}"][1:], episode.sub_costs[:, column])
    assert data.filter_episodes(lambda episode: episode.id != 1).total_episodes == 2
    env = data.recover_environment()
    # The recovered environment replays the very episode.
    observation, _ = env.reset(seed=1)
    np.testing.assert_array_equal(observation, episodes[0].observations[0])
    observation, reward, *_, info = env.step(episodes[0].actions[0])
    np.testing.assert_array_equal(observation, episodes[0].next_observations[0])
    assert (np.float32(reward), np.float32(info["cost"])) == (episodes[0].rewards[0], episodes[0].costs[0])
    env.close()


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers; `make peers` builds it")
def test_osrl_trains_on_the_hdf5_file(written):
    of, episodes, folder = written
    command = [PEERS, Path(__file__).with_name("osrl_client.py"), of.name, folder / "dataset.hdf5"]
    environment = {**os.environ, "DSRL_SUPPRESS_IMPORT_ERROR": "1", "WANDB_MODE": "disabled", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    steps, batch = sum(episode.length for episode in episodes), 64
    assert set(EPISODE_KEYS) <= set(found["keys"])
    assert found["steps"] == steps
    assert found["initial_share"] == pytest.approx(3 / steps)
    # Observations, successors, actions, rewards, costs, ends, starts.
    wide = [[batch, of.observation_dim], [batch, of.observation_dim], [batch, of.action_dim]]
    assert found["batch"] == [*wide, [batch], [batch], [batch], [batch]]
    assert found["row_is_ours"]
    assert found["weights_finite"]
    assert found["lengths"] == [episode.length for episode in episodes]
    np.testing.assert_allclose(found["returns"], [episode.episode_return for episode in episodes], rtol=1e-4)
    np.testing.assert_allclose(found["costs"], [episode.cost_return for episode in episodes], rtol=1e-4)
    assert found["sequence"][:2] == [[10, of.observation_dim], [10, of.action_dim]]
