r"""The inclusion probability of a spike and slab by mean field, or a known one, for any number of
weights.

Owns `mean_field_log_odds` and `fixed_inclusion`. Given is each weight's ΔF_i, as in
`spike_and_slab.py`, which has the integral over π. Imports torch only. Next: `spike_and_slab.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described, holds
from pyro_bmr.formulas.log_gamma import digamma, digamma_fall, log_rising, trigamma
from pyro_bmr.formulas.logit_beta import LogitBeta

_SAMPLE = 1 << 16  # weights on which the fixed point is first sought
_PIECE = 1 << 16  # weights at once, where a whole site would leave the cache
_PASSES = 100


def mean_field_log_odds(
    delta_f: Tensor, alpha: float = 1.0, beta: float = 1.0
) -> tuple[float, float]:
    r"""ζ at the fixed point of the mean-field update over inclusion and π, started at ζ = 0, and
    the evidence gain, whose lower bound it is, nats.

    .. math:: \rho_i = \sigma(\zeta - \Delta F_i), \quad
        \zeta = \psi(\alpha_0 + \textstyle\sum\rho) - \psi(\beta_0 + \sum(1 - \rho))

    Source: Marković, Friston & Kiebel 2024, IEEE Access 12 (arXiv 2309.12095), there with four
    rounds instead of convergence.

    No tensor of the ρ is made. The update is iterated on at most 65,536 weights at equal distances.
    From there a pass over all of them gives the sums of σ(ζ − ΔF_i) and of its first three
    derivatives in ζ, and with these the fixed point, by Newton's rule. Since the fourth derivative
    of σ is at most 1/7, a step δ is exact to n δ⁴/168 in Σρ; passes go on until |δ| ≤ 0.03, when
    that is below 5·10⁻⁹ n.

    Raises:
        ReductionError: a ΔF is NaN or +∞, or `alpha` or `beta` is not a finite number > 0.
    """
    check_beta(alpha, beta, "inclusion")
    # beyond it the data do not move π
    alpha, beta = LogitBeta.of(alpha, beta)
    d = delta_f.reshape(-1)
    n = d.numel()
    if n == 0:
        return digamma(alpha) - digamma(beta), 0.0
    zeta = _iterated(d[:: max(math.ceil(n / _SAMPLE), 1)].double(), n, alpha, beta)
    for _ in range(_PASSES):
        sums = _sums(d, zeta)
        step = _newton_step(sums, zeta, alpha, beta)
        zeta += step
        if abs(step) <= 0.03:
            break
    gain = _bound(sums, step, alpha, beta)
    if not (math.isfinite(zeta) and math.isfinite(gain)):
        raise ReductionError(
            f"inclusion: expected ΔF that are numbers below +∞, got"
            f" {int((d.isnan() | d.isposinf()).sum())} of {n} that are not"
        )
    return zeta, gain


def _bound(sums: tuple[float, ...], step: float, alpha: float, beta: float) -> float:
    r"""The bound on the evidence gain a `step` from where the `sums` were taken.

    .. math:: n\,\mathrm{E}\log\pi + \sum_i \log(1 + e^{\Delta F_i - \zeta}) -
        \mathrm{KL}(\mathrm{Beta}(a, b) \,\|\, \mathrm{Beta}(\alpha, \beta))

    with a = α + Σρ and b = β + Σ(1 − ρ); the differences of log B are taken without their large
    parts.
    """
    included, excluded, slope, bend, third, softplus = sums
    moved = slope * step + bend * step**2 / 2 + third * step**3 / 6
    included, left = included + moved, excluded - moved
    a, b = alpha + included, beta + left
    # Σ log(1 + exp(ΔF − ζ))
    fit = (
        softplus - excluded * step + slope * step**2 / 2 + bend * step**3 / 6 + third * step**4 / 24
    )
    log_slab, log_spike = digamma_fall(a, b), digamma_fall(b, a)
    starts = torch.tensor([alpha, beta, alpha + beta], dtype=torch.float64)
    rises = torch.tensor([included, left, included + left], dtype=torch.float64)
    growth = log_rising(starts, rises)
    # log B(α, β) − log B(a, b)
    kl = float(growth[2] - growth[0] - growth[1]) + included * log_slab + left * log_spike
    return (included + left) * log_slab + fit - kl


def fixed_inclusion(delta_f: Tensor, log_odds: float) -> float:
    r"""The evidence gain Σ log(π + (1 − π) rᵢ) for a known inclusion probability π, given as its
    log odds ζ.
    """
    log_pi = -float(torch.nn.functional.softplus(torch.tensor(-log_odds, dtype=torch.float64)))
    return delta_f.numel() * log_pi + _sums(delta_f.reshape(-1), log_odds)[5]


def _iterated(d: Tensor, n: int, alpha: float, beta: float) -> float:
    """ζ by the plain update, for `d` that stands for n weights."""
    zeta, each = 0.0, n / d.numel()
    for _ in range(500):
        updated = digamma(alpha + each * float(torch.sigmoid(zeta - d).sum())) - digamma(
            beta + each * float(torch.sigmoid(d - zeta).sum())
        )
        done = abs(updated - zeta) <= 1e-6 * (1 + abs(updated))
        zeta = updated
        if done:
            break
    return zeta


def _sums(d: Tensor, zeta: float) -> tuple[float, ...]:
    """Sums of ρ = σ(ζ − ΔF), of 1 − ρ (apart: a sum of ones hides what is left of n), of the first
    three derivatives of ρ, and of log(1 + exp(ΔF − ζ)).
    """
    totals = [0.0] * 6
    for piece in d.split(_PIECE) if d.numel() else ():
        x = piece - zeta
        outside, inside = torch.sigmoid(x), torch.sigmoid(-x)
        # log σ is ten times as fast while σ > 0
        softplus = (
            -inside.log().sum() if float(x.max()) < 80 else torch.nn.functional.softplus(x).sum()
        )
        slope = inside * outside
        bend = torch.dot(slope, outside) - torch.dot(slope, inside)
        third = slope.sum() - 6 * torch.dot(slope, slope)
        parts = torch.stack([inside.sum(), outside.sum(), slope.sum(), bend, third, softplus])
        totals = [total + part for total, part in zip(totals, parts.tolist(), strict=True)]
    return tuple(totals)


def _newton_step(sums: tuple[float, ...], zeta: float, alpha: float, beta: float) -> float:
    """The root of ψ(α₀ + Σρ) − ψ(β₀ + Σ(1 − ρ)) − ζ near `zeta`, with Σρ by its Taylor polynomial;
    a plain update where the root is not near.
    """
    included, excluded, slope, bend, third, _ = sums
    step = 0.0
    for _ in range(50):
        moved = slope * step + bend * step**2 / 2 + third * step**3 / 6
        a, b = max(alpha + included + moved, alpha), max(beta + excluded - moved, beta)
        residual = digamma(a) - digamma(b) - zeta - step
        rate = (trigamma(a) + trigamma(b)) * (slope + bend * step + third * step**2 / 2)
        if rate >= 1 or abs(step) > 0.5:  # no stable root here
            return digamma(alpha + included) - digamma(beta + excluded) - zeta
        step += residual / (1 - rate)
        if abs(residual) <= 1e-12 * (1 + abs(zeta)):
            break
    return step


def check_beta(alpha: float, beta: float, where: str) -> None:
    """ReductionError unless both are finite numbers > 0."""
    if not holds(lambda a, b: 0 < a < math.inf and 0 < b < math.inf, alpha, beta):
        raise ReductionError(
            f"{where}: expected finite alpha and beta > 0, got {described(alpha)} and"
            f" {described(beta)}"
        )
