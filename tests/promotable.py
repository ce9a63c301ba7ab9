"""A small checkout with everything a promotion looks at: data, real policies, receipts and a ledger."""

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from springhead.jsonio import read_json, write_json
from springhead.keys import Keys
from springhead.lineage.digests import file_digest, files_digest, tree_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import describe, receipt_path

TASK = "BallCircle"
NAME = f"policy-{TASK}"
RETURNS = {"bc-safe": (0.40, 0.45), "cdt": (0.60, 0.55)}
REPOSITORY = Path(__file__).parents[1]


def policy(folder: Path, seed: int) -> None:
    """Trains a real policy for a few steps on random episodes."""
    from springhead.rl.dataset import Episode
    from springhead.rl.offline import bc, training
    from springhead.rl.policy import save_model
    from springhead.rl.tasks import task

    of, generator = task(TASK), np.random.default_rng(seed)
    episodes = []
    for _ in range(3):
        observations = generator.standard_normal((9, of.observation_dim), dtype=np.float32)
        end = np.arange(8) == 7
        zeros = np.zeros(8, np.float32)
        actions = generator.uniform(-1, 1, (8, of.action_dim)).astype(np.float32)
        episodes.append(Episode(observations[:-1], observations[1:], actions, zeros + 1, zeros, end & False, end))
    settings = bc.BCSettings(steps=2, batch_size=4, hidden=(8,))
    trained = training.train("bc-safe", episodes, of, settings, [seed], folder.parent / ".scratch")[0]
    save_model(folder, trained.config, trained.files)
    shutil.rmtree(folder.parent / ".scratch", ignore_errors=True)


def empty_store(factory: pytest.TempPathFactory) -> Path:
    """Returns an MLflow database with its tables, made once in a test session because it takes seconds."""
    return _empty_store(factory.getbasetemp())


def with_store(factory: pytest.TempPathFactory) -> Path:
    """Returns a checkout with all stages and an MLflow database of its own, to copy for each test."""
    checkout = Checkout(factory.mktemp("promotable") / "checkout").all()
    shutil.copy(empty_store(factory), checkout.home / "mlflow.db")
    return checkout.root


@functools.cache
def _empty_store(base: Path) -> Path:
    from springhead import tracking

    home = base / "empty-store"
    home.mkdir()
    tracking.connect(home)
    return home / "mlflow.db"


class Checkout:
    """Writes stage outputs with honest receipts; tests then break one thing at a time."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / ".springhead"
        self.home.mkdir(parents=True, exist_ok=True)
        (root / "mlflow").mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "mlflow" / "gates.yaml", root / "mlflow" / "gates.yaml")
        (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")

    def receipt(self, stage: str, output: str, reads: list[str], models: list[str] | None = None) -> None:
        """Writes the receipt of a stage as it stands now, and its ledger entry."""
        declared = [
            {"path": path, "sha256": tree_digest(self.root / path), "kind": "policy", "facts": {"task": TASK}}
            for path in models or []
        ]
        receipt = {
            "stage": stage,
            "command": f"python -m stages.{stage}",
            "params": {"seed": 0},
            "seed": 1,
            "dependencies": {p: {k: v for k, v in describe(self.root / p).items() if k != "files"} for p in reads},
            "code": {"digest": files_digest({"stages/x.py": "d" * 64}), "files": {"stages/x.py": "d" * 64}},
            "environment": {"python": "3.11", "lock": {}, "packages": {}},
            "outputs": {output: describe(self.root / output)},
            "datasets": [],
            "models": declared,
            "metrics": {},
        }
        path = receipt_path(self.root, stage)
        write_json(path, receipt)
        body = {"execution": f"x-{stage}", "stage": stage, "receipt": file_digest(path), "git": {"revision": "c0ffee"}}
        Ledger(self.home).append("execution", body | {"inputs": "", "models": declared}, Keys.of(self.root, self.home))

    def filter(self, content: str = "episodes") -> None:
        for step in ("collect", "filter"):
            folder = self.root / f"data/rl/{step}/{TASK}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "dataset.hdf5").write_text(f"{content} after {step}")
            reads = [] if step == "collect" else [f"data/rl/collect/{TASK}"]
            self.receipt(f"rl-{step}@{TASK}", f"data/rl/{step}/{TASK}", reads)

    def validate(self, success: bool = True, severity: str = "none", data_digest: str | None = None) -> None:
        data, out = f"data/rl/filter/{TASK}", f"data/rl/validate/{TASK}"
        verdict = {
            "suite": "rl",
            "data_digest": data_digest or tree_digest(self.root / data),
            "success": success,
            "severity": severity,
            "expectations": [{"name": "costs are not negative", "success": severity == "none", "severity": severity}],
        }
        write_json(self.root / out / "verdict.json", verdict)
        self.receipt(f"rl-validate@{TASK}", out, [data])

    def train(self, offset: int = 0) -> None:
        for algorithm in RETURNS:
            for seed in (0, 1):
                out = f"data/rl/train/{TASK}/{algorithm}/{seed}"
                shutil.rmtree(self.root / out, ignore_errors=True)
                policy(self.root / out / "model", seed + offset + 10 * (algorithm == "cdt"))
                reads = [f"data/rl/filter/{TASK}", f"data/rl/validate/{TASK}/verdict.json"]
                self.receipt(f"rl-train@{TASK}-{algorithm}-{seed}", out, reads, [f"{out}/model"])

    def evaluate(self, bonus: float = 0.0, **cost: float) -> None:
        """Evaluates; ``cost`` overrides the normalised cost by algorithm (dashes as underscores)."""
        models = []
        for algorithm, returns in RETURNS.items():
            for seed, value in enumerate(returns):
                path = f"data/rl/train/{TASK}/{algorithm}/{seed}/model"
                figures = {"normalised_cost": cost.get(algorithm.replace("-", "_"), 0.8), "violation_probability": 0.1}
                limits = {limit: {**figures, "normalised_return": 0.0} for limit in ("5", "100")}
                limits["20"] = {**figures, "normalised_return": value + bonus}
                who = {"algorithm": algorithm, "seed": seed, "path": path}
                models.append({**who, "digest": tree_digest(self.root / path), "limits": limits})
        zero = {"normalised_return": 0.05, "normalised_cost": 3.0, "violation_probability": 1.0}
        references = [
            {"algorithm": name, "seed": None, "path": name, "digest": None, "limits": {"20": zero}}
            for name in ("random", "worst-expert")
        ]
        out = f"data/rl/evaluate/{TASK}"
        write_json(self.root / out / "summary.json", {"task": TASK, "models": models, "references": references})
        self.receipt(f"rl-evaluate@{TASK}", out, [f"data/rl/filter/{TASK}", f"data/rl/train/{TASK}"])

    def all(self) -> "Checkout":
        self.filter()
        self.validate()
        self.train()
        self.evaluate()
        return self

    def change(self, path: str, **values: Any) -> None:
        """Changes keys of a JSON file behind its receipt's back."""
        write_json(self.root / path, read_json(self.root / path) | values)
