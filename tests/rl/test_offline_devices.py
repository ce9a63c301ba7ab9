"""What offline algorithms do on a GPU; where there is none, only the types of numbers under autocast, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from springhead.rl.offline.algorithms import ALGORITHMS, entry
from springhead.rl.offline.batches import flatten
from springhead.rl.offline.contract import Settings
from springhead.rl.offline.relabelling import Augmentation
from springhead.rl.offline.training import members_of, train
from tests.rl.offline_data import BALL
from tests.rl.offline_runs import EPISODES

pytestmark = pytest.mark.unit
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EACH = pytest.mark.parametrize("name", sorted(ALGORITHMS))
ON_CPUS_OTHERWISE = ("bcq-lag", "bear-lag", "cpq", "coptidice")
"""Their gradients are written out for CPUs, in one type of numbers."""


def settings(name: str, **more: Any) -> Settings:
    """Small ones."""
    own: dict[str, Any] = {"steps": 4, "batch_size": 16, "limits": (10.0, 20.0), "checkpoint_every": 4}
    if name == "cdt":
        own |= {"width": 16, "layers": 2, "heads": 2, "context": 4, "augmentation": Augmentation(min_per_cell=0)}
    else:
        own |= {"hidden": (16, 16)}
    found: Settings = entry(name).settings_class()(**own, **more)
    return found


def learner(name: str, chosen: Settings) -> Any:
    """Of two seeds."""
    members = members_of(entry(name), BALL, chosen, (0, 1))
    return entry(name).learner()(name, flatten(EPISODES, BALL), BALL, chosen, members)


@GPU
@EACH
def test_an_update_does_not_make_the_host_wait(name: str) -> None:
    """Needs a GPU: CUDA then refuses every operation for which the host would wait."""
    made = learner(name, settings(name, device="cuda"))
    made.update(1)  # the first makes libraries and optimisers ready
    made.update(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.update(3)
        made.update(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
@EACH
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_less_precise_products_train(name: str, precision: str, tmp_path: Path) -> None:
    """Needs a GPU: figures stay near those of float32 on the same batches."""
    curves = []
    for which in ("float32", precision):
        chosen = settings(name, device="cuda", precision=which)
        trained = train(name, EPISODES, BALL, chosen, (0,), tmp_path / which)[0]
        assert trained.config.get("precision", "float32") == which
        curves.append(list(trained.history[-1].values()))
    assert curves[1] == pytest.approx(curves[0], rel=0.2, abs=0.2)
    if precision == "bfloat16":
        assert curves[1] != curves[0]  # else the precision was not heeded


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - set(ON_CPUS_OTHERWISE)))
def test_types_of_numbers_fit_under_autocast(name: str) -> None:
    """On the CPU, whose autocast is much like CUDA's: a product in bfloat16 must not meet one in float32."""
    found = []
    for enabled in (False, True):
        made = learner(name, settings(name))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
            found.append([made.update(step) for step in (1, 2, 3)])
        assert all(value.dtype == torch.float32 for value in made.modules.state_dict().values())
    for plain, rounded in zip(*found, strict=True):
        for key, value in plain.items():
            torch.testing.assert_close(rounded[key].float(), value, rtol=0.1, atol=0.1)
