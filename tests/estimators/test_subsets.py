"""The evidence of subsets, against dense matrices, quadrature and enumeration."""

import itertools

import numpy as np
import pytest
from scipy import integrate, stats

from pyro_bmr.estimators.coefficient_steps import conditional
from pyro_bmr.estimators.count_families import Poisson
from pyro_bmr.estimators.engines import Options, delta_f, gaussian
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.subset_chain import greedy_start, log_size_prior, subset_chain
from pyro_bmr.estimators.subset_evidence import Regression

GROUPS = [np.array([0]), np.array([1, 2]), np.array([3]), np.array([4, 5, 6]), np.array([7])]
SLABS = np.array([0.3, 4.0])
LOG_PRIOR = np.log([0.4, 0.6])


def regression(freedom, rows=15, seed=3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 8)) + rng.standard_normal((rows, 1))
    y = 0.8 * x[:, 0] - 0.5 * x[:, 2] + 0.7 * x[:, 5] + 1.3 * rng.standard_normal(rows)
    return Regression(x, y, GROUPS, SLABS, LOG_PRIOR, freedom)


def by_quadrature(of, kept):
    """log ∫ N(y; 0, σ²(I + τ²XXᵀ)) dσ²/σ² of the model, averaged over the slabs."""
    columns = np.concatenate([of.groups[g] for g in np.nonzero(kept)[0]])
    total = 0.0
    for slab, weight in zip(of.slabs, np.exp(of.log_slab_prior), strict=True):
        cov = np.eye(len(of.y)) + slab * of.x[:, columns] @ of.x[:, columns].T

        def density(log_var, cov=cov):
            return stats.multivariate_normal.pdf(of.y, cov=np.exp(log_var) * cov)

        total += weight * integrate.quad(density, -4, 5, epsabs=0, epsrel=1e-9)[0]
    return np.log(total)


def by_covariance(of, kept):
    """The same up to a constant, by the covariance of the rows and ∫ exp(−q/2σ²) dσ²/σ^(2+n)."""
    part, terms = of.x[:, np.concatenate([of.groups[g] for g in np.nonzero(kept)[0]])], []
    for slab, log_weight in zip(of.slabs, of.log_slab_prior, strict=True):
        cov = np.eye(len(of.y)) + slab * part @ part.T
        q = of.y @ np.linalg.solve(cov, of.y)
        terms.append(log_weight - 0.5 * np.linalg.slogdet(cov)[1] - 0.5 * len(of.y) * np.log(q))
    return np.logaddexp.reduce(terms)


def test_evidence_is_the_integral_over_the_noise():
    of = regression(15.0)
    one, other = np.array([1, 1, 0, 1, 0], bool), np.array([0, 0, 1, 1, 1], bool)
    exact = by_quadrature(of, one) - by_quadrature(of, other)
    assert abs(of.subset(one).log_evidence - of.subset(other).log_evidence - exact) < 1e-7


@pytest.mark.parametrize("freedom", [14.0, None])
def test_neighbours_are_the_evidence_of_the_neighbours(freedom):
    of = regression(freedom)
    for kept in (np.array([0, 1, 0, 1, 0], bool), np.array([1, 0, 1, 0, 1], bool)):
        flipped = kept ^ np.eye(5, dtype=bool)
        exact = [of.subset(other).log_evidence for other in flipped]
        np.testing.assert_allclose(of.subset(kept).neighbours(), exact, rtol=0, atol=1e-9)
        sign = np.where(kept, 1, -1)
        change = sign * (np.array(exact) - of.subset(kept).log_evidence)
        np.testing.assert_allclose(delta_f(of, kept), change, atol=1e-9)


def test_moments_and_draws_of_a_subset():
    of = regression(15.0)
    model = of.subset(np.array([1, 1, 0, 0, 1], bool))
    x, means, covs = of.x[:, model.columns], [], []
    for slab in SLABS:
        inverse = np.linalg.inv(x.T @ x + np.eye(4) / slab)
        mean = inverse @ x.T @ of.y
        left = of.y @ (of.y - x @ mean)
        means.append(mean)
        covs.append(inverse * left / (15.0 - 2.0))
    weights = model.slab_weights
    mean = weights @ np.array(means)
    apart = np.array(means) - mean
    cov = np.einsum("t,tij->ij", weights, np.array(covs)) + (weights[:, None] * apart).T @ apart
    np.testing.assert_allclose(model.mean(), mean, atol=1e-12)
    draws, noise = model.draw(40_000, np.random.default_rng(0))
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * np.sqrt(cov.max() / 40_000))
    np.testing.assert_allclose(np.cov(draws.T), cov, atol=0.03 * cov.max())
    exact = sum(
        w * float(of.y @ (of.y - x @ m)) / 13.0 for w, m in zip(weights, means, strict=True)
    )
    assert abs(noise.mean() / exact - 1) < 0.02
    plug_in = model.gaussian()
    best = int(weights.argmax())
    np.testing.assert_allclose(plug_in[0], means[best], atol=1e-12)
    np.testing.assert_allclose(plug_in[1], covs[best] * 13.0 / 15.0, atol=1e-12)
    assert plug_in[2] == pytest.approx(SLABS[best] * covs[best][0, 0] * 13 / 15 / np.linalg.inv(
        x.T @ x + np.eye(4) / SLABS[best])[0, 0])  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_search_of_a_full_model_ends_at_the_best_of_all_subsets(seed):
    """The gains are those of the exact evidence, the noise and the slab integrated out, and no
    subset has more of it.
    """
    of = regression(15.0, seed=seed)
    found = gaussian(of, Options(0, 10), np.random.default_rng(0))
    full = int(found.models.all(1).nonzero()[0][0])
    every = [np.array(m, bool) for m in itertools.product([0, 1], repeat=5) if any(m)]
    exact = {m.tobytes(): by_covariance(of, m) for m in every}
    gain = np.log(found.probability[0] / found.probability[full])
    assert abs(gain - exact[found.kept.tobytes()] + exact[np.ones(5, bool).tobytes()]) < 1e-6
    assert exact[found.kept.tobytes()] == max(exact.values())
    visited = [exact[m.tobytes()] for m in found.models if m.any()]
    share = np.exp(np.array(visited) - np.logaddexp.reduce(visited))
    ours = found.probability[found.models.any(1)]
    np.testing.assert_allclose(ours / ours.sum(), share, atol=1e-6)
    np.testing.assert_allclose(found.inclusion, found.probability @ found.models, atol=1e-12)


def test_the_size_prior_is_a_beta_binomial():
    prior = log_size_prior(6, (1.5, 3.0))
    for size in (0, 2, 6):
        exact = integrate.quad(
            lambda share, k=size: share**k * (1 - share) ** (6 - k) * stats.beta.pdf(share, 1.5, 3),
            0,
            1,
        )[0]
        assert prior[size] == pytest.approx(np.log(exact), abs=1e-9)


def test_a_walk_has_the_inclusions_of_the_enumeration():
    of, prior = regression(29.0, 30), log_size_prior(5, (1.0, 2.0))
    models = np.array(list(itertools.product([False, True], repeat=5)))
    log_weight = np.array([of.subset(m).log_evidence + prior[m.sum()] for m in models])
    weight = np.exp(log_weight - log_weight.max())
    exact = weight / weight.sum() @ models
    empty = np.zeros(5, bool)
    visits = subset_chain(of, prior, 800, np.random.default_rng(0), [empty, ~empty])
    assert exact.max() - exact.min() > 0.2 and np.abs(visits.inclusion - exact).max() < 0.05
    assert np.abs(visits.probability @ visits.models - exact).max() < 0.1
    found = greedy_start(of, prior, empty)
    here = {m.tobytes(): weight for m, weight in zip(models, log_weight, strict=True)}
    around = [here[(found ^ row).tobytes()] for row in np.eye(5, dtype=bool)]
    assert here[found.tobytes()] > max(around)


def counts():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((60, 3))
    y = rng.poisson(np.exp(2.0 + 0.3 * x[:, 0])).astype(float)
    slabs = np.array([0.2, 1.0])
    groups = [np.array([j]) for j in range(3)]
    return GeneralisedLinear(Poisson(), x - x.mean(0), y, groups, slabs, np.log([0.5, 0.5]))


def test_laplace_evidence_is_close_to_the_integral():
    of = counts()
    family = of.family
    with_it, without = np.array([True, False, False]), np.zeros(3, bool)
    a = np.linspace(1.5, 2.5, 161)
    b = np.linspace(-0.2, 0.8, 161)
    alone = np.array([family.log_density(np.full((60, 1), value), of.y).sum() for value in a])
    eta = (a[:, None, None] + b[:, None] * of.x[:, 0])[..., None]
    both = family.log_density(eta, of.y).sum(-1)
    total = 0.0
    for slab in of.slabs:
        total += 0.5 * np.exp(both - alone.max() + stats.norm.logpdf(b, 0, slab**0.5)).sum()
    exact = np.log(total * (b[1] - b[0]) / np.exp(alone - alone.max()).sum())
    # the constant √2π of b cancels that of its prior
    found = of.subset(with_it).log_evidence - of.subset(without).log_evidence
    assert abs(found - exact) < 0.01 < abs(exact)


def test_neighbours_of_a_generalised_model():
    of = counts()
    kept = np.array([True, True, False])
    found = of.subset(kept).neighbours()
    exact = [of.subset(kept ^ row).log_evidence for row in np.eye(3, dtype=bool)]
    np.testing.assert_allclose(found[:2], exact[:2], atol=1e-6)
    assert abs(found[2] - exact[2]) < 0.1
    at_mode = of.expansion(of.subset(kept).eta()).subset(kept)
    mean, cov, _ = of.subset(kept).gaussian()
    np.testing.assert_allclose(at_mode.gaussian()[0], mean, atol=1e-5)
    np.testing.assert_allclose(at_mode.gaussian()[1], cov, rtol=1e-4)


@pytest.mark.parametrize("rows", [6, 12])
def test_coefficients_of_the_horseshoe_by_either_factor(rows):
    of = regression(None, rows)
    var, noise = np.array([0.1, 2.0, 0.5, 1.0, 3.0, 0.2, 1.5, 0.7]), 1.7
    inverse = np.linalg.inv(of.x.T @ of.x + np.diag(1 / var))
    rng = np.random.default_rng(2)
    parts = [conditional(of, var, noise, rng) for _ in range(2500)]
    np.testing.assert_allclose(parts[0][0], inverse @ of.xy, atol=1e-9)
    draws = np.stack([mean + deviation for mean, deviation in parts])
    np.testing.assert_allclose(draws.mean(0), inverse @ of.xy, atol=0.2)
    np.testing.assert_allclose(np.cov(draws.T), noise * inverse, atol=0.35)
