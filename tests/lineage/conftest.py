"""A sample repository, built once for all tests of lineage, report and command line."""

import shutil
from pathlib import Path

import pytest

from tests.lineage.sample import build


@pytest.fixture(scope="session")
def sample_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # tests/conftest-level users import these fixtures, so each importing folder has its own instance.
    made = tmp_path_factory.getbasetemp() / "sample-repository"
    return made if made.exists() else build(made)


@pytest.fixture
def root(sample_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage. Copies keep the modes, so DVC's cache stays read-only as it would be."""
    monkeypatch.delenv("SPRINGHEAD_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(sample_template, tmp_path / "repository", symlinks=True)
    return tmp_path / "repository"
