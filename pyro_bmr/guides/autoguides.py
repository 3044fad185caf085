"""Pyro's autoguides as moments: the Gaussian of each site on the unconstrained scale, with its
correlations within the site.

Owns `autoguide_moments`. Each site gets its marginal; covariances between sites are dropped. Next:
`sites.py`.
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
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.guides.gaussian_draws import MEND, Moments, check_plates
from pyro_bmr.guides.latent_sites import base_distribution, support_name
from pyro_bmr.guides.marginals import trace_moments


def autoguide_moments(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    support: Callable[[str], str],
) -> dict[str, Moments]:
    """Site → moments. AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal and
    AutoLaplaceApproximation (a point; its `laplace_approximation(...)` is an
    AutoMultivariateNormal) have one Gaussian over all their sites, and its marginals are read, also
    if they are members of an AutoGuideList. The sites of other guides are read by `trace_moments`.

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
    """Site → its marginal moments in the one Gaussian of the guide."""
    q = guide.get_posterior(*args, **kwargs)
    moments = {}
    for site, index in guide._unpack_latent(torch.arange(guide.latent_dim)):
        name, flat = site["name"], index.flatten()
        check_plates(name, site["cond_indep_stack"])
        marginal = _marginal(base_distribution(q), flat)
        if marginal is None:
            raise ModelError(
                f"site '{name}': the posterior of {type(guide).__name__} cannot be read as Gaussian"
                f" moments, since it is a {type(q).__name__}; use MeanField, FullRank,"
                " ScaleCoupled, or one of AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal,"
                " AutoLowRankMultivariateNormal, AutoLaplaceApproximation, AutoStructured,"
                f" AutoGaussian, AutoDelta; or {MEND}"
            )
        mean, var, joint = marginal
        moments[name] = Moments(
            mean.clone().view(index.shape),
            var.clone().view(index.shape),
            support_name(name, site["fn"].support),
            joint if len(flat) > 1 else None,
        )
    return moments


def _marginal(base: Any, index: Tensor) -> tuple[Tensor, Tensor, Dense | LowRank | None] | None:
    """Mean, variance and covariance of the entries `index` of a Gaussian or a point; None for other
    distributions.
    """
    if isinstance(base, torch.distributions.MultivariateNormal):
        mean, cov = base.loc[index], base.covariance_matrix[index][:, index]
        return mean, cov.diagonal(), Dense(mean, cov)
    if isinstance(base, torch.distributions.LowRankMultivariateNormal):
        mean, own, factor = base.loc[index], base.cov_diag[index], base.cov_factor[index]
        return mean, own + factor.square().sum(1), LowRank(mean, own, factor)
    if isinstance(base, torch.distributions.Normal):
        return base.loc[index], base.variance[index], None
    if isinstance(base, dist.Delta):
        return base.v[index], torch.zeros_like(base.v[index]), None
    return None
