"""The soft chi-square divergence of OptiDICE (Lee et al. 2021, appendix), used by COptiDICE, OptiDICE and CDE.

f(x) = x log x - x + 1 below 1, (x - 1)² / 2 from 1 on: convex, and with a derivative that can be inverted everywhere.
"""

from __future__ import annotations

import torch


def f(ratio: torch.Tensor) -> torch.Tensor:
    """What generates the divergence, at ratios x of 0 or more; 1 at 0."""
    low = ratio.clamp(1e-30, 1.0)
    return torch.where(ratio < 1.0, low * low.log() - low + 1.0, 0.5 * (ratio - 1.0).square())


def f_slope(ratio: torch.Tensor) -> torch.Tensor:
    """f'(x): log x below 1, x - 1 from 1 on."""
    return torch.where(ratio < 1.0, ratio.clamp(1e-30, 1.0).log(), ratio - 1.0)


def ratio_of(slope: torch.Tensor) -> torch.Tensor:
    """The inverse of f': e^y below 0, y + 1 from 0 on. Always above 0."""
    return torch.where(slope < 0.0, slope.clamp(max=0.0).exp(), slope + 1.0)


def log_ratio_of(slope: torch.Tensor) -> torch.Tensor:
    """Log of :func:`ratio_of`: y below 0, log(1 + y) from 0 on."""
    return torch.where(slope < 0.0, slope, slope.clamp(min=0.0).log1p())


def f_of_slope(slope: torch.Tensor) -> torch.Tensor:
    """F at the ratio of a slope: (y - 1) e^y + 1 below 0, y² / 2 from 0 on."""
    low = slope.clamp(max=0.0)
    return torch.where(slope < 0.0, (low - 1.0) * low.exp() + 1.0, 0.5 * slope.square())


def conjugate(slope: torch.Tensor) -> torch.Tensor:
    """The convex conjugate f*(y) = y x - f(x) at the ratio x of slope y: e^y - 1 below 0, y + y² / 2 from 0 on.

    Its derivative is :func:`ratio_of`, so a loss in f* needs no gradient through the ratio.
    """
    return torch.where(slope < 0.0, slope.clamp(max=0.0).expm1(), slope + 0.5 * slope.square())
