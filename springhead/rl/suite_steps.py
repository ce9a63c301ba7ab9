"""What is expected of the steps of a safe-RL data set: one row per step.

The vectors of a step are reduced to numbers (largest size, entries that are not finite, largest difference from the
step before). All tasks are asked the same; a task adds what its costs and its ends are, its family what its
observations and its separate constraint signals must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from springhead.errors import BadInput
from springhead.rl.tasks import ACTION_BOUND, Task
from springhead.verdicts import ROW, Check, Frame

Arrays = Mapping[str, npt.NDArray]
VECTORS = ("observations", "next_observations", "actions")
FLOATS = (*VECTORS, "rewards", "costs")
_BLOCK = 1 << 16
_LIDAR_SLACK = 1e-6  # a rounding, as of `ACTION_BOUND`
_SUM_SLACK = 1e-4  # a float32 sum of costs in another order


@dataclass(frozen=True)
class Settings:
    """Bounds of the suite; the parameters ``rl.validate``."""

    min_episodes: int
    """Fewest episodes of the data set."""
    min_episodes_below: int
    """Fewest episodes with a cost return at or below each of the task's three limits."""
    observation_abs_max: float
    """Largest size of an observation's entry; a larger one is a diverged simulation."""
    reward_abs_max: float
    """Largest size of one step's reward."""
    continuity: bool
    """Whether next_observations[t] must be observations[t + 1] within an episode."""
    continuity_tolerance: float
    """Largest difference that still counts as equal."""
    lidar_range: bool
    """Whether lidar readings must lie in [0, 1]; switch it off for data with noise on observations."""
    drift_warning: float
    """Drift from the accepted data set above which a quantity is warned of, see ``drift.py``."""
    drift_critical: float
    """Drift above which the data set is refused."""

    def __post_init__(self) -> None:
        for name in ("min_episodes", "min_episodes_below", "continuity_tolerance"):
            if getattr(self, name) < 0:
                raise BadInput(f"rl.validate.{name} must not be negative")
        for name in ("observation_abs_max", "reward_abs_max"):
            if not getattr(self, name) > 0:
                raise BadInput(f"rl.validate.{name} must be above 0")
        if not 0 <= self.drift_warning <= self.drift_critical:
            raise BadInput("rl.validate.drift_warning must be at least 0 and at most rl.validate.drift_critical")


def step_frame(
    arrays: Arrays,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    ids: npt.NDArray,
    task: Task,
    settings: Settings,
) -> Frame:
    """One row per step; a failing step puts its episode into quarantine."""
    total = len(arrays["rewards"])
    episode = np.repeat(np.arange(len(stops)), stops - starts)
    columns: dict[str, npt.NDArray] = {
        ROW: np.arange(total),
        "episode": episode,
        "step": np.arange(total) - starts[episode] if total else np.arange(0),
        "reward": np.asarray(arrays["rewards"]),
        "cost": np.asarray(arrays["costs"]),
        "terminal": np.asarray(arrays["terminals"], dtype=np.int8),
        "timeout": np.asarray(arrays["timeouts"], dtype=np.int8),
    }
    columns["end_flags"] = columns["terminal"] + columns["timeout"]
    for key in FLOATS:
        columns[f"{key}_not_finite"] = _not_finite(arrays[key])
    for key in VECTORS:
        columns[f"{key}_abs_max"] = _abs_max(arrays[key])
    columns["continuity_gap"] = _continuity_gap(arrays, stops)
    columns |= _family_columns(arrays, task)
    checks = step_checks(task, settings, "sub_costs" in arrays)
    return Frame("steps", "step", pd.DataFrame(columns), checks, ids[episode], ("episode", "step"))


def step_checks(task: Task, settings: Settings, sub_costs: bool = False) -> tuple[Check, ...]:
    """What is expected of a step: the same of all tasks, then what the task and its family add."""
    checks = [
        Check(
            f"Expect{''.join(part.title() for part in key.split('_'))}Finite",
            "between",
            f"{key}_not_finite",
            f"no NaN and no infinity in {key}",
            {"min_value": 0, "max_value": 0},
        )
        for key in FLOATS
    ]
    limit, bound = settings.observation_abs_max, settings.reward_abs_max
    checks += [
        Check("ExpectCostsNonNegative", "between", "cost", "a step's cost is at least 0", {"min_value": 0.0}),
        Check("ExpectRewardsInRange", "between", "reward", "a reward's size is plausible", span(-bound, bound)),
        Check("ExpectActionsInRange", "between", "actions_abs_max", "actions lie in [-1, 1]", span(0.0, ACTION_BOUND)),
        Check("ExpectOneEndFlag", "between", "end_flags", "no step is terminal and timeout both", span(0, 1)),
    ]
    for key in VECTORS[:2]:
        name = "ExpectObservationsInRange" if key == "observations" else "ExpectNextObservationsInRange"
        checks.append(Check(name, "between", f"{key}_abs_max", f"{key} stay in a plausible range", span(0.0, limit)))
    if task.cost_kind == "binary":
        costs = {"value_set": [0.0, 1.0]}
        checks.append(Check("ExpectCostsBinary", "in_set", "cost", f"{task.name} costs 0 or 1 per step", costs))
    if not task.terminates:
        never = f"{task.name} ends by its horizon alone"
        checks.append(Check("ExpectNoTerminals", "between", "terminal", never, span(0, 0)))
    if settings.continuity:
        text = "within an episode, next_observations[t] is observations[t + 1]"
        gap = span(0.0, settings.continuity_tolerance)
        checks.append(Check("ExpectContinuity", "between", "continuity_gap", text, gap))
    return (*checks, *_family_checks(task, settings, sub_costs))


def lidar_of(task: Task) -> slice | None:
    """Which entries of an observation are lidar readings, None where the task has none.

    Safety-Gymnasium's navigation tasks put them behind the robot's own sensors, 12 numbers of the point and 24 of
    the car; MetaDrive behind the 21 numbers of car and way.
    """
    if task.family == "metadrive":
        return slice(21, None)
    if task.family == "safety-gymnasium" and not task.name.endswith("Velocity"):
        return slice(12 if task.name.startswith("Point") else 24, None)
    return None


def _family_columns(arrays: Arrays, task: Task) -> dict[str, npt.NDArray]:
    """Columns of what only some families have: lidar readings and sub-costs."""
    columns = {}
    if (lidar := lidar_of(task)) is not None:
        readings = arrays["observations"][:, lidar]
        columns["lidar_outside"] = np.maximum(readings.max(axis=1) - 1.0, -readings.min(axis=1)).clip(min=0.0)
    if "sub_costs" in arrays:
        parts, cost = arrays["sub_costs"], arrays["costs"]
        columns["sub_cost_min"] = parts.min(axis=1)
        joined = parts.max(axis=1) if task.cost_kind == "binary" else parts.sum(axis=1)
        with np.errstate(invalid="ignore"):
            columns["sub_costs_gap"] = np.abs(joined - cost)
    return columns


def _family_checks(task: Task, settings: Settings, sub_costs: bool) -> list[Check]:
    checks = []
    if settings.lidar_range and lidar_of(task) is not None:
        text = "lidar readings lie in [0, 1]"
        checks.append(Check("ExpectLidarInRange", "between", "lidar_outside", text, span(0.0, _LIDAR_SLACK)))
    if sub_costs:
        how = "largest" if task.cost_kind == "binary" else "sum"
        checks += [
            Check("ExpectSubCostsNonNegative", "between", "sub_cost_min", "no sub-cost is negative", {"min_value": 0}),
            Check(
                "ExpectSubCostsOfCost",
                "between",
                "sub_costs_gap",
                f"a step's cost is the {how} of its sub-costs ({', '.join(task.sub_costs)})",
                span(0.0, _SUM_SLACK),
            ),
        ]
    return checks


def span(low: float, high: float) -> dict[str, float]:
    """The arguments of a ``between``."""
    return {"min_value": low, "max_value": high}


def _not_finite(array: npt.NDArray) -> npt.NDArray[np.int32]:
    """Number of entries of each step that are NaN or infinite."""
    bad: npt.NDArray[np.bool_] = ~np.isfinite(array)
    counts: npt.NDArray[np.int32] = (bad if bad.ndim == 1 else bad.sum(axis=1)).astype(np.int32)
    return counts


def _abs_max(array: npt.NDArray) -> npt.NDArray[np.float32]:
    """Largest size of the entries of each step; NaN where one is NaN."""
    return np.maximum(array.max(axis=1), -array.min(axis=1)) if array.shape[1] else np.zeros(len(array), np.float32)


def _continuity_gap(arrays: Arrays, stops: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Largest difference between each step's successor and the next step's observation; 0 at an episode's end."""
    observations, successors = arrays["observations"], arrays["next_observations"]
    gap = np.zeros(len(observations), dtype=np.float32)
    for start in range(0, len(gap) - 1, _BLOCK):  # in blocks: the differences of a million steps are 100 MB
        stop = min(start + _BLOCK, len(gap) - 1)
        with np.errstate(invalid="ignore"):  # two infinities; other expectations name them
            gap[start:stop] = _abs_max(observations[start + 1 : stop + 1] - successors[start:stop])
    gap[stops - 1] = 0.0
    return gap
