"""Sites of a posterior out of a guide or a param store, on the unconstrained scale, with the priors that the program declares.

Owns `sites_of_guide`, `sites_of_param_store` and `with_priors`; `Posterior.from_guide` and `from_param_store` say what is read. Next: `products.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_bmr.elbo import Values, collapsed
from pyro_bmr.errors import ModelError
from pyro_bmr.guides.autoguides import Moments, autoguide_moments
from pyro_bmr.guides.mean_field import SUPPORTS, Latent, MeanField, base_distribution, support_name
from pyro_bmr.guides.scale_coupled import CoupledSite
from pyro_bmr.guides.site_wise import SiteWise
from pyro_bmr.networks import BayesianNetwork
from pyro_bmr.reduction.gaussian import Diagonal, Message
from pyro_bmr.site import Site


def masks_in_force(program: Callable[..., Any], masks: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """`masks` and those of a `BayesianNetwork` of its own: what `torch.nn.utils.prune` has pruned stays so."""
    own = {name: mask.to(device) for name, mask in program.masks.items()} if isinstance(program, BayesianNetwork) else {}
    return {**own, **{name: mask & own[name].to(mask.device) if name in own else mask for name, mask in masks.items()}}


def sites_of_guide(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], masks: Mapping[str, Tensor]) -> dict[str, Site]:
    """Site name → `Site` without a prior; a guide with a Gaussian per site is read with `masks` in force."""
    if isinstance(guide, SiteWise):
        return _site_wise(guide, masks)
    if isinstance(guide, MeanField):
        return _mean_field(guide)
    with torch.no_grad(), torch.random.fork_rng():
        trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        moments = autoguide_moments(guide, *args, **kwargs)
    if moments is None:
        moments = {name: _guide_moments(name, trace) for name, site in trace.iter_stochastic_nodes() if not (site["infer"] or {}).get("is_auxiliary")}
    return {name: Site(m.mean, m.var, support=m.support, joint=m.joint) for name, m in moments.items()}


def sites_of_param_store(
    store: Any, program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Mapping[str, tuple[str, str]] | None
) -> dict[str, Site]:
    """Site name → `Site` without a prior."""
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        trace = prune_subsample_sites(poutine.trace(program).get_trace(*args, **kwargs))
    keys = list(store.keys())
    bare = {}
    for name, site in trace.iter_stochastic_nodes():
        if names is not None:
            pair = names.get(name, (None, None))
        else:
            pair = tuple(next((k for k in keys if k == f"{kind}.{name}" or k.endswith(f".{kind}.{name}")), None) for kind in ("locs", "scales"))  # type: ignore[assignment]
        if pair[0] not in keys or pair[1] not in keys:
            raise ModelError(
                f"site '{name}': no location and scale in the param store ({', '.join(keys) or 'it is empty'}); "
                f"pass names={{'{name}': ('<loc>', '<scale>'), ...}}"
            )
        support = support_name(name, base_distribution(site["fn"]).support)
        loc, scale = (store[key].detach().clone() for key in pair)
        bare[name] = Site(loc, scale.square().expand(loc.shape), support=support)
    return bare


@torch.enable_grad()
def with_priors(
    read: Mapping[str, Site], program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], masks: Mapping[str, Tensor]
) -> dict[str, Site]:
    """The sites with `masks` in force and the priors of one run of the program at their point."""
    bare = {name: site.masked(masks[name]) if name in masks else site for name, site in read.items()}
    values = {name: site.value(site.mean).detach().requires_grad_() for name, site in bare.items()}
    with torch.random.fork_rng(), Values(values) as run:
        program(*args, **kwargs)
    sites = {}
    for name, msg in run.latent.items():
        base = base_distribution(msg["fn"])
        if bare[name].support == "real" and not bool(bare[name].var.any()):  # a point guide gives the value itself
            support = support_name(name, base.support)
            transform = SUPPORTS[support]
            bare[name] = replace(bare[name], mean=bare[name].mean if transform is None else transform.inv(bare[name].mean), support=support)
        prior = None
        given: tuple[str, ...] = ()
        if isinstance(base, torch.distributions.Normal):
            loc, scale = collapsed(base.loc), collapsed(base.scale)
            given = _dependencies(loc, scale, {k: v for k, v in values.items() if k != name})
            prior = Diagonal(loc.detach(), scale.detach().square())
        sites[name] = replace(bare[name], prior=prior, declared=msg["infer"].get("prior"), given=given)
    missing = set(bare) - set(sites)
    if missing:
        raise ModelError(f"the guide has sites that the program has not: {', '.join(sorted(missing))}; use the program that the guide was fitted to")
    return sites


@torch.no_grad()
def _mean_field(guide: MeanField) -> dict[str, Site]:
    locs, log_scales = guide.views(guide.loc), guide.views(guide.log_scale)
    return {s.name: Site(locs[s.name].clone(), log_scales[s.name].exp().square_(), support=_support(s)) for s in guide.latents}


def _support(latent: Latent) -> str:
    return next(key for key, transform in SUPPORTS.items() if transform is latent.transform)


@torch.no_grad()
def _site_wise(guide: SiteWise, masks: Mapping[str, Tensor]) -> dict[str, Site]:
    sites = {}
    for latent, part, q in zip(guide.latents, guide.parts.values(), guide.at_point(masks).values(), strict=True):
        message = Message(*(t.clone() for t in part.message())) if isinstance(part, CoupledSite) else None
        sites[latent.name] = Site(q.mean.clone(), q.var.clone(), support=_support(latent), joint=q.joint(), message=message)
    return sites


def _guide_moments(name: str, trace: Any) -> Moments:
    """The moments of one site of a guide's trace, on the unconstrained scale."""
    unconstrained = trace.nodes.get(f"{name}_unconstrained")
    fn = base_distribution(trace.nodes[name]["fn"])
    if unconstrained is not None:
        base = base_distribution(unconstrained["fn"])
        if isinstance(base, torch.distributions.Normal):
            return Moments(base.loc.detach().clone(), base.variance.detach(), _autoguide_support(trace.nodes, name))
    if isinstance(fn, torch.distributions.Normal):
        return Moments(fn.loc.detach().clone(), fn.variance.detach(), "real")
    if isinstance(fn, torch.distributions.TransformedDistribution) and len(fn.transforms) == 1:
        base = base_distribution(fn.base_dist)
        if isinstance(base, torch.distributions.Normal):
            return Moments(base.loc.detach().clone(), base.variance.detach(), support_name(name, fn.support))
    if isinstance(fn, dist.Delta) and not any(site["infer"].get("is_auxiliary") for site in trace.nodes.values() if site["type"] == "sample"):
        return Moments(fn.v.detach().clone(), torch.zeros_like(fn.v), "real")
    raise ModelError(
        f"site '{name}': the guide's {type(fn).__name__} cannot be read as independent Gaussian moments; use MeanField or AutoNormal, or a guide "
        "with a Normal or log-normal per site"
    )


def _autoguide_support(nodes: Mapping[str, Any], name: str) -> str:
    """AutoNormal's value site is a Delta, which knows no support: the transform it applied tells."""
    value, raw = nodes[name]["value"], nodes[f"{name}_unconstrained"]["value"]
    for support, transform in SUPPORTS.items():
        if torch.allclose(raw if transform is None else transform(raw), value, rtol=1e-5, atol=1e-8):
            return support
    raise ModelError(f"site '{name}': its support is not the reals, the positives or the unit interval, so its posterior cannot be read as Gaussian moments")


def _dependencies(loc: Tensor, scale: Tensor, values: Mapping[str, Tensor]) -> tuple[str, ...]:
    if not (loc.requires_grad or scale.requires_grad) or not values:
        return ()
    grads = torch.autograd.grad(loc.sum() + scale.sum(), list(values.values()), allow_unused=True, retain_graph=True)
    return tuple(name for name, grad in zip(values, grads, strict=True) if grad is not None and math.isfinite(float(grad.abs().sum())))
