r"""The continuous ranked probability score (CRPS) of a predictive distribution.

.. math:: \int (F(t) - [y \le t])^2\, dt = E|Y - y| - \tfrac12 E|Y - Y'|

In the units of y, 0 is a perfect prediction, and that of a point is its absolute error. It is
proper. Source: Gneiting & Raftery 2007, equations 20 and 21.

Owns `crps_of_normals` and `crps_of_draws`. Next: `class_prediction.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crps_of_normals(locs: Tensor, scales: Tensor, y: Tensor) -> Tensor:
    r"""The CRPS of a mixture of Normals with equal weights, (draws, n, ...) → (n, ...).

    .. math:: \frac1S \sum_s A(y - \mu_s, \sigma_s^2) - \frac1{2S^2} \sum_{st} A(\mu_s - \mu_t,
        \sigma_s^2 + \sigma_t^2), \qquad A(m, v) = 2\sqrt v\, \phi(m/\sqrt v) + m\,(2\Phi(m/\sqrt
        v) - 1)

    Source: Grimit, Gneiting, Berrocal & Johnson 2006, equation 5.
    """
    scales = scales.expand_as(locs)
    error = _mean_distance(y - locs, scales.square()).mean(0)
    spread = torch.zeros_like(error)
    for loc, scale in zip(locs, scales, strict=True):  # one draw against all: no square in memory
        spread += _mean_distance(loc - locs, scale.square() + scales.square()).mean(0)
    return error - spread / (2 * len(locs))


def crps_of_draws(draws: Tensor, y: Tensor) -> Tensor:
    r"""The CRPS from draws of y, (draws, n, ...) → (n, ...), without bias.

    .. math:: \frac1S \sum_s |y_s - y| - \frac1{S(S-1)} \sum_{s=1}^{S} (2s - S - 1)\, y_{(s)}

    with the sorted draws :math:`y_{(s)}`. Source: Zamo & Naveau 2018, equation 31.
    """
    count = len(draws)
    ordered = draws.sort(0).values
    rank = torch.arange(1, count + 1, dtype=ordered.dtype, device=ordered.device)
    factors = (2 * rank - count - 1) / max(count * (count - 1), 1)
    return (draws - y).abs().mean(0) - torch.tensordot(factors, ordered, 1)


def _mean_distance(mean: Tensor, var: Tensor) -> Tensor:
    """E|X| of a Normal."""
    sd = var.sqrt()
    normal = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    z = mean / sd
    return 2 * sd * normal.log_prob(z).exp() + mean * (2 * normal.cdf(z) - 1)
