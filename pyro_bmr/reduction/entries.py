"""The kept entries of a site as vectors, which is what a rule of a reduced prior works on, and
what it answers.

Owns `KeptEntries`, `Reduced` and `kept_entries`. Next: `slabs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.formulas.diagonal import Diagonal, moments
from pyro_bmr.posteriors.site import Site


@dataclass(frozen=True)
class KeptEntries:
    """The kept entries of a site as vectors: posterior `q` and prior `p` of the fit, the point
    spike's ΔF of each, and the group of each.

    `groups`: an integer from 0 for each; None where each weight decides for itself.
    """

    site: Site
    q: Diagonal
    p: Diagonal
    spike: Tensor
    groups: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The output unit of each entry, counted over those with a kept entry."""
        shape = self.site.mean.shape
        units = torch.arange(shape[0] if shape else 1, device=self.site.mean.device)
        return numbered(_column(units.view(-1, *[1] * (len(shape) - 1)), self.site))

    def target(self, gaussian: Any) -> Diagonal:
        """A Gaussian of the site's shape, or of one that broadcasts to it, at the kept
        entries.
        """
        full = moments(gaussian, self.site.mean)
        return Diagonal(_column(full.mean, self.site), _column(full.var, self.site))

    def summed(self, each: Tensor) -> Tensor:
        """One number per decision: the sum over its entries."""
        if self.groups is None:
            return each
        return each.new_zeros(int(self.groups.max()) + 1 if len(each) else 0).index_add_(
            0, self.groups, each
        )

    def spread(self, decisions: Tensor) -> Tensor:
        """The decision of each entry."""
        return decisions if self.groups is None else decisions[self.groups]


@dataclass(frozen=True)
class Reduced:
    """What a rule answers: ΔF of the site, log odds of pruning each kept entry, their moments
    and their prior from now on.
    """

    delta_f: float
    drop_log_odds: Tensor
    moments: Diagonal
    prior: Diagonal | None
    scale: float | None = None
    scales: Tensor | None = None


def kept_entries(site: Site, spike: Tensor, groups: Tensor | None = None) -> KeptEntries:
    """The kept entries of a site with a Gaussian prior; `spike` and `groups` in its shape."""
    assert site.prior is not None
    p = Diagonal(*(_column(t.to(site.mean), site) for t in (site.prior.mean, site.prior.var)))
    index = None if groups is None else numbered(_column(groups, site))
    return KeptEntries(
        site,
        Diagonal(_column(site.mean, site), _column(site.var, site)),
        p,
        _column(spike, site),
        index,
    )


def _column(t: Tensor, site: Site) -> Tensor:
    """The kept entries of `t`, which broadcasts to the site, as a vector: a view where all are
    kept or `t` is one number.
    """
    if t.numel() == 1:
        return t.reshape(()).expand(site.kept_count)
    return (
        t.expand(site.mean.shape).reshape(-1)
        if site.mask is None
        else t.expand(site.mean.shape)[site.mask]
    )


def numbered(groups: Tensor) -> Tensor:
    """The same partition with its groups counted from 0."""
    return torch.unique(groups, return_inverse=True)[1]
