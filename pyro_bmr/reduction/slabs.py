"""A site under a spike and slab: which slab, how probable, and one inclusion probability for
several sites.

Owns `spike_and_slab`, the rule of `SpikeAndSlab`, `with_slab`, `spike_odds`, `inclusion` and
`shared_inclusion`. What follows from the ΔF of the decisions is in `spike_and_slab.py`. Next:
`rules.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_bmr.errors import PyroBMRWarning, ReductionError
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import delta_f, point_spike_delta_f, reduced_posterior
from pyro_bmr.formulas.line_search import line_maximum
from pyro_bmr.formulas.mean_field_inclusion import fixed_inclusion, mean_field_log_odds
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.priors import Gaussian, SpikeAndSlab
from pyro_bmr.reduction.entries import KeptEntries, Reduced, kept_entries

_WEIGHTS_FOR_WIDTH = 8192
# decisions; above it the mean-field update and the integral give the same
_EXACT_INCLUSION_UP_TO = 4096


def spike_and_slab(to: SpikeAndSlab, entries: KeptEntries) -> Reduced:
    """Odds of the spike over the slab, with the inclusion learned from the site, or given."""
    odds, base = _spike_odds(to, entries)
    drop, gain, zeta = inclusion(to, odds)
    if to.slab_scale is None:
        return Reduced(gain, entries.spread(drop), entries.q, entries.p, zeta)
    slab = entries.target(Gaussian(to.slab_scale))
    return Reduced(
        gain + base, entries.spread(drop), reduced_posterior(entries.q, entries.p, slab), slab, zeta
    )


def spike_odds(posterior: Posterior, name: str, to: SpikeAndSlab) -> tuple[Tensor, float]:
    """log p(y | spike)/p(y | slab) of each kept weight by itself, as a vector, and the gain of a
    site that is all slab over the prior of the fit, nats.
    """
    site = posterior[name]
    if site.prior is None:
        raise ReductionError(f"site '{name}': its prior in the fit is not Gaussian; leave it out")
    return _spike_odds(
        to,
        kept_entries(
            site, point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask), None
        ),
    )


def _spike_odds(
    to: SpikeAndSlab, entries: KeptEntries, width: float | None = None
) -> tuple[Tensor, float]:
    """The same per decision; `width` in the place of the slab's own, which is a number or None
    here.
    """
    slab_scale = to.slab_scale if width is None else width
    each, base = entries.spike, 0.0
    if to.spike_scale:
        each = delta_f(entries.q, entries.p, Gaussian(to.spike_scale))
    if slab_scale is not None:
        slab = delta_f(entries.q, entries.p, Gaussian(slab_scale))
        each, base = each - slab, float(slab.sum(dtype=torch.float64))
    return entries.summed(each), base


def inclusion(to: SpikeAndSlab, odds: Tensor) -> tuple[Tensor, float, float]:
    """(log odds by which each decision is the spike's, gain over all slab, ζ), with π given, or
    learned from the decisions.
    """
    if to.inclusion is not None:
        zeta = _logit(to.inclusion)
        return odds - zeta, fixed_inclusion(odds, zeta), zeta
    if len(odds) <= _EXACT_INCLUSION_UP_TO:
        exact = exact_inclusion(odds, to.alpha, to.beta)
        return exact.drop_log_odds, float(exact.log_evidence_gain), float(exact.log_odds)
    zeta, gain = mean_field_log_odds(odds, to.alpha, to.beta)
    return odds - zeta, gain, zeta


def with_slab(
    posterior: Posterior, name: str, to: SpikeAndSlab, groups: Tensor | None = None
) -> SpikeAndSlab:
    r"""`to` with a number for an "empirical" slab: the width that has, with the inclusion, the best
    evidence, to 1 %.

    Without groups 8,192 weights at equal distances stand for all. Searched from a seventh of the
    prior's scale to twice the largest √(μ² + σ²): a weight of which the data say at least as much
    as the prior (L ≥ 1/σ₀²) has |m| ≤ 2|μ|, so that none that is informed asks for more. Of one
    with σ ≈ σ₀ the message m = h/L is noise over nearly nothing, and may be anywhere. A best width
    at an end of the search is given with a warning.

    `groups`: the group of each entry, in the shape of the site; negative: in none, and so in the
    slab.
    """
    site = posterior[name]
    if to.slab_scale != "empirical" or site.prior is None or not bool(site.kept.any()):
        return replace(to, slab_scale=None) if to.slab_scale == "empirical" else to
    entries = kept_entries(
        site, point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask), groups
    )
    if groups is None:
        entries = _sampled(entries)
    # they are counted as the first group
    unpruned = groups is not None and bool((groups[site.kept] < 0).any())

    def gain(log_scale: Tensor) -> Tensor:
        odds, base = _spike_odds(to, entries, math.exp(float(log_scale)))
        odds = odds[int(unpruned) :]
        over = (
            mean_field_log_odds(odds, to.alpha, to.beta)[1]
            if to.inclusion is None
            else fixed_inclusion(odds, _logit(to.inclusion))
        )
        return torch.tensor(base + over, dtype=torch.float64)

    high = math.log(2) + 0.5 * (entries.q.mean.square() + entries.q.var).max().double().log()
    low = torch.minimum(0.5 * entries.p.var.double().mean().log(), high) - 2
    if to.spike_scale:  # a slab is wider than its spike
        low = low.clamp(min=math.log(1.01 * to.spike_scale))
        high = torch.maximum(high, low + 1)
    best = line_maximum(gain, low, high, points=24, tolerance=1e-2)
    width = math.exp(float(best))
    if not float(low) + 0.02 < float(best) < float(high) - 0.02:
        warnings.warn(
            f"site '{name}': the evidence for the width of its slab is best at an end of the"
            f" search, {width:.3g}, from {math.exp(float(low)):.3g} to {math.exp(float(high)):.3g};"
            " the weights do not say how wide it is: give slab_scale a number",
            PyroBMRWarning,
            stacklevel=2,
        )
    return replace(to, slab_scale=width)


def _sampled(entries: KeptEntries) -> KeptEntries:
    """`_WEIGHTS_FOR_WIDTH` of them at equal distances, in float64."""
    stride = math.ceil(len(entries.spike) / _WEIGHTS_FOR_WIDTH)
    q, p = (
        Diagonal(g.mean[::stride].double(), g.var[::stride].double())
        for g in (entries.q, entries.p)
    )
    return KeptEntries(entries.site, q, p, entries.spike[::stride].double())


def shared_inclusion(
    posterior: Posterior, to: SpikeAndSlab, names: Iterable[str] | None = None
) -> dict[str, SpikeAndSlab]:
    r"""Site → a spike and slab whose inclusion probability π is one for all of them, learned from
    all their weights together.

    To be given to `reduce` as its `to`. The sites' ΔF are then those at this π; what learning one
    number costs, some ½ log n nats, is left out.

    Args:
        to: the Beta prior, spike and slab of each site; an "empirical" slab is found for each site
            by itself first.
        names: default every real site with a Gaussian prior.

    Raises:
        ReductionError: no site can be reduced, or the inclusion is nearer to 0 or 1 than a number
            can say.

    Example:
        >>> reduce(posterior, to=shared_inclusion(posterior, SpikeAndSlab()))
    """
    chosen = (
        list(names)
        if names is not None
        else [
            name
            for name in posterior
            if posterior[name].support == "real" and posterior[name].prior is not None
        ]
    )
    odds, targets = [], {}
    for name in chosen:
        targets[name] = with_slab(posterior, name, to)
        odds.append(spike_odds(posterior, name, targets[name])[0])
    if not odds:
        raise ReductionError("no site to share an inclusion: none is real with a Gaussian prior")
    zeta = mean_field_log_odds(torch.cat(odds), to.alpha, to.beta)[0]
    pi = float(torch.sigmoid(torch.tensor(zeta, dtype=torch.float64)))
    if not 0 < pi < 1 or abs(_logit(pi) - zeta) > 1e-6 * (1 + abs(zeta)):
        raise ReductionError(
            f"the shared inclusion has log odds of {zeta:.6g}, {pi:.3g} to the last digit of a"
            " number; give the sites alpha and beta that are nearer to 1, or reduce them one"
            " by one"
        )
    return {name: replace(target, inclusion=pi) for name, target in targets.items()}


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
