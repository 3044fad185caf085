r"""Sums over the nodes of a scale mixture, for a chunk of weights.

Owns `mixture_sums`, `silenced` and `informed`. Imports torch only. Next: `scale_mixture.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_bmr.formulas.mixture_nodes import Nodes, exponent

CHUNK = 1 << 15  # weights at once: the arrays of one pass over the nodes fit a core's cache
_WIDEST = 1e18
_FEW = 400  # weights for which one array of all nodes is faster than a pass over them


def mixture_sums(
    h: Tensor,
    precision: Tensor,
    prior_var: Tensor,
    nodes: Nodes,
    row: Tensor | None,
    moments: bool = True,
) -> tuple[Tensor, ...]:
    """ΔF, logit κ, mean and variance of up to `CHUNK` weights (`moments=False`: ΔF alone), summed
    node by node.

    The exponent of a node, ½h²(v − σ₀²)/((1 + vL)(1 + σ₀²L)), grows with v, so the exponent of the
    widest node is subtracted from all.
    """
    h, precision = informed(h, precision)
    if len(h) <= _FEW:
        return _by_logarithms(h, precision, prior_var, nodes, row)
    single = h.dtype == torch.float32
    full = torch.log1p(prior_var * precision).mul_(0.5)
    (s0, *sums), peak = _over_nodes(h, precision, prior_var, nodes, row, moments)
    lost = ~(
        (s0 > (1e-20 if single else 1e-250)) & s0.isfinite() & (peak < (1e3 if single else 1e9))
    )
    if single and bool((nodes.variances[-1] > _WIDEST).any()):
        lost |= h * (h / precision) + 1 > 1e-9 * _WIDEST * precision
    delta_f = s0.log().add_(full).add_(peak)
    if not moments:
        return (_mend(delta_f, lost, h, precision, prior_var, nodes, row)[0],)
    rest, inexact = _moments(h, precision, *(each / s0 for each in sums))
    lost |= inexact
    return _mend(delta_f, lost, h, precision, prior_var, nodes, row, rest)


def _over_nodes(
    h: Tensor,
    precision: Tensor,
    prior_var: Tensor,
    nodes: Nodes,
    row: Tensor | None,
    moments: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Σ of the terms e, of e/(1 + vL), e/(1 + vL)², ev/(1 + vL) and ev²/(1 + vL)² over the nodes,
    and the exponent subtracted from all.
    """
    # v² is to fit the floats
    variances = nodes.variances.clamp(max=_WIDEST if h.dtype == torch.float32 else 1e100)
    log_weights = nodes.log_weights
    if row is not None:
        variances, log_weights = variances.to(h), log_weights.to(h)
    a = 0.5 * h * (h / (1 + prior_var * precision))
    b = a * prior_var
    widest = float(variances[-1]) if row is None else variances[-1][row]
    peak = (a * widest).sub_(b).div_(1 + widest * precision)
    one, negative_b = torch.ones_like(h), b.neg_()
    x, s, e = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h)
    s0, s1, s2, v1, v2 = (torch.zeros_like(h) for _ in range(5))
    columns = variances, log_weights.exp()
    for v, w in zip(*(columns if row is not None else (c.tolist() for c in columns)), strict=True):
        if row is None:
            torch.add(one, precision, alpha=v, out=x)
            torch.add(negative_b, a, alpha=v, out=e)
        else:
            v, w = v[row], w[row]
            torch.addcmul(one, precision, v, out=x)
            torch.addcmul(negative_b, a, v, out=e)
        x.rsqrt_()  # (1 + vL)^−½
        torch.mul(x, x, out=s)
        e.mul_(s).sub_(peak).exp_().mul_(x)
        if row is not None:
            e.mul_(w)
            w = 1.0
        s0.add_(e, alpha=w)
        if moments:
            e.mul_(s)
            s1.add_(e, alpha=w)
            s2.addcmul_(e, s, value=w)
            if row is not None:
                e.mul_(v)
                s.mul_(v)
                v = 1.0
            v1.add_(e, alpha=w * v)
            v2.addcmul_(e, s, value=w * v * v)
    return (s0, s1, s2, v1, v2), peak


def _moments(
    h: Tensor,
    precision: Tensor,
    kappa: Tensor,
    square: Tensor,
    share: Tensor,
    square_share: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Logit κ, mean and variance from the means of 1/(1 + vL), v/(1 + vL) and their squares; and
    where these have lost their digits.
    """
    taken = precision * share  # 1 − κ without the loss of digits near κ = 1
    # the same variance twice: of 1/(1 + vL), good where the data speak, and of v/(1 + vL), good
    # where they do not
    informed = kappa < 0.5
    spread = torch.where(
        informed, (square - kappa.square()).div_(precision.square()), square_share - share.square()
    ).clamp_(min=0)
    rounding = (
        (h * torch.where(informed, kappa / precision, share))
        .square_()
        .mul_(8 * torch.finfo(h.dtype).eps)
    )
    rest = (
        kappa.log() - taken.log(),
        h * share,
        share + h * (h * spread.masked_fill_(h == 0, 0.0)),
    )
    return rest, rounding > 1e-5 * share  # of weights far beyond a slab


def silenced(
    values: tuple[Tensor, ...], precision: Tensor, nodes: Nodes, row: Tensor | None
) -> tuple[Tensor, ...]:
    """The same, with what the mixture says of itself where the data say nothing."""
    silent = precision <= 0
    if not bool(silent.any()):
        return values
    delta_f, log_odds, mean, var = values
    own = nodes.total_var if row is None else nodes.total_var[row]
    return (
        delta_f.masked_fill(silent, 0.0),
        log_odds.masked_fill(silent, torch.inf),
        mean.masked_fill(silent, 0.0),
        torch.where(silent, own.to(var), var),
    )


def _mend(
    delta_f: Tensor,
    lost: Tensor,
    h: Tensor,
    precision: Tensor,
    prior_var: Tensor,
    nodes: Any,
    row: Tensor | None,
    rest: Any = (),
) -> tuple[Tensor, ...]:
    """Weights so far out that the sum has left the floats, or the exponent its digits, get theirs
    from logarithms.
    """
    if bool(lost.any()):
        data = h[lost], precision[lost], prior_var.expand(lost.shape)[lost]
        exact = _by_logarithms(*data, nodes, None if row is None else row[lost])
        for value, better in zip((delta_f, *rest), exact, strict=False):
            value[lost] = better
    return (delta_f, *rest)


def _by_logarithms(
    h: Tensor, precision: Tensor, prior_var: Tensor, nodes: Nodes, row: Tensor | None
) -> tuple[Tensor, ...]:
    """As `mixture_sums`, by a [weights × nodes] array of logarithms in double precision: for few
    weights, and for any signal.
    """
    dtype = h.dtype
    h, precision, prior_var = (t.double()[:, None] for t in (h, precision, prior_var))
    variances, log_weights = (
        t.double()[None] if row is None else t.double().mT[row]
        for t in (nodes.variances, nodes.log_weights)
    )
    growth, widest = 1 + variances * precision, variances[:, -1:]
    terms = log_weights - 0.5 * growth.log() + exponent(h, precision, widest, variances)
    p = terms.softmax(1)
    best = variances.expand_as(p).gather(1, p.argmax(1, keepdim=True))
    # v/(1 + vL), counted from the likeliest node
    away = (variances - best) / growth / (1 + best * precision)
    mean_away = (p * away).sum(1, keepdim=True)
    share = (best / (1 + best * precision) + mean_away)[:, 0]
    kappa, taken = (p / growth).sum(1), precision[:, 0] * share
    var = share + h[:, 0].square() * (p * (away - mean_away).square()).sum(1)
    gained = (
        terms.logsumexp(1, True)
        + 0.5 * torch.log1p(prior_var * precision)
        + exponent(h, precision, prior_var, widest)
    )
    return tuple(
        t.to(dtype) for t in (gained[:, 0], kappa.log() - taken.log(), h[:, 0] * share, var)
    )


def informed(h: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """The message, 0 where the data said nothing."""
    silent = precision <= 0
    return h.masked_fill(silent, 0.0), precision.masked_fill(silent, 0.0)
