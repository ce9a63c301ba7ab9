"""The lock files agree with each other and with what the project says of them."""

import re
from pathlib import Path

import pytest

from springhead.environment import check_packages, locked_packages
from springhead.errors import BadInput
from springhead.rl.simulators import metadrive

LOCKS = Path(__file__).parent.parent / "locks"


@pytest.mark.unit
def test_the_branch_locks_are_part_of_the_full_lock() -> None:
    full = locked_packages(LOCKS / "full.lock")
    for branch in ("rl", "llm"):
        packages = locked_packages(LOCKS / f"{branch}.lock")
        assert packages
        assert {name: full.get(name) for name in packages} == packages


@pytest.mark.unit
def test_the_driving_extra_only_adds_to_the_full_lock() -> None:
    full, drive = locked_packages(LOCKS / "full.lock"), locked_packages(LOCKS / "drive.lock")
    assert not set(full) & set(drive)
    assert f"metadrive-simulator=={drive['metadrive-simulator']}" in (LOCKS.parent / "pyproject.toml").read_text()
    assert drive["metadrive-simulator"] == metadrive._VERSION


@pytest.mark.unit
def test_the_environment_is_the_one_of_the_full_lock() -> None:
    assert "torch" in check_packages(LOCKS / "full.lock")


@pytest.mark.unit
def test_the_pins_that_prefect_needs_are_kept() -> None:
    full = locked_packages(LOCKS / "full.lock")
    assert tuple(map(int, full["fastapi"].split(".")))[:2] < (0, 151)
    assert tuple(map(int, full["sqlalchemy"].split(".")))[:2] < (2, 1)


@pytest.mark.fault
def test_a_line_that_is_no_pin_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text("# fine\nnumpy>=2\n")
    with pytest.raises(BadInput, match=re.escape("x.lock:2: expected NAME==VERSION")):
        locked_packages(tmp_path / "x.lock")
