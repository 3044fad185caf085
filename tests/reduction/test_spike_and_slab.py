"""Inclusion probabilities and evidence of a learned spike and slab, against enumeration over all subsets and published fixed points."""

import itertools

import numpy as np
import pytest
import torch
from scipy import special

from pyro_bmr.reduction.spike_and_slab import exact_inclusion, mean_field_inclusion


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
    got = mean_field_inclusion(delta_f, alpha, beta)
    rho = got.probability.numpy()
    zeta = special.digamma(alpha + rho.sum()) - special.digamma(beta + (1 - rho).sum())
    np.testing.assert_allclose(rho, special.expit(zeta - delta_f.numpy()), atol=1e-5)
    # the fixed point and the exact answer of this problem, computed once by an independent program
    np.testing.assert_allclose(rho, [0.0752, 0.1407, 0.4727, 0.9422, 0.2671, 0.0904, 0.9992], atol=1e-3)
    exact = exact_inclusion(delta_f, alpha, beta).log_evidence_gain.item()
    assert exact == pytest.approx(2.2817089809862816, abs=1e-9)
    assert exact - 1 < got.log_evidence_gain.item() < exact


def test_large_layers_agree_and_the_integral_stays_sharp():
    delta_f = torch.cat([torch.full((4000,), 1.1), torch.full((1000,), -9.0)]).double()
    exact, cheap = exact_inclusion(delta_f, 1.0, 1.0), mean_field_inclusion(delta_f, 1.0, 1.0)
    assert torch.equal(exact.probability > 0.5, cheap.probability > 0.5)
    assert exact.log_evidence_gain.item() == pytest.approx(cheap.log_evidence_gain.item(), rel=2e-3)
    assert exact.log_odds.item() == pytest.approx(cheap.log_odds.item(), abs=0.05)


def test_a_layer_that_the_data_ignore_keeps_its_prior():
    got = exact_inclusion(torch.zeros(6, dtype=torch.float64), 2.0, 6.0)
    assert got.log_evidence_gain.item() == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(got.probability, 0.25, atol=1e-9)
