"""OSRL and DSRL as their users call them, on one of our files; runs in the peers' environment (``make peers``).

    .venv-peers/bin/python tests/rl/osrl_client.py BallCircle dataset.hdf5

Prints what they made of it as JSON.
"""

import json
import sys
import warnings

import numpy as np
import torch

warnings.simplefilter("ignore")

import gymnasium  # noqa: E402
from dsrl.offline_env import OfflineEnv  # noqa: E402
from osrl.algorithms import BC, BCTrainer  # noqa: E402
from osrl.common import SequenceDataset, TransitionDataset  # noqa: E402
from osrl.common.exp_util import seed_all  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402


def loaded(task: str, path: str) -> dict:
    """The file through DSRL's loader: the task's own environment where it exists here, the loader alone elsewhere."""
    if task.startswith(("Ball", "Car", "Drone", "Ant")) and task.endswith(("Circle", "Run")):
        env = gymnasium.make(f"Offline{task}-v0").unwrapped
    else:
        import h5py

        env = OfflineEnv()
        with h5py.File(path) as file:
            shapes = [file[key].shape[1:] for key in ("observations", "actions")]
        env.observation_space, env.action_space = (gymnasium.spaces.Box(-np.inf, np.inf, shape) for shape in shapes)
    return env.get_dataset(h5path=path)


def main(task: str, path: str) -> dict:
    seed_all(0)
    data = loaded(task, path)
    found = {"keys": sorted(data), "steps": len(data["rewards"])}
    transitions = TransitionDataset({key: value.copy() for key, value in data.items()}, state_init=True)
    found["initial_share"] = float(transitions.get_dataset_states()[0])
    batch = next(iter(DataLoader(transitions, batch_size=64)))
    found["batch"] = [list(part.shape) for part in batch]
    # A sampled transition is one of ours, with its own successor, reward and cost.
    row = [part[0].numpy() for part in batch[:5]]
    at = np.flatnonzero((data["observations"] == row[0]).all(axis=1) & (data["actions"] == row[2]).all(axis=1))
    keys = ("observations", "next_observations", "actions", "rewards", "costs")
    found["row_is_ours"] = any(all(np.array_equal(data[k][i], v) for k, v in zip(keys, row)) for i in at)
    # One step of OSRL's own training on it.
    dims = data["observations"].shape[1], data["actions"].shape[1]
    trainer = BCTrainer(BC(*dims, max_action=1.0, a_hidden_sizes=[16, 16]), env=None)
    trainer.train_one_step(batch[0].float(), batch[2].float())
    found["weights_finite"] = all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    sequences = SequenceDataset(data, seq_len=10)
    found["lengths"] = [len(episode["rewards"]) for episode in sequences.dataset]
    found["returns"] = [float(episode["returns"][0]) for episode in sequences.dataset]
    found["costs"] = [float(episode["cost_returns"][0]) for episode in sequences.dataset]
    found["sequence"] = [list(np.shape(part)) for part in next(iter(sequences))]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer = main(*sys.argv[1:3])
    print("\n" + json.dumps(answer))
