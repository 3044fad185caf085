"""`reduce`: which formula for which site of a posterior, and the decision, weight by weight.

Owns `reduce`, `Reduction` and `SiteReduction`. The formulas are in the files beside this one. Next: `pruning.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import pandas as pd
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.posterior import Posterior, Site
from pyro_bmr.priors import Gaussian, Horseshoe, Prior, SpikeAndSlab
from pyro_bmr.priors.spike_and_slab import SpikeSlabMixture
from pyro_bmr.reduction.gaussian import Diagonal, delta_f, message, reduced_posterior
from pyro_bmr.reduction.horseshoe import best_tau, horseshoe_reduction
from pyro_bmr.reduction.spike_and_slab import exact_inclusion, mean_field_inclusion

_EXACT_INCLUSION_UP_TO = 4096  # weights; above it the mean-field update and the integral give the same decisions


@dataclass(frozen=True)
class SiteReduction:
    """What a reduction says of one site.

    `delta_f`: gain in log evidence of the whole site, nats, for the reduced prior over the prior of the fit. `spike_delta_f`: the
    gain of setting each weight to zero, entry by entry. `drop`: the log odds by which each weight goes when positive. `site`: the reduced
    posterior, with its mask. `wider`: how many living weights have a posterior wider than their prior, about which the data said nothing.
    `scale`: what the reduction found out about the prior (τ of a horseshoe, inclusion log odds ζ of a spike and slab), or None.
    """

    delta_f: float
    spike_delta_f: Tensor
    drop: Tensor
    site: Site
    wider: int
    scale: float | None = None


@dataclass(frozen=True)
class Reduction:
    """Site → `SiteReduction`, and the whole posterior after the reduction, sites that were not reduced included."""

    sites: Mapping[str, SiteReduction]
    posterior: Posterior

    @property
    def masks(self) -> dict[str, Tensor]:
        """Site → bool tensor, True where the weight lives; for reduced sites."""
        return {name: _alive(result.site) for name, result in self.sites.items()}

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
            (name, r.drop.numel(), float(_alive(r.site).double().mean()), r.delta_f, r.wider, r.scale, ", ".join(r.site.given))
            for name, r in self.sites.items()
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
            results[name] = _reduce_site(posterior, name, prior)
        except ReductionError as error:
            raise ReductionError(f"site '{name}': {error}") from None
    masks = {name: result.drop <= threshold for name, result in results.items()} if kept is None else _by_size(results, kept)
    for name, result in results.items():
        gain = result.delta_f
        if isinstance(targets[name], Gaussian) and targets[name].scale == 0:  # type: ignore[union-attr]
            gain = float(result.spike_delta_f[_alive(result.site) & ~masks[name]].sum())
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


def _reduce_site(posterior: Posterior, name: str, to: Prior | None) -> SiteReduction:
    """Everything but the mask: `drop` and the reduced moments of all living entries, and for continuous targets ΔF."""
    site = posterior[name]
    if not bool((site.var > 0)[_alive(site)].all()):
        raise ReductionError("its posterior is a point estimate (variance 0) and says nothing of other priors; fit it with MeanField")
    if to is None:
        return _own_decision(posterior, name)
    if site.prior is None:
        raise ReductionError(
            f"its prior in the fit ({site.declared!r}) is not Gaussian; reduce a posterior fitted under Gaussian(), or pass to=None for its own decision"
        )
    alive = _alive(site)
    q, p = _living_moments(site)
    wider = int((q.var > p.var).sum())
    spike = delta_f(q, p, Gaussian(0.0))
    total, scale, drop, reduced = 0.0, None, spike, q
    prior: Diagonal | None = site.prior
    if isinstance(to, Gaussian) and to.scale == 0:
        if to.mean != 0:
            raise ReductionError(f"{to!r}: a pruned weight is zero; for the evidence of another point use delta_f itself")
    elif isinstance(to, Gaussian):
        if to.scale == "layer":
            raise ReductionError(f"{to!r} has hyper-parameters of its own; reduce to Gaussian(<number>), or to Gaussian() for the scale with the best evidence")
        target = Diagonal(q.mean.new_tensor(to.mean), q.mean.new_tensor(to.scale if not isinstance(to.scale, str) else 1.0).square())
        if to.scale == "empirical":
            scale = best_scale(q, p, to.mean)
            target = Diagonal(target.mean, q.mean.new_tensor(scale).square())
        total = float(delta_f(q, p, target).sum())
        reduced, drop = reduced_posterior(q, p, target), torch.full_like(spike, -torch.inf)
        prior = target
    elif isinstance(to, SpikeAndSlab):
        odds_against = spike if not to.spike_scale else delta_f(q, p, Gaussian(to.spike_scale))
        rule = exact_inclusion if spike.numel() <= _EXACT_INCLUSION_UP_TO else mean_field_inclusion
        inclusion = rule(odds_against, to.alpha, to.beta)
        total, scale = float(inclusion.log_evidence_gain), float(inclusion.log_odds)
        drop = -torch.logit(inclusion.probability.double()).to(spike.dtype)
    elif isinstance(to, Horseshoe):
        if bool((p.mean != 0).any()):
            raise ReductionError("a horseshoe reduction needs a prior of mean 0 in the fit")
        data = message(q, p)
        scale = best_tau(data, p.var, to.tau0, to.slab_scale)
        result = horseshoe_reduction(data, p.var, scale, to.slab_scale)
        total, drop = float(result.delta_f.sum()), torch.logit(result.kappa)
        reduced, prior = Diagonal(result.mean, result.var), None  # not Gaussian any more: a further reduction starts from the fit
    else:
        raise ReductionError(f"{to!r} is no target of a reduction here; use Gaussian, SpikeAndSlab or Horseshoe")
    mean, var = (full.masked_scatter(alive, part) for full, part in ((site.mean, reduced.mean), (site.var, reduced.var)))
    everywhere = torch.full_like(site.mean, torch.inf)  # dead entries stay dead
    return SiteReduction(
        total,
        torch.full_like(everywhere, torch.nan).masked_scatter(alive, spike),
        everywhere.masked_scatter(alive, drop),
        replace(site, mean=mean, var=var, prior=prior),
        wider,
        scale,
    )


def _own_decision(posterior: Posterior, name: str) -> SiteReduction:
    site = posterior[name]
    drop = torch.full_like(site.mean, -torch.inf)
    if isinstance(site.declared, Horseshoe):
        drop = torch.logit(site.var.clamp(max=1.0))  # κ = 1/(1 + L), which under w̄ ~ N(0, 1) is the posterior variance
    elif isinstance(site.declared, SpikeAndSlab):
        inclusion = posterior[f"{name}_inclusion"]
        mixture = SpikeSlabMixture(inclusion.value(inclusion.mean), site.mean.new_tensor(site.declared.fitted_spike_scale))
        drop = -mixture.inclusion_log_odds(site.mean, site.var)
    spike = torch.full_like(drop, torch.nan)
    if site.prior is not None:
        q, p = _living_moments(site)
        spike = spike.masked_scatter(_alive(site), delta_f(q, p, Gaussian(0.0)))
    return SiteReduction(0.0, spike, drop.masked_fill(~_alive(site), torch.inf), site, 0)


def _living_moments(site: Site) -> tuple[Diagonal, Diagonal]:
    """Posterior and prior of the entries that live, as vectors."""
    assert site.prior is not None
    alive = _alive(site)
    prior_mean, prior_var = (t.expand(site.mean.shape)[alive] for t in (site.prior.mean, site.prior.var))
    return Diagonal(site.mean[alive], site.var[alive]), Diagonal(prior_mean, prior_var)


def best_scale(q: Diagonal, p: Diagonal, mean: float = 0.0, iterations: int = 100) -> float:
    """The scale s of a prior N(mean, s²) shared by all entries that maximises Σ ΔF: the fixed point s² ← mean of (μ̃ − mean)² + σ̃², which never lowers it."""
    var = ((q.mean - mean).square() + q.var).mean()
    for _ in range(iterations):
        reduced = reduced_posterior(q, p, Diagonal(torch.as_tensor(mean), var))
        updated = ((reduced.mean - mean).square() + reduced.var).mean()
        done = bool((updated - var).abs() <= 1e-6 * var)
        var = updated
        if done:
            break
    return float(var.sqrt())


def _by_size(results: Mapping[str, SiteReduction], kept: float) -> dict[str, Tensor]:
    ranks = {name: result.spike_delta_f.masked_fill(~_alive(result.site), torch.inf) for name, result in results.items()}
    pooled = torch.cat([rank.flatten() for rank in ranks.values()])
    if bool(pooled.isnan().any()):
        raise ReductionError("kept= ranks by the point spike's ΔF, which sites without a Gaussian prior do not have; use threshold=")
    count = round(kept * pooled.numel())
    if count == 0:
        return {name: torch.zeros_like(rank, dtype=torch.bool) for name, rank in ranks.items()}
    limit = pooled.kthvalue(count).values
    return {name: (rank <= limit) & rank.isfinite() for name, rank in ranks.items()}


def _alive(site: Site) -> Tensor:
    return torch.ones_like(site.mean, dtype=torch.bool) if site.mask is None else site.mask
