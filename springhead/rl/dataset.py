"""Episodes, data sets of episodes, and their file formats: the names that the other modules and users import.

``episodes.py`` has the data, ``dsrl_file.py`` DSRL's flat HDF5, ``minari_file.py`` Minari's folders.
"""

from springhead.rl.dsrl_file import iter_episodes, read_dsrl, write_dsrl
from springhead.rl.episodes import EPISODE_KEYS, FLAG_KEYS, FLOAT_KEYS, SUB_COSTS, WIDE_KEYS, Dataset, Episode
from springhead.rl.minari_file import About, iter_minari, read_minari, write_minari

__all__ = [
    "EPISODE_KEYS",
    "FLAG_KEYS",
    "FLOAT_KEYS",
    "SUB_COSTS",
    "WIDE_KEYS",
    "About",
    "Dataset",
    "Episode",
    "iter_episodes",
    "iter_minari",
    "read_dsrl",
    "read_minari",
    "write_dsrl",
    "write_minari",
]
