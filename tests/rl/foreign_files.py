"""Writes the files that the importers read, as others write them: DSRL's quirks, D4RL's, and Minari's own writer."""

import os
import warnings

import gymnasium
import h5py
import numpy as np

from springhead.rl.episodes import Episode

OBSERVATIONS, ACTIONS, HORIZON = 8, 2, 200
"""Those of BallCircle."""


def make_episodes(lengths=(200, 30, 200), seed=0):
    """Random episodes of BallCircle's dimensions; one that is shorter than the horizon ends with a terminal."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        states = rng.normal(size=(length + 1, OBSERVATIONS)).astype(np.float32)
        ends = np.arange(length) == length - 1
        made.append(
            Episode(
                states[:-1],
                states[1:],
                rng.uniform(-1, 1, (length, ACTIONS)).astype(np.float32),
                rng.normal(size=length).astype(np.float32),
                (rng.random(length) < 0.3).astype(np.float32),
                ends & (length < HORIZON),
                ends & (length >= HORIZON),
            )
        )
    return made


def flat(episodes):
    """The seven arrays by key."""
    keys = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
    return {key: np.concatenate([getattr(episode, key) for episode in episodes]) for key in keys}


def write_hdf5(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", fletcher32=True)
    return path


def write_minari(root, dataset_id, episodes, infos=lambda e: {"cost": np.append(np.float32(0), e.costs)}, parts=False):
    """Writes with Minari itself; ``parts`` splits the observations into a mapping of two."""
    import minari
    from minari.data_collector import EpisodeBuffer

    def observed(states):
        return {"b": states[:, :5], "a": states[:, 5:]} if parts else states

    def box(width):
        return gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)

    buffers = [
        EpisodeBuffer(
            id=number,
            observations=observed(np.concatenate([e.observations, e.next_observations[-1:]])),
            actions=e.actions,
            rewards=e.rewards,
            terminations=e.terminals,
            truncations=e.timeouts,
            infos=infos(e),
        )
        for number, e in enumerate(episodes)
    ]
    saved = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            minari.create_dataset_from_buffers(
                dataset_id,
                buffer=buffers,
                observation_space=gymnasium.spaces.Dict(a=box(3), b=box(5)) if parts else box(OBSERVATIONS),
                action_space=gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32),
            )
    finally:
        if saved is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = saved
    return root / dataset_id
