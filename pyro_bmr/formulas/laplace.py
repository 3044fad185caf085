r"""Reduction of Gaussian weights to a Laplace prior, in closed form per weight, at any distance
from zero.

Owns `laplace_reduction`. Imports torch only. Groups that share one variance have no closed form;
`scale_mixture.py` has their sum over variances.

The message exp(h w − ½ L w²) times the density (β/2) exp(−β|w|), β = 1/b, is half a Gaussian on
each side of zero. In units of 1/√L the side of sign ± has the moments J_n(x) = ∫₀^∞ uⁿ exp(−x u −
½u²) du at x = (β ∓ h)/√L.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.formulas.message import Message
from pyro_bmr.formulas.mixture_nodes import check_message
from pyro_bmr.formulas.scale_mixture import ScaleMixtureReduction

_CHUNK = 1 << 15
_FAR = 3.0  # from here on by continued fraction: 1 − x J₀(x) would lose digits
_DEPTH = 32
# |h| in units of the reduced standard deviation, below which the two sides are told apart by their
# derivatives
_NEAR_ZERO = 1e-3


def laplace_reduction(
    data: Message, prior_var: Tensor, scale: Tensor | float
) -> ScaleMixtureReduction:
    r"""ΔF, logit κ and reduced moments of weights with prior N(0, σ₀²) when that prior becomes
    Laplace(0, b), b = `scale`, a number or one of each weight.

    .. math:: \Delta F = \log \frac{J_0(x_+) + J_0(x_-)}{2 b \sqrt L} + \tfrac12 \log(1 +
        \sigma_0^2 L) - \frac{h^2 \sigma_0^2}{2 (1 + \sigma_0^2 L)}, \qquad
        x_\pm = \frac{1/b \mp h}{\sqrt L}, \qquad
        \kappa = \frac{p_+ - p_-}{b h}, \qquad p_\pm = \frac{J_0(x_\pm)}{J_0(x_+) + J_0(x_-)}

    with J₀ the Mills ratio √(π/2) erfcx(x/√2), and p₊ the probability of a positive weight: κ is
    the force of the prior, 1/b by the sign, as a share of the force of the data. In double
    precision inside. A weight whose posterior is wider than its prior (L ≤ 0) has ΔF = 0, κ = 1 and
    the moments of the Laplace.

    Raises:
        ReductionError: the message is not finite.

    Source: the posterior of the Bayesian lasso (Park & Casella 2008, JASA 103(482); Hans 2009,
    Biometrika 96(4)) for one weight.

    Example:
        >>> laplace_reduction(data, ones(2), 0.3).kappa
    """
    check_message(data)
    shape, dtype = data.h.shape, data.h.dtype
    rate = 1 / torch.as_tensor(scale, dtype=torch.float64, device=data.h.device)
    columns = [
        t.expand(shape).reshape(-1).split(_CHUNK) for t in (data.h, data.precision, prior_var)
    ]
    rates = rate.expand(shape).reshape(-1).split(_CHUNK) if rate.ndim else [rate] * len(columns[0])
    out = [torch.empty(shape, dtype=dtype, device=data.h.device) for _ in range(4)]

    def fill(k: int) -> None:
        h, precision, var = (c[k].double() for c in columns)
        for whole, value in zip(out, _chunk(h, precision, var, rates[k]), strict=True):
            whole.view(-1)[k * _CHUNK : (k + 1) * _CHUNK] = value

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(len(columns[0]))))
    return ScaleMixtureReduction(*out)


def _chunk(h: Tensor, precision: Tensor, prior_var: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
    """ΔF, logit κ, mean and variance, in double precision."""
    silent = precision <= 0
    root = precision.masked_fill(silent, 1.0).sqrt()
    signal, x = h.abs().masked_fill(silent, 0.0) / root, rate / root
    plus, minus = _Side.at(x - signal), _Side.at(x + signal)
    odds = plus.log_mass + plus.peak - minus.log_mass
    p, q = torch.sigmoid(odds), torch.sigmoid(-odds)
    evidence = (x / 2).log() + torch.logaddexp(plus.log_mass, minus.log_mass - plus.peak)
    delta_f = (
        evidence
        + _half_quadratic(signal, x, prior_var * precision)
        + 0.5 * torch.log1p(prior_var * precision)
    )
    kappa = x / signal * torch.tanh(odds / 2)
    taken = (p * plus.mean - q * minus.mean) / signal  # 1 − κ
    var = p * plus.var + q * minus.var + p * q * (plus.mean + minus.mean).square()
    near = signal * (minus.var + minus.mean.square()).sqrt() < _NEAR_ZERO
    if bool(near.any()):
        kappa[near], taken[near] = _near_zero(signal[near].square(), x[near])
    mean = h.sign() * (signal * taken) / root
    delta_f, log_odds, mean = (
        delta_f.masked_fill(silent, 0.0),
        (kappa.log() - taken.log()).masked_fill(silent, torch.inf),
        mean.masked_fill(silent, 0.0),
    )
    return delta_f, log_odds, mean, torch.where(silent, 2 / rate**2, var / root / root)


class _Side(NamedTuple):
    """Half a Gaussian: log J₀(x) = `log_mass` + `peak`, with ½x² of a mode inside as its `peak`;
    mean and variance in units of 1/√L.
    """

    log_mass: Tensor
    peak: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def at(cls, x: Tensor) -> _Side:
        r1, r2 = _ratios(x.clamp(min=_FAR), 2)
        far = x >= _FAR
        near = x.clamp(max=_FAR)
        log_ndtr = torch.special.log_ndtr(-near) + 0.5 * math.log(2 * math.pi)
        peak = 0.5 * near.clamp(max=0).square()
        log_mass = torch.where(far, -(x + r1).log(), log_ndtr + 0.5 * near.clamp(min=0).square())
        hazard = torch.exp(-(log_mass + peak))  # 1/J₀
        return cls(
            log_mass,
            peak,
            torch.where(far, r1, hazard - x),
            torch.where(far, r1 * (r2 - r1), 1 - hazard * (hazard - near)),
        )


def _ratios(x: Tensor, count: int) -> list[Tensor]:
    """J₁/J₀, J₂/J₁, … for x ≥ 3, by their continued fraction J_n/J_{n−1} = n/(x + J_{n+1}/J_n), to
    the precision of a double.
    """
    ratio = ((x * x + 4 * (_DEPTH + 1)).sqrt() - x) / 2  # what they tend to
    for n in range(_DEPTH, count, -1):
        ratio.add_(x).reciprocal_().mul_(n)
    out: list[Tensor] = []
    for n in range(count, 0, -1):
        ratio = n / (x + ratio)
        out.insert(0, ratio)
    return out


def _near_zero(signal2: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """κ and 1 − κ to second order in δ, from the moments e_n = J_n/J₀ at δ = 0."""
    r = _ratios(x.clamp(min=_FAR), 4)
    e1, e2, e3, e4 = r[0], r[0] * r[1], r[0] * r[1] * r[2], r[0] * r[1] * r[2] * r[3]
    near = x.clamp(max=_FAR)
    n1 = (
        torch.exp(-torch.special.log_ndtr(-near) - 0.5 * near.square()) / math.sqrt(2 * math.pi)
        - near
    )
    n2 = 1 - near * n1
    n3 = 2 * n1 - near * n2
    e1, e2, e3, e4 = (
        torch.where(x >= _FAR, far, close)
        for far, close in ((e1, n1), (e2, n2), (e3, n3), (e4, 3 * n2 - near * n3))
    )
    return x * (e1 + signal2 * (e3 - 3 * e1 * e2) / 6), e2 + signal2 * (e4 - 3 * e2.square()) / 6


def _half_quadratic(signal: Tensor, x: Tensor, full: Tensor) -> Tensor:
    """The peak of the side of the sign, ½(δ − x)² where its mode is inside, less ½δ² σ₀²L/(1 +
    σ₀²L): the part of δ² taken together where both are large.
    """
    inside = signal > x
    apart = 0.5 * (signal - x).clamp(min=0).square() - 0.5 * signal.square() * (full / (1 + full))
    together = 0.5 * signal * (signal / (1 + full)) - 0.5 * x * (2 * signal - x)
    return torch.where(inside & (full > 1), together, apart)
