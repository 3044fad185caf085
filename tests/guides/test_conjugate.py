"""Guides against a conjugate posterior and its exact log evidence."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats

import pyro_bmr as bmr
from tests.exact import LinearGaussian, linear_gaussian

PRIOR_MEAN, PRIOR_SCALE, NOISE = 0.4, 1.3, 0.7


def program(x, y=None):
    w = pyro.sample(
        "w",
        dist.Normal(torch.full((x.shape[1],), PRIOR_MEAN, dtype=x.dtype), PRIOR_SCALE).to_event(1),
    )
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def orthogonal_problem(d=4):
    """Orthogonal regressors of different lengths: the exact posterior factorises, so mean field can
    be exact.
    """
    base = linear_gaussian(seed=6, n=30, d=d, noise=NOISE)
    basis = np.linalg.qr(base.x)[0] * np.array([3.0, 5.0, 8.0, 2.0])[:d]
    rng = np.random.default_rng(1)
    return LinearGaussian(
        basis, basis @ np.array([1.2, 0.0, -0.4, 0.8])[:d] + NOISE * rng.normal(size=30), NOISE
    )


def tensors(model):
    return torch.tensor(model.x), torch.tensor(model.y)


def prior(d):
    return np.full(d, PRIOR_MEAN), PRIOR_SCALE**2 * np.eye(d)


def fit(guide, model, epochs=1500, **kwargs):
    return bmr.fit(
        program,
        tensors(model),
        guide=guide,
        epochs=epochs,
        batch_size=1000,
        optimizer=bmr.adam(0.03),
        seed=3,
        progress=False,
        **kwargs,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide",
    [pytest.param(bmr.MeanField, id="MeanField"), pytest.param(AutoNormal, id="AutoNormal")],
)
def test_a_factorised_posterior_is_recovered_with_its_evidence(guide):
    model = orthogonal_problem()
    mean, cov = model.posterior(*prior(4))
    result = fit(guide, model)
    site = result.posterior["w"]
    np.testing.assert_allclose(site.mean, mean, atol=0.03)
    np.testing.assert_allclose(site.var.sqrt(), np.sqrt(np.diag(cov)), rtol=0.06)
    exact = model.log_evidence(*prior(4))
    assert result.history["elbo"].tail(300).mean() == pytest.approx(exact, abs=0.12)


def test_the_elbo_at_the_exact_posterior_is_the_log_evidence():
    """No optimisation: the conjugate posterior put into the guide, the expectation over many draws,
    within 4 standard errors.
    """
    model = orthogonal_problem()
    mean, cov = model.posterior(*prior(4))
    guide = bmr.MeanField(program, *tensors(model))
    with torch.no_grad():
        guide.loc.copy_(torch.tensor(mean))
        guide.log_scale.copy_(torch.tensor(np.diag(cov)).sqrt().log())
        terms = [bmr.fitting.elbo_terms(program, guide, *tensors(model)) for _ in range(600)]
    likelihood = np.array([float(t.expected_log_likelihood) for t in terms])
    kl = np.array([float(t.kl) for t in terms])
    assert kl.std() == pytest.approx(0, abs=1e-9)  # closed form: no sampling noise
    error = likelihood.std() / math.sqrt(len(terms))
    assert abs(likelihood.mean() - kl.mean() - model.log_evidence(*prior(4))) < 4 * error


@pytest.mark.slow  # of the natural gradient it is in the fast suite
def test_mean_field_on_correlated_regressors_finds_its_known_optimum():
    """The optimum of a factorised q against N(μ, P⁻¹) has mean μ and variances 1/P_ii, which are
    too small.
    """
    model = linear_gaussian(seed=4, n=40, d=3, noise=NOISE)
    mean, cov = model.posterior(*prior(3))
    site = fit(bmr.MeanField, model).posterior["w"]
    np.testing.assert_allclose(site.mean, mean, atol=0.05)
    np.testing.assert_allclose(site.var, 1 / np.diag(np.linalg.inv(cov)), rtol=0.12)


@pytest.mark.slow
def test_point_finds_the_mode_and_has_no_variance():
    model = linear_gaussian(seed=4, n=40, d=3, noise=NOISE)
    site = fit(bmr.Point, model, epochs=400).posterior["w"]
    np.testing.assert_allclose(site.mean, model.posterior(*prior(3))[0], atol=1e-3)
    assert (site.var == 0).all()


@pytest.mark.slow
def test_mini_batches_and_the_plate_scale_the_likelihood_to_all_rows():
    """A twentieth of the rows at a time, the same posterior: N comes from the data, never from the
    caller.
    """
    model = orthogonal_problem()
    x, y = (t.repeat(4, *[1] * (t.ndim - 1)) for t in tensors(model))
    repeated = LinearGaussian(x.numpy(), y.numpy(), NOISE)
    mean, cov = repeated.posterior(*prior(4))
    site = bmr.fit(
        program, (x, y), epochs=300, batch_size=24, optimizer=bmr.adam(0.03), progress=False
    ).posterior["w"]
    np.testing.assert_allclose(site.mean, mean, atol=0.03)
    np.testing.assert_allclose(site.var.sqrt(), np.sqrt(np.diag(cov)), rtol=0.15)


@pytest.mark.slow  # a tempered fit is in test_fit.py
def test_temperature_counts_the_data_n_over_t_times():
    model = orthogonal_problem()
    cold = LinearGaussian(model.x, model.y, NOISE * 0.25**0.5)
    mean, cov = cold.posterior(*prior(4))
    site = fit(bmr.MeanField, model, temperature=0.25).posterior["w"]
    np.testing.assert_allclose(site.mean, mean, atol=0.03)
    np.testing.assert_allclose(site.var.sqrt(), np.sqrt(np.diag(cov)), rtol=0.06)


@pytest.mark.slow
def test_positive_sites_are_log_normal_in_value():
    """A Gamma-Poisson rate: the log-normal guide's mean is near the conjugate one."""

    def poisson(x, y=None):
        rate = pyro.sample(
            "rate",
            dist.Gamma(
                torch.tensor(2.2, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
            ),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(rate.expand(len(x))), obs=y)

    y = torch.tensor(np.random.default_rng(3).poisson(3.1, 40)).double()
    result = bmr.fit(
        poisson,
        (torch.zeros(40, 1), y),
        epochs=1500,
        batch_size=40,
        optimizer=bmr.adam(0.03),
        progress=False,
    )
    site = result.posterior["rate"]
    exact = stats.gamma(2.2 + y.sum().item(), scale=1 / (1.3 + 40))
    assert site.support == "positive"
    assert (site.mean + site.var / 2).exp().item() == pytest.approx(exact.mean(), rel=0.02)
    assert site.var.sqrt().item() == pytest.approx(exact.std() / exact.mean(), rel=0.1)
    assert result.history["elbo"].tail(300).mean() == pytest.approx(
        _poisson_evidence(y.numpy()), abs=0.1
    )


def _poisson_evidence(y):
    from scipy.special import gammaln

    a, b, n, s = 2.2, 1.3, len(y), y.sum()
    return (
        a * math.log(b)
        - gammaln(a)
        + gammaln(a + s)
        - (a + s) * math.log(b + n)
        - gammaln(y + 1).sum()
    )
