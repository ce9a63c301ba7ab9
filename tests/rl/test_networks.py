"""Networks of the online algorithms: NumPy acts as torch trains, noise belongs to its episode, folders round trip."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from springhead.errors import BadInput
from springhead.lineage.digests import tree_digest
from springhead.rl.acting import ExpertConfig, ExpertPolicy, episode_noise, load_expert, save_expert
from springhead.rl.networks import Ensemble, GaussianActor, Moments, weights_of
from springhead.rl.policy import Policy, load_policy

pytestmark = pytest.mark.unit
HEADS = ["gaussian", "bounded-gaussian", "squashed-gaussian"]
ROWS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def actor_and_policy(head="gaussian", activation="tanh", state_dependent_std=False, task="BallCircle"):
    actor = GaussianActor(
        8, 2, (16, 12), torch.Generator().manual_seed(1), head, activation, state_dependent_std, (-2.0, 0.3)
    )
    with torch.no_grad():  # large enough for clipping, squashing and the bounds of the deviation to matter
        actor.net[-1].weight.mul_(200.0)
        actor.net[-1].bias.add_(0.3)
    config = ExpertConfig(
        task, "x-lag", 20.0, 1, 500, (0.1,) * 8, (2.0,) * 8, (16, 12), 2, head, activation, state_dependent_std,
        (-2.0, 0.3),
    )  # fmt: skip
    return actor, ExpertPolicy(config, weights_of(actor))


@pytest.mark.parametrize("state_dependent_std", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("head", HEADS)
def test_numpy_acts_as_torch_does(head, activation, state_dependent_std):
    actor, policy = actor_and_policy(head, activation, state_dependent_std)
    policy = policy.with_seeds([5, 6, 7, 8, 9])
    policy.reset(5, 20.0)
    by_mean = policy.with_seeds(None)
    by_mean.reset(5, 20.0)
    noise = torch.from_numpy(np.stack([episode_noise(seed, 3, 2) for seed in (5, 6, 7, 8, 9)], axis=1))
    for step in range(3):
        rows = ROWS + step
        with torch.no_grad():
            mean, std = actor.mean_and_std((torch.from_numpy(rows) - 0.1) / 2.0)
        assert std.min() >= np.exp(-2.0) * 0.999
        assert std.max() <= np.exp(0.3) * 1.001
        for expected, found in ((mean, by_mean.act(rows)), (mean + std * noise[step], policy.act(rows))):
            clipped = expected.tanh() if head == "squashed-gaussian" else expected.clamp(-1.0, 1.0)
            np.testing.assert_allclose(found, clipped, atol=2e-6)
            assert found.dtype == np.float32
            assert found.shape == (5, 2)


def test_noise_is_one_stream_per_episode_seed_however_it_is_drawn():
    _, policy = actor_and_policy("squashed-gaussian")
    alone, among = policy.with_seeds([7]), policy.with_seeds([1, 7, 3])
    alone.reset(3, 20.0)
    among.reset(3, 20.0)
    rows = np.repeat(ROWS[:1], 3, axis=0)
    taken = [(alone.act(rows)[0], among.act(rows)) for _ in range(150)]
    for lonely, together in taken:
        np.testing.assert_array_equal(lonely, together[1])
    mean, std = policy.mean_and_std(ROWS[:1])
    expected = np.tanh(mean + std * episode_noise(7, 150, 2))
    np.testing.assert_allclose([lonely for lonely, _ in taken], expected, atol=1e-6)
    among.reset(3, 20.0)
    np.testing.assert_array_equal(among.act(rows), taken[0][1])
    one_by_one = np.random.default_rng([7, 1])
    drawn = [one_by_one.standard_normal(2, dtype=np.float32) for _ in range(9)]
    np.testing.assert_array_equal(episode_noise(7, 9, 2), drawn)


def test_a_policy_goes_through_pickle_and_keeps_nothing_of_the_network_it_came_from():
    actor, policy = actor_and_policy()
    twin = pickle.loads(pickle.dumps(policy.with_seeds([4, 5])))
    before = policy.with_seeds([4, 5])
    for sampling in (twin, before):
        sampling.reset(5, 20.0)
    np.testing.assert_array_equal(twin.act(ROWS), before.act(ROWS))
    still = policy.act(ROWS)
    with torch.no_grad():
        actor.net[0].weight.zero_()
    np.testing.assert_array_equal(policy.act(ROWS), still)


@pytest.mark.parametrize("state_dependent_std", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_saved_expert_is_the_same_policy(tmp_path, head, state_dependent_std):
    _, policy = actor_and_policy(head, "relu", state_dependent_std)
    save_expert(tmp_path / "a", policy)
    loaded = load_expert(tmp_path / "a")
    assert loaded.config == policy.config
    np.testing.assert_array_equal(loaded.act(ROWS), policy.act(ROWS))
    save_expert(tmp_path / "b", loaded)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")
    packaged = load_policy(tmp_path / "a")
    assert isinstance(packaged, Policy)
    packaged.reset(5, 10.0)
    np.testing.assert_array_equal(packaged.act(ROWS), policy.act(ROWS))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("net.0.bias"), "where the policy's configuration asks for"),
        (lambda weights: weights.update({"net.0.bias": np.zeros(3, np.float32)}), "of the shapes"),
        (lambda weights: weights.update({"log_std": np.zeros(2)}), "log_std is not float32"),
        (lambda weights: weights.update({"log_std": np.full(2, np.nan, np.float32)}), "log_std .* not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    _, policy = actor_and_policy()
    save_expert(tmp_path / "policy", policy)
    path = tmp_path / "policy" / "policy.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(BadInput, match=message) as caught:
        load_expert(tmp_path / "policy")
    assert str(path) in str(caught.value)


def test_acting_needs_no_torch():
    """A worker process imports the policy it is sent; torch would cost it seconds and hundreds of megabytes."""
    code = "import sys, springhead.rl.acting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_an_ensemble_is_its_members_one_by_one(activation):
    ensemble = Ensemble(4, [3, 6, 5], torch.Generator().manual_seed(0), activation)
    inputs = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32))
    found = ensemble(inputs)
    assert found.shape == (4, 7)
    for member in range(4):
        rows = inputs
        for layer, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            rows = rows @ weight[member] + bias[member]
            if layer < 2:
                rows = rows.tanh() if activation == "tanh" else rows.relu()
        torch.testing.assert_close(found[member], rows[:, 0])
    assert not torch.allclose(found[0], found[1])
    # The first layer's rows are orthogonal with norm sqrt(2), member by member.
    first = ensemble.weights[1][2]
    torch.testing.assert_close(first.T @ first, 2.0 * torch.eye(5), atol=1e-5, rtol=1e-5)


def test_a_frozen_ensemble_passes_gradients_to_its_inputs_only():
    ensemble = Ensemble(2, [3, 6], torch.Generator().manual_seed(0))
    inputs = torch.ones(4, 3, requires_grad=True)
    ensemble(inputs).sum().backward()
    through = inputs.grad.clone()
    assert all(weight.grad is not None for weight in ensemble.parameters())
    ensemble.zero_grad(set_to_none=True)
    inputs.grad = None
    ensemble(inputs, frozen=True).sum().backward()
    torch.testing.assert_close(inputs.grad, through)
    assert all(weight.grad is None for weight in ensemble.parameters())


def test_constant_components_do_not_blow_up():
    moments = Moments.of(2)
    moments.update(np.array([[1.0, 5.0], [3.0, 5.0]]))
    np.testing.assert_allclose(moments.std, [1.0, 1e-3])
