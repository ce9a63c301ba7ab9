"""Which stage next, and in which worktree: plain code that knows neither Prefect nor DVC.

A ready stage (its upstream has ended well) goes to an idle worktree; of several ready stages the
one that starts the longest remaining chain goes first. After a failure everything that does not
depend on the failed stage still runs.
"""

import queue
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.execution import Outcome
from pipelines.graph import Graph, Node

Finished = Callable[[Outcome], None]
Submit = Callable[[Node, Path, str | None, Finished], None]
"""Starts a stage in a worktree, on a GPU or none, and reports its end from any thread."""


@dataclass
class Schedule:
    """The state of one run.

    Attributes:
        graph: the stages to bring up to date.
        places: the worktrees, each for one stage at a time.
        gpus: identifiers of the GPUs; stages marked ``gpu`` each take one for themselves. If
            empty, such stages run like all others.
        urgency: larger goes first, from :meth:`Graph.urgency`.
    """

    graph: Graph
    places: Sequence[Path]
    gpus: Sequence[str] = ()
    urgency: Mapping[str, float] = field(default_factory=dict)
    on_start: Callable[[Node], None] = lambda node: None
    on_end: Callable[[Outcome], None] = lambda outcome: None
    on_idle: Callable[[Mapping[str, float]], None] = lambda running: None
    idle_seconds: float = 30.0

    def run(self, submit: Submit, settled: Collection[str] = ()) -> dict[str, Outcome]:
        """Runs everything and returns how each stage ended, in the order of the graph.

        Args:
            submit: starts a stage.
            settled: stages known to be up to date, which are not started.
        """
        outcomes = {n: Outcome(n, "up to date") for n in self.graph.nodes if n in settled or self._is_source(n)}
        idle, free_gpus = list(self.places), list(self.gpus)
        running: dict[str, tuple[Path, str | None, float]] = {}
        ended: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        while len(outcomes) < len(self.graph.nodes):
            for node in self._ready(outcomes, running):
                if not idle or (node.gpu and self.gpus and not free_gpus):
                    continue
                gpu = free_gpus.pop(0) if node.gpu and free_gpus else None
                place = idle.pop(0)
                running[node.name] = (place, gpu, time.monotonic())
                self.on_start(node)
                submit(node, place, gpu, ended.put)
            try:
                outcome = ended.get(timeout=self.idle_seconds)
            except queue.Empty:
                now = time.monotonic()
                self.on_idle({name: now - started for name, (_, _, started) in running.items()})
                continue
            place, gpu, _ = running.pop(outcome.stage)
            idle.append(place)
            if gpu is not None:
                free_gpus.append(gpu)
            self._record(outcome, outcomes)
        return {name: outcomes[name] for name in self.graph.stages}

    def _is_source(self, name: str) -> bool:
        return self.graph.nodes[name].source

    def _ready(self, outcomes: Mapping[str, Outcome], running: Collection[str]) -> list[Node]:
        """Returns the stages that may start, the most urgent first."""
        open_ = [n for name, n in self.graph.nodes.items() if name not in outcomes and name not in running]
        ready = [node for node in open_ if all(name in outcomes for name in node.upstream)]
        return sorted(ready, key=lambda node: -self.urgency.get(node.name, 0.0))

    def _record(self, outcome: Outcome, outcomes: dict[str, Outcome]) -> None:
        outcomes[outcome.stage] = outcome
        self.on_end(outcome)
        if outcome.state == "failed":
            for name in self.graph.descendants(outcome.stage):
                if name not in outcomes:
                    outcomes[name] = Outcome(name, "skipped", error=f"needs {outcome.stage}, which failed")
