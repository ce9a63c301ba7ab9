"""Updates per second of our offline algorithms beside OSRL's released code: the same file, batch and networks.

    python benchmarks/offline_speed.py --data FOLDER                          # the papers' sizes, one thread
    python benchmarks/offline_speed.py --data FOLDER --small                  # those of offline_parity.py
    python benchmarks/offline_speed.py --data FOLDER --only cpq --profile     # where our time goes

Each side is a process of its own on the same cores, warm, and they take turns. A turn of OSRL's is the loop of its
scripts with its own data loader, in the process (0 workers) and with the 8 workers of its scripts, its logger replaced
by one that does nothing; the faster of the two counts. Ours is ``Learner.update`` with the figures read every tenth
step, as in training. On a loaded machine the ratio of processor times tells more than that of the rates. ``members``
are models trained side by side: the last columns set 16 of them beside one. Batches of CDT are sequences; OSRL needs
ten seconds for one of 2048, so give it ``--only cdt --seconds 25 --members 2``. The file is made by
``offline_parity.py data``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl_sides import OURS, PEERS, Side, machine, peer_versions, serve

HERE = Path(__file__).resolve()
PAPER: dict[str, dict[str, Any]] = {
    "bc-safe": {"batch_size": 512, "hidden": [256, 256]},
    "bcq-lag": {"batch_size": 512, "hidden": [256, 256], "vae_hidden": [400, 400]},
    "bear-lag": {"batch_size": 512, "hidden": [256, 256], "vae_hidden": [400, 400]},
    "cpq": {"batch_size": 512, "hidden": [256, 256], "vae_hidden": [400, 400]},
    "coptidice": {"batch_size": 512, "hidden": [256, 256]},
    "cdt": {"batch_size": 2048, "width": 128, "layers": 3, "heads": 8},
}
"""Sizes of the papers, by our names."""
NAMES = {"vae_hidden": "vae_hidden_sizes", "width": "embedding_dim", "layers": "num_layers", "heads": "num_heads"}
"""OSRL's names of ours, where there is one."""


def osrl_parameters(chosen: dict[str, Any], algorithm: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """OSRL's parameters with other sizes."""
    found = {**chosen["osrl"][algorithm], "episode_len": 200}
    for name, value in sizes.items():
        if name == "hidden":
            found |= {key: value for key in ("a_hidden_sizes", "c_hidden_sizes") if key in found}
        else:  # OSRL's action model has two layers of one size
            found[NAMES.get(name, name)] = value[0] if isinstance(value, list) else value
    return found


def learner(algorithm: str, mode: str, path: Path, sizes: dict[str, Any], members: int, device: str) -> Any:
    """Our learner of so many seeds, under the limit 20."""
    from offline_parity import our_settings, settings

    from springhead.rl.dataset import read_dsrl
    from springhead.rl.offline.algorithms import entry
    from springhead.rl.offline.batches import flatten
    from springhead.rl.offline.contract import Member
    from springhead.rl.tasks import task

    found = entry(algorithm)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
    config = replace(our_settings(settings(), mode, algorithm), device=device, **values)
    of = task(path.stem)
    data = flatten(read_dsrl(path).episodes(), of)
    chosen = [Member(seed, 20.0 if found.by_limit else None) for seed in range(members)]
    return found.learner()(algorithm, data, of, config, chosen)


def side(jobs: str) -> None:
    """Our side: like OSRL's, it keeps the last learner asked for."""
    import torch

    from springhead.environment import keep_memory

    keep_memory()  # as every stage does
    wanted = {job["name"]: job for job in json.loads(Path(jobs).read_text(encoding="utf-8"))}
    ready: dict[str, Callable[[], None]] = {}

    def stepper(job: dict[str, Any]) -> Callable[[], None]:
        torch.set_num_threads(job["threads"])
        sizes, members = job["sizes"], job["members"]
        made = learner(job["algorithm"], job["mode"], Path(job["data"]), sizes, members, job["device"])
        step = 0

        def update() -> None:
            nonlocal step
            step += 1
            figures = made.update(step)
            if step % 10 == 0:
                torch.stack(list(figures.values())).tolist()

        return update

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        name = request["name"]
        if name not in ready:
            ready.clear()
            ready[name] = stepper(wanted[name])
        update, number, start = ready[name], 0, time.perf_counter()
        while number < request["updates"] and time.perf_counter() - start < request["seconds"]:
            update()
            number += 1
        return {"steps": number, "seconds": time.perf_counter() - start}

    serve(answer)


def profile(algorithm: str, path: Path, sizes: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints where our time goes, by operation."""
    import torch
    from torch.profiler import ProfilerActivity

    device = options.device
    torch.set_num_threads(options.threads)
    made = learner(algorithm, options.modes[0], path, sizes, 1, device)
    for step in range(1, 6):
        made.update(step)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
        for step in range(6, 26):
            made.update(step)
    order = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    print(found.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=15, max_name_column_width=40))


def measure(options: argparse.Namespace, path: Path, sizes: dict[str, dict[str, Any]]) -> None:
    """Prints one row per algorithm."""
    from offline_parity import settings

    chosen = settings()
    common = {"task": path.stem, "data": str(path), "seed": 0, "limit": 20, "threads": options.threads}
    peers, ours = [], []
    for algorithm in sizes:
        parameters = osrl_parameters(chosen, algorithm, sizes[algorithm])
        for workers in options.workers:
            name = f"{algorithm}/{workers}"
            peers.append({**common, "name": name, "algorithm": algorithm, "parameters": parameters, "workers": workers})
        for mode, members in itertools.product(options.modes, (1, options.members)):
            job = {"name": f"{algorithm}/{mode}/{members}", "algorithm": algorithm, "sizes": sizes[algorithm]}
            ours.append({**common, **job, "mode": mode, "members": members, "device": options.device})
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    print("| algorithm | sizes | our mode | OSRL, updates/s | loader | ours, updates/s | ours / OSRL "
          "| lowest, highest turn | by processor time "
          f"| ours, {options.members} members: member-updates/s | / one member | / OSRL |")  # fmt: skip
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, listed in (("peers", peers), ("ours", ours)):
            Path(folder, f"{name}.json").write_text(json.dumps(listed), encoding="utf-8")
        left = Side("osrl", PEERS, [str(HERE.with_name("osrl_side.py")), "speed", f"{folder}/peers.json"], cores)
        right = Side("ours", OURS, [str(HERE), "side", f"{folder}/ours.json"], cores)
        for algorithm in sizes:
            for mode in options.modes:
                _row(algorithm, mode, sizes[algorithm], left, right, options)
        for one in (left, right):
            one.close()


def _row(
    algorithm: str, mode: str, sizes: dict[str, Any], left: Side, right: Side, options: argparse.Namespace
) -> None:
    processor: dict[str, list[float]] = {}

    def rate(one: Side, name: str) -> float:
        found = one.ask(keep=False, name=name, updates=1_000_000, seconds=options.seconds)
        processor.setdefault(one.name + name, []).append(found["cpu"] / found["steps"])
        return float(found["steps"] / found["seconds"])

    def warm(one: Side, name: str) -> None:
        one.ask(keep=False, name=name, updates=3, seconds=options.seconds)

    loaders = {}
    for workers in options.workers:
        warm(left, f"{algorithm}/{workers}")
        loaders[workers] = rate(left, f"{algorithm}/{workers}")
    best = max(loaders, key=lambda workers: loaders[workers])
    theirs: list[float] = []
    own: list[float] = []
    name = f"{algorithm}/{mode}/1"
    warm(left, f"{algorithm}/{best}")
    warm(right, name)
    for turn in range(options.turns):
        pair = [(left, f"{algorithm}/{best}", theirs), (right, name, own)]
        for one, asked, rates in pair if turn % 2 else pair[::-1]:
            rates.append(rate(one, asked))
    ratios = [a / b for a, b in zip(own, theirs, strict=True)]
    together = f"{algorithm}/{mode}/{options.members}"
    warm(right, together)
    several = statistics.median(rate(right, together) for _ in range(options.turns)) * options.members
    text = ", ".join(f"{key} {value}" for key, value in sizes.items())
    cpu = [statistics.median(processor[key]) for key in (f"osrl{algorithm}/{best}", f"ours{name}")]
    a, b = statistics.median(theirs), statistics.median(own)
    print(f"| {algorithm} | {text} | {mode} | {a:.2f} | {best} workers | {b:.2f} | **{statistics.median(ratios):.1f}** "
          f"| {min(ratios):.1f}, {max(ratios):.1f} | {cpu[0] / cpu[1]:.1f} | {several:.1f} | {several / b:.1f} "
          f"| {several / a:.1f} |", flush=True)  # fmt: skip


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>.hdf5")
    parser.add_argument("--task", default="BallCircle")
    parser.add_argument("--only", action="append", choices=sorted(PAPER), help="only this one; may be given again")
    parser.add_argument("--modes", nargs="+", choices=["intended", "released"], default=["intended", "released"],
                        help="of our side: released does the same work as OSRL")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="the sizes of offline_parity.py")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--cores", type=int, default=2, help="that both sides may use")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 8], help="of OSRL's loader; the best one counts")
    parser.add_argument("--members", type=int, default=16, help="trained side by side")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one side in one turn")
    parser.add_argument("--device", default="cpu", help="of our side")
    parser.add_argument("--profile", action="store_true", help="profile our side instead")
    options = parser.parse_args()
    from offline_parity import data_files, settings

    chosen = settings()
    path, _ = data_files(options.data, [options.task])[options.task]
    sizes: dict[str, dict[str, Any]] = {} if options.small else PAPER
    if options.small:
        sizes = {name: {key: own["shared"][key] for key in PAPER[name]} for name, own in chosen["ours"].items()}
    sizes = {name: sizes[name] for name in sizes if name in (options.only or [name])}
    if options.profile:
        for name, own in sizes.items():
            profile(name, path, own, options)
        return
    print(machine(sorted(os.sched_getaffinity(0))[: options.cores], ("torch", "numpy")))
    print(peer_versions(("osrl-lib", "torch", "numpy")))
    print(f"{options.threads} threads, {options.turns} turns of {options.seconds:g} s, medians\n")
    start = time.perf_counter()
    measure(options, path, sizes)
    print(f"\ntook {time.perf_counter() - start:.0f} s; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        side(sys.argv[2])
    else:
        main()
