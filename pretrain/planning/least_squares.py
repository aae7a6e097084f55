"""Robust nonlinear least squares with priors: few parameters, few observations, NumPy only.

Knows nothing of what is fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The parameters found, and their covariance as the residuals' curvature tells it."""

    parameters: Vector
    covariance: Matrix
    residuals: Vector  # of the observations, without the priors


def fit_least_squares(
    residuals: Callable[[Vector], Vector],
    start: Vector,
    *,
    prior: Vector | None = None,
    spread: Vector | None = None,
    noise: float = 1.0,
    huber: float = 2.0,
    rounds: int = 40,
) -> Fit:
    """Levenberg-Marquardt with numerical derivatives.

    Args:
        residuals: of the observations for given parameters.
        start: of the search.
        prior: where a parameter is thought to lie; with `spread`, its standard deviation. None: anywhere.
        spread: see `prior`.
        noise: standard deviation of an observation.
        huber: residuals beyond so many deviations count linearly (Huber 1964), so that no single row leads.
        rounds: at most.
    """
    center = start if prior is None else prior
    stiffness = np.zeros_like(start) if spread is None else 1 / spread

    def weighed(parameters: Vector) -> tuple[Vector, Vector]:
        plain = residuals(parameters) / noise
        weights = np.sqrt(np.minimum(1.0, huber / np.maximum(np.abs(plain), 1e-12)))
        return plain, weights

    def cost(parameters: Vector) -> float:
        size = np.abs(residuals(parameters) / noise)
        robust = np.where(size <= huber, size**2, 2 * huber * size - huber**2)
        return float(robust.sum() + (((parameters - center) * stiffness) ** 2).sum())

    parameters, damping, best = start.copy(), 1e-2, cost(start)
    for _ in range(rounds):
        plain, weights = weighed(parameters)
        slopes = _slopes(residuals, parameters) / noise
        matrix = np.vstack([slopes * weights[:, None], np.diag(stiffness)])
        value = np.concatenate([plain * weights, (parameters - center) * stiffness])
        curvature, gradient = matrix.T @ matrix, matrix.T @ value
        before = best
        for _ in range(8):
            damped = curvature + damping * np.diag(np.maximum(np.diag(curvature), 1e-9))
            step = np.linalg.solve(damped, gradient)
            trial = cost(parameters - step)
            if np.isfinite(trial) and trial < best:
                parameters, best, damping = parameters - step, trial, damping / 5
                break
            damping *= 5
        if before - best < 1e-7 * before:
            break
    plain, weights = weighed(parameters)
    slopes = _slopes(residuals, parameters) / noise * weights[:, None]
    information = slopes.T @ slopes + np.diag(stiffness**2)
    return Fit(
        parameters=parameters,
        covariance=np.asarray(np.linalg.pinv(information), dtype=np.float64),
        residuals=plain * noise,
    )


def _slopes(function: Callable[[Vector], Vector], at: Vector) -> Matrix:
    here = function(at)
    columns = []
    for place in range(len(at)):
        step = 1e-4 * max(1.0, abs(at[place]))
        moved = at.copy()
        moved[place] += step
        columns.append((function(moved) - here) / step)
    return np.stack(columns, axis=1)
