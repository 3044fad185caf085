"""What a reduced prior says of one site of a posterior: evidence, moments, and the log odds by which each weight goes.

Owns `SiteReduction` and `site_reduction`, with one entry per kind of reduced prior. The formulas are in the files beside this one; the
decision over all sites is in `sites.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def site_reduction(posterior: Posterior, name: str, to: Prior | None) -> SiteReduction:
    """Everything but the mask: `drop` and the reduced moments of all living entries, and for continuous targets ΔF."""
    site = posterior[name]
    if not bool((site.var > 0)[site.alive].all()):
        raise ReductionError("its posterior is a point estimate (variance 0) and says nothing of other priors; fit it with MeanField")
    if to is None:
        return _own_decision(posterior, name)
    if site.prior is None:
        raise ReductionError(
            f"its prior in the fit ({site.declared!r}) is not Gaussian; reduce a posterior fitted under Gaussian(), or pass to=None for its own decision"
        )
    alive = site.alive
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
        replace(site, mean=mean, var=var, prior=prior, joint=site.joint if reduced is q else None, message=site.message if reduced is q else None),
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
        spike = spike.masked_scatter(site.alive, delta_f(q, p, Gaussian(0.0)))
    return SiteReduction(0.0, spike, drop.masked_fill(~site.alive, torch.inf), site, 0)


def _living_moments(site: Site) -> tuple[Diagonal, Diagonal]:
    """Posterior and prior of the entries that live, as vectors."""
    assert site.prior is not None
    alive = site.alive
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
