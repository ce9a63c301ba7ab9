"""TD3+BC, IQL and CQL: each loss by hand in NumPy, pinned losses, resuming, members, and that they learn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.offline import training
from springhead.rl.offline.algorithms import entry
from springhead.rl.offline.batches import Batch, flatten, moments
from springhead.rl.offline.contract import Member, OnStep, Settings
from springhead.rl.offline.cql import CQL, CQLSettings
from springhead.rl.offline.iql import IQL, IQLSettings, cosine, expectile_loss
from springhead.rl.offline.td3_bc import TD3BC, TD3BCSettings
from springhead.rl.policy import load_policy, save_model
from tests.rl.offline_data import BALL, spread

pytestmark = pytest.mark.unit
SMALL: dict[str, Settings] = {
    "td3-bc": TD3BCSettings(steps=10, batch_size=16, hidden=(8, 8), checkpoint_every=3, report_every=1),
    "iql": IQLSettings(steps=10, batch_size=16, hidden=(8, 8), checkpoint_every=3, report_every=1),
    "cql": CQLSettings(steps=10, batch_size=16, hidden=(8, 8), samples=3, checkpoint_every=3, report_every=1),
}
NAMES = sorted(SMALL)
Array = np.ndarray[Any, Any]


def learner(name: str, seeds: Sequence[int] = (3,), settings: Settings | None = None) -> Any:
    members = [Member(seed) for seed in seeds]
    return entry(name).learner()(name, flatten(spread(12), BALL), BALL, settings or SMALL[name], members)


def quiet(step: int, figures: dict[str, float]) -> None:
    pass


def train(name: str, scratch: Path, on_step: OnStep = quiet, seeds: Sequence[int] = (3,)) -> list[training.Trained]:
    return training.train(name, spread(12), BALL, SMALL[name], seeds, scratch, on_step)


def batch_of(size: int = 5, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def rows(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(1, size, *shape)).astype(np.float32))

    ends = torch.zeros(1, size)
    terminals, timeouts = ends.clone(), ends.clone()
    terminals[0, 1] = timeouts[0, 2] = 1.0
    return Batch(rows(8), rows(2).tanh(), rows(), rows().abs(), rows(8), terminals, timeouts, ends)


def mlp(net: Any, inputs: Array, number: int = 0) -> Array:
    """The network of one member or ensemble place, in NumPy."""
    rows = inputs
    for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        rows = rows @ weight[number].detach().numpy() + bias[number].detach().numpy()
        if layer < len(net.weights) - 1:
            rows = np.maximum(rows, 0)
    return rows


def both(a: torch.Tensor, b: Array) -> Array:
    return np.concatenate([a[0].numpy(), b], axis=-1)


# -- TD3+BC -----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeouts", ["bootstrap", "terminal"])
def test_td3_targets_by_hand(timeouts: str) -> None:
    made: TD3BC = learner("td3-bc", settings=replace(SMALL["td3-bc"], timeouts=timeouts))  # type: ignore[call-arg]
    batch, noise = batch_of(), torch.full((1, 5, 2), 10.0)
    actions = np.clip(
        np.tanh(mlp(made.actor, batch.next_observations[0].numpy())) + 0.5, -1, 1
    )  # the noise is cut at .5
    values = [mlp(made.critics, both(batch.next_observations, actions), i)[:, 0] for i in range(2)]
    going_on = 1 - np.array([0, 1, 1 if timeouts == "terminal" else 0, 0, 0])
    wanted = batch.rewards[0].numpy() + 0.99 * going_on * np.minimum(*values)
    np.testing.assert_allclose(made.targets(batch, noise)[0].detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_td3_moves_its_actor_and_targets_every_second_step() -> None:
    made: TD3BC = learner("td3-bc")
    before = [p.clone() for p in (*made.actor.parameters(), *made.target_critics.parameters())]
    made.update(1)
    now = (*made.actor.parameters(), *made.target_critics.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    made.update(2)
    now = (*made.actor.parameters(), *made.target_critics.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_td3_weighs_value_by_its_mean_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made: TD3BC = learner("td3-bc")
    batch = batch_of(16)
    monkeypatch.setattr(made.sampler, "draw", lambda: batch)
    made.optimisers["critics"].step = lambda: None  # type: ignore[method-assign,assignment]  # so that Q is known below
    loss = made.update(2)["policy_loss"]
    made_before: TD3BC = learner("td3-bc")
    actions = np.tanh(mlp(made_before.actor, batch.observations[0].numpy()))
    value = mlp(made_before.critics, both(batch.observations, actions))[:, 0]
    wanted = -2.5 * value.mean() / np.abs(value).mean() + np.square(actions - batch.actions[0].numpy()).mean()
    assert float(loss) == pytest.approx(wanted, rel=1e-4)


# -- IQL --------------------------------------------------------------------------------------


def test_expectile_loss_by_hand() -> None:
    errors = torch.tensor([2.0, -2.0, 0.5, -1.0])
    assert expectile_loss(errors, 0.7).tolist() == pytest.approx([2.8, 1.2, 0.175, 0.3])
    # The expectile 0.9 of {0, 1}: the v at which 0.9 (1 - v) = 0.1 v.
    v = 0.9
    slope = -2 * 0.9 * (1 - v) + 2 * 0.1 * v
    assert slope == pytest.approx(0.0)


def test_iql_losses_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    made: IQL = learner("iql")
    batch = batch_of(16)
    monkeypatch.setattr(made.sampler, "draw", lambda: batch)
    states, actions = batch.observations[0].numpy(), batch.actions[0].numpy()
    q = [mlp(made.critics, np.concatenate([states, actions], 1), i)[:, 0] for i in range(2)]
    v = mlp(made.value, states)[:, 0]
    following = mlp(made.value, batch.next_observations[0].numpy())[:, 0]
    wanted = batch.rewards[0].numpy() + 0.99 * (1 - batch.terminals[0].numpy()) * following
    advantage = np.minimum(*q) - v
    mean, log_std = np.split(mlp(made.actor.net, states), 2, axis=1)
    before = np.arctanh(np.clip(actions, -1 + 1e-6, 1 - 1e-6))
    log_std = np.clip(log_std, -5, 2)
    density = -0.5 * np.square((before - mean) / np.exp(log_std)) - log_std - 0.5 * math.log(2 * math.pi)
    density = (density - np.log(1 - np.square(np.tanh(before)))).sum(1)
    figures = made.update(1)
    assert float(figures["value_loss"]) == pytest.approx(
        np.mean(np.where(advantage < 0, 0.3, 0.7) * advantage**2), rel=1e-4
    )
    assert float(figures["critic_loss"]) == pytest.approx(sum(np.mean((one - wanted) ** 2) for one in q), rel=1e-4)
    weight = np.minimum(np.exp(3 * advantage), 100)
    assert float(figures["policy_loss"]) == pytest.approx(-np.mean(weight * density), rel=1e-3)


def test_the_cosine_falls_from_one_to_almost_nothing() -> None:
    assert cosine(1, 100) == 1.0
    assert cosine(51, 100) == pytest.approx(0.5)
    assert cosine(100, 100) < 0.001


# -- CQL --------------------------------------------------------------------------------------


def test_the_conservative_gap_by_hand() -> None:
    made: CQL = learner("cql")
    batch, rng = batch_of(4), np.random.default_rng(1)
    random = rng.uniform(-1, 1, (12, 2)).astype(np.float32)
    noise = rng.normal(size=(24, 2)).astype(np.float32)
    states = {"s": batch.observations[0].numpy(), "then": batch.next_observations[0].numpy()}
    values = [mlp(made.critics, np.concatenate([states["s"], batch.actions[0].numpy()], 1), i)[:, 0] for i in range(2)]
    terms: list[list[list[float]]] = [[[] for _ in range(4)] for _ in range(2)]

    def add(row: int, action: Array, log_density: float) -> None:
        for i in range(2):
            q = mlp(made.critics, np.concatenate([states["s"][row], action])[None], i)[0, 0]
            terms[i][row].append(float(q) - log_density)

    for k in range(12):
        row = k % 4
        add(row, random[k], -2 * math.log(2))
        for kind, own in (("s", noise[k]), ("then", noise[12 + k])):
            mean, log_std = np.split(mlp(made.actor.net, states[kind][row][None])[0], 2)
            before = mean + np.exp(log_std) * own
            density = -0.5 * own**2 - log_std - 0.5 * math.log(2 * math.pi) - np.log(1 - np.tanh(before) ** 2)
            add(row, np.tanh(before), float(density.sum()))
    wanted = [np.mean([np.log(np.mean(np.exp(terms[i][row]))) - values[i][row] for row in range(4)]) for i in range(2)]
    q = torch.from_numpy(np.stack(values)[None])
    found = made.gap(batch, q, torch.from_numpy(random[None]), torch.from_numpy(noise[None]))
    assert found[0].tolist() == pytest.approx(wanted, rel=1e-3)


def test_the_learned_weight_rises_while_the_gap_is_above_its_threshold() -> None:
    made: CQL = learner("cql", settings=replace(SMALL["cql"], threshold=-100.0))  # type: ignore[call-arg]
    for step in range(1, 4):
        made.update(step)
    assert float(made.log_alpha.detach()) > math.log(5.0)
    fixed: CQL = learner("cql")
    fixed.update(1)
    assert float(fixed.log_alpha.detach()) == pytest.approx(math.log(5.0))


def test_a_weight_of_zero_is_no_conservatism(monkeypatch: pytest.MonkeyPatch) -> None:
    made: CQL = learner("cql", settings=replace(SMALL["cql"], alpha=0.0))  # type: ignore[call-arg]
    values = torch.full((1, 2, 16), 1e9, requires_grad=True)
    monkeypatch.setattr(made, "gap", lambda batch, *others: values.mean(2))
    losses = made.update(1)["critic_loss"]
    assert float(losses) < 1e3
    assert values.grad is not None
    assert not values.grad.any()
    with pytest.raises(BadInput, match="alpha is 0, from which no weight can be learned"):
        CQLSettings(alpha=0.0, threshold=1.0)


# -- all of them ------------------------------------------------------------------------------

PINNED = {
    "cql": [
        17.862354,
        17.870668,
        19.381367,
        18.634056,
        18.562214,
        18.415768,
        16.630356,
        19.269398,
        17.667423,
        17.836481,
    ],
    "iql": [5.51464, 7.832791, 7.560273, 7.630677, 6.114939, 6.356976, 6.856168, 6.92422, 6.753406, 6.528149],
    "td3-bc": [2.836336, 4.39441, 3.819688, 3.687439, 3.09674, 3.60143, 3.513511, 7.055662, 4.014006, 4.028765],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_losses_are_pinned(name: str, tmp_path: Path) -> None:
    losses: list[float] = []
    train(name, tmp_path, lambda step, figures: losses.append(figures["critic_loss"]))
    assert losses == pytest.approx(PINNED[name], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_horizon_may_end_an_episode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All transitions of a batch are cut by the horizon: then the discount matters only where values go on."""
    found = {}
    for timeouts in ("bootstrap", "terminal"):
        for discount in (0.0, 0.9):
            changed = replace(SMALL[name], timeouts=timeouts, discount=discount)  # type: ignore[call-arg]
            made = learner(name, settings=changed)
            batch = batch_of(16)
            cut = torch.ones_like(batch.timeouts)
            monkeypatch.setattr(made.sampler, "draw", lambda b=batch, c=cut: b._replace(timeouts=c, terminals=0 * c))
            found[timeouts, discount] = float(made.update(1)["critic_loss"])
    assert found["terminal", 0.9] == found["terminal", 0.0] == found["bootstrap", 0.0]
    assert found["bootstrap", 0.9] != found["bootstrap", 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    whole = train(name, tmp_path / "whole")[0]

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(name, tmp_path / "cut", stop)
    resumed = train(name, tmp_path / "cut")[0]
    assert resumed.history == whole.history
    for folder, trained in (("a", whole), ("b", resumed)):
        save_model(tmp_path / folder, trained.config, trained.files)
    for file in ("config.json", "policy.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_seeds_trained_together_equal_seeds_trained_alone(name: str, tmp_path: Path) -> None:
    together = train(name, tmp_path / "all", seeds=(3, 4))
    for seed, one in zip((3, 4), together, strict=True):
        alone = train(name, tmp_path / str(seed), seeds=(seed,))[0]
        assert one.config == alone.config
        for key, value in alone.files["policy.safetensors"].items():
            torch.testing.assert_close(one.files["policy.safetensors"][key], value, rtol=1e-4, atol=1e-5)
        assert list(one.history[-1]) == list(alone.history[-1])
        assert list(one.history[-1].values()) == pytest.approx(list(alone.history[-1].values()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_acts(name: str, tmp_path: Path) -> None:
    trained = train(name, tmp_path / "s")[0]
    save_model(tmp_path / "m", trained.config, trained.files)
    policy = load_policy(tmp_path / "m")
    policy.reset(3, 0.0)
    actions = policy.act(np.zeros((3, 8), dtype=np.float32))
    assert actions.shape == (3, 2)
    assert (np.abs(actions) < 1).all()
    assert policy.algorithm == name


def better_action() -> list[Episode]:
    """Actions at random; what is paid is nearness of the action to the state's first two components."""
    rng, episodes = np.random.default_rng(0), []
    for one in spread(30):
        actions = rng.uniform(-1, 1, one.actions.shape).astype(np.float32)
        goal = np.tanh(one.observations[:, :2])
        rewards = -np.square(actions - goal).sum(1).astype(np.float32)
        episodes.append(replace(one, actions=actions, rewards=rewards))
    return episodes


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_the_better_of_random_actions(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 400, "hidden": (32, 32), "batch_size": 64, "discount": 0.0}
    changes |= {"td3-bc": {"learning_rate": 3e-3, "alpha": 20.0}, "iql": {"learning_rate": 3e-3, "beta": 10.0}}.get(
        name, {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "alpha": 0.1}
    )
    episodes = better_action()
    trained = training.train(name, episodes, BALL, replace(SMALL[name], **changes), [0], tmp_path / "s")[0]
    save_model(tmp_path / "m", trained.config, trained.files)
    policy = load_policy(tmp_path / "m")
    states = np.concatenate([one.observations for one in episodes])
    policy.reset(len(states), 0.0)
    error = np.square(policy.act(states) - np.tanh(states[:, :2])).sum(1).mean()
    assert error < 0.45  # imitating the data: (1/3 + 0.4) x 2 and more


def test_observations_are_normalised_by_the_data_and_constants_survive() -> None:
    episodes = [replace(one, observations=one.observations.copy()) for one in spread(4)]
    for one in episodes:
        one.observations[:, 3] = 7.0
    mean, deviation = moments(flatten(episodes, BALL))
    assert (float(mean[3]), float(deviation[3])) == (7.0, 1.0)
    rows = np.concatenate([one.observations for one in episodes])
    np.testing.assert_allclose(deviation.numpy()[:3], rows[:, :3].std(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: TD3BCSettings(policy_delay=0), "policy_delay is 0"),
        (lambda: IQLSettings(expectile=1.0), "expectile is 1.0"),
        (lambda: CQLSettings(samples=0), "samples is 0"),
    ],
)
def test_settings_out_of_range_are_named(made: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        made()
