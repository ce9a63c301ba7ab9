"""The Python blocks of docs/guide/data-sets.md, run as they stand on a data set like those of the collect stage."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from springhead.rl.dataset import write_dsrl, write_minari
from springhead.rl.facts import Fact, sums, write_rows
from springhead.rl.tasks import task
from tests.rl.test_dataset import make_episode

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers/bin/python"
TEXT = (ROOT / "docs/guide/data-sets.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    folder = root / "data/rl/collect/BallCircle"
    folder.mkdir(parents=True)
    episodes = [make_episode(200, seed) for seed in range(4)]
    write_dsrl(folder / "dataset.hdf5", episodes)
    write_minari(folder / "minari", "springhead/BallCircle-v0", episodes, task("BallCircle"))
    made = {"policy": "ab" * 32, "algorithm": "cpo", "cost_limit": 10.0, "deterministic": False, "source": None}
    facts = [Fact(group=0, place=i, seed=i, **made, **sums(e)) for i, e in enumerate(episodes)]
    write_rows(folder / "rows.parquet", facts)
    return root


def run(block, checkout, python=sys.executable):
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])} if python == sys.executable else {}
    environment = {**os.environ, **path, "DSRL_SUPPRESS_IMPORT_ERROR": "1"}
    done = subprocess.run(
        [python, "-c", BLOCKS[block]], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_block_is_run_here():
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == set(BLOCKS)
    assert TEXT.count("```python") == len(BLOCKS)


def test_springhead(checkout):
    assert run("springhead", checkout).startswith("4 800 ")


def test_h5py(checkout):
    assert run("h5py", checkout) == "4 (200, 8)\n"


def test_minari(checkout):
    assert len(run("minari", checkout).splitlines()) == 2


def test_rows(checkout):
    assert "cpo" in run("rows", checkout)


@pytest.mark.skipif(importlib.util.find_spec("dsrl") is None, reason="dsrl is not installed")
def test_dsrl(checkout):
    assert "(" in run("dsrl", checkout)


@pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers; `make peers` builds it")
def test_osrl(checkout):
    run("osrl", checkout, str(PEERS))


@pytest.mark.skipif(importlib.util.find_spec("d3rlpy") is None, reason="d3rlpy is not installed")
def test_d3rlpy(checkout):
    assert run("d3rlpy", checkout).splitlines()[-1] == "4"
