"""Exact answers that the library is held against: the conjugate linear-Gaussian model and
brute-force integrals. Uses scipy, not the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class LinearGaussian:
    """y = X w + N(0, noise²), w ~ N(mean, cov)."""

    x: np.ndarray
    y: np.ndarray
    noise: float

    def log_evidence(self, mean: np.ndarray, cov: np.ndarray) -> float:
        """log N(y; X mean, X cov Xᵀ + noise² I)."""
        total = self.x @ cov @ self.x.T + self.noise**2 * np.eye(len(self.y))
        return float(
            stats.multivariate_normal(self.x @ mean, total, allow_singular=False).logpdf(self.y)
        )

    def posterior(self, mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance by conditioning the joint Gaussian of (w, y)."""
        gain = (
            cov
            @ self.x.T
            @ np.linalg.inv(self.x @ cov @ self.x.T + self.noise**2 * np.eye(len(self.y)))
        )
        return mean + gain @ (self.y - self.x @ mean), cov - gain @ self.x @ cov


def random_spd(rng: np.random.Generator, d: int, scale: float = 1.0) -> np.ndarray:
    """A well-conditioned covariance matrix with nothing neutral in it."""
    a = rng.normal(size=(d, d))
    return scale * (a @ a.T / d + 0.3 * np.eye(d))


def linear_gaussian(seed: int = 3, n: int = 40, d: int = 5, noise: float = 0.7) -> LinearGaussian:
    """A problem with correlated regressors and some coefficients at zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ np.linalg.cholesky(random_spd(rng, d)).T
    w = rng.normal(size=d) * (rng.random(d) > 0.4)
    return LinearGaussian(x, x @ w + noise * rng.normal(size=n), noise)


def windowed(gain: Sequence[float], decisions: int) -> list[float]:
    """The `gain`s, moved so that those are positive which Occam's window prunes: of all subsets of
    the negative ones, the largest that costs at most log(decisions) together.
    """
    losses = {k: -g for k, g in enumerate(gain) if -math.inf < g <= 0}
    for size in range(len(losses), 0, -1):
        cost, pruned = min(
            (sum(losses[k] for k in some), some) for some in itertools.combinations(losses, size)
        )
        if cost <= math.log(decisions):
            last = max(losses[k] for k in pruned)
            rest = [losses[k] for k in losses if k not in pruned]
            return [g + (last + min(rest, default=last + 1)) / 2 for g in gain]
    return list(gain)
