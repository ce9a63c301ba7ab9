"""Whole runs of a real DVC project, with threads in the place of Prefect's tasks."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import session as module
from pipelines.execution import Executor, Outcome, StageFailed
from pipelines.finish import conclude, raise_if_red
from pipelines.graph import Node, changed
from pipelines.scheduler import Finished, Submit
from pipelines.session import Request, Result, Session, check_targets, exclusive, last_seconds, nothing_to_do
from springhead.errors import BadInput, Finding
from springhead.lineage.ledger import Ledger
from tests.conftest import Project
from tests.pipelines.conftest import Light

pytestmark = pytest.mark.e2e


def submitter(before: Callable[[str], None] = lambda name: None) -> Callable[[Executor], Submit]:
    """Starts each stage in a thread, after calling ``before`` with its name."""

    def make(executor: Executor) -> Submit:
        def submit(node: Node, place: Path, gpu: str | None, finished: Finished) -> None:
            def body() -> None:
                try:
                    before(node.name)
                    finished(executor.execute(node, place, lambda line: None, gpu))
                except StageFailed as error:
                    finished(error.outcome)
                except Exception as error:
                    finished(Outcome(node.name, "failed", error=repr(error)))

            threading.Thread(target=body).start()

        return submit

    return make


class Run:
    """Performs a run and keeps what it said."""

    def __init__(self, light: Light, **request: object) -> None:
        self.said: list[str] = []
        self.request = Request(**{"workers": 2, **request})  # type: ignore[arg-type]
        self.session = Session(light.root, light.home, self.request, "flow-1", self.said.append, self.said.append)

    def perform(self, before: Callable[[str], None] = lambda name: None) -> Result:
        self.session.home.mkdir(exist_ok=True)
        return self.session.perform(submitter(before))


def states(result: Result) -> dict[str, str]:
    return {name: outcome.state for name, outcome in result.outcomes.items()}


def test_a_run_ends_with_the_same_lock_and_data_as_dvc_repro(light: Light, built_template: Path) -> None:
    run = Run(light)
    result = run.perform()
    plain = Light(built_template)
    assert set(states(result).values()) == {"executed"}
    assert light.read("dvc.lock") == plain.read("dvc.lock")
    for name in ("data/b/check.txt", "data/a/sum.txt", "data/metrics/a-sum.json", "data/a/make/x/rows.txt"):
        assert light.read(name) == plain.read(name)
    assert light.git("status", "--porcelain") == "?? data/\n?? dvc.lock"  # the metrics, which git keeps
    assert changed(light.root) == {}
    # Nothing is left but the record, and it can be checked out.
    assert not list((light.home / "worktrees").iterdir())
    assert light.git("worktree", "list").count("\n") == 0
    assert light.git("show", f"refs/springhead/runs/{result.run}:dvc.lock") == light.read("dvc.lock").strip()
    assert any("[a-make@x] made x with 2 rows" in line for line in run.said)
    assert "made x" in (light.home / "runs" / result.run / "logs" / "a-make@x.log").read_text()
    again = nothing_to_do(light.root, run.request)
    assert again is not None
    assert set(states(again).values()) == {"up to date"}


def test_targets_are_looked_up_under_the_parameters_of_the_run(light: Light) -> None:
    def check(*targets: str, **request: object) -> None:
        check_targets(light.root, light.home, Request(1, targets=targets, **request))  # type: ignore[arg-type]

    check()
    check("a-make", "b-check", "a-make@y")
    with pytest.raises(BadInput, match="no stage 'a-mak@x'; did you mean a-make@x, a-make"):
        check("b-check", "a-mak@x")
    other = ("a.tasks=[x, z]",)
    check("a-make@z", settings=other)
    with pytest.raises(BadInput, match="no stage 'a-make@y'; did you mean a-make"):
        check("a-make@y", settings=other)
    with pytest.raises(BadInput, match="no such profile"):
        check("a-make", profile="papper")
    assert not (light.home / "worktrees").exists()


def test_only_what_an_edit_touches_runs_again(built: Light) -> None:
    built.write("source.txt", "other\n")
    ended = states(Run(built).perform())
    # a-sum reads a folder above its upstream's outputs: only a checkout could tell that it is up to date.
    assert ended.pop("a-sum") == "cached"
    assert ended == {
        "a-make@x": "up to date",
        "a-make@y": "up to date",
        "b-read": "executed",
        "b-check": "executed",
    }
    assert built.read("data/b/check.txt") == "OTHER\n4"
    assert built.read("source.txt") == "other\n"


def test_results_of_an_earlier_state_come_from_the_cache(built: Light) -> None:
    built.write("source.txt", "other\n")
    Run(built).perform()
    built.write("source.txt", "hello\n")
    result = Run(built).perform()
    assert "executed" not in states(result).values()
    assert states(result)["b-read"] == "cached"
    assert built.read("data/b/check.txt") == "HELLO\n4"


def test_a_failure_is_named_and_the_other_branch_finishes(light: Light) -> None:
    light.write("source.txt", "bad\n")
    run = Run(light)
    result = run.perform()
    assert states(result) == {
        "a-make@x": "executed",
        "a-make@y": "executed",
        "a-sum": "executed",
        "b-read": "failed",
        "b-check": "skipped",
    }
    assert light.read("data/a/sum.txt") == "4"  # what is good is delivered
    assert "row 7 is bad" in result.outcomes["b-read"].error
    conclusion = conclude(result, light.root, light.home, run.request, True, run.said.append)
    assert conclusion.counts() == "stages: 3 executed, 1 failed, 1 skipped, 0 up to date"
    with pytest.raises(Finding, match=r"(?s)b-read failed.*row 7 is bad"):
        raise_if_red(conclusion)
    light.write("source.txt", "good\n")
    assert states(Run(light).perform())["b-check"] == "executed"


def test_an_edit_during_the_run_changes_nothing_in_it(light: Light) -> None:
    edited = threading.Event()

    def edit(stage: str) -> None:
        if not edited.is_set():
            edited.set()
            light.write("source.txt", "later\n")

    result = Run(light).perform(edit)
    assert light.read("data/b/read.txt") == "HELLO\n"
    assert light.read("source.txt") == "later\n"
    assert any("source.txt changed during the run: b-read would run again" in note for note in result.notes)
    assert list(changed(light.root)) == ["b-read"]


def test_parameters_edited_during_the_run_leave_the_checkout_alone(light: Light) -> None:
    text = light.read("params.yaml").replace("rows: 2", "rows: 9")
    result = Run(light, targets=("a-make",)).perform(lambda stage: light.write("params.yaml", text))
    assert not (light.root / "dvc.lock").exists()
    assert result.place == light.home / "results" / "quick"
    assert "params.yaml changed during the run" in result.notes[0]
    assert (result.place / "data/a/make/x/rows.txt").read_text() == "x\nx\n"


def test_a_profile_leaves_the_checkout_as_it_is(built: Light) -> None:
    before = built.git("status", "--porcelain"), built.read("dvc.lock"), built.read("params.yaml")
    result = Run(built, profile="smoke", settings=("b.words=4",)).perform()
    assert (built.git("status", "--porcelain"), built.read("dvc.lock"), built.read("params.yaml")) == before
    assert built.read("data/a/sum.txt") == "4"
    assert result.place.parent == built.home / "results"
    assert (result.place / "data/a/sum.txt").read_text() == "2"
    assert (result.place / "data/metrics/a-sum.json").read_text() == '{"total": 2}'
    assert states(result)["b-read"] == "up to date"
    assert changed(result.place) == {}
    again = Run(built, profile="smoke", settings=("b.words=4",)).perform()  # the folder is replaced
    assert "executed" not in states(again).values()
    assert again.place == result.place


def test_a_target_runs_what_it_needs_only(light: Light) -> None:
    result = Run(light, targets=("b-read",)).perform()
    assert states(result) == {"b-read": "executed"}
    assert nothing_to_do(light.root, Request(1, targets=("b-read",))) is not None
    assert nothing_to_do(light.root, Request(1)) is None


def test_data_changed_by_hand_is_not_overwritten(built: Light) -> None:
    built.run("rm", "data/b/check.txt")
    built.write("data/b/check.txt", "mine")
    with pytest.raises(BadInput, match="Move your own changes away"):
        Run(built).perform()
    assert built.read("data/b/check.txt") == "mine"


@pytest.mark.fault
def test_worktrees_of_a_killed_run_are_removed(built: Light) -> None:
    left = built.home / "worktrees" / "20200101-000000-dead"
    built.git("worktree", "add", "--detach", "-q", str(left / "0"))
    (left / "owner").write_text(module.identity(built.root))
    foreign = built.home / "worktrees" / "20200101-000000-beef"
    foreign.mkdir()
    (foreign / "owner").write_text("another checkout")
    built.write("source.txt", "other\n")
    Run(built).perform()
    assert not left.exists()
    assert foreign.exists()
    assert built.git("worktree", "list").count("\n") == 0


def test_a_second_run_is_refused_or_waits(light: Light) -> None:
    light.home.mkdir()
    said: list[str] = []
    with exclusive(light.root, light.home, wait=False):
        with pytest.raises(BadInput, match=r"another `springhead run`.*pid \d+.*--wait"):
            with exclusive(light.root, light.home, wait=False):
                pass
        waiting = threading.Thread(target=lambda: exclusive(light.root, light.home, True, said.append).__enter__())
        waiting.start()
        while not said:
            waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(30)
    assert not waiting.is_alive()


def test_the_state_folder_never_gets_into_git(light: Light) -> None:
    light.write(".gitignore", "/data/a/\n/data/b/\n__pycache__/\n")
    light.git("commit", "-qam", "forgot to ignore the state folder")
    result = Run(light, targets=("b-read",)).perform()
    assert ".springhead" not in light.git("ls-tree", "-r", "--name-only", f"refs/springhead/runs/{result.run}")
    assert ".springhead" not in light.git("status", "--porcelain")


def test_estimates_come_from_the_last_execution(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert last_seconds(tmp_path) == {}
    ledger.append("execution", {"execution": "x", "receipt": "0" * 64, "stage": "a", "seconds": 5.0})
    ledger.append("failure", {"stage": "a", "seconds": 1.0})
    ledger.append("execution", {"execution": "x", "receipt": "0" * 64, "stage": "a", "seconds": 7.5})
    assert last_seconds(tmp_path) == {"a": 7.5}


@pytest.mark.parametrize(("visible", "found"), [("0,1", ["0", "1"]), ("", []), ("-1", []), ("GPU-ab", ["GPU-ab"])])
def test_visible_gpus_follow_the_environment(monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert module.visible_gpus() == found


def test_a_run_of_the_real_harness_is_tracked_and_reported(project: Project) -> None:
    light = Light(project.root)
    run = Run(light)
    result = run.perform()
    assert set(states(result).values()) == {"executed"}
    conclusion = conclude(result, light.root, light.home, run.request, True, run.said.append)
    entries = [e["body"] for e in Ledger(light.home).entries() if e["kind"] == "execution"]
    assert {e["stage"] for e in entries} == {"rl-make", "rl-use@a", "rl-use@b"}
    assert {e["git"]["revision"] for e in entries} == {light.git("rev-parse", "HEAD")}
    assert not any(e["git"]["dirty"] for e in entries)
    assert "flow-1" in (light.home / "ledger.jsonl").read_text()
    assert (light.root / conclusion.places["report"]).is_file()
    assert (light.home / "mlflow.db").is_file()
    assert not list((light.home / "spool").glob("*.jsonl"))
    assert last_seconds(light.home).keys() == {"rl-make", "rl-use@a", "rl-use@b"}
