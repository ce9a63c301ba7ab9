"""The forms in which a promoted model is stored for its users.

A policy becomes an MLflow model from code (:mod:`springhead.serving`) with its folder as artifact,
a signature and an input example, which ``mlflow models serve`` can serve; nothing is pickled. A
language model stays the folder it is: what MLflow gives back loads with
``AutoModelForCausalLM.from_pretrained``.
"""

import shutil
from importlib import metadata
from pathlib import Path

from springhead.errors import BadInput
from springhead.jsonio import read_json

POLICY, LANGUAGE_MODEL = "policy", "language-model"
_PACKAGES = ("mlflow", "numpy", "safetensors", "torch")  # what serving a policy imports


def kind(folder: Path) -> str:
    """Returns ``policy`` or ``language-model``, by the folder's configuration.

    Raises:
        BadInput: if it is neither.
    """
    config = read_json(folder / ("config.json" if (folder / "config.json").is_file() else "policy.json"))
    if "algorithm" in config:
        return POLICY
    if "architectures" in config or "model_type" in config:
        return LANGUAGE_MODEL
    raise BadInput(f"{folder}: neither a policy nor a language model, by its config.json")


def within(folder: Path) -> str:
    """Returns where the model folder will lie inside what MLflow stores."""
    return f"artifacts/{folder.name}" if kind(folder) == POLICY else "."


def prepare(folder: Path, target: Path, cost_limit: float | None) -> Path:
    """Makes the folder to upload and returns it.

    Args:
        folder: the model folder; it is only read.
        target: a folder to make.
        cost_limit: the default of the served policy's parameter ``cost_limit``, which it has where it acts
            differently under different limits.
    """
    if kind(folder) == LANGUAGE_MODEL:
        return folder
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    from springhead.rl.offline.algorithms import ALGORITHMS
    from springhead.rl.policy import load_policy

    policy = load_policy(folder)
    shape = (-1, policy.observation_dim)
    default = 0.0 if cost_limit is None else float(cost_limit)
    heeds = policy.algorithm in ALGORITHMS and ALGORITHMS[policy.algorithm].knows_limits
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, policy.action_dim))]),
        params=ParamSchema([ParamSpec("cost_limit", "double", default)]) if heeds else None,
    )
    mlflow.pyfunc.save_model(
        str(target),
        python_model=str(Path(__file__).with_name("serving.py")),
        artifacts={POLICY: str(folder)},
        signature=signature,
        input_example=np.zeros((2, policy.observation_dim), np.float32),
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in _PACKAGES],
        metadata={"task": policy.task, "algorithm": policy.algorithm},
    )
    if not (target / "artifacts" / folder.name).is_dir():
        shutil.rmtree(target)
        raise BadInput(f"{folder}: MLflow did not take the folder as an artifact; its name must be a plain one")
    return target
