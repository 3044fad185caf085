r"""Which weights are kept under a spike-and-slab prior whose inclusion probability is learned from
the weights themselves.

Owns the two answers, `mean_field_log_odds` (cheap, any size) and `exact_inclusion` (a
one-dimensional integral), and `fixed_inclusion` for a known π. Imports torch only. Given is each
weight's ΔF_i, the log of r_i = p(y | w_i = 0) / p(y | w_i in the slab), in nats:

    p(w_i) = π slab(w_i) + (1 − π) spike(w_i),   π ~ Beta(α₀, β₀),
    evidence gain = log E_π[ ∏ᵢ (π + (1 − π) rᵢ) ].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import PyroBMRWarning, ReductionError, described, holds
from pyro_bmr.formulas.logit_beta import LogitBeta

_QUADRATURE_NODES = 257
_SAMPLE = 1 << 16  # weights on which the fixed point is first sought
_PIECE = 1 << 16  # weights at once, where a whole site would leave the cache
_PASSES = 100
# nats by which the integral may change when its nodes are doubled; doubled no further
_SETTLED, _MOST_NODES = 1e-5, 1 << 15
_MOST_LOG_ODDS = 250 * math.log(10)  # of the prior: π and 1 − π stay in the floats
_FAR = 60.0  # nats: a second bulk of the integrand has less than exp(−60) of it
_TAIL_NATS = 40.0  # the integrand is followed on each side until it has fallen by this much


class Inclusion(NamedTuple):
    """`drop_log_odds`: of each weight being in the spike, the shape of ΔF. `log_evidence_gain`:
    of the whole layer over all slab, nats. `log_odds`: logit of the posterior mean of π, given
    which a weight with that ΔF is as likely in the slab as in the spike.
    """

    drop_log_odds: Tensor
    log_evidence_gain: Tensor
    log_odds: Tensor

    @property
    def probability(self) -> Tensor:
        """The probability of each weight being in the slab."""
        return torch.sigmoid(-self.drop_log_odds)


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
    _check_beta(alpha, beta, "inclusion")
    d = delta_f.reshape(-1)
    n = d.numel()
    if n == 0:
        return _digamma(alpha) - _digamma(beta), 0.0
    zeta = _iterated(d[:: max(math.ceil(n / _SAMPLE), 1)].double(), n, alpha, beta)
    for _ in range(_PASSES):
        sums = _sums(d, zeta)
        step = _newton_step(sums, zeta, alpha, beta)
        zeta += step
        if abs(step) <= 0.03:
            break
    included, excluded, slope, bend, third, softplus = sums
    moved = slope * step + bend * step**2 / 2 + third * step**3 / 6
    a, b = alpha + included + moved, beta + excluded - moved
    # Σ log(1 + exp(ΔF − ζ))
    fit = (
        softplus - excluded * step + slope * step**2 / 2 + bend * step**3 / 6 + third * step**4 / 24
    )
    log_slab, log_spike = _digamma(a) - _digamma(a + b), _digamma(b) - _digamma(a + b)
    kl = _log_beta(alpha, beta) - _log_beta(a, b) + (a - alpha) * log_slab + (b - beta) * log_spike
    gain = n * log_slab + fit - kl
    if not (math.isfinite(zeta) and math.isfinite(gain)):
        raise ReductionError(
            f"an inclusion is learned from ΔF that are numbers below +∞; of {n},"
            f" {int((d.isnan() | d.isposinf()).sum())} are not"
        )
    return zeta, gain


def fixed_inclusion(delta_f: Tensor, log_odds: float) -> float:
    r"""The evidence gain Σ log(π + (1 − π) rᵢ) for a known inclusion probability π, given as its
    log odds ζ.
    """
    log_pi = -float(torch.nn.functional.softplus(torch.tensor(-log_odds, dtype=torch.float64)))
    return delta_f.numel() * log_pi + _sums(delta_f.reshape(-1), log_odds)[5]


def _iterated(d: Tensor, n: int, alpha: float, beta: float) -> float:
    zeta, each = 0.0, n / d.numel()
    for _ in range(500):
        updated = _digamma(alpha + each * float(torch.sigmoid(zeta - d).sum())) - _digamma(
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
        residual = _digamma(a) - _digamma(b) - zeta - step
        rate = (_trigamma(a) + _trigamma(b)) * (slope + bend * step + third * step**2 / 2)
        if rate >= 1 or abs(step) > 0.5:  # no stable root here
            return _digamma(alpha + included) - _digamma(beta + excluded) - zeta
        step += residual / (1 - rate)
        if abs(residual) <= 1e-12 * (1 + abs(zeta)):
            break
    return step


def exact_inclusion(delta_f: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Inclusion:
    r"""Inclusion probabilities E[π / (π + (1 − π) rᵢ) | y] and log evidence gain by quadrature over
    logit π.

    The integrand in t = logit π is analytic, so the trapezoid rule converges exponentially; beyond
    the last bend on a side it is exp(αt) or exp(−βt), of which the rule has a geometric series.
    Against enumeration over all 2ⁿ subsets the error is below 1e-10. Cost: 257 passes over the
    weights, more until it settles. ΔF may be of any size; −∞ is a weight that is surely in the
    slab.

    Raises:
        ReductionError: a ΔF is NaN or +∞, `alpha` or `beta` is not a finite number > 0, or they are
            more than 250 orders of magnitude apart.

    A `PyroBMRWarning` says it if the integral has not settled when there are 32,768 nodes.

    Example:
        >>> # ΔF of three weights → how probably each is in the slab
        >>> exact_inclusion(tensor([1.5, -4.0, 0.3])).probability
    """
    _check_beta(alpha, beta, "exact_inclusion")
    if not abs(math.log(alpha) - math.log(beta)) < _MOST_LOG_ODDS:
        raise ReductionError(
            "exact_inclusion: expected alpha / beta between 1e-250 and 1e250, got"
            f" alpha={described(alpha)}, beta={described(beta)}; a prior as sure as that is"
            " fixed_inclusion"
        )
    if not delta_f.is_floating_point() or bool((delta_f.isnan() | delta_f.isposinf()).any()):
        nan, infinite = int(delta_f.isnan().sum()), int(delta_f.isposinf().sum())
        raise ReductionError(
            f"exact_inclusion: floating-point ΔF below +∞ are wanted; got {nan} NaN, {infinite} +∞,"
            f" {delta_f.dtype}; a weight whose evidence against the slab is infinite has no"
            " posterior to reduce"
        )
    d = delta_f.flatten().double()
    if not len(d):
        return Inclusion(
            delta_f.clone(), delta_f.new_zeros(()), delta_f.new_tensor(math.log(alpha / beta))
        )
    drop, gain, log_odds, bulk = _integrated(d, alpha, beta)
    for sign, edge, weight in ((1.0, max(bulk[1], 0.0), beta), (-1.0, min(bulk[0], 0.0), alpha)):
        # a weight with few others on its side, whose other choice has its probability where π has
        # hardly any: the odds of π without it
        excess = (sign * (d - edge)).clamp(min=0)
        few = excess.sum() - excess < _FAR + max(-math.log(weight), 0.0)
        for k in ((excess > 20) & (few | (excess == excess.sum()))).nonzero()[:, 0].tolist():
            others = torch.cat([d[:k], d[k + 1 :]])
            drop[k] = d[k] - (
                _integrated(others, alpha, beta)[2]
                if len(others)
                else math.log(alpha) - math.log(beta)
            )
    drop = drop.masked_fill(d.isneginf(), -torch.inf).view_as(delta_f)
    return Inclusion(*(t.to(delta_f.dtype) for t in (drop, gain, log_odds)))


def _integrated(
    d: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
    """Log odds of each spike, log evidence gain, logit E[π], and between which logit π the
    integrand is within a nat of its peak.
    """
    above, below = d.clamp(min=0), d.clamp(max=0)
    both = torch.stack([(-above).exp(), below.exp()])  # 1 and r, over the larger of the two
    rows = max(_PIECE // len(d), 1)  # nodes at once
    prior = LogitBeta.of(alpha, beta)

    def log_integrand(away: Tensor) -> Tensor:
        t = prior.peak + away
        terms = torch.cat(
            [
                (part @ both).log_().sum(1)
                for part in torch.stack([t.sigmoid(), (-t).sigmoid()], 1).split(rows)
            ]
        )
        return terms + prior.log_ratio(away)

    # within it the integrand bends for π, and further out at each ΔF,
    bend = math.log(max(prior.alpha, prior.beta, len(d))) + math.log(3)
    # until all that is beyond has fallen by exp(−80)
    fallen = [2 * _TAIL_NATS + max(-math.log(x), 0.0) for x in (prior.alpha, prior.beta)]
    low = max(min(float(d.min()), -bend), -bend - fallen[0]) - _TAIL_NATS
    high = min(max(float(d.max()), bend), bend + fallen[1]) + _TAIL_NATS
    away, terms, tails = _trapezoid(log_integrand, low - prior.peak, high - prior.peak, prior, d)
    nodes = prior.peak + away
    log_mass = torch.cat([terms, tails]).logsumexp(0)
    left, right = tails - log_mass
    weights, odds = (terms - log_mass).exp(), nodes.exp()
    held = (weights > 0) & (odds > 0) & (1 / odds > 0) & (1 / odds < math.inf)
    # over the larger of 1 and r, and of 1 and 1/r
    inside, outside = torch.zeros_like(d), torch.zeros_like(d)
    for w, o in zip(weights[held].split(rows), odds[held, None].split(rows), strict=True):
        inside += w @ torch.addcmul(both[0], both[1], 1 / o).reciprocal_()
        outside += w @ torch.addcmul(both[1], both[0], o).reciprocal_()
    drop = (
        d
        + torch.logaddexp(outside.log(), left - below)
        - torch.logaddexp(inside.log(), right + above)
    )
    included = torch.cat([terms - torch.nn.functional.softplus(-nodes), tails[1:]]).logsumexp(0)
    excluded = torch.cat([terms - torch.nn.functional.softplus(nodes), tails[:1]]).logsumexp(0)
    bulk = nodes[terms >= terms.max() - 1]
    return (
        drop,
        above.sum() + (log_mass - prior.log_width),
        included - excluded,
        (float(bulk[0]), float(bulk[-1])),
    )


def _trapezoid(
    log_integrand: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    prior: LogitBeta,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, log terms of the trapezoid rule at them, and the logs of what it has on the left and
    right of them; halved until the integral settles.
    """
    first, last = _support(
        log_integrand,
        low,
        high,
        [_TAIL_NATS + max(-math.log(x), 0.0) for x in (prior.alpha, prior.beta)],
        like,
    )
    # steps, at most ½ wide when halved once
    count = max(_QUADRATURE_NODES // 2, math.ceil(last - first))
    nodes = torch.linspace(first, last, count + 1, dtype=like.dtype, device=like.device)
    values, before = log_integrand(nodes), math.nan
    while True:
        step = (last - first) / (len(nodes) - 1)
        open_ends = torch.tensor([first == low, last == high], device=like.device)
        rest = torch.stack(
            [values[0] - _log_expm1(prior.alpha * step), values[-1] - _log_expm1(prior.beta * step)]
        )
        tails = rest.masked_fill(~open_ends, -torch.inf) + math.log(step)
        terms = values + math.log(step)
        total = float(torch.cat([terms, tails]).logsumexp(0))
        if abs(total - before) < _SETTLED:
            return nodes, terms, tails
        if len(nodes) > _MOST_NODES:
            warnings.warn(
                f"exact_inclusion: after {len(nodes):,} nodes the log evidence gain still changes"
                f" by {abs(total - before):.3g} nats, where {_SETTLED:g} are wanted; it and the"
                " odds are off by about as much; take mean_field_log_odds, or a wider Beta prior",
                PyroBMRWarning,
                stacklevel=4,
            )
            return nodes, terms, tails
        before = total
        between = (nodes[1:] + nodes[:-1]) / 2
        nodes = torch.cat([nodes, between]).sort().values
        both = torch.empty_like(nodes)
        both[::2], both[1::2] = values, log_integrand(between)
        values = both


def _log_expm1(x: float) -> float:
    return x + math.log(max(-math.expm1(-x), 5e-324))


def _support(
    log_integrand: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    depths: list[float],
    like: Tensor,
) -> tuple[float, float]:
    """The part of low … high where the integrand is within exp(−depth) of its peak, on the left and
    on the right of it, however narrow that is.

    It has one peak, as it is log-concave in π. `depths`: what is beyond an end may have 1/α or 1/β
    times the mass of a node.
    """
    for _ in range(60):
        nodes = torch.linspace(low, high, 65, dtype=like.dtype, device=like.device)
        values = log_integrand(nodes)
        top = int(values.argmax())
        left, right = (values >= values[top] - depth for depth in depths)
        first, last = max(int(left.nonzero()[0]) - 1, 0), min(int(right.nonzero()[-1]) + 1, 64)
        low, high = float(nodes[first]), float(nodes[last])
        if last - first > 32:
            break
    return low, high


def _check_beta(alpha: float, beta: float, where: str) -> None:
    if not holds(lambda a, b: 0 < a < math.inf and 0 < b < math.inf, alpha, beta):
        raise ReductionError(
            f"{where}: finite alpha, beta > 0 are wanted; got {described(alpha)}, {described(beta)}"
        )


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _digamma(x: float) -> float:
    return float(torch.digamma(torch.tensor(x, dtype=torch.float64)))


def _trigamma(x: float) -> float:
    return float(torch.polygamma(1, torch.tensor(x, dtype=torch.float64)))
