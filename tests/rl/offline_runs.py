"""What the tests of several offline algorithms do alike: short runs, resuming, members alone and together, bad data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.rl.dataset import Episode
from springhead.rl.offline import training
from springhead.rl.offline.algorithms import entry
from springhead.rl.offline.batches import Batch, flatten
from springhead.rl.offline.contract import Member, Settings
from springhead.rl.offline.stacked import MLP
from springhead.rl.offline.training import Trained
from springhead.rl.policy import Policy, load_policy, save_model
from tests.rl.offline_data import BALL, dataset, episode, spread

EPISODES = spread(12, 60)
"""Costs from 0 to 60, so that each of the task's limits is kept by some."""


def by_hand(net: MLP, network: int, rows: np.ndarray) -> np.ndarray:
    """One network of a stack in float64."""
    for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        rows = rows @ weight[network].detach().double().numpy() + bias[network, 0].detach().double().numpy()
        if layer < len(net.weights) - 1:
            rows = np.maximum(rows, 0) if net.activation == "relu" else np.tanh(rows)
        elif net.output == "tanh":
            rows = np.tanh(rows)
    return rows


def learner(name: str, settings: Settings, limits: Sequence[float] = (10.0, 40.0), seed: int = 0) -> Any:
    """A learner on :data:`EPISODES`, one member for each limit."""
    members = [Member(seed, limit) for limit in limits]
    return entry(name).learner()(name, flatten(EPISODES, BALL), BALL, settings, members)


def moved_targets(*targets: torch.nn.Module) -> None:
    """Lets target networks differ from their sources, so that a test sees which is used."""
    with torch.no_grad():
        for target in targets:
            for number, value in enumerate(target.parameters()):
                value.add_(0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))


def batch_with_ends(made: Any) -> Batch:
    """A batch in which the first transition is terminal and the second cut by the horizon."""
    batch: Batch = made.sampler.draw()
    terminals, timeouts = torch.zeros_like(batch.terminals), torch.zeros_like(batch.timeouts)
    terminals[:, 0] = timeouts[:, 1] = 1.0
    return batch._replace(terminals=terminals, timeouts=timeouts)


def curve(name: str, settings: Settings, scratch: Path, figures: Sequence[str], limit: float = 10.0) -> list[float]:
    """Sums of some figures, of one limit's member, at each reported step."""
    seen: list[float] = []

    def keep(step: int, row: dict[str, float]) -> None:
        seen.append(sum(row[f"{figure}-limit-{limit:g}"] for figure in figures))

    training.train(name, EPISODES, BALL, settings, (3,), scratch, keep)
    return seen


def check_resuming(
    name: str, settings: Settings, tmp_path: Path, at: int = 5, saved: int = 4, episodes: Sequence[Episode] = EPISODES
) -> Trained:
    """Training killed at a step and resumed equals uninterrupted training, in every byte of the model.

    Args:
        name: The algorithm.
        settings: Its settings.
        tmp_path: A folder.
        at: The step after which it is killed.
        saved: The step of the checkpoint before it.
        episodes: The data.

    Returns:
        What was trained; its model folder is ``a``.
    """

    def run(scratch: str, on_step: Callable[[int, dict[str, float]], None] = lambda step, row: None) -> Trained:
        return training.train(name, episodes, BALL, settings, (3,), tmp_path / scratch, on_step)[0]

    def stop(step: int, row: dict[str, float]) -> None:
        if step == at:
            raise KeyboardInterrupt

    whole, resumed_at = run("whole"), list[int]()
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop)
    resumed = run("cut", lambda step, row: resumed_at.append(step))
    assert resumed_at[0] == saved
    assert resumed.history == whole.history
    for folder, trained in (("a", whole), ("b", resumed)):
        save_model(tmp_path / folder, trained.config, trained.files)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    limits = (
        [f"limit-{limit:g}.safetensors" for limit in BALL.limits] if entry(name).by_limit else ["policy.safetensors"]
    )
    assert names == ["config.json", *limits]
    for file in names:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    return whole


def check_members(name: str, settings: Settings, tmp_path: Path) -> None:
    """A seed trained beside another has the weights that it has when trained alone."""
    both = training.train(name, EPISODES, BALL, settings, (1, 2), tmp_path / "both")
    alone = training.train(name, EPISODES, BALL, settings, (2,), tmp_path / "alone")[0]
    assert both[1].config == alone.config
    for file, tensors in alone.files.items():
        for key, value in tensors.items():
            torch.testing.assert_close(both[1].files[file][key], value, rtol=1e-3, atol=1e-4)
    first = both[0].files["limit-10.safetensors"]
    assert any(not torch.equal(first[key], value) for key, value in alone.files["limit-10.safetensors"].items())


def trained_policy(name: str, settings: Settings, tmp_path: Path) -> Policy:
    """A policy that went through its folder."""
    trained = training.train(name, EPISODES, BALL, settings, (3,), tmp_path / "scratch")[0]
    save_model(tmp_path / "model", trained.config, trained.files)
    return load_policy(tmp_path / "model")


def check_acting(policy: Policy) -> None:
    """Actions are within bounds, the same again, row by row alone, and follow the limit; too low a limit is refused."""
    rows = np.random.default_rng(0).normal(size=(4, BALL.observation_dim)).astype(np.float32)

    def act(limit: float, observations: np.ndarray = rows, steps: int = 1) -> np.ndarray:
        policy.reset(len(observations), limit)
        return np.stack([policy.act(observations) for _ in range(steps)])

    actions = act(20, steps=2)
    assert actions.shape == (2, 4, BALL.action_dim)
    assert actions.dtype == np.float32
    assert (np.abs(actions) <= 1).all()
    np.testing.assert_array_equal(act(20, steps=2), actions)
    for number in range(4):
        np.testing.assert_allclose(act(20, rows[number : number + 1], 2)[:, 0], actions[:, number], atol=1e-5)
    np.testing.assert_array_equal(act(39), act(20))
    assert (act(10) != act(40)).any()
    with pytest.raises(BadInput, match="trained for the cost limits 10, 20, 40; ask for at least 10, not 9"):
        policy.reset(1, 9)


def check_refusals(name: str, settings: Settings, tmp_path: Path) -> None:
    """Data that cannot teach a constraint are named before training."""

    def refused(episodes: Sequence[Episode], message: str) -> None:
        with pytest.raises(BadInput, match=message):
            training.train(name, episodes, BALL, settings, (0,), tmp_path / "refused")

    refused([], "no episodes of BallCircle")
    refused([episode(5.0, 1)], f"{name} on BallCircle: one episode only")
    refused(dataset([(9.0, 5), (8.0, 5)]), f"{name} on BallCircle: each of 2 episodes costs 5")
    refused(dataset([(9.0, 18), (8.0, 15)]), f"{name} on BallCircle: none of 2 episodes keeps the cost limit 10")
    broken = episode(10.0, 3)
    broken.rewards[4] = np.nan
    refused([episode(5.0, 1), broken], f"episode 1 .{broken.id[:12]}.*not finite")
