r"""Which weights are kept under a spike-and-slab prior whose inclusion probability is learned from
the weights themselves.

Owns `exact_inclusion`, a one-dimensional integral, and its result `Inclusion`; the cheap answer for
any size is in `mean_field_inclusion.py`. Imports torch only. Given is each weight's ΔF_i, the log
of r_i = p(y | w_i = 0) / p(y | w_i in the slab), in nats:

    p(w_i) = π slab(w_i) + (1 − π) spike(w_i),   π ~ Beta(α₀, β₀),   evidence gain = log E_π[ ∏ᵢ (π
    + (1 − π) rᵢ) ].

Next: `line_search.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import PyroBMRWarning, ReductionError, described
from pyro_bmr.formulas.logit_beta import LogitBeta
from pyro_bmr.formulas.mean_field_inclusion import check_beta

_QUADRATURE_NODES = 257
_PIECE = 1 << 16  # weights at once, where a whole site would leave the cache
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
    check_beta(alpha, beta, "exact_inclusion")
    if not abs(math.log(alpha) - math.log(beta)) < _MOST_LOG_ODDS:
        raise ReductionError(
            "exact_inclusion: expected alpha / beta between 1e-250 and 1e250, got"
            f" alpha={described(alpha)}, beta={described(beta)}; a prior as sure as that is"
            " fixed_inclusion"
        )
    if not delta_f.is_floating_point() or bool((delta_f.isnan() | delta_f.isposinf()).any()):
        nan, infinite = int(delta_f.isnan().sum()), int(delta_f.isposinf().sum())
        raise ReductionError(
            f"exact_inclusion: expected floating-point ΔF below +∞, got {nan} NaN, {infinite} +∞,"
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

    low, high = _reach(d, prior)
    away, terms, tails = _trapezoid(log_integrand, low - prior.peak, high - prior.peak, prior, d)
    nodes = prior.peak + away
    log_mass = torch.cat([terms, tails]).logsumexp(0)
    left, right = tails - log_mass
    drop = d + _mean_ratio(both, nodes, (terms - log_mass).exp(), left - below, right + above)
    included = torch.cat([terms - torch.nn.functional.softplus(-nodes), tails[1:]]).logsumexp(0)
    excluded = torch.cat([terms - torch.nn.functional.softplus(nodes), tails[:1]]).logsumexp(0)
    bulk = nodes[terms >= terms.max() - 1]
    return (
        drop,
        above.sum() + (log_mass - prior.log_width),
        included - excluded,
        (float(bulk[0]), float(bulk[-1])),
    )


def _reach(d: Tensor, prior: LogitBeta) -> tuple[float, float]:
    """Between which logit π the integrand is not negligible."""
    # within it the integrand bends for π, and further out at each ΔF,
    bend = math.log(max(prior.alpha, prior.beta, len(d))) + math.log(3)
    # until all that is beyond has fallen by exp(−80)
    fallen = [2 * _TAIL_NATS + max(-math.log(x), 0.0) for x in (prior.alpha, prior.beta)]
    low = max(min(float(d.min()), -bend), -bend - fallen[0]) - _TAIL_NATS
    return low, min(max(float(d.max()), bend), bend + fallen[1]) + _TAIL_NATS


def _mean_ratio(
    both: Tensor, nodes: Tensor, weights: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """log E[(1 − π)/m] − log E[π/m], m = π + (1 − π) exp(ΔF) over the larger of 1 and exp(ΔF);
    `left`, `right`: the logs of the tails of either.
    """
    rows = max(_PIECE // both.shape[1], 1)
    odds = nodes.exp()
    held = (weights > 0) & (odds > 0) & (1 / odds > 0) & (1 / odds < math.inf)
    # over the larger of 1 and r, and of 1 and 1/r
    inside, outside = torch.zeros_like(both)
    for w, o in zip(weights[held].split(rows), odds[held, None].split(rows), strict=True):
        inside += w @ torch.addcmul(both[0], both[1], 1 / o).reciprocal_()
        outside += w @ torch.addcmul(both[1], both[0], o).reciprocal_()
    return torch.logaddexp(outside.log(), left) - torch.logaddexp(inside.log(), right)


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
    fallen = [_TAIL_NATS + max(-math.log(x), 0.0) for x in (prior.alpha, prior.beta)]
    first, last = _support(log_integrand, low, high, fallen, like)
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
                f" by {abs(total - before):.3g} nats, more than {_SETTLED:g}; it and the"
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
