"""The snippets of docs/guide/importing-data.md run as they are printed, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from springhead.params import load
from springhead.rl.dsrl_file import write_dsrl
from springhead.rl.importers import Source
from springhead.rl.minari_file import write_minari
from springhead.rl.tasks import task
from tests.rl.foreign_files import make_episodes

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guide/importing-data.md").read_text(encoding="utf-8")
PEERS = ROOT / ".venv-peers/bin/python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with a collected data set of three episodes where the snippets expect it."""
    root = tmp_path_factory.mktemp("checkout")
    folder = root / "data/rl/collect/BallCircle"
    folder.mkdir(parents=True)
    write_dsrl(folder / "dataset.hdf5", make_episodes())
    write_minari(folder / "minari", "springhead/BallCircle-v0", make_episodes(), task("BallCircle"))
    return root


def snippet(section):
    return re.search(rf"## {section}\n.*?```python\n(.*?)```", PAGE, re.DOTALL).group(1)


def printed(python, section, where):
    done = subprocess.run([python, "-c", snippet(section)], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("section", "last"), [("h5py", "3 episodes"), ("DSRL", "430 steps"), ("Minari", "3 episodes")])
def test_a_snippet_reads_our_data(checkout, section, last):
    assert printed(sys.executable, section, checkout) == last


@pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers; `make peers` builds it")
@pytest.mark.slow
def test_the_osrl_snippet_reads_our_data(checkout):
    assert printed(str(PEERS), "OSRL", checkout) == "3 episodes"


def test_the_entries_of_the_page_are_understood():
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL).group(1)
    text = text.replace("<40 digits>", "ab" * 20).replace("<64 digits>", "ab" * 32)
    entries = yaml.safe_load(text)["rl"]["imports"]["sources"]
    assert [load(Source, entry, "the page").format for entry in entries] == ["dsrl", "minari", "d4rl"]
