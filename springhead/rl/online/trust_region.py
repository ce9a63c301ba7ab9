"""Natural-gradient steps, shared by TRPO-Lag and CPO: Fisher-vector products, conjugate gradients, line search.

Paper: Schulman et al. 2015, "Trust Region Policy Optimization", appendix C: the direction H^-1 g by conjugate
gradients without ever forming H, the Hessian of the mean KL divergence, and a backtracking line search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

Product = Callable[[torch.Tensor], torch.Tensor]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lays tensors end to end in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(value: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The gradient of a scalar as one vector, detached; the graph stays for further gradients."""
    return flat(torch.autograd.grad(value, parameters, retain_graph=True)).detach()


def assign(parameters: Sequence[nn.Parameter], vector: torch.Tensor) -> None:
    """Writes a vector over the parameters."""
    nn.utils.vector_to_parameters(vector, parameters)


def mean_kl(old: Normal, new: Normal) -> torch.Tensor:
    """Mean over states of KL(old || new) of diagonal Gaussians; the batch's components are (n, action_dim)."""
    return kl_divergence(old, new).sum(-1).mean()


def fisher_product(kl: torch.Tensor, parameters: Sequence[nn.Parameter], damping: float) -> Product:
    """The function v -> (H + damping I) v, where H is the Hessian of the mean KL at the old policy.

    Args:
        kl: Mean KL of the old policy (detached) and the present one, where the two are equal.
        parameters: What it is differentiated by.
        damping: Added to the diagonal, so that H is positive definite.
    """
    slope = flat(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(vector: torch.Tensor) -> torch.Tensor:
        return gradient(slope @ vector, parameters) + damping * vector

    return product


def conjugate_gradients(product: Product, target: torch.Tensor, steps: int, tolerance: float = 1e-10) -> torch.Tensor:
    """Solves A x = target approximately, for a symmetric positive definite A.

    Args:
        product: The function v -> A v.
        target: The right-hand side, (n,).
        steps: At most so many products.
        tolerance: Stops once the squared residual is this share of the squared target.

    Returns:
        x, (n,); zero for a zero target.
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    size = first = residual @ residual
    for _ in range(steps):
        if size <= tolerance * first:
            break
        image = product(direction)
        length = size / (direction @ image)
        solution = solution + length * direction
        residual = residual - length * image
        size, before = residual @ residual, size
        direction = residual + size / before * direction
    return solution


def line_search(
    parameters: Sequence[nn.Parameter],
    step: torch.Tensor,
    accept: Callable[[], bool],
    shrink: float,
    trials: int,
    keep_failure: bool = False,
) -> float:
    """Tries the step, and ever shorter ones, until one is accepted; otherwise puts the old parameters back.

    Args:
        parameters: Start values; afterwards hold the accepted ones.
        step: The full step, (n,).
        accept: Says whether the parameters as they now are will do.
        shrink: Factor from one trial to the next.
        trials: How many.
        keep_failure: Leave the last trial's parameters where none was accepted, as released code does.

    Returns:
        The accepted fraction of the step, 0 where there was none.
    """
    start = flat(list(parameters)).detach().clone()
    fraction = 1.0
    with torch.no_grad():
        for _ in range(trials):
            assign(parameters, start + fraction * step)
            if accept():
                return fraction
            fraction *= shrink
        if not keep_failure:
            assign(parameters, start)
    return 0.0
