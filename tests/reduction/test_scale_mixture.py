"""The one-weight horseshoe, against Simpson's rule over the local scale."""

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

import pyro_bmr as bmr
from pyro_bmr.reduction.gaussian import Diagonal, message
from pyro_bmr.reduction.scale_mixture import best_scale, grouped_reduction, scale_mixture_reduction

PRIOR_VAR = 1.5
HORSESHOE = bmr.Horseshoe(slab_scale=None)


def one_weight(mean, var):
    q = Diagonal(*(torch.tensor([v], dtype=torch.float64) for v in (mean, var)))
    p = Diagonal(torch.zeros(1, dtype=torch.float64), torch.full((1,), PRIOR_VAR, dtype=torch.float64))
    return message(q, p), p.var


def brute_force(mean, var, tau, slab):
    """ΔF, κ, reduced mean and variance by Simpson's rule on a grid far finer than any peak."""
    precision = 1 / var - 1 / PRIOR_VAR
    m = mean / var / precision

    t = np.linspace(-45, 45, 900_001)  # log λ
    psi = tau**2 * np.exp(2 * t)
    v = psi if slab is None else psi * slab**2 / (psi + slab**2)
    density = stats.norm(0, np.sqrt(v + 1 / precision)).pdf(m) / (np.pi * np.cosh(t))

    def integral(f):
        return integrate.simpson(f(v) * density, x=t)

    evidence = integral(np.ones_like)
    kappa = integral(lambda v: 1 / (1 + precision * v)) / evidence
    reduced = (1 - kappa) * m
    second = integral(lambda v: v / (1 + precision * v) + (precision * v / (1 + precision * v) * m) ** 2) / evidence
    return np.log(evidence) - stats.norm(0, np.sqrt(PRIOR_VAR + 1 / precision)).logpdf(m), kappa, reduced, second - reduced**2


@pytest.mark.parametrize("slab", [None, 0.8])
@pytest.mark.parametrize("mean, var, tau", [(0.35, 0.04, 0.2), (-1.9, 0.1, 0.2), (0.02, 0.3, 0.05), (0.9, 0.02, 1.3), (1.0, 0.0099, 1e-3), (0.3, 1e-3, 1e-4)])
def test_one_weight_is_brute_force_quadrature(mean, var, tau, slab):  # (i)
    got = scale_mixture_reduction(*one_weight(mean, var), *bmr.Horseshoe(slab_scale=slab).mixture(tau))
    expected = brute_force(mean, var, tau, slab)
    for value, reference, name in zip((got.delta_f, got.kappa, got.mean, got.var), expected, ("ΔF", "κ", "mean", "var"), strict=True):
        assert value.item() == pytest.approx(reference, rel=1e-6, abs=1e-9), name


def test_a_published_value():
    got = scale_mixture_reduction(*one_weight(0.35, 0.04), *HORSESHOE.mixture(0.2))
    assert got.delta_f.item() == pytest.approx(0.4726937093190939, abs=1e-10)
    assert got.kappa.item() == pytest.approx(0.5149433036244783, abs=1e-10)
    assert got.mean.item() == pytest.approx(0.1744210723268143, abs=1e-10)


def test_tau_is_the_optimum_of_its_evidence():
    rng = np.random.default_rng(1)
    mean = np.where(rng.random(200) < 0.1, rng.normal(0, 1.2, 200), rng.normal(0, 0.1, 200))
    q = Diagonal(torch.tensor(mean), torch.full((200,), 0.01, dtype=torch.float64))
    p = Diagonal(torch.zeros(200, dtype=torch.float64), torch.full((200,), PRIOR_VAR, dtype=torch.float64))
    data, prior = message(q, p), bmr.Horseshoe(0.5, slab_scale=None)

    def loss(log_tau):
        tau = np.exp(log_tau)
        return -scale_mixture_reduction(data, p.var, *HORSESHOE.mixture(tau)).delta_f.sum().item() + np.log1p((tau / 0.5) ** 2)

    best = optimize.minimize_scalar(loss, bounds=(-9, 2), method="bounded", options={"xatol": 1e-5}).x
    assert np.log(best_scale(data, p.var, prior.mixture, prior.log_hyper).item()) == pytest.approx(best, abs=2e-3)


def test_a_weight_without_information_keeps_the_prior():
    got = scale_mixture_reduction(*one_weight(0.4, 1.9), *bmr.Horseshoe(slab_scale=0.8).mixture(0.3))
    assert got.delta_f.item() == pytest.approx(0, abs=1e-12)
    assert got.kappa.item() == pytest.approx(1, abs=1e-12) and got.mean.item() == 0.0


def test_tau_of_a_large_layer_is_that_of_its_sample():
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    mean = torch.where(torch.rand(n, generator=generator) < 0.1, 1.2, 0.1).double() * torch.randn(n, generator=generator, dtype=torch.float64)
    p = Diagonal(torch.zeros(n, dtype=torch.float64), torch.full((n,), PRIOR_VAR, dtype=torch.float64))
    data = message(Diagonal(mean, torch.full((n,), 0.01, dtype=torch.float64)), p)
    tau = best_scale(data, p.var, HORSESHOE.mixture, HORSESHOE.log_hyper).item()
    gain = [scale_mixture_reduction(data, p.var, *HORSESHOE.mixture(tau * factor)).delta_f.sum().item() for factor in (0.9, 1.0, 1.1)]
    assert gain[1] > max(gain[0], gain[2])
