r"""Automatic relevance determination: the prior variance with the best evidence, of one weight, of a group, or of a layer.

Owns `best_var`. Imports torch only. Read as a function of the reduced prior N(e, v), ΔF(v) is the evidence for that variance (MacKay 1992,
Neural Computation 4(3); Tipping 2001, JMLR 1); v = 0 is the best where the data do not ask for the weight at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction.gaussian import Message, log_evidence_ratio
from pyro_bmr.reduction.line_search import line_maximum

_CHUNK = 1 << 15


class BestVariance(NamedTuple):
    """`var`: v for each weight, or each group; `delta_f`: the gain in log evidence over the prior of the fit, of each, nats."""

    var: Tensor
    delta_f: Tensor


def best_var(data: Message, prior_var: Tensor, groups: Tensor | None = None, shift: Tensor | float = 0.0) -> BestVariance:
    r"""The v ≥ 0 that maximises the evidence of priors N(e, v), e = `shift` from the prior mean of the fit.

    .. math:: v = \max(0,\; (m - e)^2 - 1/L) \quad\text{for one weight}, \qquad
        v_g = \arg\max_v \sum_{i \in g} \Delta F_i(v) \quad\text{for a group}

    A group's v by a scan of log v and a golden-section search to 1e-4, held against v = 0. A weight whose posterior is wider than its prior
    (L ≤ 0) says nothing: alone it keeps its prior.

    Args:
        data, prior_var: message and prior variance of each weight, of one shape.
        groups: an integer from 0 for each weight; None for a v of its own for each weight.
        shift: e, in units of the site.

    Example:
        >>> q, p = Diagonal(tensor([0.1, 2.0]), tensor([0.5, 0.5])), Diagonal(zeros(2), ones(2))
        >>> best_var(message(q, p), p.var).var  # m = (0.2, 4), 1/L = 1: the first goes
        tensor([ 0., 15.])
    """
    if bool((data.h + data.precision).isnan().any()):
        raise ReductionError("best_var: the message has NaN; the moments it was made of must be finite")
    prior_var = prior_var.expand(data.h.shape)
    informed = data.precision > 0
    precision = data.precision.masked_fill(~informed, 0.0)
    h = (data.h - precision * shift).masked_fill(~informed, 0.0)  # counted from the new mean
    if groups is None:
        safe = precision.masked_fill(~informed, 1.0)
        var = ((h / safe).square() - 1 / safe).clamp(min=0).where(informed, prior_var)
        return BestVariance(var, log_evidence_ratio(Message(data.h.masked_fill(~informed, 0.0), precision), prior_var, var, shift))
    index = groups.reshape(-1)
    h, precision, widths = h.reshape(-1), precision.reshape(-1), prior_var.reshape(-1)
    count = int(index.max()) + 1 if index.numel() else 0

    def summed(each: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=h.device).index_add_(0, index, each.double())

    def over_zero(log_var: Tensor) -> Tensor:
        """Σ ΔF(v) − Σ ΔF(0) per group."""
        var = log_var.exp().to(h.dtype)
        total = torch.zeros_like(log_var)
        for hc, lc, ic in zip(h.split(_CHUNK), precision.split(_CHUNK), index.split(_CHUNK), strict=True):
            v = var[ic]
            total.index_add_(0, ic, (0.5 * hc * (hc * v / (1 + v * lc)) - 0.5 * torch.log1p(v * lc)).double())
        return total

    size = summed(torch.ones_like(h))
    rms = summed((h / precision.clamp(min=1e-30)).square().clamp(max=1e30).where(precision > 0, widths) + widths) / size
    low = (summed(widths) / size).log() - 24
    var = line_maximum(over_zero, low, torch.maximum(rms.log(), low + 24) + 2, points=48, tolerance=1e-4)
    zero = over_zero(var) <= 0
    var = var.exp().masked_fill(zero, 0.0).to(h.dtype)
    message = Message(data.h.reshape(-1).masked_fill(precision <= 0, 0.0), precision)
    return BestVariance(var, summed(log_evidence_ratio(message, widths, var[index], shift)).to(h.dtype))
