"""What is expected of a safe-RL data set: the frames and their expectations, as data.

Arrays of steps are not tables, so each is reduced to what can be said in one: a frame of the seven arrays (shape,
type, range), one row per step (scalars, and the largest size of the vectors), one row per episode (the row table
against the data), one row per cost limit, and one row for the whole data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from springhead.errors import BadInput
from springhead.lineage.digests import arrays_digest
from springhead.rl.dataset import EPISODE_KEYS
from springhead.rl.tasks import Task
from springhead.verdicts import ROW, Check, Frame

SUITE = "rl-dataset"
Arrays = Mapping[str, npt.NDArray]
ROW_COLUMNS = ("id", "policy", "episode_return", "cost_return", "length", "index")
_FLAGS = ("terminals", "timeouts")
_VECTORS = ("observations", "next_observations", "actions")
_FLOATS = (*_VECTORS, "rewards", "costs")
_BLOCK = 1 << 16
_ACTION_BOUND = 1.0 + 1e-6  # float32 arithmetic of an action map may miss 1 by a rounding
_RETURN_TOLERANCE = 1e-5  # relative; sums of float32 rewards in another order


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

    def __post_init__(self) -> None:
        for name in ("min_episodes", "min_episodes_below", "continuity_tolerance"):
            if getattr(self, name) < 0:
                raise BadInput(f"rl.validate.{name} must not be negative")
        for name in ("observation_abs_max", "reward_abs_max"):
            if not getattr(self, name) > 0:
                raise BadInput(f"rl.validate.{name} must be above 0")


def frames(arrays: Arrays, rows: pa.Table, task: Task, settings: Settings) -> list[Frame]:
    """The frames of one data set.

    Args:
        arrays: The seven DSRL arrays, flat, N steps each.
        rows: The row table of the same file.
        task: The task the episodes are of.
        settings: The bounds.

    Returns:
        All frames; only the one of the arrays where these are so malformed that steps cannot be told apart.

    Raises:
        BadInput: The row table lacks a column.
    """
    missing = sorted(set(ROW_COLUMNS) - set(rows.column_names))
    if missing:
        raise BadInput(f"rows.parquet lacks the columns {', '.join(missing)}; re-run the stage that makes it")
    first = array_frame(arrays, task)
    widths = (task.observation_dim, task.observation_dim, task.action_dim)
    lengths = {len(arrays[key]) for key in EPISODE_KEYS if np.ndim(arrays[key])}
    flat = all(np.ndim(arrays[key]) == 1 for key in EPISODE_KEYS if key not in _VECTORS)
    wide = all(arrays[key].shape[1:] == (width,) for key, width in zip(_VECTORS, widths, strict=True))
    if len(lengths) != 1 or not flat or not wide:
        return [first]
    starts, stops = boundaries(arrays)
    table = episode_table(arrays, rows, starts, stops, task)
    found = table.loc[table["found"]]  # in the order of the file, see episode_table
    ids = found["id"].where(found["listed"], found["content_id"]).to_numpy(dtype=object)
    return [
        first,
        step_frame(arrays, starts, stops, ids, task, settings),
        episode_frame(table, settings),
        limit_frame(table, task, settings),
        data_set_frame(table, task),
    ]


def boundaries(arrays: Arrays) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First step and end (exclusive) of each episode; steps after the last end flag make one more episode."""
    ends = np.asarray(arrays["terminals"], dtype=bool) | np.asarray(arrays["timeouts"], dtype=bool)
    stops = np.flatnonzero(ends) + 1
    if len(ends) and (not len(stops) or stops[-1] != len(ends)):
        stops = np.append(stops, len(ends))
    return np.concatenate([np.zeros(min(1, len(stops)), dtype=np.int64), stops[:-1]]), stops


# -- the arrays -----------------------------------------------------------------------------------


def array_frame(arrays: Arrays, task: Task) -> Frame:
    """One row per array: its type and shape against the task's, and its range."""
    width = {"observations": task.observation_dim, "next_observations": task.observation_dim}
    width["actions"] = task.action_dim
    steps = len(arrays["rewards"])
    columns: dict[str, list[object]] = {name: [] for name in ("array", "dtype", "shape", "dtype_ok", "shape_ok")}
    for key in EPISODE_KEYS:
        array = np.asarray(arrays[key])
        expected = (steps, width[key]) if key in width else (steps,)
        kinds = ("bool",) if key in _FLAGS else ("float32",)
        facts = (key, str(array.dtype), str(array.shape), array.dtype.name in kinds, array.shape == expected)
        for column, fact in zip(columns.values(), facts, strict=True):
            column.append(fact)
    table = pd.DataFrame({ROW: np.arange(len(EPISODE_KEYS)), **columns})
    checks = (
        Check("ExpectArrayTypes", "true", "dtype_ok", "the flags are bool, all other arrays float32"),
        Check(
            "ExpectArrayShapes",
            "true",
            "shape_ok",
            f"observations have {task.observation_dim} entries, actions {task.action_dim} ({task.name}), "
            "and all arrays the same number of steps",
        ),
    )
    return Frame("arrays", "array", table, checks, EPISODE_KEYS, ("array", "dtype", "shape"), quarantines=False)


# -- steps ----------------------------------------------------------------------------------------


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
    for key in _FLOATS:
        columns[f"{key}_not_finite"] = _not_finite(arrays[key])
    for key in _VECTORS:
        columns[f"{key}_abs_max"] = _abs_max(arrays[key])
    columns["continuity_gap"] = _continuity_gap(arrays, stops)
    checks = _step_checks(task, settings)
    return Frame("steps", "step", pd.DataFrame(columns), checks, ids[episode], ("episode", "step"))


def _step_checks(task: Task, settings: Settings) -> tuple[Check, ...]:
    checks = [
        Check(
            f"Expect{''.join(part.title() for part in key.split('_'))}Finite",
            "between",
            f"{key}_not_finite",
            f"no NaN and no infinity in {key}",
            {"min_value": 0, "max_value": 0},
        )
        for key in _FLOATS
    ]
    limit, bound = settings.observation_abs_max, settings.reward_abs_max
    checks += [
        Check("ExpectCostsNonNegative", "between", "cost", "a step's cost is at least 0", {"min_value": 0.0}),
        Check("ExpectRewardsInRange", "between", "reward", "a reward's size is plausible", _range(-bound, bound)),
        Check(
            "ExpectActionsInRange", "between", "actions_abs_max", "actions lie in [-1, 1]", _range(0.0, _ACTION_BOUND)
        ),
        Check("ExpectOneEndFlag", "between", "end_flags", "no step is terminal and timeout both", _range(0, 1)),
    ]
    for key in _VECTORS[:2]:
        name = "ExpectObservationsInRange" if key == "observations" else "ExpectNextObservationsInRange"
        checks.append(Check(name, "between", f"{key}_abs_max", f"{key} stay in a plausible range", _range(0.0, limit)))
    if task.cost_kind == "binary":
        costs = {"value_set": [0.0, 1.0]}
        checks.append(Check("ExpectCostsBinary", "in_set", "cost", f"{task.name} costs 0 or 1 per step", costs))
    if not task.terminates:
        never = f"{task.name} ends by its horizon alone"
        checks.append(Check("ExpectNoTerminals", "between", "terminal", never, _range(0, 0)))
    if settings.continuity:
        text = "within an episode, next_observations[t] is observations[t + 1]"
        gap = _range(0.0, settings.continuity_tolerance)
        checks.append(Check("ExpectContinuity", "between", "continuity_gap", text, gap))
    return tuple(checks)


def _range(low: float, high: float) -> dict[str, float]:
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


# -- episodes -------------------------------------------------------------------------------------


def episode_table(
    arrays: Arrays, rows: pa.Table, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], task: Task
) -> pd.DataFrame:
    """The episodes of the data joined, by position in the file, with those of the row table.

    Episodes that the data have come first, in their order; entries of the row table without one come last.
    """
    listed = rows.select(list(ROW_COLUMNS)).to_pandas().rename(columns={"length": "length_listed"})
    data = _measure(arrays, starts, stops)
    # A position listed twice keeps its first entry in place; the second has no episode of its own.
    twice = listed["index"].duplicated()
    joined: pd.DataFrame = data.merge(listed.loc[~twice], on="index", how="outer", sort=True, indicator=True)
    joined = pd.concat([joined, listed.loc[twice].assign(_merge="right_only")], ignore_index=True)
    joined["found"] = joined["_merge"] != "right_only"
    joined["listed"] = joined["_merge"] != "left_only"
    joined = joined.sort_values("found", ascending=False, kind="stable", ignore_index=True)
    both = joined["found"] & joined["listed"]
    joined["id_is_content"] = ~both | (joined["id"] == joined["content_id"])
    joined["length_difference"] = (joined["length"] - joined["length_listed"]).where(both)
    for name in ("episode_return", "cost_return"):
        measured = joined[f"{name}_of_data"]
        joined[f"{name}_error"] = (joined[name] - measured).abs() / measured.abs().clip(lower=1.0)
    joined["ends"] = joined["ends"].astype("boolean").fillna(True).astype(bool)
    early = joined["found"] & joined["ends"] & (joined["last_terminal"] != 1) & (joined["length"] < task.horizon)
    joined["full_length"] = ~early
    joined["length_excess"] = (joined["length"] - task.horizon).clip(lower=0)
    joined.insert(0, ROW, np.arange(len(joined)))
    return joined.drop(columns="_merge")


def _measure(arrays: Arrays, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> pd.DataFrame:
    """What the data themselves say of each episode."""
    terminals = np.asarray(arrays["terminals"], dtype=bool)
    timeouts = np.asarray(arrays["timeouts"], dtype=bool)
    pieces = list(zip(starts, stops, strict=True))
    digests = [arrays_digest({key: np.asarray(arrays[key])[a:b] for key in EPISODE_KEYS}) for a, b in pieces]
    last = stops - 1
    return pd.DataFrame(
        {
            "index": np.arange(len(pieces)),
            "content_id": pd.Series(digests, dtype=object),
            "length": (stops - starts).astype(float),
            "ends": terminals[last] | timeouts[last],
            "last_terminal": terminals[last].astype(float),
            "episode_return_of_data": [float(arrays["rewards"][a:b].sum(dtype=np.float64)) for a, b in pieces],
            "cost_return_of_data": [float(arrays["costs"][a:b].sum(dtype=np.float64)) for a, b in pieces],
        }
    )


def episode_frame(table: pd.DataFrame, settings: Settings) -> Frame:
    """One row per episode; where the row table and the data disagree, the id quarantined is the row table's."""
    exact, close = _range(0, 0), _range(0.0, _RETURN_TOLERANCE)
    checks = (
        Check(
            "ExpectEnoughEpisodes",
            "row_count",
            "",
            f"the data set has at least {settings.min_episodes} episodes",
            {"min_value": settings.min_episodes},
        ),
        Check("ExpectEpisodesListed", "true", "listed", "every episode of the data is in the row table"),
        Check("ExpectEpisodesFound", "true", "found", "every row of the row table has its episode in the data"),
        Check("ExpectEpisodeIdsUnique", "unique", "id", "no episode occurs twice"),
        Check("ExpectEpisodeIdsOfContent", "true", "id_is_content", "an id is the digest of its episode's arrays"),
        Check("ExpectListedLengths", "between", "length_difference", "listed lengths are those of the data", exact),
        Check("ExpectEpisodesEnded", "true", "ends", "the last step of an episode is terminal or timeout"),
        Check("ExpectWithinHorizon", "between", "length_excess", "no episode is longer than the horizon", exact),
        Check("ExpectTimeoutsAtHorizon", "true", "full_length", "an episode that is not terminal has the full length"),
        Check("ExpectListedReturns", "between", "episode_return_error", "listed returns are those of the data", close),
        Check("ExpectListedCosts", "between", "cost_return_error", "listed cost returns are those of the data", close),
        Check("ExpectPolicyDigests", "matches", "policy", "a policy is named by its digest", {"regex": _DIGEST}),
        Check("ExpectPoliciesNamed", "true", "policy_named", "every listed episode names its policy"),
    )
    table = table.assign(policy_named=table["policy"].notna() | ~table["listed"])
    ids = table["id"].where(table["listed"], table["content_id"]).to_numpy(dtype=object)
    return Frame("episodes", "episode", table, checks, ids, ("index",))


_DIGEST = r"^[0-9a-f]{64}$"


# -- the data set ---------------------------------------------------------------------------------


def limit_frame(table: pd.DataFrame, task: Task, settings: Settings) -> Frame:
    """One row per cost limit of the task: how many episodes respect it."""
    costs = table["cost_return_of_data"].to_numpy(dtype=float)
    below = [int((costs <= limit).sum()) for limit in task.limits]
    limits = pd.DataFrame({ROW: np.arange(len(below)), "cost_limit": task.limits, "episodes_below": below})
    text = f"at least {settings.min_episodes_below} episodes respect each cost limit"
    checks = (
        Check("ExpectSafeEpisodes", "between", "episodes_below", text, {"min_value": settings.min_episodes_below}),
    )
    names = [f"cost limit {limit:g}" for limit in task.limits]
    return Frame("limits", "cost limit", limits, checks, names, ("cost_limit",), quarantines=False)


def data_set_frame(table: pd.DataFrame, task: Task) -> Frame:
    """One row for the data set: whether there is anything to learn from it."""
    costs = table["cost_return_of_data"].to_numpy(dtype=float)
    returns = table["episode_return_of_data"].dropna()
    lowest = min(task.limits)
    facts = {"episodes_above": [int((costs > lowest).sum())], "returns_distinct": [int(returns.nunique())]}
    checks = (
        Check(
            "ExpectUnsafeEpisodes",
            "between",
            "episodes_above",
            f"some episode exceeds the lowest cost limit, {lowest:g}: else the limits decide nothing",
            {"min_value": 1},
            "warning",
        ),
        Check(
            "ExpectVariedReturns",
            "between",
            "returns_distinct",
            "episodes differ in their returns",
            {"min_value": 2},
            "warning",
        ),
    )
    whole = pd.DataFrame({ROW: [0], **facts})
    return Frame("data-set", "data set", whole, checks, ["data set"], quarantines=False)
