"""What a policy is to the rest of the project, and how one is saved and loaded.

A trained policy is a folder: ``config.json`` says which algorithm it is and how its networks are
shaped, and ``*.safetensors`` files hold the weights. Experts from the online algorithms lie in the
same kind of folder under the names ``policy.json`` and ``policy.safetensors``. Nothing here reads
pickled code, so loading a model from a stranger cannot run anything.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.rl.acting import load_expert

FORMAT = 1
"""Version of the folder layout; a reader refuses folders of a later version."""

_ACTOR = "springhead.rl.offline.actor_policy"
LOADERS: Mapping[str, str] = {
    "bc-all": _ACTOR,
    "bc-boundary": _ACTOR,
    "bc-frontier": _ACTOR,
    "bc-multi-task": _ACTOR,
    "bc-risky": _ACTOR,
    "bc-safe": _ACTOR,
    "bcq-lag": "springhead.rl.offline.bcq_lag",
    "bear-lag": _ACTOR,
    "cde": _ACTOR,
    "cdt": "springhead.rl.offline.cdt",
    "coptidice": _ACTOR,
    "cpq": _ACTOR,
    "cql": _ACTOR,
    "iql": _ACTOR,
    "optidice": _ACTOR,
    "td3-bc": _ACTOR,
}
"""The module that loads each offline algorithm's folders with ``load(folder) -> Policy``; imported on use.
Folders of any online algorithm are read by ``springhead.rl.acting``."""


@runtime_checkable
class Policy(Protocol):
    """Acts in ``n`` environments at once, and remembers what it needs of each running episode.

    One round is ``reset``, then at every step ``act`` and, once the environments have answered,
    ``observe``. A memoryless policy ignores ``observe``. Actions are deterministic and lie in [-1, 1].
    """

    task: str
    """The task the policy was trained for."""
    algorithm: str
    """The algorithm that trained it."""
    observation_dim: int
    """Length of one observation."""
    action_dim: int
    """Length of one action."""

    def reset(self, num_envs: int, cost_limit: float) -> None:
        """Begins ``num_envs`` new episodes under an episode cost limit (undiscounted sum of costs)."""

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Maps observations (n, observation_dim) float32 to actions (n, action_dim) float32."""

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """Takes in the rewards (n,) and costs (n,) that followed the last actions."""


def load_policy(folder: Path | str) -> Policy:
    """Loads a policy folder of any algorithm.

    Args:
        folder: A model folder with ``config.json``, or an expert's folder with ``policy.json``.

    Returns:
        The policy, ready for ``reset``.

    Raises:
        BadInput: If it is not a policy folder, of an unknown algorithm or format, or damaged.
    """
    config = read_config(folder)
    if config["algorithm"] not in LOADERS:
        return load_expert(Path(folder))
    module = importlib.import_module(LOADERS[config["algorithm"]])
    policy: Policy = module.load(Path(folder))
    return policy


def predict(policy: Policy, observations: np.ndarray, cost_limit: float | np.ndarray) -> np.ndarray:
    """Answers each observation as the first step of an episode of its own, as a server must.

    Rows do not influence each other, and calls do not either: the policy is reset in between.

    Args:
        policy: Any policy.
        observations: (n, observation_dim), finite.
        cost_limit: One episode cost limit for all rows, or one for each row (n,).

    Returns:
        Actions (n, action_dim) float32.

    Raises:
        BadInput: If the shapes do not fit, a value is not finite, or a limit is negative.
    """
    rows = check_observations(policy, observations)
    try:
        limits = np.broadcast_to(np.asarray(cost_limit, dtype=np.float64), (len(rows),))
    except ValueError:
        raise BadInput(f"cost_limit: expected one number or {len(rows)}, one for each observation") from None
    if not (np.isfinite(limits).all() and (limits >= 0).all()):
        raise BadInput("cost_limit: every limit must be a finite number of 0 or more")
    actions = np.empty((len(rows), policy.action_dim), dtype=np.float32)
    for limit in np.unique(limits):
        chosen = np.flatnonzero(limits == limit)
        policy.reset(len(chosen), float(limit))
        actions[chosen] = policy.act(rows[chosen])
    return actions


def check_observations(policy: Policy, observations: np.ndarray) -> np.ndarray:
    """Returns observations as float32 (n, observation_dim).

    Raises:
        BadInput: If the shape is another or a value is not finite.
    """
    rows = np.asarray(observations, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != policy.observation_dim:
        raise BadInput(
            f"observations: the {policy.algorithm} policy for {policy.task} expects the shape "
            f"(n, {policy.observation_dim}), got {rows.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise BadInput(f"observations: rows {bad[:10].tolist()} hold a value that is not finite; remove them")
    return rows


def read_config(folder: Path | str) -> dict[str, Any]:
    """Reads and checks the configuration of a policy folder.

    Raises:
        BadInput: If the folder, the file or a required key is missing, or the algorithm is unknown.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file() and (folder / "policy.json").is_file():
        path = folder / "policy.json"
    if not path.is_file():
        raise BadInput(f"{folder}: not a policy folder, it has no config.json; name a folder made by `train`")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("algorithm"), str):
        raise BadInput(f"{path}: no 'algorithm' in it; name a policy folder made by `train`")
    if path.name == "config.json" and config["algorithm"] not in LOADERS:
        raise BadInput(f"{path}: unknown algorithm {config['algorithm']!r}; known: {', '.join(sorted(LOADERS))}")
    if path.name == "config.json":
        if config.get("format") != FORMAT:
            raise BadInput(f"{path}: format {config.get('format')!r}, this version reads format {FORMAT}")
        for key in ("task", "observation_dim", "action_dim"):
            if key not in config:
                raise BadInput(f"{path}: missing key '{key}'; restore the folder with `dvc checkout`")
    return config


def require_numbers(config: Mapping[str, Any], *names: str) -> None:
    """Makes sure that entries of a configuration are finite numbers: others would fail only when the policy acts.

    Raises:
        ValueError: Naming the first that is not, for the loader to add the file.
        KeyError: If there is none.
    """
    for name in names:
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a number")


def save_model(folder: Path, config: Mapping[str, Any], files: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Writes a policy folder: ``config.json`` and one safetensors file per name in ``files``.

    The bytes depend on the content alone, so equal models have equal digests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"format": FORMAT, **config})
    for name in sorted(files):
        save_file({key: value.detach().cpu().contiguous() for key, value in files[name].items()}, folder / name)


def read_tensors(path: Path, expected: Mapping[str, torch.Size | tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file whose names and shapes must be exactly the expected ones.

    Raises:
        BadInput: If the file is missing or damaged, or a tensor is missing, unknown, misshaped or not finite.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; restore the model folder with `dvc checkout`") from None
    except (SafetensorError, OSError, KeyError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error}); restore it with `dvc checkout`") from None
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise BadInput(
            f"{path}: tensor '{name}' has the shape {found.get(name)}, config.json asks for {wanted.get(name)}; "
            "weights and configuration are not of one model"
        )
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise BadInput(f"{path}: tensor '{name}' holds a value that is not finite; train the model again")
    return tensors
