r"""Spike and slab by mean field, for tables with more columns than a search can take.

Owns `mean_field`. Imports numpy and scipy only. Next: `coefficient_steps.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.errors import warn
from pyro_bmr.estimators.engines import Options, delta_f, log_prior
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.model_average import Average
from pyro_bmr.estimators.subset_chain import greedy_start
from pyro_bmr.estimators.subset_evidence import Array, Regression

_SWEEPS = 200
_SETTLED = 1e-4  # change of a probability
_EXPANSIONS = 30


@dataclass(frozen=True)
class Factors:
    r"""q(b, γ) = Π_g q(γ_g) N(b_g; m_g, σ²S_g)^{γ_g}, with 0 where γ_g is 0.

    `inclusion`: (groups,). `mean`: (columns,), m. `factor`: for each group a Cholesky factor of
    S_g = (X_gᵀX_g + I/τ²)⁻¹. `noise`, `slab`: σ² and τ².
    """

    inclusion: Array
    mean: Array
    factor: list[Array]
    noise: float
    slab: float
    settled: bool = False


def mean_field(
    of: Regression | GeneralisedLinear, options: Options, rng: np.random.Generator
) -> Average:
    r"""The mean-field posterior of spike and slab, by coordinate ascent from the model that a
    greedy search finds.

    The noise of a linear model and the slab variance are set to their expected values, and the
    share of kept groups has its Beta prior. A generalised linear model is expanded at the mean, and
    the expansion is repeated until it stands. ΔF is that of the model that is kept, as in a search.
    Intervals are too narrow where columns are correlated. Source: Carbonetto & Stephens 2012,
    section 3.
    """
    kept = greedy_start(of, log_prior(of), np.zeros(len(of.groups), dtype=np.bool_))
    if isinstance(of, Regression):
        found = _ascended(of, _start(of, kept))
        b, noise = _draws(of, found, options.draws, rng)
        own = np.sqrt(noise / len(of.y)) * rng.standard_normal(options.draws)[:, None]
        mean = np.zeros(1)
    else:
        found, eta = _expanded(of, kept)
        at = of.expansion(eta)
        b, _ = _draws(at, found, options.draws, rng)
        wide, ones, target = of.expanded_rows(eta)
        inverse = np.linalg.pinv(ones)
        root = np.linalg.cholesky(inverse @ inverse.T)
        own = inverse @ target - b @ (inverse @ wide).T
        own = own + rng.standard_normal((options.draws, len(root))) @ root.T
        mean = inverse @ (target - wide @ _weighted(at, found))
        noise = 1.0
    if not found.settled:
        warn(f"mean field has not converged in {_SWEEPS} sweeps: columns replace each other")
    kept = found.inclusion > 0.5
    return Average(
        np.concatenate([mean, _weighted(of, found)]),
        np.concatenate([own, b], 1),
        np.full(options.draws, noise),
        found.inclusion,
        kept,
        delta_f(of, kept),
        kept[None],
        np.ones(1),
    )


def _expanded(of: GeneralisedLinear, kept: NDArray[np.bool_]) -> tuple[Factors, Array]:
    """The factors, and the η that the log likelihood is expanded at."""
    eta, k = of.subset(kept).eta(), of.family.predictors
    found: Factors | None = None
    for _ in range(_EXPANSIONS):
        at = of.expansion(eta)
        found = _ascended(at, _start(at, kept) if found is None else found)
        wide, ones, target = of.expanded_rows(eta)
        b = _weighted(at, found)
        own = np.linalg.lstsq(ones, target - wide @ b, rcond=None)[0]
        before, eta = eta, own + of.x @ b.reshape(-1, k)
        if np.abs(eta - before).max() < 1e-3:
            break
    else:
        found = replace(found, settled=False)  # type: ignore[type-var]
    return found, eta  # type: ignore[return-value]


def _start(of: Regression, kept: NDArray[np.bool_]) -> Factors:
    model = of.subset(kept)
    b = np.zeros(of.x.shape[1])
    b[model.columns] = model.mean()
    slab = int(model.log_evidence_by_slab.argmax())
    noise = 1.0 if of.freedom is None else float(model.residual[slab]) / of.freedom
    return Factors(kept.astype(np.float64), b, [], noise, float(of.slabs[slab]))


def _ascended(of: Regression, factors: Factors) -> Factors:
    """Sweeps over the groups, those that are probable first, until no probability changes."""
    for _ in range(_SWEEPS):
        before = factors.inclusion
        factors = _parameters(of, _sweep(of, factors))
        if np.abs(factors.inclusion - before).max() < _SETTLED:
            return replace(factors, settled=True)
    return replace(factors, settled=False)


def _sweep(of: Regression, q: Factors) -> Factors:
    r"""The factors of each group once more, given the others.

    .. math:: m_g = S_g X_g^\top \bigl(y - \sum_{h \ne g} \alpha_h X_h m_h\bigr), \qquad
        \operatorname{logit} \alpha_g = \mathrm{E} \log \tfrac{\pi}{1 - \pi}
        + \tfrac12 \log |S_g / \tau^2| + \tfrac{1}{2\sigma^2} m_g^\top S_g^{-1} m_g
    """
    from scipy.special import digamma

    count = len(of.groups)
    inclusion, mean = q.inclusion.copy(), q.mean.copy()
    factor: list[Array] = [np.empty(0)] * count
    left = of.y - of.x @ _weighted(of, q)
    for size, (chosen, columns, blocks) in of.by_size.items():
        inverse = np.linalg.inv(blocks + np.eye(size) / q.slab)
        roots = np.linalg.cholesky(inverse)
        half_log_det = np.log(roots.diagonal(axis1=1, axis2=2)).sum(1) - 0.5 * size * np.log(q.slab)
        for at in np.argsort(-inclusion[chosen], kind="stable"):
            g, own = int(chosen[at]), columns[at]
            share = inclusion.sum() - inclusion[g]
            odds = digamma(1 + share) - digamma(max(1.0, count**0.5) + count - share)
            part = of.x[:, own]
            signal = part.T @ left + inclusion[g] * (blocks[at] @ mean[own])
            moved = inverse[at] @ signal
            log_odds = odds + half_log_det[at] + 0.5 * float(signal @ moved) / q.noise
            new = 1.0 / (1.0 + np.exp(-np.clip(log_odds, -500, 500)))
            if max(new, inclusion[g]) > 1e-12:
                left -= part @ (new * moved - inclusion[g] * mean[own])
            inclusion[g], mean[own], factor[g] = new, moved, roots[at]
    return replace(q, inclusion=inclusion, mean=mean, factor=factor)


def _parameters(of: Regression, q: Factors) -> Factors:
    """The noise, if it is inferred, and the slab variance at their expected values."""
    sizes = np.array([len(columns) for columns in of.groups])
    trace = np.array([float((root**2).sum()) for root in q.factor])
    square = np.array([float(q.mean[columns] @ q.mean[columns]) for columns in of.groups])
    kept = float(q.inclusion @ sizes)
    slab, noise = q.slab, q.noise
    energy = float(q.inclusion @ (square + noise * trace))
    if of.freedom is not None:
        noise = (_squares_left(of, q) + energy / slab) / (of.freedom + kept)
    if kept > 0.5:
        slab = min(max(energy / (noise * kept), float(of.slabs[0])), float(of.slabs[-1]))
    return replace(q, noise=noise, slab=slab)


def _squares_left(of: Regression, q: Factors) -> float:
    """E ‖y − Xb‖²."""
    total = float(((of.y - of.x @ _weighted(of, q)) ** 2).sum())
    for chosen, columns, blocks in of.by_size.values():
        for at, g in enumerate(chosen.tolist()):
            mean, share = q.mean[columns[at]], q.inclusion[g]
            if share > 1e-12:
                spread = q.noise * float(np.sum((blocks[at] @ q.factor[g]) * q.factor[g]))
                around = float(mean @ blocks[at] @ mean)
                total += share * (spread + around) - share**2 * around
    return total


def _weighted(of: Regression | GeneralisedLinear, q: Factors) -> Array:
    """E[b]."""
    weight = np.empty(len(q.mean))
    for g, columns in enumerate(of.groups):
        weight[columns] = q.inclusion[g]
    return weight * q.mean


def _draws(of: Regression, q: Factors, count: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Draws of b, (count, columns), and the noise variance."""
    b = np.zeros((count, len(q.mean)))
    for g, columns in enumerate(of.groups):
        kept = np.nonzero(rng.random(count) < q.inclusion[g])[0]
        if len(kept):
            white = rng.standard_normal((len(kept), len(columns)))
            b[kept[:, None], columns] = q.mean[columns] + q.noise**0.5 * white @ q.factor[g].T
    return b, q.noise
