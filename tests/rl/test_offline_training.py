"""The loop all offline algorithms share: members, policies on the way, figures, and what it refuses to begin."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.params import load, overlay, read_params
from springhead.rl.dataset import Episode
from springhead.rl.offline import training
from springhead.rl.offline.algorithms import ALGORITHMS, entry
from springhead.rl.offline.bc import BCSettings
from springhead.rl.offline.contract import Generators, Settings
from springhead.rl.policy import LOADERS
from stages.rl.train import Params, settings
from tests.rl.offline_data import BALL, dataset, spread

pytestmark = pytest.mark.unit
SMALL = BCSettings(steps=12, batch_size=8, hidden=(8,), checkpoint_every=5, report_every=4, policies=2)
CONSTRAINED = ("bcq-lag", "bear-lag", "cdt", "coptidice", "cpq")


def train(
    name: str, episodes: Sequence[Episode], made: Settings, scratch: Path, seeds: Sequence[int] = (0,), **more: Any
) -> list[training.Trained]:
    return training.train(name, episodes, BALL, made, seeds, scratch, **more)


def test_every_algorithm_can_be_made_and_loaded() -> None:
    assert set(LOADERS) == set(ALGORITHMS)
    for name in ALGORITHMS:
        assert issubclass(entry(name).settings_class(), Settings)
        assert callable(entry(name).learner())


def test_a_misspelt_algorithm_is_named_with_its_neighbour() -> None:
    with pytest.raises(BadInput, match=r"unknown offline algorithm 'bcq-lagg'. Did you mean bcq-lag\? Known: bc-all"):
        entry("bcq-lagg")


def test_policies_on_the_way_are_those_of_shorter_runs(tmp_path: Path) -> None:
    whole = train("bc-safe", spread(12, 60), SMALL, tmp_path / "whole")[0]
    assert sorted(whole.policies) == [4, 8]
    short = train("bc-safe", spread(12, 60), replace(SMALL, steps=8), tmp_path / "short")[0]
    assert sorted(short.policies) == [3, 5]
    assert sorted(whole.policies[8]) == ["limit-10.safetensors", "limit-20.safetensors", "limit-40.safetensors"]
    for file, tensors in short.files.items():
        for key, value in tensors.items():
            assert torch.equal(whole.policies[8][file][key], value)


def test_policies_on_the_way_survive_a_kill(tmp_path: Path) -> None:
    whole = train("bc-safe", spread(12, 60), SMALL, tmp_path / "whole")[0]

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("bc-safe", spread(12, 60), SMALL, tmp_path / "cut", on_step=stop)
    resumed = train("bc-safe", spread(12, 60), SMALL, tmp_path / "cut")[0]
    for step, files in whole.policies.items():
        for file, tensors in files.items():
            assert all(torch.equal(resumed.policies[step][file][key], value) for key, value in tensors.items())


def test_figures_come_at_reports_checkpoints_and_kept_policies_only(tmp_path: Path) -> None:
    seen: list[int] = []
    trained = train("bc-all", spread(6), SMALL, tmp_path, on_step=lambda step, figures: seen.append(step))[0]
    assert seen == [4, 5, 8, 10, 12]
    assert [row["step"] for row in trained.history] == [5, 10, 12]


def test_each_seed_has_the_curve_it_would_have_alone(tmp_path: Path) -> None:
    both = train("bc-safe", spread(12, 60), SMALL, tmp_path / "both", seeds=(7, 17))
    for seed, one in zip((7, 17), both, strict=True):
        alone = train("bc-safe", spread(12, 60), SMALL, tmp_path / str(seed), seeds=(seed,))[0]
        assert (
            list(one.history[0])
            == list(alone.history[0])
            == ["step", "loss-limit-10", "loss-limit-20", "loss-limit-40"]
        )
        for row, other in zip(one.history, alone.history, strict=True):
            assert list(row.values()) == pytest.approx(list(other.values()), rel=1e-4)
        assert one.config == alone.config


def test_limits_of_ones_own(tmp_path: Path) -> None:
    trained = train("bc-safe", spread(12, 60), replace(SMALL, limits=(15.0,)), tmp_path)[0]
    assert (list(trained.files), trained.config["limits"]) == (["limit-15.safetensors"], [15.0])


def test_generators_of_members_do_not_depend_on_companions() -> None:
    pair, alone = Generators([1, 2]), Generators([2])
    assert torch.equal(pair.normal(3, 2)[1], alone.normal(3, 2)[0])
    assert torch.equal(pair.integers([5, 9], 20)[1], alone.integers([9], 20)[0])
    state = pair.state()
    first = pair.uniform(4)
    pair.restore(state)
    assert torch.equal(pair.uniform(4), first)
    assert not torch.equal(Generators([1], stream=1).normal(8), Generators([1]).normal(8))


# -- bad data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        (dataset([(9.0, 5)]), "one episode only"),
        (dataset([(9.0, 5), (8.0, 5), (7.0, 5)]), "each of 3 episodes costs 5"),
        (dataset([(9.0, 15), (8.0, 18)]), r"none of 2 episodes keeps the cost limit 10 \(the cheapest costs 15\)"),
    ],
)
def test_data_from_which_no_constraint_can_be_learned_are_refused_before_training(
    name: str, episodes: list[Episode], message: str, tmp_path: Path
) -> None:
    made = entry(name).settings_class()(steps=2, batch_size=4)
    with pytest.raises(BadInput, match=f"{name} on BallCircle: {message}"):
        train(name, episodes, made, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_numbers_that_are_not_finite_name_their_episode(name: str, tmp_path: Path) -> None:
    episodes = spread(4, 60)
    episodes[2].next_observations[3, 1] = np.inf
    with pytest.raises(BadInput, match=f"episode 2 .{episodes[2].id[:12]}.*not finite"):
        train(name, episodes, entry(name).settings_class()(), tmp_path)


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="device 'cuda' cannot be used here"):
        train("bc-all", spread(3), replace(SMALL, device="cuda"), tmp_path)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_precision_needs_a_gpu(precision: Any) -> None:
    with pytest.raises(BadInput, match=f"precision is '{precision}' on the device 'cpu'; it is for CUDA devices"):
        replace(SMALL, precision=precision)
    assert replace(SMALL, precision=precision, device="cuda:0").precision == precision


def test_a_precision_holds_within_an_update_only() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    with training.arithmetic("float32"):
        assert products.fp32_precision == before
    with training.arithmetic("tf32"):
        assert products.fp32_precision == "tf32"
    assert products.fp32_precision == before
    with pytest.raises(RuntimeError, match="in an update"), training.arithmetic("tf32"):
        raise RuntimeError("in an update")
    assert products.fp32_precision == before


def test_products_are_in_bfloat16_and_no_cast_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def autocast(*arguments: Any, **more: Any) -> AbstractContextManager[None]:
        asked.append((arguments, more))
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    for precision in ("float32", "tf32", "bfloat16"):
        with training.arithmetic(precision):
            assert len(asked) == (precision == "bfloat16")
    assert asked == [(("cuda", torch.bfloat16), {"cache_enabled": False})]


def test_a_checkpoint_of_other_networks_is_refused(tmp_path: Path) -> None:
    train("bc-safe", spread(4), SMALL, tmp_path)
    train("bc-safe", spread(4), SMALL, tmp_path)
    with pytest.raises(BadInput, match="holds a checkpoint with other settings; remove it"):
        train("bc-safe", spread(4), replace(SMALL, hidden=(9,), steps=20), tmp_path)
    with pytest.raises(BadInput, match="with other settings, seeds and limits"):
        train("bc-safe", spread(4), replace(SMALL, limits=(25.0,)), tmp_path, seeds=(7,))
    with pytest.raises(BadInput, match="with other data"):
        train("bc-safe", spread(5), SMALL, tmp_path)
    with pytest.raises(BadInput, match="with other algorithm, seeds and limits"):
        train("bc-all", spread(4), SMALL, tmp_path)


def test_what_a_killed_save_leaves_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".tmp-4194305"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    train("bc-all", spread(3), SMALL, tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_named_once(seeds: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name at least one, and each once"):
        train("bc-all", spread(3), SMALL, tmp_path, seeds=seeds)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "rewards",
            lambda a: a[:, None],
            r"episode 1 of BallCircle: rewards have shape \(60, 1\), \(60,\) was expected",
        ),
        ("costs", lambda a: a[:-1], r"costs have shape \(59,\)"),
        ("actions", lambda a: a[:-1], r"actions have shape \(59, 2\)"),
        ("actions", lambda a: 3 * a, r"an action of size .*; actions lie in \[-1, 1\]"),
        ("next_observations", lambda a: a[:, :-1], r"next_observations have shape \(60, 7\)"),
    ],
)
def test_wrong_shapes_and_actions_out_of_bounds_are_named(
    key: str, change: Callable[[np.ndarray], np.ndarray], message: str, tmp_path: Path
) -> None:
    episodes = spread(3, 60)
    episodes[1] = replace(episodes[1], **{key: change(getattr(episodes[1], key))})
    with pytest.raises(BadInput, match=message):
        train("bc-all", episodes, SMALL, tmp_path)


# -- parameters -------------------------------------------------------------------------------

PROFILES = [None, *sorted((Path(__file__).parents[2] / "pipelines/profiles").glob("*.yaml"))]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem if path else "quick")
def test_every_profile_configures_its_algorithms(profile: Path | None) -> None:
    chosen = read_params(Path(__file__).parents[2] / "params.yaml")
    if profile is not None:
        chosen = overlay(chosen, read_params(profile), profile.name)
    params = load(Params, chosen["rl"]["train"], "params.yaml: rl.train")
    assert chosen["rl"]["algorithms"]
    for task in chosen["rl"]["tasks"]:
        for algorithm in chosen["rl"]["algorithms"]:
            assert settings(params, task, algorithm).steps >= 1
    for block in params.algorithms:  # none that is not used
        assert any(entry(name).block == block for name in chosen["rl"]["algorithms"])


def test_a_tasks_own_settings_win() -> None:
    params = load(
        Params,
        {"algorithms": {"bc": {"steps": 7}}, "tasks": {"BallCircle": {"bc": {"batch_size": 3}}}},
        "params.yaml: rl.train",
    )
    assert (settings(params, "BallCircle", "bc-safe").steps, settings(params, "BallCircle", "bc-safe").batch_size) == (
        7,
        3,
    )
    assert settings(params, "CarRun", "bc-all").batch_size == 512
    assert settings(params, "CarRun", "iql").steps == 100_000


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        (
            {"algorithms": {"bc": {"step": 7}}},
            "bc-all",
            "rl.train.algorithms.bc.step: unknown parameter; did you mean 'steps'",
        ),
        ({"algorithms": {"cpq": {"steps": 0}}}, "cpq", "rl.train.algorithms.cpq.*steps is 0; use at least 1"),
        ({"algorithms": {}, "tasks": {"A": {"iql": {"beta": 0}}}}, "iql", "rl.train.tasks.A.iql.*beta is 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_place(values: dict[str, Any], name: str, message: str) -> None:
    params = load(Params, values, "params.yaml: rl.train")
    with pytest.raises(BadInput, match=message):
        settings(params, "A", name)
    with pytest.raises(BadInput, match="unknown algorithm 'bcq'"):
        load(Params, {"algorithms": {"bcq": {}}}, "params.yaml: rl.train")


def test_the_scratch_folder_can_be_thrown_away(tmp_path: Path) -> None:
    once = train("bc-all", spread(3), SMALL, tmp_path / "s")[0]
    shutil.rmtree(tmp_path / "s")
    assert train("bc-all", spread(3), SMALL, tmp_path / "s")[0].history == once.history
