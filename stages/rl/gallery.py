"""Films one task's experts: an episode of the best one that keeps a cost limit, and of the one with most reward.

Reads the experts. Writes a GIF of each and ``gallery.json``, which says who acts in it. Nothing depends on this stage,
and a machine that cannot draw the task writes why instead of a film, so pictures never stand in the way of a model.
The pictures come from a software renderer: the same machine gives the same bytes, another may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.rl import film
from springhead.rl.acting import load_expert
from springhead.rl.envs import record
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.gallery``."""

    pictures: int
    """Pictures of a whole episode, evenly spaced, beside the one of its last state."""
    colours: int
    """Colours of a film; fewer make smaller files."""

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError("pictures must be at least 1")
        if not 8 <= self.colours <= 256:
            raise ValueError("colours must be from 8 to 256")


def cast(experts: Sequence[dict[str, Any]], of: Task) -> dict[str, dict[str, Any]]:
    """Chooses who acts, by role.

    Returns:
        ``safe``: most return of those whose mean cost keeps the middle limit, or the lowest cost if none does;
        ``greedy``: most return of all, left out if it is the same policy.

    Raises:
        BadInput: If there are no experts.
    """
    if not experts:
        raise BadInput("rl-gallery: index.json names no experts; train some first")
    within = [expert for expert in experts if expert["cost_return"] <= of.limits[1]]
    safe = max(within, key=_return) if within else min(experts, key=lambda expert: float(expert["cost_return"]))
    greedy = max(experts, key=_return)
    return {"safe": safe} if greedy["name"] == safe["name"] else {"safe": safe, "greedy": greedy}


def _return(expert: dict[str, Any]) -> float:
    return float(expert["episode_return"])


def film_one(out: Path, folder: Path, expert: dict[str, Any], of: Task, seed: int, params: Params) -> dict[str, Any]:
    """Films one episode of an expert's mean actions and returns its entry of ``gallery.json``."""
    every = max(1, of.horizon // params.pictures)
    known = {key: expert[key] for key in ("name", "digest", "algorithm", "cost_limit", "seed")}
    policy = load_expert(folder)
    try:
        pictures, episode = record(of.name, policy, seed, float(expert["cost_limit"]), every)
    except BadInput as error:  # no renderer on this machine
        return {**known, "film": None, "why": str(error)}
    film.write_gif(out, pictures, episode, every, params.colours)
    figures = {"episode_return": episode.episode_return, "cost_return": episode.cost_return}
    return {**known, "film": out.name, "reset_seed": seed, "length": episode.length, **figures}


def run(stage: Stage[Params]) -> None:
    """Films the experts of the task; there are none where all data is imported."""
    of = task(stage.item["task"])
    experts = stage.input("experts")
    index = read_json(experts / "index.json")
    entries = {}
    for role, expert in (cast(index, of) if index else {}).items():
        path = stage.out / f"{role}.gif"
        entries[role] = film_one(path, experts / expert["name"], expert, of, stage.seed, stage.params)
    write_json(stage.out / "gallery.json", entries)


def main() -> None:
    """Runs the stage for the task named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
