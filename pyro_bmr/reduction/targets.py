"""What a reduced prior says of one site of a posterior: evidence, moments, and the log odds by which each weight goes.

Owns `SiteReduction` and `site_reduction`, with one entry per kind of reduced prior. The formulas are in the files beside this one; the
decision over all sites is in `decisions.py`. Next: `correlations.py`.

A prior of your own is a target if it has `mean` and `var` (it is Gaussian), `mixture` (a scale mixture of Gaussians), or `log_prob` (any density),
looked for in this order. For a rule of your own register the class with `reduced.register`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.posterior import Posterior
from pyro_bmr.priors import Gaussian, Horseshoe, Prior, ScaleMixture, SpikeAndSlab
from pyro_bmr.reduction.gaussian import Diagonal, delta_f, message, moments, point_spike_delta_f, reduced_posterior
from pyro_bmr.reduction.line_search import line_maximum
from pyro_bmr.reduction.quadrature import density_reduction
from pyro_bmr.reduction.relevance import best_var
from pyro_bmr.reduction.scale_mixture import best_scale, grouped_reduction, scale_mixture_reduction
from pyro_bmr.reduction.spike_and_slab import exact_inclusion, fixed_inclusion, mean_field_log_odds
from pyro_bmr.site import Site

_WEIGHTS_FOR_WIDTH = 8192
_EXACT_INCLUSION_UP_TO = 4096  # decisions; above it the mean-field update and the integral give the same


@dataclass(frozen=True)
class SiteReduction:
    """What a reduction says of one site.

    `delta_f`: gain in log evidence of the whole site, nats, for the reduced prior over the prior of the fit. `spike_delta_f`: the
    gain of setting each weight to zero, entry by entry. `drop`: the log odds by which each weight goes when positive. `site`: the reduced
    posterior, with its mask. `wider`: how many living weights have a posterior wider than their prior, about which the data said nothing.
    `scale`: what the reduction found out about the prior (τ of a horseshoe, inclusion log odds ζ of a spike and slab, s of a Gaussian), or None;
    the median where it differs between groups. `scales`: then the value of each group.
    """

    delta_f: float
    spike_delta_f: Tensor
    drop: Tensor
    site: Site
    wider: int
    scale: float | None = None
    scales: Tensor | None = None

    @property
    def inclusion(self) -> Tensor:
        """The probability by which each weight stays, σ(−drop): of being in the slab for a spike and slab, 1 − κ for a scale mixture."""
        return torch.sigmoid(-self.drop)


@dataclass(frozen=True)
class Living:
    """The living entries of a site as vectors: posterior `q` and prior `p` of the fit, the point spike's ΔF of each, and the group of each.

    `groups`: an integer from 0 for each; None where each weight decides for itself.
    """

    site: Site
    q: Diagonal
    p: Diagonal
    spike: Tensor
    groups: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The output unit of each entry, counted over those with a living entry."""
        shape = self.site.mean.shape
        return numbered(_column(torch.arange(shape[0] if shape else 1, device=self.site.mean.device).view(-1, *[1] * (len(shape) - 1)), self.site))

    def target(self, gaussian: Any) -> Diagonal:
        """A Gaussian of the site's shape, or of one that broadcasts to it, at the living entries."""
        full = moments(gaussian, self.site.mean)
        return Diagonal(_column(full.mean, self.site), _column(full.var, self.site))

    def summed(self, each: Tensor) -> Tensor:
        """One number per decision: the sum over its entries."""
        if self.groups is None:
            return each
        return each.new_zeros(int(self.groups.max()) + 1 if len(each) else 0).index_add_(0, self.groups, each)

    def spread(self, decisions: Tensor) -> Tensor:
        """The decision of each entry."""
        return decisions if self.groups is None else decisions[self.groups]


@dataclass(frozen=True)
class Reduced:
    """What a rule answers: ΔF of the site, log odds by which each living entry goes, their moments and their prior from now on."""

    delta_f: float
    drop: Tensor
    moments: Diagonal
    prior: Diagonal | None
    scale: float | None = None
    scales: Tensor | None = None


def site_reduction(posterior: Posterior, name: str, to: Prior | None, groups: Tensor | None = None) -> SiteReduction:
    """Everything but the mask: `drop` and the reduced moments of all living entries, and for continuous targets ΔF.

    `groups`: an integer tensor of the site's shape; entries of one number share one decision, and where the prior has a scale or an indicator per
    weight they share that. None: each weight by itself.

    Raises:
        ReductionError: the site is a point estimate, its prior in the fit is not Gaussian, `to` is no target, or `groups` does not fit.
    """
    site = posterior[name]
    _not_a_point(site)
    if isinstance(to, SpikeAndSlab):
        to = with_slab(posterior, name, to, groups)
    if groups is not None and (groups.shape != site.mean.shape or groups.is_floating_point() or groups.dtype == torch.bool):
        raise ReductionError(
            f"groups must be an integer tensor of the site's shape {tuple(site.mean.shape)}; got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    if to is None:
        return _own_decision(posterior, name)
    if site.prior is None:
        raise ReductionError(
            f"its prior in the fit ({site.declared!r}) is not Gaussian; reduce a posterior fitted under Gaussian(), or pass to=None for its own decision"
        )
    wider = int(torch.count_nonzero(site.var > site.prior.var))
    spike = point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask)
    living = _living(site, spike, groups)
    answer = reduced(to, living)
    whole = site.mask is None

    def back(part: Tensor, elsewhere: Tensor | float) -> Tensor:
        if whole:
            return part.view(site.mean.shape)
        return (torch.full_like(site.mean, elsewhere) if isinstance(elsewhere, float) else elsewhere).masked_scatter(site.alive, part)

    kept = answer.moments is living.q
    mean, var = (site.mean, site.var) if kept else (back(answer.moments.mean, site.mean), back(answer.moments.var, site.var))
    drop = spike.masked_fill(~site.alive, torch.inf) if answer.drop is living.spike and not whole else back(answer.drop, torch.inf)
    prior = site.prior if answer.prior is living.p else None
    if answer.prior is not None and answer.prior is not living.p:
        prior = Diagonal(*(t if t.ndim == 0 else back(t, 1.0) for t in map(_number, (answer.prior.mean, answer.prior.var))))
    site = replace(site, mean=mean, var=var, prior=prior, joint=site.joint if kept else None, message=site.message if kept else None)
    return SiteReduction(answer.delta_f, spike, drop, site, wider, answer.scale, answer.scales)


@singledispatch
def reduced(to: Any, living: Living) -> Reduced:
    """The answer of one kind of reduced prior; this one is for priors that are known by what they have."""
    if isinstance(to, ScaleMixture):
        return _scale_mixture(to, living)
    if hasattr(to, "mean") and hasattr(to, "var"):
        return _gaussian(living.target(to), living)
    if hasattr(to, "log_prob"):
        return _density(to, living)
    raise ReductionError(f"{to!r} is no target of a reduction: it has neither mean and var, nor mixture, nor log_prob")


@reduced.register
def _(to: Gaussian, living: Living) -> Reduced:
    if not isinstance(to.mean, (int, float)):
        raise ReductionError(f"{to!r}: the mean of a reduced prior is a number here; for other points use delta_f itself")
    if to.scale == 0 and to.mean != 0:
        raise ReductionError(f"{to!r}: a pruned weight is zero; for the evidence of another point use delta_f itself")
    if to.scale == "layer":
        raise ReductionError(f"{to!r} has hyper-parameters of its own; reduce to Gaussian(<number>), or to Gaussian() for the scale with the best evidence")
    if to.scale == "empirical":
        return _best_gaussian(to, living)
    return _gaussian(living.target(to), living)


def _gaussian(target: Diagonal, living: Living) -> Reduced:
    """New moments, nothing goes; the point spike: nothing moves, a weight goes by its evidence."""
    if not bool(target.var.any()) and not bool(target.mean.any()):
        return Reduced(0.0, living.spike if living.groups is None else living.spread(living.summed(living.spike)), living.q, living.p)
    gain = delta_f(living.q, living.p, target)
    return Reduced(float(gain.sum(dtype=torch.float64)), torch.full_like(gain, -torch.inf), reduced_posterior(living.q, living.p, target), target)


def _best_gaussian(to: Gaussian, living: Living) -> Reduced:
    """The scale with the best evidence: one for the site, or one for each group, of which a scale of 0 says that the group goes."""
    q, p, mean = living.q, living.p, float(to.mean)  # type: ignore[arg-type]  # a number: `reduced` refuses others
    index = torch.zeros(len(q.mean), dtype=torch.long, device=q.mean.device) if living.groups is None else living.groups
    shift = mean - p.mean
    best = best_var(message(q, p), p.var, index, shift)
    var = best.var[index]
    target = Diagonal(torch.full_like(q.mean, mean), var)
    drop = torch.full_like(q.mean, -torch.inf).masked_fill(var == 0, -torch.inf if living.groups is None or mean != 0 else torch.inf)
    scales = best.var.sqrt()
    return Reduced(
        float(best.delta_f.sum(dtype=torch.float64)),
        drop,
        reduced_posterior(q, p, target),
        target,
        float(scales.median()) if len(scales) else None,
        None if living.groups is None else scales,
    )


@reduced.register
def _(to: SpikeAndSlab, living: Living) -> Reduced:
    """Odds of the spike over the slab, with the inclusion learned from the site, or given."""
    odds, base = _spike_odds(to, to.slab_scale, living)
    drop, gain, zeta = inclusion(to, odds)
    if to.slab_scale is None:
        return Reduced(gain, living.spread(drop), living.q, living.p, zeta)
    slab = living.target(Gaussian(to.slab_scale))
    return Reduced(gain + base, living.spread(drop), reduced_posterior(living.q, living.p, slab), slab, zeta)


def spike_odds(posterior: Posterior, name: str, to: SpikeAndSlab) -> tuple[Tensor, float]:
    """log p(y | spike)/p(y | slab) of each living weight by itself, as a vector, and the gain of a site that is all slab over the prior of the fit, nats."""
    site = posterior[name]
    if site.prior is None:
        raise ReductionError(f"site '{name}': its prior in the fit is not Gaussian; leave it out")
    return _spike_odds(to, to.slab_scale, _living(site, point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask), None))


def _spike_odds(to: SpikeAndSlab, width: float | None, living: Living) -> tuple[Tensor, float]:
    """The same per decision."""
    each, base = living.spike, 0.0
    if to.spike_scale:
        each = delta_f(living.q, living.p, Gaussian(to.spike_scale))
    if width is not None:
        slab = delta_f(living.q, living.p, Gaussian(width))
        each, base = each - slab, float(slab.sum(dtype=torch.float64))
    return living.summed(each), base


def inclusion(to: SpikeAndSlab, odds: Tensor) -> tuple[Tensor, float, float]:
    """(log odds by which each decision is the spike's, gain over all slab, ζ), with π given, or learned from the decisions."""
    if to.inclusion is not None:
        zeta = _logit(to.inclusion)
        return odds - zeta, fixed_inclusion(odds, zeta), zeta
    if len(odds) <= _EXACT_INCLUSION_UP_TO:
        exact = exact_inclusion(odds, to.alpha, to.beta)
        return exact.drop, float(exact.log_evidence_gain), float(exact.log_odds)
    zeta, gain = mean_field_log_odds(odds, to.alpha, to.beta)
    return odds - zeta, gain, zeta


def with_slab(posterior: Posterior, name: str, to: SpikeAndSlab, groups: Tensor | None = None) -> SpikeAndSlab:
    r"""`to` with a number for an "empirical" slab: the width that has, with the inclusion, the best evidence, to 1 %.

    Without groups 8,192 weights at equal distances stand for all. Searched from a seventh of the prior's scale to twice the largest √(μ² + σ²): a weight of
    which the data say at least as much as the prior (L ≥ 1/σ₀²) has |m| ≤ 2|μ|, so that none that is informed asks for more. Of one with σ ≈ σ₀ the message
    m = h/L is noise over nearly nothing, and may be anywhere. A best width at an end of the search is given with a warning.

    `groups`: the group of each entry, in the shape of the site; negative: in none, and so in the slab.
    """
    site = posterior[name]
    if to.slab_scale != "empirical" or site.prior is None or not bool(site.alive.any()):
        return replace(to, slab_scale=None) if to.slab_scale == "empirical" else to
    living = _living(site, point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask), groups)
    if groups is None:
        stride = math.ceil(len(living.spike) / _WEIGHTS_FOR_WIDTH)
        q, p = (Diagonal(g.mean[::stride].double(), g.var[::stride].double()) for g in (living.q, living.p))
        living = Living(site, q, p, living.spike[::stride].double())
    stay = groups is not None and bool((groups[site.alive] < 0).any())  # they are counted as the first group

    def gain(log_scale: Tensor) -> Tensor:
        odds, base = _spike_odds(to, math.exp(float(log_scale)), living)
        odds = odds[int(stay) :]
        over = mean_field_log_odds(odds, to.alpha, to.beta)[1] if to.inclusion is None else fixed_inclusion(odds, _logit(to.inclusion))
        return torch.tensor(base + over, dtype=torch.float64)

    high = math.log(2) + 0.5 * (living.q.mean.square() + living.q.var).max().double().log()
    low = torch.minimum(0.5 * living.p.var.double().mean().log(), high) - 2
    if to.spike_scale:  # a slab is wider than its spike
        low = low.clamp(min=math.log(1.01 * to.spike_scale))
        high = torch.maximum(high, low + 1)
    best = line_maximum(gain, low, high, points=24, tolerance=1e-2)
    width = math.exp(float(best))
    if not float(low) + 0.02 < float(best) < float(high) - 0.02:
        warnings.warn(
            f"site '{name}': the evidence for the width of its slab is best at an end of the search, {width:.3g}, from {math.exp(float(low)):.3g} to "
            f"{math.exp(float(high)):.3g}; the weights do not say how wide it is: give slab_scale a number",
            stacklevel=2,
        )
    return replace(to, slab_scale=width)


def shared_inclusion(posterior: Posterior, to: SpikeAndSlab, names: Iterable[str] | None = None) -> dict[str, SpikeAndSlab]:
    r"""Site → a spike and slab whose inclusion probability π is one for all of them, learned from all their weights together.

    To be given to `reduce` as its `to`. The sites' ΔF are then those at this π; what learning one number costs, some ½ log n nats, is left out.

    Args:
        to: the Beta prior, spike and slab of each site; an "empirical" slab is found for each site by itself first.
        names: default every real site with a Gaussian prior.

    Raises:
        ReductionError: no site can be reduced.

    Example:
        >>> reduce(posterior, to=shared_inclusion(posterior, SpikeAndSlab()))
    """
    chosen = list(names) if names is not None else [name for name in posterior if posterior[name].support == "real" and posterior[name].prior is not None]
    odds, targets = [], {}
    for name in chosen:
        targets[name] = with_slab(posterior, name, to)
        odds.append(spike_odds(posterior, name, targets[name])[0])
    if not odds:
        raise ReductionError("no site to share an inclusion: none is real with a Gaussian prior")
    zeta = mean_field_log_odds(torch.cat(odds), to.alpha, to.beta)[0]
    return {name: replace(target, inclusion=1 / (1 + math.exp(-zeta))) for name, target in targets.items()}


@reduced.register
def _(to: Horseshoe, living: Living) -> Reduced:
    if to.slab_df is not None or to.block != 1 or to.tiers not in (("layer", "weight"), ("weight",), ("layer", "unit"), ("unit",), ("unit", "weight")):
        raise ReductionError(
            f"{to!r}: the quadrature is over one scale, of each weight or unit, with one tau for the layer or each unit, under a slab that is known; "
            "for other tiers fit a reduction_program"
        )
    shared = living.rows if "weight" not in to.tiers else None
    return _scale_mixture(to, living, shared, by_row=to.tiers == ("unit", "weight"))


def _scale_mixture(to: ScaleMixture, living: Living, shared: Tensor | None = None, by_row: bool = False) -> Reduced:
    """A weight goes when κ > ½. The global scale is that of the best evidence where the prior has a `log_hyper`, else its own.

    `shared`: the group of each weight that has one local scale; groups that were asked for come before it. `by_row`: a global scale for each row.
    """
    q, p = living.q, living.p
    if bool((p.mean != 0).any()):
        raise ReductionError(f"a reduction to {type(to).__name__} needs a prior of mean 0 in the fit")
    data = message(q, p)
    groups = shared if living.groups is None else living.groups
    scale, scales, rows = None, None, None
    if hasattr(to, "log_hyper") and len(q.mean):
        rows = living.rows if groups is None and by_row else None
        found = best_scale(data, p.var, to.mixture, to.log_hyper, rows, groups)
        scale, scales = float(found.median()), None if rows is None else found
    if groups is not None:
        result = grouped_reduction(data, p.var, *to.mixture(scale), groups)
    elif scales is not None:
        by_tau = [to.mixture(s) for s in scales.tolist()]
        result = scale_mixture_reduction(data, p.var, [v for v, _ in by_tau], [w for _, w in by_tau], rows)
    else:
        result = scale_mixture_reduction(data, p.var, *to.mixture(scale))
    total = float(result.delta_f.sum(dtype=torch.float64))
    return Reduced(total, result.log_odds, Diagonal(result.mean, result.var), None, scale, scales)  # not Gaussian any more: reduce again from the fit


def _density(to: Any, living: Living) -> Reduced:
    """Any density. If the prior says that it shrinks, a weight goes when κ = 1 − μ̃/m > ½; else nothing goes."""
    q, p = living.q, living.p
    result = density_reduction(q, p, to.log_prob)
    drop = torch.full_like(q.mean, -torch.inf)
    if getattr(to, "shrinkage", False):
        data = message(q, p)
        kappa = (1 - (result.mean - p.mean) * data.precision / data.h).clamp(0, 1).masked_fill(data.precision <= 0, 1.0)
        drop = torch.logit(kappa)
        drop = living.spread(living.summed(drop)) if living.groups is not None else drop
    return Reduced(float(result.delta_f.sum(dtype=torch.float64)), drop, Diagonal(result.mean, result.var), None)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


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


def _not_a_point(site: Site) -> None:
    if site.mean.numel():
        smallest = site.var.min() if site.mask is None else site.var.where(site.mask, torch.inf).min()
        if float(smallest) == 0:
            raise ReductionError("its posterior is a point estimate (variance 0) and says nothing of other priors; fit it with MeanField")


def _living(site: Site, spike: Tensor, groups: Tensor | None) -> Living:
    assert site.prior is not None
    p = Diagonal(*(_column(t.to(site.mean), site) for t in (site.prior.mean, site.prior.var)))
    index = None if groups is None else numbered(_column(groups, site))
    return Living(site, Diagonal(_column(site.mean, site), _column(site.var, site)), p, _column(spike, site), index)


def _column(t: Tensor, site: Site) -> Tensor:
    """The living entries of `t`, which broadcasts to the site, as a vector: a view where everything lives or `t` is one number."""
    if t.numel() == 1:
        return t.reshape(()).expand(site.mean.numel() if site.mask is None else int(site.mask.sum()))
    return t.expand(site.mean.shape).reshape(-1) if site.mask is None else t.expand(site.mean.shape)[site.mask]


def _number(t: Tensor) -> Tensor:
    """A number that was expanded, as a number again."""
    return t.as_strided((), ()) if t.numel() and t.stride() == (0,) else t


def numbered(groups: Tensor) -> Tensor:
    """The same partition with its groups counted from 0."""
    return torch.unique(groups, return_inverse=True)[1]
