"""Priors as they are fitted: mean field against NUTS on one regression, and short fits of a network
from many seeds.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model
from pyro_bmr.priors.names import PRIORS
from pyro_bmr.tracing import Values

N, W = 60, torch.tensor([1.2, 0.0, -0.7, 0.0, 0.05, 0.0], dtype=torch.float64)


def regression(prior):
    x = torch.randn(N, len(W), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = x @ W + 0.5 * torch.randn(
        N, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )

    def program(x, y=None):
        w = prior.sample("w", (1, len(W)), x.new_zeros(1, len(W)))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w[0], 0.5), obs=y)

    return program, x, y


def weights(prior, draws):
    """The weights that draws of the sites stand for, (draws, weights)."""
    found = []
    for values in draws:
        with Values(values):
            found.append(
                prior.sample("w", (1, len(W)), torch.zeros(1, len(W), dtype=torch.float64))[0]
            )
    return torch.stack(found)


SHRINKING = [bmr.Horseshoe(), bmr.SpikeAndSlab(), bmr.SpikeAndSlab(temperature=0.5)]
PLAIN = [
    bmr.Gaussian(0.8, mean=0.3),
    bmr.Gaussian("layer"),
    bmr.Gaussian("layer", per="weight"),
    bmr.Laplace(0.5),
    bmr.Laplace(),
    bmr.StudentT(),
]


def against_nuts(prior, *guides):
    """Of each guide: how far the means are from those of NUTS, in its standard deviations, and the
    ratios of the standard deviations.
    """
    program, x, y = regression(prior)
    pyro.set_rng_seed(0)
    mcmc = MCMC(
        NUTS(program, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=7),
        num_samples=400,
        warmup_steps=200,
        disable_progbar=True,
    )
    mcmc.run(x, y)
    samples = mcmc.get_samples()
    reference = weights(
        prior, [{name: values[k] for name, values in samples.items()} for k in range(400)]
    )
    found = []
    for guide in guides:
        fit = bmr.fit(
            program, (x, y), guide=guide, epochs=1500, optimizer=bmr.adam(5e-2), progress=False
        )
        generator = torch.Generator().manual_seed(1)
        fitted = weights(prior, [fit.posterior.draw(generator) for _ in range(2000)])
        found.append(
            (
                (fitted.mean(0) - reference.mean(0)).abs() / reference.std(0),
                fitted.std(0) / reference.std(0),
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which Pyro uses
@pytest.mark.parametrize("prior", SHRINKING, ids=str)
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
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which Pyro uses
@pytest.mark.parametrize("prior", PLAIN, ids=str)
def test_mean_field_against_nuts(prior):
    """Means of clear coefficients within 0.4 posterior standard deviations of NUTS, the others
    within 1; standard deviations within a fifth under a given scale. An inferred scale is
    independent of the weight in q, and its spread adds to that of the weight: there up to 1.6
    times.
    """
    gap, ratio = against_nuts(prior, bmr.MeanField)[0]
    given = isinstance(prior, (bmr.Gaussian, bmr.Laplace)) and not isinstance(prior.scale, str)
    assert (gap[W.abs() > 0.5] < 0.4).all() and (gap < 1).all(), gap
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
