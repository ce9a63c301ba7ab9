"""A figure over the seeds of a learning run, as the tables of docs/results write it."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def cell(values: Sequence[float]) -> str:
    """A mean with its 95 % interval by Student's t; a single value without one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"
