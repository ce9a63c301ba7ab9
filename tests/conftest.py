"""Shared fixtures: a tiny real project, and an environment in which every tool is offline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dvc  # noqa: F401  (its log writes to the stdout of its import: a command's own would be closed when a test ends)
import pytest

import stages  # noqa: F401  (sets the threads and the offline switches before NumPy loads)

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

PROJECT_FILES = {
    "stages/__init__.py": (Path(__file__).parent.parent / "stages/__init__.py").read_text(),
    "stages/rl/__init__.py": "",
    "stages/rl/make.py": """
import time
from dataclasses import dataclass
from springhead.errors import BadInput, Finding
from springhead.jsonio import write_json
from springhead.stage import Stage, run_stage

@dataclass(frozen=True)
class Params:
    rows: int
    pause: float = 0.0
    fail: str = ""

def run(stage: Stage[Params]) -> None:
    text = (stage.root / "source.txt").read_text()
    time.sleep(stage.params.pause)
    if stage.params.fail == "import":
        import stages.rl.helper
    write_json(stage.out / "rows.json", [f"{text.strip()}-{i}-{stage.seed}" for i in range(stage.params.rows)])
    if stage.params.fail == "finding":
        raise Finding("row source-0 is red")
    if stage.params.fail == "bad":
        raise BadInput("rows.json: no good; mend it")
    if stage.params.fail == "big":
        (stage.out / "big.bin").write_bytes(b"0" * 20_000_000)
    stage.dataset(stage.out / "rows.json", "rows", stage.params.rows, "output")

if __name__ == "__main__":
    run_stage(run, Params)
""",
    "stages/rl/helper.py": "VALUE = 1\n",
    "stages/rl/use.py": """
from dataclasses import dataclass
from springhead.jsonio import read_json, write_json
from springhead.stage import Stage, run_stage

@dataclass(frozen=True)
class Params:
    factor: float

def run(stage: Stage[Params]) -> None:
    rows = read_json(stage.input("make") / "rows.json")
    model = stage.out / "model"
    write_json(model / "config.json", {"rows": len(rows), "kind": stage.item["kind"], "factor": stage.params.factor})
    stage.dataset(stage.input("make"), "rows", len(rows), "training")
    stage.model(model, "policy", kind_of=stage.item["kind"])
    stage.metrics({"score": stage.params.factor * len(rows)})

if __name__ == "__main__":
    run_stage(run, Params)
""",
    "source.txt": "source\n",
    "params.yaml": "seed: 3\nrl:\n  make: {rows: 4}\n  use: {factor: 0.5}\n",
    "locks/rl.lock": "numpy=={numpy}\n",
    ".gitignore": "/.springhead/\n/data/*/\n__pycache__/\n",
    "dvc.yaml": """
stages:
  rl-make:
    cmd: python -m stages.rl.make
    deps: [stages/rl/make.py, source.txt, locks/rl.lock]
    params: [seed, rl.make]
    outs: [data/rl/make, data/receipts/rl-make.json]
  rl-use:
    matrix: {kind: [a, b]}
    cmd: python -m stages.rl.use ${item.kind}
    deps: [stages/rl/use.py, data/rl/make, locks/rl.lock]
    params: [seed, rl.use]
    outs: ["data/rl/use/${item.kind}", "data/receipts/rl-use@${item.kind}.json"]
    metrics: ["data/metrics/rl-use@${item.kind}.json"]
""",
}


@pytest.fixture(scope="session", autouse=True)
def _own_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests sign with a key of their own, not with the user's."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    for name in ("SPRINGHEAD_SIGNING_KEY", "SPRINGHEAD_SIGNING_COMMAND", "SPRINGHEAD_SIGNING_PUBLIC_KEY"):
        os.environ.pop(name, None)


class Project:
    """A small DVC project in a folder of its own, whose stages run in the real harness."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(root / ".site"),
            "SPRINGHEAD_TRACKING": "spool",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.env.pop("SPRINGHEAD_DEBUG", None)  # would add tracebacks to the errors under test

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the project and returns it with its output."""
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env={**self.env, **env})
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def write(self, name: str, text: str) -> None:
        """Writes a file of the project."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def params(self, text: str) -> None:
        """Replaces the parameters of the ``make`` stage."""
        self.write("params.yaml", f"seed: 3\nrl:\n  make: {{{text}}}\n  use: {{factor: 0.5}}\n")


@pytest.fixture(scope="session")
def project_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project under git and DVC, made once."""
    import numpy

    made = Project(tmp_path_factory.mktemp("template") / "project")
    for name, text in PROJECT_FILES.items():
        made.write(name, text.replace("{numpy}", numpy.__version__) if name.endswith(".lock") else text)
    made.run("git", "init", "-q", "-b", "main")
    made.run("dvc", "init", "-q")
    made.run("git", "add", "-A")
    made.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start")
    return made.root


@pytest.fixture
def project(project_template: Path, tmp_path: Path) -> Project:
    """A fresh tiny project under git and DVC, nothing run yet."""
    shutil.copytree(project_template, tmp_path / "project")
    return Project(tmp_path / "project")
