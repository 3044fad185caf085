"""What a reduced prior says of the kept entries of a site, with one rule for each kind of prior.

Owns `reduced` and `is_point_spike`. The formulas are in `formulas/`. Next: `reduced_site.py`.

A prior of your own is a target if it has `mean` and `var` (it is Gaussian), `mixture` (a scale
mixture of Gaussians), or `log_prob` (any density), looked for in this order. For a rule of your own
register the class with `reduced.register`.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import delta_f, reduced_posterior, total
from pyro_bmr.formulas.laplace import laplace_reduction
from pyro_bmr.formulas.message import Message, message
from pyro_bmr.formulas.occams_window import window_shift
from pyro_bmr.formulas.quadrature import density_reduction
from pyro_bmr.formulas.relevance import best_var
from pyro_bmr.formulas.scale_mixture import (
    Mixture,
    best_scale,
    grouped_reduction,
    scale_mixture_reduction,
)
from pyro_bmr.priors import (
    Gaussian,
    Horseshoe,
    Laplace,
    ScaleMixture,
    SpikeAndSlab,
    StudentT,
)
from pyro_bmr.reduction.entries import KeptEntries, Reduced
from pyro_bmr.reduction.slabs import spike_and_slab


def is_point_spike(prior: Any) -> bool:
    """Whether a reduced prior is the point zero, so that ΔF is all that decides."""
    if not isinstance(prior, Gaussian) or prior.scale != 0:
        return False
    return isinstance(prior.mean, (int, float)) and prior.mean == 0


@singledispatch
def reduced(to: Any, entries: KeptEntries) -> Reduced:
    """The answer of one kind of reduced prior; this one is for priors that are known by what they
    have.
    """
    if isinstance(to, ScaleMixture):
        return _scale_mixture(to, entries)
    if hasattr(to, "mean") and hasattr(to, "var") and not callable(to.mean):
        return _gaussian(entries.target(to), entries)
    if hasattr(to, "log_prob"):
        return _density(to, entries)
    raise ReductionError(
        "to: expected a prior with mean and var, with mixture, or with log_prob, got"
        f" {described(to)}"
    )


@reduced.register
def _(to: Gaussian, entries: KeptEntries) -> Reduced:
    if not isinstance(to.mean, (int, float)):
        raise ReductionError(
            f"{described(to)}: the mean of a reduced prior is a number here; for other points use"
            " delta_f itself"
        )
    if to.scale == 0 and to.mean != 0:
        raise ReductionError(
            f"{described(to)}: a pruned weight is zero; for the evidence of another point use"
            " delta_f itself"
        )
    if to.scale == "layer":
        raise ReductionError(
            f"{described(to)} has hyper-parameters of its own; reduce to Gaussian(<number>), or to"
            " Gaussian() for the scale with the best evidence"
        )
    if to.scale == "empirical":
        return _best_gaussian(to, entries)
    return _gaussian(entries.target(to), entries)


def _gaussian(target: Diagonal, entries: KeptEntries) -> Reduced:
    """New moments, nothing is pruned; the point spike: no moment changes, a weight is pruned by its
    evidence.
    """
    if not bool(target.var.any()) and not bool(target.mean.any()):
        each = entries.spike
        drop = each if entries.groups is None else entries.spread(entries.summed(each))
        return Reduced(0.0, drop, entries.q, entries.p)
    gain = delta_f(entries.q, entries.p, target)
    return Reduced(
        total(gain),
        torch.full_like(gain, -torch.inf),
        reduced_posterior(entries.q, entries.p, target),
        target,
    )


def _best_gaussian(to: Gaussian, entries: KeptEntries) -> Reduced:
    """The scale with the best evidence: one for the site, or one for each group. A group with scale
    0 is pruned.
    """
    q, p, mean = entries.q, entries.p, float(to.mean)  # type: ignore[arg-type]  # a number: `reduced` refuses others
    index = (
        torch.zeros(len(q.mean), dtype=torch.long, device=q.mean.device)
        if entries.groups is None
        else entries.groups
    )
    data = message(Diagonal(q.mean.double(), q.var.double()), p, about=mean)
    best = best_var(data, p.var, index).var
    var = best[index]
    target = Diagonal(torch.full_like(var, mean), var)
    drop = torch.full_like(q.mean, -torch.inf).masked_fill(
        var == 0, -torch.inf if entries.groups is None or mean != 0 else torch.inf
    )
    scales = best.sqrt().to(q.mean.dtype)
    return Reduced(
        total(delta_f(q, p, target)),
        drop,
        reduced_posterior(q, p, target),
        target,
        float(scales.median()) if len(scales) else None,
        None if entries.groups is None else scales,
    )


@reduced.register
def _(to: Horseshoe, entries: KeptEntries) -> Reduced:
    if (
        to.slab_df is not None
        or to.block != 1
        or to.tiers
        not in (
            ("layer", "weight"),
            ("weight",),
            ("layer", "unit"),
            ("unit",),
            ("unit", "weight"),
        )
    ):
        raise ReductionError(
            f"{described(to)}: the quadrature is over one scale, of each weight or unit, with one"
            " tau for the layer or each unit, under a slab that is known; for other tiers fit a"
            " reduction_program"
        )
    shared = entries.rows if "weight" not in to.tiers else None
    by_row = to.tiers == ("unit", "weight")
    return _scale_mixture(to, entries, shared, by_row=by_row, window=True)


@reduced.register
def _(to: Laplace, entries: KeptEntries) -> Reduced:
    """In closed form; groups share one variance, by quadrature over it."""
    if entries.groups is not None:
        return _scale_mixture(to, entries)
    data = _message_from_zero(to, entries)

    def gain(data: Message, var: Tensor, scale: float) -> Tensor:
        return laplace_reduction(data, var, scale).delta_f

    found = hasattr(to, "log_hyper") and len(data.h)
    scale = (
        float(best_scale(data, entries.p.var, to.mixture, to.log_hyper, gain=gain))
        if found
        else None
    )
    b = to.scale if scale is None else scale
    # a site without weights has no scale to find
    result = laplace_reduction(data, entries.p.var, 1.0 if isinstance(b, str) else b)
    return Reduced(
        total(result.delta_f), result.log_odds, Diagonal(result.mean, result.var), None, scale
    )


def _message_from_zero(to: Any, entries: KeptEntries) -> Message:
    if bool((entries.p.mean != 0).any()):
        raise ReductionError(
            f"a reduction to {type(to).__name__} needs a prior of mean 0 in the fit"
        )
    return message(entries.q, entries.p)


def _scale_mixture(
    to: ScaleMixture,
    entries: KeptEntries,
    shared: Tensor | None = None,
    by_row: bool = False,
    window: bool = False,
) -> Reduced:
    """A weight is pruned when κ > ½. The global scale has the best evidence where the prior has a
    `log_hyper`, else it is the prior's own.

    `shared`: the group of each weight that has one local scale; groups that were asked for come
    before it. `by_row`: a global scale for each row. `window`: what has no clear evidence for it is
    pruned as well (`_with_window`).
    """
    q, p = entries.q, entries.p
    data = _message_from_zero(to, entries)
    groups = shared if entries.groups is None else entries.groups
    mixture: Any = to.mixture if groups is None else _grouped_mixture(to, data, groups)
    scale, scales, rows = None, None, None
    if hasattr(to, "log_hyper") and len(q.mean):
        rows = entries.rows if groups is None and by_row else None
        found = best_scale(data, p.var, mixture, to.log_hyper, rows, groups)
        scale, scales = float(found.median()), None if rows is None else found
    if groups is not None:
        variances, log_weights = mixture(scale)
        result = grouped_reduction(data, p.var, variances, log_weights, groups)
    elif scales is not None:
        variances, log_weights = zip(*(to.mixture(s) for s in scales.tolist()), strict=True)
        result = scale_mixture_reduction(data, p.var, variances, log_weights, rows)
    else:
        result = scale_mixture_reduction(data, p.var, *mixture(scale))
    moments = Diagonal(result.mean, result.var)
    drop = result.log_odds
    if window:
        drop = _with_window(drop, result.delta_f, entries, groups)
    # not Gaussian any more: reduce again from the fit
    return Reduced(total(result.delta_f), drop, moments, None, scale, scales)


def _with_window(
    log_odds: Tensor, delta_f: Tensor, entries: KeptEntries, groups: Tensor | None
) -> Tensor:
    """The log odds of κ > ½, and positive ones of what κ keeps without clear evidence for it.

    If the global scale is wide beside the error of an estimate, κ keeps even an estimate of 0. The
    evidence against a weight is the ΔF of the point zero minus that of the mixture.
    """
    spike, by_decision = entries.spike, log_odds
    if groups is not None:
        spike = delta_f.new_zeros(len(delta_f)).index_add_(0, groups, spike.to(delta_f))
        by_decision = log_odds.new_empty(len(delta_f)).index_copy_(0, groups, log_odds)
    evidence = (spike - delta_f).masked_fill(by_decision > 0, torch.inf)
    site = entries.site
    share = site.mean.numel() / max(site.kept_count, 1)  # those pruned before are decisions too
    shifted = evidence + window_shift(evidence, round(len(evidence) * share))
    drop = torch.where((by_decision <= 0) & (shifted > 0), shifted, by_decision)
    return drop if groups is None else drop[groups]


def _grouped_mixture(to: ScaleMixture, data: Message, groups: Tensor) -> Mixture:
    """The mixture of a prior with nodes as close as the largest group needs; a prior of the user's
    own may have one grid for all.
    """
    if not isinstance(to, (Horseshoe, Laplace, StudentT)) or not len(groups):
        return to.mixture
    together = int(torch.bincount(groups).max())
    if not isinstance(to, Laplace):
        return lambda scale: to.mixture(scale, together)
    m = torch.where(data.precision > 0, data.h / data.precision, 0).double()
    none = m.new_zeros(int(groups.max()) + 1)
    size, nats = (float(none.index_add(0, groups, x).max()) for x in (m**2, m * data.h))
    # e^−E weighs the variance 2b²E: the best is below ½√Σm²/b, and below what all nats that the
    # data have could pay for
    return lambda scale: to.mixture(
        scale, together, min(math.sqrt(size) / (to.scale if scale is None else scale), nats + 90)
    )


def _density(to: Any, entries: KeptEntries) -> Reduced:
    """Any density. If the prior says that it shrinks, a weight is pruned when κ = 1 − μ̃/m > ½;
    else none is.
    """
    q, p = entries.q, entries.p
    result = density_reduction(q, p, to.log_prob)
    drop = torch.full_like(q.mean, -torch.inf)
    if getattr(to, "shrinkage", False):
        data = message(q, p)
        # at h = 0 the derivative
        share = torch.where(data.h == 0, result.var, (result.mean - p.mean) / data.h)
        kappa = (1 - data.precision * share).clamp(0, 1).masked_fill(data.precision <= 0, 1.0)
        drop = torch.logit(kappa)
        drop = entries.spread(entries.summed(drop)) if entries.groups is not None else drop
    return Reduced(total(result.delta_f), drop, Diagonal(result.mean, result.var), None)


reduced.register(SpikeAndSlab, spike_and_slab)
