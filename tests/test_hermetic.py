"""Hermetic stages: whatever reads an undeclared file, and however, the stage fails and names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Project

# Runs each probe as the body of a stage that declares data/rl/make and locks/rl.lock. In a process of
# its own, because an audit hook cannot be taken away again.
PROBES = """
import contextlib, json, os, shutil, socket, sqlite3, subprocess, sys, urllib.request
from pathlib import Path

import duckdb, h5py, numpy as np, pyarrow.parquet as pq
from safetensors import safe_open

from springhead import hermetic
from springhead.declared import Declared
from springhead.errors import BadInput

root = Path.cwd()
declared = Declared(
    "rl-use@a",
    ("data/rl/make", "data/rl/verdict/v.json", "locks/rl.lock", "stages/rl/use.py"),
    ("seed", "rl.use"),
    ("data/rl/use/a", "data/receipts/rl-use@a.json"),
)
out, home, other = root / "data/rl/use/.a.tmp-1", root / ".springhead", root / "data/rl/other"
(home / "scratch/rl-use").mkdir(parents=True)


def swallow():
    with contextlib.suppress(Exception):
        (other / "rows.csv").read_text()


def connect(host):
    with socket.socket() as client:
        client.settimeout(0.2)
        client.connect((host, 9))


def local():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def fork():
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BadInput):
            (other / "rows.csv").read_text()
        os._exit(0)
    os.waitpid(child, 0)


def cleanup():
    (home / "scratch/rl-use/data").mkdir()  # named as a folder of the repository
    (home / "scratch/rl-use/data/checkpoint").write_text("")
    shutil.rmtree(home / "scratch/rl-use/data")


def alias():
    os.chdir("/")
    try:
        Path(os.path.relpath(other / "rows.csv", "/")).read_text()
    finally:
        os.chdir(root)


probes = {
    # what a stage may do
    "declared": lambda: [(root / "data/rl/make/rows.csv").read_text(), sorted((root / "data/rl/make").iterdir())],
    "declared file in a folder": lambda: (root / "data/rl/verdict/v.json").read_text(),
    "declared, natively": lambda: [h5py.File("data/rl/make/a.hdf5").close(), pq.read_table("data/rl/make/a.parquet")],
    "own output": lambda: [(out / "x").write_text("1"), (out / "x").read_text(), list(out.iterdir())],
    "parameters": lambda: Path("params.yaml").read_text(),
    "harness": lambda: __import__("stages.rl"),
    "packages": lambda: __import__("xmlrpc.client"),
    "elsewhere": lambda: Path("/etc/hostname").exists() and Path("/etc/passwd").read_text(),
    "missing": lambda: contextlib.suppress(OSError).__enter__() or (other / "nothing").exists(),
    "removal by descriptor": cleanup,
    "local server": local,
    # what it may not
    "open": lambda: (other / "rows.csv").read_text(),
    "os.open": lambda: os.close(os.open(other / "rows.csv", os.O_RDWR)),
    "relative": alias,
    "dots": lambda: Path("data/rl/make/../other/rows.csv").read_text(),
    "link": lambda: Path(sys.argv[1], "rows.csv").read_text(),
    "numpy": lambda: np.load(other / "a.npy"),
    "sqlite": lambda: sqlite3.connect(other / "a.db"),
    "listing": lambda: os.listdir(other),
    "iterdir": lambda: list(other.iterdir()),
    "neighbour": lambda: (root / "data/rl/verdict/w.json").read_text(),
    "prefix": lambda: (root / "data/rl/make-2/rows.csv").read_text(),
    "source": lambda: Path("source.txt").read_text(),
    "ledger": lambda: (home / "ledger.jsonl").read_text(),
    "import": lambda: __import__("stages.rl.helper"),
    "swallowed": swallow,
    "fork": fork,
    "network": lambda: connect("192.0.2.1"),
    "name": lambda: urllib.request.urlopen("http://example.invalid/x", timeout=0.2),
    "h5py": lambda: h5py.File(other / "a.hdf5").close(),
    "arrow": lambda: pq.read_table(other / "a.parquet"),
    "duckdb": lambda: duckdb.sql("from 'data/rl/other/a.parquet'").fetchall(),
    "safetensors": lambda: safe_open(str(other / "a.safetensors"), "np").keys(),
    "program": lambda: subprocess.run(["cat", "data/rl/other/rows.csv"], check=True, stdout=subprocess.DEVNULL),
}
found = {}
for name, probe in probes.items():
    out.mkdir(parents=True, exist_ok=True)
    found[name] = ""
    try:
        with hermetic.sealed(root, home, declared, out, home / "scratch/rl-use"):
            probe()
    except BadInput as error:
        found[name] = str(error)
left = [path.name for path in home.glob("offences-*")]
print(json.dumps([found, left, "SPRINGHEAD_SEAL" in os.environ]))
"""
ALLOWED = 11


def write_data(folder: Path) -> None:
    import h5py
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "rows.csv").write_text("a\n1\n")
    (folder / "a.db").write_bytes(b"")
    np.save(folder / "a.npy", np.ones(2))
    with h5py.File(folder / "a.hdf5", "w") as file:
        file["a"] = 1
    pq.write_table(pa.table({"a": [1]}), folder / "a.parquet")
    save_file({"a": np.ones(1)}, str(folder / "a.safetensors"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name in ("make", "make-2", "other"):
        write_data(root / "data/rl" / name)
    texts = {
        "dvc.yaml": "stages: {rl-use: {matrix: {kind: [a]}, cmd: x}}\n",
        "params.yaml": "seed: 0\n",
        "source.txt": "source\n",
        "data/rl/verdict/v.json": "{}",
        "data/rl/verdict/w.json": "{}",
        "stages/__init__.py": "",
        "stages/rl/__init__.py": '"""Nothing but words."""\n',
        "stages/rl/helper.py": "VALUE = 1\n",
        ".springhead/ledger.jsonl": "{}\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "link").symlink_to(root / "data/rl/other")
    return root


def probed(repository: Path, **env: str) -> dict[str, str]:
    environment = {**os.environ, "SPRINGHEAD_HERMETIC": "1", "PYTHONDONTWRITEBYTECODE": "1", **env}
    environment.pop("SPRINGHEAD_HOME", None)
    command = [sys.executable, "-c", PROBES, str(repository.parent / "link")]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, left, sealed = json.loads(done.stdout)
    assert left == []
    assert not sealed
    return dict(found)


@pytest.mark.fault
def test_every_way_of_reading_what_is_not_declared_is_found_and_named(repository: Path) -> None:
    found = probed(repository)
    names = list(found)
    assert {name: found[name] for name in names[:ALLOWED]} == dict.fromkeys(names[:ALLOWED], "")
    others = {
        "numpy": "reads data/rl/other/a.npy",
        "sqlite": "reads data/rl/other/a.db",
        "listing": "lists the folder data/rl/other",
        "iterdir": "lists the folder data/rl/other",
        "neighbour": "reads data/rl/verdict/w.json",
        "prefix": "reads data/rl/make-2/rows.csv",
        "source": "reads source.txt",
        "ledger": "reads .springhead/ledger.jsonl",
        "import": "reads stages/rl/helper.py",
        "h5py": "reads data/rl/other/a.hdf5",
        "arrow": "reads data/rl/other/a.parquet",
        "duckdb": "reads data/rl/other/a.parquet",
        "safetensors": "reads data/rl/other/a.safetensors",
        "network": "connects to 192.0.2.1:9",
        "name": "connects to example.invalid:80",
    }
    for name in names[ALLOWED:]:
        message = found[name]
        assert f"stage rl-use@a {others.get(name, 'reads data/rl/other/rows.csv')}" in message, (name, message)
        assert "add it to stages.rl-use.deps" in message or "data/sources.yaml" in message


@pytest.mark.unit
def test_without_the_switch_nothing_is_watched(repository: Path) -> None:
    environment = {**os.environ, "SPRINGHEAD_HERMETIC": ""}
    script = PROBES.replace("probes = {", "probes = {}\n_ = {").replace(
        "found = {}\n", "found = {}\nprobes = {'open': _['open'], 'h5py': _['h5py'], 'listing': _['listing']}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [{"open": "", "h5py": "", "listing": ""}, [], False], done.stderr


WORKERS = """
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from springhead.jsonio import write_json
from springhead.stage import Stage, run_stage
@dataclass(frozen=True)
class Params:
    factor: float

def work(root):
    {body}
    return 1

def run(stage: Stage[Params]) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        done = pool.submit(work, stage.root).exception()
    write_json(stage.out / "model.json", str(type(done)))
    stage.metrics({{"score": 1.0}})

if __name__ == "__main__":
    run_stage(run, Params)
"""


@pytest.mark.e2e
def test_workers_are_sealed_as_their_stage(project: Project) -> None:
    """What only a worker reads or imports is seen by no check of the stage's own process."""
    project.write("data/rl/make/rows.json", "[]")
    project.write("data/rl/use/b/rows.json", "[]")
    cases = {
        "import stages.rl.helper": "reads stages/rl/helper.py",
        "(root / 'source.txt').read_text()": "reads source.txt",
        "(root / 'data/rl/make/rows.json').read_text(); import xmlrpc.client": "",
    }
    for body, message in cases.items():
        project.write("stages/rl/use.py", WORKERS.format(body=body))
        done = project.run("python", "-m", "stages.rl.use", "a", check=False, SPRINGHEAD_HERMETIC="1")
        assert done.returncode == (2 if message else 0), done.stderr
        assert message in done.stderr
        if message:
            assert f"dvc.yaml: stage rl-use@a {message}, which it does not declare; add it to stages.rl-use.deps" in (
                done.stderr
            )
            assert not (project.root / "data/rl/use/a").exists()
