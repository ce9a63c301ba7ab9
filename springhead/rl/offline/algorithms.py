"""Every offline algorithm by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from springhead.errors import BadInput
from springhead.rl.offline.batches import Flat
from springhead.rl.offline.contract import Learner, Member, Settings
from springhead.rl.tasks import Task

MakeLearner = Callable[[str, Flat, Task, Any, Sequence[Member]], Learner]


@dataclass(frozen=True)
class Entry:
    """Where an algorithm is.

    Attributes:
        module: Its module in this package.
        settings: The class of its settings there.
        maker: What makes its learner, called with name, data, task, settings and members.
        by_limit: Whether it is trained for one cost limit, so that a seed's model has a network for each.
        block: Its parameters' key in ``rl.train.algorithms``.
        conditioned: Whether one network acts differently under different limits.
    """

    module: str
    settings: str
    maker: str
    by_limit: bool
    block: str
    conditioned: bool = False

    def settings_class(self) -> type[Settings]:
        """The class of its settings; only its own module is imported."""
        found: type[Settings] = getattr(self._module(), self.settings)
        return found

    def learner(self) -> MakeLearner:
        """What makes its learner."""
        found: MakeLearner = getattr(self._module(), self.maker)
        return found

    @property
    def knows_limits(self) -> bool:
        """Whether its policies act differently under different cost limits."""
        return self.by_limit or self.conditioned

    def _module(self) -> Any:
        return import_module(f"springhead.rl.offline.{self.module}")


def _bc(by_limit: bool, conditioned: bool = False) -> Entry:
    return Entry("bc", "BCSettings", "BC", by_limit, "bc", conditioned)


ALGORITHMS: Mapping[str, Entry] = MappingProxyType(
    {
        "bc-all": _bc(False),
        "bc-safe": _bc(True),
        "bc-risky": _bc(True),
        "bc-boundary": _bc(True),
        "bc-frontier": _bc(False),
        "bc-multi-task": _bc(False, conditioned=True),
        "bcq-lag": Entry("bcq_lag", "BCQLagSettings", "BCQLag", True, "bcq-lag"),
        "bear-lag": Entry("bear_lag", "BEARLagSettings", "BEARLag", True, "bear-lag"),
        "cpq": Entry("cpq", "CPQSettings", "CPQ", True, "cpq"),
        "coptidice": Entry("coptidice", "COptiDICESettings", "COptiDICE", True, "coptidice"),
        "cdt": Entry("cdt", "CDTSettings", "CDT", False, "cdt", conditioned=True),
        "cde": Entry("cde", "CDESettings", "CDE", False, "cde"),
        "optidice": Entry("optidice", "OptiDICESettings", "OptiDICE", False, "optidice"),
        "cql": Entry("cql", "CQLSettings", "CQL", False, "cql"),
        "iql": Entry("iql", "IQLSettings", "IQL", False, "iql"),
        "td3-bc": Entry("td3_bc", "TD3BCSettings", "TD3BC", False, "td3-bc"),
    }
)
"""Name: where it is."""


def entry(name: str) -> Entry:
    """Looks an algorithm up.

    Raises:
        BadInput: If there is no such algorithm; the message lists the names.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BadInput(f"unknown offline algorithm {name!r}.{hint} Known: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
