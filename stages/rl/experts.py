"""Trains the experts of one task: PPO-Lagrangian under a moving cost limit, saved at many points on the way.

The limit moves over the range in which the data set shall have episodes, so the saved policies differ in how much
cost they accept. Reads nothing; writes one folder per policy, ``index.json`` naming them, and ``history.csv``.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from springhead.errors import BadInput
from springhead.jsonio import write_json
from springhead.lineage.digests import tree_digest
from springhead.rl.networks import save_expert
from springhead.rl.online.ppo_lag import Figures, PPOLagConfig, train
from springhead.rl.tasks import task
from springhead.stage import Stage, run_stage


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

    def __post_init__(self) -> None:
        if self.iterations < 1 or min(self.cost_limit_start, self.cost_limit_end) < 0:
            raise ValueError("iterations must be at least 1 and cost limits at least 0")
        if not 0 <= self.ramp_from <= self.ramp_until <= 1:
            raise ValueError(f"the ramp [{self.ramp_from}, {self.ramp_until}] must lie within [0, 1]")


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.experts``."""

    runs: int
    """Independent training runs per task."""
    policies: int
    """Policies saved per run, evenly over the iterations after ``save_from``; the last iteration is one of them."""
    save_from: float
    """Fraction of the training before which no policy is saved."""
    episodes_per_iteration: int
    """Environments stepped together; each runs one whole episode per iteration."""
    hidden: tuple[int, ...]
    """Sizes of the hidden layers of the policy and of both critics."""
    learning_rate: float
    """Step size of Adam."""
    epochs: int
    """Passes over an iteration's transitions."""
    minibatch: int
    """Transitions per gradient step."""
    target_kl: float
    """The policy stops learning in an iteration once its divergence exceeds 1.5 times this."""
    discount: float
    """Discount factor of rewards and costs."""
    gae_lambda: float
    """Weight decay of longer-horizon errors in advantages."""
    pid_kp: float
    """Gain of the multiplier on the cost excess."""
    pid_ki: float
    """Gain on its integral."""
    pid_kd: float
    """Gain on its rise."""
    tasks: dict[str, Schedule]
    """Length and cost-limit ramp of each task."""

    def __post_init__(self) -> None:
        if min(self.runs, self.policies, self.episodes_per_iteration, self.epochs, self.minibatch) < 1:
            raise ValueError("runs, policies, episodes_per_iteration, epochs and minibatch must be at least 1")
        if not 0 <= self.save_from < 1:
            raise ValueError(f"save_from {self.save_from} must lie in [0, 1)")


_SHARED = (
    "episodes_per_iteration", "hidden", "learning_rate", "epochs", "minibatch", "target_kl", "discount", "gae_lambda",
    "pid_kp", "pid_ki", "pid_kd",
)  # fmt: skip


def configuration(params: Params, task_name: str, seed: int) -> PPOLagConfig:
    """The learner's configuration for one run.

    Raises:
        BadInput: If the parameters have no schedule for the task.
    """
    if task_name not in params.tasks:
        raise BadInput(f"params.yaml: rl.experts.tasks has no entry {task_name!r}; add its iterations and cost limits")
    shared = {name: getattr(params, name) for name in _SHARED}
    return PPOLagConfig(task=task_name, seed=seed, **shared, **asdict(params.tasks[task_name]))


def save_points(iterations: int, policies: int, save_from: float) -> list[int]:
    """The iteration numbers (counted from 1) after which a policy is saved; strictly rising, the last included."""
    first = max(1, round(iterations * save_from))
    return sorted({int(point) for point in np.linspace(first, iterations, policies).round()})


def entry(folder: Path, seed: int, figures: Figures) -> dict[str, Any]:
    """A policy's line in ``index.json``; its figures are those of the iteration it came out of."""
    return {
        "name": folder.name,
        "digest": tree_digest(folder),
        "algorithm": "ppo-lag",
        "cost_limit": figures.cost_limit,
        "seed": seed,
        "env_steps": figures.env_steps,
        "episode_return": figures.episode_return,
        "cost_return": figures.cost_return,
    }


def train_run(stage: Stage[Params], config: PPOLagConfig, number: int) -> tuple[list[dict[str, Any]], list[Figures]]:
    """One training run: puts its policies into ``out`` and returns their index entries and the run's figures."""
    points = save_points(config.iterations, stage.params.policies, stage.params.save_from)
    # Policies go to scratch first, where a run that was killed and started again still has the early ones.
    scratch = stage.scratch / f"run-{number}"
    history: list[Figures] = []
    with stage.progress(config.iterations, f"{stage.name} run {number}", "iterations") as bar:
        for learner, history in train(config, scratch):
            if len(history) > bar.done + 1:
                bar.resume(len(history) - 1)
            figures = history[-1]
            bar.advance(1, episode_return=figures.episode_return, cost=figures.cost_return, limit=figures.cost_limit)
            curve = {name: float(value) for name, value in asdict(figures).items()}
            stage.log(learner.iteration + number * config.iterations, **curve)
            if learner.iteration in points:
                folder = scratch / "policies" / f"{number}-{points.index(learner.iteration):02d}"
                shutil.rmtree(folder, ignore_errors=True)
                save_expert(folder, learner.expert_config(figures.cost_limit), learner.actor)
    entries = []
    for folder, point in zip(sorted((scratch / "policies").iterdir()), points, strict=True):
        shutil.copytree(folder, stage.out / folder.name)
        entries.append(entry(stage.out / folder.name, config.seed, history[point - 1]))
    return entries, history


def write_history(path: Path, histories: list[list[Figures]]) -> None:
    """Writes the training curves of all runs as CSV, one line per iteration."""
    names = [field.name for field in fields(Figures)]
    lines = [",".join(["run", "iteration", *names])]
    for run, history in enumerate(histories):
        for iteration, figures in enumerate(history):
            values = [format(getattr(figures, name), ".6g") for name in names]
            lines.append(",".join([str(run), str(iteration), *values]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(stage: Stage[Params]) -> None:
    """Trains all runs of the task and writes the expert folder."""
    name = task(stage.item["task"]).name
    entries: list[dict[str, Any]] = []
    histories: list[list[Figures]] = []
    for number in range(stage.params.runs):
        # Seeds of 31 bits: they also seed environments, and fit every integer column they end up in.
        seed = int(np.random.default_rng([stage.seed, number]).integers(2**31))
        made, history = train_run(stage, configuration(stage.params, name, seed), number)
        entries += made
        histories.append(history)
    for made_entry in entries:
        facts = {key: made_entry[key] for key in ("algorithm", "cost_limit", "seed", "env_steps")}
        stage.model(stage.out / made_entry["name"], "policy", task=name, **facts)
    write_json(stage.out / "index.json", entries)
    write_history(stage.out / "history.csv", histories)
    last = [history[-1] for history in histories]
    stage.metrics(
        {
            "policies": len(entries),
            "env_steps": sum(figures.env_steps for figures in last),
            "final_return": float(np.mean([figures.episode_return for figures in last])),
            "final_cost": float(np.mean([figures.cost_return for figures in last])),
            "best_return": max(made_entry["episode_return"] for made_entry in entries),
        }
    )


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
