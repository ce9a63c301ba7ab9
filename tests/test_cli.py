# ruff: noqa: F401, F811  (fixtures of pytest are imported, then named as arguments)
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from springhead.cli import app
from springhead.cli.catalogue import algorithms_of
from tests.lineage.conftest import root, sample_template
from tests.lineage.sample import DROPPED, EPISODES, TASK, episode

pytestmark = pytest.mark.unit

MODEL = f"data/rl/train/{TASK}/cdt/0/model"


class Shell:
    """Runs commands of the program inside a checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, list(arguments))
        return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def shell(root: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(root)
    monkeypatch.setenv("SPRINGHEAD_DEBUG", "")  # so that what --debug sets is taken back
    return Shell(root)


def test_lineage_prints_a_tree_and_json(shell: Shell) -> None:
    code, out, _ = shell("lineage", MODEL)
    assert code == 0
    assert "outlier: 6 kept, 2 dropped" in out
    code, out, _ = shell("lineage", f"row:{episode(DROPPED[0])}", "--json")
    assert code == 0
    assert json.loads(out)["decisions"][0]["row"]["kept"] is False


def test_lineage_lists_row_ids(shell: Shell) -> None:
    code, out, _ = shell("lineage", f"data/rl/collect/{TASK}", "--rows")
    assert (code, out.split()) == (0, [episode(n) for n in range(EPISODES)])


def test_it_works_below_the_root(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shell.root / "data" / "rl")
    assert shell("lineage", MODEL)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lineage", "nonsense"), 2, "error: nonsense: not known here"),
        (("lineage",), 2, "Missing argument"),
        (("lineage", MODEL, "--nothing"), 2, "No such option"),
        (("why", "rl-train@Nowhere"), 2, "no such stage in dvc.yaml; there are rl-train@"),
        (("report", "--out", "data"), 2, "holds other files"),
        (("promote", "policy-x"), 2, "without gates nothing can be promoted"),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(shell: Shell, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = shell(*arguments)
    assert (found, "Traceback" in out + err) == (code, False)
    assert message in re.sub(r"\s+", " ", err)


def test_debug_shows_the_traceback_wherever_it_stands(shell: Shell) -> None:
    for arguments in (("--debug", "lineage", "nonsense"), ("lineage", "nonsense", "--debug")):
        code, _, err = shell(*arguments)
        assert code == 2
        assert "Traceback" in err
        assert "error: nonsense" in err


def test_outside_a_checkout_it_says_so(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = shell("audit")
    assert code == 2
    assert "run this inside a Springhead checkout" in err


def test_audit_is_0_when_green_and_1_when_red(shell: Shell) -> None:
    code, out, _ = shell("audit")
    assert (code, out.splitlines()[-1]) == (0, "audit: green")
    weights = shell.root / MODEL / "weights.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes() + b"1")
    code, out, _ = shell("audit")
    assert code == 1
    assert f"{MODEL}/weights.safetensors" in out
    assert f"affects {MODEL}" in out
    code, out, _ = shell("audit", "--json")
    assert code == 1
    assert json.loads(out)["red"] is True


def test_a_model_that_is_a_stage_of_its_own_commit_needs_no_registry(shell: Shell) -> None:
    code, _, err = shell("lineage", "policy-BallCircle@champion")
    assert code == 2
    assert "nothing is registered yet" in err


def test_why_names_the_parameter_the_code_and_the_data(shell: Shell) -> None:
    name = f"rl-train@{TASK}-cdt-0"
    assert shell("why", name) == (0, f"{name} is up to date\n", "")
    params = shell.root / "params.yaml"
    params.write_text(params.read_text().replace("steps: 50", "steps: 70"))
    code = shell.root / "stages/rl/train.py"
    code.write_text("# other\n")
    (shell.root / f"data/rl/filter/{TASK}/rows.parquet").unlink()
    _, out, _ = shell("why", name)
    assert out.splitlines() == [
        "parameter rl.train.steps: 50 → 70",
        f"data      data/rl/filter/{TASK}: has changed",
        "code      stages/rl/train.py: has changed",
    ]
    _, out, _ = shell("why", name, "--json")
    assert [change["runs"] for change in json.loads(out)] == [True, True, True]
    (shell.root / f"data/receipts/{name}.json").unlink()
    assert "has not run in this checkout" in shell("why", name)[1]


def test_status_shows_what_would_run(shell: Shell) -> None:
    code, out, _ = shell("status")
    assert code == 0
    assert out.count("up to date") == 17
    assert "ledger 17 entries; 0 executions wait for MLflow" in out
    params = shell.root / "params.yaml"
    params.write_text(params.read_text().replace("variants: 2", "variants: 3"))
    state = json.loads(shell("status", "--json")[1])
    changed = {row["stage"]: row["why"] for row in state["stages"] if row["state"] == "changed"}
    assert changed == {
        "llm-generate": "llm.generate.variants: 2 → 3",
        "llm-evaluate@small-llama": "llm.evaluate.variants: 2 → 3",
    }


def test_report_says_where_it_is(shell: Shell) -> None:
    code, out, _ = shell("report", "--out", "out")
    assert (code, out) == (0, f"report: {shell.root / 'out' / 'index.html'}\n")


def test_tasks_and_algorithms(shell: Shell) -> None:
    code, out, _ = shell("tasks")
    assert code == 0
    assert re.search(r"^bullet-safety-gym$", out, re.MULTILINE)
    assert re.search(r"^  BallRun +7 +2 +100  10, 20, 40 +binary +boundary, velocity$", out, re.MULTILINE)
    assert json.loads(shell("tasks", "--json")[1])["PointGoal1"]["limits"] == [20, 40, 80]
    code, out, _ = shell("tasks", "--check", "BallRun", "--steps", "20")
    assert code == 0
    assert out.startswith("BallRun: good; 20 steps, running, return ")
    assert shell("tasks", "--check", "BalRun")[0] == 2
    files = {entry["file"] for entry in json.loads(shell("algorithms", "--json")[1])}
    assert {"springhead/rl/offline/cdt.py", "springhead/rl/online/ppo_lag.py", "springhead/llm/mend.py"} <= files
    assert "Constrained Decision Transformer" in shell("algorithms")[1]


def test_only_modules_that_name_a_source_are_algorithms(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "a.py").write_text('"""The A method.\n\nSource: a paper\nin two lines.\n"""\n')
    (tmp_path / "llm" / "helper.py").write_text('"""Only a helper."""\n')
    expected = {"file": "springhead/llm/a.py", "title": "The A method", "source": "Source: a paper in two lines."}
    assert algorithms_of(tmp_path) == [expected]


def test_the_version_is_that_of_the_package(shell: Shell) -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert shell("--version") == (0, f"springhead {project['version']}\n", "")


@pytest.mark.e2e
def test_the_module_runs_and_imports_nothing_heavy_for_help(root: Path) -> None:
    code = (
        "import sys; from springhead.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'mlflow', 'dvc', 'pandas', 'numpy', 'duckdb', 'matplotlib', 'prefect'} & set(sys.modules); "
        "print('heavy:', sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "heavy: []" in done.stdout
    for command in ("run", "lineage", "audit", "promote", "report", "doctor", "tasks", "algorithms", "why", "status"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "springhead", "run", "--help"], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0
    assert "--workers" in done.stdout
