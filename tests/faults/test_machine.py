"""Faults of the machine: a full disk, no memory, another time zone, locale, hash seed, umask or core count."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from springhead.lineage.digests import tree_digest
from springhead.lineage.ledger import Ledger
from springhead.params import overlay
from tests.conftest import Project

ROOT = Path(__file__).parents[2]

# One stage that writes by each library the real stages write with, and that can run out of memory.
WRITER = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from springhead.jsonio import write_json, write_jsonl
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Params:
    kind: str
    size: int


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(stage: Stage[Params]) -> None:
    values = np.random.default_rng(0).random(stage.params.size)
    kind, target = stage.params.kind, stage.out / "data"
    write_json(stage.out / "first.json", "a whole file before the one that fails")
    if kind == "hdf5":
        from springhead.rl.dataset import Episode, write_dsrl

        rows = values.reshape(-1, 10).astype(np.float32)
        end, zeros = np.arange(len(rows)) == len(rows) - 1, np.zeros(len(rows), np.float32)
        write_dsrl(target, [Episode(rows, rows, rows[:, :2], zeros, zeros, end & False, end)])
    elif kind == "parquet":
        import pyarrow as pa
        from springhead.tables import write_table

        write_table(target, {"values": values}, pa.schema([("values", pa.float64())]))
    elif kind == "safetensors":
        from safetensors.numpy import save_file

        save_file({"values": values}, str(target))
    elif kind == "jsonl":
        write_jsonl(target, ({"value": float(value)} for value in values))
    elif kind == "png":
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import image

        image.imsave(target, values.reshape(-1, 100), format="png")
    elif kind == "checkpoint":
        np.save(stage.scratch / "checkpoint.npy", values)
    elif kind == "memory":
        hoard = []
        while len(hoard) < stage.params.size:
            hoard.append(np.zeros(10_000_000))
    elif kind == "worker" and stage.params.size:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(die).result()
    stage.dataset(stage.out / "first.json", "rows", 1, "output")


if __name__ == "__main__":
    run_stage(run, Params)
"""


def prepared(project: Project, kind: str, size: int) -> Project:
    project.write("stages/rl/make.py", WRITER)
    project.params(f"kind: {kind}, size: {size}")
    return project


def failed_cleanly(project: Project, done: subprocess.CompletedProcess[str]) -> None:
    """A failure leaves a message and nothing else: no output, no half of one, no lock entry."""
    assert done.returncode != 0
    assert done.stderr.strip()
    assert not list((project.root / "data").rglob("*make*"))
    assert not (project.root / "dvc.lock").exists()
    assert Ledger(project.root / ".springhead").verify() == []


@pytest.mark.fault("F12")
@pytest.mark.parametrize("kind", ["hdf5", "parquet", "safetensors", "jsonl", "png", "checkpoint"])
def test_a_disk_that_is_full_leaves_nothing_whatever_library_writes(project: Project, kind: str) -> None:
    prepared(project, kind, 300_000)
    # In blocks of a kilobyte: DVC's own database at the start of a stage takes some 200.
    done = project.run("bash", "-c", "ulimit -f 400; exec python -m stages.rl.make", check=False)
    failed_cleanly(project, done)
    assert [e["kind"] for e in Ledger(project.root / ".springhead").entries()] == ["failure"]
    if kind in ("hdf5", "jsonl"):  # the other libraries wrap the system's error in their own
        assert "File too large; free space, then run again" in done.stderr
        assert "Traceback" not in done.stderr
    project.run("python", "-m", "stages.rl.make")  # with room for it
    assert (project.root / "data/rl/make/first.json").is_file()


@pytest.mark.fault("F12")
def test_a_real_full_disk(project: Project) -> None:
    prepared(project, "jsonl", 300_000)
    (project.root / "data/rl").mkdir(parents=True)
    apart, mounted = ("unshare", "-rm", "sh", "-c"), "mount -t tmpfs -o size=300k none data/rl && "
    if project.run(*apart, f"{mounted}true", check=False).returncode != 0:
        pytest.skip("no user namespaces here; the limit on file sizes above stands in for the disk")
    script = f"{mounted}python -m stages.rl.make; status=$?; ls -A data/rl; exit $status"
    done = project.run(*apart, script, check=False)
    failed_cleanly(project, done)
    assert done.stdout == ""
    assert "No space left on device; free space, then run again" in done.stderr


@pytest.mark.fault("F26")
def test_a_stage_without_memory_fails_cleanly_and_its_attempts_are_counted(project: Project) -> None:
    prepared(project, "memory", 1000)
    done = project.run("bash", "-c", "ulimit -v 3000000; exec python -m stages.rl.make", check=False)
    failed_cleanly(project, done)
    assert "MemoryError" in done.stderr
    # A worker that the kernel's OOM killer takes is gone by SIGKILL; the pool tells the stage.
    prepared(project, "worker", 1)
    failed_cleanly(project, project.run("dvc", "repro", "rl-make", check=False))
    project.params("kind: worker, size: 0")
    project.run("dvc", "repro", "--quiet", "rl-make")
    entries = [(e["kind"], e["body"]["attempt"]) for e in Ledger(project.root / ".springhead").entries()]
    assert entries == [("failure", 1), ("failure", 1), ("execution", 1)]  # three inputs, one attempt at each
    prepared(project, "memory", 1000)
    again = project.run("bash", "-c", "ulimit -v 3000000; exec python -m stages.rl.make", check=False)
    assert again.returncode != 0
    assert Ledger(project.root / ".springhead").entries()[-1]["body"]["attempt"] == 2
    assert (project.root / "data/rl/make/first.json").is_file()  # what an earlier execution made stays


VARIED = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "tr_TR.UTF-8", "PYTHONHASHSEED": "42", "COLUMNS": "7"}


@pytest.mark.fault("F20")
def test_the_machine_leaves_no_trace_in_real_stages(tmp_path: Path) -> None:
    """Two real stages, one of them trains a language model, on what looks like two machines."""
    digests = []
    for name in ("here", "there"):
        root = tmp_path / name
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        wanted = ("springhead/", "stages/", "locks/", "dvc.yaml", "params.yaml", ".dvc/", ".dvcignore", "data/")
        for path in (p for p in listed.stdout.splitlines() if p.startswith(wanted) and (ROOT / p).is_file()):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, root / path)
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        smoke = yaml.safe_load((ROOT / "pipelines/profiles/smoke.yaml").read_text())
        (root / "params.yaml").write_text(yaml.safe_dump(overlay(params, smoke, "smoke"), sort_keys=False))
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        project = Project(root)
        project.env["PYTHONPATH"] = str(root)
        project.env.pop("SPRINGHEAD_HOME", None)
        before = "umask 077; exec taskset -c 0 " if name == "there" else "umask 022; exec "
        for stage in ("problems", "students small-llama"):
            command = f"{before}{sys.executable} -m stages.llm.{stage}"
            project.run("bash", "-c", command, **(VARIED if name == "there" else {}))
        digests.append({path: tree_digest(root / path) for path in ("data/llm", "data/receipts")})
    assert (tmp_path / "there/data/llm/problems").stat().st_mode & 0o077 == 0  # it did run otherwise
    assert digests[0] == digests[1]
