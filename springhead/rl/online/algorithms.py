"""Every online algorithm by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from springhead.errors import BadInput
from springhead.rl.online.contract import Learner, OnlineConfig
from springhead.rl.workers import EpisodeWorkers

ALGORITHMS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "ppo-lag": ("ppo_lag", "PPOLagConfig", "PPOLag"),
        "trpo-lag": ("trpo_lag", "TRPOLagConfig", "TRPOLag"),
        "cpo": ("cpo", "CPOConfig", "CPO"),
        "focops": ("focops", "FOCOPSConfig", "FOCOPS"),
        "sac-lag": ("sac_lag", "SACLagConfig", "SACLag"),
        "ddpg-lag": ("ddpg_lag", "DDPGLagConfig", "DDPGLag"),
        "cvpo": ("cvpo", "CVPOConfig", "CVPO"),
    }
)
"""Name: module in this package, class of its configuration, class of its learner."""


def algorithm(name: str) -> tuple[type[OnlineConfig], Callable[[Any, EpisodeWorkers], Learner]]:
    """Looks an algorithm up; only its own module is imported.

    Args:
        name: A key of :data:`ALGORITHMS`.

    Returns:
        The configuration's class, and the learner's class, which is called with a configuration and workers.

    Raises:
        BadInput: If there is no such algorithm; the message lists the names.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BadInput(f"unknown online algorithm {name!r}.{hint} Known: {', '.join(ALGORITHMS)}")
    module_name, config, learner = ALGORITHMS[name]
    module = import_module(f"springhead.rl.online.{module_name}")
    return getattr(module, config), getattr(module, learner)
