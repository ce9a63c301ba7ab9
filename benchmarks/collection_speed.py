"""Collection beside FSRL's collector and beside bare ``env.step``: the same episodes a second, on the same cores.

    python benchmarks/collection_speed.py                                        # both tasks, 1 and 2 processes
    python benchmarks/collection_speed.py --tasks BallCircle --processes 2 --turns 3   # a quick look

All sides act by one network of (64, 64) with the same weights and sampled actions; only bare ``env.step`` is fed
actions that were drawn before. Each side is a process (with workers of its own) bound to as many cores as there are
processes, warm, and asked in turns for the same number of whole episodes.

| side | what it is |
|---|---|
| ours | ``springhead.rl.workers``: groups of ten episodes, the policy inside the worker, episodes back in the parent |
| FSRL | ``FastCollector`` into its replay buffer, with the vector environment and size that is the fastest here |
| env.step | the simulator package's own gymnasium environment, in as many processes, nothing kept, our actions |
| our env.step | the same loop over ``gymnasium.make("springhead/...")``, from the same seeds: the very same episodes |
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rl_sides import OURS, PEERS, Side, machine, paired_ratio, peer_versions, serve

GROUP = 10  # episodes stepped together
HERE = Path(__file__).resolve()
CANDIDATES = {
    1: [("dummy", 10), ("dummy", 20), ("shmem", 20)],
    2: [("dummy", 20), ("shmem", 2), ("shmem", 20), ("subproc", 20)],
}
"""FSRL's vector environments to choose from, by cores; Shmem with 20 is the default of its training scripts."""


def write_weights(path: Path, observation_dim: int, action_dim: int) -> None:
    """Draws one policy network's weights, for both sides."""
    rng = np.random.default_rng(0)
    sizes = [observation_dim, 64, 64, action_dim]
    weights = {"log_std": np.full(action_dim, -0.5, np.float32)}
    for layer in range(3):
        inputs, outputs = sizes[layer : layer + 2]
        weights[f"net.{2 * layer}.weight"] = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
        weights[f"net.{2 * layer}.bias"] = np.zeros(outputs, np.float32)
    np.savez(path, **weights)


# -- the sides, each in a process of its own ------------------------------------------------------


def our_policy(task_name: str, weights: str | Path) -> Any:
    """The policy as our side runs it."""
    from springhead.rl.acting import ExpertConfig, ExpertPolicy
    from springhead.rl.tasks import task

    of = task(task_name)
    dim = of.observation_dim
    config = ExpertConfig(
        of.name, "ppo-lag", 10.0, 0, 0, (0.0,) * dim, (1.0,) * dim, (64, 64), of.action_dim,
        head="bounded-gaussian", activation="relu",
    )  # fmt: skip
    return ExpertPolicy(config, dict(np.load(weights)))


def write_actions(path: Path, task_name: str, weights: Path) -> None:
    """Runs our policy for ten episodes, seeds 0 to 9, and keeps the actions of each for bare ``env.step``."""
    from springhead.rl.workers import EpisodeWorkers, Group

    seeds = tuple(range(GROUP))
    with EpisodeWorkers(task_name, GROUP) as workers:
        (episodes,) = workers.run([Group(our_policy(task_name, weights).with_seeds(seeds), seeds, 10.0)])
    np.savez(path, *[episode.actions for episode in episodes])


def ours(task_name: str, processes: str, weights: str) -> None:
    """Our collection: groups of episodes through the workers, all episodes back here."""
    from springhead.rl.workers import EpisodeWorkers, Group

    policy = our_policy(task_name, weights)
    seeds = iter(range(10**9))
    with EpisodeWorkers(task_name, GROUP, int(processes)) as workers:

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            starts = [tuple(next(seeds) for _ in range(GROUP)) for _ in range(request["episodes"] // GROUP)]
            groups = [Group(policy.with_seeds(start), start, 10.0) for start in starts]
            episodes = [episode for found in workers.run(groups) for episode in found]
            costs = [episode.cost_return for episode in episodes]
            return {"steps": sum(episode.length for episode in episodes), "cost": float(np.mean(costs))}

        serve(answer)


def bare(task_name: str, processes: str, actions: str, wrapped: str) -> None:
    """Bare ``env.step`` with actions drawn before, in processes of their own; one thread of work per process."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(int(processes))]
    children = [
        context.Process(target=step_bare, args=(theirs, task_name, actions, wrapped == "wrapped"), daemon=True)
        for _, theirs in pipes
    ]
    for child in children:
        child.start()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        for connection, _ in pipes:
            connection.send(request["episodes"] // len(pipes))
        return {"steps": sum(connection.recv() for connection, _ in pipes)}

    serve(answer)


def step_bare(connection: Any, task_name: str, drawn: str, wrapped: bool) -> None:
    """Steps one environment through whole episodes, and keeps nothing."""
    import gymnasium

    from springhead.rl.envs import make
    from springhead.rl.simulators.isolation import quiet
    from springhead.rl.tasks import task

    of = task(task_name)
    if wrapped:
        env = make(of.name)
    else:
        with quiet():
            import bullet_safety_gym  # noqa: F401  (registers the ids)

            env = gymnasium.make(of.env_id, disable_env_checker=True)
    drawn_before = np.load(drawn)
    actions = [list(drawn_before[f"arr_{number}"]) for number in range(GROUP)]
    while True:
        try:
            episodes = connection.recv()
        except EOFError:
            return
        steps = 0
        for number in range(episodes):
            env.reset(seed=number % GROUP)
            for action in actions[number % GROUP]:
                *_, terminated, truncated, _ = env.step(action)
                steps += 1
                if terminated or truncated:
                    break
        connection.send(steps)


# -- the comparison ---------------------------------------------------------------------------------


def fastest_fsrl(task: str, weights: Path, cores: list[int]) -> Side:
    """Tries FSRL's vector environments and returns the side with the fastest."""
    best, rate = None, 0.0
    for kind, number in CANDIDATES[min(len(cores), 2)]:
        script = [HERE.with_name("fsrl_side.py"), "collect", task, kind, str(number), weights]
        side = Side(f"FSRL, {kind} of {number}", PEERS, script, cores)
        side.ask(keep=False, episodes=number)  # warm
        found = side.ask(keep=False, episodes=20)
        reached = found["steps"] / found["seconds"]
        print(f"  {side.name}: {reached:.0f} steps/s", flush=True)
        if reached > rate:
            if best is not None:
                best.close()
            best, rate = side, reached
        else:
            side.close()
    assert best is not None
    return best


def compare(task: str, processes: int, turns: int, seconds: float, folder: Path) -> None:
    """Asks all sides in turns and prints one table."""
    from springhead.rl.tasks import task as known

    of = known(task)
    weights = folder / f"{task}.npz"
    drawn = folder / f"{task}-actions.npz"
    if not weights.exists():
        write_weights(weights, of.observation_dim, of.action_dim)
        write_actions(drawn, task, weights)
    cores = sorted(os.sched_getaffinity(0))[:processes]
    print(f"\n{task}, {processes} process(es) on cores {cores}; FSRL's vector environments:", flush=True)
    sides = [
        Side("ours", OURS, [HERE, "ours", task, str(processes), weights], cores),
        fastest_fsrl(task, weights, cores),
        Side("env.step", OURS, [HERE, "bare", task, str(processes), drawn, "plain"], cores),
        Side("our env.step", OURS, [HERE, "bare", task, str(processes), drawn, "wrapped"], cores),
    ]
    for side in sides:
        side.ask(keep=False, episodes=2 * GROUP * processes)
    found = sides[0].ask(keep=False, episodes=4 * GROUP)
    # As many episodes as we do in the given time; in full rounds of every side.
    episodes = max(round(seconds * found["steps"] / found["seconds"] / of.horizon / 40), 1) * 40
    for turn in range(turns):
        for side in sides[turn % 4 :] + sides[: turn % 4]:
            side.ask(episodes=episodes)
    print(f"\n{turns} turns of {episodes} episodes\n")
    print(
        "| side | steps/s, median | lowest | highest | steps per CPU second | ours to it | in each turn "
        "| per CPU second | peak RSS, MB | PSS, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for side in sides:
        rates, ratio, per_cpu = side.rates(), paired_ratio(sides[0], side), paired_ratio(sides[0], side, "cpu")
        compared = f"{ratio[0]:.2f} | {ratio[1]:.2f} to {ratio[2]:.2f} | {per_cpu[0]:.2f}"
        print(
            f"| {side.name} | {np.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} | "
            f"{np.median(side.rates('cpu')):.0f} | {'- | - | -' if side is sides[0] else compared} | {side.memory()} |",
            flush=True,
        )
    if "cost" in sides[1].runs[0]:
        print(f"\nmean episode cost: ours {sides[0].median('cost'):.2f}, FSRL {sides[1].median('cost'):.2f}")
    for side in sides:
        side.close()


def main() -> None:
    """Compares for each task and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["BallCircle", "CarRun"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of our side, in each turn")
    options = parser.parse_args()
    start = time.perf_counter()
    print(machine(os.sched_getaffinity(0), ("numpy", "gymnasium", "pybullet", "bullet-safety-gym")))
    print(peer_versions(("fast-safe-rl", "tianshou", "torch", "numpy", "gymnasium", "pybullet")))
    with tempfile.TemporaryDirectory() as folder:
        for task in options.tasks:
            for processes in options.processes:
                compare(task, processes, options.turns, options.seconds, Path(folder))
    print(f"\ntook {time.perf_counter() - start:.0f} s; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("ours", "bare"):
        {"ours": ours, "bare": bare}[sys.argv[1]](*sys.argv[2:-2])
    else:
        main()
