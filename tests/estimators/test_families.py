"""Families: densities beside scipy, derivatives beside differences and expectations, draws, and the
library's own likelihoods.
"""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pyro_bmr import likelihoods
from pyro_bmr.estimators.class_families import Bernoulli, Categorical, Ordinal, equal_gaps
from pyro_bmr.estimators.columns import contrasts
from pyro_bmr.estimators.count_families import NegativeBinomial, Poisson
from pyro_bmr.estimators.real_families import Normal, StudentT

LOG_EXPOSURE = np.array([0.7, -0.4, 0.2, 1.1])
GAPS = np.array([0.6, 1.7])
COUNTS = np.array([0.0, 2.0, 1.0, 3.0])
REALS = np.array([0.3, -2.0, 1.4, 7.0])
OBSERVED = [
    (Bernoulli(), COUNTS > 1.5),
    (Poisson(LOG_EXPOSURE), COUNTS),
    (NegativeBinomial(1.7, log_exposure=LOG_EXPOSURE), COUNTS),
    (Categorical(contrasts(4)), COUNTS),
    (Ordinal(GAPS), COUNTS),
    (Normal(1.9), REALS),
    (StudentT(0.8, 3.3), REALS),
]


def of(family, seed=1):
    return np.random.default_rng(seed).standard_normal((4, family.predictors))


@pytest.mark.parametrize(("family", "y"), OBSERVED, ids=lambda v: type(v).__name__)
def test_gradient_and_curvature(family, y):
    y, eta = np.asarray(y, float), of(family)
    gradient, curvature = family.derivatives(eta, y)
    step = 1e-5
    for k in range(family.predictors):
        moved = np.zeros_like(eta)
        moved[:, k] = step
        up, down = (family.log_density(eta + sign * moved, y) for sign in (1, -1))
        np.testing.assert_allclose(gradient[:, k], (up - down) / (2 * step), atol=1e-7)
        slopes = [family.derivatives(eta + sign * moved, y)[0] for sign in (1, -1)]
        if not isinstance(family, StudentT):
            slope = (slopes[1] - slopes[0]) / (2 * step)
            np.testing.assert_allclose(curvature[:, k], slope, atol=1e-7)


def test_curvature_of_student_is_the_expected_one():
    family = StudentT(0.8, 3.3)

    def square(y):
        slope = family.derivatives(np.array([[0.4]]), np.array([y]))[0][0, 0]
        return slope**2 * stats.t.pdf((y - 0.4) / 0.8, 3.3) / 0.8

    exact = integrate.quad(square, -np.inf, np.inf)[0]
    assert family.derivatives(of(family), REALS)[1][2, 0, 0] == pytest.approx(exact, rel=1e-6)


def test_densities_are_those_of_scipy():
    mu = np.exp(of(Poisson())[:, 0] + LOG_EXPOSURE)
    eta = of(Poisson())
    near = {"rtol": 0, "atol": 1e-12}
    np.testing.assert_allclose(
        Poisson(LOG_EXPOSURE).log_density(eta, COUNTS), stats.poisson.logpmf(COUNTS, mu), **near
    )
    np.testing.assert_allclose(
        NegativeBinomial(1.7, log_exposure=LOG_EXPOSURE).log_density(eta, COUNTS),
        stats.nbinom.logpmf(COUNTS, 1.7, 1.7 / (1.7 + mu)),
        **near,
    )
    np.testing.assert_allclose(
        StudentT(0.8, 3.3).log_density(eta, REALS),
        stats.t.logpdf(REALS, 3.3, eta[:, 0], 0.8),
        **near,
    )
    np.testing.assert_allclose(
        Normal(1.9).log_density(eta, REALS), stats.norm.logpdf(REALS, eta[:, 0], 1.9**0.5), **near
    )


def test_ordered_classes_are_those_of_the_likelihood():
    family = Ordinal(GAPS)
    eta = of(family)
    cuts = torch.as_tensor(np.concatenate([[0.0], GAPS.cumsum()]))
    exact = likelihoods.ordinal.log_probs(torch.as_tensor(eta[:, 0]), cuts).numpy()
    np.testing.assert_allclose(np.log(family.probabilities(eta)), exact, atol=1e-12)
    np.testing.assert_allclose(
        family.log_density(eta, COUNTS), exact[np.arange(4), COUNTS.astype(int)], atol=1e-12
    )
    middle = np.array([[-np.log(1 / 4)]]) + np.log(3 / 4)  # c_0 = 0 is below a quarter
    equal = Ordinal(equal_gaps(4)).probabilities(middle)
    np.testing.assert_allclose(equal, 0.25, atol=1e-12)


@pytest.mark.parametrize(
    "family",
    [Poisson(LOG_EXPOSURE), NegativeBinomial(1.7, log_exposure=LOG_EXPOSURE), Normal(1.9),
     StudentT(0.8, 9.0)],
)  # fmt: skip
def test_draws_have_mean_and_variance(family):
    eta = np.broadcast_to(of(family), (40_000, 4, 1))
    draws = family.draw(eta, np.random.default_rng(0))
    mean, var = family.mean(eta[0]), family.variance(eta[0])
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * np.sqrt(var.max() / 40_000))
    np.testing.assert_allclose(draws.var(0), var, rtol=0.08)


@pytest.mark.parametrize(
    ("family", "site", "exact"),
    [
        (NegativeBinomial(1.7), "concentration", lambda v: np.log([v])),
        (StudentT(0.8, 3.3, ("df",)), "df", lambda v: np.log([v])),
        (Ordinal(GAPS), "gaps", np.log),
    ],
)
def test_priors_of_parameters_are_those_of_the_likelihoods(family, site, exact):
    import pyro

    likelihood = {
        "concentration": likelihoods.NegativeBinomial(),
        "df": likelihoods.StudentT(noise=1.0),
        "gaps": likelihoods.Ordinal(4),
    }[site]
    program = pyro.poutine.trace(likelihood.observe)
    y = torch.tensor([0.0, 1.0])
    prior = program.get_trace(torch.zeros(2, dtype=torch.float64), y).nodes[site]["fn"]

    def log_prior(value):  # of the log of the parameter
        value = torch.as_tensor(value)
        return float(prior.log_prob(value.squeeze()) + value.log().sum())

    first, second = family.parameters, family.parameters + 0.9
    gain = family.at(second).log_prior() - family.log_prior()
    np.testing.assert_allclose(first, exact(np.exp(first).squeeze()).ravel())
    assert gain == pytest.approx(log_prior(np.exp(second)) - log_prior(np.exp(first)), abs=1e-9)
