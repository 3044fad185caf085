"""Inclusion probabilities and evidence of a learned spike and slab, against enumeration over all
subsets and published fixed points.
"""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from pyro_bmr.formulas.mean_field_inclusion import fixed_inclusion, mean_field_log_odds
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from tests.parameters import others_slow


def enumerate_subsets(delta_f, alpha, beta):
    """Log evidence gain and inclusion probabilities by summing over all 2ⁿ subsets."""
    n = len(delta_f)
    log_terms, included = [], []
    for subset in itertools.product([0, 1], repeat=n):
        k = sum(subset)
        prior = special.betaln(alpha + k, beta + n - k) - special.betaln(alpha, beta)
        log_terms.append(prior + sum(d for d, s in zip(delta_f, subset, strict=True) if not s))
        included.append(subset)
    gain = special.logsumexp(log_terms)
    return gain, np.exp(np.array(log_terms) - gain) @ np.array(included)


@pytest.mark.parametrize("alpha, beta", [(1.5, 2.5), (0.4, 3.0), (6.0, 0.7)])
@pytest.mark.parametrize("n", [1, 4, 10])
def test_exact_inclusion_is_enumeration(n, alpha, beta):  # (j)
    delta_f = np.random.default_rng(n).normal(0.5, 3, n)
    gain, probability = enumerate_subsets(delta_f, alpha, beta)
    got = exact_inclusion(torch.tensor(delta_f), alpha, beta)
    assert got.log_evidence_gain.item() == pytest.approx(gain, abs=1e-9)
    np.testing.assert_allclose(got.probability, probability, atol=1e-9)


def test_mean_field_is_a_fixed_point_and_a_lower_bound():
    alpha, beta = 1.5, 2.5
    delta_f = torch.tensor([2.1, 1.4, -0.3, -3.2, 0.6, 1.9, -7.5], dtype=torch.float64)
    found, bound = mean_field_log_odds(delta_f, alpha, beta)
    rho = special.expit(found - delta_f.numpy())
    zeta = special.digamma(alpha + rho.sum()) - special.digamma(beta + (1 - rho).sum())
    np.testing.assert_allclose(rho, special.expit(zeta - delta_f.numpy()), atol=1e-5)
    # the fixed point and the exact answer of this problem, computed once by an independent program
    np.testing.assert_allclose(
        rho, [0.0752, 0.1407, 0.4727, 0.9422, 0.2671, 0.0904, 0.9992], atol=1e-3
    )
    exact = exact_inclusion(delta_f, alpha, beta).log_evidence_gain.item()
    assert exact == pytest.approx(2.2817089809862816, abs=1e-9)
    assert exact - 1 < bound < exact


def test_large_layers_agree_and_the_integral_stays_sharp():
    delta_f = torch.cat([torch.full((4000,), 1.1), torch.full((1000,), -9.0)]).double()
    exact, (zeta, gain) = exact_inclusion(delta_f, 1.0, 1.0), mean_field_log_odds(delta_f, 1.0, 1.0)
    assert torch.equal(exact.probability > 0.5, delta_f < zeta)
    assert exact.log_evidence_gain.item() == pytest.approx(gain, rel=2e-3)
    assert exact.log_odds.item() == pytest.approx(zeta, abs=0.05)


def test_a_layer_that_the_data_ignore_keeps_its_prior():
    # a long tail of π near 1
    assert exact_inclusion(
        torch.zeros(3, dtype=torch.float64), 15.0, 0.03
    ).log_evidence_gain.item() == pytest.approx(0, abs=1e-9)
    got = exact_inclusion(torch.zeros(6, dtype=torch.float64), 2.0, 6.0)
    assert got.log_evidence_gain.item() == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(got.probability, 0.25, atol=1e-9)


def plain_update(d, alpha, beta):
    """ζ and the bound on the gain by the update itself, with scipy."""
    z, before = 0.0, np.inf
    d, counts = np.unique(d, return_counts=True)
    while abs(z - before) > 1e-13 * max(abs(z), 1):
        before = z
        included, excluded = (
            (counts * special.expit(z - d)).sum(),
            (counts * special.expit(d - z)).sum(),
        )
        a, b = alpha + included, beta + excluded
        z = special.digamma(a) - special.digamma(b)
    log_slab, log_spike = (
        special.digamma(a) - special.digamma(a + b),
        special.digamma(b) - special.digamma(a + b),
    )
    kl = (
        special.betaln(alpha, beta)
        - special.betaln(a, b)
        + (a - alpha) * log_slab
        + (b - beta) * log_spike
    )
    return z, (counts * np.logaddexp(log_slab, log_spike + d)).sum() - kl


def test_a_few_passes_over_many_weights_find_the_fixed_point():
    """More weights than the first search looks at, not in random order, so that the search is off:
    held against the plain update by scipy.
    """
    delta_f = torch.cat([torch.linspace(0.2, 2.4, 150_000), -torch.linspace(0.0, 30.0, 50_000)])
    delta_f[::4] += 0.3  # what the stride sees is not what there is
    zeta, gain = mean_field_log_odds(delta_f, 1.5, 2.5)
    z, expected = plain_update(delta_f.double().numpy(), 1.5, 2.5)
    assert zeta == pytest.approx(z, abs=1e-6) and gain == pytest.approx(expected, rel=1e-6)


def test_one_step_from_a_sample_that_is_off():
    """The search ends 0.03 from the fixed point, among weights at the bend of their probabilities:
    one Newton step, to the third order, has it to 1e-8.
    """
    n = 150_000
    delta_f = torch.cat(
        [torch.linspace(-0.5, 0.5, n // 3), torch.full((n // 3,), -9.0), torch.full((n // 3,), 9.0)]
    ).double()[torch.randperm(n, generator=torch.Generator().manual_seed(3))]
    delta_f[:: math.ceil(n / 65_536)] += 0.06  # those that the search sees
    zeta, gain = mean_field_log_odds(delta_f, 1.5, 2.5)
    z, expected = plain_update(delta_f.numpy(), 1.5, 2.5)
    assert zeta == pytest.approx(z, abs=3e-8)
    assert gain == pytest.approx(expected, abs=1e-5)


def test_what_is_left_of_a_large_layer_is_counted():
    """A million weights of which half of one goes, as a sum of 5.6e-7 each: single precision cannot
    tell it from a million less the sum of what stays.
    """
    delta_f = torch.full((1_000_000,), -1.0)
    zeta, _ = mean_field_log_odds(delta_f, 1.0, 1.0)
    assert zeta == pytest.approx(plain_update(delta_f.double().numpy(), 1.0, 1.0)[0], abs=1e-4)


def test_a_known_inclusion():
    delta_f = torch.tensor([2.1, -0.3, -7.5, 90.0], dtype=torch.float64)
    pi = 0.3
    expected = np.logaddexp(np.log(pi), np.log(1 - pi) + delta_f.numpy()).sum()
    assert fixed_inclusion(delta_f, np.log(pi / (1 - pi))) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.floats(0.1, 1e3),
    st.floats(0.1, 1e3),
)
def test_inclusion_is_never_nan(dtype, delta_f, alpha, beta):
    values = torch.tensor(delta_f, dtype=dtype)
    got = exact_inclusion(values, alpha, beta)
    assert (
        not got.drop_log_odds.isnan().any()
        and got.log_evidence_gain.isfinite()
        and got.log_odds.isfinite()
        and got.drop_log_odds.dtype == dtype
    )
    zeta, bound = mean_field_log_odds(values, alpha, beta)
    assert math.isfinite(zeta) and math.isfinite(bound)
    exact = exact_inclusion(values.double(), alpha, beta).log_evidence_gain.item()
    assert mean_field_log_odds(values.double(), alpha, beta)[1] <= exact + 1e-6 * (1 + abs(exact))


@pytest.mark.parametrize(
    "alpha, beta",
    others_slow(
        [
            *((1e13, 3e12), (1e15, 1e15), (2.0, 1e14), (1e-3, 1e13), (4e20, 1e20), (7e22, 0.3)),
            (40.0, 1.5),
        ],
        *((1e13, 3e12), (2.0, 1e14), (4e20, 1e20)),
    ),
)
def test_mean_field_keeps_its_digits_for_sharp_beta_priors(alpha, beta):
    """ζ and the bound by mpmath: lgamma of 1e13 is 3e14, whose last digit is 0.06 nats."""
    delta_f = [-6.1, -0.4, 0.3, 1.9, 2.2, 40.0]
    with mpmath.workdps(60):
        d, z = [mpmath.mpf(x) for x in delta_f], mpmath.mpf(0)
        for _ in range(400):
            slab = [1 / (1 + mpmath.exp(x - z)) for x in d]
            a, b = alpha + sum(slab), beta + sum(1 - p for p in slab)
            z = mpmath.digamma(a) - mpmath.digamma(b)
        pi, rest = (mpmath.digamma(x) - mpmath.digamma(a + b) for x in (a, b))
        kl = mpmath.log(mpmath.beta(alpha, beta)) - mpmath.log(mpmath.beta(a, b))
        kl += (a - alpha) * pi + (b - beta) * rest
        bound = sum(mpmath.log(mpmath.exp(pi) + mpmath.exp(rest + x)) for x in d) - kl
    zeta, gain = mean_field_log_odds(torch.tensor(delta_f, dtype=torch.float64), alpha, beta)
    assert zeta == pytest.approx(float(z), rel=1e-12, abs=1e-12)
    assert gain == pytest.approx(float(bound), rel=1e-11, abs=1e-11)
