r"""The horseshoe by Gibbs sampling, in double precision.

Owns `horseshoe`. The coefficients of a linear model are drawn from their conditional distribution;
`coefficient_steps.py` has the steps of other families. Imports numpy only. Next: `nuts_chain.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pyro_bmr.estimators.coefficient_steps import FamilySteps, conditional, information
from pyro_bmr.estimators.engines import Options, delta_f, intercepts
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.subset_evidence import Array, Regression

_LEAST, _MOST = 1e-12, 1e12  # scales squared


class _Scales(NamedTuple):
    """λ² of the groups and τ², each with the variable that makes it a mixture."""

    local: Array
    slack: Array
    whole: float
    whole_slack: float


def horseshoe(
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> Average:
    r"""Draws of b_j ~ N(0, σ²τ²λ_g²) with λ_g, τ ~ C⁺(0, 1), one λ for each group; σ² is the noise
    variance, the square of the scale of Student's distribution, or 1.

    Each half-Cauchy is a mixture of inverse gammas, so that all conditionals have names. A group's
    inclusion is the probability that its shrinkage factor κ_g = 1/(1 + Iτ²λ_g²) is below one half,
    I/σ² being the information of the rows on a coefficient. It
    is kept if a 90 % interval of one of its columns excludes 0. Source: Makalic & Schmidt 2016;
    Carvalho, Polson & Scott 2010.
    """
    burn, thin = options.steps // 2, max(1, options.steps // options.draws)
    sizes = np.array([len(columns) for columns in of.groups])
    group = np.empty(int(sizes.sum()), dtype=np.int64)
    for g, columns in enumerate(of.groups):
        group[columns] = g
    if isinstance(of, Regression):
        noise = of.yy / len(of.y)
    else:
        steps, noise = FamilySteps(of), float(getattr(of.family, "scale", 1.0)) ** 2
        place = steps.first()
    known = information(of)
    ones = np.ones(len(sizes))
    scales = _Scales(ones, ones, 1.0 / max(len(group), 1), 1.0)
    draws, noises, shares = [], [], np.zeros(len(sizes))
    for at in range(burn + thin * options.draws):
        var = (scales.whole * scales.local)[group]
        if isinstance(of, Regression):
            mean, deviation = conditional(of, var, noise, rng)
            own, b = np.sqrt(noise / len(of.y)) * rng.standard_normal(1), mean + deviation
        else:
            place = steps.step(place, noise * var, at if at < burn else None, rng)
            own, b = place.intercepts, place.b
        scales = _rescaled(scales, np.bincount(group, b**2, len(sizes)) / noise, sizes, rng)
        if isinstance(of, Regression):
            left = float(((of.y - of.x @ b) ** 2).sum() + (b**2 / var).sum())
            noise = max(float(_inverse_gamma((len(of.y) - 1 + len(b)) / 2, left / 2, rng)), 1e-300)
        if at >= burn and (at - burn) % thin == 0:
            draws.append(np.concatenate([own, b]))
            noises.append(noise)
            shares += known * scales.whole * scales.local > 1
    return _average(of, np.stack(draws), np.array(noises), shares / len(draws))


def _average(
    of: Regression | GeneralisedLinear, draws: Array, noise: Array, inclusion: Array
) -> Average:
    """The average under a prior without zeros: a group is kept if a 90 % interval of one of its
    coefficients excludes 0.
    """
    first = intercepts(of)
    low, high = np.quantile(draws[:, first:], [0.05, 0.95], axis=0)
    away = (low > 0) | (high < 0)
    kept = np.array([bool(away[columns].any()) for columns in of.groups], dtype=np.bool_)
    mean = draws.mean(0)
    if isinstance(of, Regression):
        mean[0] = 0.0
    return Average(
        mean, draws, noise, inclusion, kept, delta_f(of, kept), kept[None], np.ones(1)
    )  # fmt: skip


def _rescaled(scales: _Scales, square: Array, sizes: Array, rng: np.random.Generator) -> _Scales:
    """A Gibbs step of the scales, given Σ b²/σ² of each group."""
    local, slack, whole, whole_slack = scales
    local = _inverse_gamma(0.5 * (sizes + 1), 1 / slack + square / (2 * whole), rng)
    slack = _inverse_gamma(1.0, 1 + 1 / local, rng)
    energy = float((square / local).sum())
    whole = float(_inverse_gamma(0.5 * (sizes.sum() + 1), 1 / whole_slack + energy / 2, rng))
    whole_slack = float(_inverse_gamma(1.0, 1 + 1 / whole, rng))
    return _Scales(local, slack, whole, whole_slack)


def _inverse_gamma(shape: Array | float, rate: Array | float, rng: np.random.Generator) -> Array:
    return np.clip(np.asarray(rate) / rng.gamma(shape, size=np.shape(rate)), _LEAST, _MOST)
