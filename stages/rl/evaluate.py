"""Evaluates all models of one task under its three cost limits, beside a random policy and the experts.

Reads the models, the experts and the data set they learned from. Writes every episode
(``episodes.parquet``), every model's figures (``summary.json``), means and spreads over seeds
(``leaderboard.csv``), and the reward-cost frontier (``frontier.csv``, ``frontier.png``).

Where training kept policies on the way, the last one is reported and, beside it, the one that is best by the
feasible-first rule: chosen for each limit on episodes of its own, reported on the same episodes as all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest
from springhead.rl import plots
from springhead.rl.dataset import read_dsrl
from springhead.rl.evaluation import (
    Job,
    Outcome,
    comparisons,
    episode_seeds,
    expert_extremes,
    feasible_first,
    figures,
    over_seeds,
    run_jobs,
)
from springhead.rl.offline.algorithms import entry
from springhead.rl.policy import read_config
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage
from springhead.tables import write_csv, write_table


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.evaluate``."""

    episodes: int
    """Episodes per model and cost limit."""
    num_envs: int
    """Environments stepped together."""
    processes: int
    """Worker processes; the results do not depend on their number."""
    selection_episodes: int = 10
    """Episodes per policy and limit by which one is chosen among those kept while training; others than those
    reported. 0 chooses none."""

    def __post_init__(self) -> None:
        if min(self.episodes, self.num_envs, self.processes) < 1 or self.selection_episodes < 0:
            raise ValueError("episodes, num_envs and processes must be at least 1, and selection_episodes 0 or more")


EPISODES = pa.schema(
    [
        ("algorithm", pa.string()),
        ("model", pa.string()),
        ("model_seed", pa.int64()),
        ("cost_limit", pa.float64()),
        ("episode_seed", pa.int64()),
        ("episode_return", pa.float64()),
        ("cost_return", pa.float64()),
        ("length", pa.int64()),
    ]
)
"""One row per evaluation episode; ``model`` is the digest of the policy folder, null for the random policy."""

SELECTION = 1
"""The stream of the episodes by which policies are chosen."""

REFERENCES = ("random", "worst-expert", "best-expert")
"""Rows of the leaderboard that no offline algorithm made."""


@dataclass(frozen=True)
class Entrant:
    """A policy to evaluate under some limits."""

    algorithm: str
    seed: int | None
    path: Path | None
    name: str
    digest: str | None
    limits: tuple[float, ...]
    runs: tuple[float, ...]
    """The limits it runs under; what it gets under the first of them counts for those that are not here."""


def limits_of(trained: Sequence[float], of: Task) -> tuple[float, ...]:
    """The task's limits that a policy can be asked to keep, and its own; in ascending order.

    Args:
        trained: The limits it was trained for, or is to be asked for; empty for the task's.
        of: The task.
    """
    if not trained:
        return of.limits
    return tuple(sorted({*trained, *(limit for limit in of.limits if limit >= min(trained))}))


def models(folders: Sequence[Path], root: Path, of: Task) -> list[Entrant]:
    """Finds the policies below the train stage's outputs, in order of algorithm and seed.

    Raises:
        BadInput: If there is none, or one was trained for another task.
    """
    found = []
    for path in sorted(path.parent for folder in folders for path in folder.rglob("model/config.json")):
        config = read_config(path)
        if config["task"] != of.name:
            raise BadInput(f"{path}: trained for {config['task']}, not for {of.name}; remove it from data/rl/train")
        seed = path.parent.name
        if not seed.isdigit():
            raise BadInput(f"{path}: expected …/<algorithm>/<seed>/model; the folder above is {seed!r}, not a seed")
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        limits = limits_of(config.get("limits") or config.get("asked_limits", ()), of)
        runs = limits if entry(config["algorithm"]).knows_limits else limits[:1]
        found.append(Entrant(config["algorithm"], int(seed), path, name, tree_digest(path), limits, runs))
    if not found:
        raise BadInput(f"{', '.join(map(str, folders))}: no policy folder below; train a model first")
    return sorted(found, key=lambda entrant: (entrant.algorithm, entrant.seed))


def references(experts: Path, root: Path, trained: Sequence[Entrant]) -> list[Entrant]:
    """The random policy, the worst expert, and for each limit the best expert; no experts where all is imported.

    They are there under every limit of a model, so that each model has something to be compared with.
    """
    index = read_json(experts / "index.json")
    asked = tuple(sorted({limit for entrant in trained for limit in entrant.limits}))
    random = Entrant("random", None, None, "random", None, asked, asked[:1])
    if not index:
        return [random]
    worst, best = expert_extremes(index, asked)

    def expert(role: str, name: str, limits: tuple[float, ...]) -> Entrant:
        path = experts / name
        shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else name
        return Entrant(role, None, path, shown, tree_digest(path), limits, limits[:1])

    chosen = [random, expert("worst-expert", worst, asked)]
    for name in dict.fromkeys(best.values()):
        chosen.append(expert("best-expert", name, tuple(limit for limit in asked if best[limit] == name)))
    return chosen


def evaluate(stage: Stage[Params], of: Task, entrants: Sequence[Entrant]) -> dict[tuple[int, float], Outcome]:
    """Runs every entrant under its limits; the result is keyed by entrant number and limit.

    What acts alike under every limit runs once.
    """
    params = stage.params
    seeds = episode_seeds(stage.seed, params.episodes)
    keys = [(number, limit) for number, entrant in enumerate(entrants) for limit in entrant.runs]
    jobs = [Job(of.name, entrants[number].path, limit, seeds, params.num_envs) for number, limit in keys]
    with stage.progress(len(jobs), stage.name, "evaluations") as bar:
        outcomes = dict(zip(keys, run_jobs(jobs, params.processes, lambda done: bar.advance(1)), strict=True))
    for number, entrant in enumerate(entrants):
        for limit in entrant.limits:
            outcomes.setdefault((number, limit), outcomes[number, entrant.runs[0]])
    return outcomes


def kept(entrant: Entrant) -> dict[int, Path]:
    """The policies kept while the entrant was trained, by their step, in order; the last one is not among them."""
    assert entrant.path is not None
    return {int(path.name): path for path in sorted(entrant.path.parent.glob("policies/*")) if path.name.isdigit()}


def choose(
    stage: Stage[Params], of: Task, trained: Sequence[Entrant], last: dict[tuple[int, float], Outcome]
) -> list[dict[str, Any]]:
    """Chooses a policy of each model and limit by the feasible-first rule and reports on it.

    Args:
        stage: The stage.
        of: The task.
        trained: The models; those without policies kept on the way are left out.
        last: The reported episodes of every model's last policy, by number and limit.

    Returns:
        One entry per model: algorithm, seed, path, and by limit the figures with the ``step`` of the chosen policy
        (None for the last).
    """
    params = stage.params
    if not params.selection_episodes:
        return []
    tried = episode_seeds(stage.seed, params.selection_episodes, SELECTION)
    reported = episode_seeds(stage.seed, params.episodes)
    candidates = {
        number: {**kept(entrant), None: entrant.path} for number, entrant in enumerate(trained) if kept(entrant)
    }
    keys = [(n, limit, step) for n, steps in candidates.items() for limit in trained[n].runs for step in steps]

    def jobs(wanted: Sequence[tuple[int, float, int | None]], seeds: tuple[int, ...]) -> list[Job]:
        return [Job(of.name, candidates[n][step], limit, seeds, params.num_envs) for n, limit, step in wanted]

    if not keys:
        return []
    with stage.progress(len(keys), f"{stage.name} feasible-first", "evaluations") as bar:
        first = dict(zip(keys, run_jobs(jobs(keys, tried), params.processes, lambda done: bar.advance(1)), strict=True))
    picks = []
    for number, steps in candidates.items():
        for limit in trained[number].limits:
            ran = limit if limit in trained[number].runs else trained[number].runs[0]
            best = feasible_first([first[number, ran, step] for step in steps], limit)
            picks.append((number, limit, list(steps)[best]))
    earlier = [pick for pick in picks if pick[2] is not None]
    again = dict(zip(earlier, run_jobs(jobs(earlier, reported), params.processes), strict=True))
    found: dict[int, dict[str, Any]] = {}
    for number, limit, step in picks:
        entrant = trained[number]
        line = found.setdefault(
            number, {"algorithm": entrant.algorithm, "seed": entrant.seed, "path": entrant.name, "limits": {}}
        )
        outcome = last[number, limit] if step is None else again[number, limit, step]
        line["limits"][f"{limit:g}"] = {"step": step, **figures(outcome, of, limit)}
    return list(found.values())


def write_episodes(
    path: Path, entrants: Sequence[Entrant], outcomes: dict[tuple[int, float], Outcome], seeds: Sequence[int]
) -> None:
    """Writes the table of all episodes."""
    columns: dict[str, list[Any]] = {name: [] for name in EPISODES.names}
    for number, entrant in enumerate(entrants):
        for limit in entrant.limits:
            outcome = outcomes[number, limit]
            count = len(outcome.returns)
            columns["algorithm"] += [entrant.algorithm] * count
            columns["model"] += [entrant.digest] * count
            columns["model_seed"] += [entrant.seed] * count
            columns["cost_limit"] += [limit] * count
            columns["episode_seed"] += list(seeds)
            columns["episode_return"] += outcome.returns.tolist()
            columns["cost_return"] += outcome.costs.tolist()
            columns["length"] += outcome.lengths.tolist()
    write_table(path, columns, EPISODES)


def summarise(
    of: Task, entrants: Sequence[Entrant], outcomes: dict[tuple[int, float], Outcome]
) -> list[dict[str, Any]]:
    """Returns one entry per entrant: what it is, and its figures by limit."""
    return [
        {
            "algorithm": entrant.algorithm,
            "seed": entrant.seed,
            "path": entrant.name,
            "digest": entrant.digest,
            "limits": {f"{limit:g}": figures(outcomes[number, limit], of, limit) for limit in entrant.limits},
        }
        for number, entrant in enumerate(entrants)
    ]


def write_frontier(out: Path, data: Path, of: Task, rows: Sequence[dict[str, Any]]) -> None:
    """Writes where each algorithm ended up on the reward-cost plane, as CSV and as a plot over the data."""
    names = ("cost_return", "episode_return", "cost_return_spread", "episode_return_spread")
    write_csv(out / "frontier.csv", [{k: row[k] for k in ("algorithm", "cost_limit", *names)} for row in rows])
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        cost, value, cost_spread, value_spread = (float(row[name]) for name in names)
        points.setdefault(row["algorithm"], []).append((cost, value, cost_spread, value_spread))
    dataset = read_dsrl(data / "dataset.hdf5")
    title = f"{of.name}: policies under the limits {', '.join(f'{limit:g}' for limit in of.limits)}"
    plots.frontier(out / "frontier.png", dataset.episode_returns, dataset.cost_returns, points, of.limits, title)


def compact(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The metrics DVC and MLflow show: by algorithm and limit, the mean over seeds."""
    shown = ("normalised_return", "normalised_cost", "violation_probability")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        found.setdefault(row["algorithm"], {})[f"{row['cost_limit']:g}"] = {key: round(row[key], 6) for key in shown}
    return found


def run(stage: Stage[Params]) -> None:
    """Evaluates everything and writes the tables and plots."""
    of = task(stage.item["task"])
    trained = models(stage.inputs("train"), stage.root, of)
    compared = references(stage.input("experts"), stage.root, trained)
    entrants = [*trained, *compared]
    outcomes = evaluate(stage, of, entrants)
    entries = summarise(of, entrants, outcomes)
    rows = over_seeds(entries)
    write_episodes(stage.out / "episodes.parquet", entrants, outcomes, episode_seeds(stage.seed, stage.params.episodes))
    chosen = choose(stage, of, trained, outcomes)
    board = [{"checkpoint": "last", **row} for row in rows]
    board += [{"checkpoint": "feasible-first", **row} for row in over_seeds(chosen)]
    write_csv(stage.out / "leaderboard.csv", board)
    write_frontier(stage.out, stage.input("filter"), of, rows)
    write_json(
        stage.out / "summary.json",
        {
            "task": of.name,
            "cost_limits": list(of.limits),
            "middle_limit": sorted(of.limits)[len(of.limits) // 2],
            "models": entries[: len(trained)],
            "references": entries[len(trained) :],
            "leaderboard": rows,
            "feasible_first": chosen,
            "comparisons": comparisons(rows, REFERENCES),
        },
    )
    stage.metrics(compact(rows))


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
