"""Do the online algorithms learn, and keep their limit? Trains each on its tasks, several seeds, and makes the table.

    python benchmarks/experts_learning.py run                         # all algorithms, tasks and seeds of the settings
    python benchmarks/experts_learning.py run --algorithm cpo --task BallCircle --seed 0
    python benchmarks/experts_learning.py table                       # docs/results/experts.md, from the result files

Settings are in ``benchmarks/experts_settings.yaml``. A run trains under one cost limit from seeded resets and then
acts by its mean for 20 episodes that no training run saw, twice: with the policy of the last iteration and with the
one that the feasible-first rule chose by the training figures alone, those of the episodes that this very policy ran.
Each writes a file of its own, ``run`` goes on where it was stopped (checkpoints included), and ``table`` reads the
files and nothing else.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from springhead.jsonio import canonical, read_json, write_json
from springhead.progress import Progress, duration
from springhead.rl.networks import ExpertPolicy, load_expert, save_expert
from springhead.rl.online.algorithms import algorithm
from springhead.rl.online.contract import Figures, OnlineConfig
from springhead.rl.online.training import feasible_first, train
from springhead.rl.tasks import task
from springhead.rl.workers import EpisodeWorkers, Group

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "benchmarks/experts_settings.yaml"
RESULTS = ROOT / "docs/results/experts"
LIMIT = 20.0
SLACK = 1.2  # a mean cost up to this many times the limit passes
SHARE = 0.6  # of the best known safe return
SEEDS = (0, 1, 2)
EPISODES = 20

# Normalised returns of published offline policies that are safe on average: CDT and CAPS in the supplement of CAPS,
# table 10 (20 episodes, 3 seeds, mean of two limits: 30 and 60 for BallCircle and CarRun, 15 and 30 for HalfCheetah).
BEST_KNOWN = {"BallCircle": 0.81, "CarRun": 0.99, "HalfCheetahVelocity": 0.98}


@dataclass(frozen=True)
class Run:
    """One training run."""

    algorithm: str
    task: str
    seed: int

    @property
    def name(self) -> str:
        """The stem of its result file."""
        return f"{self.task}-{self.algorithm}-{self.seed}"


def best_known_return(name: str) -> float:
    """The best known safe return of a task, in the task's own units."""
    low, high = task(name).return_range
    return low + BEST_KNOWN[name] * (high - low)


def settings() -> dict[str, dict[str, dict[str, Any]]]:
    """Algorithm → task → hyper-parameters that differ from the defaults."""
    loaded: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    return loaded


def evaluate(policy: ExpertPolicy, of: str) -> dict[str, Any]:
    """Deterministic episodes from fresh seeds: mean and spread of return and cost."""
    seeds = [int(seed) for seed in np.random.default_rng(20261124).integers(2**31, size=EPISODES)]
    groups = [Group(policy, tuple(seeds[i : i + 10]), LIMIT) for i in range(0, EPISODES, 10)]
    with EpisodeWorkers(of, 10) as workers:
        episodes = [episode for group in workers.run(groups) for episode in group]
    returns, costs = (np.array([getattr(e, key) for e in episodes]) for key in ("episode_return", "cost_return"))
    return {
        "episode_return": round(float(returns.mean()), 2),
        "return_sd": round(float(returns.std()), 2),
        "cost_return": round(float(costs.mean()), 3),
        "violations": float((costs > LIMIT).mean()),
    }


def configuration(run: Run, overrides: dict[str, Any]) -> OnlineConfig:
    """A run's hyper-parameters: the defaults, the limit, and what the settings say."""
    config_class, _ = algorithm(run.algorithm)
    values: dict[str, Any] = {"task": run.task, "seed": run.seed, "cost_limit_start": LIMIT, "cost_limit_end": LIMIT}
    values |= {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    return config_class(**values)


def has_result(run: Run, overrides: dict[str, Any], results: Path) -> bool:
    """Whether there is a result file of the run, made with these very settings."""
    path = results / f"{run.name}.json"
    if not path.exists():
        return False
    found: dict[str, Any] = read_json(path)
    return canonical(found["config"]) == canonical(asdict(configuration(run, overrides)))


def execute(run: Run, overrides: dict[str, Any], scratch: Path, results: Path, quiet: bool) -> dict[str, Any]:
    """Trains and evaluates one run, and writes its result file."""
    torch.set_num_threads(1)
    _, learner_class = algorithm(run.algorithm)
    config = configuration(run, overrides)
    folder = scratch / run.name
    history: list[Figures] = []
    saved = folder / "policies"
    with EpisodeWorkers(run.task, config.num_envs) as workers, Progress(config.iterations, run.name) as bar:
        learner = learner_class(config, workers)
        for history in train(learner, folder, checkpoint_every=max(1, config.iterations // 10)):
            # What lies there may be of other settings, or half-written when a run was killed.
            shutil.rmtree(saved / f"{len(history):05d}", ignore_errors=True)
            save_expert(saved / f"{len(history):05d}", learner.policy())
            if not quiet:
                last = history[-1]
                bar.advance(len(history) - bar.done, episode_return=last.episode_return, cost=last.cost_return)
    # The last quarter: before it the policy has hardly learned, and a lucky early batch is no evidence of safety.
    # An iteration's episodes are run by the policy that the iterations before it made.
    first = max(1, len(history) * 3 // 4)
    chosen = first + feasible_first(history[first:])
    result = {
        **asdict(run),
        "limit": LIMIT,
        "config": asdict(config),
        "env_steps": history[-1].env_steps,
        "last": evaluate(load_expert(saved / f"{len(history):05d}"), run.task),
        "feasible_first": {"iteration": chosen, **evaluate(load_expert(saved / f"{chosen:05d}"), run.task)},
        "curve": [
            [figures.env_steps, round(figures.episode_return, 2), round(figures.cost_return, 2)]
            for figures in history[:: max(1, len(history) // 40)]
        ],
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    write_json(results / f"{run.name}.json", result)
    return result


def passes(outcome: dict[str, Any], of: str) -> bool:
    """The bar: cost at most 1.2 times the limit, and at least 60 % of the best known safe return."""
    return bool(outcome["cost_return"] <= SLACK * LIMIT and outcome["episode_return"] >= SHARE * best_known_return(of))


def run_all(wanted: list[tuple[Run, dict[str, Any]]], jobs: int, scratch: Path, results: Path) -> None:
    """Runs what has no result file of its settings yet."""
    todo = [(run, overrides) for run, overrides in wanted if not has_result(run, overrides, results)]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} runs have a result; {len(todo)} to do, {jobs} at a time")
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(execute, run, o, scratch, results, jobs > 1 and len(todo) > 1) for run, o in todo]
        for number, ((run, _), future) in enumerate(zip(todo, futures, strict=True), start=1):
            try:
                made = future.result()
            except Exception as error:  # one run that fails must not take the others with it
                print(f"[{number}/{len(todo)}] {run.name}: FAILED: {error}", file=sys.stderr, flush=True)
                continue
            chosen = made["feasible_first"]
            print(
                f"[{number}/{len(todo)}, {duration(time.monotonic() - started)}] {run.name}: return "
                f"{chosen['episode_return']:.0f}, cost {chosen['cost_return']:.1f} "
                f"({'passes' if passes(chosen, run.task) else 'misses'})",
                flush=True,
            )


def table(results: Path) -> str:
    """The Markdown tables of all result files, one per task."""
    found = [read_json(path) for path in sorted(results.glob("*.json"))]
    lines: list[str] = []
    for name in sorted({result["task"] for result in found}):
        bar = SHARE * best_known_return(name)
        lines += [
            "",
            f"### {name}: cost at most {SLACK * LIMIT:g}, return at least {bar:.0f}",
            "",
            "| algorithm | steps | feasible-first: return | cost | last: return | cost | passes, seeds "
            f"{', '.join(map(str, SEEDS))} |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for which in settings():
            rows = [r for r in found if (r["task"], r["algorithm"]) == (name, which)]
            if rows:
                lines.append(_line(which, name, rows))
    return "\n".join(lines) + "\n"


def _line(which: str, name: str, rows: list[dict[str, Any]]) -> str:
    def spread(kind: str, key: str, digits: int) -> str:
        values = np.array([row[kind][key] for row in rows])
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"

    cells = [f"{np.mean([row['env_steps'] for row in rows]) / 1000:.0f}k"]
    for kind in ("feasible_first", "last"):
        cells += [spread(kind, "episode_return", 0), spread(kind, "cost_return", 1)]
    by_seed = {row["seed"]: row for row in rows}
    marks = ["–" if s not in by_seed else "yes" if passes(by_seed[s]["feasible_first"], name) else "no" for s in SEEDS]
    return f"| {which} | {' | '.join(cells)} | {' '.join(marks)} |"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train and evaluate what has no result file of its settings yet")
    runner.add_argument("--algorithm", action="append", help="only this one; may be given again")
    runner.add_argument("--task", action="append", help="only this one; may be given again")
    runner.add_argument("--seed", action="append", type=int, help=f"default {', '.join(map(str, SEEDS))}")
    runner.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    runner.add_argument("--scratch", type=Path, default=ROOT / ".springhead/experts-learning", help="checkpoints")
    shower = commands.add_parser("table", help="print the tables of all result files")
    for command in (runner, shower):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(arguments.results))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    wanted = [
        (Run(name, of, seed), overrides or {})
        for seed in arguments.seed or SEEDS
        for name, tasks in settings().items()
        for of, overrides in tasks.items()
        if name in (arguments.algorithm or [name]) and of in (arguments.task or [of])
    ]
    if not wanted:
        parser.error("no run of benchmarks/experts_settings.yaml fits --algorithm and --task")
    run_all(wanted, arguments.jobs, arguments.scratch, arguments.results)


if __name__ == "__main__":
    main()
