"""PPO-Lag beside FSRL's: wall time per 100,000 environment steps, collection and updates together.

    python benchmarks/ppo_lag_speed.py                                     # BallCircle and CarRun on 2 cores
    python benchmarks/ppo_lag_speed.py --tasks BallCircle --cores 1 --turns 2   # a quick look

Both sides train networks of (64, 64), ReLU, with 20 episodes per iteration, 4 epochs over minibatches of 512, GAE,
a PID Lagrangian, and a divergence target that is never reached, so that nobody stops early: the same number of
gradient steps. Each side is a process bound to the same cores; ours has as many workers as there are cores, FSRL the
vector environment that is the fastest here. They train in turns, one iteration of FSRL's ``step_per_epoch`` each.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rl_sides import OURS, PEERS, Side, machine, paired_ratio, peer_versions, serve

HERE = Path(__file__).resolve()
EPISODES, EPOCHS, MINIBATCH = 20, 4, 512
CANDIDATES = {1: [("dummy", 20)], 2: [("dummy", 20), ("shmem", 20), ("subproc", 20)]}
"""FSRL's vector environments to choose from, by cores; 20 environments is its scripts' default."""


def ours(task_name: str, processes: str) -> None:
    """Our learner; a request is some iterations."""
    from springhead.environment import settle
    from springhead.rl.online.ppo_lag import PPOLag, PPOLagConfig
    from springhead.rl.workers import EpisodeWorkers

    settle(0)
    # The ramp of the cost limit needs a length; it takes no time.
    config = PPOLagConfig(
        task=task_name, seed=0, iterations=10_000, episodes_per_iteration=EPISODES, num_envs=10, epochs=EPOCHS,
        minibatch=MINIBATCH, target_kl=1e9, activation="relu",
    )  # fmt: skip
    with EpisodeWorkers(task_name, config.num_envs, int(processes)) as workers:
        learner = PPOLag(config, workers)

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            before = learner.env_steps
            while learner.env_steps - before < request["steps"]:
                figures = learner.iterate()
            return {"steps": learner.env_steps - before, "return": figures.episode_return}

        serve(answer)


def compare(task: str, cores: list[int], turns: int, steps: int) -> None:
    """Trains both sides in turns and prints one table."""
    fsrl = [
        Side(
            f"FSRL, {kind} of {number}", PEERS,
            [HERE.with_name("fsrl_side.py"), "train", task, kind, number, EPISODES, EPOCHS, MINIBATCH], cores,
        )
        for kind, number in CANDIDATES[min(len(cores), 2)]
    ]  # fmt: skip
    us = Side("ours", OURS, [HERE, "ours", task, str(len(cores))], cores)
    for side in [us, *fsrl]:  # the first iteration starts workers, imports and compiles
        side.ask(keep=False, steps=1)
    tried = [side.ask(keep=False, steps=steps) for side in fsrl]
    fastest = min(range(len(fsrl)), key=lambda k: tried[k]["seconds"])
    for index, side in enumerate(fsrl):
        print(f"  {side.name}: {tried[index]['seconds'] / tried[index]['steps'] * 1e5:.1f} s per 100,000 steps")
        if index != fastest:
            side.close()
    sides = [us, fsrl[fastest]]
    for turn in range(turns):
        for side in sides if turn % 2 else sides[::-1]:
            side.ask(steps=steps)
    print(f"\n{task}, cores {cores}, {turns} turns of {int(us.median('steps')):,} steps\n")
    print(
        "| side | s per 100,000 steps, median | lowest | highest | CPU s per 100,000 steps | peak RSS, MB | PSS, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for side in sides:
        seconds = [1e5 / rate for rate in side.rates()]
        cpu = np.median([1e5 / rate for rate in side.rates("cpu")])
        print(
            f"| {side.name} | {np.median(seconds):.1f} | {min(seconds):.1f} | {max(seconds):.1f} | {cpu:.1f} | "
            f"{side.memory()} |"
        )
    wall, cpu_ratio = paired_ratio(*sides), paired_ratio(*sides, "cpu")
    print(
        f"\nours is {wall[0]:.2f} times as fast ({wall[1]:.2f} to {wall[2]:.2f} in each turn), "
        f"and takes 1/{cpu_ratio[0]:.2f} of the processor time",
        flush=True,
    )
    for side in sides:
        side.close()


def main() -> None:
    """Compares for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["BallCircle", "CarRun"])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000, help="per turn")
    options = parser.parse_args()
    start = time.perf_counter()
    print(machine(os.sched_getaffinity(0), ("torch", "numpy", "gymnasium", "pybullet")))
    print(peer_versions(("fast-safe-rl", "tianshou", "torch", "numpy", "gymnasium", "pybullet")))
    for task in options.tasks:
        print(f"\n{task}; FSRL's vector environments:", flush=True)
        compare(task, sorted(os.sched_getaffinity(0))[: options.cores], options.turns, options.steps)
    print(f"\ntook {time.perf_counter() - start:.0f} s; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "ours":
        ours(*sys.argv[2:-2])
    else:
        main()
