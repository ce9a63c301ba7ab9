"""The filters beside ``dsrl``'s ``pre_process_data`` on the same million transitions.

    python benchmarks/filters_speed.py                       # 5,000 episodes of 200 steps
    python benchmarks/filters_speed.py --episodes 500 --turns 2   # a quick look

All sides get the same arrays in memory, in processes of their own, in turns. ``pre_process_data`` gives new arrays and
draws a scatter plot at its end, which is part of what its users wait for; another side is the same with Matplotlib's
functions replaced by nothing. Ours is measured twice: until the episodes that are left are known, where they lie, which
is all that writing them to a file needs (*in place*), and until they are laid end to end in new arrays as ``dsrl``'s
are. ``dsrl`` has one thread; ours has one side on one core, by processor time, and one on all cores, by wall time. With
``released: true`` our filters must give ``dsrl``'s arrays, which is checked for each filter.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rl_sides import OURS, Side, machine, serve

HERE = Path(__file__).resolve()
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "density": (
        [{"density": {"cost_bins": 10, "return_bins": 50, "max_per_cell": 5, "min_per_cell": 2}}],
        {"density": 0.5, "cbins": 10, "rbins": 50, "max_npb": 5, "min_npb": 2},
    ),
    "outliers": ([{"outliers": {"fraction": 0.1, "cost_limit": 20}}], {"outliers_percent": 0.1}),
    "inpaint": (
        [{"inpaint": {"cost_from": 0.25, "cost_to": 0.75, "return_from": 0.25, "return_to": 1.0}}],
        {"inpaint_ranges": [(0.25, 0.75, 0.25, 1.0)]},
    ),
    "epsilon": ([{"epsilon": {"epsilon": 100.0, "cost_limit": 20}}], {"epsilon": 100.0}),
    "noise": ([{"noise": {"scale": 0.1}}], {"noise_scale": 0.1}),
}
"""Each filter alone: our steps, and the arguments of ``pre_process_data``."""
CASES["density, outliers, inpaint, noise"] = (
    [step for name in ("density", "outliers", "inpaint", "noise") for step in CASES[name][0]],
    {key: value for name in ("density", "outliers", "inpaint", "noise") for key, value in CASES[name][1].items()},
)
LIMIT = 20.0
KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")


def write_arrays(path: Path, episodes: int, steps: int = 200) -> None:
    """Makes episodes of BallCircle's shape whose returns and costs cover the plane."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((episodes, steps + 1, 8), dtype=np.float32)
    ends = np.zeros((episodes, steps), np.bool_)
    ends[:, -1] = True
    arrays = {
        "observations": states[:, :-1],
        "next_observations": states[:, 1:],
        "actions": rng.uniform(-1, 1, (episodes, steps, 2)).astype(np.float32),
        "rewards": (rng.uniform(0, 5, (episodes, 1)) * rng.uniform(0.5, 1.5, (episodes, steps))).astype(np.float32),
        "costs": (rng.random((episodes, steps)) < rng.uniform(0, 0.4, (episodes, 1))).astype(np.float32),
        "terminals": np.zeros_like(ends),
        "timeouts": ends,
    }
    np.savez(path, **{key: array.reshape(-1, *array.shape[2:]) for key, array in arrays.items()})


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads them."""
    with np.load(path) as file:
        return {key: file[key] for key in KEYS}


def ours(path: str, released: str) -> None:
    """Our filters, from a data set in memory to a data set in memory."""
    from springhead.environment import keep_memory
    from springhead.params import load
    from springhead.rl.dataset import Dataset
    from springhead.rl.filter_chain import Settings, apply
    from springhead.rl.tasks import task

    keep_memory()  # as every stage does
    arrays = read_arrays(path)
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        steps = CASES[request["case"]][0]
        settings = load(Settings, {"steps": steps, "released": released == "released"}, "benchmark")
        start, cpu = time.perf_counter(), time.process_time()
        data = Dataset(**arrays, starts=starts, ends=ends)  # sums of its episodes are not known yet
        found = apply(data, settings, task("BallCircle"), 0)
        took = {"in_place": time.perf_counter() - start, "in_place_cpu": time.process_time() - cpu}
        left = found.dataset
        took |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        if "save" in request:
            np.savez(request["save"], **{key: getattr(left, key) for key in KEYS})
        return {"steps": len(data.rewards), "left": len(left.rewards), **took}

    serve(answer)


def theirs(path: str, plot: str, folder: str) -> None:
    """``dsrl``'s filters, which write their plot into the working folder."""
    import random

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from dsrl.offline_env import OfflineEnv

    from springhead.rl.tasks import task

    if plot == "none":
        for name in ("figure", "scatter", "axvline", "legend", "xlabel", "ylabel", "tight_layout", "savefig"):
            setattr(plt, name, lambda *_args, **_kwargs: None)
    os.chdir(folder)
    of = task("BallCircle")
    arrays = read_arrays(path)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        # A new object draws from the same seed again.
        env = OfflineEnv(of.return_range[1], of.return_range[0], of.cost_range[1], of.cost_range[0])
        env.set_target_cost(LIMIT)
        random.seed(0)
        start, cpu = time.perf_counter(), time.process_time()
        left = env.pre_process_data(dict(arrays), **CASES[request["case"]][1])
        took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        plt.close("all")
        if "save" in request:
            np.savez(request["save"], **left)
        return {"steps": len(arrays["rewards"]), "left": len(left["rewards"]), **took}

    serve(answer)


def same(a: Path, b: Path) -> bool:
    """Whether two sides wrote the same arrays."""
    with np.load(a) as one, np.load(b) as two:
        return all(np.array_equal(one[key], two[key]) for key in KEYS)


def ratio(ours_side: Side, ours_key: str, theirs_side: Side, theirs_key: str) -> str:
    """How many times longer theirs takes, turn by turn: median (lowest, highest)."""
    turns = [b[theirs_key] / a[ours_key] for a, b in zip(ours_side.runs, theirs_side.runs, strict=True)]
    return f"{statistics.median(turns):.0f} ({min(turns):.0f}, {max(turns):.0f})"


def main() -> None:
    """Compares every filter, alone and in a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5_000)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    start = time.perf_counter()
    cores = sorted(os.sched_getaffinity(0))
    print(machine(cores, ("numpy", "dsrl", "matplotlib")))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path = place / "arrays.npz"
        write_arrays(path, options.episodes)
        one = cores[:1]
        wide = Side(f"ours, {len(cores)} cores", OURS, [HERE, "ours", path, "intended"], cores)
        narrow = Side("ours, one core", OURS, [HERE, "ours", path, "intended"], one)
        released = Side("ours, released: true", OURS, [HERE, "ours", path, "released"], one)
        dsrl = Side("dsrl", OURS, [HERE, "theirs", path, "plot", folder], one)
        bare = Side("dsrl without its plot", OURS, [HERE, "theirs", path, "none", folder], one)
        sides = [wide, narrow, released, dsrl, bare]
        print(f"\n{options.episodes * 200:,} transitions, {options.turns} turns; medians, milliseconds: wall time on")
        print(f"{len(cores)} cores, processor time on one. Ratios: median (lowest, highest turn)\n")
        print("| filter | one core: in place | new arrays | `released` | dsrl | without its plot | ", end="")
        print(f"{len(cores)} cores: in place | new arrays |\n|{'---|' * 8}")
        second = []
        for case in CASES:
            saved = [place / "ours.npz", place / "dsrl.npz"]
            released.ask(keep=False, case=case, save=str(saved[0]))
            dsrl.ask(keep=False, case=case, save=str(saved[1]))
            equal = same(*saved)
            for side in (wide, narrow, bare):
                side.ask(keep=False, case=case)
            for side in sides:
                side.runs.clear()
            for _ in range(options.turns):
                for side in sides:
                    side.ask(case=case)
            times = [(narrow, "in_place_cpu"), (narrow, "cpu"), *((side, "cpu") for side in sides[2:])]
            times += [(wide, "in_place"), (wide, "seconds")]
            print(
                "| " + " | ".join([case, *(f"{side.median(key) * 1e3:.1f}" for side, key in times)]) + " |", flush=True
            )
            pairs = [(narrow, "in_place_cpu", dsrl, "cpu"), (narrow, "cpu", dsrl, "cpu"), (narrow, "cpu", bare, "cpu")]
            pairs += [(wide, key, dsrl, "seconds") for key in ("in_place", "seconds")]
            left = ", ".join(f"{int(side.median('left')):,}" for side in (narrow, dsrl))
            second.append([case, *(ratio(*pair) for pair in pairs), left, "yes" if equal else "NO"])
        print("\n| filter | dsrl / ours, one core: in place | new arrays | without its plot / ours | ", end="")
        print(f"{len(cores)} cores: in place | new arrays | steps left: ours, dsrl | `released` is dsrl's |")
        print("|" + "---|" * 8)
        for cells in second:
            print("| " + " | ".join(cells) + " |")
        print("\n| side | peak RSS, MB | PSS, MB |\n|---|---|---|")
        for side in sides:
            print(f"| {side.name} | {side.memory()} |")
            side.close()
    print(f"\nthe arrays themselves: {options.episodes * 200 * 82 / 1e6:.0f} MB")
    print(f"took {time.perf_counter() - start:.0f} s; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("ours", "theirs"):
        {"ours": ours, "theirs": theirs}[sys.argv[1]](*sys.argv[2:-2])
    else:
        main()
