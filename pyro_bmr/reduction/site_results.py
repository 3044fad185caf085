"""What each site says of its reduced prior, and what is left of it under the masks.

Owns `site_results` and `pruned_result`, between the answer of one site (`reduced_site.py`) and the
decision over all (`decisions.py`). Next: `reduce.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.gaussian import total
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import Gaussian, Prior, SpikeAndSlab
from pyro_bmr.reduction.correlations import pruned_site, rescaled_site
from pyro_bmr.reduction.label_sums import labels_in_use, moved
from pyro_bmr.reduction.reduced_site import SiteReduction, site_reduction
from pyro_bmr.reduction.rules import is_point_spike
from pyro_bmr.reduction.slabs import with_slab


def site_results(
    posterior: Posterior, targets: dict[str, Prior | None], labels: Mapping[str, Tensor] | None
) -> dict[str, SiteReduction]:
    """What each site says by itself; `targets` get the width of an empirical slab of groups."""
    results: dict[str, SiteReduction] = {}
    for name, prior in list(targets.items()):
        try:
            if isinstance(prior, SpikeAndSlab) and labels is not None:
                targets[name] = prior = with_slab(
                    posterior, name, prior, moved(labels[name], posterior[name].mean.device)
                )
                # that of single weights is not used; that of groups is found over all sites
                prior = replace(prior, inclusion=0.5)
            results[name] = _rescaled(
                posterior[name], prior, site_reduction(posterior, name, prior)
            )
        except ReductionError as error:
            raise ReductionError(f"site '{name}': {error}") from None
    return results


def pruned_result(
    result: SiteReduction, mask: Tensor, to: Prior | None, labels: Tensor | None
) -> SiteReduction:
    """The result with only the entries of `mask` kept, its ΔF, and how many terms that sums."""
    site, gain = pruned_site(result.site, mask)
    gained, terms, upper = result.delta_f, result.terms, None
    if is_point_spike(to):
        pruned = result.site.kept & ~mask
        terms = int(pruned.count_nonzero())
        if gain is None:
            gained = total(result.spike_delta_f, pruned)
        else:
            gained, terms = gain.lower, int(terms > 0)
            upper = gain.upper if gain.upper > gain.lower else None
    # one indicator for each group
    elif isinstance(to, SpikeAndSlab) and labels is not None:
        own = moved(labels, result.site.mean.device)
        terms = len(labels_in_use(own, result.site.mask))
    return replace(result, delta_f=gained, site=site, terms=terms, upper=upper)


def _rescaled(site: Site, to: Prior | None, result: SiteReduction) -> SiteReduction:
    """With correlations, under a Gaussian of another scale: the exact answer in the place of that
    of the marginals. Other continuous priors leave marginals.
    """
    if site.joint is None or result.site.prior is site.prior:
        return replace(result, terms=0 if to is None else result.site.kept_count)
    exact = (
        rescaled_site(site, result.site.prior)
        if isinstance(to, Gaussian) and result.site.prior is not None
        else None
    )
    if exact is None:
        return replace(result, site=replace(result.site, joint=None), terms=site.kept_count)
    return replace(result, site=exact[0], delta_f=exact[1], terms=1)
