"""What a reduced prior says of one site of a posterior: evidence, moments, and the log odds by
which each weight goes.

Owns `SiteReduction` and `site_reduction`, with one entry per kind of reduced prior. The formulas
are in the files beside this one; the decision over all sites is in `decisions.py`. Next:
`visited_models.py`.

A prior of your own is a target if it has `mean` and `var` (it is Gaussian), `mixture` (a scale
mixture of Gaussians), or `log_prob` (any density), looked for in this order. For a rule of your own
register the class with `reduced.register`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.diagonal import Diagonal, number
from pyro_bmr.formulas.gaussian import delta_f, point_spike_delta_f, reduced_posterior, total
from pyro_bmr.formulas.laplace import laplace_reduction
from pyro_bmr.formulas.message import Message, message
from pyro_bmr.formulas.quadrature import density_reduction
from pyro_bmr.formulas.relevance import best_var
from pyro_bmr.formulas.scale_mixture import (
    Mixture,
    best_scale,
    grouped_reduction,
    scale_mixture_reduction,
)
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import (
    Gaussian,
    Horseshoe,
    Laplace,
    Prior,
    ScaleMixture,
    SpikeAndSlab,
    StudentT,
)
from pyro_bmr.reduction.entries import Living, Reduced, living_part
from pyro_bmr.reduction.slabs import spike_and_slab, with_slab


@dataclass(frozen=True)
class SiteReduction:
    """What a reduction says of one site.

    `delta_f`: gain in log evidence of the whole site, nats, for the reduced prior over the prior of
    the fit. `spike_delta_f`: the gain of setting each weight to zero, entry by entry. `drop`: the
    log odds by which each weight goes when positive. `site`: the reduced posterior, with its mask.
    `wider`: how many living weights have a posterior wider than their prior, about which the data
    said nothing. `terms`: how many independent terms `delta_f` is the sum of; a joint evidence is
    one. `scale`: what the reduction found out about the prior (τ of a horseshoe, inclusion log odds
    ζ of a spike and slab, s of a Gaussian), or None; the median where it differs between groups.
    `scales`: then the value of each group.
    """

    delta_f: float
    spike_delta_f: Tensor
    drop: Tensor
    site: Site
    wider: int
    scale: float | None = None
    scales: Tensor | None = None
    terms: int = 0

    @property
    def inclusion(self) -> Tensor:
        """The probability by which each weight stays, σ(−drop): of being in the slab for a spike
        and slab, 1 − κ for a scale mixture.
        """
        return torch.sigmoid(-self.drop)


def site_reduction(
    posterior: Posterior, name: str, to: Prior | None, groups: Tensor | None = None
) -> SiteReduction:
    """Everything but the mask: `drop` and the reduced moments of all kept entries, and for
    continuous targets ΔF. `decide` in `decisions.py` makes the mask from `drop`.

    `groups`: an integer tensor of the site's shape; entries of one number share one decision, and
    where the prior has a scale or an indicator per weight they share that. None: each weight by
    itself.

    Raises:
        ReductionError: the site is a point estimate, its prior in the fit is not Gaussian, `to` is
            no target, or `groups` does not fit.
    """
    site = posterior[name]
    _not_a_point(site)
    if groups is not None and (
        groups.shape != site.mean.shape or groups.is_floating_point() or groups.dtype == torch.bool
    ):
        raise ReductionError(
            f"groups must be an integer tensor of the site's shape {tuple(site.mean.shape)}; got"
            f" {groups.dtype} of shape {tuple(groups.shape)}"
        )
    if to is None:
        return _own_decision(posterior, name)
    if site.prior is None:
        raise ReductionError(
            f"its prior in the fit ({described(site.declared)}) is not Gaussian; reduce a posterior"
            " fitted under Gaussian(), or pass to=None for its own decision"
        )
    if isinstance(to, SpikeAndSlab):
        to = with_slab(posterior, name, to, groups)
    wider = int(torch.count_nonzero(site.var > site.prior.var))
    spike = point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask)
    living = living_part(site, spike, groups)
    answer = reduced(to, living)
    whole = site.mask is None

    def back(part: Tensor, elsewhere: Tensor | float) -> Tensor:
        if whole:
            return part.view(site.mean.shape)
        return (
            torch.full_like(site.mean, elsewhere) if isinstance(elsewhere, float) else elsewhere
        ).masked_scatter(site.alive, part)

    kept = answer.moments is living.q
    mean, var = (
        (site.mean, site.var)
        if kept
        else (back(answer.moments.mean, site.mean), back(answer.moments.var, site.var))
    )
    drop = (
        spike.masked_fill(~site.alive, torch.inf)
        if answer.drop is living.spike and not whole
        else back(answer.drop, torch.inf)
    )
    prior = site.prior if answer.prior is living.p else None
    if answer.prior is not None and answer.prior is not living.p:
        prior = Diagonal(
            *(
                t if t.ndim == 0 else back(t, 1.0)
                for t in map(number, _in_dtype(answer.prior, site.mean.dtype))
            )
        )
    site = replace(
        site,
        mean=mean,
        var=var,
        prior=prior,
        joint=site.joint if kept else None,
        message=site.message if kept else None,
    )
    return SiteReduction(answer.delta_f, spike, drop, site, wider, answer.scale, answer.scales)


@singledispatch
def reduced(to: Any, living: Living) -> Reduced:
    """The answer of one kind of reduced prior; this one is for priors that are known by what they
    have.
    """
    if isinstance(to, ScaleMixture):
        return _scale_mixture(to, living)
    if hasattr(to, "mean") and hasattr(to, "var") and not callable(to.mean):
        return _gaussian(living.target(to), living)
    if hasattr(to, "log_prob"):
        return _density(to, living)
    raise ReductionError(
        f"{described(to)} is no target of a reduction: it has neither mean and var, nor mixture,"
        " nor log_prob"
    )


@reduced.register
def _(to: Gaussian, living: Living) -> Reduced:
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
        return _best_gaussian(to, living)
    return _gaussian(living.target(to), living)


def _gaussian(target: Diagonal, living: Living) -> Reduced:
    """New moments, nothing goes; the point spike: nothing moves, a weight goes by its evidence."""
    if not bool(target.var.any()) and not bool(target.mean.any()):
        return Reduced(
            0.0,
            living.spike if living.groups is None else living.spread(living.summed(living.spike)),
            living.q,
            living.p,
        )
    gain = delta_f(living.q, living.p, target)
    return Reduced(
        total(gain),
        torch.full_like(gain, -torch.inf),
        reduced_posterior(living.q, living.p, target),
        target,
    )


def _best_gaussian(to: Gaussian, living: Living) -> Reduced:
    """The scale with the best evidence: one for the site, or one for each group, of which a scale
    of 0 says that the group goes.
    """
    q, p, mean = living.q, living.p, float(to.mean)  # type: ignore[arg-type]  # a number: `reduced` refuses others
    index = (
        torch.zeros(len(q.mean), dtype=torch.long, device=q.mean.device)
        if living.groups is None
        else living.groups
    )
    data = message(Diagonal(q.mean.double(), q.var.double()), p, about=mean)
    best = best_var(data, p.var, index).var
    var = best[index]
    target = Diagonal(torch.full_like(var, mean), var)
    drop = torch.full_like(q.mean, -torch.inf).masked_fill(
        var == 0, -torch.inf if living.groups is None or mean != 0 else torch.inf
    )
    scales = best.sqrt().to(q.mean.dtype)
    return Reduced(
        total(delta_f(q, p, target)),
        drop,
        reduced_posterior(q, p, target),
        target,
        float(scales.median()) if len(scales) else None,
        None if living.groups is None else scales,
    )


@reduced.register
def _(to: Horseshoe, living: Living) -> Reduced:
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
    shared = living.rows if "weight" not in to.tiers else None
    return _scale_mixture(to, living, shared, by_row=to.tiers == ("unit", "weight"))


@reduced.register
def _(to: Laplace, living: Living) -> Reduced:
    """In closed form; groups share one variance, by quadrature over it."""
    if living.groups is not None:
        return _scale_mixture(to, living)
    data = _message_from_zero(to, living)

    def gain(data: Message, var: Tensor, scale: float) -> Tensor:
        return laplace_reduction(data, var, scale).delta_f

    found = hasattr(to, "log_hyper") and len(data.h)
    scale = (
        float(best_scale(data, living.p.var, to.mixture, to.log_hyper, gain=gain))
        if found
        else None
    )
    b = to.scale if scale is None else scale
    # a site without weights has no scale to find
    result = laplace_reduction(data, living.p.var, 1.0 if isinstance(b, str) else b)
    return Reduced(
        total(result.delta_f), result.log_odds, Diagonal(result.mean, result.var), None, scale
    )


def _message_from_zero(to: Any, living: Living) -> Message:
    if bool((living.p.mean != 0).any()):
        raise ReductionError(
            f"a reduction to {type(to).__name__} needs a prior of mean 0 in the fit"
        )
    return message(living.q, living.p)


def _scale_mixture(
    to: ScaleMixture, living: Living, shared: Tensor | None = None, by_row: bool = False
) -> Reduced:
    """A weight goes when κ > ½. The global scale is that of the best evidence where the prior has a
    `log_hyper`, else its own.

    `shared`: the group of each weight that has one local scale; groups that were asked for come
    before it. `by_row`: a global scale for each row.
    """
    q, p = living.q, living.p
    data = _message_from_zero(to, living)
    groups = shared if living.groups is None else living.groups
    mixture: Any = to.mixture if groups is None else _grouped_mixture(to, data, groups)
    scale, scales, rows = None, None, None
    if hasattr(to, "log_hyper") and len(q.mean):
        rows = living.rows if groups is None and by_row else None
        found = best_scale(data, p.var, mixture, to.log_hyper, rows, groups)
        scale, scales = float(found.median()), None if rows is None else found
    if groups is not None:
        variances, log_weights = mixture(scale)
        result = grouped_reduction(data, p.var, variances, log_weights, groups)
    elif scales is not None:
        by_tau = [to.mixture(s) for s in scales.tolist()]
        result = scale_mixture_reduction(
            data, p.var, [v for v, _ in by_tau], [w for _, w in by_tau], rows
        )
    else:
        result = scale_mixture_reduction(data, p.var, *mixture(scale))
    # not Gaussian any more: reduce again from the fit
    return Reduced(
        total(result.delta_f),
        result.log_odds,
        Diagonal(result.mean, result.var),
        None,
        scale,
        scales,
    )


def _grouped_mixture(to: ScaleMixture, data: Message, groups: Tensor) -> Mixture:
    """The mixture of a prior with nodes as close as the largest group needs; a prior of the user's
    own may have one grid for all.
    """
    if not isinstance(to, (Horseshoe, Laplace, StudentT)) or not len(groups):
        return to.mixture
    together = int(torch.bincount(groups).max())
    if not isinstance(to, Laplace):
        return lambda scale: to.mixture(scale, together)
    informed = data.precision > 0
    m = torch.where(informed, data.h / data.precision, 0).double()
    size, nats = (
        float(
            torch.zeros(int(groups.max()) + 1, dtype=torch.float64, device=m.device)
            .index_add_(0, groups, x)
            .max()
        )
        for x in (m**2, m * data.h)
    )
    # e^−E weighs the variance 2b²E: the best is below ½√Σm²/b, and below what all nats that the
    # data have could pay for
    return lambda scale: to.mixture(
        scale, together, min(math.sqrt(size) / (to.scale if scale is None else scale), nats + 90)
    )


def _density(to: Any, living: Living) -> Reduced:
    """Any density. If the prior says that it shrinks, a weight goes when κ = 1 − μ̃/m > ½; else
    nothing goes.
    """
    q, p = living.q, living.p
    result = density_reduction(q, p, to.log_prob)
    drop = torch.full_like(q.mean, -torch.inf)
    if getattr(to, "shrinkage", False):
        data = message(q, p)
        # at h = 0 the derivative
        share = torch.where(data.h == 0, result.var, (result.mean - p.mean) / data.h)
        kappa = (1 - data.precision * share).clamp(0, 1).masked_fill(data.precision <= 0, 1.0)
        drop = torch.logit(kappa)
        drop = living.spread(living.summed(drop)) if living.groups is not None else drop
    return Reduced(total(result.delta_f), drop, Diagonal(result.mean, result.var), None)


reduced.register(SpikeAndSlab, spike_and_slab)


def _own_decision(posterior: Posterior, name: str) -> SiteReduction:
    site = posterior[name]
    drop = torch.full_like(site.mean, -torch.inf)
    decide = getattr(site.declared, "drop", None)
    if decide is not None:
        drop = decide(name, site.mean, site.var, posterior.point())
    spike = torch.full_like(drop, torch.nan)
    if site.prior is not None:
        spike = point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask)
    return SiteReduction(0.0, spike, drop.masked_fill(~site.alive, torch.inf), site, 0)


def _in_dtype(prior: Diagonal, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The moments of a reduced prior as a site holds them."""
    var = prior.var.to(dtype)
    if bool(((prior.var > 0) & (var < torch.finfo(dtype).tiny)).any()):
        smallest = float(prior.var[prior.var > 0].min()) ** 0.5
        raise ReductionError(
            f"a reduced prior of scale {smallest:.3g} has a variance below the range of {dtype};"
            " give a posterior in torch.float64"
        )
    return prior.mean.to(dtype), var


def _not_a_point(site: Site) -> None:
    if site.mean.numel():
        smallest = (
            site.var.min() if site.mask is None else site.var.where(site.mask, torch.inf).min()
        )
        if float(smallest) == 0:
            raise ReductionError(
                "its posterior is a point estimate (variance 0) and says nothing of other priors;"
                " fit it with MeanField"
            )
