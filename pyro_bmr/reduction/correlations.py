"""Sites whose posterior has correlations: their kept part as a structure of the formula files, and
the site after entries of it are pruned.

Owns `correlated`, `pruned_site`, `spike_gain`, `spike_gains`, `gain_of_both` and `rescaled_site`.
Next: `cautions.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import prune_subset, rescaled, total
from pyro_bmr.formulas.held_evidence import Bounds
from pyro_bmr.formulas.held_matrix_normal import HeldMatrixNormal, held_gain
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.formulas.structure import Correlated, Structure
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.reduced_site import SiteReduction


def correlated(site: Site, labels: Tensor | None = None) -> Correlated | None:
    """The correlations of `site` in a form in which groups can be set to zero one by one; None if
    it has none, or if `labels` cut through the rows and the columns of a matrix normal. Single
    entries of one are chosen by their marginals; `pruned_site` then conditions on all of them.

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


def pruned_site(site: Site, mask: Tensor) -> tuple[Site, Bounds | None]:
    """The site with only the entries of `mask` kept, the rest of a correlated posterior conditioned
    on the zeros; and the ΔF of that, between two bounds.

    They are equal but for single entries of a matrix normal. ΔF is None where it is the sum of the
    marginals' ΔF, and where the prior is not Gaussian.
    """
    pruned = site.kept & ~mask
    if site.joint is None or not bool(pruned.any()):
        mean, var = site.mean.where(mask, 0), site.var.where(mask, 0)
        gain = None if site.joint is None else Bounds(0.0, 0.0)
        return replace(site, mean=mean, var=var, mask=mask), gain
    # the rest does not depend on the prior
    prior = site.prior or Diagonal(torch.zeros_like(site.mean), torch.ones_like(site.mean))
    own = correlated(replace(site, prior=prior), pruned.byte())
    if own is None:
        first = _held(site)
        held = first.holding(pruned.reshape(first.mean.shape))
        joint: Structure = held
        gain = held_gain(first, held, _matrix(prior, site.mean))
    else:
        units = torch.zeros(len(own.labels), dtype=torch.bool, device=mask.device)
        units[own.units[pruned]] = True
        exact, rest = prune_subset(own.structure, own.prior, units)
        joint = rest.embedded(~units).whole(site.kept, own.turned)
        gain = Bounds(float(exact), float(exact))
    mean, var = (t.reshape(site.mean.shape) for t in (joint.mean, joint.marginal_var))
    after = replace(site, mean=mean, var=var, mask=mask, joint=joint)
    return after, None if site.prior is None else gain


def _joint_gain(before: Site, after: Site) -> Bounds | None:
    """ΔF of all that `after` holds at zero beyond `before`, if it is a matrix normal with entries
    held at zero; else None.
    """
    if before.prior is None or not isinstance(after.joint, HeldMatrixNormal):
        return None
    first = _held(before)
    return held_gain(first, after.joint, _matrix(before.prior, before.mean))


def gain_of_both(before: Site, first: SiteReduction, second: SiteReduction) -> SiteReduction:
    """The second result with the gain of both, from the site before the first."""
    lower, upper = first.delta_f + second.delta_f, None
    if first.upper is not None or second.upper is not None:
        upper = lower + sum(r.upper - r.delta_f for r in (first, second) if r.upper is not None)
        # all that is held at once, if both are of the point spike
        whole = (
            _joint_gain(before, second.site) if None not in (first.upper, second.upper) else None
        )
        if whole is not None:
            lower, upper = max(lower, whole.lower), min(upper, whole.upper)
    return replace(second, delta_f=lower, upper=upper, terms=first.terms + second.terms)


def _held(site: Site) -> HeldMatrixNormal:
    """The matrix normal of a site in the form that holds single entries."""
    joint = site.joint
    if isinstance(joint, HeldMatrixNormal):
        return joint
    assert isinstance(joint, MatrixNormal)  # the others condition on any entry
    mean = site.mean.reshape(joint.mean.shape)
    return HeldMatrixNormal.of(mean, joint.row_cov, joint.col_cov)


def _matrix(prior: Diagonal, like: Tensor) -> Diagonal:
    """A site's prior over its first dimension and the others."""
    parts = (t.to(like).expand(like.shape) for t in (prior.mean, prior.var))
    return Diagonal(*(t.flatten(1) if t.ndim > 1 else t[:, None] for t in parts))


def spike_gain(site: Site, mask: Tensor, spike: Tensor) -> float:
    """ΔF of setting the kept entries of `site` outside of `mask` to zero, nats: joint where it has
    correlations (the lower bound), else the sum over the entries of their ΔF, `spike`.
    """
    return next(spike_gains(site, [mask], spike))


def spike_gains(site: Site, masks: Iterable[Tensor], spike: Tensor) -> Iterator[float]:
    """The same for each of several masks, of which each is a part of the one before."""
    last = site
    for mask in masks:
        gain = None
        if site.joint is not None:
            after, gain = pruned_site(last, mask)
            if last is not site:
                gain = _joint_gain(site, after)
            if isinstance(after.joint, HeldMatrixNormal):  # goes on from its multipliers
                last = after
        yield total(spike, site.kept & ~mask) if gain is None else gain.lower


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
