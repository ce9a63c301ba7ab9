"""A light two-branch DVC project: real DVC and git, stages that take no time."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import json, os, pathlib, sys, time
import yaml

kind, *rest = sys.argv[1:]
params = yaml.safe_load(open("params.yaml"))
if kind == "make":
    time.sleep(float(params["a"]["pause"]))
    out = pathlib.Path("data/a/make") / rest[0]
    out.mkdir(parents=True)
    (out / "rows.txt").write_text((rest[0] + chr(10)) * params["a"]["rows"])
    print("made", rest[0], "with", params["a"]["rows"], "rows")
elif kind == "sum":
    total = sum(len(p.read_text().splitlines()) for p in sorted(pathlib.Path("data/a/make").glob("*/rows.txt")))
    pathlib.Path("data/metrics").mkdir(parents=True, exist_ok=True)
    pathlib.Path("data/a/sum.txt").write_text(str(total))
    pathlib.Path("data/metrics/a-sum.json").write_text(json.dumps({"total": total}))
elif kind == "read":
    pathlib.Path("data/b").mkdir(parents=True, exist_ok=True)
    text = pathlib.Path("source.txt").read_text()
    if "bad" in text:
        sys.exit("source.txt: row 7 is bad")
    pathlib.Path("data/b/read.txt").write_text(text.upper())
elif kind == "check":
    total = json.loads(pathlib.Path("data/metrics/a-sum.json").read_text())["total"]
    pathlib.Path("data/b/check.txt").write_text(pathlib.Path("data/b/read.txt").read_text() + str(total))
"""

FILES = {
    "work.py": WORK,
    "source.txt": "hello\n",
    "params.yaml": "seed: 0\na:\n  tasks: [x, y]\n  rows: 2\n  pause: 0\nb: {words: 3}\n",
    "pipelines/profiles/smoke.yaml": "a:\n  rows: 1\n",
    ".gitignore": "/.springhead/\n/.site/\n/data/a/\n/data/b/\n__pycache__/\n",
    ".dvcignore": "/.springhead\n",
    "dvc.yaml": """
stages:
  a-make:
    matrix: {task: "${a.tasks}"}
    desc: write rows
    meta: {retry: 1}
    cmd: python work.py make ${item.task}
    deps: [work.py]
    params: [a.rows, a.pause]
    outs: ["data/a/make/${item.task}"]
  a-sum:
    cmd: python work.py sum
    deps: [work.py, "data/a/make"]
    outs: [data/a/sum.txt]
    metrics: [data/metrics/a-sum.json: {cache: false}]
  b-read:
    meta: {gpu: true}
    cmd: python work.py read
    deps: [work.py, source.txt]
    outs: [data/b/read.txt]
  b-check:
    cmd: python work.py check
    deps: [work.py, data/b/read.txt, data/metrics/a-sum.json]
    outs: [data/b/check.txt]
""",
}


class Light:
    """A project in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / ".springhead"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "PREFECT_", "SPRINGHEAD_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # The code under test, for a project that has no `pipelines` package of its own.
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DVC_SITE_CACHE_DIR": str(root / ".site"),
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the project and returns it with its output."""
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env={**self.env, **env})
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def dvc(self, *arguments: str, place: Path | None = None) -> None:
        """Runs a DVC command in this process, which spares DVC's start."""
        from dvc.cli import main

        with contextlib.chdir(place or self.root):
            assert main([*arguments]) == 0, arguments

    def write(self, name: str, text: str) -> None:
        """Writes a file of the project."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name: str) -> str:
        """Reads a file of the project."""
        return (self.root / name).read_text()

    def git(self, *arguments: str) -> str:
        """Runs git and returns its output."""
        return self.run("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments).stdout.strip()


def make_project(root: Path) -> Light:
    """Makes the project, committed, nothing run yet."""
    made = Light(root)
    for name, text in FILES.items():
        made.write(name, text)
    made.run("git", "init", "-q", "-b", "main")
    made.run("dvc", "init", "-q")
    made.write(".dvcignore", FILES[".dvcignore"])
    made.git("add", "-A")
    made.git("commit", "-qm", "start")
    return made


@pytest.fixture(autouse=True)
def _offline_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment that tools run in the test process itself need."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.delenv("SPRINGHEAD_HOME", raising=False)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The light project, made once: a copy costs a hundredth of `dvc init`."""
    return make_project(tmp_path_factory.mktemp("template") / "light").root


@pytest.fixture(scope="session")
def built_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The light project after a plain ``dvc repro``."""
    root = tmp_path_factory.mktemp("built") / "light"
    shutil.copytree(template, root)
    Light(root).run("dvc", "repro", "-q")
    return root


@pytest.fixture
def light(template: Path, tmp_path: Path) -> Light:
    """A fresh light project, nothing run yet."""
    shutil.copytree(template, tmp_path / "light")
    return Light(tmp_path / "light")


@pytest.fixture
def built(built_template: Path, tmp_path: Path) -> Light:
    """A light project in which everything is up to date."""
    shutil.copytree(built_template, tmp_path / "light")
    return Light(tmp_path / "light")
