"""The posterior of a sharded fit: each process has its part of every weight's moments. Reductions
go part by part.

Owns `ShardedPosterior` and `ShardedReduction`. Next: `sharded_run.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.checks import check_arguments
from pyro_bmr.errors import ReductionError, described, holds
from pyro_bmr.formulas.gaussian import total
from pyro_bmr.isolation import isolated
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.reduction.reduce import quiet_reduction
from pyro_bmr.reduction.reduced_site import SiteReduction
from pyro_bmr.reduction.result import Reduction
from pyro_bmr.sharding.kth_value import lowest
from pyro_bmr.sharding.layout import Layout


@dataclass(frozen=True, repr=False)
class ShardedPosterior:
    """`own`: this process's part, as a `Posterior`: the rows of each weight that `layout` gives it,
    and all of the scales that a weight shares.
    """

    own: Posterior
    layout: Layout

    def __repr__(self) -> str:
        entries = sum(shape.numel() for shape in self.layout.shapes.values())
        return f"ShardedPosterior({entries:,} weights in {self.layout.parts} parts)"

    def gathered(self) -> Posterior:
        """The whole posterior, in every process; a call of all processes."""
        sites = {}
        for name, site in self.own.sites.items():
            mean, var = (self.layout.whole(name, moment) for moment in (site.mean, site.var))
            mask = None if site.mask is None else self.layout.whole(name, site.mask)
            sites[name] = replace(site, mean=mean, var=var, mask=mask)
        return replace(self.own, sites=sites)

    @isolated()
    def reduce(
        self,
        to: Prior | Mapping[str, Prior | None],
        *,
        threshold: float = 0.0,
        kept: float | None = None,
    ) -> ShardedReduction:
        """What `reduce` finds for the whole posterior, weight by weight, part by part; a call of
        all processes. Arguments as there. Nothing of a weight's size is sent.

        Raises:
            ReductionError: `to` is a prior whose scale or inclusion is found from all weights of
                a site; an argument is out of range, or no site can be reduced.
        """
        fraction = kept is None or holds(lambda x: 0 <= x <= 1, kept)
        check_arguments(
            "reduce", fraction, "a fraction between 0 and 1, or None", ReductionError, kept=kept
        )
        for prior in to.values() if isinstance(to, Mapping) else [to]:
            given = isinstance(prior, Gaussian) and not isinstance(prior.scale, str)
            if not given and prior is not None:
                raise ReductionError(
                    "to: a sharded posterior expects Gaussian(scale=0) or another Gaussian with a"
                    f" number as its scale, got {described(prior)}; give that, or reduce"
                    " posterior.gathered()"
                )
        own = quiet_reduction(self.own, to, threshold=threshold)
        if kept is not None:
            own = self._of_size(own, kept)
        return _reduction(own, self.layout)

    def _of_size(self, own: Reduction, kept: float) -> Reduction:
        """The reduction of this process's part in which the fraction `kept` of all weights is kept,
        those with the least spike ΔF.
        """
        ranks = {
            name: site.spike_delta_f.masked_fill(~self.own[name].kept, torch.inf)
            for name, site in own.sites.items()
        }
        if any(bool(each.isnan().any()) for each in ranks.values()):
            raise ReductionError("kept: ΔF of a weight is NaN; the fit has diverged there")
        count = round(kept * sum(self.layout.shapes[name].numel() for name in ranks))
        masks = lowest(ranks, count, self.layout)
        sites = {
            name: _with_mask(site, self.own[name], masks[name] & ranks[name].isfinite())
            for name, site in own.sites.items()
        }
        after = {**self.own.sites, **{name: site.site for name, site in sites.items()}}
        return replace(own, sites=sites, posterior=replace(self.own, sites=after))


@dataclass(frozen=True, repr=False)
class ShardedReduction:
    """`own`: the reduction of this process's part; its masks and moments are those of the part.
    `gains`: site → ΔF of the whole site, nats. `kept`: the fraction of all weights that are kept.

    There are no warnings here of layers that lose their units; `reduce` of the gathered posterior
    has them.
    """

    own: Reduction
    layout: Layout
    gains: Mapping[str, float]
    kept: float

    def __repr__(self) -> str:
        kept = f"{self.kept:.1%} of the entries kept"
        return f"ShardedReduction({len(self.gains)} sites, {kept}, ΔF {self.delta_f:.1f} nats)"

    @property
    def delta_f(self) -> float:
        """Gain in log evidence over all sites, nats."""
        return sum(self.gains.values())

    @property
    def posterior(self) -> ShardedPosterior:
        """The reduced posterior."""
        return ShardedPosterior(self.own.posterior, self.layout)

    def masks(self) -> dict[str, Tensor]:
        """Site → bool tensor of the whole site, True where the weight is kept; a call of all
        processes.
        """
        return {name: self.layout.whole(name, mask) for name, mask in self.own.masks.items()}


def _reduction(own: Reduction, layout: Layout) -> ShardedReduction:
    """The reduction of all parts, of that of this process's part."""
    masks, names = own.masks, list(own.sites)
    numbers = [own.sites[name].delta_f for name in names]
    numbers.append(float(sum(int(mask.count_nonzero()) for mask in masks.values())))
    total = layout.sum(torch.tensor(numbers, dtype=torch.float64, device=layout.device)).tolist()
    entries = sum(layout.shapes[name].numel() for name in names)
    gains = dict(zip(names, total, strict=False))
    return ShardedReduction(own, layout, gains, total[-1] / entries)


def _with_mask(result: SiteReduction, before: Site, mask: Tensor) -> SiteReduction:
    """What a site is with these entries kept. Under the point spike, which is the prior that leaves
    the moments as they are, ΔF is that of what is pruned.
    """
    if result.site.prior is not before.prior:
        return replace(result, site=result.site.masked(mask))
    gain = total(result.spike_delta_f, before.kept & ~mask)
    return replace(result, site=before.masked(mask), delta_f=gain)
