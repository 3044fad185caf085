"""Half-Cauchy scales, drawn directly or as the root of a ratio of Gammas, and the KL divergence of
their posterior.

Owns the two parametrisations of `horseshoe.py`. Next: `mixing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.priors.line_densities import LogGamma, LogHalfCauchy
from pyro_bmr.priors.tiers import Tier, sample_scales
from pyro_bmr.priors.weight_form import ScaleSite

Parametrization = Literal["half-cauchy", "gamma"]
_GROUPED, _NODES = ("unit", "input"), 24


def sample_half_cauchy(
    name: str,
    scale: Tensor,
    shape: tuple[int, ...],
    tier: Tier,
    block: int,
    parametrization: Parametrization,
) -> Tensor:
    r"""Half-Cauchy scales C⁺(0, `scale`) of a tier, spread so that they broadcast against a weight
    tensor of `shape`.

    ``"half-cauchy"``: the site `name`. ``"gamma"``: the sites `<name>_numerator` and
    `<name>_denominator`,

    .. math:: \lambda = \text{scale}\,\sqrt{a / b}, \qquad a, b \sim \mathrm{Gamma}(\tfrac12, 1),

    the same density in tails that a log-normal posterior follows more easily (Louizos, Ullrich &
    Welling 2017, arXiv 1705.08665).
    """
    if parametrization == "half-cauchy":
        return sample_scales(name, dist.HalfCauchy(scale), shape, tier, block)
    half = dist.Gamma(scale.new_tensor(0.5), scale.new_ones(()))
    numerator = sample_scales(f"{name}_numerator", half, shape, tier, block)
    denominator = sample_scales(f"{name}_denominator", half, shape, tier, block)
    return scale * (numerator / denominator).sqrt()


def half_cauchy_factors(
    sites: Mapping[Tier, str], tau0: float, block: int, parametrization: Parametrization
) -> tuple[float, tuple[ScaleSite, ...]]:
    """The sites of `sample_half_cauchy` for several tiers: a number, and the factors that it is
    multiplied by. `sites`: tier → the name of its site; `tau0`: the scale of the tier "layer".
    """
    number, factors = 1.0 if "layer" in sites else tau0, list[ScaleSite]()
    for tier, name in sites.items():
        scale, of_block = tau0 if tier == "layer" else 1.0, block if tier in _GROUPED else 1
        if parametrization == "half-cauchy":
            factors += [ScaleSite(name, LogHalfCauchy(scale), 1.0, tier, of_block)]
            continue
        half, number = LogGamma(0.5, 1.0), number * scale
        for part, power in (("numerator", 0.5), ("denominator", -0.5)):
            factors += [ScaleSite(f"{name}_{part}", half, power, tier, of_block)]
    return number, tuple(factors)


def half_cauchy_divergence(name: str, sites: Mapping[str, Any], like: Tensor) -> Tensor:
    r"""KL(q ‖ p) of each half-Cauchy scale of the tier `name`, nats, in the shape of the tier's
    scales: what the free energy gains if a scale returns to its prior.

    The posterior of u = log λ is N(m, s²), and the scale of λ is 1, so that p(u) = sech(u)/π:

    .. math:: \mathrm{KL} = -\tfrac12 \log(2\pi e s^2) + \log \pi + E[\log \cosh u]

    by Gauss–Hermite quadrature. The parametrisation ``"gamma"`` has the sum of the divergences of a
    and b, each −½ log(2πe s²) + ½ log π − ½ m + exp(m + ½ s²). A scale that is known (no site, or
    variance 0) has 0.

    Args:
        sites: the posterior, site → moments on the log scale.
        like: a tensor with the dtype and device of the result.
    """
    direct = sites.get(name)
    if direct is not None:
        return _divergence(direct.mean, direct.var, _log_cosh, math.log(math.pi))
    total = like.new_zeros(())
    for part in ("numerator", "denominator"):
        if (site := sites.get(f"{name}_{part}")) is not None:
            constant = 0.5 * math.log(math.pi)  # log Γ(½)
            total = total + _divergence(site.mean, site.var, _log_gamma_energy, constant)
    return total


def _divergence(mean: Tensor, var: Tensor, energy: Any, constant: float) -> Tensor:
    """−H(N(mean, var)) + E[energy(u)] + constant; 0 where the variance is 0."""
    points, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    m, s2 = mean.double(), var.double()
    expected = torch.zeros_like(m)
    for point, weight in zip(points, weights / weights.sum(), strict=True):
        expected += float(weight) * energy(m + float(point) * s2.sqrt())
    kl = expected + constant - 0.5 * (2 * math.pi * math.e * s2).log()
    return kl.where(var > 0, 0.0).to(mean)


def _log_cosh(u: Tensor) -> Tensor:
    return u.abs() + (-2 * u.abs()).exp().log1p() - math.log(2.0)


def _log_gamma_energy(u: Tensor) -> Tensor:
    """−log p(u) of u = log a, a ~ Gamma(½, 1), up to its constant."""
    return u.exp() - 0.5 * u
