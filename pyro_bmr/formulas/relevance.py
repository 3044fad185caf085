r"""Automatic relevance determination: the prior variance with the best evidence, of one weight, of
a group, or of a layer.

Owns `best_var`. Imports torch only. Read as a function of the reduced prior N(e, v), ΔF(v) is the
evidence for that variance (MacKay 1992, Neural Computation 4(3); Tipping 2001, JMLR 1); v = 0 is
the best where the data do not ask for the weight at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.diagonal import rounded
from pyro_bmr.formulas.line_search import line_maximum
from pyro_bmr.formulas.message import Message, log_evidence_ratio

_CHUNK = 1 << 15
_BELOW = 24.0  # nats of log v below 1/L of the sharpest weight of a group: where the scan begins
_STEP = 0.75  # nats of log v between the points of the scan: the maxima are wider


class BestVariance(NamedTuple):
    """`var`: v for each weight, or each group; `delta_f`: the gain in log evidence over the prior
    of the fit, of each, nats.
    """

    var: Tensor
    delta_f: Tensor


def best_var(
    data: Message, prior_var: Tensor, groups: Tensor | None = None, shift: Tensor | float = 0.0
) -> BestVariance:
    r"""The v ≥ 0 that maximises the evidence of priors N(e, v), e = `shift` from the prior mean of
    the fit.

    .. math:: v = \max(0,\; (m - e)^2 - 1/L) \quad\text{for one weight}, \qquad
        v_g = \arg\max_v \sum_{i \in g} \Delta F_i(v) \quad\text{for a group}

    A group's v by a scan of log v and a golden-section search to 1e-4, held against v = 0. A weight
    whose posterior is wider than its prior (L ≤ 0) says nothing: alone it keeps its prior, and a
    group of such weights alone keeps the average of theirs. Computed in float64.

    Args:
        data, prior_var: message and prior variance of each weight, of one shape.
        groups: an integer from 0 for each weight; None for a v of its own for each weight.
        shift: e, in units of the site.

    Raises:
        ReductionError: the message or the shift is not finite, a prior variance is not positive,
            shapes do not fit, or an answer is outside the range of the message's dtype.

    Example:
        >>> q, p = Diagonal(tensor([0.1, 2.0]), tensor([0.5, 0.5])), Diagonal(zeros(2), ones(2))
        >>> best_var(message(q, p), p.var).var  # m = (0.2, 4), 1/L = 1: the first is pruned
        tensor([ 0., 15.])
    """
    h, precision, widths, e = _given(data, prior_var, groups, shift)
    found = (
        _each(h, precision, widths, e)
        if groups is None
        else _grouped(h, precision, widths, e, groups)
    )
    dtype = data.h.dtype
    var = rounded(found.var, dtype, "best_var: the variance")
    if bool(((var == 0) & (found.var > 0)).any()):
        raise ReductionError(
            f"best_var: a variance is below the range of {dtype}; give a message of torch.float64"
        )
    return BestVariance(var, rounded(found.delta_f, dtype, "best_var: ΔF"))


def _given(
    data: Message, prior_var: Tensor, groups: Tensor | None, shift: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, L, σ₀² and e of each weight, in float64; weights about which the data said nothing have h
    = L = 0.
    """
    h, precision = (t.double() for t in data)
    if bad := int((~(h.isfinite() & precision.isfinite())).sum()):
        raise ReductionError(
            f"best_var: expected a message of finite numbers, got {bad} of {h.numel()} infinite or"
            " NaN; make it of finite moments"
        )
    try:
        widths, e = (
            torch.as_tensor(t, device=h.device).double().expand(h.shape) for t in (prior_var, shift)
        )
    except RuntimeError:
        raise ReductionError(
            "best_var: expected a prior_var and a shift that fit the message's shape"
            f" {tuple(h.shape)}, got {described(prior_var)} and {described(shift)}"
        ) from None
    if not bool((widths.isfinite() & (widths > 0) & e.isfinite()).all()):
        raise ReductionError(
            "best_var: expected finite prior variances > 0 and finite shifts, got"
            f" {int((~(widths > 0)).sum())} of {h.numel()} variances outside"
        )
    if groups is not None and (
        groups.shape != h.shape
        or groups.is_floating_point()
        or groups.dtype == torch.bool
        or bool((groups < 0).any())
    ):
        raise ReductionError(
            "groups: expected integers >= 0 of the message's shape"
            f" {tuple(h.shape)}, got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    silent = precision <= 0
    return h.masked_fill(silent, 0.0), precision.masked_fill(silent, 0.0), widths, e


def _each(h: Tensor, precision: Tensor, widths: Tensor, e: Tensor) -> BestVariance:
    informed = precision > 0
    safe = precision.masked_fill(~informed, 1.0)
    about, root = h - precision * e, safe.sqrt()  # counted from the new mean
    var = (
        ((about.abs() - root) / safe * ((about.abs() + root) / safe))
        .clamp(min=0)
        .where(informed, widths)
    )
    return BestVariance(var, log_evidence_ratio(Message(h, precision), widths, var, e))


def _grouped(
    h: Tensor, precision: Tensor, widths: Tensor, e: Tensor, groups: Tensor
) -> BestVariance:
    h, precision, widths, e, index = (t.reshape(-1) for t in (h, precision, widths, e, groups))
    about = h - precision * e
    count = int(index.max()) + 1 if index.numel() else 0

    def largest(each: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=h.device).scatter_reduce_(
            0, index, each, "amax"
        )

    def summed(each: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=h.device).index_add_(0, index, each)

    def over_zero(log_var: Tensor) -> Tensor:
        """Σ ΔF(v) − Σ ΔF(0) per group."""
        var = log_var.exp()
        total = torch.zeros_like(log_var)
        for hc, lc, ic in zip(
            about.split(_CHUNK), precision.split(_CHUNK), index.split(_CHUNK), strict=True
        ):
            v = var[ic]
            total.index_add_(0, ic, 0.5 * hc * (hc * v / (1 + v * lc)) - 0.5 * torch.log1p(v * lc))
        return total

    # each weight's best v is at most its m², so that of the group is no more than the largest; far
    # below all 1/L nothing changes with v
    sharpest = largest(precision)
    silent = sharpest == 0
    farthest = largest((about / precision.masked_fill(precision == 0, 1.0)).square())
    low = -sharpest.masked_fill(silent, 1.0).log() - _BELOW
    high = torch.maximum(farthest.clamp(1e-300, 1e300).log(), low + _BELOW) + 0.1
    points = max(48, math.ceil(float((high - low).max()) / _STEP)) if count else 48
    log_var = line_maximum(over_zero, low, high, points=points, tolerance=1e-4)
    var = log_var.exp().masked_fill(over_zero(log_var) <= 0, 0.0)
    var = var.where(~silent, summed(widths) / summed(torch.ones_like(widths)).clamp(min=1))
    each = log_evidence_ratio(Message(h, precision), widths, var[index], e)
    return BestVariance(var, summed(each))
