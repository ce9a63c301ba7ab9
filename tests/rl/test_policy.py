"""Policy folders: round trips, what is refused, and stateless prediction."""

from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest
from springhead.rl.networks import ExpertConfig, ExpertPolicy, GaussianActor, save_expert, weights_of
from springhead.rl.offline.bc import BCSettings
from springhead.rl.offline.cdt import CDTSettings
from springhead.rl.offline.relabelling import Augmentation
from springhead.rl.offline.training import train
from springhead.rl.policy import Policy, load_policy, predict, read_tensors, save_model
from tests.rl.offline_data import BALL, spread

pytestmark = pytest.mark.unit
ROWS = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def bc_model(folder: Path) -> Path:
    settings = BCSettings(steps=2, batch_size=8, hidden=(8,))
    trained = train("bc-safe", spread(8), BALL, settings, [0], folder / "scratch")[0]
    save_model(folder / "model", trained.config, trained.files)
    return folder / "model"


def cdt_model(folder: Path) -> Path:
    settings = CDTSettings(
        steps=2, batch_size=4, context=3, width=8, layers=1, heads=2, augmentation=Augmentation(min_per_cell=0)
    )
    trained = train("cdt", spread(8), BALL, settings, [0], folder / "scratch")[0]
    save_model(folder / "model", trained.config, trained.files)
    return folder / "model"


def expert_model(folder: Path) -> Path:
    config = ExpertConfig("BallCircle", "ppo-lag", 20.0, 1, 500, (0.0,) * 8, (1.0,) * 8, (8,), 2)
    actor = GaussianActor(8, 2, (8,), torch.Generator().manual_seed(0))
    save_expert(folder / "model", ExpertPolicy(config, weights_of(actor)))
    return folder / "model"


MODELS = {"bc-safe": bc_model, "cdt": cdt_model, "ppo-lag": expert_model}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MODELS[request.param](tmp_path)


def test_every_kind_of_policy_loads_and_acts(model: Path) -> None:
    policy = load_policy(model)
    assert isinstance(policy, Policy)
    assert (policy.task, policy.observation_dim, policy.action_dim) == ("BallCircle", 8, 2)
    assert policy.algorithm in MODELS
    policy.reset(4, 20.0)
    for _ in range(4):
        actions = policy.act(ROWS)
        policy.observe(np.ones(4), np.zeros(4))
    assert actions.shape == (4, 2)
    assert actions.dtype == np.float32
    assert (np.abs(actions) <= 1).all()


def test_prediction_keeps_no_memory_and_rows_are_independent(model: Path) -> None:
    policy = load_policy(model)
    first = predict(policy, ROWS, 20.0)
    np.testing.assert_array_equal(predict(policy, ROWS, 20.0), first)
    np.testing.assert_allclose(predict(policy, ROWS[2:3], 20.0), first[2:3], atol=1e-6)
    np.testing.assert_allclose(predict(policy, ROWS[::-1], 20.0), first[::-1], atol=1e-6)


def test_each_row_may_have_its_own_limit(tmp_path: Path) -> None:
    policy = load_policy(bc_model(tmp_path))
    mixed = predict(policy, ROWS, np.array([10.0, 40.0, 10.0, 40.0]))
    np.testing.assert_allclose(mixed[[0, 2]], predict(policy, ROWS[[0, 2]], 10.0), atol=1e-6)
    np.testing.assert_allclose(mixed[[1, 3]], predict(policy, ROWS[[1, 3]], 40.0), atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "limit", "message"),
    [
        (np.zeros((2, 7)), 20.0, r"expects the shape \(n, 8\), got \(2, 7\)"),
        (np.zeros(8), 20.0, r"got \(8,\)"),
        (np.full((3, 8), np.nan), 20.0, r"rows \[0, 1, 2\] hold a value that is not finite"),
        (np.zeros((2, 8)), -1.0, "a finite number of 0 or more"),
        (np.zeros((2, 8)), np.array([1.0, 2.0, 3.0]), "expected one number or 2"),
    ],
)
def test_prediction_refuses_what_it_cannot_answer(tmp_path: Path, rows: np.ndarray, limit: float, message: str) -> None:
    policy = load_policy(expert_model(tmp_path))
    with pytest.raises(BadInput, match=message):
        predict(policy, rows, limit)


def test_equal_models_have_equal_digests(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert tree_digest(cdt_model(tmp_path / "a")) == tree_digest(cdt_model(tmp_path / "b"))


def test_a_folder_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a policy folder"):
        load_policy(tmp_path)
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(BadInput, match="no 'algorithm' in it"):
        load_policy(tmp_path)
    write_json(tmp_path / "config.json", {"algorithm": "dqn"})
    with pytest.raises(BadInput, match="unknown algorithm 'dqn'; known: bc-all"):
        load_policy(tmp_path)


@pytest.mark.parametrize("name", ["bc-safe", "cdt"])
def test_a_changed_configuration_is_refused(tmp_path: Path, name: str) -> None:
    folder = MODELS[name](tmp_path)
    config = read_json(folder / "config.json")
    for changes, message in (
        ({"format": 99}, "format 99, this version reads format 1"),
        ({"hidden": [9], "width": 12}, "weights and configuration are not of one model"),
        ({"hidden": "wide", "width": "wide"}, "not (an actor's|a CDT) configuration"),
    ):
        write_json(folder / "config.json", {**config, **changes})
        with pytest.raises(BadInput, match=message):
            load_policy(folder)
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "observation_dim"})
    with pytest.raises(BadInput, match="missing key 'observation_dim'"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["bc-safe", "cdt"])
def test_missing_and_damaged_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder = MODELS[name](tmp_path)
    weights = sorted(folder.glob("*.safetensors"))[0]
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        load_policy(folder)
    weights.unlink()
    with pytest.raises(BadInput, match="no such file; restore the model folder"):
        load_policy(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, {"algorithm": "cdt"}, {"w.safetensors": {"w": torch.tensor([1.0, float("inf")])}})
    with pytest.raises(BadInput, match="tensor 'w' holds a value that is not finite"):
        read_tensors(tmp_path / "w.safetensors", {"w": (2,)})
