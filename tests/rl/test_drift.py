"""Drift: its measure against hand-computed numbers, what the validate stage makes of it, and accepting a data set."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from springhead.acceptance import accept
from springhead.cli import main
from springhead.declared import stray_files
from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest
from springhead.lineage.ledger import Ledger
from springhead.rl import drift
from springhead.rl.dataset import Dataset, Episode
from springhead.stage import for_test
from stages.rl import validate
from tests.rl.offline_data import BALL, dataset
from tests.rl.test_validate import PARAMS, TASK, arrays, folder, sound

pytestmark = pytest.mark.unit
STAGE = "rl-validate@BallCircle"


def profile(episodes: list[Episode]) -> tuple[Dataset, dict[str, Any]]:
    data = Dataset.of(episodes)
    return data, drift.profile(data, BALL, "d" * 64)


def drifts(now: list[Episode], before: list[Episode]) -> dict[str, float]:
    data, described = profile(now)
    table = drift.compare(data, described, profile(before)[1])
    return dict(zip(table["quantity"], table["drift"], strict=True))


def test_equal_data_have_no_drift_and_their_profile_is_read_back_equal(tmp_path: Path) -> None:
    episodes = dataset([(10.0 + n / 7, n % 13) for n in range(50)])
    assert set(drifts(episodes, episodes).values()) == {0.0}
    write_json(tmp_path / "p.json", profile(episodes)[1])
    data, described = profile(episodes)
    read = drift.read_accepted(tmp_path / "p.json", BALL)
    assert read == described
    assert drift.compare(data, described, read)["drift"].max() == 0.0


def test_the_distance_is_the_largest_difference_of_shares() -> None:
    before = dataset([(1.0, cost) for cost in (0, 0, 0, 1, 2, 3, 4, 5, 6, 7)])
    now = dataset([(1.0, cost) for cost in (0, 3, 3, 3, 3, 3, 3, 3, 3, 3)])
    # At or below 2: 0.5 and 0.1; at or below 3: 0.6 and 1; below 3: 0.5 and 0.1.
    found = drifts(now, before)
    assert found["cost_return"] == pytest.approx(0.4)
    assert found["episode_return"] == 0.0
    assert found["length"] == 0.0


def test_a_shift_away_from_one_value_shows_in_both_directions() -> None:
    none, many = dataset([(1.0, 0)] * 6), dataset([(1.0, 8)] * 6)
    assert drifts(many, none)["cost_return"] == drifts(none, many)["cost_return"] == 1.0
    assert drifts(many, none)["cost_rate"] == drifts(none, many)["cost_rate"] == 1.0


def test_numbers_change_by_their_ratio() -> None:
    found = drifts(dataset([(1.0, 4)] * 10), dataset([(1.0, 8)] * 40))
    assert found["episodes"] == 0.75
    assert found["cost_rate"] == 0.5


def test_every_entry_of_states_and_actions_is_watched() -> None:
    before = dataset([(1.0, 3)] * 20)
    moved = [replace(e, actions=np.c_[e.actions[:, :1], e.actions[:, 1:] + 3.0]) for e in before]
    found = drifts(moved, before)
    assert [name for name, value in found.items() if value > 0] == ["action[1]"]
    assert found["action[1]"] == 1.0
    assert sum(name.startswith("observation[") for name in found) == BALL.observation_dim


def test_data_of_another_width_have_drifted_altogether() -> None:
    before = dataset([(1.0, 3)] * 5)
    narrow = [replace(e, observations=e.observations[:, :7], next_observations=e.observations[:, :7]) for e in before]
    assert drifts(narrow, before)["observation[7]"] == 1.0
    assert drifts(before, narrow)["observation[7]"] == 1.0


def test_two_samples_of_one_distribution_stay_below_the_warning() -> None:
    def sample(seed: int) -> list[Episode]:
        rng = np.random.default_rng(seed)
        return dataset([(float(rng.normal(50, 9)), int(rng.integers(0, 20))) for _ in range(300)])

    assert max(drifts(sample(1), sample(2)).values()) < PARAMS.drift_warning


@pytest.mark.fault
def test_a_damaged_or_foreign_profile_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "BallCircle.json"
    assert drift.read_accepted(path, BALL) is None
    write_json(path, {"format": 1, "task": "BallCircle"})
    with pytest.raises(BadInput, match=r"BallCircle\.json: not a profile of format 1"):
        drift.read_accepted(path, BALL)
    sound_one = profile(dataset([(1.0, 1)]))[1]
    length = sound_one["quantities"]["length"]
    for damage in (
        {"episodes": "6"},
        {"cost_rate": None},
        {"data_digest": 5},
        {"quantities": [length]},
        {"quantities": {"length": {**length, "values": [1.0, 2.0]}}},
        {"quantities": {"length": {**length, "up_to": ["1"]}}},
        {"quantities": {"length": {"mean": 1.0}}},
    ):
        write_json(path, {**sound_one, **damage})
        with pytest.raises(BadInput, match=r"BallCircle\.json: not a profile of format 1"):
            drift.read_accepted(path, BALL)
    write_json(path, {**sound_one, "task": "CarRun"})
    with pytest.raises(BadInput, match="is the profile of CarRun, not of BallCircle"):
        drift.read_accepted(path, BALL)


# -- the stage, and accepting ---------------------------------------------------------------------


class Project:
    """A checkout's folders, as far as validating and accepting look at them."""

    def __init__(self, path: Path) -> None:
        self.root, self.home, self.number = path / "checkout", path / "home", 0
        self.home.mkdir(parents=True)
        self.at = {step: self.root / f"data/rl/{step}/BallCircle" for step in ("filter", "validate")}

    def filter(self, episodes: list[Episode]) -> None:
        """Puts other data in the place of the filter stage's output."""
        self.number += 1
        made = folder(self.root.parent / f"data-{self.number}", episodes)
        self.at["filter"].parent.mkdir(parents=True, exist_ok=True)
        self.at["filter"].unlink(missing_ok=True)
        self.at["filter"].symlink_to(made, target_is_directory=True)

    def validate(self, params: validate.Params = PARAMS) -> dict[str, Any]:
        """Runs the stage, moves its output to where the harness would, and returns what it said of drift."""
        self.number += 1
        out = self.root.parent / f"out-{self.number}"
        stage = for_test(params, out, {"filter": self.at["filter"]}, {"task": TASK.name}, stage="validate")
        there = stage.root / "data/accepted"
        if (self.root / "data/accepted").exists():
            there.symlink_to(self.root / "data/accepted", target_is_directory=True)
        self.at["validate"].parent.mkdir(parents=True, exist_ok=True)
        self.at["validate"].unlink(missing_ok=True)
        failed = self.home / "failed" / STAGE
        failed.parent.mkdir(parents=True, exist_ok=True)
        try:
            validate.run(stage)
        except Finding:
            failed.unlink(missing_ok=True)
            failed.symlink_to(out, target_is_directory=True)
            raise
        self.at["validate"].symlink_to(out, target_is_directory=True)
        return read_json(out / "drift.json")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.filter(sound())
    return made


def test_with_nothing_accepted_the_stage_says_so(project: Project) -> None:
    said = project.validate()
    assert (said["accepted"], said["success"], said["severity"], said["expectations"]) == (None, True, "none", [])
    assert read_json(project.at["validate"] / "profile.json")["data_digest"] == tree_digest(project.at["filter"])


def test_accepting_writes_profile_and_ledger_entry_and_leaves_the_verdict_as_it_was(project: Project) -> None:
    project.validate()
    verdict = (project.at["validate"] / "verdict.json").read_bytes()
    found = accept(STAGE, project.root, project.home)
    digest = tree_digest(project.at["filter"])
    assert found.path == project.root / "data/accepted/rl/BallCircle.json"
    assert found.path.read_bytes() == (project.at["validate"] / "profile.json").read_bytes()
    [entry] = Ledger(project.home).entries()
    assert (entry["kind"], entry["body"]["data"], entry["body"]["before"]) == ("acceptance", digest, None)
    assert found.entry == entry["seq"]
    said = project.validate()
    assert said["accepted"] == {"data_digest": digest, "episodes": 6}
    assert {q["drift"] for q in said["quantities"]} == {0.0}
    assert said["success"]
    assert (project.at["validate"] / "verdict.json").read_bytes() == verdict
    again = accept(STAGE, project.root, project.home)
    assert again.entry is None
    assert len(Ledger(project.home).entries()) == 1


def other(shift: float, count: int = 6) -> list[Episode]:
    """Sound episodes whose rewards are moved, and with them the returns."""
    moved = [{**arrays(seed + 50, costs=6 * seed), "rewards": arrays(seed)["rewards"] + shift} for seed in range(count)]
    return [Episode(**{k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in m.items()}) for m in moved]


def test_a_small_drift_is_a_warning(project: Project) -> None:
    project.validate()
    accept(STAGE, project.root, project.home)
    project.filter([*sound(), *sound(8)[6:]])  # eight episodes of which six are the accepted ones
    said = project.validate()
    assert (said["success"], said["severity"]) == (True, "warning")
    [small, bounded] = said["expectations"]
    assert (small["name"], small["success"], bounded["name"], bounded["success"]) == (
        "ExpectSmallDrift",
        False,
        "ExpectBoundedDrift",
        True,
    )
    assert "episodes" in small["unexpected_ids"]
    assert read_json(project.at["validate"] / "verdict.json")["severity"] == "none"
    page = "".join(p.read_text(encoding="utf-8") for p in (project.at["validate"] / "data_docs").rglob("*.html"))
    assert "rl-dataset-drift" in page


@pytest.mark.fault
def test_a_large_drift_stops_the_stage_until_the_data_are_accepted(project: Project) -> None:
    project.validate()
    accept(STAGE, project.root, project.home)
    project.filter(other(shift=20.0))
    with pytest.raises(Finding, match=r"ExpectBoundedDrift.*episode_return") as caught:
        project.validate()
    assert f"springhead accept {STAGE}" in str(caught.value)
    found = accept(STAGE, project.root, project.home)  # its findings are all that there is
    assert found.entry is not None
    assert found.before != found.data_digest
    assert project.validate()["severity"] == "none"


@pytest.mark.fault
def test_what_was_not_judged_or_failed_cannot_be_accepted(project: Project) -> None:
    with pytest.raises(BadInput, match=r"has not judged the data in data/rl/filter/BallCircle; run `dvc repro"):
        accept(STAGE, project.root, project.home)
    project.validate()
    project.filter(other(1.0))
    with pytest.raises(BadInput, match="has not judged the data"):
        accept(STAGE, project.root, project.home)
    with pytest.raises(Finding, match="ExpectEnoughEpisodes"):
        project.validate(replace(PARAMS, min_episodes=100))
    with pytest.raises(Finding, match="these data failed validation"):
        accept(STAGE, project.root, project.home)
    with pytest.raises(BadInput, match="only rl-validate@TASK judges drift"):
        accept("llm-validate", project.root, project.home)
    with pytest.raises(BadInput, match="BallCirle"):
        accept("rl-validate@BallCirle", project.root, project.home)
    assert not (project.root / "data/accepted").exists()


def test_the_command_accepts_says_what_to_do_next_and_refuses_in_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.validate()
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("SPRINGHEAD_HOME", str(project.home))
    assert main(["accept", STAGE]) == 0
    said = capsys.readouterr().out
    assert "data/accepted/rl/BallCircle.json, ledger entry 0" in said
    assert "git add data/accepted/rl/BallCircle.json; `dvc repro rl-validate`" in said
    assert main(["accept", STAGE]) == 0
    assert "are the accepted ones already" in capsys.readouterr().out
    assert main(["accept", "rl-train@BallCircle-bc-0"]) == 2
    assert capsys.readouterr().err.startswith("error: rl-train@BallCircle-bc-0: only rl-validate@TASK judges drift")


def test_accepted_profiles_are_no_stray_files_of_the_stage_that_reads_them(tmp_path: Path) -> None:
    for name in ("data/accepted/rl/BallCircle.json", "data/rl/validate/old.json"):
        write_json(tmp_path / name, {})
    assert stray_files(tmp_path / "data/accepted", (), tmp_path) == []
    assert stray_files(tmp_path / "data/rl", (), tmp_path) == ["data/rl/validate/old.json"]
