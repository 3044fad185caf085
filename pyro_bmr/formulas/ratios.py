r"""One Gaussian weight under another Gaussian prior, its moments counted in units of the prior of
the fit: ΔF and the reduced moments, to the last digits.

Owns `Ratios`, `informative`, `ratios`, `gain`, `half_log_growth` and `reduced_moments`;
`gaussian.py` gives them tensors of weights, `low_rank.py` the independent part of a site. Imports
torch only.

A formula in precisions, such as μ²P + η̃²Π̃ − η²Π − μ̃²P̃, is a difference of numbers of size 1/σ²,
and the answer is what is left of it. Here means and variances are subtracted first, where that is
exact, and the rest is products, quotients and sums without small differences. Next: `gaussian.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ratios(NamedTuple):
    """Weights counted in units of their prior's scale. σ² and v are the variances of posterior and
    reduced prior, σ₀² that of the prior.
    """

    sigma: Tensor  # σ²/σ₀²
    tau: Tensor  # (σ₀² − σ²)/σ₀²
    nu: Tensor  # v/σ₀²
    kappa: Tensor  # (σ₀² − v)/σ₀²
    u: Tensor  # (μ − η)/σ₀
    a: Tensor  # (η̃ − η)/σ₀
    b: Tensor  # (μ − η̃)/σ₀


def informative(
    mean: Tensor,
    var: Tensor,
    prior_mean: Tensor,
    prior_var: Tensor,
    reduced_mean: Tensor,
    reduced_var: Tensor,
) -> tuple[Tensor, ...]:
    """The same moments, where a posterior wider than its prior counts as the prior itself, unless
    the reduced prior is a point.
    """
    silent = (var >= prior_var) & (reduced_var > 0)
    return (
        torch.where(silent, prior_mean, mean),
        torch.where(silent, prior_var, var),
        prior_mean,
        prior_var,
        reduced_mean,
        reduced_var,
    )


def ratios(
    mean: Tensor,
    var: Tensor,
    prior_mean: Tensor,
    prior_var: Tensor,
    reduced_mean: Tensor,
    reduced_var: Tensor,
) -> Ratios:
    """Of moments in float64."""
    root = prior_var.sqrt()
    means = (
        (mean - prior_mean) / root,
        (reduced_mean - prior_mean) / root,
        (mean - reduced_mean) / root,
    )
    return Ratios(
        var / prior_var,
        (prior_var - var) / prior_var,
        reduced_var / prior_var,
        (prior_var - reduced_var) / prior_var,
        *means,
    )


def gain(x: Ratios) -> Tensor:
    r"""ΔF = −½ log D + AB/(2D), D = σ + ντ, A = a − uκ/(1 + √D), B = u(1 + √D) − aτ: the exponents
    of `log_evidence_ratio` as one product.

    With u = a + b both factors have a second form, in b. The one with the smaller terms is taken:
    neither a reduced prior at the posterior's mean nor one at the prior's leaves a small difference
    of large numbers.
    """
    root = (x.sigma + x.nu * x.tau).sqrt()
    from_prior, from_reduced = x.u * x.kappa / (root + 1), x.u * ((root + x.nu) / (root + 1))
    near = x.a.abs() + from_prior.abs() <= x.b.abs() + from_reduced.abs()
    first = torch.where(near, x.a - from_prior, from_reduced - x.b)
    near = (x.u * (root + 1)).abs() + (x.a * x.tau).abs() <= (x.u * (root + x.sigma)).abs() + (
        x.b * x.tau
    ).abs()
    second = torch.where(near, x.u * (root + 1) - x.a * x.tau, x.u * (root + x.sigma) + x.b * x.tau)
    return half_log_growth(x, root) + 0.5 * (first / root) * (second / root)


def half_log_growth(x: Ratios, root: Tensor) -> Tensor:
    """−½ log D, with its digits where D is near 1: 1 − D = τκ."""
    change = x.tau * x.kappa
    return (
        torch.where(change >= 0, 0.5, -0.5)
        * torch.where(change >= 0, (change / root) / root, -change).log1p()
    )


def reduced_moments(
    mean: Tensor,
    var: Tensor,
    prior_mean: Tensor,
    prior_var: Tensor,
    reduced_mean: Tensor,
    reduced_var: Tensor,
) -> tuple[Tensor, Tensor]:
    """μ̃, from that of the three means which is nearest to it, and the variance σ₀²νσ/D."""
    x = ratios(mean, var, prior_mean, prior_var, reduced_mean, reduced_var)
    total, root = x.sigma + x.nu * x.tau, prior_var.sqrt()
    steps = [
        root * (x.sigma * ((x.nu * x.u - x.b) / total)),
        root * ((x.nu * x.u + x.sigma * x.a) / total),
        root * (x.nu * ((x.b + x.sigma * x.a) / total)),
    ]
    starts = [mean, prior_mean, reduced_mean]
    best, step = starts[0] + steps[0], steps[0].abs()
    for start, other in zip(starts[1:], steps[1:], strict=True):
        nearer = other.abs() < step
        best, step = (
            torch.where(nearer, start + other, best),
            torch.where(nearer, other.abs(), step),
        )
    return best, reduced_var * (x.sigma / total)
