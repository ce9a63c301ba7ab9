"""All on-policy learners alike: pinned figures, resume to the byte, processes, and a stop at numbers not finite."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.rl.networks import save_expert
from springhead.rl.online.algorithms import algorithm
from springhead.rl.online.training import train
from springhead.rl.workers import EpisodeWorkers

pytestmark = pytest.mark.unit

ALGORITHMS = ("ppo-lag", "trpo-lag", "cpo", "focops")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def config_of(name, **changes):
    config_class, _ = algorithm(name)
    small = {
        "task": "BallRun",
        "seed": 3,
        "iterations": 5,
        "episodes_per_iteration": 3,
        "num_envs": 2,
        "hidden": (16, 16),
        "cost_limit_start": 20.0,
        "cost_limit_end": 5.0,
    }
    return config_class(**{**small, **changes})


def learner_of(name, workers=None, **changes):
    config = config_of(name, **changes)
    return algorithm(name)[1](config, workers or EpisodeWorkers(config.task, config.num_envs))


# Return, cost, multiplier, both critics' losses, divergence; of the first two iterations.
PINNED = {
    ("ppo-lag", False): [
        [-1.48353, 0.0, 0.0, 1.13504, 0.980416, 0.000128298],
        [-65.1612, 16.0, 1.82188, 1.65997, 1.62929, 0.000513071],
    ],
    ("ppo-lag", True): [
        [-1.48353, 0.0, 0.0, 170.921, 3.65009e-05, -0.00259134],
        [-49.909, 16.0, 1.82188, 433.973, 32.637, 0.00199015],
    ],
    ("trpo-lag", False): [
        [-1.48353, 0.0, 0.0, 1.10488, 0.942531, 0.00356788],
        [-66.7687, 39.3333, 5.33295, 1.71745, 1.62471, 0.00314283],
    ],
    ("trpo-lag", True): [
        [-1.48353, 0.0, 0.0, 164.344, 2.14396e-05, 0.00356788],
        [106.691, 18.0, 2.12228, 2046.49, 26.9435, 0.00351087],
    ],
    ("cpo", False): [
        [-1.48353, 0.0, 0.0, 1.06799, 0.910355, 0.00873344],
        [-60.7651, 34.6667, 0.00103065, 0.85365, 1.6555, 0.00696572],
    ],
    ("cpo", True): [
        [-1.48353, 0.0, 0.0, 167.595, 5.49165e-05, 0.00730387],
        [49.3658, 16.3333, 0.0, 1259.61, 31.0705, 0.00771506],
    ],
    ("focops", False): [
        [-1.48353, 0.0, 0.0, 1.11925, 0.966966, 8.65802e-05],
        [-65.3982, 16.0, 0.0, 1.39965, 1.44927, 0.000273799],
    ],
    ("focops", True): [
        [-1.48353, 0.0, 0.0, 170.706, 5.46814e-05, 9.04503e-05],
        [-49.6402, 15.6667, 0.0, 431.407, 31.5094, 0.000117125],
    ],
}


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_figures_of_the_first_iterations_are_pinned(name, released):
    """Any change of an algorithm shows here; change the numbers only together with the method's page."""
    learner = learner_of(name, released=released)
    figures = [learner.iterate() for _ in range(2)]
    keys = ("reward_value_loss", "cost_value_loss", "kl")
    found = [[f.episode_return, f.cost_return, f.multiplier, *(f.losses[key] for key in keys)] for f in figures]
    np.testing.assert_allclose(found, PINNED[name, released], rtol=5e-3, atol=2e-5)


def test_a_batch_is_what_its_episodes_say():
    """Sampled actions are those that were executed, before clipping; each signal has its own critic and advantages."""
    learner = learner_of("ppo-lag")
    for _ in range(2):
        learner.iterate()
    episodes, seeds = learner.collect()
    # As if the second episode had ended in a fall.
    ends = np.arange(episodes[1].length) == episodes[1].length - 1
    episodes[1] = dataclasses.replace(episodes[1], terminals=ends, timeouts=np.zeros_like(ends))
    moments = [(float(learner.value_moments.mean[i]), float(learner.value_moments.std[i])) for i in (0, 1)]
    batch = learner.prepare(episodes, seeds)
    executed = np.concatenate([episode.actions for episode in episodes])
    np.testing.assert_allclose(batch.actions.clamp(-1.0, 1.0), executed, atol=1e-5)
    assert (batch.actions.abs() > 1.0).any()
    log_probs = torch.distributions.Normal(batch.means, batch.stds).log_prob(batch.actions).sum(-1)
    torch.testing.assert_close(batch.log_probs, log_probs)
    critics = (learner.reward_critic, learner.cost_critic)
    for (mean, std), critic, key in zip(moments, critics, ("rewards", "costs"), strict=True):
        expected = []
        for number, episode in enumerate(episodes):
            with torch.no_grad():
                rows = learner._normalise(np.concatenate([episode.observations, episode.next_observations[-1:]]))
                values = critic(rows)[:, 0].double().numpy() * std + mean
            if number == 1:
                values[-1] = 0.0
            carry, found = 0.0, []
            for t in reversed(range(episode.length)):
                error = getattr(episode, key)[t] + 0.99 * values[t + 1] - values[t]
                carry = error + 0.99 * 0.95 * carry
                found.append(carry)
            expected += found[::-1]
        advantages = batch.reward_advantages if key == "rewards" else batch.cost_advantages
        np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-3)


def final_policy(folder, name, scratch, stop_after=None, workers=None, **changes):
    learner = learner_of(name, workers, **changes)
    for history in train(learner, scratch, checkpoint_every=2):
        if stop_after is not None and len(history) == stop_after:
            return None
    save_expert(folder, learner.policy())
    # Values by repr: the whole history must be the same numbers, too.
    return tree_digest(folder), repr([dataclasses.replace(f, losses=sorted(f.losses.items())) for f in history])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, name):
    whole = final_policy(tmp_path / "whole", name, tmp_path / "a")
    # Stopped after iteration 3: the checkpoint of iteration 2 counts, and iteration 3 is done again.
    assert final_policy(tmp_path / "killed", name, tmp_path / "b", stop_after=3) is None
    assert [path.name for path in (tmp_path / "b").glob("*.json")] == ["checkpoint-000002.json"]
    assert final_policy(tmp_path / "resumed", name, tmp_path / "b") == whole
    # A half-written checkpoint is none.
    (tmp_path / "b" / "checkpoint-000005.safetensors").write_bytes(b"half")
    assert final_policy(tmp_path / "again", name, tmp_path / "b") == whole


def test_a_checkpoint_of_other_settings_or_another_algorithm_is_not_used(tmp_path):
    whole = final_policy(tmp_path / "whole", "ppo-lag", tmp_path / "a", seed=4)
    final_policy(tmp_path / "first", "ppo-lag", tmp_path / "b", stop_after=4)
    assert final_policy(tmp_path / "seed", "ppo-lag", tmp_path / "b", seed=4) == whole
    focops = learner_of("focops")
    assert len(next(train(focops, tmp_path / "b"))) == 1  # from the first iteration on


@pytest.mark.e2e
def test_results_are_the_same_bytes_in_one_process_and_in_two(tmp_path):
    with EpisodeWorkers("BallRun", 2, processes=2) as two:
        for name in ALGORITHMS:
            found = [
                final_policy(tmp_path / f"{name}-{i}", name, tmp_path / f"s{name}-{i}", workers=workers, iterations=2)
                for i, workers in enumerate((None, two))
            ]
            assert found[0] == found[1], name


@pytest.mark.fault
def test_a_damaged_checkpoint_is_named(tmp_path):
    final_policy(tmp_path / "killed", "cpo", tmp_path, stop_after=3)
    (tmp_path / "checkpoint-000002.safetensors").write_bytes(b"broken")
    with pytest.raises(BadInput, match="damaged checkpoint"):
        next(train(learner_of("cpo"), tmp_path))


def poisoned(learner, scratch, after, parameter, value):
    """Trains, and after some iteration writes a value into a parameter, as if a step had blown it up."""
    for history in train(learner, scratch, checkpoint_every=2):
        if len(history) == after:
            with torch.no_grad():
                parameter.view(-1)[0] = value


@pytest.mark.fault
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_number_that_is_not_finite_stops_the_training_and_keeps_the_last_checkpoint(tmp_path, name):
    learner = learner_of(name)
    with pytest.raises(BadInput, match=rf"task BallRun, algorithm {name}, iteration 4: .* (nan|not finite)"):
        poisoned(learner, tmp_path, 3, learner.cost_critic[0].weight, math.nan)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-000002.json", "checkpoint-000002.safetensors"]
    assert len(read_json(tmp_path / "checkpoint-000002.json")["history"]) == 2
    whole = final_policy(tmp_path / "whole", name, tmp_path / "a")
    assert final_policy(tmp_path / "resumed", name, tmp_path) == whole


@pytest.mark.fault
def test_a_policy_that_a_last_step_blew_up_does_not_act(tmp_path):
    learner = learner_of("focops")
    with pytest.raises(BadInput, match=r"task BallRun, algorithm focops, 300 .* log_std .* not finite; .* Lower"):
        poisoned(learner, tmp_path, 1, learner.actor.log_std, math.inf)  # no loss has seen it yet


@pytest.mark.fault
def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    learner = learner_of("ppo-lag")
    with pytest.raises(BadInput, match=r"iteration 2: modules\.cost_critic\.2\.bias holds a number that is not finite"):
        poisoned(learner, tmp_path, 2, learner.cost_critic[2].bias, math.inf)  # no loss has seen it yet
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_bad_configurations_are_named():
    with pytest.raises(BadInput, match="episodes_per_iteration is 0"):
        config_of("cpo", episodes_per_iteration=0)
    with pytest.raises(BadInput, match="make EpisodeWorkers"):
        learner_of("cpo", EpisodeWorkers("BallRun", 3))
    with pytest.raises(BadInput, match="unknown online algorithm"):
        algorithm("ppo")
