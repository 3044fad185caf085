"""Pyro's autoguides as moments: which Gaussian each site has on the unconstrained scale, correlations within a site included.

Owns `autoguide_moments`. Covariance between sites has no place in a posterior of sites and is dropped: each site gets its marginal. Next: `elbo.py`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoStructured
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.guides.mean_field import base_distribution, support_name
from pyro_bmr.reduction.gaussian import Dense
from pyro_bmr.reduction.low_rank import LowRank


class Moments(NamedTuple):
    """Mean and variance of each entry on the unconstrained scale, the site's support, and the correlations of its entries, if any."""

    mean: Tensor
    var: Tensor
    support: str
    joint: Dense | LowRank | None = None


@torch.no_grad()
def autoguide_moments(guide: Any, *args: Any, **kwargs: Any) -> dict[str, Moments] | None:
    """Site → moments, for AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoLaplaceApproximation (a point; its
    `laplace_approximation(...)` is an AutoMultivariateNormal) and AutoStructured; None for other guides, which a trace may show.

    Raises:
        ModelError: the guide is one of Pyro's whose posterior is not Gaussian on the unconstrained scale, such as AutoNormalizingFlow.
    """
    if isinstance(guide, AutoContinuous):
        return _continuous(guide, args, kwargs)
    if isinstance(guide, AutoStructured):
        return _structured(guide)
    return None


def _continuous(guide: AutoContinuous, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Moments]:
    q = guide.get_posterior(*args, **kwargs)
    base = base_distribution(q)
    moments = {}
    for site, index in guide._unpack_latent(torch.arange(guide.latent_dim)):
        name, flat, shape = site["name"], index.flatten(), index.shape
        support = support_name(name, site["fn"].support)
        joint: Dense | LowRank | None = None
        if isinstance(base, torch.distributions.MultivariateNormal):
            mean, cov = base.loc[flat], base.covariance_matrix[flat][:, flat]
            var, joint = cov.diagonal(), Dense(mean, cov)
        elif isinstance(base, torch.distributions.LowRankMultivariateNormal):
            mean, own, factor = base.loc[flat], base.cov_diag[flat], base.cov_factor[flat]
            var, joint = own + factor.square().sum(1), LowRank(mean, own, factor)
        elif isinstance(base, torch.distributions.Normal):
            mean, var = base.loc[flat], base.variance[flat]
        elif isinstance(base, dist.Delta):
            mean, var = base.v[flat], torch.zeros_like(base.v[flat])
        else:
            raise _unreadable(guide, name, f"its posterior is a {type(q).__name__}")
        moments[name] = Moments(mean.clone().view(shape), var.clone().view(shape), support, joint if len(flat) > 1 else None)
    return moments


def _structured(guide: AutoStructured) -> dict[str, Moments]:
    """z_d = loc_d + T_d ε_d + Σ_u A_du (z_u − loc_u) over upstream sites u: `roots[d]` maps each site's ε to z_d."""
    dependencies: Any = guide.dependencies
    roots: dict[str, dict[str, Tensor]] = {}
    moments = {}
    for name, site in guide._sorted_sites:
        loc, kind, linear = attrgetter(name)(guide.locs), guide.conditionals[name], {}
        if not isinstance(kind, str):
            raise _unreadable(guide, name, "its conditional is a function of your own")
        if kind == "normal":
            linear[name] = attrgetter(name)(guide.scales).diag_embed()
        elif kind == "mvn":
            linear[name] = attrgetter(name)(guide.scales)[:, None] * attrgetter(name)(guide.scale_trils)
        for upstream in dependencies.get(name, {}):
            dependency = attrgetter(upstream)(attrgetter(name)(guide.deps))
            if not isinstance(dependency, torch.nn.Linear):
                raise _unreadable(guide, name, f"its dependency on '{upstream}' is not linear")
            for source, root in roots[upstream].items():
                linear[source] = linear.get(source, 0) + dependency.weight @ root
        roots[name] = linear
        cov = sum((root @ root.mT for root in linear.values()), torch.zeros(len(loc), len(loc), dtype=loc.dtype, device=loc.device))
        shape = guide._batch_shapes[name] + guide._unconstrained_event_shapes[name]
        joint = Dense(loc.clone(), cov) if len(loc) > 1 and not (set(linear) <= {name} and kind != "mvn") else None
        moments[name] = Moments(loc.clone().view(shape), cov.diagonal().clone().view(shape), support_name(name, site["fn"].support), joint)
    return moments


def _unreadable(guide: Any, name: str, why: str) -> ModelError:
    return ModelError(
        f"site '{name}': the posterior of {type(guide).__name__} cannot be read as Gaussian moments, since {why}; use MeanField, FullRank, ScaleCoupled, or "
        "one of AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoLaplaceApproximation, AutoStructured, AutoDelta"
    )
