"""F3: ``kill -9`` at a hundred seeded random instants, each time going on from what the kill left.

A stage's output appears whole, by one rename. DVC, though, removes and restores an output file by file, and a kill
in the middle leaves a part of it, which the next ``dvc repro`` puts right: the last test injects just that.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from springhead import doctor
from springhead.lineage.audit import audit
from springhead.lineage.digests import file_digest, tree_digest, tree_files
from springhead.lineage.ledger import Ledger
from springhead.spool import read, waiting
from tests.conftest import Project
from tests.faults.processes import alive, await_that

KILLS = 100
TEMPORARY = "data/rl/**/.*.tmp-*"  # the last part is the process that writes there
DVC_TEMPORARY = re.compile(r"\.[\w-]{22}\.tmp")
STAGES = ("rl-make", "rl-use@a", "rl-use@b")
# DVC takes a second to import, in which no kill finds anything to break. This process imports it once
# and forks a `dvc repro` for each line it reads: real DVC, real stages, most instants in the work itself.
SERVER = """
import os, sys
import dvc.cli, dvc.repo.reproduce, dvc.stage.run, dvc.stage.cache, dvc.dvcfile, dvc.output, dvc.dependency
import dvc_data.index, dvc_data.hashfile.transfer, dvc.repo.commit, dvc.fs
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(dvc.cli.main(["repro", "--quiet"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Repro:
    """Starts ``dvc repro`` again and again."""

    def __init__(self, project: Project) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=project.root,
            env=project.env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.stdin, self.stdout = self.server.stdin, self.server.stdout

    def start(self) -> int:
        self.stdin.write("\n")
        self.stdin.flush()
        return int(self.stdout.readline())

    def wait(self) -> int:
        return int(self.stdout.readline())


def outputs(root: Path) -> list[Path]:
    return [*root.glob("data/rl/make"), *root.glob("data/rl/use/[ab]")]


def mend(root: Path) -> list[str]:
    """Does what ``springhead doctor`` says of DVC's own files, which DVC writes in place."""
    mended = []
    for symptom in (*doctor.rwlock(root), *doctor.run_cache(root), *doctor.lock_file(root)):
        if symptom.severity == doctor.RED:
            mended.append(symptom.check)
            if symptom.mend is not None:
                symptom.mend()
            else:
                assert "remove it" in symptom.do
                (root / "dvc.lock").unlink()
    return mended


def in_parts(root: Path) -> set[str]:
    """Returns the outputs that DVC may take apart: what is there it may remove, what it knows it may restore."""
    names = {path.relative_to(root).as_posix() for path in outputs(root)}
    for entry in (root / ".dvc/cache/runs").glob("*/*/*"):
        with contextlib.suppress(yaml.YAMLError, TypeError, KeyError):  # cut off by a kill
            names |= {out["path"] for out in yaml.safe_load(entry.read_text())["outs"]}
    return names


def part(path: Path, whole: dict[str, str]) -> bool:
    """Returns whether a folder holds nothing but files of the whole and DVC's own temporary ones."""
    files = {name: d for name, d in tree_files(path).items() if not DVC_TEMPORARY.fullmatch(Path(name).name)}
    return files.items() <= whole.items()


def start_over(root: Path) -> None:
    for name in ("data", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "dvc.lock").unlink(missing_ok=True)


@pytest.mark.fault("F3")
def test_a_hundred_kills_end_at_the_same_bytes(project: Project, tmp_path: Path) -> None:
    reference = Project(tmp_path / "reference")
    shutil.copytree(project.root, reference.root)
    reference.run("dvc", "repro", "--quiet")
    wanted = {path.relative_to(reference.root).as_posix(): tree_files(path) for path in outputs(reference.root)}
    assert len(wanted) == len(STAGES)

    repro, found, kills = Repro(project), Counter[str](), 0
    while kills < KILLS:
        chance = random.Random(kills)
        found.update(mend(project.root))
        there, taken_apart = len(outputs(project.root)), in_parts(project.root)
        child = repro.start()
        if chance.random() < 0.6:  # anywhere: a stage takes about a second, and each kill goes on from the last
            delay = chance.uniform(0.0, 1.5)
        else:  # about where an output appears: before the receipt, the ledger, the cache, the lock
            while len(outputs(project.root)) == there and alive(child):
                time.sleep(0.002)
            delay = chance.uniform(0.0, 0.5)
        time.sleep(delay)
        victim = os.killpg if chance.random() < 0.5 else os.kill  # DVC with its stage, or DVC alone
        if alive(child):
            with contextlib.suppress(ProcessLookupError):  # it ended in this moment
                victim(child, signal.SIGKILL)
        status = repro.wait()
        if status == -signal.SIGKILL:
            kills += 1
        elif status == 0:
            found["finished"] += 1
            start_over(project.root)
        else:
            raise AssertionError(project.run("dvc", "repro", check=False).stderr)
        await_that(lambda: not any(alive(int(p.name.rpartition("-")[2])) for p in project.root.glob(TEMPORARY)))
        for path in outputs(project.root):  # all of an output or none of it, at every instant
            name = path.relative_to(project.root).as_posix()
            if tree_files(path) == wanted[name]:
                found[f"{path.name} there"] += 1
                found["appeared"] += name not in taken_apart
            else:
                assert name in taken_apart, f"after kill {kills}: {tree_files(path)}"
                assert part(path, wanted[name]), f"after kill {kills}: {tree_files(path)}"
    repro.stdin.close()
    repro.server.wait()

    found.update(mend(project.root))
    project.run("dvc", "repro", "--quiet")
    for folder in ("data/rl", "data/receipts", "data/metrics"):
        assert tree_digest(project.root / folder) == tree_digest(reference.root / folder)
    assert (project.root / "dvc.lock").read_bytes() == (reference.root / "dvc.lock").read_bytes()
    assert found["make there"] > 0, found  # how far beyond it gets between two kills depends on the machine
    assert found["appeared"] > 0, found  # by the stage's doing alone

    # One execution per stage counts: whatever was executed more than once has one and the same receipt.
    ledger = Ledger(project.root / ".springhead")
    assert ledger.verify() == []
    accepted = {(e["body"]["stage"], e["body"]["receipt"]) for e in ledger.entries() if e["kind"] == "execution"}
    assert accepted == {(s, file_digest(project.root / f"data/receipts/{s}.json")) for s in STAGES}
    assert not audit(project.root, deep=True).red
    statuses = Counter(read(path).status for path in waiting(project.root / ".springhead"))
    assert statuses["FINISHED"] >= len(STAGES)
    assert statuses["KILLED"] > 0
    assert "FAILED" not in statuses


# DVC dies when a part of data/rl/make/rows.json, which it restores, is written.
DIES_RESTORING = """
import os, signal
import dvc.cli, dvc_objects.fs.local as local
copy = local.copyfile
def half(source, target, **options):
    if os.path.basename(os.path.dirname(target)) != "make":
        return copy(source, target, **options)
    with open(source, "rb") as whole, open(target, "wb") as part:
        part.write(whole.read()[:5])
    os.kill(os.getpid(), signal.SIGKILL)
local.copyfile = half
dvc.cli.main(["repro", "--quiet"])
"""


@pytest.mark.fault("F3")
@pytest.mark.parametrize("mended", [True, False])
def test_dvc_killed_while_it_restores_an_output_costs_no_execution(project: Project, mended: bool) -> None:
    project.run("dvc", "config", "cache.type", "copy")  # whatever this file system can link
    project.run("dvc", "repro", "--quiet")
    lock = (project.root / "dvc.lock").read_bytes()
    wanted = tree_digest(project.root / "data")
    shutil.rmtree(project.root / "data")
    assert project.run(sys.executable, "-c", DIES_RESTORING, check=False).returncode == -signal.SIGKILL
    (left,) = (project.root / "data/rl/make").iterdir()
    assert left.stat().st_size == 5
    assert audit(project.root).red  # it knows that these are not the bytes of the receipt
    (symptom,) = doctor.leftovers(project.root)
    assert left.name in symptom.what
    if mended:
        assert f"mended: {symptom.what}" in project.run("springhead", "doctor", "--fix").stdout
        assert not left.exists()
    project.run("dvc", "repro", "--quiet")
    assert tree_digest(project.root / "data") == wanted
    assert (project.root / "dvc.lock").read_bytes() == lock
    assert len(Ledger(project.root / ".springhead").entries()) == len(STAGES)
    assert not audit(project.root, deep=True).red
