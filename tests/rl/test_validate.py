"""The safe-RL suite: sound data are green, and every expectation goes red for its own fault, naming the episode."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from springhead import expectations
from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.rl import envs, suite, suite_steps
from springhead.rl.dataset import EPISODE_KEYS, Dataset, Episode, write_dsrl
from springhead.rl.tasks import task
from springhead.stage import for_test
from springhead.tables import read_table, write_table
from springhead.verdicts import Frame, Outcome
from stages.rl import validate

TASK = task("BallCircle")
PARAMS = validate.Params(
    min_episodes=4,
    min_episodes_below=2,
    observation_abs_max=100.0,
    reward_abs_max=50.0,
    continuity=True,
    continuity_tolerance=1e-6,
    lidar_range=True,
    drift_warning=0.2,
    drift_critical=0.6,
)
GOAL = task("PointGoal2")  # of a family with lidar and several constraints
ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("policy", pa.string()),
        ("source", pa.string()),
        ("episode_return", pa.float64()),
        ("cost_return", pa.float64()),
        ("sub_cost_returns", pa.list_(pa.float64())),
        ("length", pa.int32()),
        ("index", pa.int32()),
    ]
)


def arrays(seed: int, length: int = TASK.horizon, costs: int = 0) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a sound episode whose first `costs` steps cost 1."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(length + 1, TASK.observation_dim)).astype(np.float32)
    ends = np.zeros(length, dtype=np.bool_)
    ends[-1] = True
    return {
        "observations": states[:-1].copy(),
        "next_observations": states[1:].copy(),
        "actions": rng.uniform(-1, 1, (length, TASK.action_dim)).astype(np.float32),
        "rewards": rng.normal(size=length).astype(np.float32),
        "costs": (np.arange(length) < costs).astype(np.float32),
        "terminals": np.zeros(length, dtype=np.bool_),
        "timeouts": ends,
    }


def row(index: int, episode: Episode) -> dict[str, Any]:
    """The row-table entry of an episode."""
    returns: dict[str, Any] = {"episode_return": episode.episode_return, "cost_return": episode.cost_return}
    returns["sub_cost_returns"] = episode.sub_cost_returns
    known = {"id": episode.id, "policy": "a" * 64, "source": None}
    return {**known, **returns, "length": episode.length, "index": index}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=ROWS)


def sound(count: int = 6) -> list[Episode]:
    return [Episode(**arrays(seed, costs=6 * seed)) for seed in range(count)]


# -- every fault at once, each in an episode of its own --------------------------------------------


def _both(data: dict[str, npt.NDArray[Any]], step: int, value: float) -> None:
    """Puts a value into a state, as observation and as successor, so that continuity holds."""
    data["observations"][step, 0] = data["next_observations"][step - 1, 0] = value


def _set(key: str, place: Any, value: float) -> Any:
    return lambda data: data[key].__setitem__(place, value)


# name of the fault: (what to do to the arrays, what to do to the row, the expectations that must name the episode)
FAULTS: dict[str, tuple[Any, Any, set[str]]] = {
    "NaN reward": (_set("rewards", 7, np.nan), None, {"ExpectRewardsFinite"}),
    "infinite state": (
        lambda data: _both(data, 9, np.inf),
        None,
        {
            "ExpectObservationsFinite",
            "ExpectNextObservationsFinite",
            "ExpectObservationsInRange",
            "ExpectNextObservationsInRange",
        },
    ),
    "NaN action": (_set("actions", (3, 1), np.nan), None, {"ExpectActionsFinite"}),
    "NaN cost": (_set("costs", 3, np.nan), None, {"ExpectCostsFinite"}),
    "negative cost": (_set("costs", 3, -1.0), None, {"ExpectCostsNonNegative", "ExpectCostsBinary"}),
    "half a cost": (_set("costs", 3, 0.5), None, {"ExpectCostsBinary"}),
    "huge reward": (_set("rewards", 3, 51.0), None, {"ExpectRewardsInRange"}),
    "action out of range": (_set("actions", (4, 0), -1.01), None, {"ExpectActionsInRange"}),
    "diverged state": (
        lambda data: _both(data, 9, -101.0),
        None,
        {"ExpectObservationsInRange", "ExpectNextObservationsInRange"},
    ),
    "broken continuity": (_set("next_observations", (5, 2), 0.0), None, {"ExpectContinuity"}),
    "terminal and timeout": (_set("terminals", -1, True), None, {"ExpectOneEndFlag", "ExpectNoTerminals"}),
    "edited": (None, {"id": "e" * 64}, {"ExpectEpisodeIdsOfContent"}),
    "wrong length": (None, {"length": 199}, {"ExpectListedLengths"}),
    "wrong return": (None, {"episode_return": 1e3}, {"ExpectListedReturns"}),
    "wrong cost": (None, {"cost_return": 3.0}, {"ExpectListedCosts"}),
    "short": (lambda data: data.update(arrays(99, length=150)), None, {"ExpectTimeoutsAtHorizon"}),
    "long": (lambda data: data.update(arrays(98, length=201)), None, {"ExpectWithinHorizon"}),
    "policy by name": (None, {"policy": "ppo-lag"}, {"ExpectPolicyDigests"}),
    "no policy": (None, {"policy": None}, {"ExpectPoliciesNamed"}),
    "no such episode": (None, {"index": 900}, {"ExpectEpisodesFound"}),
    "twice (first)": (None, None, {"ExpectEpisodeIdsUnique"}),
    "twice (second)": (lambda data: data.update(arrays(120)), None, {"ExpectEpisodeIdsUnique"}),
    "imported": (None, {"policy": None, "source": "f" * 64}, set()),
    "sub-costs that are not there": (None, {"sub_cost_returns": [1.0]}, {"ExpectListedSubCosts"}),
    "no length": (None, {"length": None}, {"ExpectListedLengths"}),
    "no return": (None, {"episode_return": None}, {"ExpectListedReturns"}),
    "NaN as return": (None, {"episode_return": math.nan}, {"ExpectListedReturns"}),
    "no cost": (None, {"cost_return": None}, {"ExpectListedCosts"}),
    "without an end": (_set("timeouts", -1, False), None, {"ExpectEpisodesEnded"}),
}


def faulty() -> tuple[dict[str, npt.NDArray[Any]], list[dict[str, Any]]]:
    """All faults of the list in one data set, with the row table of each."""
    pieces, rows = [], []
    for position, (_, (change, edit, _)) in enumerate(FAULTS.items()):
        data = arrays(100 + position)
        if change is not None:
            change(data)
        rows.append({**row(position, Episode(**data)), **(edit or {})})
        pieces.append(data)
    flat = {key: np.concatenate([piece[key] for piece in pieces]) for key in EPISODE_KEYS}
    return flat, rows


def by_name(frames: list[Frame], docs: Path) -> dict[str, Outcome]:
    return {outcome.check.name: outcome for outcome in expectations.judge(suite.SUITE, frames, docs)}


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Outcome], list[dict[str, Any]]]:
    flat, rows = faulty()
    strict = replace(PARAMS, min_episodes=1000, min_episodes_below=1000)
    return by_name(suite.frames(flat, table(rows), TASK, strict), tmp_path_factory.mktemp("red")), rows


@pytest.mark.fault
@pytest.mark.parametrize("name", sorted(set().union(*(named for _, _, named in FAULTS.values()))))
def test_an_expectation_names_the_faulty_episodes_alone(red: Any, name: str) -> None:
    outcomes, rows = red
    positions = [i for i, (_, _, named) in enumerate(FAULTS.values()) if name in named]
    wanted = list(dict.fromkeys(rows[i]["id"] for i in positions))
    assert not outcomes[name].success
    assert outcomes[name].ids() == wanted


@pytest.mark.fault
def test_the_episode_that_the_row_table_lacks_is_named_by_its_content(red: Any) -> None:
    outcomes, rows = red
    lost = list(FAULTS).index("no such episode")  # its entry points elsewhere, so its data are unlisted
    assert outcomes["ExpectEpisodesListed"].ids() == [rows[lost]["id"]]


@pytest.mark.fault
def test_an_episode_listed_without_an_id_is_named_by_its_content(tmp_path: Path) -> None:
    episodes = sound()
    rows = [row(index, episode) for index, episode in enumerate(episodes)]
    rows[1]["id"] = rows[2]["id"] = None
    rows[2]["index"] = 900  # nor is there an episode to name it by
    flat = {key: np.concatenate([getattr(episode, key) for episode in episodes]) for key in EPISODE_KEYS}
    found = by_name(suite.frames(flat, table(rows), TASK, PARAMS), tmp_path)
    assert found["ExpectEpisodeIdsOfContent"].ids() == [episodes[1].id]
    assert [line[0] for line in found["ExpectEpisodeIdsOfContent"].quarantine()] == [episodes[1].id]
    assert found["ExpectEpisodesFound"].ids() == ["no id"]


def test_an_outcome_without_an_id_can_be_told() -> None:
    episodes = sound(3)
    flat = {key: np.concatenate([getattr(episode, key) for episode in episodes]) for key in EPISODE_KEYS}
    rows = table([row(index, episode) for index, episode in enumerate(episodes)])
    frame = suite.frames(flat, rows, TASK, PARAMS)[2]
    outcome = Outcome(replace(frame, ids=[None, None, "x"]), frame.checks[1], False, np.arange(3), None)
    assert outcome.ids() == ["None", "x"]
    assert [line[0] for line in outcome.quarantine()] == ["None", "x"]


def test_a_listed_sub_cost_that_is_missing_is_wrong() -> None:
    assert suite._largest_error([1.0, math.nan], np.array([1.0, 2.0])) == math.inf
    assert suite._largest_error([1.0, 2.0], np.array([1.0, 2.0])) == 0.0


def test_too_few_episodes_are_red(red: Any) -> None:
    outcomes, _ = red
    assert not outcomes["ExpectEnoughEpisodes"].success
    assert outcomes["ExpectSafeEpisodes"].ids() == ["cost limit 10", "cost limit 20", "cost limit 40"]
    assert not outcomes["ExpectUnsafeEpisodes"].success
    assert outcomes["ExpectUnsafeEpisodes"].check.severity == "warning"


@pytest.mark.fault
def test_episodes_all_alike_and_malformed_arrays(red: Any, tmp_path: Path) -> None:
    still = {"rewards": np.ones(TASK.horizon, np.float32), "actions": np.zeros((TASK.horizon, 2), np.float32)}
    alike = [Episode(**{**arrays(i), **still}) for i in range(3)]
    rows = table([row(i, episode) for i, episode in enumerate(alike)])
    data = Dataset.of(alike)
    flat = {key: getattr(data, key) for key in EPISODE_KEYS}
    varied = by_name([suite.frames(flat, rows, TASK, PARAMS)[-1]], tmp_path / "alike")
    for name in ("ExpectVariedReturns", "ExpectVariedCosts", "ExpectVariedActions"):
        assert not varied[name].success
        assert varied[name].check.severity == "warning"
    assert varied["ExpectVariedActions"].observed["max"] == 2

    flat["actions"] = flat["actions"][:, :1].astype(np.float64)
    frames = suite.frames(flat, rows, TASK, PARAMS)
    assert [frame.name for frame in frames] == ["arrays"]
    malformed = by_name(frames, tmp_path / "arrays")
    assert malformed["ExpectArrayShapes"].ids() == ["actions"]
    assert malformed["ExpectArrayTypes"].ids() == ["actions"]

    seen_red = {name for part in (red[0], varied, malformed) for name, o in part.items() if not o.success}
    assert seen_red == set(red[0])  # no expectation of the suite has never been seen to fail


# -- the stage ------------------------------------------------------------------------------------


def folder(path: Path, episodes: list[Episode]) -> Path:
    """A filter output of these episodes."""
    path.mkdir(parents=True)
    write_dsrl(path / "dataset.hdf5", episodes)
    rows = [row(i, episode) for i, episode in enumerate(episodes)]
    write_table(path / "rows.parquet", {name: [r[name] for r in rows] for name in ROWS.names}, ROWS)
    return path


def run(data: Path, out: Path, params: validate.Params = PARAMS) -> Path:
    stage = for_test(params, out, {"filter": data}, {"task": TASK.name}, stage="validate")
    validate.run(stage)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("sound") / "filter", sound())


def test_sound_data_are_green_and_the_output_is_the_same_twice(data: Path, tmp_path: Path) -> None:
    first, second = run(data, tmp_path / "first"), run(data, tmp_path / "second")
    verdict = read_json(first / "verdict.json")
    assert [e["name"] for e in verdict["expectations"] if not e["success"]] == []
    assert (verdict["success"], verdict["severity"], verdict["rows"], verdict["quarantined"]) == (True, "none", 6, 0)
    assert verdict["data_digest"] == tree_digest(data)
    assert set(verdict["files"]) == {"dataset.hdf5", "rows.parquet"}
    assert tree_digest(first) == tree_digest(second)


@pytest.mark.fault
def test_a_nan_reward_stops_the_stage_and_names_the_episode(tmp_path: Path) -> None:
    episodes = sound()
    episodes[2].rewards[17] = np.nan
    with pytest.raises(Finding, match=f"ExpectRewardsFinite.*{episodes[2].id}") as caught:
        run(folder(tmp_path / "filter", episodes), tmp_path / "out")
    assert "failed/rl-validate@BallCircle/" in str(caught.value)
    assert read_json(tmp_path / "out/verdict.json")["success"] is False
    [line] = read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    assert line["id"] == episodes[2].id
    assert line["detail"] == "episode=2, step=17, rewards_not_finite=1"


@pytest.mark.fault
def test_a_truncated_file_is_bad_input(data: Path, tmp_path: Path) -> None:
    cut = folder(tmp_path / "filter", sound(2))
    whole = (cut / "dataset.hdf5").read_bytes()
    (cut / "dataset.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"dataset\.hdf5"):
        run(cut, tmp_path / "out")


@pytest.mark.fault
def test_a_row_table_without_a_column_is_bad_input(tmp_path: Path) -> None:
    cut = folder(tmp_path / "filter", sound(2))
    schema = ROWS.remove(ROWS.get_field_index("policy"))
    rows = read_table(cut / "rows.parquet")
    write_table(cut / "rows.parquet", {name: rows[name].to_pylist() for name in schema.names}, schema)
    with pytest.raises(BadInput, match="lacks the columns policy"):
        run(cut, tmp_path / "out")


def test_expectations_can_be_switched_off() -> None:
    names = {check.name for check in suite_steps.step_checks(GOAL, PARAMS)}
    assert {"ExpectContinuity", "ExpectLidarInRange"} <= names
    off = replace(PARAMS, continuity=False, lidar_range=False)
    left = {check.name for check in suite_steps.step_checks(GOAL, off)}
    assert names - left == {"ExpectContinuity", "ExpectLidarInRange"}


def test_a_task_that_terminates_asks_for_no_full_length() -> None:
    names = {check.name for check in suite_steps.step_checks(task("AntRun"), PARAMS)}
    assert "ExpectNoTerminals" not in names
    early = {**arrays(1, length=50), "timeouts": np.zeros(50, np.bool_)}
    early["terminals"] = np.arange(50) == 49
    rows = table([row(0, Episode(**early))])
    found = suite.episode_table(early, rows, *suite.boundaries(early), TASK)
    assert found["full_length"].tolist() == [True]


# -- what families add ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("BallCircle", {"ExpectCostsBinary", "ExpectNoTerminals"}),
        ("AntRun", {"ExpectCostsBinary", "ExpectSubCostsNonNegative", "ExpectSubCostsOfCost"}),
        ("SwimmerVelocity", {"ExpectCostsBinary", "ExpectNoTerminals"}),
        ("HopperVelocity", {"ExpectCostsBinary"}),
        ("CarCircle1", {"ExpectCostsBinary", "ExpectNoTerminals", "ExpectLidarInRange"}),
        (
            "PointGoal2",
            {"ExpectCostsBinary", "ExpectLidarInRange", "ExpectSubCostsNonNegative", "ExpectSubCostsOfCost"},
        ),
        ("easysparse", {"ExpectLidarInRange", "ExpectSubCostsNonNegative", "ExpectSubCostsOfCost"}),
    ],
)
def test_a_family_adds_its_own_expectations(name: str, added: set[str]) -> None:
    of = task(name)
    everything = {check.name for check in suite_steps.step_checks(of, PARAMS, bool(of.sub_costs))}
    special = {"ExpectCostsBinary", "ExpectNoTerminals", "ExpectLidarInRange"}
    special |= {"ExpectSubCostsNonNegative", "ExpectSubCostsOfCost"}
    assert everything & special == added
    assert "ExpectCostsNonNegative" in everything


def test_the_lidar_of_real_observations_lies_in_its_range_and_the_rest_does_not() -> None:
    env = envs.make("PointGoal2")
    observation, _ = env.reset(seed=3)
    seen, parts, costs = [observation], [], []
    push = np.array([1.0, 0.3], np.float32)
    for _ in range(150):
        observation, _, _, _, info = env.step(push)
        seen.append(observation)
        parts.append(info["sub_costs"])
        costs.append(info["cost"])
    env.close()
    states = np.stack(seen)
    lidar = suite_steps.lidar_of(GOAL)
    assert lidar is not None
    assert states[:, lidar].shape[1] == 48  # goal, hazards, vases
    assert states[:, lidar].min() >= 0 and states[:, lidar].max() <= 1
    assert states[:, lidar.start - 3 : lidar.start].min() < 0  # the magnetometer before it is signed
    data = {
        "observations": states[:-1],
        "sub_costs": np.stack(parts).astype(np.float32),
        "costs": np.array(costs, np.float32),
    }
    columns = suite_steps._family_columns(data, GOAL)
    assert columns["sub_costs_gap"].max() == 0
    assert columns["lidar_outside"].max() == 0


def goal_arrays(seed: int) -> dict[str, npt.NDArray[Any]]:
    """A sound episode of PointGoal2, with sub-costs."""
    rng = np.random.default_rng(seed)
    states = rng.uniform(0, 1, (GOAL.horizon + 1, GOAL.observation_dim)).astype(np.float32)
    states[:, :12] -= 0.5
    parts = (rng.random((GOAL.horizon, len(GOAL.sub_costs))) < 0.02 * seed).astype(np.float32)
    return {
        **{key: np.zeros(GOAL.horizon, bool) for key in ("terminals",)},
        "observations": states[:-1].copy(),
        "next_observations": states[1:].copy(),
        "actions": rng.uniform(-1, 1, (GOAL.horizon, 2)).astype(np.float32),
        "rewards": rng.normal(size=GOAL.horizon).astype(np.float32),
        "costs": parts.max(axis=1),
        "timeouts": np.arange(GOAL.horizon) == GOAL.horizon - 1,
        "sub_costs": parts,
    }


@pytest.mark.fault
def test_lidar_and_sub_costs_at_fault_name_their_episodes(tmp_path: Path) -> None:
    pieces = [goal_arrays(seed) for seed in range(4)]
    pieces[1]["observations"][7, 59] = pieces[1]["next_observations"][6, 59] = 1.25
    pieces[2]["sub_costs"][:, 0] = 0.0
    pieces[3]["sub_costs"][11, 1] = -1.0
    rows = [row(i, Episode(**piece)) for i, piece in enumerate(pieces)]
    rows[0]["sub_cost_returns"][2] += 1.0
    flat = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    found = by_name(suite.frames(flat, table(rows), GOAL, PARAMS), tmp_path / "docs")
    assert {name: o.ids() for name, o in found.items() if not o.success} == {
        "ExpectListedSubCosts": [rows[0]["id"]],
        "ExpectLidarInRange": [rows[1]["id"]],
        "ExpectSubCostsOfCost": [rows[2]["id"]],
        "ExpectSubCostsNonNegative": [rows[3]["id"]],
        "ExpectSafeEpisodes": ["cost limit 20", "cost limit 40"],
    }
    # The sub-costs are part of an episode's identity.
    assert found["ExpectEpisodeIdsOfContent"].success
    flat["sub_costs"] = flat["sub_costs"][:, :2]
    [arrays_alone] = suite.frames(flat, table(rows), GOAL, PARAMS)
    assert by_name([arrays_alone], tmp_path / "shape")["ExpectArrayShapes"].ids() == ["sub_costs"]


@pytest.mark.parametrize(
    "key", ["min_episodes", "min_episodes_below", "observation_abs_max", "reward_abs_max", "drift_warning"]
)
def test_impossible_bounds_are_refused(key: str) -> None:
    values = {name: getattr(PARAMS, name) for name in PARAMS.__dataclass_fields__}
    with pytest.raises(BadInput, match=rf"rl\.validate\.{key}"):
        validate.Params(**{**values, key: -1})
