"""Densities of the priors against scipy and quadrature, and what they refuse."""

import dataclasses
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


def test_gaussian_with_a_layer_scale():
    precision, value = torch.tensor(1.9, dtype=torch.float64), INIT * 1.7
    got, weight = log_prob(
        bmr.Gaussian("layer", concentration=3.0, rate=1.4), {"w": value, "w_precision": precision}
    )
    expected = stats.gamma(3.0, scale=1 / 1.4).logpdf(1.9) + stats.norm.logpdf(value.numpy()).sum()
    assert got == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(weight, value / math.sqrt(1.9) / 2)  # fan in 4


TIERS = {"unit": (3, 1), "input": (1, 4), "weight": (3, 4)}


@pytest.mark.parametrize("slab, df", [(None, None), (0.9, None), (0.9, 3.4)])
@pytest.mark.parametrize(
    "tiers", [("layer", "weight"), ("unit", "layer"), ("layer", "unit", "input"), ("weight",)]
)
def test_horseshoe(tiers, slab, df):
    prior = bmr.Horseshoe(0.4, slab, tiers, df)
    lam = {
        tier: torch.linspace(0.2, 2.9, math.prod(rows), dtype=torch.float64).view(rows)
        for tier, rows in TIERS.items()
        if tier in tiers
    }
    values = {"w": INIT} | {
        f"w_{'lambda' if tier == 'weight' else tier}": value for tier, value in lam.items()
    }
    expected = stats.norm.logpdf(INIT.numpy()).sum() + sum(
        stats.halfcauchy().logpdf(value.numpy()).sum() for value in lam.values()
    )
    tau, c = 0.4, slab
    if "layer" in tiers:
        tau, values["w_tau"] = 0.23, torch.tensor(0.23, dtype=torch.float64)
        expected += stats.halfcauchy(scale=0.4).logpdf(0.23)
    if df:
        values["w_slab_precision"], c = torch.tensor(1.7, dtype=torch.float64), 1.7**-0.5
        # of c², and |d c²/d c⁻²|
        expected += stats.invgamma(1.7, scale=1.7 * 0.81).logpdf(1 / 1.7) - 2 * math.log(1.7)
    got, weight = log_prob(prior, values)
    assert got == pytest.approx(expected, abs=1e-10)
    psi = tau * math.prod(value.numpy() for value in lam.values())
    gamma = psi if slab is None else np.sqrt(c**2 * psi**2 / (c**2 + psi**2))
    np.testing.assert_allclose(weight, gamma * INIT.numpy() / 2, rtol=1e-10)


def test_a_ratio_of_gammas_is_half_cauchy():
    prior = bmr.Horseshoe(0.4, None, ("layer", "weight"), parametrization="gamma")
    sites = (
        poutine.trace(
            lambda: prior.sample("w", (100, 50), torch.ones(100, 50, dtype=torch.float64))
        )
        .get_trace()
        .nodes
    )
    lam = (sites["w_lambda_numerator"]["value"] / sites["w_lambda_denominator"]["value"]).sqrt()
    assert stats.kstest(lam.flatten().numpy(), stats.halfcauchy.cdf).pvalue > 1e-3
    tau = 0.4 * (sites["w_tau_numerator"]["value"] / sites["w_tau_denominator"]["value"]).sqrt()
    torch.testing.assert_close(sites["_RETURN"]["value"], tau * lam * sites["w"]["value"] / 50**0.5)


@pytest.mark.parametrize("weights", [False, True])
def test_the_tiered_preset_is_the_published_prior(weights):
    """Sites against c⁻² ~ Gamma(2, 6), ψ = 0.01 ε τᵢ (λᵢⱼ), γ² = c²ψ²/(c² + ψ²), all half-Cauchys
    of scale 1.
    """
    epsilon, unit, precision = 2.3, np.array([[0.4], [60.0], [900.0]]), 0.8
    lam = np.linspace(0.3, 7, 12).reshape(SHAPE) if weights else 1.0
    values = {"w": INIT, "w_tau": 0.01 * epsilon, "w_unit": unit, "w_slab_precision": precision} | (
        {"w_lambda": lam} if weights else {}
    )
    got, weight = log_prob(
        bmr.Horseshoe.tiered(weights),
        {k: torch.as_tensor(v, dtype=torch.float64) for k, v in values.items()},
    )
    expected = (
        stats.gamma(2, scale=1 / 6).logpdf(precision)
        + stats.halfcauchy.logpdf(epsilon)
        - math.log(0.01)
        + stats.halfcauchy.logpdf(unit).sum()
    )
    expected += stats.norm.logpdf(INIT.numpy()).sum() + (
        stats.halfcauchy.logpdf(lam).sum() if weights else 0
    )
    assert got == pytest.approx(expected, abs=1e-9)
    psi = 0.01 * epsilon * unit * lam
    np.testing.assert_allclose(
        weight, np.sqrt(psi**2 / precision / (1 / precision + psi**2)) * INIT.numpy(), rtol=1e-10
    )


def test_tau_from_the_expected_number_of_active_weights():
    """At τ₀ the prior mean of the effective number of weights, Σ (1 − κ) with κ = 1/(1 + n
    τ²λ²/s²), is the number asked for.
    """
    prior = bmr.Horseshoe.from_active(5, of=50, rows=80, noise=0.6, slab_scale=None)
    signal = 80 * prior.tau0**2 / 0.6**2
    share, _ = integrate.quad(
        lambda u: (2 / np.pi) * signal * np.tan(u) ** 2 / (1 + signal * np.tan(u) ** 2),
        0,
        np.pi / 2,
    )
    assert 50 * share == pytest.approx(5, rel=1e-8)
    assert prior.slab_scale is None and not prior.by_fan_in


CLOSED = {
    "gaussian": (bmr.Gaussian(0.7, mean=0.3), stats.norm(0.3, 0.7)),
    "laplace": (bmr.Laplace(0.7), stats.laplace(scale=0.7)),
    **{
        f"student-t-{df}": (bmr.StudentT(df, 0.7), stats.t(df, scale=0.7))
        for df in (1.0, 2.6, 7.0, 60.0)
    },
}
"""Priors of which the density of one weight is known: name → (prior, the same in scipy)."""


@pytest.mark.parametrize("name", CLOSED)
def test_density_draws_and_mixture(name):
    prior, density = CLOSED[name]
    value = INIT * 1.7
    got, weight = log_prob(prior, {"w": value})
    assert got == pytest.approx(density.logpdf(value.numpy()).sum(), abs=1e-10)
    assert torch.equal(weight, value)
    draws = prior.sample("w", (100, 50), torch.zeros(100, 50, dtype=torch.float64))
    assert stats.kstest(draws.flatten().numpy(), density.cdf).pvalue > 1e-3
    if hasattr(prior, "log_prob"):
        np.testing.assert_allclose(prior.log_prob(value), density.logpdf(value.numpy()), atol=1e-12)
    if hasattr(prior, "mixture"):
        variances, log_weights = prior.mixture()
        assert np.exp(log_weights).sum() == pytest.approx(1, abs=1e-12)
        w = np.array([0.0, 1e-4, 0.02, 0.3, 1.1, 4.0, 15.0])
        got = (np.exp(log_weights) * stats.norm(0, np.sqrt(variances)).pdf(w[:, None])).sum(1)
        np.testing.assert_allclose(got, density.pdf(w), rtol=1e-8)
        wider, _ = prior.mixture(1.4)
        np.testing.assert_allclose(wider, 4 * variances)


@pytest.mark.parametrize(
    "prior, density",
    [(bmr.Laplace(), stats.laplace()), (bmr.StudentT(2.6), stats.t(2.6))],
    ids=["laplace", "student-t"],
)
def test_an_inferred_scale(prior, density):
    value = INIT * 1.7
    got, weight = log_prob(prior, {"w": value, "w_scale": torch.tensor(1.9, dtype=torch.float64)})
    assert got == pytest.approx(
        density.logpdf(value.numpy()).sum() + stats.halfcauchy.logpdf(1.9), abs=1e-10
    )
    torch.testing.assert_close(weight, value * 1.9 / 2)
    # a known scale is not looked for
    assert not hasattr(dataclasses.replace(prior, scale=0.7), "log_hyper")
    assert prior.log_hyper(0.3) - prior.log_hyper(2.1) == pytest.approx(
        stats.halfcauchy.logpdf(0.3) - stats.halfcauchy.logpdf(2.1), abs=1e-12
    )


def test_a_relaxed_indicator():
    """z = σ((logit π + ε)/t) with logistic ε."""
    z = torch.tensor([[0.08], [0.6], [0.97]], dtype=torch.float64)
    values = {
        "w": INIT,
        "w_precision": torch.tensor(0.7, dtype=torch.float64),
        "w_inclusion": torch.tensor(0.3, dtype=torch.float64),
        "w_slab": z,
    }
    got, weight = log_prob(
        bmr.SpikeAndSlab(alpha=1.5, beta=2.5, temperature=0.4, per="unit"), values
    )
    logit = np.log(z.numpy() / (1 - z.numpy()))
    concrete = stats.logistic.logpdf(0.4 * logit - math.log(0.3 / 0.7)) + np.log(
        0.4 / (z.numpy() * (1 - z.numpy()))
    )
    expected = (
        stats.norm.logpdf(INIT.numpy()).sum()
        + concrete.sum()
        + stats.gamma(2, scale=0.5).logpdf(0.7)
        + stats.beta(1.5, 2.5).logpdf(0.3)
    )
    assert got == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(weight, z * INIT / math.sqrt(0.7) / 2)


def test_an_inferred_scale_per_weight_is_a_student_t():
    prior = bmr.Gaussian("layer", concentration=1.3, rate=2.2, per="weight")
    w = prior.sample("w", (2000, 4), torch.zeros(2000, 4, dtype=torch.float64)).flatten().numpy()
    assert stats.kstest(w, stats.t(2.6, scale=(2.2 / 1.3 / 4) ** 0.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "mean", [torch.linspace(-1, 1, 4, dtype=torch.float64), "init"], ids=["tensor", "init"]
)
def test_prior_means(mean):
    value = INIT * 1.7
    centre = INIT if isinstance(mean, str) else mean
    got, _ = log_prob(bmr.Gaussian(0.6, mean=mean), {"w": value})
    assert got == pytest.approx(
        stats.norm(np.broadcast_to(centre.numpy(), SHAPE), 0.6).logpdf(value.numpy()).sum(),
        abs=1e-10,
    )


def test_equal_priors_are_equal():
    a, b = (bmr.Gaussian(0.6, mean=torch.tensor([0.1, 0.4])) for _ in range(2))
    assert (
        a == b
        and hash(a) == hash(b)
        and a != bmr.Gaussian(0.7, mean=a.mean)
        and a != bmr.Gaussian(0.6, mean=a.mean + 1)
    )
    assert (
        a != bmr.Gaussian(0.6)
        and bmr.Gaussian(0.6) != a
        and bmr.Gaussian(0.6, per="layer") == bmr.Gaussian(0.6)
        and a != bmr.Laplace(0.6)
    )


def test_spike_and_slab():
    values = {
        "w": INIT,
        "w_precision": torch.tensor(0.7, dtype=torch.float64),
        "w_inclusion": torch.tensor(0.3, dtype=torch.float64),
    }
    got, weight = log_prob(bmr.SpikeAndSlab(0.1, 1.5, 2.5), values)
    mixture = np.log(
        0.3 * stats.norm.pdf(INIT.numpy()) + 0.7 * stats.norm(0, 0.1).pdf(INIT.numpy())
    ).sum()
    expected = mixture + stats.gamma(2, scale=0.5).logpdf(0.7) + stats.beta(1.5, 2.5).logpdf(0.3)
    assert got == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(weight, INIT / math.sqrt(0.7) / 2)


def test_the_mixture_integrates_to_one_and_draws_what_it_says():
    mixture = SpikeSlabMixture(
        torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    )
    total, _ = integrate.quad(
        lambda w: mixture.log_prob(torch.tensor(w, dtype=torch.float64)).exp().item(),
        -9,
        9,
        points=[-0.5, 0, 0.5],
    )
    assert total == pytest.approx(1, abs=1e-6)
    draws = mixture.expand([20_000]).sample()
    assert draws.var().item() == pytest.approx(0.3 + 0.7 * 0.01, rel=0.05)
    assert (
        stats.kstest(
            draws.numpy(), lambda w: 0.3 * stats.norm.cdf(w) + 0.7 * stats.norm(0, 0.1).cdf(w)
        ).pvalue
        > 1e-3
    )


def test_inclusion_log_odds_is_the_mean_field_update():
    mixture = SpikeSlabMixture(
        torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    )
    mean, var = 0.25, 0.04
    q = stats.norm(mean, var**0.5)
    difference, _ = integrate.quad(
        lambda w: q.pdf(w) * (stats.norm.logpdf(w) - stats.norm(0, 0.1).logpdf(w)), -3, 3
    )
    got = mixture.inclusion_log_odds(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64)
    ).item()
    assert got == pytest.approx(math.log(0.3 / 0.7) + difference, abs=1e-8)


def test_empirical_scales_replace_the_start_and_follow_the_m_step():
    prior = bmr.Gaussian(mean=0.2)
    assert (
        poutine.trace(lambda: prior.sample("w", SHAPE, INIT))
        .get_trace()
        .nodes["w"]["fn"]
        .base_dist.scale[0, 0]
        .item()
        == 1
    )
    handler = EmpiricalScales()
    var, mask = torch.full(SHAPE, 0.05, dtype=torch.float64), INIT > 0
    handler.update("w", prior, INIT, var, mask)
    expected = np.sqrt(((INIT.numpy()[mask] - 0.2) ** 2 + 0.05).mean())
    assert handler.scales["w"].item() == pytest.approx(expected, abs=1e-12)
    site = poutine.trace(handler(lambda: prior.sample("w", SHAPE, INIT))).get_trace().nodes["w"]
    assert site["fn"].log_prob(INIT).item() == pytest.approx(
        stats.norm(0.2, expected).logpdf(INIT.numpy()).sum(), abs=1e-9
    )
    other = (
        poutine.trace(handler(lambda: pyro.sample("w", dist.Normal(0.0, 1.0))))
        .get_trace()
        .nodes["w"]
    )
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
        (lambda: bmr.Gaussian(1e-170), "from 1e-150"),  # whose variance is 0, that of a point
        (lambda: bmr.Gaussian(1e200), "to 1e150"),
        (lambda: bmr.Laplace(1e200), "to 1e150"),
        (lambda: bmr.StudentT(scale=1e-200), "from 1e-150"),
        (lambda: bmr.SpikeAndSlab(slab_scale=1e200), "to 1e150"),
        (lambda: bmr.SpikeAndSlab(spike_scale=1e-200), "from 1e-150"),
        (lambda: bmr.Horseshoe(1e-200), "from 1e-150"),
        (lambda: bmr.Horseshoe(slab_scale=1e200), "to 1e150"),
        (lambda: bmr.Gaussian("wide"), "'wide'.*layer.*empirical"),
        (lambda: bmr.Gaussian("layer", mean=1.0), "mean 0"),
        (lambda: bmr.Gaussian(0.0).sample("w", SHAPE), "site 'w'.*point"),
        (lambda: bmr.Gaussian().var, "no variance of its own"),
        (lambda: bmr.Horseshoe(0.0), "tau0"),
        (lambda: bmr.Horseshoe(slab_scale=-1.0), "slab_scale"),
        (
            lambda: bmr.Horseshoe(tiers=("layer", "row")),
            "expected one of layer, unit, input, weight, got 'row'",
        ),
        (lambda: bmr.Horseshoe(tiers="unit"), "a tuple of different tiers"),
        (lambda: bmr.Horseshoe(tiers=("unit", "unit")), "a tuple of different tiers"),
        (lambda: bmr.Horseshoe(block=2), "block=2 joins neighbouring units or inputs"),
        (lambda: bmr.Horseshoe(tiers=("unit",), block=0), "integer >= 1"),
        (
            lambda: bmr.Horseshoe(tiers=("unit",), block=2).sample("w", SHAPE),
            "block=2 does not divide the 3 units",
        ),
        (lambda: bmr.Horseshoe(slab_scale=None, slab_df=4.0), "needs a slab_scale"),
        (lambda: bmr.Horseshoe(parametrization="cauchy"), "half-cauchy.*gamma"),
        (lambda: bmr.Horseshoe.from_active(5, of=5, rows=10), "0 < active < of"),
        (lambda: bmr.Gaussian(0.5, per="unit"), "a given scale is shared by all"),
        (lambda: bmr.Gaussian(per="row"), "'row'"),
        (lambda: bmr.Gaussian(0.5, mean="pretrained"), 'a number, a tensor, or "init"'),
        (lambda: bmr.Gaussian("layer", mean="init"), "mean 0"),
        (lambda: bmr.Gaussian("layer", rate=0.0), "rate=0.0"),
        (lambda: bmr.Gaussian(0.5, mean="init").sample("w", SHAPE), "site 'w'.*pass it"),
        (
            lambda: bmr.Gaussian(0.5, mean=torch.ones(5)).sample("w", SHAPE),
            r"site 'w'.*broadcasts to .*got shape \(5,\)",
        ),
        (lambda: bmr.Laplace(0.0), "Laplace.*finite number > 0"),
        (lambda: bmr.Laplace("unit"), "Laplace.*layer"),
        (lambda: bmr.Laplace().log_prob(INIT), "no density of its own"),
        (lambda: bmr.Laplace().mixture(), "no density of its own"),
        (lambda: bmr.StudentT(0.0), "degrees of freedom"),
        (lambda: bmr.StudentT(scale=-1.0), "StudentT.*finite number > 0"),
        (lambda: bmr.SpikeAndSlab(per="unit"), "give a temperature"),
        (lambda: bmr.SpikeAndSlab(0.1, temperature=0.5), "leave spike_scale out"),
        (
            lambda: bmr.SpikeAndSlab(temperature=0.0),
            "temperature=0.0.*expected a finite number > 0",
        ),
        (lambda: bmr.SpikeAndSlab(alpha=0.0), "expected two numbers > 0"),
        (
            lambda: bmr.SpikeAndSlab(spike_scale=0.0).sample("w", SHAPE),
            "site 'w'.*cannot be fitted",
        ),
    ],
)
def test_what_priors_refuse(make, words):
    with pytest.raises(bmr.errors.ModelError, match=words):
        make()


def test_an_empirical_scale_around_the_start_values_starts_at_their_size():
    torch.manual_seed(3)
    start = 0.2 * torch.randn(5, 3, dtype=torch.float64) + 0.1

    def scale(prior, init):
        trace = pyro.poutine.trace(lambda: prior.sample("w", (5, 3), init)).get_trace()
        return float(trace.nodes["w"]["fn"].base_dist.stddev.unique())

    variance = start.var(correction=0) + start.mean() ** 2
    assert scale(bmr.Gaussian(mean="init"), start) == pytest.approx(0.3 * float(variance) ** 0.5)
    assert scale(bmr.Gaussian(mean="init"), torch.zeros_like(start)) == 1
    assert scale(bmr.Gaussian(0.7, mean="init"), start) == pytest.approx(0.7)
    assert scale(bmr.Gaussian(), start) == scale(bmr.Gaussian(mean=0.5), start) == 1
