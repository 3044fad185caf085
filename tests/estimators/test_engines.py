"""Engines beside quadrature, dense algebra and each other."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import digamma, logit

import pyro_bmr as bmr
from pyro_bmr.estimators.class_families import Bernoulli, Ordinal, equal_gaps
from pyro_bmr.estimators.engine_choice import WIDEST_SEARCH, engine_of
from pyro_bmr.estimators.engines import (
    Options,
    generalised_model,
    most_probable,
    with_family,
)
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.horseshoe_chain import horseshoe
from pyro_bmr.estimators.mean_field_subsets import _draws, _squares_left, mean_field
from pyro_bmr.estimators.real_families import StudentT
from pyro_bmr.estimators.subset_evidence import Regression


def half_cauchy_product(b):
    """The density of N(0, s²) at b with s = λτ, both C⁺(0, 1): p(s) = 4 log s / (π² (s² − 1))."""
    s = np.exp(np.linspace(-14, 14, 4000))
    density = 4 / np.pi**2 * np.log(s) / (s**2 - 1)
    return (stats.norm.pdf(b[:, None], 0, s) * density * s).sum(1) * 28 / 3999


@pytest.mark.slow  # 14,000 sweeps of a chain; the engines agree on smaller ones below
def test_the_horseshoe_of_a_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    x -= x.mean()
    y = (1.2 * x + 0.5 + rng.logistic(size=30) > 0).astype(float)
    of = generalised_model(Bernoulli(), x[:, None], y, [np.array([0])])
    found = horseshoe(of, Options(2000, 12_000), np.random.default_rng(1))
    own, b = np.linspace(-3, 4, 141), np.linspace(-2, 7, 700)
    eta = (own[:, None, None] + b[:, None] * x)[..., None]
    height = np.exp(Bernoulli().log_density(eta, y).sum(-1)) * half_cauchy_product(b)
    weight = height / height.sum()
    mean = np.array([weight.sum(1) @ own, weight.sum(0) @ b])
    sd = np.sqrt([weight.sum(1) @ (own - mean[0]) ** 2, weight.sum(0) @ (b - mean[1]) ** 2])
    np.testing.assert_allclose(found.draws.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(found.draws.std(0), sd, atol=0.06)
    low = weight.sum(0).cumsum()
    assert np.quantile(found.draws[:, 1], 0.1) == pytest.approx(b[low.searchsorted(0.1)], abs=0.1)


def orthogonal(freedom):
    rng = np.random.default_rng(3)
    scales = np.array([1.0, 2.0, 0.5, 1.5, 0.8])
    x = np.linalg.qr(rng.standard_normal((40, 5)))[0] * scales * 5
    y = x @ np.array([0.6, 0.0, -1.0, 0.3, 0.05]) + rng.standard_normal(40)
    groups = [np.array([0]), np.array([1, 2]), np.array([3]), np.array([4])]
    return Regression(x, y, groups, np.array([0.7]), np.zeros(1), freedom)


def test_mean_field_has_the_bayes_factors_of_independent_groups():
    of = orthogonal(None)
    found = mean_field(of, Options(4, 4000), np.random.default_rng(0))
    for g, columns in enumerate(of.groups):
        x = of.x[:, columns]
        with_it = stats.multivariate_normal.logpdf(of.y, cov=np.eye(40) + 0.7 * x @ x.T)
        factor = with_it - stats.multivariate_normal.logpdf(of.y, cov=np.eye(40))
        share = found.inclusion.sum() - found.inclusion[g]
        odds = digamma(1 + share) - digamma(2 + 4 - share)
        assert logit(found.inclusion[g]) == pytest.approx(odds + factor, abs=1e-3)
        inverse = np.linalg.inv(x.T @ x + np.eye(len(columns)) / 0.7)
        mean = found.inclusion[g] * inverse @ x.T @ of.y
        np.testing.assert_allclose(found.mean[1 + columns], mean, atol=1e-3)
        drawn = found.draws[:, 1 + columns]
        kept = drawn[(drawn != 0).all(1)]
        assert len(kept) / 4000 == pytest.approx(found.inclusion[g], abs=0.03)
        np.testing.assert_allclose(np.cov(kept.T), inverse.squeeze(), atol=0.02)


def test_the_noise_of_mean_field_is_its_expected_value(monkeypatch):
    from pyro_bmr.estimators import mean_field_subsets

    of = orthogonal(39.0)
    seen = []
    kept = mean_field_subsets._ascended

    def spy(*arguments):
        seen.append(kept(*arguments))
        return seen[-1]

    monkeypatch.setattr(mean_field_subsets, "_ascended", spy)
    mean_field(of, Options(4, 10), np.random.default_rng(0))
    q = seen[-1]
    b, _ = _draws(of, q, 40_000, np.random.default_rng(1))
    squares = ((of.y - b @ of.x.T) ** 2).sum(1).mean()
    assert _squares_left(of, q) == pytest.approx(squares, rel=3e-3)
    sizes = np.array([1, 2, 1, 1])
    exact = (squares + (b**2).sum(1).mean() / q.slab) / (39 + q.inclusion @ sizes)
    assert q.noise == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("family", [StudentT(), Ordinal(equal_gaps(3))])
def test_parameters_maximise_the_evidence(family):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((70, 2))
    x -= x.mean(0)
    y = x[:, 0] + rng.standard_t(4, 70)
    if isinstance(family, Ordinal):
        y = np.digitize(y, [-1.0, 0.4]).astype(float)
    of = GeneralisedLinear(
        family, x, y, [np.array([0]), np.array([1])], family.slabs, np.log(family.slabs * 0 + 0.2)
    )
    model = of.subset(np.array([True, False]))
    best = most_probable(of, model)

    def height(parameters):
        there = with_family(of, family.at(parameters))
        return there.subset(model.kept).log_evidence + there.family.log_prior()

    top = height(best.family.parameters)
    assert top > height(family.parameters)
    for k in range(len(family.parameters)):
        for sign in (1, -1):
            moved = best.family.parameters.copy()
            moved[k] += 0.15 * sign
            assert height(moved) < top


def test_the_default_is_chosen_by_the_size():
    assert engine_of("spike-and-slab", None, WIDEST_SEARCH[True], True) == "search"
    assert engine_of("spike-and-slab", None, WIDEST_SEARCH[True] + 1, True) == "mean-field"
    assert engine_of("spike-and-slab", None, WIDEST_SEARCH[False] + 1, False) == "mean-field"
    assert engine_of("spike-and-slab", "search", 10**6, True) == "search"
    assert engine_of("horseshoe", None, 5, False) == "gibbs"
    with pytest.raises(ValueError, match="engine: expected None or one of gibbs for prior='horse"):
        engine_of("horseshoe", "nuts", 5, True)
    with pytest.raises(ValueError, match="at most 2000 columns"):
        engine_of("gaussian", None, 2001, True)


def rows(count=60, seed=5):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.standard_normal((count, 3)), columns=["a", "b", "c"])
    return table, rng


@pytest.mark.parametrize(
    "family",
    [
        "normal",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("student-t", "poisson", "ordinal")),
    ],
)
def test_engines_agree_on_an_independent_design(family):
    table, rng = rows(200)
    eta = 0.8 * table["a"].to_numpy()
    estimator, options = bmr.SparseRegressor, {"family": family}
    if family == "ordinal":
        estimator, y = bmr.SparseClassifier, np.digitize(eta + rng.logistic(size=200), [-1, 0.5])
    elif family == "poisson":
        y = rng.poisson(np.exp(0.5 + eta))
    else:
        y = eta + rng.standard_t(5, 200)
    one = estimator(steps=40, draws=1000, **options).fit(table, y)
    other = estimator(engine="mean-field", draws=1000, **options).fit(table, y)
    third = estimator(prior="horseshoe", steps=600, draws=1000, **options).fit(table, y)
    assert repr(other).endswith("fitted by mean-field")
    assert other.summary().attrs["engine"] == "mean-field"
    sd = one.coef_draws_[:, 0].std()
    for model in (other, third):
        assert model.kept_[0] and model.inclusion_[0] > 0.9
        assert abs(model.coef_[0] - one.coef_[0]) < 0.4 * sd
        assert model.coef_draws_[:, 0].std() == pytest.approx(sd, rel=0.15)
        assert abs(model.intercept_ - one.intercept_) < 0.6 * one.intercept_draws_.std()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:site 'b'")
@pytest.mark.parametrize("family", ["normal", "student-t", "negative-binomial", "ordinal", "three"])
def test_nuts_beside_the_other_engines(family):
    table, rng = rows(100)
    eta = 0.8 * table["a"].to_numpy()
    options = {"prior": "gaussian", "steps": 150, "draws": 400}
    estimator = bmr.SparseRegressor
    if family in ("ordinal", "three"):
        estimator, y = bmr.SparseClassifier, np.digitize(eta + rng.logistic(size=100), [-1, 0.5])
    elif family == "negative-binomial":
        table = table.assign(years=rng.uniform(0.5, 3, 100))
        y = rng.poisson(table["years"] * np.exp(0.5 + eta) * rng.gamma(3, 1 / 3, 100))
        options["family"] = bmr.NegativeBinomial(exposure="years")
    else:
        y = eta + rng.standard_t(5, 100)
    if family != "three" and "family" not in options:
        options["family"] = family
    one = estimator(**options).fit(table, y)
    other = estimator(engine="nuts", **options).fit(table, y)
    assert repr(other).endswith("fitted by nuts")
    sd = one.coef_draws_.std(0)
    assert (np.abs(other.coef_ - one.coef_) < 0.35 * sd).all()
    np.testing.assert_allclose(other.coef_draws_.std(0), sd, rtol=0.3)
    assert (other.kept_ == one.kept_).all() and one.kept_.any()
    spread = one.intercept_draws_.std(0)
    assert (np.abs(other.intercept_ - one.intercept_) < 0.35 * spread).all()
