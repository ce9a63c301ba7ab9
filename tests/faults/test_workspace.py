"""Faults of a shared workspace: two processes at once, damaged locks, merges, a remote that lies."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from springhead import doctor
from springhead.cli import app
from springhead.errors import BadInput
from springhead.lineage.mergelock import merge_stages
from tests.faults.processes import await_that
from tests.pipelines.conftest import Light
from tests.pipelines.test_session import Run, states

ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def count_executions(project: Light) -> None:
    """Makes every execution of a stage leave a line outside the project."""
    work = project.read("work.py")
    record = f"open({str(project.root.parent / 'executions')!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
    project.write("work.py", work.replace("kind, *rest", record + "kind, *rest", 1))
    project.git("commit", "-qam", "count")


@pytest.mark.fault("F4")
def test_a_second_repro_is_refused_at_once_and_the_first_ends_well(light: Light) -> None:
    count_executions(light)
    light.write("params.yaml", light.read("params.yaml").replace("pause: 0", "pause: 8"))
    first = subprocess.Popen(["dvc", "repro", "-q", "a-make@x"], cwd=light.root, env=light.env)
    await_that(lambda: lines(light.root.parent / "executions"))
    second = light.run("dvc", "repro", "a-make@x", check=False)
    assert second.returncode != 0
    assert "is busy, it is being blocked by" in second.stderr
    assert str(first.pid) in second.stderr
    assert first.wait(60) == 0
    assert lines(light.root.parent / "executions") == ["make x"]
    assert light.read("data/a/make/x/rows.txt") == "x\nx\n"
    assert "a-make@x" in light.read("dvc.lock")


HOLDER = """
import sys
from dvc.repo import Repo
Repo(".").lock.lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault("F4")
def test_a_dvc_command_that_holds_the_lock_loses_no_finished_work(light: Light) -> None:
    """DVC alone would drop a finished stage if another command held the lock for three seconds then."""
    count_executions(light)
    holders: list[subprocess.Popen[str]] = []

    def hold(stage: str) -> None:
        if stage == "b-check":
            command = [sys.executable, "-c", HOLDER]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            holder = subprocess.Popen(command, cwd=light.root, env=light.env, text=True, **pipes)  # type: ignore[call-overload]
            assert holder.stdout.readline() == "held\n"
            holders.append(holder)

    try:
        with pytest.raises(BadInput, match="another dvc command is at work in this checkout; wait until it has ended"):
            Run(light).perform(hold)
    finally:
        for holder in holders:
            holder.communicate("")
    done = lines(light.root.parent / "executions")
    assert len(done) == 5
    result = Run(light).perform()
    assert "executed" not in states(result).values()
    assert lines(light.root.parent / "executions") == done
    assert light.read("data/b/check.txt") == "HELLO\n4"


DRIVER = """
import json, sys
from pathlib import Path
from pipelines.session import Request, Session
from tests.pipelines.test_session import states, submitter

home = Path(sys.argv[1])
session = Session(Path.cwd(), home, Request(workers=2), "flow", lambda line: None, lambda line: None)
print(json.dumps(states(session.perform(submitter()))))
"""


@pytest.mark.fault("F5")
def test_two_runs_of_one_commit_in_two_worktrees_share_the_work(light: Light) -> None:
    count_executions(light)
    light.write("params.yaml", light.read("params.yaml").replace("pause: 0", "pause: 1"))
    light.git("commit", "-qam", "slow")
    second = light.root.parent / "second"
    light.git("worktree", "add", "-q", "-b", "second", str(second))
    (second / ".dvc/config.local").write_text(f"[cache]\n    dir = {light.root / '.dvc/cache'}\n")
    light.home.mkdir()
    command = [sys.executable, "-c", DRIVER, str(light.home)]
    runs = [
        subprocess.Popen(command, cwd=place, env=light.env, text=True, stdout=subprocess.PIPE)
        for place in (light.root, second)
    ]
    ended = [json.loads(run.communicate(timeout=600)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(lines(light.root.parent / "executions")) == ["check", "make x", "make y", "read", "sum"]
    for stage in ended[0]:
        assert sorted(states[stage] == "executed" for states in ended) == [False, True], stage
    assert (second / "dvc.lock").read_text() == light.read("dvc.lock")


@pytest.mark.fault("F8")
@pytest.mark.parametrize("damage", ["emptied", "cut in a stage", "cut between stages"])
def test_a_damaged_lock_costs_no_execution(built: Light, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.root)
    whole = built.read("dvc.lock")
    half = whole.index("  b-read:")
    left = {"emptied": "", "cut in a stage": whole[: half + len("  b-read:\n")], "cut between stages": whole[:half]}
    built.write("dvc.lock", left[damage])
    (symptom,) = doctor.lock_file(built.root)
    if damage != "cut between stages":  # which is a sound file that knows less, and DVC takes it as that
        assert symptom.severity == doctor.RED
        assert "remove it and run `dvc repro` (the cache restores the rest)" in symptom.do
        (built.root / "dvc.lock").unlink()
    ran = built.run("dvc", "repro").stdout
    assert "Running stage" not in ran
    assert sorted(built.read("dvc.lock").split("\n")) == sorted(whole.split("\n"))


@pytest.mark.fault("F8")
@pytest.mark.parametrize("content", ["", '{"data/a/make/x": {"wri'])
def test_half_a_rwlock_stops_dvc_until_doctor_mends_it(
    built: Light, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built.root)
    built.write(".dvc/tmp/rwlock", content)
    built.write("source.txt", "other\n")
    refused = built.run("dvc", "repro", "-q", "b-read", check=False)
    assert refused.returncode != 0
    done = CliRunner().invoke(app, ["doctor", "--fix"])
    assert "mended: .dvc/tmp/rwlock is damaged" in done.stdout
    built.dvc("repro", "-q", "b-read")
    assert built.read("data/b/read.txt") == "OTHER\n"


@pytest.mark.fault("F3")
def test_what_a_kill_leaves_in_the_run_cache_stops_dvc_until_it_is_mended(
    built: Light, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC makes the folder of an entry before the entry; killed in between, it fails on that stage for ever."""
    monkeypatch.chdir(built.root)
    built.write("source.txt", "other\n")
    known = set((built.root / ".dvc/cache/runs").glob("*/*"))
    built.dvc("repro", "-q", "b-read")
    (folder,) = set((built.root / ".dvc/cache/runs").glob("*/*")) - known
    shutil.rmtree(folder)
    folder.mkdir()
    (built.root / "dvc.lock").unlink()
    assert built.run("dvc", "repro", "-q", "b-read", check=False).returncode != 0
    (symptom,) = doctor.run_cache(built.root)
    assert symptom.severity == doctor.RED
    assert "mended: DVC's run cache" in CliRunner().invoke(app, ["doctor", "--fix"]).stdout
    built.dvc("repro", "-q", "b-read")
    assert built.read("data/b/read.txt") == "OTHER\n"


def commit(project: Light, message: str) -> None:
    project.git("add", "-A", ".")
    project.git("commit", "-qm", message)


@pytest.mark.fault("F22")
def test_branches_that_ran_different_stages_merge_without_conflict(built: Light) -> None:
    driver = f"{sys.executable} -m springhead merge-lock %O %A %B"
    built.git("config", "merge.springhead.driver", driver)
    shutil.copy(ROOT / ".gitattributes", built.root / ".gitattributes")
    commit(built, "lock")
    built.git("checkout", "-qb", "rows")
    built.write("params.yaml", built.read("params.yaml").replace("rows: 2", "rows: 3"))
    built.dvc("repro", "-q")
    commit(built, "three rows")
    built.git("checkout", "-q", "main")
    built.dvc("checkout", "-q")
    built.write("source.txt", "other\n")
    built.dvc("repro", "-q")
    commit(built, "another source")
    merged = built.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "merge", "rows", check=False)
    assert "CONFLICT" not in merged.stdout
    assert merged.returncode == 0, merged.stderr
    assert "b-check: both branches ran it" in merged.stderr
    built.dvc("checkout", "-q", "--force", "a-make", "b-read")
    ran = built.run("dvc", "repro").stdout
    assert [line for line in ran.splitlines() if line.startswith("Running")] == ["Running stage 'b-check':"]
    assert built.read("data/b/check.txt") == "OTHER\n6"
    assert "up to date" in built.run("dvc", "status").stdout


@pytest.mark.unit
def test_entries_are_merged_whole() -> None:
    base = {"kept": 1, "ours": 1, "theirs": 1, "both": 1, "gone here": 1, "gone there": 1, "gone and changed": 1}
    ours = {"kept": 1, "ours": 2, "theirs": 1, "both": 2, "gone there": 1, "new here": 1, "alike": 5}
    theirs = {"kept": 1, "ours": 1, "theirs": 3, "both": 3, "gone here": 1, "gone and changed": 2}
    theirs |= {"new there": 1, "alike": 5}
    merged, both = merge_stages(base, ours, theirs)
    expected = {"kept": 1, "ours": 2, "theirs": 3, "both": 2, "new here": 1, "alike": 5}
    assert merged == {**expected, "gone and changed": 2, "new there": 1}
    assert both == ["both", "gone and changed"]


@pytest.mark.fault("F22")
@pytest.mark.parametrize("damage", ["", "<<<<<<< ours\n", "stages: 3\n", "\xff"])
def test_a_damaged_version_is_left_to_git(tmp_path: Path, damage: str) -> None:
    good = "schema: '2.0'\nstages:\n  a: {cmd: x}\n"
    for name, text in (("base", ""), ("ours", good), ("theirs", damage)):
        (tmp_path / name).write_text(text, encoding="latin-1")
    arguments = ["merge-lock", *(str(tmp_path / name) for name in ("base", "ours", "theirs"))]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"{tmp_path / 'theirs'}: not a lock file" in done.stderr
    assert (tmp_path / "ours").read_text() == good


@pytest.mark.fault("F23")
def test_a_corrupted_object_of_a_remote_is_rejected(built: Light) -> None:
    remote = built.root.parent / "remote"
    built.dvc("remote", "add", "-q", "--default", "store", str(remote))
    built.dvc("remote", "modify", "store", "verify", "true")  # as docs/guide/sharing-data.md has it
    built.dvc("push", "-q")
    stored = next(path for path in remote.rglob("*") if path.is_file() and path.read_bytes() == b"HELLO\n")
    stored.chmod(0o644)
    stored.write_bytes(b"JELLO\n")
    shutil.rmtree(built.root / ".dvc/cache")
    (built.root / "data/b/read.txt").unlink()
    refused = built.run("dvc", "pull", "b-read", check=False)
    assert refused.returncode != 0
    assert not (built.root / "data/b/read.txt").exists()
    assert not (built.root / ".dvc/cache/files/md5" / stored.parent.name / stored.name).exists()
    stored.unlink(missing_ok=True)
    stored.write_bytes(b"HELLO\n")
    built.run("dvc", "pull", "b-read")
    assert built.read("data/b/read.txt") == "HELLO\n"
