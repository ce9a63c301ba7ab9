# ruff: noqa: F401, F811  (fixtures of pytest are imported, then named as arguments)
import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from springhead import doctor
from springhead.cli import app
from springhead.doctor import GOOD, RED, WARNING, Symptom
from springhead.lineage.ledger import Ledger
from springhead.spool import Spool
from tests.lineage.conftest import root, sample_template

pytestmark = pytest.mark.unit

NOBODY = 2**22 + 1  # above the largest process id of Linux


def symptoms(root: Path, check: str) -> list[Symptom]:
    return [s for s in doctor.examine(root) if s.check == check]


def test_a_sound_checkout_has_no_red_symptom(root: Path) -> None:
    found = doctor.examine(root)
    assert {s.check for s in found if s.severity == RED} <= {"packages"}
    assert {"python", "dvc", "dvc.lock", "ledger", "mlflow", "disk"} <= {s.check for s in found if s.severity == GOOD}


@pytest.mark.parametrize("name", ["drive", "peers", "trl"])
def test_what_is_optional_or_installed_elsewhere_is_not_missed(root: Path, name: str) -> None:
    (root / f"locks/{name}.lock").write_text("surely-not-installed==1.0\n")
    (symptom,) = symptoms(root, "packages")
    assert symptom.severity == GOOD
    assert name not in symptom.what
    assert (Path(__file__).parent.parent / f"locks/{name}.lock").exists()


def test_a_package_of_another_version_is_named(root: Path) -> None:
    (root / "locks/rl.lock").write_text("numpy==0.0.1\nno-such-package==1.0\n")
    (symptom,) = symptoms(root, "packages")
    assert symptom.severity == RED
    assert "(locked: 0.0.1)" in symptom.what
    assert "no-such-package is not installed" in symptom.what
    assert "make install" in symptom.do


def test_a_lock_line_that_is_no_lock_line_is_named(root: Path) -> None:
    (root / "locks/rl.lock").write_text("numpy>=2\n")
    assert "rl.lock:1" in symptoms(root, "packages")[0].what


def test_python_in_the_folder_mlflow_is_red(root: Path) -> None:
    (root / "mlflow").mkdir(exist_ok=True)
    assert symptoms(root, "mlflow/") == []
    (root / "mlflow/__init__.py").write_text("")
    assert symptoms(root, "mlflow/")[0].severity == RED


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "empty"), ("stages: [", "not valid YAML"), ("<<<<<<< ours\n=======\n>>>>>>> theirs\n", "unresolved merge")],
)
def test_a_damaged_dvc_lock_is_red(root: Path, content: str, words: str) -> None:
    (root / "dvc.lock").write_text(content)
    (symptom,) = symptoms(root, "dvc.lock")
    assert symptom.severity == RED
    assert words in symptom.what
    assert "git checkout" in symptom.do


def test_nothing_run_yet_is_only_a_warning(root: Path) -> None:
    (root / "dvc.lock").unlink()
    assert symptoms(root, "dvc.lock")[0].severity == WARNING


def test_dvc_that_is_not_initialised_is_red(root: Path) -> None:
    (root / ".dvc/config").unlink()
    assert symptoms(root, "dvc")[0].severity == RED


@pytest.mark.fault
@pytest.mark.parametrize("content", ["", '{"a": {"write"', "[]", '{"a": {"write": {}}, "b": 3}'])
def test_half_a_rwlock_is_red_and_fixed(root: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = root / ".dvc/tmp/rwlock"
    path.write_text(content)
    assert symptoms(root, "rwlock")[0].severity == RED
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["doctor", "--fix"])
    assert "mended: .dvc/tmp/rwlock is damaged" in done.stdout
    assert not path.exists()
    assert symptoms(root, "rwlock") == []


@pytest.mark.fault
def test_a_damaged_rwlock_is_left_while_a_dvc_command_runs(root: Path) -> None:
    (root / ".dvc/tmp/rwlock").write_text("")
    command = root / "dvc"
    command.write_text("read line\n")
    running = subprocess.Popen(["sh", str(command)], cwd=root, stdin=subprocess.PIPE)
    try:
        (symptom,) = symptoms(root, "rwlock")
        assert symptom.mend is None
        assert str(running.pid) in symptom.do
    finally:
        running.communicate(b"\n")
    assert symptoms(root, "rwlock")[0].mend is not None


@pytest.mark.fault
def test_a_rwlock_of_the_dead_is_a_warning_and_of_the_living_is_left(root: Path) -> None:
    path = root / ".dvc/tmp/rwlock"
    path.write_text(json.dumps({"data/rl": {"write": {"pid": NOBODY, "cmd": "dvc repro"}}}))
    (symptom,) = symptoms(root, "rwlock")
    assert symptom.severity == WARNING
    assert str(NOBODY) in symptom.what
    path.write_text(json.dumps({"data/rl": {"read": [{"pid": os.getpid(), "cmd": "dvc repro"}]}}))
    assert symptoms(root, "rwlock") == []


@pytest.mark.fault
def test_what_a_killed_stage_left_is_named_and_removed(root: Path) -> None:
    left, busy = (root / f"data/rl/collect/.BallCircle.tmp-{pid}" for pid in (NOBODY, os.getpid()))
    for folder in (left, busy):
        folder.mkdir()
        (folder / "half.hdf5").write_bytes(b"1")
    (symptom,) = symptoms(root, "leftovers")
    assert left.name in symptom.what
    assert symptom.mend is not None
    symptom.mend()
    assert (left.exists(), busy.exists()) == (False, True)


@pytest.mark.fault
def test_what_a_dvc_killed_while_restoring_left_is_named_and_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = root / "data/rl/collect/.Q3fRLfFXm_9hPRbYy-hqZA.tmp"
    hidden = root / "data/rl/collect/.notes.tmp"  # somebody's own
    for path in (half, hidden):
        path.write_bytes(b"1")
    (symptom,) = symptoms(root, "leftovers")
    assert half.name in symptom.what
    assert symptom.mend is not None
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_dvc_processes", lambda root: ["17"])
        symptom.mend()  # DVC has begun once more
        assert half.exists()
        (busy,) = symptoms(root, "leftovers")
        assert busy.mend is None
        assert "(17)" in busy.do
    symptom.mend()
    assert (half.exists(), hidden.exists()) == (False, True)


@pytest.mark.fault
def test_a_broken_ledger_is_red(root: Path) -> None:
    path = root / ".springhead/ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"12.5", b"13.5", 1))
    (symptom,) = symptoms(root, "ledger")
    assert symptom.severity == RED
    assert "ledger.jsonl:2" in symptom.what


@pytest.mark.fault
def test_fix_signs_nothing_and_sign_ledger_names_what_it_signs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = root / ".springhead"
    forged = {"execution": "f" * 32, "stage": "rl-\x1b[2Kforged", "receipt": "0" * 64}
    Ledger(home).append("execution", forged)  # without the key: whoever can write to the file can do that
    (root / ".dvc/tmp/rwlock").write_text("")
    head = (home / "ledger.head.json").read_bytes()
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["doctor", "--fix"])
    assert "mended: .dvc/tmp/rwlock is damaged" in done.stdout
    assert (home / "ledger.head.json").read_bytes() == head
    (symptom,) = symptoms(root, "keys")
    assert (symptom.severity, symptom.mend) == (WARNING, None)
    assert "17 " in symptom.what
    assert "rl-?[2Kforged" in symptom.what
    assert "doctor --sign-ledger" in symptom.do
    done = CliRunner().invoke(app, ["doctor", "--sign-ledger", "--json"])
    json.loads(done.stdout)
    assert [line for line in done.stderr.splitlines() if line.startswith("not signed: 17 ")]
    assert "signed: 1 entries" in done.stderr
    assert [s.severity for s in symptoms(root, "keys")] == [GOOD]
    assert "every entry of the ledger is signed" in CliRunner().invoke(app, ["doctor", "--sign-ledger"]).stdout


@pytest.mark.fault
def test_a_missing_head_is_signed_when_asked_and_a_cut_never(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, head = root / ".springhead/ledger.jsonl", root / ".springhead/ledger.head.json"
    whole = book.read_bytes()
    monkeypatch.chdir(root)
    book.write_bytes(b"".join(whole.splitlines(keepends=True)[:9]))
    signed = head.read_bytes()
    done = CliRunner().invoke(app, ["doctor", "--sign-ledger"])
    assert done.exit_code == 1
    assert "was cut" in done.stderr
    assert head.read_bytes() == signed
    book.write_bytes(whole)
    head.unlink()
    assert [s.mend for s in symptoms(root, "keys")] == [None]
    assert "signed: 17 entries" in CliRunner().invoke(app, ["doctor", "--sign-ledger"]).stdout
    assert [s.severity for s in symptoms(root, "keys")] == [GOOD]


@pytest.mark.fault
def test_a_checkout_that_git_refuses_is_red(root: Path) -> None:
    assert symptoms(root, "git")[0].severity == WARNING
    (root / ".git").write_text("gitdir: /nope\n")
    (symptom,) = symptoms(root, "git")
    assert symptom.severity == RED
    assert "git rev-parse failed" in symptom.what


def test_what_waits_for_mlflow_is_counted(root: Path) -> None:
    spool = Spool(root / ".springhead", "a" * 32)
    spool.event("start", stage="rl-collect", attempt=1, params={}, tags={}, time=0.0)
    spool.close()
    (symptom,) = symptoms(root, "mlflow")
    assert symptom.severity == WARNING
    assert "1 executions are not in MLflow yet" in symptom.what


def test_the_exit_code_tells_a_red_symptom(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "locks/rl.lock").write_text("numpy==0.0.1\n")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    found = {entry["check"]: entry for entry in json.loads(done.stdout)}
    assert found["packages"]["severity"] == RED
