"""Pyro's autoguides as moments: the Gaussian that each site has on the unconstrained scale,
correlations within a site included.

Owns `autoguide_moments`. Covariance between sites has no place in a posterior of sites and is
dropped: each site gets its marginal. Next: `sites.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.formulas.gaussian import Dense
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.guides.marginals import MEND, Moments, check_plates, trace_moments
from pyro_bmr.guides.mean_field import base_distribution, support_name


def autoguide_moments(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    support: Callable[[str], str],
) -> dict[str, Moments]:
    """Site → moments. AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal and
    AutoLaplaceApproximation (a point; its `laplace_approximation(...)` is an
    AutoMultivariateNormal) hold one Gaussian over all their sites, which is read as it stands, also
    where they are members of an AutoGuideList. The sites of any other guide, or member, are read as
    `trace_moments` says.

    Raises:
        ModelError: a site's marginal is not Gaussian on the unconstrained scale, such as those of
            AutoNormalizingFlow.
    """
    moments: dict[str, Moments] = {}
    for member in _continuous(guide):
        with torch.no_grad(), poutine.block():
            if member.prototype_trace is None:
                guide(*args, **kwargs)
            moments |= _one_gaussian(member, args, kwargs)
    if not isinstance(guide, AutoContinuous):
        moments |= trace_moments(guide, args, kwargs, support, moments)
    return moments


def _continuous(guide: Any) -> Iterator[AutoContinuous]:
    """The AutoContinuous guides in `guide`, itself or a member of a list, or of a list in it."""
    if isinstance(guide, AutoContinuous):
        yield guide
    elif isinstance(guide, AutoGuideList):
        for member in guide:
            yield from _continuous(member)


def _one_gaussian(
    guide: AutoContinuous, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Moments]:
    q = guide.get_posterior(*args, **kwargs)
    base = base_distribution(q)
    moments = {}
    for site, index in guide._unpack_latent(torch.arange(guide.latent_dim)):
        name, flat, shape = site["name"], index.flatten(), index.shape
        check_plates(name, site["cond_indep_stack"])
        support = support_name(name, site["fn"].support)
        joint: Dense | LowRank | None = None
        var: Tensor
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
            raise ModelError(
                f"site '{name}': the posterior of {type(guide).__name__} cannot be read as Gaussian"
                f" moments, since it is a {type(q).__name__}; use MeanField, FullRank,"
                " ScaleCoupled, or one of AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal,"
                " AutoLowRankMultivariateNormal, AutoLaplaceApproximation, AutoStructured,"
                f" AutoGaussian, AutoDelta; or {MEND}"
            )
        moments[name] = Moments(
            mean.clone().view(shape),
            var.clone().view(shape),
            support,
            joint if len(flat) > 1 else None,
        )
    return moments
