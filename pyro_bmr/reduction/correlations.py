"""Sites whose posterior has correlations: their living part as a structure of the formula files,
and the site after entries of it are pruned.

Owns `correlated`, `pruned_site`, `spike_gain` and `rescaled_site`. Next: `result.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.formulas.conditioning import embedded
from pyro_bmr.formulas.gaussian import (
    Dense,
    Diagonal,
    delta_f,
    prune_subset,
    reduced_posterior,
    total,
)
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_normal import MatrixNormal, reduced_mean, reduced_var
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.search import marginal_var


@dataclass(frozen=True)
class Correlated:
    """The living part of a site with correlations.

    `structure`, `prior`: what the formula files take. `labels`: the group of each of its units,
    which are the entries of `Dense` and `LowRank` and the rows, or columns (`turned`), of a
    `MatrixNormal`. `units`: for each entry of the site the number of its unit, −1 for the dead.
    """

    structure: Any
    prior: Any
    labels: Tensor
    units: Tensor
    turned: bool = False


def correlated(site: Site, labels: Tensor | None = None) -> Correlated | None:
    """The correlations of `site` in a form in which groups can be set to zero; None if it has none,
    or if `labels` cut through the rows and the columns of a matrix normal (single entries of one
    have no rest in closed form: they count by their marginals).

    Args:
        labels: the group of each entry, in the shape of the site; by default each entry is its own.
    """
    if site.joint is None or site.prior is None:
        return None
    alive = site.alive
    p = Diagonal(
        *(t.to(site.mean).expand(site.mean.shape) for t in (site.prior.mean, site.prior.var))
    )
    if isinstance(site.joint, MatrixNormal):
        return _matrix_normal(site, site.joint, p, labels)
    flat = alive.flatten()
    units = torch.where(flat, flat.cumsum(0) - 1, -1).view(alive.shape)
    own = units.flatten()[flat] if labels is None else labels.to(alive.device).flatten()[flat]
    return Correlated(
        _living(site.joint, site.mean.flatten(), flat),
        Diagonal(p.mean.flatten()[flat], p.var.flatten()[flat]),
        own,
        units,
    )


def _living(joint: Dense | LowRank, mean: Tensor, alive: Tensor) -> Dense | LowRank:
    if isinstance(joint, Dense):
        return Dense(mean[alive], joint.cov[alive][:, alive])
    return LowRank(mean[alive], joint.var[alive], joint.factor[alive])


def _matrix_normal(
    site: Site, joint: MatrixNormal, p: Diagonal, labels: Tensor | None
) -> Correlated | None:
    alive, mean, prior_mean, prior_var = (
        t.flatten(1) if t.ndim > 1 else t[:, None] for t in (site.alive, site.mean, p.mean, p.var)
    )
    rows, columns = alive.any(1), alive.any(0)
    if labels is None or not torch.equal(alive, rows[:, None] & columns):
        return None
    inner = labels.to(alive.device).reshape(alive.shape)[rows][:, columns]
    by_row = bool((inner == inner[:, :1]).all())
    if not by_row and not bool((inner == inner[:1]).all()):
        return None
    structure = MatrixNormal(
        mean[rows][:, columns], joint.row_cov[rows][:, rows], joint.col_cov[columns][:, columns]
    )
    prior = Diagonal(prior_mean[rows][:, columns], prior_var[rows][:, columns])
    number = (rows.cumsum(0) - 1)[:, None] if by_row else columns.cumsum(0) - 1
    units = torch.where(alive, number.expand(alive.shape), -1).view(site.mean.shape)
    if by_row:
        return Correlated(structure, prior, inner[:, 0], units)
    return Correlated(
        _transposed(structure), Diagonal(prior.mean.mT, prior.var.mT), inner[0], units, turned=True
    )


def pruned_site(site: Site, mask: Tensor) -> tuple[Site, float | None]:
    """The site with only the entries of `mask` alive, the rest of a correlated posterior
    conditioned on the zeros; and the ΔF of that.

    ΔF is None where it is the sum of the marginals'. The irregular remainder of a matrix normal
    keeps its marginals and loses its correlations.
    """
    bare = replace(site, mean=site.mean.where(mask, 0), var=site.var.where(mask, 0), mask=mask)
    if site.joint is None:
        return bare, None
    went = site.alive & ~mask
    if not bool(went.any()):
        return replace(bare, joint=site.joint), 0.0
    own = correlated(site, went.long() if isinstance(site.joint, MatrixNormal) else None)
    if own is None:
        return replace(bare, joint=None), None
    pruned = torch.zeros(len(own.labels), dtype=torch.bool, device=mask.device)
    pruned[own.units[went]] = True
    gain, rest = prune_subset(own.structure, own.prior, pruned)
    joint = _put_back(site, own, rest, ~pruned)
    mean, var = (t.reshape(site.mean.shape) for t in (joint.mean, marginal_var(joint)))
    return replace(site, mean=mean, var=var, mask=mask, joint=joint), float(gain)


def _put_back(site: Site, own: Correlated, rest: Any, living: Tensor) -> Any:
    """The structure of the whole site again: what is dead has mean, variance and covariances 0."""
    rest = embedded(rest, living)
    if not isinstance(rest, MatrixNormal):
        return embedded(rest, site.alive.flatten())
    alive = site.alive.flatten(1) if site.alive.ndim > 1 else site.alive[:, None]
    rest = _transposed(rest) if own.turned else rest
    return _transposed(embedded(_transposed(embedded(rest, alive.any(1))), alive.any(0)))


def _transposed(g: MatrixNormal) -> MatrixNormal:
    return MatrixNormal(g.mean.mT, g.col_cov, g.row_cov)


def spike_gain(site: Site, mask: Tensor, spike: Tensor) -> float:
    """ΔF of setting the living entries of `site` outside of `mask` to zero, nats: joint where it
    has correlations, else the sum of `spike`, that of each.
    """
    gain = pruned_site(site, mask)[1]
    return total(spike[site.alive & ~mask]) if gain is None else gain


def rescaled_site(site: Site, reduced_prior: Diagonal) -> tuple[Site, float] | None:
    """A correlated site under another Gaussian prior, and ΔF; None for a matrix normal whose prior
    has no common variance.

    Of a matrix normal only the marginals are left, since its reduced posterior is none.
    """
    together = torch.zeros_like(site.mean, dtype=torch.long)
    own, new = correlated(site, together), correlated(replace(site, prior=reduced_prior), together)
    if own is None or new is None:
        return None
    structure, prior, target = own.structure, own.prior, new.prior
    gaussians: list[Any] = [prior, target]
    if isinstance(structure, Dense):
        gaussians = [Dense(g.mean, torch.diag(g.var)) for g in (prior, target)]
    elif isinstance(structure, MatrixNormal):
        if bool((prior.var != prior.var.flatten()[0]).any()) or bool(
            (target.var != target.var.flatten()[0]).any()
        ):
            return None
        gaussians = [Diagonal(g.mean, g.var.flatten()[0]) for g in (prior, target)]
    gain = float(delta_f(structure, *gaussians))
    declared = replace(site, prior=reduced_prior)
    if isinstance(structure, MatrixNormal):
        mean, var = (
            moment(structure, *gaussians).flatten() for moment in (reduced_mean, reduced_var)
        )
        alive = site.alive
        return (
            replace(
                declared,
                mean=site.mean.masked_scatter(alive, mean),
                var=site.var.masked_scatter(alive, var),
                joint=None,
            ),
            gain,
        )
    joint = embedded(reduced_posterior(structure, *gaussians), site.alive.flatten())
    return (
        replace(
            declared,
            mean=joint.mean.view(site.mean.shape),
            var=marginal_var(joint).view(site.mean.shape),
            joint=joint,
        ),
        gain,
    )
