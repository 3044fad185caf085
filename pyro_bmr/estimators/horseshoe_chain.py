r"""The horseshoe of a linear model by Gibbs sampling, in double precision.

Owns `horseshoe`. Imports numpy only. Next: `table_model.py`.
"""

from __future__ import annotations

import numpy as np

from pyro_bmr.estimators.engines import Options, delta_f
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.subset_evidence import Array, Regression

_LEAST, _MOST = 1e-12, 1e12  # scales squared


def horseshoe(of: Regression, options: Options, rng: np.random.Generator) -> Average:
    r"""Draws of b_j ~ N(0, σ²τ²λ_g²) with λ_g, τ ~ C⁺(0, 1), one λ for each group.

    Each half-Cauchy is a mixture of inverse gammas, so that all conditionals have names. A group's
    inclusion is the probability that its shrinkage factor κ_g = 1/(1 + nτ²λ_g²) is below one half.
    It is kept if a 90 % interval of one of its columns excludes 0. Source: Makalic & Schmidt
    2016; Carvalho, Polson & Scott 2010.
    """
    rows, size = of.x.shape
    sizes = np.array([len(columns) for columns in of.groups])
    group = np.empty(size, dtype=np.int64)
    for g, columns in enumerate(of.groups):
        group[columns] = g
    local, slack = np.ones(len(sizes)), np.ones(len(sizes))
    whole, whole_slack, noise = 1.0 / max(size, 1), 1.0, of.yy / rows
    burn, thin = options.steps // 2, max(1, options.steps // options.draws)
    draws, noises, shares = [], [], np.zeros(len(sizes))
    for step in range(burn + thin * options.draws):
        b = _coefficients(of, (whole * local)[group], noise, rng)
        square = np.bincount(group, b**2, len(sizes))
        local = _inverse_gamma(0.5 * (sizes + 1), 1 / slack + square / (2 * whole * noise), rng)
        slack = _inverse_gamma(1.0, 1 + 1 / local, rng)
        energy = float((square / local).sum())
        whole = float(_inverse_gamma(0.5 * (size + 1), 1 / whole_slack + energy / (2 * noise), rng))
        whole_slack = float(_inverse_gamma(1.0, 1 + 1 / whole, rng))
        left = float(((of.y - of.x @ b) ** 2).sum()) + energy / whole
        noise = max(float(_inverse_gamma(0.5 * (rows - 1 + size), left / 2, rng)), 1e-300)
        if step >= burn and (step - burn) % thin == 0:
            draws.append(b)
            noises.append(noise)
            shares += rows * whole * local > 1
    found, noise_draws = np.stack(draws), np.array(noises)
    inclusion = shares / len(draws)
    intercept = np.sqrt(noise_draws / rows) * rng.standard_normal(len(draws))
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    kept = np.bincount(group, (low > 0) | (high < 0), len(sizes)) > 0
    return Average(
        np.concatenate([[0.0], found.mean(0)]),
        np.concatenate([intercept[:, None], found], 1),
        noise_draws,
        inclusion,
        kept,
        delta_f(of, kept),
        kept[None],
        np.ones(1),
    )


def _coefficients(of: Regression, var: Array, noise: float, rng: np.random.Generator) -> Array:
    """A draw of N(A⁻¹Xᵀy, σ²A⁻¹), A = XᵀX + diag(1/var), by a factor of the smaller of A and
    XXᵀ. Source: Rue 2001; Bhattacharya, Chakraborty & Mallick 2016.
    """
    rows, size = of.x.shape
    if size <= rows:
        root = np.sqrt(var)  # A = R⁻¹(RXᵀXR + I)R⁻¹ for R = diag(root)
        factor = np.linalg.cholesky(of.gram * root[:, None] * root + np.eye(size))
        white = np.linalg.solve(factor, root * of.xy) + np.sqrt(noise) * rng.standard_normal(size)
        return root * np.linalg.solve(factor.T, white)
    prior = np.sqrt(var) * rng.standard_normal(size)
    scaled = of.x * var
    right = of.y / np.sqrt(noise) - of.x @ prior - rng.standard_normal(rows)
    change = np.linalg.solve(scaled @ of.x.T + np.eye(rows), right)
    return np.sqrt(noise) * (prior + scaled.T @ change)


def _inverse_gamma(shape: Array | float, rate: Array | float, rng: np.random.Generator) -> Array:
    return np.clip(np.asarray(rate) / rng.gamma(shape, size=np.shape(rate)), _LEAST, _MOST)
