"""Which stage goes where and when, with a submit function that the test controls."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.execution import Outcome
from pipelines.graph import Graph, Node
from pipelines.scheduler import Finished, Schedule

pytestmark = pytest.mark.unit

NODES = {
    "a": Node("a"),
    "b": Node("b", ("a",)),
    "c": Node("c", ("a",)),
    "d": Node("d", ("b", "c")),
    "e": Node("e"),
}


class Machine:
    """Ends the stage that was started first whenever ``limit`` of them are running."""

    def __init__(self, fail: str = "") -> None:
        self.started: list[str] = []
        self.placed: dict[str, tuple[str, str | None]] = {}
        self.together: list[set[str]] = []
        self.fail = fail
        self._open: list[tuple[Node, Finished]] = []

    def submit(self, node: Node, place: Path, gpu: str | None, finished: Finished) -> None:
        self.started.append(node.name)
        self.placed[node.name] = (place.name, gpu)
        self._open.append((node, finished))
        self.together.append({n.name for n, _ in self._open})

    def idle(self, running: object) -> None:
        node, finished = self._open.pop(0)
        finished(Outcome(node.name, "failed" if node.name == self.fail else "executed", error="broke"))


def run(machine: Machine, nodes: dict[str, Node], workers: int = 2, **options: object) -> dict[str, Outcome]:
    places = [Path(f"w{k}") for k in range(workers)]
    settled = options.pop("settled", ())
    schedule = Schedule(Graph(nodes), places, on_idle=machine.idle, idle_seconds=0.01, **options)  # type: ignore[arg-type]
    return schedule.run(machine.submit, settled)  # type: ignore[arg-type]


def states(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {name: outcome.state for name, outcome in outcomes.items()}


def test_upstream_first_and_never_two_stages_in_one_worktree() -> None:
    machine = Machine()
    outcomes = run(machine, NODES)
    assert set(states(outcomes).values()) == {"executed"}
    assert list(outcomes) == list("abcde")
    order = machine.started.index
    assert order("a") < order("b") < order("d")
    assert order("c") < order("d")
    for running in machine.together:
        assert len(running) <= 2
        assert len({machine.placed[name][0] for name in running}) == len(running)


def test_the_longest_chain_goes_first() -> None:
    machine = Machine()
    run(machine, NODES, workers=1, urgency=Graph(NODES).urgency({"e": 1, "c": 9}))
    assert machine.started == ["a", "c", "b", "d", "e"]
    machine = Machine()
    run(machine, NODES, workers=1, urgency=Graph(NODES).urgency({"e": 100}))
    assert machine.started[0] == "e"


def test_a_failure_skips_only_what_depends_on_it() -> None:
    machine = Machine(fail="b")
    outcomes = run(machine, NODES)
    assert states(outcomes) == {"a": "executed", "b": "failed", "c": "executed", "d": "skipped", "e": "executed"}
    assert "needs b" in outcomes["d"].error


def test_settled_stages_are_not_started() -> None:
    machine = Machine()
    outcomes = run(machine, NODES, settled={"a", "b"})
    assert sorted(machine.started) == ["c", "d", "e"]
    assert outcomes["a"].state == "up to date"


def test_sources_are_never_started() -> None:
    machine = Machine()
    outcomes = run(machine, {"raw.dvc": Node("raw.dvc", source=True), "a": Node("a", ("raw.dvc",))})
    assert machine.started == ["a"]
    assert list(outcomes) == ["a"]


@pytest.mark.parametrize(("gpus", "most"), [(("0",), 1), (("0", "1"), 2), ((), 4)])
def test_gpu_stages_take_a_gpu_each(gpus: tuple[str, ...], most: int) -> None:
    machine = Machine()
    nodes = {name: Node(name, gpu=True) for name in "abcd"}
    run(machine, nodes, workers=4, gpus=gpus)
    assert max(len(running) for running in machine.together) == most
    for running in machine.together:
        taken = [machine.placed[name][1] for name in running]
        assert taken == [None] * len(taken) if not gpus else len(set(taken)) == len(taken)


def test_other_stages_run_beside_a_busy_gpu() -> None:
    machine = Machine()
    nodes = {"a": Node("a", gpu=True), "b": Node("b", gpu=True), "c": Node("c")}
    run(machine, nodes, workers=2, gpus=("0",))
    assert {"a", "c"} in machine.together


def test_every_end_is_reported() -> None:
    seen: list[str] = []
    end: Callable[[Outcome], None] = lambda outcome: seen.append(outcome.stage)  # noqa: E731
    run(Machine(), NODES, on_end=end)
    assert sorted(seen) == list("abcde")
