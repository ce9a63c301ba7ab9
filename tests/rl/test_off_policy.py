"""The off-policy learners as a whole: replay, pinned figures, resume to the byte, processes, divergence, learning."""

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.lineage.digests import tree_digest
from springhead.rl.acting import save_expert
from springhead.rl.dataset import Episode
from springhead.rl.envs import run_episodes
from springhead.rl.networks import Moments
from springhead.rl.online.algorithms import algorithm
from springhead.rl.online.replay import Replay, n_step
from springhead.rl.online.training import train
from springhead.rl.policy import load_policy
from springhead.rl.workers import EpisodeWorkers

pytestmark = pytest.mark.unit
NAMES = ["sac-lag", "ddpg-lag", "cvpo"]
SMALL = {
    "task": "BallRun",
    "seed": 3,
    "iterations": 3,
    "episodes_per_iteration": 3,
    "num_envs": 2,
    "hidden": (16, 16),
    "batch_size": 32,
    "updates_per_step": 0.05,
    "cost_limit_start": 20.0,
    "cost_limit_end": 5.0,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def learner(name, processes=1, **changes):
    config_class, learner_class = algorithm(name)
    own = {"actions": 4, "states": 16} if name == "cvpo" else {}
    config = config_class(**{**SMALL, **own, **changes})
    return learner_class(config, EpisodeWorkers(config.task, config.num_envs, processes))


def episode(length, terminal=False, seed=0):
    generator = np.random.default_rng(seed)
    states = generator.normal(size=(length + 1, 3)).astype(np.float32)
    ends = np.arange(length) == length - 1
    return Episode(
        observations=states[:-1],
        next_observations=states[1:],
        actions=generator.uniform(-1, 1, (length, 2)).astype(np.float32),
        rewards=generator.normal(size=length).astype(np.float32),
        costs=generator.integers(0, 2, length).astype(np.float32),
        terminals=ends & terminal,
        timeouts=ends & (not terminal),
    )


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("length", "steps"), [(7, 1), (7, 3), (2, 5)])
def test_n_step_sums_end_with_the_episode(length, steps, terminal):
    of, discount = episode(length, terminal), 0.9
    sums, weights, last = n_step(of, steps, discount)
    for t in range(length):
        covered = range(t, min(t + steps, length))
        for column, signal in enumerate((of.rewards, of.costs)):
            assert sums[t, column] == pytest.approx(sum(discount ** (i - t) * signal[i] for i in covered), abs=1e-5)
        assert last[t] == covered[-1]
        fallen = terminal and covered[-1] == length - 1
        assert weights[t] == pytest.approx(0.0 if fallen else discount ** len(covered), abs=1e-6)


def test_the_buffer_is_a_ring_of_the_newest_rows():
    replay = Replay(10, 3, 2, steps=1, discount=0.9)
    episodes = [episode(4, seed=seed) for seed in range(4)]
    for index, of in enumerate(episodes):
        replay.add(of)
        assert replay.size == min(4 * (index + 1), 10)
    kept = {tuple(row) for of in episodes for row in of.observations} - {
        tuple(row) for row in np.concatenate([episodes[0].observations, episodes[1].observations])[:6]
    }
    assert {tuple(row[:3]) for row in replay.rows} == kept
    replay.add(episode(25, seed=9))  # longer than the buffer: its last ten rows
    assert {tuple(row[:3]) for row in replay.rows} == {tuple(row) for row in episode(25, seed=9).observations[-10:]}


def test_sampling_is_seeded_uniform_and_normalised():
    replay = Replay(1000, 3, 2, steps=1, discount=0.9)
    for seed in range(5):
        replay.add(episode(10, terminal=True, seed=seed))
    moments = Moments(np.array([1.0, 2.0, 3.0]), np.array([4.0, 1.0, 9.0]), 1.0)
    first = list(replay.sample(70, 64, moments, np.random.default_rng(0)))
    again = list(replay.sample(70, 64, moments, np.random.default_rng(0)))
    assert len(first) == 70
    assert all(torch.equal(a.next_observations, b.next_observations) for a, b in zip(first, again, strict=True))
    seen: dict[tuple, int] = {}
    row_of = {tuple(row[3:5]): row for row in replay.rows[: replay.size]}
    for batch in first:
        for i, action in enumerate(batch.actions):
            key = tuple(action.numpy())
            seen[key] = seen.get(key, 0) + 1
            row = row_of[key]
            np.testing.assert_allclose(batch.observations[i], (row[:3] - moments.mean) / moments.std, atol=1e-5)
            np.testing.assert_allclose(batch.next_observations[i], (row[8:] - moments.mean) / moments.std, atol=1e-5)
            assert (batch.signals[0, i], batch.signals[1, i], batch.bootstrap[i]) == tuple(row[5:8])
    # 4480 draws from 50 rows: 89.6 each, with a deviation of 9.4.
    assert len(seen) == 50
    assert max(abs(count - 89.6) for count in seen.values()) < 45
    with pytest.raises(BadInput, match="empty"):
        next(Replay(5, 3, 2, 1, 0.9).sample(1, 4, moments, np.random.default_rng(0)))


def test_a_restored_buffer_goes_on_as_the_saved_one():
    saved, other = (Replay(10, 3, 2, 1, 0.9) for _ in range(2))
    for seed in range(3):
        saved.add(episode(5, seed=seed))
    other.restore(*saved.state())
    for replay in (saved, other):
        replay.add(episode(3, seed=7))
    np.testing.assert_array_equal(saved.rows, other.rows)
    assert (saved.size, saved.position) == (other.size, other.position)


@pytest.mark.parametrize("changes", [{"n_step": 0}, {"batch_size": 0}, {"tau": 0.0}, {"updates_per_step": 0.0}])
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(BadInput, match=next(iter(changes))):
        learner("sac-lag", **changes)


PINNED = {
    "sac-lag": {
        "return": -18.20413,
        "multiplier": 1.92675,
        "reward_critic_loss": 7.856046,
        "cost_critic_loss": 0.695774,
        "policy_loss": 0.180758,
        "cost_value": 0.247219,
        "alpha": 0.198683,
        "log_prob": -1.359037,
    },
    "ddpg-lag": {
        "return": 1109.044045,
        "multiplier": 11.907915,
        "reward_critic_loss": 295.638477,
        "cost_critic_loss": 1.328095,
        "policy_loss": -0.077453,
        "cost_value": -0.0918,
    },
    "cvpo": {
        "return": -35.09891,
        "multiplier": 0.0,
        "reward_critic_loss": 11.116273,
        "cost_critic_loss": 1.242371,
        "policy_loss": 1.300315,
        "eta": 0.61521,
        "kl_mean": 0.000184,
        "kl_std": 0.000497,
        "std": 1.002588,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_the_first_iterations_are_pinned(name):
    """Any change of the algorithm shows here; change the numbers only together with the method page."""
    trained = learner(name)
    figures = [trained.iterate() for _ in range(2)][-1]
    found = {"return": figures.episode_return, "multiplier": figures.multiplier, **figures.losses}
    assert found == pytest.approx(PINNED[name], rel=2e-3, abs=2e-4)


def final_policy(folder, name, scratch, stop_after=None, **changes):
    trained = learner(name, **changes)
    for history in train(trained, scratch, checkpoint_every=2):
        if stop_after is not None and len(history) == stop_after:
            return None
    save_expert(folder, trained.policy())
    return tree_digest(folder), [figures.losses for figures in history]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, name, released):
    # 300 environment steps per iteration: the buffer of 700 is full and wraps within the five.
    changes = {"iterations": 5, "released": released, "buffer_size": 700}
    whole = final_policy(tmp_path / "whole", name, tmp_path / "a", **changes)
    # Killed after iteration 3: the checkpoint of iteration 2 counts, and iteration 3 is done again.
    assert final_policy(tmp_path / "killed", name, tmp_path / "b", stop_after=3, **changes) is None
    assert final_policy(tmp_path / "resumed", name, tmp_path / "b", **changes) == whole
    # A half-written checkpoint is none.
    (tmp_path / "b" / "checkpoint-000005.safetensors").write_bytes(b"half")
    assert final_policy(tmp_path / "again", name, tmp_path / "b", **changes) == whole
    assert final_policy(tmp_path / "other", name, tmp_path / "b", **{**changes, "seed": 4}) != whole


@pytest.mark.parametrize("name", NAMES)
def test_state_and_restore_leave_nothing_out(name):
    """Every tensor and number of the state changes what follows; a restored learner has them all."""
    trained, fresh = learner(name), learner(name)
    for _ in range(2):
        trained.iterate()
    tensors, facts = trained.state()
    fresh.restore({key: value.clone() for key, value in tensors.items()}, facts)
    assert fresh.iterate() == trained.iterate()
    for (key, value), (twin_key, twin) in zip(trained.state()[0].items(), fresh.state()[0].items(), strict=True):
        assert key == twin_key
        assert torch.equal(value, twin), key
    assert trained.state()[1] == fresh.state()[1]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_bytes_of_one(tmp_path, name):
    digests = []
    for processes in (1, 2):
        trained = learner(name, processes)
        with trained.workers:
            losses = [trained.iterate().losses for _ in range(2)]
        save_expert(tmp_path / f"{processes}", trained.policy())
        digests.append((tree_digest(tmp_path / f"{processes}"), losses))
    assert digests[0] == digests[1]


@pytest.mark.fault
@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_diverges_stops_and_names_where(tmp_path, name):
    trained = learner(name, iterations=6)
    training = train(trained, tmp_path, checkpoint_every=2)
    for _ in range(3):
        next(training)
    with torch.no_grad():
        trained.critics.weights[0][0, 0, 0] = float("nan")
    with pytest.raises(BadInput, match=rf"task BallRun, algorithm {name}, iteration 4: .* is nan"):
        next(training)
    assert [path.name for path in tmp_path.glob("checkpoint-*.json")] == ["checkpoint-000002.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_policy_acts_as_the_learner_does(tmp_path, name):
    trained = learner(name)
    trained.iterate()
    policy = trained.policy()
    save_expert(tmp_path / "policy", policy)
    loaded = load_policy(tmp_path / "policy")
    assert (loaded.task, loaded.algorithm, loaded.observation_dim, loaded.action_dim) == ("BallRun", name, 7, 2)
    rows = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    normalised = torch.from_numpy((rows - trained.moments.mean) / trained.moments.std).float()
    with torch.no_grad():
        mean, _ = trained.actor.mean_and_std(normalised)
    np.testing.assert_allclose(loaded.act(rows), mean.tanh() if name == "sac-lag" else mean, atol=1e-5)
    by_mean, sampled = (run_episodes("BallRun", p, [8, 9], 20.0, 2) for p in (policy, policy.with_seeds([8, 9])))
    assert not {e.id for e in by_mean} & {e.id for e in sampled}


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_moving_averages(name):
    trained = learner(name, tau=0.25)
    before = {key: value.clone() for key, value in trained.targets.state_dict().items()}
    trained.replay.add(run_episodes("BallRun", trained.policy(), [1], 20.0, 2)[0])
    trained.learn(1)
    for key, average in trained.targets.state_dict().items():
        network, _, rest = key.partition(".")
        now = getattr(trained, network).state_dict()[rest]
        torch.testing.assert_close(average, 0.75 * before[key] + 0.25 * now)
    assert not any(torch.equal(before[f"critics.{k}"], v) for k, v in trained.critics.state_dict().items() if "w" in k)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("careful", [False, True])
def test_the_policy_climbs_reward_and_leaves_cost(name, careful):
    """Critics are fixed: without a price on cost the reward value rises, with a high one the cost value falls."""
    trained = learner(name, actor_lr=3e-3, tau=0.05)
    trained.replay.add(run_episodes("BallRun", trained.policy().with_seeds([1, 2]), [1, 2], 20.0, 2)[0])
    trained.optimisers["critics"].param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        for weight in trained.critics.weights:
            weight.mul_(3.0)
    if name == "cvpo":
        trained.threshold = -1000.0 if careful else 1000.0
    else:
        trained.lagrangian.value = 1000.0 if careful else 0.0
    (batch,) = trained.replay.sample(1, 64, trained.moments, np.random.default_rng(0))

    def values():
        with torch.no_grad():
            mean, _ = trained.actor.mean_and_std(batch.observations)
            actions = mean.tanh() if name == "sac-lag" else mean
            reward, cost = trained.pessimistic(trained.critics(torch.cat([batch.observations, actions], 1)))
            return float(reward.mean()), float(cost.mean())

    before = values()
    for _ in range(5):
        trained.learn(32)
    after = values()
    if careful:
        assert after[1] < before[1] - 0.05
    else:
        assert after[0] > before[0] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_keeps_its_limit(name):
    """The reward of BallCircle is for going round fast, its cost for being beyond two walls that cut the circle.

    A policy that ignores the cost gets about 500 at a cost of 100. The benchmark of the experts trains for longer.
    """
    settings = {
        "task": "BallCircle",
        "iterations": 25,
        "episodes_per_iteration": 5,
        "num_envs": 5,
        "hidden": (64, 64),
        "batch_size": 256,
        "updates_per_step": 0.2,
        "cost_limit_start": 20.0,
        "cost_limit_end": 20.0,
    }
    settings |= {"actions": 16, "states": 64} if name == "cvpo" else {"pid_kp": 0.03, "pid_ki": 0.006, "pid_kd": 0.0}
    if name == "sac-lag":
        settings |= {"target_entropy": -2.0}
    trained = learner(name, **settings)
    figures = [trained.iterate() for _ in range(settings["iterations"])]
    assert np.mean([f.episode_return for f in figures[-3:]]) > 300
    assert np.mean([f.cost_return for f in figures[-6:]]) < 50
