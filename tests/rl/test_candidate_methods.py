"""BCQ-Lag, BEAR-Lag and CPQ alike: resumed, side by side, acting, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from springhead.rl.offline.candidates import CandidateSettings, picked
from tests.rl import test_bcq_lag, test_bear_lag, test_cpq
from tests.rl.offline_runs import check_acting, check_members, check_refusals, check_resuming, trained_policy

pytestmark = pytest.mark.unit
METHODS = {"bcq-lag": test_bcq_lag, "bear-lag": test_bear_lag, "cpq": test_cpq}
SMALL: dict[str, CandidateSettings] = {name: module.SMALL for name, module in METHODS.items()}
EACH = pytest.mark.parametrize("name", METHODS)


@EACH
@pytest.mark.parametrize("mode", ["intended", "released"])
def test_killed_and_resumed_equals_uninterrupted(name: str, mode: str, tmp_path: Path) -> None:
    changes = METHODS[name].RELEASED if mode == "released" else {}
    check_resuming(name, replace(SMALL[name], **changes), tmp_path)


@EACH
def test_a_seed_does_not_depend_on_its_companions(name: str, tmp_path: Path) -> None:
    check_members(name, SMALL[name], tmp_path)


@pytest.mark.parametrize("name", ["bear-lag", "cpq"])  # BCQ-Lag acts in two ways, which its own tests see
def test_it_acts(name: str, tmp_path: Path) -> None:
    rates = {"actor_learning_rate": 0.05, "critic_learning_rate": 0.05}
    check_acting(trained_policy(name, replace(SMALL[name], steps=12, discount=0.5, **rates), tmp_path))


@EACH
def test_bad_data_are_named_before_training(name: str, tmp_path: Path) -> None:
    check_refusals(name, SMALL[name], tmp_path)


def test_networks_are_picked_by_slices() -> None:
    weights = torch.arange(24.0).view(6, 2, 2)  # two members of three networks
    assert torch.equal(picked(weights, 3, [0, 2]), weights[[0, 2, 3, 5]])
    assert torch.equal(picked(weights, 3, [1]), weights[[1, 4]])
