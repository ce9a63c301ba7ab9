"""Trains one offline algorithm on one task's validated episodes, with one seed.

Reads the filtered data set and the verdict on it. Writes the policy folder ``model/`` and the learning
curve ``history.csv``. A killed run resumes from its last checkpoint, to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.rl.dataset import Episode, read_dsrl
from springhead.rl.offline import bc, cdt
from springhead.rl.offline.batches import Trained, write_history
from springhead.rl.policy import save_model
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.train``: one block for each family of algorithms."""

    bc: bc.Settings
    """Behavioural cloning: bc-all, bc-safe, bc-risky, bc-boundary, bc-frontier, bc-multi-task."""
    cdt: cdt.Settings
    """The Constrained Decision Transformer: cdt."""


def check_verdict(verdict_path: Path, data: Path) -> None:
    """Refuses data that its verdict does not speak for.

    Raises:
        BadInput: If the verdict was given on other data.
        Finding: If a critical expectation failed.
    """
    verdict = read_json(verdict_path)
    if verdict.get("data_digest") != tree_digest(data):
        raise BadInput(f"{verdict_path}: the verdict is on other data than {data}; run the validate stage again")
    if not verdict.get("success"):
        raise Finding(f"{verdict_path}: the data set failed validation; mend it before training on it")


def learn(stage: Stage[Params], episodes: list[Episode], of: Task) -> Trained:
    """Trains the algorithm that the item names.

    Raises:
        BadInput: If there is no such algorithm, or the data do not fit it.
    """
    algorithm = stage.item["algorithm"]
    steps = stage.params.cdt.steps if algorithm == "cdt" else stage.params.bc.steps
    every = max(1, steps // 200)  # points of the curves in MLflow
    with stage.progress(steps, stage.name, "steps") as bar:

        def on_step(step: int, figures: dict[str, float]) -> None:
            if not figures:
                bar.resume(step)
                return
            bar.advance(1, **figures)
            if step % every == 0 or step == steps:
                stage.log(step, **figures)

        if algorithm == "cdt":
            return cdt.train(episodes, of, stage.params.cdt, stage.seed, stage.scratch, on_step)
        if algorithm.startswith("bc-") and (mode := algorithm.removeprefix("bc-")) in bc.MODES:
            return bc.train(mode, episodes, of, stage.params.bc, stage.seed, stage.scratch, on_step)
    known = ", ".join([f"bc-{mode}" for mode in bc.MODES] + ["cdt"])
    raise BadInput(f"params.yaml: rl.algorithms: unknown algorithm {algorithm!r}; known: {known}")


def run(stage: Stage[Params]) -> None:
    """Trains and writes the model folder."""
    of = task(stage.item["task"])
    data = stage.input("filter")
    for verdict in stage.inputs("validate"):
        check_verdict(verdict / "verdict.json" if verdict.is_dir() else verdict, data)
    episodes = read_dsrl(data / "dataset.hdf5").episodes()
    stage.dataset(data / "dataset.hdf5", f"{of.name} filtered episodes", len(episodes), role="training")
    trained = learn(stage, episodes, of)
    save_model(stage.out / "model", trained.config, trained.files)
    write_history(stage.out / "history.csv", trained.history)
    facts = {key: stage.item[key] for key in ("task", "algorithm", "seed")}
    stage.model(stage.out / "model", "policy", **facts)
    last = trained.history[-1]
    stage.metrics({key: value for key, value in last.items() if key.startswith("loss")})


def main() -> None:
    """Runs the stage for the task, algorithm and seed named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
