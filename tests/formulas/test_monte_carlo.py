"""ΔF from draws: against the Gaussian form and quadrature, and the smoothing against
arviz-stats.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from torch.distributions import Laplace, Normal, StudentT

import pyro_bmr as bmr
from pyro_bmr.formulas.monte_carlo import (
    log_density,
    log_ratio_delta_f,
    monte_carlo_delta_f,
    pareto_smoothed,
)
from pyro_bmr.formulas.quadrature import density_reduction


def normal(mean, scale):
    return Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


def draws_of(q, count, *shape, seed=0):
    noise = torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return q.mean + q.stddev * noise


def test_draws_give_the_gaussian_form():
    q, p, r = normal(0.83, 0.43), normal(0.3, 1.7), normal(-0.1, 0.9)
    got = monte_carlo_delta_f(draws_of(q, 20_000), p, r)
    assert got.trusted and got.standard_error < 0.01
    assert abs(got.delta_f - bmr.delta_f(q, p, r).item()) < 4 * got.standard_error
    mean = (got.log_weights.exp() * draws_of(q, 20_000)).sum().item()
    assert mean == pytest.approx(bmr.formulas.reduced_posterior(q, p, r).mean.item(), abs=0.02)
    assert got.log_weights.logsumexp(0).item() == pytest.approx(0, abs=1e-9)


def chain(count, rho, seed):
    """Draws of N(0.83, 0.43²), each correlated with the one before."""
    noise = np.random.default_rng(seed).normal(size=count) * math.sqrt(1 - rho**2)
    noise[0] /= math.sqrt(1 - rho**2)
    return torch.tensor(0.83 + 0.43 * signal.lfilter([1.0], [1.0, -rho], noise))


@pytest.mark.parametrize("rho", [0.0, 0.9, -0.7])
def test_the_standard_error_is_that_of_a_chain(rho):
    """Over 100 chains the errors are as large as the standard errors say; with 0.9 those of
    independent draws would be four times too small.
    """
    p, r = normal(0.3, 1.7), normal(-0.1, 0.9)
    exact = bmr.delta_f(normal(0.83, 0.43), p, r).item()
    scores = []
    for seed in range(100):
        got = monte_carlo_delta_f(chain(2000, rho, seed), p, r)
        scores.append((got.delta_f - exact) / got.standard_error)
    assert (
        np.square(scores).mean() ** 0.5 == pytest.approx(1, abs=0.25)
        if rho >= 0
        else np.square(scores).mean() < 1
    )


def test_draws_that_alternate_have_the_error_of_independent_ones():
    """Their effective sample size has no meaning beyond their number, in small samples not even a
    sign.
    """
    alternating = (
        torch.tensor([0.4, -0.4]).repeat(30).double()
        + 0.01 * torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    )
    got = log_ratio_delta_f(alternating)
    weights = got.log_weights.exp()
    assert got.standard_error == pytest.approx((weights.square().sum() - 1 / 60).sqrt().item())


def test_sites_of_any_shape_and_priors_of_any_kind():
    """Three sites under their own priors: the joint ratio, one number; against quadrature, weight
    by weight.
    """
    q = {
        "a": bmr.formulas.Diagonal(
            torch.tensor([0.7, -0.2]).double(), torch.tensor([0.04, 0.02]).double()
        ),
        "b": bmr.formulas.Diagonal(*torch.tensor([[1.1], [0.09]]).double()),
    }
    draws = {
        name: draws_of(Normal(g.mean, g.var.sqrt()), 40_000, len(g.mean), seed=k)
        for k, (name, g) in enumerate(q.items())
    }
    old = {"a": bmr.Gaussian(1.4), "b": normal(0.2, 1.1)}
    new = {
        "a": StudentT(torch.tensor(3.0).double(), 0.0, 0.6),
        "b": Laplace(torch.tensor(0.0).double(), 0.8),
    }
    got = monte_carlo_delta_f(draws, old, new)
    exact = sum(
        density_reduction(
            q[n], bmr.formulas.Diagonal(*(torch.tensor(v).double() for v in m)), new[n].log_prob
        )
        .delta_f.sum()
        .item()
        for n, m in (("a", (0.0, 1.96)), ("b", (0.2, 1.21)))
    )
    assert (
        got.trusted
        and abs(got.delta_f - exact) < 4 * got.standard_error
        and got.standard_error < 0.01
    )


def test_a_horseshoe_has_a_density():
    w = torch.tensor([0.3, -1.2], dtype=torch.float64)
    lam = torch.linspace(0, math.pi / 2, 400_001, dtype=torch.float64)[1:-1].tan()
    by_hand = torch.stack([Normal(0.0, 0.7 * lam).log_prob(x).exp().mean().log() for x in w])
    torch.testing.assert_close(
        log_density(bmr.Horseshoe(0.7, slab_scale=None), w), by_hand, rtol=0, atol=1e-4
    )


def test_k_hat_tells_of_a_reduced_prior_that_the_draws_do_not_reach():
    draws = draws_of(normal(1.0, 0.1), 4000)
    near = monte_carlo_delta_f(draws, normal(0.0, 1.3), normal(0.2, 1.0))
    with pytest.warns(bmr.PyroBMRWarning, match="4000 draws is not to be trusted"):
        far = monte_carlo_delta_f(draws, normal(0.0, 1.3), normal(0.0, 0.05))
    assert near.trusted and not far.trusted and far.khat > 0.7


def test_an_unchanged_prior_changes_nothing():
    got = monte_carlo_delta_f(draws_of(normal(0.8, 0.4), 500), normal(0.3, 1.7), normal(0.3, 1.7))
    assert (
        got.delta_f == pytest.approx(0, abs=1e-12)
        and got.trusted
        and got.standard_error == pytest.approx(0, abs=1e-7)
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_smoothing_is_that_of_arviz(scale):
    stats = pytest.importorskip("arviz_stats.base")
    # 3√S is whole: rounding of the tail is the one thing that differs
    log_ratio = scale * np.random.default_rng(2).standard_t(5, 2500)
    expected, khat = stats.array_stats.psislw(-log_ratio)  # it takes log likelihoods
    got, shape = pareto_smoothed(torch.tensor(log_ratio))
    np.testing.assert_allclose(
        (got - got.logsumexp(0)).numpy(), expected - np.logaddexp.reduce(expected), atol=1e-9
    )
    assert shape == pytest.approx(float(khat), abs=1e-9)


def test_k_hat_of_a_pareto_tail():
    """Ratios of shape k: of a Pareto variable with index 1/k."""
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for k in (0.3, 0.9):
        assert pareto_smoothed(-k * uniform.log())[1] == pytest.approx(k, abs=0.1)


def test_what_draws_must_be():
    p, r = normal(0.0, 1.0), normal(0.0, 0.5)
    w = torch.randn(30, 2).double()
    with pytest.raises(bmr.errors.ReductionError, match="site 'v': no draws.*: w"):
        monte_carlo_delta_f({"w": w}, {"v": p}, {"v": r})
    with pytest.raises(bmr.errors.ReductionError, match="same sites"):
        monte_carlo_delta_f({"w": w}, {"w": p}, {"v": r})
    with pytest.raises(bmr.errors.ReductionError, match="as many draws"):
        monte_carlo_delta_f({"w": w, "v": w[:3]}, {"w": p, "v": p}, {"w": r, "v": r})
    with pytest.raises(
        bmr.errors.ReductionError, match=r"site 'w'.*\(30, 2\).*\(30, 30, 2\)|site 'w'.*broadcast"
    ):
        monte_carlo_delta_f({"w": w}, {"w": p}, {"w": Normal(torch.zeros(30, 1, 2).double(), 1.0)})
    with pytest.raises(bmr.errors.ReductionError, match="site 'the draws'.*point"):
        monte_carlo_delta_f(w, p, bmr.Gaussian(0.0))
    with pytest.raises(bmr.errors.ReductionError, match="site 'the draws'.*neither log_prob"):
        monte_carlo_delta_f(w, p, object())
    with pytest.raises(bmr.errors.ReductionError, match="1 NaN"):
        log_ratio_delta_f(torch.tensor([0.1, math.nan, 0.3]))


@pytest.mark.filterwarnings("ignore:.*not to be trusted:pyro_bmr.PyroBMRWarning")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.floats(0, 400),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_log_ratios_have_an_answer_within_their_range(count, spread, seed, dtype):
    log_ratio = spread * torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    log_ratio[::7] = -math.inf if count > 7 else log_ratio[::7]
    got = log_ratio_delta_f(log_ratio)
    finite = log_ratio[log_ratio.isfinite()].double()
    assert float(finite.min()) - math.log(count) - 1e-6 <= got.delta_f <= float(finite.max()) + 1e-6
    assert (
        not math.isnan(got.khat) and not got.log_weights.isnan().any() and got.standard_error >= 0
    )
