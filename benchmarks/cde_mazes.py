"""Is CDE ahead of BC, CQL, IQL, TD3+BC and OptiDICE where rewards are sparse and data scarce?

    python benchmarks/cde_mazes.py collect       # the planner's data sets, 1000 episodes of each maze
    python benchmarks/cde_mazes.py references    # what random actions and the planner achieve: the scores 0 and 100
    python benchmarks/cde_mazes.py tune          # the candidates of each algorithm, on seeds and resets of their own
    python benchmarks/cde_mazes.py run           # trains and evaluates what has no result file of its settings yet
    python benchmarks/cde_mazes.py run --task MazeUMaze --algorithm cde --ratio 0.1
    python benchmarks/cde_mazes.py run --task HopperSparse      # data by sparse_locomotion.py
    python benchmarks/cde_mazes.py table         # writes docs/results/cde-mazes.md from the result files

Settings are in ``benchmarks/cde_settings.yaml``: all algorithms share steps, batch and network. A run trains its
seeds together in one process on the same share of the data (the filter rule ``subsample``), and acts by the mean for
20 episodes from reset seeds that no training saw, with the policies of the last few of ten points of the training; a
seed's score is their mean. Each run writes a file of its own and ``run`` goes on where it was stopped, checkpoints
included; ``table`` reads the files and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from springhead.errors import BadInput
from springhead.jsonio import canonical, read_json, write_json
from springhead.lineage.digests import file_digest
from springhead.params import load
from springhead.progress import Progress
from springhead.rl import mazes
from springhead.rl.dataset import Dataset, read_dsrl
from springhead.rl.evaluation import SavedPolicy, episode_seeds
from springhead.rl.filter_chain import Settings as Steps
from springhead.rl.filter_chain import Step, apply
from springhead.rl.filters import Subsample
from springhead.rl.offline.algorithms import entry
from springhead.rl.offline.contract import Settings
from springhead.rl.offline.training import train
from springhead.rl.policy import save_model
from springhead.rl.tasks import Task, task
from springhead.rl.workers import EpisodeWorkers, Group

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "benchmarks/cde_settings.yaml"
DATA = ROOT / ".springhead/mazes"
SCRATCH = ROOT / ".springhead/cde-mazes"
RESULTS = ROOT / "docs/results/cde-mazes"
PAGE = ROOT / "docs/results/cde-mazes.md"
SPARSE = ROOT / ".springhead/sparse-locomotion"
MAZES = ("MazeUMaze", "MazeMedium", "MazeLarge")
LOCOMOTION = ("HalfCheetahSparse", "HopperSparse")
ALGORITHMS = {
    "cde": "CDE",
    "bc-all": "BC",
    "cql": "CQL",
    "iql": "IQL",
    "td3-bc": "TD3+BC",
    "optidice": "OptiDICE",
}
RATIOS = (1.0, 0.1, 0.01)
SEEDS = (0, 1, 2)
EPISODES = 20
COLLECTED, COLLECT_SEED = 1000, 0
SUBSAMPLE_SEED = 0
EVALUATION_SEED = 20261124
TUNING_SEEDS, TUNING_EVALUATION_SEED = (10, 11), 7
HEAD = """# CDE on sparse and scarce data

    python benchmarks/cde_mazes.py collect       # the planner's data sets
    python benchmarks/cde_mazes.py run           # trains what has no result file yet; resumes what was stopped
    python benchmarks/sparse_locomotion.py train && python benchmarks/sparse_locomotion.py collect
    python benchmarks/cde_mazes.py run --task HalfCheetahSparse --task HopperSparse --ratio 1 --ratio 0.1
    python benchmarks/cde_mazes.py table         # this page

Scores of mazes are 0 for random actions and 100 for the planner that knows the goal, those of locomotion the percentage
of episodes that pass the threshold ([tasks and data](../methods/mazes.md)). A cell is the mean over three seeds and the
standard deviation between them; a seed's score is the mean of 20 episodes by the mean action at each of the last three
of ten points of the training. Six algorithms, the same {steps} steps, batches and networks:
`benchmarks/cde_settings.yaml`. The rest is chosen for each maze and algorithm among four with all data and with other
seeds and resets (`tune`), and on locomotion fixed before any result. One file per run, with all settings, lies in
`docs/results/cde-mazes/`. torch {torch}.

"""

TAIL = """
## What this shows

Only on the small maze is CDE ahead by more than the seeds' spread. On the medium one a policy either finds its way from
most cells or stands in a corner, and which of the two is a matter of the seed for every method: three seeds cannot
order them there. These budgets are a sixteenth of the published 100,000 steps, with narrower networks.

In a first round both density methods drew initial states from the episodes' first states only, and CDE scored 4.8 on
the medium maze with 10 % of the data. There the value is determined only where optimal drives from 100 first states
lead; elsewhere the policy climbs an advantage that is wrong by 40 alpha, and points to the goal less often than the
data's own actions do. `starts: states` and a larger alpha mend that ([CDE](../methods/cde.md)). They became candidates
for both methods, and settings are chosen for each maze since then.

Tried with CDE on the medium maze, with seeds 10, 11, 12 and resets of their own, and no better: 20,000 steps (27.6
with 10 % of the data instead of 46.6 after 6,000; IQL has 26.9 then and TD3+BC 17.0; 13.6 with all data), with all
data a learning rate that falls to 0 (9.1) and alpha 0.1 (-0.9, four seeds). Nor with the data cut where the planner
draws a new goal, as D4RL cuts its own (4,552 pieces, 171 of which end at the task's goal), and `policy_data:
successes`: alpha 0.01 gives 12.8, 2.1 and 56.8, alpha 0.03 gives 19.1, 25.5 and 7.0. A discount of 0.995 instead of
0.99, with all data and four seeds, halves the spread and leaves the mean (13.0, 36.2, 36.5, 23.3 instead of -2.9, 55.6,
20.1, 27.0); 0.998 gives 15.2 on average, and 0.995 with 20,000 steps -1.3 and 29.8.

On the **large** maze tuning was begun: with all data none of CDE's and OptiDICE's four candidates, two seeds each,
scores more than 1.3 (CDE 0.4; files in `tuning/`). The goal is some four hundred steps away there, and at a discount of
0.99 it is worth next to nothing at the start. It was left at that.

**Sparse locomotion** orders the methods differently. On the cheetah IQL, CQL and CDE solve the task with all data,
within the seeds' spread; with 12 episodes one of CDE's three seeds and two of OptiDICE's never succeed, and IQL and
CQL hold. BC is behind, and TD3+BC, which maximises a value of rewards this rare, fails. The hopper's data were paid
above the 75th percentile too, but its experts' returns spread from 329 to 3,277: only CQL imitates the few good
episodes at times, and no other method, CDE included, passes the threshold in a tenth of its episodes on average. The
paper's claim is about these tasks as well; it does not show here at 6,000 steps of 256 with networks of 64.
The cheetah's episodes were judged at a threshold of 4485.09, .004 below the one its data were paid at.
"""


@dataclass(frozen=True)
class Run:
    """One algorithm on one share of one maze's data; its seeds are trained together."""

    task: str
    algorithm: str
    ratio: float
    candidate: int | None = None
    """Number of a candidate of the tuning; None for what the file gives the algorithm on this maze."""

    @property
    def name(self) -> str:
        """The stem of its result file."""
        if self.candidate is not None:
            return f"tuning/{self.task}-{self.algorithm}-{self.candidate}"
        return f"{self.task}-{self.algorithm}-{100 * self.ratio:g}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds."""
        return SEEDS if self.candidate is None else TUNING_SEEDS

    @property
    def resets(self) -> tuple[int, ...]:
        """Reset seeds of the episodes that are reported."""
        return episode_seeds(EVALUATION_SEED if self.candidate is None else TUNING_EVALUATION_SEED, EPISODES)


def given() -> dict[str, Any]:
    """The benchmark's settings."""
    found: dict[str, Any] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    return found


def settings(run: Run) -> Settings:
    """The run's hyper-parameters: the algorithm's defaults, the common ones, and a candidate's."""
    chosen = given()["chosen"].get(run.task, {}).get(run.algorithm) if run.candidate is None else run.candidate
    if chosen is None:
        raise BadInput(
            f"{SETTINGS.name}: chosen: no candidate for {run.algorithm} on {run.task}; run `tune --task {run.task}` "
            "and name the best"
        )
    own = candidates(run.algorithm)[chosen] if isinstance(chosen, int) else chosen
    values = {**given()["common"], **own}
    return load(entry(run.algorithm).settings_class(), values, f"{SETTINGS.name}: {run.algorithm}")


def candidates(algorithm: str) -> list[dict[str, Any]]:
    """The settings tried for an algorithm; as many for each."""
    found: list[dict[str, Any]] = given()["candidates"][algorithm]
    return found


def evaluations() -> int:
    """How many of the last policies are evaluated."""
    return int(given()["evaluations"])


def share(data: Dataset, ratio: float, of: Task) -> Dataset:
    """Whole episodes in random order until the ratio of the steps is reached."""
    step = Step(subsample=Subsample(ratio))
    return apply(data, Steps((step,)), of, SUBSAMPLE_SEED).dataset


def evaluate(folder: Path, of: Task, seeds: tuple[int, ...]) -> list[float]:
    """Returns of episodes by the mean, from reset seeds."""
    groups = [Group(SavedPolicy(folder), seeds[i : i + 10], of.limits[-1]) for i in range(0, EPISODES, 10)]
    with EpisodeWorkers(of.name, 10) as workers:
        return [episode.episode_return for group in workers.run(groups) for episode in group]


def plan(run: Run, data: Path) -> dict[str, Any]:
    """Everything that decides the result of a run, as its file states it."""
    return {
        **asdict(run),
        "seeds": list(run.seeds),
        "episodes": EPISODES,
        "evaluations": evaluations(),
        "data_sha256": file_digest(data),
        "settings": asdict(settings(run)),
    }


def data_file(folder: Path, name: str) -> Path:
    """The data set of a task: a maze's in the given folder, a locomotion task's where it was collected."""
    return (SPARSE / task(name).env_id if name in LOCOMOTION else folder / name) / "dataset.hdf5"


def score(of: Task, returns: list[float]) -> float:
    """From 0 to 100: of a maze by its references, of a locomotion task the share of episodes that succeed."""
    if of.name in LOCOMOTION:
        return 100 * float(np.mean(np.array(returns) > 0))
    return 100 * of.normalised_return(float(np.mean(returns)))


def has_result(run: Run, data: Path, results: Path) -> bool:
    """Whether there is a result file of the run, made with these very settings and data."""
    path = results / f"{run.name}.json"
    return path.exists() and canonical(read_json(path)["plan"]) == canonical(plan(run, data))


def execute(run: Run, data: Path, scratch: Path, results: Path) -> dict[str, Any]:
    """Trains and evaluates one run, and writes its result file."""
    of, chosen, planned = task(run.task), settings(run), plan(run, data)
    folder = scratch / f"{run.name.replace('/', '-')}-{hashlib.sha256(canonical(planned)).hexdigest()[:12]}"
    episodes = share(read_dsrl(data), run.ratio, of).episodes()
    started, used = time.monotonic(), time.process_time()
    with Progress(chosen.steps, run.name) as bar:
        trained = train(
            run.algorithm,
            episodes,
            of,
            chosen,
            run.seeds,
            folder / "checkpoints",
            lambda step, figures: bar.advance(step - bar.done),
        )
    seconds = time.monotonic() - started, time.process_time() - used
    scores: dict[str, list[float]] = {}
    returns: dict[str, list[list[float]]] = {}
    for seed, model in zip(run.seeds, trained, strict=True):
        points = [*sorted(model.policies.items()), (chosen.steps, model.files)]
        each = []
        for step, files in points[-evaluations() :]:
            save_model(folder / f"model-{seed}-{step}", model.config, files)
            each.append(evaluate(folder / f"model-{seed}-{step}", of, run.resets))
        returns[str(seed)] = each
        scores[str(seed)] = [round(score(of, found), 2) for found in each]
    result = {
        "plan": planned,
        "episodes_used": len(episodes),
        "steps_used": sum(episode.length for episode in episodes),
        "scores": scores,
        "returns": returns,
        "training_seconds": {"wall": round(seconds[0], 1), "cpu": round(seconds[1], 1)},
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    path = results / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def of_seeds(result: dict[str, Any]) -> np.ndarray:
    """The score of each seed: the mean of its last evaluations."""
    return np.array([np.mean(scores) for scores in result["scores"].values()])


def table(results: Path) -> str:
    """The page's tables: a row per maze and ratio, a column per algorithm."""
    found = {path.stem: read_json(path) for path in sorted(results.glob("*.json"))}
    lines = [
        "| maze | data | episodes | " + " | ".join(ALGORITHMS.values()) + " | CDE ahead of all |",
        "|---|--:|--:|" + "--:|" * len(ALGORITHMS) + "---|",
    ]
    ahead: dict[float, list[str]] = {ratio: [] for ratio in RATIOS}
    for ratio in RATIOS:
        for name in (*MAZES, *LOCOMOTION):
            rows = {key: found.get(Run(name, key, ratio).name) for key in ALGORITHMS}
            if not any(rows.values()):
                continue
            scores = {key: of_seeds(row) for key, row in rows.items() if row}
            best = max(scores, key=lambda key: float(scores[key].mean()))
            cells = []
            for key in ALGORITHMS:
                text = f"{scores[key].mean():.1f} ± {scores[key].std(ddof=1):.1f}" if key in scores else "–"
                cells.append(f"**{text}**" if key == best else text)
            whole = len(scores) == len(ALGORITHMS)
            if whole and best == "cde" and name in MAZES:
                ahead[ratio].append(name)
            used = next(row["episodes_used"] for row in rows.values() if row)
            verdict = ("yes" if best == "cde" else "no") if whole else "–"
            lines.append(f"| {name} | {100 * ratio:g} % | {used} | {' | '.join(cells)} | {verdict} |")
    lines += ["", "CDE is ahead of all five "]
    run_at = [
        ratio for ratio in RATIOS if any(Run(name, key, ratio).name in found for name in MAZES for key in ALGORITHMS)
    ]
    lines[-1] += " and ".join(f"on {len(ahead[r])} of {len(MAZES)} mazes at {100 * r:g} %" for r in run_at)
    lines[-1] += " of the data. A task without a row was not run."
    lines += ["", "| maze | data set, sha256 | score 0 | score 100 |", "|---|---|--:|--:|"]
    for name in (*MAZES, *LOCOMOTION):
        digests = sorted({row["plan"]["data_sha256"] for row in found.values() if row["plan"]["task"] == name})
        low, high = task(name).return_range if name in MAZES else ("none succeeds", "all do")
        lines.append(f"| {name} | {', '.join(f'`{digest}`' for digest in digests) or '–'} | {low} | {high} |")
    return "\n".join(lines) + "\n"


def write_page(results: Path) -> None:
    """Writes the page: what was asked and how, then the tables.

    Raises:
        BadInput: If there is no result file.
    """
    found = [read_json(path) for path in sorted(results.glob("*.json"))]
    if not found:
        raise BadInput(f"{results}: no result file; make some with `python benchmarks/cde_mazes.py run`")
    steps = sorted({row["plan"]["settings"]["steps"] for row in found})
    head = HEAD.format(
        steps=", ".join(f"{number:,}" for number in steps),
        torch=", ".join(sorted({r["versions"]["torch"] for r in found})),
    )
    PAGE.write_text(head + table(results) + TAIL, encoding="utf-8")


def run_all(wanted: list[Run], data: Path, scratch: Path, results: Path) -> None:
    """Runs what has no result file yet, one after the other."""
    todo = [run for run in wanted if not has_result(run, data_file(data, run.task), results)]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} runs have a result; {len(todo)} to do", flush=True)
    for number, run in enumerate(todo, start=1):
        try:
            made = execute(run, data_file(data, run.task), scratch, results)
        except Exception as error:  # one run that fails must not take the others with it
            print(f"[{number}/{len(todo)}] {run.name}: FAILED: {error}", file=sys.stderr, flush=True)
            continue
        scores, seconds = of_seeds(made), made["training_seconds"]
        each = ", ".join(f"{score:.1f}" for score in scores)
        print(f"[{number}/{len(todo)}] {run.name}: {scores.mean():.1f} ({each}); {seconds}", flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collector = commands.add_parser("collect", help="collect the planner's data sets")
    refer = commands.add_parser("references", help="print the returns that score 0 and 100")
    tuner = commands.add_parser("tune", help="train and evaluate every algorithm's candidates")
    runner = commands.add_parser("run", help="train and evaluate what has no result file of its settings yet")
    shower = commands.add_parser("table", help="write the page's tables from the result files")
    for command in (collector, refer, tuner, runner):
        choices = MAZES if command in (collector, refer) else (*MAZES, *LOCOMOTION)
        command.add_argument("--task", action="append", choices=choices, help="default the mazes; may be given again")
    for command in (collector, runner, tuner):
        command.add_argument("--data", type=Path, default=DATA, help="folder of the mazes' data sets")
    for command in (runner, tuner, shower):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    runner.add_argument("--ratio", action="append", type=float, help=f"default {', '.join(map(str, RATIOS))}")
    for command in (runner, tuner):
        command.add_argument("--algorithm", action="append", choices=ALGORITHMS, help="only this; may be given again")
        command.add_argument("--scratch", type=Path, default=SCRATCH, help="checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = getattr(arguments, "task", None) or MAZES
    if arguments.command == "collect":
        for name in names:
            path = mazes.collect(task(name), COLLECTED, COLLECT_SEED, arguments.data / name)
            print(f"{path}: sha256 {file_digest(path)}", flush=True)
    elif arguments.command == "references":
        for name in names:
            for kind, returns in mazes.references(task(name), COLLECTED, COLLECT_SEED).items():
                print(f"{name}: {kind} {returns.mean():.3f} ± {returns.std():.1f} of {len(returns)}", flush=True)
    elif arguments.command == "table":
        write_page(arguments.results)
    else:
        keys = arguments.algorithm or ALGORITHMS
        if arguments.command == "tune":
            wanted = [
                Run(name, key, 1.0, number) for name in names for key in keys for number in range(len(candidates(key)))
            ]
        else:
            wanted = [Run(name, key, ratio) for name in names for ratio in arguments.ratio or RATIOS for key in keys]
        run_all(wanted, arguments.data, arguments.scratch, arguments.results)


if __name__ == "__main__":
    main()
