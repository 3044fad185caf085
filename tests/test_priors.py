"""Densities of the priors against scipy and quadrature, and what they refuse."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

import pyro_bmr as bmr
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.priors.spike_and_slab import SpikeSlabMixture

SHAPE = (3, 4)
INIT = torch.linspace(-0.5, 0.8, 12, dtype=torch.float64).view(SHAPE)


def log_prob(prior, values):
    """The joint log density of a prior's sites at `values`, and the weight it returns."""
    model = poutine.condition(lambda: prior.sample("w", SHAPE, INIT), data=values)
    trace = poutine.trace(model).get_trace()
    return trace.log_prob_sum().item(), trace.nodes["_RETURN"]["value"]


def test_gaussian_with_a_number():
    value = INIT * 1.7
    got, weight = log_prob(bmr.Gaussian(0.6, mean=0.3), {"w": value})
    assert got == pytest.approx(stats.norm(0.3, 0.6).logpdf(value.numpy()).sum(), abs=1e-10)
    assert torch.equal(weight, value)


def test_gaussian_with_a_layer_scale():
    precision, value = torch.tensor(1.9, dtype=torch.float64), INIT * 1.7
    got, weight = log_prob(bmr.Gaussian("layer", concentration=3.0, rate=1.4), {"w": value, "w_precision": precision})
    expected = stats.gamma(3.0, scale=1 / 1.4).logpdf(1.9) + stats.norm.logpdf(value.numpy()).sum()
    assert got == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(weight, value / math.sqrt(1.9) / 2)  # fan in 4


@pytest.mark.parametrize("per, rows", [("weight", (3, 4)), ("unit", (3, 1))])
@pytest.mark.parametrize("slab", [None, 0.9])
def test_horseshoe(per, rows, slab):
    tau, lam = torch.tensor(0.23, dtype=torch.float64), torch.linspace(0.2, 2.9, math.prod(rows), dtype=torch.float64).view(rows)
    got, weight = log_prob(bmr.Horseshoe(0.4, slab, per), {"w": INIT, "w_tau": tau, "w_lambda": lam})
    expected = stats.halfcauchy(scale=0.4).logpdf(0.23) + stats.halfcauchy().logpdf(lam.numpy()).sum() + stats.norm.logpdf(INIT.numpy()).sum()
    assert got == pytest.approx(expected, abs=1e-10)
    psi = (tau * lam).numpy()
    gamma = psi if slab is None else np.sqrt(slab**2 * psi**2 / (slab**2 + psi**2))
    np.testing.assert_allclose(weight, gamma * INIT.numpy() / 2, rtol=1e-10)


def test_spike_and_slab():
    values = {"w": INIT, "w_precision": torch.tensor(0.7, dtype=torch.float64), "w_inclusion": torch.tensor(0.3, dtype=torch.float64)}
    got, weight = log_prob(bmr.SpikeAndSlab(0.1, 1.5, 2.5), values)
    mixture = np.log(0.3 * stats.norm.pdf(INIT.numpy()) + 0.7 * stats.norm(0, 0.1).pdf(INIT.numpy())).sum()
    expected = mixture + stats.gamma(2, scale=0.5).logpdf(0.7) + stats.beta(1.5, 2.5).logpdf(0.3)
    assert got == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(weight, INIT / math.sqrt(0.7) / 2)


def test_the_mixture_integrates_to_one_and_draws_what_it_says():
    mixture = SpikeSlabMixture(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
    total, _ = integrate.quad(lambda w: mixture.log_prob(torch.tensor(w, dtype=torch.float64)).exp().item(), -9, 9, points=[-0.5, 0, 0.5])
    assert total == pytest.approx(1, abs=1e-6)
    draws = mixture.expand([20_000]).sample()
    assert draws.var().item() == pytest.approx(0.3 + 0.7 * 0.01, rel=0.05)
    assert stats.kstest(draws.numpy(), lambda w: 0.3 * stats.norm.cdf(w) + 0.7 * stats.norm(0, 0.1).cdf(w)).pvalue > 1e-3


def test_inclusion_log_odds_is_the_mean_field_update():
    mixture = SpikeSlabMixture(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
    mean, var = 0.25, 0.04
    q = stats.norm(mean, var**0.5)
    difference, _ = integrate.quad(lambda w: q.pdf(w) * (stats.norm.logpdf(w) - stats.norm(0, 0.1).logpdf(w)), -3, 3)
    got = mixture.inclusion_log_odds(torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64)).item()
    assert got == pytest.approx(math.log(0.3 / 0.7) + difference, abs=1e-8)


def test_empirical_scales_replace_the_start_and_follow_the_m_step():
    prior = bmr.Gaussian(mean=0.2)
    assert poutine.trace(lambda: prior.sample("w", SHAPE, INIT)).get_trace().nodes["w"]["fn"].base_dist.scale[0, 0].item() == 1
    handler = EmpiricalScales()
    var, mask = torch.full(SHAPE, 0.05, dtype=torch.float64), INIT > 0
    handler.update("w", prior, INIT, var, mask)
    expected = np.sqrt(((INIT.numpy()[mask] - 0.2) ** 2 + 0.05).mean())
    assert handler.scales["w"].item() == pytest.approx(expected, abs=1e-12)
    site = poutine.trace(handler(lambda: prior.sample("w", SHAPE, INIT))).get_trace().nodes["w"]
    assert site["fn"].log_prob(INIT).item() == pytest.approx(stats.norm(0.2, expected).logpdf(INIT.numpy()).sum(), abs=1e-9)
    other = poutine.trace(handler(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))).get_trace().nodes["w"]
    assert other["fn"].scale.item() == 1  # a site that nobody declared empirical is left alone


def test_the_m_step_is_the_best_scale():
    """No other scale has a smaller KL from the same posterior."""
    mean, var = INIT.numpy().flatten(), np.linspace(0.02, 0.3, 12)
    handler = EmpiricalScales()
    handler.update("w", bmr.Gaussian(), INIT.flatten(), torch.tensor(var), None)
    best = handler.scales["w"].item()

    def kl(s):
        return np.sum(np.log(s) + (mean**2 + var) / (2 * s**2))

    assert kl(best) < min(kl(best * 0.99), kl(best * 1.01))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: bmr.Gaussian(-0.1), "finite number >= 0"),
        (lambda: bmr.Gaussian(math.nan), "finite number >= 0"),
        (lambda: bmr.Gaussian("wide"), "'wide'.*layer.*empirical"),
        (lambda: bmr.Gaussian("layer", mean=1.0), "mean 0"),
        (lambda: bmr.Gaussian(0.0).sample("w", SHAPE), "site 'w'.*point"),
        (lambda: bmr.Gaussian().var, "no variance of its own"),
        (lambda: bmr.Horseshoe(0.0), "tau0"),
        (lambda: bmr.Horseshoe(slab_scale=-1.0), "slab_scale"),
        (lambda: bmr.Horseshoe(per="layer"), "weight.*unit"),
        (lambda: bmr.SpikeAndSlab(alpha=0.0), "both must be > 0"),
        (lambda: bmr.SpikeAndSlab(spike_scale=0.0).sample("w", SHAPE), "site 'w'.*cannot be fitted"),
    ],
)
def test_what_priors_refuse(make, words):
    with pytest.raises(bmr.ModelError, match=words):
        make()
