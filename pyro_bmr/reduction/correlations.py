"""Sites whose posterior has correlations: their kept part as a structure of the formula files, and
the site after entries of it are pruned.

Owns `correlated`, `pruned_site`, `spike_gain` and `rescaled_site`. Next: `result.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import prune_subset, rescaled, total
from pyro_bmr.formulas.structure import Correlated, Structure
from pyro_bmr.posteriors.site import Site


def correlated(site: Site, labels: Tensor | None = None) -> Correlated | None:
    """The correlations of `site` in a form in which groups can be set to zero; None if it has none,
    or if `labels` cut through the rows and the columns of a matrix normal. Single entries of one
    have no rest in closed form: they count by their marginals.

    Args:
        labels: the group of each entry, in the shape of the site; by default each entry is its own.
    """
    if site.joint is None:
        return None
    return _units(site, site.joint, labels)


def independent(site: Site, labels: Tensor | None = None) -> Correlated | None:
    """As `correlated`, by the marginals."""
    return _units(site, Diagonal(site.mean, site.var), labels)


def _units(site: Site, structure: Any, labels: Tensor | None) -> Correlated | None:
    if site.prior is None:
        return None
    kept = site.kept
    prior = Diagonal(
        *(t.to(site.mean).expand(kept.shape) for t in (site.prior.mean, site.prior.var))
    )
    own = replace(structure, mean=site.mean.reshape(structure.mean.shape))
    return own.correlated(prior, kept, labels)


def pruned_site(site: Site, mask: Tensor) -> tuple[Site, float | None]:
    """The site with only the entries of `mask` kept, the rest of a correlated posterior conditioned
    on the zeros; and the ΔF of that.

    ΔF is None where it is the sum of the marginals' ΔF. The irregular remainder of a matrix normal
    keeps its marginals and loses its correlations.
    """
    bare = replace(site, mean=site.mean.where(mask, 0), var=site.var.where(mask, 0), mask=mask)
    if site.joint is None:
        return bare, None
    pruned = site.kept & ~mask
    if not bool(pruned.any()):
        return replace(bare, joint=site.joint), 0.0
    own = correlated(site, pruned.long())
    if own is None:
        return replace(bare, joint=None), None
    units = torch.zeros(len(own.labels), dtype=torch.bool, device=mask.device)
    units[own.units[pruned]] = True
    gain, rest = prune_subset(own.structure, own.prior, units)
    joint: Structure = rest.embedded(~units).whole(site.kept, own.turned)
    mean, var = (t.reshape(site.mean.shape) for t in (joint.mean, joint.marginal_var))
    return replace(site, mean=mean, var=var, mask=mask, joint=joint), float(gain)


def spike_gain(site: Site, mask: Tensor, spike: Tensor) -> float:
    """ΔF of setting the kept entries of `site` outside of `mask` to zero, nats: joint where it has
    correlations, else the sum over the entries of their ΔF, `spike`.
    """
    gain = None if site.joint is None else pruned_site(site, mask)[1]
    return total(spike[site.kept & ~mask]) if gain is None else gain


def rescaled_site(site: Site, reduced_prior: Diagonal) -> tuple[Site, float] | None:
    """A correlated site under another Gaussian prior, and ΔF; None for a matrix normal whose prior
    has no common variance.

    A matrix normal loses its correlations, since its reduced posterior is no matrix normal.
    """
    together = torch.zeros_like(site.mean, dtype=torch.long)
    own, new = correlated(site, together), correlated(replace(site, prior=reduced_prior), together)
    if own is None or new is None:
        return None
    found = rescaled(own.structure, own.prior, new.prior)
    if found is None:
        return None
    kept = site.kept
    mean, var = (
        t.masked_scatter(kept, part.flatten())
        for t, part in ((site.mean, found.mean), (site.var, found.var))
    )
    joint = found.structure and found.structure.whole(kept, own.turned)
    after = replace(site, prior=reduced_prior, mean=mean, var=var, joint=joint)
    return after, found.delta_f
