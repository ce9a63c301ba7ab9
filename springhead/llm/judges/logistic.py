"""Logistic regression with an L2 penalty on sparse rows, by Newton's method with conjugate gradients.

Minimises  sum_i c_i log(1 + exp(-s_i (w.x_i + b))) + |w|^2 / (2 C),  s_i in {-1, 1}, which is strictly convex in w.
Lin, Weng and Keerthi, "Trust region Newton method for logistic regression" (JMLR 2008) is the reference; here a
backtracking line search takes the place of the trust region. Everything is summed in a fixed order, so the result
does not depend on threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Sparse:
    """A matrix as triples: `values[k]` is the entry at (`rows[k]`, `columns[k]`); no entry twice."""

    rows: Array
    columns: Array
    values: Array
    shape: tuple[int, int]

    def times(self, vector: Array) -> Array:
        """The product with a vector of length shape[1]."""
        return np.bincount(self.rows, self.values * vector[self.columns], self.shape[0])

    def transposed_times(self, vector: Array) -> Array:
        """The product of the transposed matrix with a vector of length shape[0]."""
        return np.bincount(self.columns, self.values * vector[self.rows], self.shape[1])


def fit(x: Sparse, positive: Array, weights: Array, strength: float, tolerance: float = 1e-4) -> tuple[Array, float]:
    """Weights [columns] and intercept.

    Args:
        x: Rows of features.
        positive: Bool [rows], the label.
        weights: Float [rows], how much each row counts.
        strength: C; larger means less penalty. The intercept is not penalised.
        tolerance: Stop when the gradient's norm is this much of the one at zero.
    """
    signs = np.where(positive, 1.0, -1.0)
    solution = np.zeros(x.shape[1] + 1)
    decay = np.append(np.full(x.shape[1], 1.0 / strength), 0.0)

    def margins(point: Array) -> Array:
        return np.asarray(signs * (x.times(point[:-1]) + point[-1]))

    def objective(point: Array, margin: Array) -> float:
        return float(np.sum(weights * np.logaddexp(0.0, -margin)) + 0.5 * np.sum(decay * point * point))

    margin = margins(solution)
    value = objective(solution, margin)
    first = None
    for _ in range(100):
        wrong = _sigmoid(-margin)
        slope = -weights * signs * wrong
        gradient = np.append(x.transposed_times(slope), np.sum(slope)) + decay * solution
        size = float(np.sqrt(np.sum(gradient * gradient)))
        first = size if first is None else first
        if size <= tolerance * first:
            break
        curvature = weights * wrong * (1.0 - wrong)
        step = _conjugate_gradients(x, curvature, decay, -gradient, 0.1 * size)
        along = float(np.sum(gradient * step))
        length = 1.0
        while True:
            trial = solution + length * step
            margin = margins(trial)
            lower = objective(trial, margin)
            if lower <= value + 1e-4 * length * along or length < 1e-8:
                break
            length /= 2.0
        solution, value = trial, lower
    return solution[:-1], float(solution[-1])


def _conjugate_gradients(x: Sparse, curvature: Array, decay: Array, target: Array, tolerance: float) -> Array:
    """Solves (X^T D X + decay) step = target to a residual of `tolerance`."""
    step = np.zeros_like(target)
    residual = target.copy()
    direction = residual.copy()
    norm = float(np.sum(residual * residual))
    for _ in range(200):
        if norm <= tolerance * tolerance:
            break
        inner = curvature * (x.times(direction[:-1]) + direction[-1])
        product = np.append(x.transposed_times(inner), np.sum(inner)) + decay * direction
        length = norm / float(np.sum(direction * product))
        step += length * direction
        residual -= length * product
        new = float(np.sum(residual * residual))
        direction = residual + (new / norm) * direction
        norm = new
    return step


def _sigmoid(values: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)))
