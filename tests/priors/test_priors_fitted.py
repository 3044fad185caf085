"""Priors as they are fitted: mean field against NUTS on one regression, whose moments
`tests/reference/nuts.py` has stored, and short fits of a network from many seeds.
"""

import math

import pyro
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model
from pyro_bmr.priors.names import PRIORS
from tests.reference import nuts

MOMENTS = nuts.stored()


def against_nuts(prior, *guides):
    """Of each guide: how far the means are from those of NUTS, in its standard deviations, and the
    ratios of the standard deviations.
    """
    program, x, y = nuts.regression(prior)
    mean, std = torch.from_numpy(MOMENTS[str(prior)])
    found = []
    for guide in guides:
        pyro.set_rng_seed(0)
        fit = bmr.fit(
            program, (x, y), guide=guide, epochs=3000, optimizer=bmr.adam(2e-2), progress=False
        )
        generator = torch.Generator().manual_seed(1)
        fitted = nuts.weights(prior, (fit.posterior.draw(generator) for _ in range(2000)))
        found.append(((fitted.mean(0) - mean).abs() / std, fitted.std(0) / std))
    return found


def test_the_stored_moments_are_those_of_the_program():
    """Under a given Gaussian the posterior is known: P = XᵀX/0.5² + I/0.8²."""
    _, x, y = nuts.regression(prior := bmr.Gaussian(0.8, mean=0.3))
    precision = x.mT @ x / 0.25 + torch.eye(6, dtype=torch.float64) / 0.64
    exact = torch.linalg.solve(precision, x.mT @ y / 0.25 + 0.3 / 0.64)
    std = torch.linalg.inv(precision).diagonal().sqrt()
    mean, spread = torch.from_numpy(MOMENTS[str(prior)])
    assert set(MOMENTS) == {str(each) for each in nuts.SHRINKING + nuts.PLAIN}
    assert ((mean - exact).abs() < 0.15 * std).all() and ((spread / std - 1).abs() < 0.15).all()


@pytest.mark.slow
@pytest.mark.parametrize("prior", nuts.SHRINKING, ids=str)
def test_shrinkage_priors_against_nuts(prior):
    """Six coefficients: means within half a standard deviation under either guide; standard
    deviations within a third with the scales coupled, and up to 1.6 times under mean field.
    """
    (gap, ratio), (gap_coupled, ratio_coupled) = against_nuts(
        prior, bmr.MeanField, bmr.ScaleCoupled
    )
    assert (gap < 0.5).all() and (gap_coupled < 0.5).all(), (gap, gap_coupled)
    assert (ratio > 0.6).all() and (ratio < 1.6).all(), ratio
    assert (ratio_coupled > 0.7).all() and (ratio_coupled < 1.33).all(), ratio_coupled


@pytest.mark.slow
@pytest.mark.parametrize("prior", nuts.PLAIN, ids=str)
def test_mean_field_against_nuts(prior):
    """Means of clear coefficients within 0.4 posterior standard deviations of NUTS, the others
    within 1; standard deviations within a fifth under a given scale. An inferred scale is
    independent of the weight in q, and its spread adds to that of the weight: there up to 1.6
    times.
    """
    gap, ratio = against_nuts(prior, bmr.MeanField)[0]
    given = isinstance(prior, (bmr.Gaussian, bmr.Laplace)) and not isinstance(prior.scale, str)
    assert (gap[nuts.W.abs() > 0.5] < 0.4).all() and (gap < 1).all(), gap
    assert (ratio > (0.8 if given else 0.3)).all() and (ratio < (1.2 if given else 1.6)).all(), (
        ratio
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_short_fits_of_a_network_stay_finite(name):
    data = bmr.load("digits")
    for seed in range(5):
        torch.manual_seed(seed)
        fit = bmr.fit(
            load_model("mlp:40")(data, PRIORS[name]),
            data,
            epochs=6,
            optimizer=bmr.adam(1e-2),
            seed=seed,
            progress=False,
        )
        assert all(math.isfinite(value) for value in fit.history["elbo"])
        assert all(
            bool(site.mean.isfinite().all() and site.var.isfinite().all())
            for site in fit.posterior.sites.values()
        )
        assert (
            fit.history["expected_log_likelihood"].iloc[-1]
            > 1.2 * fit.history["expected_log_likelihood"].iloc[0]
            or seed > 0
        )
