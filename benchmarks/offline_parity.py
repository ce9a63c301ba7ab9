"""Our offline algorithms beside OSRL's released code: the same file, steps, batch and networks; normalised figures.

    python benchmarks/offline_parity.py data --data FOLDER     # make the two files, with our pipeline (minutes)
    python benchmarks/offline_parity.py osrl --data FOLDER     # OSRL's side: one run per algorithm, task, limit, seed
    python benchmarks/offline_parity.py ours --data FOLDER     # ours: released and intended mode, members together
    python benchmarks/offline_parity.py table                  # docs/results/offline-parity.md's tables

Settings are in ``benchmarks/offline_settings.yaml``. Each run writes a file of its own and ``osrl`` and ``ours`` do
only those that have no file of their settings; ``table`` reads the files and nothing else. OSRL's side needs its
environment (``make peers``) and acts by its own rollouts there; ours acts by ``springhead.rl.evaluation``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rl_sides import OURS, PEERS

from springhead.jsonio import canonical, read_json, write_json
from springhead.rl.dataset import Dataset, read_dsrl
from springhead.rl.offline.training import Trained
from springhead.rl.tasks import Task, task

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "benchmarks/offline_settings.yaml"
RESULTS = ROOT / "docs/results/offline"
HERE = Path(__file__).resolve()
ALL_LIMITS = 0  # stands for a model that serves every limit

Settings = dict[str, Any]


def settings() -> Settings:
    """The benchmark's settings."""
    loaded: Settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    return loaded


def data_files(folder: Path, tasks: list[str]) -> dict[str, tuple[Path, str]]:
    """Task → its file in the folder and the file's digest; the digests are printed."""
    found = {}
    for name in tasks:
        path = folder / f"{name}.hdf5"
        if not path.exists():
            raise SystemExit(f"{path}: no such file; make it with `python {HERE.name} data --data {folder}`")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = settings()["data_sha256"].get(name)
        note = "" if digest == expected else f" (the results in docs/ are of {expected})"
        print(f"{path}: sha256 {digest}{note}")
        found[name] = (path, digest)
    return found


def make_data(folder: Path, tasks: list[str]) -> None:
    """Runs experts, collection and filters for the tasks in a clone of this checkout, and keeps the data sets."""
    folder.mkdir(parents=True, exist_ok=True)
    clone = folder / "clone"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    binaries = OURS.parent
    environment = {**os.environ, "PYTHONPATH": str(clone), "PATH": f"{binaries}:{os.environ['PATH']}"}
    targets = [part for name in tasks for part in ("--target", f"rl-filter@{name}")]
    subprocess.run([binaries / "springhead", "run", *targets, "--no-promote"], cwd=clone, env=environment, check=True)
    for name in tasks:
        shutil.copyfile(clone / f"data/rl/filter/{name}/dataset.hdf5", folder / f"{name}.hdf5")


def safe_returns(path: Path, limits: list[float]) -> dict[str, float]:
    """CDT's return targets on OSRL's side, which its users choose by hand: the best of the data below each limit."""
    from springhead.rl.dataset import iter_episodes

    episodes = list(iter_episodes(path))
    return {
        str(limit): round(max(one.episode_return for one in episodes if one.cost_return <= limit), 1)
        for limit in limits
    }


def more_seeds(chosen: Settings, name: str, algorithm: str) -> list[int]:
    """Seeds beside the common ones for a task and algorithm, at the middle limit alone."""
    found: list[int] = (chosen.get("more_seeds", {}).get(name) or {}).get(algorithm, [])
    return found


def osrl_jobs(chosen: Settings, files: dict[str, tuple[Path, str]], results: Path) -> list[dict[str, Any]]:
    """All of OSRL's runs, the middle limit first; one per seed and limit, but for CDT one per seed."""
    low, middle, high = chosen["limits"]
    jobs = []
    extra = sorted({s for own in chosen.get("more_seeds", {}).values() for seeds in own.values() for s in seeds})
    for limit in (middle, low, high):
        for seed in [*chosen["seeds"], *extra]:
            for name in chosen["tasks"]:
                for algorithm, parameters in chosen["osrl"].items():
                    every = algorithm == "cdt"
                    if every and limit != middle:
                        continue
                    if seed in extra and (limit != middle or seed not in more_seeds(chosen, name, algorithm)):
                        continue
                    path, digest = files[name]
                    job = {
                        "algorithm": algorithm, "task": name, "seed": seed, "limit": ALL_LIMITS if every else limit,
                        "steps": chosen["steps"][algorithm], "episodes": chosen["episodes"],
                        "parameters": {**parameters, "episode_len": 200},
                        "targets": safe_returns(path, chosen["limits"]) if every else None,
                        "courses": chosen["osrl_courses"][algorithm], "data": str(path), "data_sha256": digest,
                        "workers": 0, "threads": 1,
                    }  # fmt: skip
                    stem = f"osrl-{name}-{algorithm}-{job['limit'] or 'all'}-{seed}"
                    jobs.append({**job, "result": str(results / f"{stem}.json")})
    return jobs


def is_done(job: dict[str, Any]) -> bool:
    """Whether there is a result file of these very settings and data."""
    path = Path(job["result"])
    if not path.exists():
        return False
    found = read_json(path)
    keys = ("algorithm", "task", "seed", "limit", "steps", "parameters", "data_sha256")
    return canonical({key: found[key] for key in keys}) == canonical({key: job[key] for key in keys})


def wanted(job: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether the command line asks for the job."""
    return all(
        not getattr(arguments, key) or job[key] in getattr(arguments, key)
        for key in ("algorithm", "task", "seed", "limit")
    )


def run_osrl(arguments: argparse.Namespace) -> None:
    """Runs what OSRL has not run yet, in one process of its environment."""
    chosen = settings()
    files = data_files(arguments.data, chosen["tasks"])
    jobs = [job for job in osrl_jobs(chosen, files, arguments.results) if wanted(job, arguments)]
    todo = [job for job in jobs if not is_done(job)]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs have a result; {len(todo)} to do", flush=True)
    listed = arguments.data / f"jobs-{os.getpid()}.json"
    write_json(listed, todo)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DSRL_SUPPRESS_IMPORT_ERROR": "1", "WANDB_MODE": "disabled"}
    command = [PEERS, HERE.with_name("osrl_side.py"), "train", listed]
    sys.exit(subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode)


def our_settings(chosen: Settings, mode: str, algorithm: str) -> Any:
    """Our settings of an algorithm in a mode: ``released``, ``intended``."""
    from springhead.params import load
    from springhead.rl.offline.algorithms import entry

    own = chosen["ours"][algorithm]
    steps = chosen["steps"][algorithm]
    values = {**own["shared"], **(own.get(mode) or {}), "steps": steps, "checkpoint_every": max(1, steps // 20)}
    return load(entry(algorithm).settings_class(), values, f"{SETTINGS.name}: ours.{algorithm}")


def run_ours(arguments: argparse.Namespace) -> None:
    """Runs what ours has not run yet: the seeds and limits of a task, algorithm and mode in one training."""
    chosen = settings()
    files = data_files(arguments.data, chosen["tasks"])
    for mode in ("released", "intended"):
        for name in chosen["tasks"]:
            for algorithm in chosen["ours"]:
                asked = {"task": name, "algorithm": algorithm, "mode": mode}
                if all(not getattr(arguments, key) or value in getattr(arguments, key) for key, value in asked.items()):
                    limits = [one for one in chosen["limits"] if not arguments.limit or one in arguments.limit]
                    train_ours(chosen, mode, task(name), algorithm, limits, chosen["seeds"], files[name], arguments)
                    middle = chosen["limits"][1]
                    if (more := more_seeds(chosen, name, algorithm)) and middle in limits:
                        train_ours(chosen, mode, task(name), algorithm, [middle], more, files[name], arguments)


def train_ours(
    chosen: Settings,
    mode: str,
    of: Task,
    algorithm: str,
    limits: list[float],
    seeds: list[int],
    file: tuple[Path, str],
    arguments: argparse.Namespace,
) -> None:
    """Trains the members that have no results, evaluates them and writes a result file for each."""
    import torch

    from springhead.progress import Progress
    from springhead.rl.offline.algorithms import entry
    from springhead.rl.offline.training import train

    torch.set_num_threads(1)
    config, (path, digest), name = our_settings(chosen, mode, algorithm), file, f"{mode}-{of.name}-{algorithm}"
    facts = {"side": mode, "algorithm": algorithm, "task": of.name, "data_sha256": digest, "steps": config.steps}
    facts["parameters"] = {key: value for key, value in plain(asdict(config)).items() if key != "limits"}
    if not entry(algorithm).by_limit:
        limits = [ALL_LIMITS]

    def result(limit: float, seed: int) -> Path:
        found: Path = arguments.results / f"{name}-{limit or 'all'}-{seed}.json"
        return found

    def has_result(limit: float, seed: int) -> bool:
        one = result(limit, seed)
        if not one.exists():
            return False
        found = read_json(one)
        found["parameters"] = with_defaults(algorithm, found["parameters"])
        return canonical({key: found[key] for key in facts}) == canonical(facts)

    todo = [limit for limit in limits if not all(has_result(limit, seed) for seed in seeds)]
    if not todo:
        print(f"{name}: has results")
        return
    if todo != [ALL_LIMITS]:
        config = replace(config, limits=tuple(todo))
    scratch = arguments.data / "scratch" / name
    shutil.rmtree(scratch, ignore_errors=True)  # of other settings, maybe
    data, started = read_dsrl(path), time.perf_counter()
    with Progress(config.steps, name) as bar:
        trained = train(
            algorithm, data.episodes(), of, config, seeds, scratch, lambda step, figures: bar.advance(step - bar.done)
        )
    seconds = time.perf_counter() - started
    probes = probe(algorithm, data, of, config, seeds, scratch)
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    for seed, model in zip(seeds, trained, strict=True):
        folder = arguments.data / "models" / f"{name}-{seed}"
        for limit in todo:
            found = {
                **facts, "seed": seed, "limit": limit, "versions": versions,
                "evaluations": evaluate(model, of, folder, [limit] if limit else chosen["limits"], chosen["episodes"]),
                "courses": courses(model, chosen["ours"][algorithm].get("courses", []), limit),
                "probe": probes.get(seed, {}).get(limit, {}),
            }  # fmt: skip
            result(limit, seed).write_bytes(canonical(found) + b"\n")
    print(f"{name}: {seconds:.0f} s for all members, {time.perf_counter() - started:.0f} s with evaluation", flush=True)


def with_defaults(algorithm: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A result's parameters, and settings that came later at their defaults, which do what was done before them."""
    from springhead.params import load
    from springhead.rl.offline.algorithms import entry

    made = load(entry(algorithm).settings_class(), parameters, f"a result of {algorithm}")
    return {key: value for key, value in plain(asdict(made)).items() if key != "limits"}


def evaluate(model: Trained, of: Task, folder: Path, limits: list[float], episodes: int) -> list[dict[str, Any]]:
    """Whole episodes of a seed's model under each limit, from starts of that seed's own, as on OSRL's side."""
    from springhead.rl.evaluation import Job, episode_seeds, run_jobs
    from springhead.rl.policy import save_model

    shutil.rmtree(folder, ignore_errors=True)
    save_model(folder, model.config, model.files)
    starts = episode_seeds(20261124 + int(model.config["seed"]), episodes)
    outcomes = run_jobs([Job(of.name, folder, limit, starts, 10) for limit in limits], 1)
    return [
        {"limit": limit, "returns": np.round(one.returns, 4).tolist(), "costs": np.round(one.costs, 4).tolist()}
        for limit, one in zip(limits, outcomes, strict=True)
    ]


def courses(model: Trained, names: list[str], limit: float) -> dict[str, list[list[float]]]:
    """The courses of some figures of a seed's member, by name without its limit."""
    suffix = f"-limit-{limit:g}" if limit else ""
    kept = {name: name + suffix for name in names}
    return {
        name: [[int(row["step"]), round(row[key], 4)] for row in model.history]
        for name, key in kept.items()
        if key in model.history[0]
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    loaded: dict[str, Any] = json.loads(json.dumps(values))
    return loaded


def probe(
    algorithm: str, data: Dataset, of: Task, config: Any, seeds: list[int], scratch: Path
) -> dict[int, dict[float, dict[str, float]]]:
    """CPQ's cost critic, by seed and limit: its mean for the data's actions and for uniform ones, as on OSRL's side."""
    import torch

    from springhead.rl.offline import checkpoint
    from springhead.rl.offline.algorithms import entry
    from springhead.rl.offline.batches import flatten
    from springhead.rl.offline.training import members_of

    if algorithm != "cpq":
        return {}
    found = entry(algorithm)
    members = members_of(found, of, config, seeds)
    made: Any = found.learner()(algorithm, flatten(data.episodes(), of), of, config, members)
    state = checkpoint.latest(scratch)
    assert state is not None
    checkpoint.unpack(state.tensors, made)
    generator = np.random.default_rng(0)
    rows = generator.integers(len(data.rewards), size=4096)
    actions = {"data": data.actions[rows], "uniform": generator.uniform(-1, 1, (4096, of.action_dim))}
    probed: dict[int, dict[float, dict[str, float]]] = {seed: {} for seed in seeds}
    for name, values in actions.items():
        inputs = np.concatenate([data.observations[rows], values], axis=1).astype(np.float32)
        with torch.no_grad():
            costs = made.cost_critics(torch.from_numpy(inputs).expand(len(members), -1, -1))
        worst = costs.amax(1) if config.cost_ensemble == "max" else costs.amin(1)
        for member, value in zip(members, worst.mean(1).tolist(), strict=True):
            probed[member.seed].setdefault(member.cost_limit or 0.0, {})[f"cost_value_{name}"] = round(value, 4)
    return probed


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("data", help="make the data with our pipeline")
    osrl = commands.add_parser("osrl", help="run OSRL's side")
    ours = commands.add_parser("ours", help="run our side")
    shower = commands.add_parser("table", help="print the tables of all result files")
    for command in (maker, osrl, ours):
        command.add_argument("--data", type=Path, required=True, help="folder of <task>.hdf5")
    for command in (osrl, ours):
        command.add_argument("--algorithm", action="append", help="only this one; may be given again")
        command.add_argument("--task", action="append", help="only this one; may be given again")
        command.add_argument(
            "--limit", action="append", type=float, help="only this one; 0: models of all limits (OSRL)"
        )
    osrl.add_argument("--seed", action="append", type=int)
    ours.add_argument("--mode", action="append", choices=("released", "intended"))
    for command in (osrl, ours, shower):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    if arguments.command == "data":
        make_data(arguments.data, settings()["tasks"])
        data_files(arguments.data, settings()["tasks"])
    elif arguments.command == "table":
        from offline_tables import tables

        print(tables(arguments.results, settings()))
    else:
        arguments.results.mkdir(parents=True, exist_ok=True)
        (run_osrl if arguments.command == "osrl" else run_ours)(arguments)


if __name__ == "__main__":
    main()
