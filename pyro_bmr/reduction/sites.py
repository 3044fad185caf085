"""`reduce`: which reduced prior for which site of a posterior, and the decision, weight by weight.

Owns `reduce` and `Reduction`. What one prior says of one site is in `targets.py`. Next: `pruning.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import pandas as pd
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.posterior import Posterior
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.reduction.targets import SiteReduction, site_reduction


@dataclass(frozen=True)
class Reduction:
    """Site → `SiteReduction`, and the whole posterior after the reduction, sites that were not reduced included."""

    sites: Mapping[str, SiteReduction]
    posterior: Posterior

    @property
    def masks(self) -> dict[str, Tensor]:
        """Site → bool tensor, True where the weight lives; for reduced sites."""
        return {name: result.site.alive for name, result in self.sites.items()}

    @property
    def delta_f(self) -> float:
        """Gain in log evidence over all sites, nats."""
        return sum(result.delta_f for result in self.sites.values())

    @property
    def kept(self) -> float:
        """The fraction of the reduced sites' weights that live."""
        masks = self.masks.values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def table(self) -> pd.DataFrame:
        """One row per site: site, size, kept (fraction), delta_f (nats), wider, scale, given (sites at whose median the prior was taken)."""
        rows = [
            (name, r.drop.numel(), float(r.site.alive.double().mean()), r.delta_f, r.wider, r.scale, ", ".join(r.site.given)) for name, r in self.sites.items()
        ]
        return pd.DataFrame(rows, columns=["site", "size", "kept", "delta_f", "wider", "scale", "given"])


def reduce(
    posterior: Posterior, to: Prior | Mapping[str, Prior | None] | None, per: str = "weight", *, threshold: float = 0.0, kept: float | None = None
) -> Reduction:
    r"""What the evidence, the posterior and the set of living weights would be under the prior `to`; no new fit.

    Each weight's question is the point spike's: ΔF = ½ log(σ₀²/σ²) − ½ μ²/σ² for a prior N(0, σ₀²) and a posterior N(μ, σ²).

    Args:
        posterior: of a fit under Gaussian priors; entries that its masks have pruned stay pruned and count nowhere.
        to: the reduced prior, or patterns of site names → reduced prior (None leaves a site alone). A prior without patterns goes to every real
            site with a Gaussian prior.

            - ``Gaussian(scale=0)``, the point spike: a weight goes when its ΔF is above `threshold`; the site's ΔF is the sum over those that went.
            - ``Gaussian(scale=s)``: new moments, nothing is pruned. ``Gaussian()``: s per site by its evidence.
            - ``SpikeAndSlab()``: a weight goes when ΔF − ζ is above `threshold`, with ζ the inclusion log odds learned from the site.
            - ``Horseshoe()``: new moments; a weight goes when logit κ is above `threshold`, that is, when κ > ½.
            - None: the decision of the priors under which the posterior was fitted (κ > ½, inclusion < ½; a Gaussian keeps all); ΔF is 0.

            Scales are in the units of the site: a standardised site (`Gaussian("layer")`) counts them in layer scales.
        per: "weight".
        threshold: in nats.
        kept: instead of the threshold, prune the weights with the largest spike ΔF until this fraction of all the sites' entries lives.

    Raises:
        ReductionError: no site can be reduced, a pattern matches none, the posterior is a point estimate, or an argument is out of range.
    """
    if per != "weight":
        raise ReductionError(f"per={per!r}: a reduction decides per 'weight'")
    if kept is not None and not 0 <= kept <= 1:
        raise ReductionError(f"kept={kept}: a fraction between 0 and 1 is wanted")
    targets = _targets(posterior, to)
    results = {}
    for name, prior in targets.items():
        try:
            results[name] = site_reduction(posterior, name, prior)
        except ReductionError as error:
            raise ReductionError(f"site '{name}': {error}") from None
    masks = {name: result.drop <= threshold for name, result in results.items()} if kept is None else _by_size(results, kept)
    for name, result in results.items():
        gain = result.delta_f
        if isinstance(targets[name], Gaussian) and targets[name].scale == 0:  # type: ignore[union-attr]
            gain = float(result.spike_delta_f[result.site.alive & ~masks[name]].sum())
        mask = masks[name]
        site = replace(result.site, mean=result.site.mean.where(mask, 0), var=result.site.var.where(mask, 0), mask=mask)
        results[name] = replace(result, delta_f=gain, site=site)
    return Reduction(results, replace(posterior, sites={**posterior.sites, **{name: r.site for name, r in results.items()}}))


def _targets(posterior: Posterior, to: Prior | Mapping[str, Prior | None] | None) -> dict[str, Prior | None]:
    if to is None:
        chosen: dict[str, Prior | None] = {name: None for name, site in posterior.sites.items() if site.support == "real" and site.declared is not None}
    elif isinstance(to, Mapping):
        chosen = {}
        for pattern in to:
            if not any(fnmatchcase(name, pattern) for name in posterior):
                raise ReductionError(f"pattern '{pattern}' matches no site; the sites are: {', '.join(posterior)}")
        for name in posterior:
            found = next((p for p in to if fnmatchcase(name, p)), None)
            reducible = posterior[name].support == "real" and posterior[name].prior is not None
            if found is not None and to[found] is not None and (reducible or found == name):  # an exact name that cannot be reduced is refused by name
                chosen[name] = to[found]
    else:
        chosen = {name: to for name, site in posterior.sites.items() if site.support == "real" and site.prior is not None}
    if not chosen:
        raise ReductionError(
            "no site to reduce: none is real with a Gaussian prior; the sites are: "
            + ", ".join(f"{name} ({site.support})" for name, site in posterior.sites.items())
        )
    return chosen


def _by_size(results: Mapping[str, SiteReduction], kept: float) -> dict[str, Tensor]:
    ranks = {name: result.spike_delta_f.masked_fill(~result.site.alive, torch.inf) for name, result in results.items()}
    pooled = torch.cat([rank.flatten() for rank in ranks.values()])
    if bool(pooled.isnan().any()):
        raise ReductionError("kept= ranks by the point spike's ΔF, which sites without a Gaussian prior do not have; use threshold=")
    count = round(kept * pooled.numel())
    if count == 0:
        return {name: torch.zeros_like(rank, dtype=torch.bool) for name, rank in ranks.items()}
    limit = pooled.kthvalue(count).values
    return {name: (rank <= limit) & rank.isfinite() for name, rank in ranks.items()}
