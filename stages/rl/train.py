"""Trains one offline algorithm on one task's validated episodes, with one seed.

Reads the filtered data set and the verdict on it. Writes the policy folder ``model/``, policies of earlier steps where
the settings ask for some (``policies/<step>/``), and the learning curve ``history.csv``. An algorithm that is trained
for one cost limit is trained for all of the task's limits at once. A killed run resumes from its last checkpoint, to
the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest
from springhead.params import load
from springhead.rl.dataset import Episode, read_dsrl
from springhead.rl.offline.algorithms import ALGORITHMS, entry
from springhead.rl.offline.batches import write_history
from springhead.rl.offline.contract import Settings
from springhead.rl.offline.training import Trained, train
from springhead.rl.policy import save_model
from springhead.rl.tasks import Task, task
from springhead.stage import Stage, run_stage

ByAlgorithm = dict[str, dict[str, Any]]
"""Hyper-parameters by block: an algorithm's name, or ``bc`` for all six kinds of behavioural cloning."""


@dataclass(frozen=True)
class Params:
    """Parameters of ``rl.train``."""

    algorithms: ByAlgorithm
    """What differs from the algorithms' defaults: fields of their settings in ``springhead/rl/offline``."""
    tasks: dict[str, ByAlgorithm] = field(default_factory=dict)
    """The same for one task alone; these win."""

    def __post_init__(self) -> None:
        known = sorted({found.block for found in ALGORITHMS.values()})
        for block in (*self.algorithms, *(name for own in self.tasks.values() for name in own)):
            if block not in known:
                raise ValueError(f"unknown algorithm {block!r}; known: {', '.join(known)}")


def settings(params: Params, task_name: str, algorithm: str) -> Settings:
    """The hyper-parameters of an algorithm on a task.

    Raises:
        BadInput: If there is no such algorithm, or a hyper-parameter is unknown or out of range.
    """
    try:
        found = entry(algorithm)
    except BadInput as error:
        raise BadInput(f"params.yaml: rl.algorithms: {error}") from None
    values = params.algorithms.get(found.block, {})
    made = load(found.settings_class(), values, f"params.yaml: rl.train.algorithms.{found.block}")
    if own := params.tasks.get(task_name, {}).get(found.block):  # again, so that an error names the place to mend
        where = f"params.yaml: rl.train.tasks.{task_name}.{found.block}"
        made = load(found.settings_class(), {**values, **own}, where)
    return made


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
    chosen = settings(stage.params, of.name, algorithm)
    every = max(1, chosen.steps // 200)  # points of the curves in MLflow
    logged = 0
    with stage.progress(chosen.steps, stage.name, "steps") as bar:

        def on_step(step: int, figures: dict[str, float]) -> None:
            nonlocal logged
            if not figures:
                bar.resume(step)
                logged = step
                return
            bar.advance(step - bar.done, **figures)
            if step - logged >= every or step == chosen.steps:
                stage.log(step, **figures)
                logged = step

        return train(algorithm, episodes, of, chosen, [stage.seed], stage.scratch, on_step)[0]


def run(stage: Stage[Params]) -> None:
    """Trains and writes the model folder and the policies on the way to it."""
    of = task(stage.item["task"])
    data = stage.input("filter")
    for verdict in stage.inputs("validate"):
        check_verdict(verdict / "verdict.json" if verdict.is_dir() else verdict, data)
    episodes = read_dsrl(data / "dataset.hdf5").episodes()
    stage.dataset(data / "dataset.hdf5", f"{of.name} filtered episodes", len(episodes), role="training")
    trained = learn(stage, episodes, of)
    save_model(stage.out / "model", trained.config, trained.files)
    for step, files in trained.policies.items():
        save_model(stage.out / "policies" / f"{step:08d}", {**trained.config, "step": step}, files)
    write_history(stage.out / "history.csv", trained.history)
    facts = {key: stage.item[key] for key in ("task", "algorithm", "seed")}
    stage.model(stage.out / "model", "policy", **facts)
    stage.metrics({key: value for key, value in trained.history[-1].items() if key != "step"})


def main() -> None:
    """Runs the stage for the task, algorithm and seed named on the command line."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
