"""Densities of the user's own: narrow, far, bounded, with poles and kinks, against closed forms;
what is no density.
"""

import math

import pytest
import torch
from torch.distributions import Cauchy, Normal, Uniform

import pyro_bmr as bmr
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.quadrature import density_reduction

Q = Diagonal(*torch.tensor([[0.7, -0.2], [0.25, 0.25]], dtype=torch.float64))
P = Diagonal(*torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))


def number(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize(
    "loc, scale",
    [(0.33, 0.3), (0.33, 0.003), (0.33, 1e-6), (2.2, 1e-3), (-37.123, 1e-3), (1e4, 1.0)],
)
def test_a_normal_is_the_gaussian_form(loc, scale):
    got = density_reduction(Q, P, Normal(number(loc), scale).log_prob)
    target = bmr.Gaussian(scale, mean=loc)
    torch.testing.assert_close(got.delta_f, bmr.delta_f(Q, P, target), rtol=1e-9, atol=1e-9)
    want = bmr.formulas.reduced_posterior(Q, P, target)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.var, want.var, rtol=1e-6, atol=0)


def test_through_reduce():
    class Narrow:
        log_prob = Normal(number(0.33), 0.003).log_prob

    posterior = bmr.Posterior.from_moments({"w": Q.mean}, {"w": Q.var}, bmr.Gaussian(1.0))
    assert bmr.reduce(posterior, to=Narrow()).delta_f == pytest.approx(0.6596, abs=1e-4)


def test_two_narrow_peaks_are_the_sum_of_two():
    parts = [(0.3, 0.41, 1e-4), (0.7, -0.777, 1e-3)]
    log_prob = lambda w: torch.stack(  # noqa: E731
        [math.log(p) + Normal(number(m), s).log_prob(w) for p, m, s in parts]
    ).logsumexp(0)
    want = torch.stack(
        [math.log(p) + bmr.delta_f(Q, P, bmr.Gaussian(s, mean=m)) for p, m, s in parts]
    ).logsumexp(0)
    torch.testing.assert_close(
        density_reduction(Q, P, log_prob).delta_f, want, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("low, high", [(-1.0, 2.5), (5.0, 6.0), (0.3, 0.31)])
def test_a_uniform_has_jumps(low, high):
    """The message over the interval: differences of normal distribution functions of N(m, 1/L)."""
    got = density_reduction(Q, P, Uniform(number(low), number(high), validate_args=False).log_prob)
    precision = 1 / Q.var - 1
    m, s = Q.mean / Q.var / precision, precision.rsqrt()
    below, above = (torch.special.log_ndtr((m - end) / s) for end in (low, high))
    want = (
        below
        + torch.log1p(-(above - below).exp())
        - math.log(high - low)
        - Normal(number(0.0), (1 + 1 / precision).sqrt()).log_prob(m)
    )
    torch.testing.assert_close(got.delta_f, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "sigma, near, far", [(1e-2, -5, -6), (2e-4, -5, -6), (3e-5, 5, 6), (7.772e-5, 7.866, 8.364)]
)
def test_a_uniform_far_from_the_posterior(sigma, near, far):
    """Mills' expansion of a Gaussian N(0, 1/L) beyond the nearer bound b, d = |b|√L away: it falls
    like an exponential of rate d√L.
    """
    q, p = Diagonal(number([0.0]), number([sigma**2])), Diagonal(number([0.0]), number([1.0]))
    low, high = sorted([float(near), float(far)])
    got = density_reduction(q, p, Uniform(number(low), number(high), validate_args=False).log_prob)
    precision = sigma**-2 - 1
    d, s = abs(near) * precision**0.5, precision**-0.5
    want = math.log(s / d * (1 - d**-2) / (high - low)) - d**2 / 2 - math.log(sigma)
    assert float(got.delta_f) == pytest.approx(want, rel=1e-12)
    beyond = s * (1 / d - 2 / d**3)
    assert abs(float(got.mean)) - abs(near) == pytest.approx(beyond, rel=1e-5, abs=2e-15)
    assert float(got.var.sqrt()) == pytest.approx(s / d * (1 - 3 * d**-2), rel=1e-5)


def test_a_uniform_too_far_for_the_moments_to_have_digits():
    q = Diagonal(number([0.0, 5.3]), number([1e-16, 1e-16]))
    log_prob = Uniform(number(5.0), number(6.0), validate_args=False).log_prob
    with pytest.raises(bmr.errors.ReductionError, match=r"log_prob: expected .*got 1 of 2 weights"):
        density_reduction(q, P, log_prob)


def test_a_cauchy_is_a_mixture():
    got = density_reduction(Q, P, Cauchy(number(0.0), 0.01).log_prob)
    want = bmr.formulas.scale_mixture_reduction(
        bmr.formulas.message(Q, P), P.var, *bmr.StudentT(1.0, 0.01).mixture()
    )
    torch.testing.assert_close(got.delta_f, want.delta_f, rtol=0, atol=1e-8)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-7, atol=0)


NO_DENSITIES = {
    "not normalised": (lambda w: -w.square(), "got integral 1.77245; normalise it"),
    "improper": (torch.zeros_like, "expected the log of a density of integral 1"),
    "too narrow to be found": (
        Uniform(number(50.0), number(50.001), validate_args=False).log_prob,
        "got integral 0; .* too narrow",
    ),
    "validated": (
        Uniform(number(0.0), number(1.0), validate_args=True).log_prob,
        "expected a value for any real number, got .* validate_args=False",
    ),
    "NaN": (lambda w: w.log(), "one number for each weight"),
}


@pytest.mark.parametrize("case", NO_DENSITIES)
def test_what_is_no_density(case):
    log_prob, words = NO_DENSITIES[case]
    with pytest.raises(bmr.errors.ReductionError, match=words):
        density_reduction(Q, P, log_prob)


def test_draws_that_never_vary_are_no_posterior():
    with pytest.raises(
        bmr.errors.ReductionError, match="site 'the draws': its 30 draws are all the same"
    ):
        bmr.formulas.monte_carlo_delta_f(torch.zeros(30), bmr.Gaussian(1.0), bmr.Gaussian(0.5))
