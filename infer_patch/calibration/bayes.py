"""Bayesian optimisation in a few dimensions: a Gaussian process, and the point it expects to improve the best most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infer_patch.availability import require

Point = tuple[float, ...]
_CANDIDATES = 2048
_NEAR = 256  # of which so many lie around the best point so far
_DRAWS = 50  # quasi-random points looked at for each one that is wanted


def expected_improvement(mean: Any, deviation: Any, best: float) -> Any:
    """E[max(f - best, 0)] for f normal: (mean - best) Phi(z) + deviation phi(z), z = (mean - best) / deviation."""
    from scipy.stats import norm

    deviation = np.maximum(deviation, 1e-12)
    z = (mean - best) / deviation
    return (mean - best) * norm.cdf(z) + deviation * norm.pdf(z)


def maximise(
    objective: Callable[[Point], float],
    feasible: Callable[[Point], bool],
    dimensions: int,
    given: Sequence[Point] = (),
    starts: int = 10,
    iterations: int = 30,
    seed: int = 0,
) -> list[tuple[Point, float]]:
    """Points of the unit cube and their values, in the order they were tried.

    First the feasible ones of `given`, then quasi-random ones until there are `starts`, then `iterations` points that
    a Gaussian process with a Matern 5/2 kernel (a length for each axis, noise learned) expects to improve the best.

    Raises
    ------
    MissingDependencyError
        Without scikit-learn.
    """
    require("scikit-learn", "Bayesian optimisation")
    from scipy.stats import qmc

    rng = np.random.default_rng(seed)
    points = [tuple(map(float, point)) for point in given if feasible(point)]
    sobol = qmc.Sobol(dimensions, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it would like powers of two
        drawn = [tuple(map(float, row)) for row in sobol.random(_DRAWS * max(starts, 1))]
    points += [point for point in drawn if feasible(point)][: max(starts - len(points), 0)]
    tried = [(point, objective(point)) for point in points]
    for _ in range(iterations if tried else 0):
        candidates = rng.random((_CANDIDATES, dimensions))
        best = max(tried, key=lambda pair: pair[1])
        near = np.array(best[0]) + rng.normal(0, 0.05, (_NEAR, dimensions))
        candidates = np.concatenate([candidates, near.clip(0, 1)])
        mean, deviation = _predict(tried, candidates, seed)
        order = np.argsort(-expected_improvement(mean, deviation, best[1]), kind="stable")
        chosen = next((tuple(map(float, candidates[i])) for i in order if feasible(tuple(candidates[i]))), None)
        if chosen is None:
            break
        tried.append((chosen, objective(chosen)))
    return tried


def _predict(tried: Sequence[tuple[Point, float]], candidates: Any, seed: int) -> tuple[Any, Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    lengths = np.full(candidates.shape[1], 0.5)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(lengths, (5e-2, 1e1), nu=2.5) + WhiteKernel(1e-2, (1e-6, 1e0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # lengths at their bounds: an axis that does not matter
        model.fit(np.array([point for point, _ in tried]), np.array([value for _, value in tried]))
        mean, deviation = model.predict(candidates, return_std=True)
    noise = np.exp(model.kernel_.k2.theta[0]) * np.std([value for _, value in tried]) ** 2
    return mean, np.sqrt(np.maximum(deviation**2 - noise, 0))  # of the function itself, without the noise
