"""Does one CDT model keep cost limits that lie between those of its task? Trains, acts and makes the table.

    python benchmarks/cdt_limits.py run --data <folder with BallCircle.hdf5 and CarRun.hdf5> --set steps=4000
    python benchmarks/cdt_limits.py table      # docs/results/cdt-limits.md, from the result files

Hyper-parameters are those of ``rl.train`` in ``params.yaml`` (the quick profile); ``--set key=value`` changes one. A
run trains the models of all seeds side by side; each then acts for 20 episodes under each limit, from resets that are
the same for all. A seed's result is a file in ``docs/results/cdt-limits``, ``run`` leaves out what is there and goes on
from its checkpoints, and ``table`` reads the files and nothing else.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import file_digest
from springhead.params import read_params
from springhead.progress import Progress
from springhead.rl.dataset import read_dsrl
from springhead.rl.evaluation import Job, episode_seeds, run_jobs
from springhead.rl.offline.cdt import CDTSettings
from springhead.rl.offline.training import train
from springhead.rl.policy import save_model
from springhead.rl.tasks import Task, task
from stages.rl.train import Params, settings

ROOT = Path(__file__).parent.parent
TRAINED = (10.0, 20.0, 40.0)
UNSEEN = (15.0, 25.0, 30.0)
EPISODES_SEED = 20_000
"""Of the resets of the reported episodes. Hyper-parameters were chosen on others (``--resets``)."""


def chosen(of: Task, changes: list[str]) -> CDTSettings:
    """The settings of the quick profile on a task, with changes as ``key=value``."""
    values = read_params(ROOT / "params.yaml")["rl"]["train"]
    own = dict(values["algorithms"].get("cdt", {}))
    own.update({key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in changes)})
    made = settings(Params({**values["algorithms"], "cdt": own}, values.get("tasks", {})), of.name, "cdt")
    assert isinstance(made, CDTSettings)
    return made


def result_path(folder: Path, of: Task, seed: int) -> Path:
    """Where a seed's result lies."""
    return folder / f"{of.name}-{seed}.json"


def run(options: argparse.Namespace) -> None:
    """Trains and evaluates what has no result yet."""
    torch.set_num_threads(options.threads)
    for name in options.task:
        of, file = task(name), options.data / f"{name}.hdf5"
        seeds = [seed for seed in options.seed if not result_path(options.results, of, seed).exists()]
        if not seeds:
            continue
        made = chosen(of, options.set)
        scratch = options.scratch / f"{name}-{'-'.join(map(str, seeds))}"
        started = time.process_time()
        with Progress(made.steps, f"cdt {name}", "steps") as bar:
            trained = train(
                "cdt", read_dsrl(file).episodes(), of, made, seeds, scratch,
                lambda step, figures: bar.advance(step - bar.done),
            )  # fmt: skip
        seconds = time.process_time() - started
        for seed, model in zip(seeds, trained, strict=True):
            save_model(scratch / f"model-{seed}", model.config, model.files)
        resets = episode_seeds(options.resets, options.episodes)
        limits = options.limit or [*TRAINED, *UNSEEN]
        jobs = [Job(name, scratch / f"model-{seed}", limit, resets, len(resets)) for seed in seeds for limit in limits]
        outcomes = iter(run_jobs(jobs, options.processes))
        for seed in seeds:
            found = [
                {"limit": limit, "returns": out.returns.round(3).tolist(), "costs": out.costs.round(3).tolist()}
                for limit, out in ((limit, next(outcomes)) for limit in limits)
            ]
            result = {
                "task": name, "seed": seed, "data_sha256": file_digest(file), "settings": asdict(made),
                "resets": options.resets, "seconds": round(seconds, 1), "models_together": len(seeds),
                "evaluations": found, "torch": torch.__version__,
            }  # fmt: skip
            write_json(result_path(options.results, of, seed), result)
            print(name, seed, *(f"{one['limit']:g}: {np.mean(one['costs']):.1f}" for one in found), flush=True)


def table(options: argparse.Namespace) -> None:
    """Writes the page from the result files."""
    files = sorted(options.results.glob("*.json"))
    if not files:
        raise SystemExit(f"{options.results}: no result files; make them with `python benchmarks/cdt_limits.py run`")
    results = [read_json(file) for file in files]
    lines, facts = [], []
    for name in dict.fromkeys(result["task"] for result in results):
        own = [result for result in results if result["task"] == name]
        if len({(one["data_sha256"], str(one["settings"]), one["resets"]) for one in own}) > 1:
            raise SystemExit(
                f"{options.results}: the files of {name} are of different data or settings; run them again"
            )
        facts.append(f"* {name}: data sha256 `{own[0]['data_sha256']}`.")
        limits = sorted(one["limit"] for one in own[0]["evaluations"])
        for limit in limits:
            at = [next(one for one in result["evaluations"] if one["limit"] == limit) for result in own]
            costs = [float(np.mean(one["costs"])) for one in at]
            returns = [task(name).normalised_return(float(np.mean(one["returns"]))) for one in at]
            over = float(np.mean([cost > limit for one in at for cost in one["costs"]]))
            kind = "yes" if limit in TRAINED else "no"
            each = " / ".join(f"{cost:.1f}" for cost in costs)
            held = (
                "yes" if max(costs) <= 1.1 * limit else f"{sum(cost <= 1.1 * limit for cost in costs)} of {len(costs)}"
            )
            lines.append(
                f"| {name} | {limit:g} | {kind} | {each} | {np.mean(costs):.1f} | {np.mean(costs) / limit:.2f} "
                f"| {held} | {over:.0%} | {np.mean(returns):.2f} |"
            )
    shared = results[0]
    episodes = len(shared["evaluations"][0]["costs"])
    options.page.write_text(PAGE.format(
        rows="\n".join(lines), facts="\n".join(facts), episodes=episodes, resets=shared["resets"],
        seeds=", ".join(str(seed) for seed in sorted({one["seed"] for one in results})),
        steps=shared["settings"]["steps"], batch=shared["settings"]["batch_size"], torch=shared["torch"],
    ), encoding="utf-8")  # fmt: skip
    print(options.page)


PAGE = """# One CDT model under cost limits between those of its task

Made by `python benchmarks/cdt_limits.py table` from the files `cdt-limits/*.json`, and those by
`python benchmarks/cdt_limits.py run --data <folder> --set steps={steps}`: the quick profile's settings with
{steps} steps of {batch} sequences, seeds {seeds}, {episodes} episodes for each seed and limit, resets of seed
{resets} that no choice was made on, torch {torch}. The criterion is a mean cost of at most 1.1 times the limit for
each seed.

CDT is not trained for a limit: all come from one model of a seed. "task's own" are the limits of the task, by which
the scale of its cost tokens is chosen; the others lie between them.

| task | limit | task's own | mean cost by seed | mean | / limit | held | episodes over | normalised return |
|---|--:|---|---|--:|--:|---|--:|--:|
{rows}

{facts}

The quick profile trains for 1000 steps, to be done in minutes. With those, measured in the same way, BallCircle kept
its limits from 20 on with each seed, 15 with two of three (14.0, 15.5, 17.1) and 10 with none (12.1, 12.1, 17.2);
CarRun kept all. A larger `target_margin` (0.4) did not help; the longer training was chosen on other resets (seed 7,
where it costs 6.0 to 8.0 at 10).
"""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument(
        "--data", type=Path, default=Path(), help="folder with <task>.hdf5 (offline_parity.py makes it)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/cdt-limits")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".springhead/cdt-limits")
    parser.add_argument("--task", nargs="+", default=["BallCircle", "CarRun"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", nargs="+", type=float, help="cost limits to act under (default: trained and unseen)")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--resets", type=int, default=EPISODES_SEED, help="seed of the episodes' resets")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], help="settings to change, as key=value")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/cdt-limits.md")
    options = parser.parse_args()
    {"run": run, "table": table}[options.action](options)


if __name__ == "__main__":
    main()
