"""Loading a data set beside ``dsrl``'s loader and Minari's: the same files, into arrays in memory.

    python benchmarks/loading_speed.py                         # a million steps
    python benchmarks/loading_speed.py --episodes 500 --turns 3   # a quick look

| file | ours | peer |
|---|---|---|
| ours | ``read_dsrl`` | ``OfflineEnv.get_dataset`` of ``dsrl`` |
| as DSRL published its files: HDF5's own chunks, gzip, no checksums | ``read_dsrl`` | the same |
| our Minari data set | ``read_minari`` | ``minari.load_dataset`` and all its episodes |

All sides are processes of their own on the same cores, the files are in the kernel's memory, and each reads
everything in every turn. ``read_dsrl`` and ``read_minari`` also check the structure and the checksums.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filters_speed import KEYS
from rl_sides import OURS, Side, machine, paired_ratio, serve

HERE = Path(__file__).resolve()
DATASET = "springhead/BallCircle-v0"


def write_files(folder: Path, episodes: int) -> None:
    """Writes one data set in the three forms.

    A hundred real episodes again and again: gzip looks back 32 kB, so it does not see that they repeat.
    """
    import h5py

    from springhead.rl.dataset import Dataset, write_dsrl, write_minari
    from springhead.rl.evaluation import RandomPolicy
    from springhead.rl.tasks import task
    from springhead.rl.workers import EpisodeWorkers, Group

    of = task("BallCircle")
    with EpisodeWorkers(of.name, 10) as workers:
        groups = [Group(RandomPolicy(of, 0, k), tuple(range(10 * k, 10 * k + 10)), 10.0) for k in range(10)]
        real = [episode for found in workers.run(groups) for episode in found]
    chosen = [real[k % len(real)] for k in range(episodes)]
    data = Dataset.of(chosen)
    write_dsrl(folder / "ours.hdf5", chosen)
    with h5py.File(folder / "published.hdf5", "w") as file:
        for key in KEYS:
            file.create_dataset(key, data=getattr(data, key), compression="gzip")
    write_minari(folder / "minari", DATASET, chosen, of)


def side(who: str, path: str) -> None:
    """One side: reads its file at every request, and says how many steps and what sum of rewards it got."""

    def answer(_request: dict[str, Any]) -> dict[str, Any]:
        start, cpu = time.perf_counter(), time.process_time()
        rewards = read()
        took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        return {"steps": len(rewards), "sum": float(rewards.sum(dtype=np.float64)), **took}

    read: Callable[[], np.ndarray]
    if who == "ours":
        from springhead.rl.dataset import read_dsrl

        def read() -> np.ndarray:
            return read_dsrl(Path(path)).rewards
    elif who == "ours-minari":
        from springhead.rl.dataset import read_minari

        def read() -> np.ndarray:
            return read_minari(Path(path) / DATASET).rewards
    elif who == "dsrl":
        import gymnasium
        from dsrl.offline_env import OfflineEnv

        env = OfflineEnv()
        env.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        env.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

        def read() -> np.ndarray:
            return np.asarray(env.get_dataset(path)["rewards"])
    else:
        os.environ["MINARI_DATASETS_PATH"] = path
        import minari

        def read() -> np.ndarray:
            episodes = list(minari.load_dataset(DATASET).iterate_episodes())
            return np.concatenate([episode.rewards for episode in episodes])

    serve(answer)


def main() -> None:
    """Compares the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5_000, help="of 200 steps")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    start = time.perf_counter()
    allowed = sorted(os.sched_getaffinity(0))
    print(machine(allowed, ("numpy", "h5py", "minari", "dsrl", "gymnasium")))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_files(place, options.episodes)
        sizes = {path.name: sum(f.stat().st_size for f in [path, *path.rglob("*")]) / 1e6 for path in place.iterdir()}
        print("files, MB: " + ", ".join(f"{name} {size:.0f}" for name, size in sorted(sizes.items())))
        print(f"\n{options.episodes * 200:,} steps, {options.turns} turns; seconds, medians\n")
        print("| cores | file | ours | peer | peer / ours | lowest, highest | CPU: ours | peer ", end="")
        print("| ours: peak RSS, MB | PSS, MB | peer: peak RSS, MB | PSS, MB |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for cores in options.cores:
            for name, who, peer, path in (
                ("ours", "ours", "dsrl", "ours.hdf5"),
                ("as published", "ours", "dsrl", "published.hdf5"),
                ("Minari", "ours-minari", "minari", "minari"),
            ):
                sides = [Side(k, OURS, [HERE, "side", k, place / path], allowed[:cores]) for k in (who, peer)]
                first = [found.ask(keep=False)["sum"] for found in sides]
                assert first[0] == first[1], f"{name}: the sides read different rewards"
                for turn in range(options.turns):
                    for found in sides if turn % 2 else sides[::-1]:
                        found.ask()
                ratio = paired_ratio(*sides)
                wall = " | ".join(f"{found.median('seconds'):.3f}" for found in sides)
                cpu = " | ".join(f"{found.median('cpu'):.3f}" for found in sides)
                print(f"| {cores} | {name} | {wall} | {ratio[0]:.1f} | {ratio[1]:.1f}, {ratio[2]:.1f} | {cpu} | "
                      f"{sides[0].memory()} | {sides[1].memory()} |", flush=True)  # fmt: skip
                for found in sides:
                    found.close()
    print(f"\nthe arrays themselves: {options.episodes * 200 * 82 / 1e6:.0f} MB")
    print(f"took {time.perf_counter() - start:.0f} s; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "side":
        side(*sys.argv[2:-2])
    else:
        main()
