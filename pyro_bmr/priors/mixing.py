"""Scale mixtures of zero-mean Gaussians on a grid: p(w) = ∫ N(w; 0, v) dG(v) as a finite sum.

Owns the grid for the `mixture` methods of the priors. Next: `laplace.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def mixing_grid(
    log_density: Callable[[np.ndarray], np.ndarray], low: float, high: float, step: float
) -> tuple[np.ndarray, np.ndarray]:
    r"""Equidistant nodes u and normalised log weights for a mixing density given in u = log v, or
    log 1/v.

    .. math:: \int g(u) f(e^u)\, du \approx h \sum_k g(u_k) f(e^{u_k})

    This is the trapezoid rule. Its error falls like exp(−π²/h) for a smooth g that has decayed at
    both ends (Trefethen & Weideman 2014, SIAM Review 56(3)), since N(w; 0, eᵘ) is analytic and
    bounded for |Im u| < π/2.
    """
    nodes = np.arange(low, high + step, step)
    log_weights = log_density(nodes)
    return nodes, log_weights - np.logaddexp.reduce(log_weights)
