"""What is expected of a safe-RL data set: the frames and their expectations, as data.

Arrays of steps are not tables, so each is reduced to what can be said in one: a frame of the seven arrays (shape,
type, range), one row per step (scalars, and the largest size of the vectors), one row per episode (the row table
against the data), one row per cost limit, and one row for the whole data set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from springhead.errors import BadInput
from springhead.lineage.digests import arrays_digest
from springhead.rl.dataset import EPISODE_KEYS
from springhead.rl.suite_steps import VECTORS, Arrays, Settings, span, step_frame
from springhead.rl.tasks import Task
from springhead.verdicts import ROW, Check, Frame

SUITE = "rl-dataset"
ROW_COLUMNS = ("id", "policy", "source", "episode_return", "cost_return", "sub_cost_returns", "length", "index")
_FLAGS = ("terminals", "timeouts")
_RETURN_TOLERANCE = 1e-5  # relative; sums of float32 rewards in another order


def frames(arrays: Arrays, rows: pa.Table, task: Task, settings: Settings) -> list[Frame]:
    """The frames of one data set.

    Args:
        arrays: The seven DSRL arrays, flat, N steps each; and ``sub_costs`` (N, K) where the data have them.
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
    lengths = {len(arrays[key]) for key in arrays if np.ndim(arrays[key])}
    flat = all(np.ndim(arrays[key]) == 1 for key in EPISODE_KEYS if key not in VECTORS)
    wide = all(arrays[key].shape[1:] == (width,) for key, width in zip(VECTORS, widths, strict=True))
    parts = "sub_costs" not in arrays or arrays["sub_costs"].shape[1:] == (len(task.sub_costs),)
    if len(lengths) != 1 or not flat or not wide or not parts:
        return [first]
    starts, stops = boundaries(arrays)
    table = episode_table(arrays, rows, starts, stops, task)
    found = table.loc[table["found"]]  # in the order of the file, see episode_table
    ids = _names(found)
    return [
        first,
        step_frame(arrays, starts, stops, ids, task, settings),
        episode_frame(table, settings),
        limit_frame(table, task, settings),
        data_set_frame(table, arrays, task),
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
    width |= {"actions": task.action_dim, "sub_costs": len(task.sub_costs)}
    keys = [key for key in (*EPISODE_KEYS, "sub_costs") if key in arrays]
    steps = len(arrays["rewards"])
    columns: dict[str, list[object]] = {name: [] for name in ("array", "dtype", "shape", "dtype_ok", "shape_ok")}
    for key in keys:
        array = np.asarray(arrays[key])
        expected = (steps, width[key]) if key in width else (steps,)
        kinds = ("bool",) if key in _FLAGS else ("float32",)
        facts = (key, str(array.dtype), str(array.shape), array.dtype.name in kinds, array.shape == expected)
        for column, fact in zip(columns.values(), facts, strict=True):
            column.append(fact)
    table = pd.DataFrame({ROW: np.arange(len(keys)), **columns})
    checks = (
        Check("ExpectArrayTypes", "true", "dtype_ok", "the flags are bool, all other arrays float32"),
        Check(
            "ExpectArrayShapes",
            "true",
            "shape_ok",
            f"observations have {task.observation_dim} entries, actions {task.action_dim}, "
            f"sub-costs {len(task.sub_costs)} ({task.name}), and all arrays the same number of steps",
        ),
    )
    return Frame("arrays", "array", table, checks, keys, ("array", "dtype", "shape"), quarantines=False)


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
    joined["length_difference"] = _wrong_where_missing(
        joined["length"] - joined["length_listed"], both & joined["length_listed"].isna()
    ).where(both)
    for name in ("episode_return", "cost_return"):
        measured = joined[f"{name}_of_data"]
        error = (joined[name] - measured).abs() / measured.abs().clip(lower=1.0)
        joined[f"{name}_error"] = _wrong_where_missing(error, both & joined[name].isna() & measured.notna())
    listed_parts = joined.pop("sub_cost_returns")
    pairs = zip(both, listed_parts, joined.pop("sub_cost_returns_of_data"), strict=True)
    joined["sub_cost_returns_error"] = [_largest_error(a, b) if known else 0.0 for known, a, b in pairs]
    joined["ends"] = joined["ends"].astype("boolean").fillna(True).astype(bool)
    # Files without successor states lose the last step of each episode when they are imported (import_rules.py).
    full = task.horizon - joined["source"].notna().astype(int)
    early = joined["found"] & joined["ends"] & (joined["last_terminal"] != 1) & (joined["length"] < full)
    joined["full_length"] = ~early
    joined["length_excess"] = (joined["length"] - task.horizon).clip(lower=0)
    joined.insert(0, ROW, np.arange(len(joined)))
    return joined.drop(columns="_merge")


def _wrong_where_missing(error: pd.Series, missing: pd.Series) -> pd.Series:
    """Makes a number that the row table lacks an infinite error: expectations skip nulls, which would pass."""
    return error.astype(float).mask(missing, np.inf)


def _names(table: pd.DataFrame) -> npt.NDArray:
    """The id by which verdicts name each episode: the listed one, where there is none that of the content."""
    known = table["listed"] & table["id"].notna()
    names: npt.NDArray = table["id"].where(known, table["content_id"]).fillna("no id").to_numpy(dtype=object)
    return names


def _largest_error(listed: Sequence[float] | None, measured: npt.NDArray[np.float64]) -> float:
    """Largest relative error of listed sums; infinite where their number differs or one is missing."""
    found = np.asarray([] if listed is None else listed, dtype=np.float64)
    if found.shape != measured.shape:
        return float("inf")
    errors = np.abs(found - measured) / np.maximum(np.abs(measured), 1.0)
    errors[np.isnan(found) & ~np.isnan(measured)] = np.inf
    return float(errors.max(initial=0.0))


def _measure(arrays: Arrays, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> pd.DataFrame:
    """What the data themselves say of each episode."""
    terminals = np.asarray(arrays["terminals"], dtype=bool)
    timeouts = np.asarray(arrays["timeouts"], dtype=bool)
    pieces = list(zip(starts, stops, strict=True))
    whole = {key: np.asarray(array) for key, array in arrays.items()}
    digests = [arrays_digest({key: array[a:b] for key, array in whole.items()}) for a, b in pieces]
    parts = whole.get("sub_costs", np.empty((len(terminals), 0)))
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
            "sub_cost_returns_of_data": pd.Series([parts[a:b].sum(axis=0, dtype=np.float64) for a, b in pieces]),
        }
    )


def episode_frame(table: pd.DataFrame, settings: Settings) -> Frame:
    """One row per episode; where the row table and the data disagree, the id quarantined is the row table's."""
    exact, close = span(0, 0), span(0.0, _RETURN_TOLERANCE)
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
        Check(
            "ExpectListedSubCosts",
            "between",
            "sub_cost_returns_error",
            "listed sub-cost returns are those of the data",
            close,
        ),
        Check("ExpectPolicyDigests", "matches", "policy", "a policy is named by its digest", {"regex": _DIGEST}),
        Check("ExpectPoliciesNamed", "true", "policy_named", "every listed episode names its policy or its source"),
    )
    table = table.assign(policy_named=table["policy"].notna() | table["source"].notna() | ~table["listed"])
    return Frame("episodes", "episode", table, checks, _names(table), ("index",))


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


def data_set_frame(table: pd.DataFrame, arrays: Arrays, task: Task) -> Frame:
    """One row for the data set: whether there is anything to learn from it."""
    costs = table["cost_return_of_data"].dropna()
    lowest = min(task.limits)
    actions = np.asarray(arrays["actions"])
    facts = {
        "episodes_above": int((costs > lowest).sum()),
        "returns_distinct": int(table["episode_return_of_data"].nunique()),
        "costs_distinct": int(costs.nunique()),
        "actions_constant": int((actions == actions[:1]).all(axis=0).sum()),
    }
    exceeds = f"some episode exceeds the lowest cost limit, {lowest:g}: else the limits decide nothing"
    checks = (
        Check("ExpectUnsafeEpisodes", "between", "episodes_above", exceeds, {"min_value": 1}, "warning"),
        Check(
            "ExpectVariedReturns",
            "between",
            "returns_distinct",
            "episodes differ in their returns",
            {"min_value": 2},
            "warning",
        ),
        Check(
            "ExpectVariedCosts",
            "between",
            "costs_distinct",
            "episodes differ in their costs: else there is nothing to trade reward for",
            {"min_value": 2},
            "warning",
        ),
        Check(
            "ExpectVariedActions",
            "between",
            "actions_constant",
            "no component of the actions is the same in every step",
            span(0, 0),
            "warning",
        ),
    )
    whole = pd.DataFrame({ROW: [0], **{name: [value] for name, value in facts.items()}})
    return Frame("data-set", "data set", whole, checks, ["data set"], quarantines=False)
