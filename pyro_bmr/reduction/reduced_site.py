"""One site of a posterior under a reduced prior: evidence, moments, and the log odds of pruning
each weight.

Owns `SiteReduction` and `site_reduction`. What each kind of reduced prior answers is in `rules.py`;
the decision over all sites is in `decisions.py`. Next: `visited_models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError, described
from pyro_bmr.formulas.diagonal import Diagonal, number
from pyro_bmr.formulas.gaussian import point_spike_delta_f
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import Prior, SpikeAndSlab
from pyro_bmr.reduction.entries import KeptEntries, Reduced, kept_entries
from pyro_bmr.reduction.rules import is_point_spike, reduced
from pyro_bmr.reduction.slabs import with_slab


@dataclass(frozen=True)
class SiteReduction:
    """What a reduction says of one site.

    `delta_f`: gain in log evidence of the whole site, nats, for the reduced prior over the prior of
    the fit. `spike_delta_f`: the gain of setting each weight to zero, entry by entry.
    `drop_log_odds`: the log odds of pruning each weight, positive where it is pruned. `site`: the
    reduced posterior, with its mask. `wider`: how many kept weights have a posterior wider than
    their prior, about which the data said nothing. `terms`: how many independent terms `delta_f` is
    the sum of; a joint evidence is one. `scale`: what the reduction found out about the prior (τ of
    a horseshoe, inclusion log odds ζ of a spike and slab, s of a Gaussian), or None; the median
    where it differs between groups. `scales`: then the value of each group. `upper`: where single
    entries of a matrix normal are held at zero, ΔF is known between two bounds, of which `delta_f`
    is the lower and this the upper; else None.
    """

    delta_f: float
    spike_delta_f: Tensor
    drop_log_odds: Tensor
    site: Site
    wider: int
    scale: float | None = None
    scales: Tensor | None = None
    terms: int = 0
    upper: float | None = None

    __repr__ = described

    @property
    def inclusion(self) -> Tensor:
        """The probability of keeping each weight, σ(−drop_log_odds): of being in the slab for a
        spike and slab, 1 − κ for a scale mixture.
        """
        return torch.sigmoid(-self.drop_log_odds)


def site_reduction(
    posterior: Posterior, name: str, to: Prior | None, groups: Tensor | None = None
) -> SiteReduction:
    """Everything but the mask: `drop_log_odds` and the reduced moments of all kept entries, and for
    continuous targets ΔF. `decide` in `decisions.py` makes the
    mask from it.

    `groups`: an integer tensor of the site's shape; entries of one number share one decision, and
    where the prior has a scale or an indicator per weight they share that. None: each weight by
    itself.

    Raises:
        ReductionError: the site is a point estimate, its prior in the fit is not Gaussian, `to` is
            no target, or `groups` does not fit.
    """
    site = posterior[name]
    _check_site(site, groups)
    if to is None:
        return _own_decision(posterior, name)
    if site.prior is None:
        raise ReductionError(
            f"expected a Gaussian prior in the fit, got {described(site.declared)}; reduce a"
            " posterior fitted under Gaussian(), or pass to=None for its own decision"
        )
    if isinstance(to, SpikeAndSlab):
        to = with_slab(posterior, name, to, groups)
    wider = int(torch.count_nonzero(site.var > site.prior.var))
    spike = point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask)
    if groups is None and is_point_spike(to):  # no moment changes
        drop_log_odds = spike if site.mask is None else spike.masked_fill(~site.mask, torch.inf)
        return SiteReduction(0.0, spike, drop_log_odds, site, wider)
    entries = kept_entries(site, spike, groups)
    answer = reduced(to, entries)
    after = _with_moments(site, answer, entries)
    drop_log_odds = _put_back(answer.drop_log_odds, site, torch.inf)
    return SiteReduction(
        answer.delta_f, spike, drop_log_odds, after, wider, answer.scale, answer.scales
    )


def _with_moments(site: Site, answer: Reduced, entries: KeptEntries) -> Site:
    """The site with the moments and the prior of the answer; correlations only if they are still
    true.
    """
    prior = site.prior if answer.prior is entries.p else None
    if answer.prior is not None and answer.prior is not entries.p:
        prior = Diagonal(
            *(
                t if t.ndim == 0 else _put_back(t, site, 1.0)
                for t in map(number, _in_dtype(answer.prior, site.mean.dtype))
            )
        )
    if answer.moments is entries.q:
        return replace(site, prior=prior)
    mean = _put_back(answer.moments.mean, site, site.mean)
    var = _put_back(answer.moments.var, site, site.var)
    return replace(site, mean=mean, var=var, prior=prior, joint=None, message=None)


def _put_back(part: Tensor, site: Site, elsewhere: Tensor | float) -> Tensor:
    """The values of the kept entries in the site's shape, `elsewhere` at the pruned ones."""
    if site.mask is None:
        return part.view(site.mean.shape)
    rest = torch.full_like(site.mean, elsewhere) if isinstance(elsewhere, float) else elsewhere
    return rest.masked_scatter(site.kept, part)


def _own_decision(posterior: Posterior, name: str) -> SiteReduction:
    site = posterior[name]
    drop_log_odds = torch.full_like(site.mean, -torch.inf)
    decide = getattr(site.declared, "drop", None)
    if decide is not None:
        drop_log_odds = decide(name, site.mean, site.var, posterior.sites)
    spike = torch.full_like(drop_log_odds, torch.nan)
    if site.prior is not None:
        spike = point_spike_delta_f(Diagonal(site.mean, site.var), site.prior, site.mask)
    drop_log_odds = drop_log_odds.masked_fill(~site.kept, torch.inf)
    return SiteReduction(0.0, spike, drop_log_odds, site, 0)


def _check_site(site: Site, groups: Tensor | None) -> None:
    """ReductionError for a point estimate, or groups that do not fit."""
    if site.mean.numel():
        smallest = (
            site.var.min() if site.mask is None else site.var.where(site.mask, torch.inf).min()
        )
        if float(smallest) == 0:
            raise ReductionError(
                "its posterior is a point estimate (variance 0) and says nothing of other priors;"
                " fit it with MeanField"
            )
    if groups is not None and (
        groups.shape != site.mean.shape or groups.is_floating_point() or groups.dtype == torch.bool
    ):
        raise ReductionError(
            f"groups: expected an integer tensor of the site's shape {tuple(site.mean.shape)}, got"
            f" {groups.dtype} of shape {tuple(groups.shape)}"
        )


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
