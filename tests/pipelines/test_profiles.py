"""Profiles and settings: overlays on params.yaml that name every mistake."""

from pathlib import Path

import pytest
import yaml

from pipelines.worktrees import overlaid_params, read_settings
from springhead.errors import BadInput
from springhead.params import overlay, read_params

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "pipelines" / "profiles").glob("*.yaml"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with parameters and one profile."""
    (tmp_path / "params.yaml").write_text("seed: 0\nrl:\n  train: {steps: 100, rate: 0.1}\n  tasks: [x, y]\n")
    profiles = tmp_path / "pipelines" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "smoke.yaml").write_text("rl:\n  train: {steps: 1}\n  tasks: [x]\n")
    (profiles / "wrong.yaml").write_text("rl:\n  train: {stps: 1}\n")
    return tmp_path


def params(root: Path, profile: str | None = None, *settings: str) -> dict:
    content = overlaid_params(root, profile, settings)
    assert content is not None
    return yaml.safe_load(content)


def test_a_profile_replaces_leaves_and_lists(root: Path) -> None:
    assert params(root, "smoke") == {"seed": 0, "rl": {"train": {"steps": 1, "rate": 0.1}, "tasks": ["x"]}}


def test_settings_go_over_the_profile(root: Path) -> None:
    made = params(root, "smoke", "rl.train.steps=7", "seed=3", "rl.tasks=[y]", "rl.train.rate=1e-3")
    assert made == {"seed": 3, "rl": {"train": {"steps": 7, "rate": 0.001}, "tasks": ["y"]}}


@pytest.mark.parametrize(("profile", "settings"), [(None, []), ("quick", []), ("quick", ["seed=0"])])
def test_what_changes_nothing_is_no_overlay(root: Path, profile: str | None, settings: list[str]) -> None:
    assert overlaid_params(root, profile, settings) is None


@pytest.mark.parametrize(
    ("profile", "settings", "message"),
    [
        ("smok", [], "known are quick, smoke, wrong"),
        ("../smoke", [], "no such profile"),
        ("wrong", [], r"wrong\.yaml\.rl\.train: unknown key 'stps'; did you mean 'steps'"),
        (None, ["rl.train.step=1"], "--set.rl.train: unknown key 'step'; did you mean 'steps'"),
        (None, ["seed"], "--set seed: expected key=value"),
        (None, ["=1"], "expected key=value"),
        (None, ["rl..x=1"], "expected key=value"),
        (None, ["seed=[1"], "not valid YAML"),
        (None, ["seed=1", "seed.a=2"], "'seed' was set to a value"),
    ],
)
def test_mistakes_are_named(root: Path, profile: str | None, settings: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        overlaid_params(root, profile, settings)


@pytest.mark.parametrize("text", ["2024-01-01", ".nan", "!!set {a}"])
def test_values_that_no_parameter_has_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="put a text in quotes"):
        read_settings([f"seed={text}"])


def test_values_are_yaml() -> None:
    made = read_settings(["a=1", "b=1.5", "c=true", "d=x=y", "e=", "f=2E5", "g='1e5'"])
    assert made == {"a": 1, "b": 1.5, "c": True, "d": "x=y", "e": None, "f": 2e5, "g": "1e5"}


def test_the_project_has_the_promised_profiles() -> None:
    assert {"smoke", "paper"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_fits_the_projects_parameters(path: Path) -> None:
    overlay(read_params(ROOT / "params.yaml"), read_params(path), path.name)  # raises on an unknown key
