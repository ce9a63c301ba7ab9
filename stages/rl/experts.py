"""Trains the experts of one task: online algorithms under a moving cost limit, saved at many points on the way.

The limit moves over the range in which the data set shall have episodes, so the saved policies differ in how much
cost they accept. Several algorithms may run, each several times. Reads nothing; writes one folder per policy,
``index.json`` naming them, and ``history.csv``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from springhead.errors import BadInput
from springhead.jsonio import write_json
from springhead.lineage.digests import tree_digest
from springhead.params import load
from springhead.rl.acting import save_expert
from springhead.rl.online.algorithms import ALGORITHMS, algorithm
from springhead.rl.online.contract import Figures, Learner, OnlineConfig
from springhead.rl.online.rollouts import episode_seeds, roll_out
from springhead.rl.online.training import feasible_first, train
from springhead.rl.tasks import task
from springhead.rl.workers import EpisodeWorkers
from springhead.stage import Stage, run_stage

Settings = dict[str, dict[str, Any]]
"""Hyper-parameters by algorithm."""


@dataclass(frozen=True)
class Schedule:
    """What differs from task to task."""

    iterations: int
    """Training iterations of one run; each collects ``episodes_per_iteration`` whole episodes."""
    cost_limit_start: float
    """Episode cost limit until the ramp begins."""
    cost_limit_end: float
    """Episode cost limit from the ramp's end on; lower than the start makes experts safer as they train."""
    ramp_from: float
    """Fraction of the training at which the limit begins to move."""
    ramp_until: float
    """Fraction of the training at which it arrives."""
    settings: Settings = field(default_factory=dict)
    """Hyper-parameters for this task alone, by algorithm; they win over those of ``algorithms``."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or min(self.cost_limit_start, self.cost_limit_end) < 0:
            raise ValueError("iterations must be at least 1 and cost limits at least 0")
        if not 0 <= self.ramp_from <= self.ramp_until <= 1:
            raise ValueError(f"the ramp [{self.ramp_from}, {self.ramp_until}] must lie within [0, 1]")


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.experts``."""

    runs: dict[str, int]
    """Independent training runs per task, by algorithm. None at all gives an empty index: all data is imported."""
    policies: int
    """Policies saved per run, evenly over the iterations after ``save_from``; the last iteration is one of them."""
    save_from: float
    """Fraction of the training before which no policy is saved."""
    processes: int
    """Worker processes that run episodes, at most one per group of ``num_envs``; 1 runs them in the stage's own.
    Changes no byte of the result."""
    algorithms: Settings
    """Hyper-parameters by algorithm, fields of its configuration in ``springhead/rl/online``; others have defaults."""
    tasks: dict[str, Schedule]
    """Length and cost-limit ramp of each task."""

    def __post_init__(self) -> None:
        names = {*self.runs, *self.algorithms, *(name for one in self.tasks.values() for name in one.settings)}
        if unknown := sorted(names - set(ALGORITHMS)):
            raise ValueError(f"unknown algorithm {unknown[0]!r}; known: {', '.join(ALGORITHMS)}")
        if min(self.policies, self.processes) < 1 or min(self.runs.values(), default=0) < 0:
            raise ValueError("policies and processes must be at least 1, and runs not negative")
        if not 0 <= self.save_from < 1:
            raise ValueError(f"save_from {self.save_from} must lie in [0, 1)")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        algorithm: Its name.
        number: Which of the algorithm's runs, from 0.
        config: The learner's configuration.
        first_step: Iterations of all runs before it: training curves are logged one after the other.
    """

    algorithm: str
    number: int
    config: OnlineConfig
    first_step: int

    @property
    def name(self) -> str:
        """Begins the names of its policies, for instance ``ppo-lag-0``."""
        return f"{self.algorithm}-{self.number}"


def configuration(params: Params, task_name: str, name: str, seed: int) -> OnlineConfig:
    """The learner's configuration for one run.

    Args:
        params: The stage's parameters.
        task_name: The task.
        name: The algorithm.
        seed: The run's seed.

    Raises:
        BadInput: If the parameters have no schedule for the task, or a hyper-parameter is unknown or out of range.
    """
    if task_name not in params.tasks:
        raise BadInput(f"params.yaml: rl.experts.tasks has no entry {task_name!r}; add its iterations and cost limits")
    schedule = asdict(params.tasks[task_name])
    own = schedule.pop("settings").get(name, {})
    values = {"task": task_name, "seed": seed, **schedule, **params.algorithms.get(name, {})}
    config_class, _ = algorithm(name)
    made = load(config_class, values, f"params.yaml: rl.experts.algorithms.{name}")
    if own:  # once more with the task's own, so that an error names the place that has to be mended
        made = load(config_class, {**values, **own}, f"params.yaml: rl.experts.tasks.{task_name}.settings.{name}")
    return made


def planned(params: Params, task_name: str, seed: int) -> list[Run]:
    """All runs of a task, in the order in which they are made."""
    runs: list[Run] = []
    step = 0
    for name, number in params.runs.items():
        for index in range(number):
            # Seeds of 31 bits: they also seed environments, and fit every integer column they end up in.
            own_seed = int(np.random.default_rng([seed, index]).integers(2**31))
            runs.append(Run(name, index, configuration(params, task_name, name, own_seed), step))
            step += runs[-1].config.iterations
    return runs


def save_points(iterations: int, policies: int, save_from: float) -> list[int]:
    """The iteration numbers (counted from 1) after which a policy is saved; strictly rising, the last included."""
    if policies == 1:  # linspace would give its first point
        return [iterations]
    first = max(1, round(iterations * save_from))
    return sorted({int(point) for point in np.linspace(first, iterations, policies).round()})


def train_run(stage: Stage[Params], run: Run) -> tuple[list[dict[str, Any]], list[Figures]]:
    """One training run: puts its policies into ``out`` and returns their index entries and the run's figures."""
    points = save_points(run.config.iterations, stage.params.policies, stage.params.save_from)
    # Policies go to scratch first, where a run that was killed and started again still has the early ones.
    scratch = stage.scratch / run.name
    history: list[Figures] = []
    _, learner_class = algorithm(run.algorithm)
    with (
        EpisodeWorkers(run.config.task, run.config.num_envs, stage.params.processes) as workers,
        stage.progress(run.config.iterations, f"{stage.name} {run.name}", "iterations") as bar,
    ):
        learner = learner_class(run.config, workers)
        for history in train(learner, scratch):
            if len(history) > bar.done + 1:
                bar.resume(len(history) - 1)
            figures = history[-1]
            bar.advance(1, episode_return=figures.episode_return, cost=figures.cost_return, limit=figures.cost_limit)
            stage.log(run.first_step + len(history), **curve(figures))
            if len(history) in points:
                folder = scratch / "policies" / f"{run.name}-{points.index(len(history)):02d}"
                shutil.rmtree(folder, ignore_errors=True)
                save_expert(folder, learner.policy())
        reached = own_figures(learner, workers, history)
    for folder in sorted((scratch / "policies").iterdir()):
        shutil.copytree(folder, stage.out / folder.name)
    saved = [reached[point - 1] for point in points]
    chosen = feasible_first(saved)
    entries = [
        entry(stage.out / f"{run.name}-{index:02d}", run, figures, index == chosen)
        for index, figures in enumerate(saved)
    ]
    return entries, history


def own_figures(learner: Learner, workers: EpisodeWorkers, history: list[Figures]) -> list[Figures]:
    """What the policy that came out of each iteration reached itself, with sampled actions.

    An iteration's episodes are run by the policy before its update, and one update can carry a policy far over its
    limit. So return and cost are those of the next iteration's episodes; the last policy runs as many for itself.
    """
    seeds = episode_seeds(learner.config, len(history))
    last = roll_out(workers, learner.policy(), seeds, history[-1].cost_limit)
    reached = [(figures.episode_return, figures.cost_return) for figures in history[1:]]
    reached.append((float(np.mean([e.episode_return for e in last])), float(np.mean([e.cost_return for e in last]))))
    return [
        replace(figures, episode_return=episode_return, cost_return=cost_return)
        for figures, (episode_return, cost_return) in zip(history, reached, strict=True)
    ]


def entry(folder: Path, run: Run, figures: Figures, chosen: bool) -> dict[str, Any]:
    """A policy's line in ``index.json``; limit and steps are those of the iteration it came out of.

    ``chosen`` marks the run's best policy under the limit that it ended with: feasible first, then by return.
    """
    return {
        "name": folder.name,
        "digest": tree_digest(folder),
        "algorithm": run.algorithm,
        "cost_limit": figures.cost_limit,
        "seed": run.config.seed,
        "env_steps": figures.env_steps,
        "episode_return": figures.episode_return,
        "cost_return": figures.cost_return,
        "chosen": chosen,
    }


def curve(figures: Figures) -> dict[str, float]:
    """All figures of an iteration by name, the algorithm's own after the common ones, in alphabetical order."""
    values = asdict(figures)
    losses = dict(sorted(values.pop("losses").items()))
    return {name: float(value) for name, value in {**values, **losses}.items()}


def write_history(path: Path, histories: list[tuple[Run, list[Figures]]]) -> None:
    """Writes the training curves of all runs as CSV, one line per iteration; a figure that a run lacks is empty."""
    rows = [(run, index, curve(figures)) for run, history in histories for index, figures in enumerate(history)]
    names = list(dict.fromkeys(name for _, _, values in rows for name in values))

    def lines() -> Iterator[str]:
        yield ",".join(["algorithm", "run", "iteration", *names])
        for run, index, values in rows:
            cells = [format(values[name], ".6g") if name in values else "" for name in names]
            yield ",".join([run.algorithm, str(run.number), str(index), *cells])

    path.write_text("\n".join(lines()) + "\n", encoding="utf-8")


def figures_of(entries: list[dict[str, Any]], histories: list[tuple[Run, list[Figures]]]) -> dict[str, Any]:
    """The stage's metrics: of all runs together, and of each algorithm."""

    def final(of: list[list[Figures]]) -> dict[str, float]:
        return {
            "final_return": float(np.mean([history[-1].episode_return for history in of])),
            "final_cost": float(np.mean([history[-1].cost_return for history in of])),
        }

    if not histories:
        return {"policies": 0, "env_steps": 0}
    metrics: dict[str, Any] = {
        "policies": len(entries),
        "env_steps": sum(history[-1].env_steps for _, history in histories),
        **final([history for _, history in histories]),
        "best_return": max(made["episode_return"] for made in entries),
    }
    for name in dict.fromkeys(run.algorithm for run, _ in histories):
        metrics[name] = final([history for run, history in histories if run.algorithm == name])
    return metrics


def run(stage: Stage[Params]) -> None:
    """Trains all runs of the task and writes the expert folder."""
    name = task(stage.item["task"]).name
    entries: list[dict[str, Any]] = []
    histories: list[tuple[Run, list[Figures]]] = []
    for one in planned(stage.params, name, stage.seed):
        made, history = train_run(stage, one)
        entries += made
        histories.append((one, history))
    for line in entries:
        facts = {key: line[key] for key in ("algorithm", "cost_limit", "seed", "env_steps")}
        stage.model(stage.out / line["name"], "policy", task=name, **facts)
    write_json(stage.out / "index.json", entries)
    write_history(stage.out / "history.csv", histories)
    stage.metrics(figures_of(entries, histories))


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
