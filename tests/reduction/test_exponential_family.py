"""The law by natural parameters, against the Gaussian form, conjugate counts, and quadrature."""

import pytest
import torch
from scipy import integrate, special, stats
from torch.distributions import Beta, Dirichlet, Gamma, Normal

import pyro_bmr as bmr
from pyro_bmr.reduction.exponential_family import natural_delta_f


def float64(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def test_the_law_is_the_gaussian_form():  # (h)
    q, p, r = (Normal(*float64(m, s)) for m, s in ((0.83, 0.43), (0.3, 1.7), (-0.4, 0.86)))
    assert natural_delta_f(q, p, r).item() == pytest.approx(bmr.delta_f(q, p, r).item(), abs=1e-12)


def test_beta_counts():
    """Beta prior and binomial data: the evidence is a ratio of Beta functions."""
    successes, failures = 7, 2
    prior, reduced = (1.5, 2.5), (4.0, 0.8)

    def log_evidence(a, b):
        return special.betaln(a + successes, b + failures) - special.betaln(a, b)

    gain = natural_delta_f(Beta(*float64(prior[0] + successes, prior[1] + failures)), Beta(*float64(*prior)), Beta(*float64(*reduced)))
    assert gain.item() == pytest.approx(log_evidence(*reduced) - log_evidence(*prior), abs=1e-10)


def test_gamma_rate():
    """Gamma prior on a Poisson rate."""
    total, n = 23, 6
    prior, reduced = (2.2, 1.3), (5.0, 0.6)

    def log_evidence(a, b):
        return a * special.xlogy(1, b) + special.gammaln(a + total) - special.gammaln(a) - (a + total) * special.xlogy(1, b + n)

    gain = natural_delta_f(Gamma(*float64(prior[0] + total, prior[1] + n)), Gamma(*float64(*prior)), Gamma(*float64(*reduced)))
    assert gain.item() == pytest.approx(log_evidence(*reduced) - log_evidence(*prior), abs=1e-10)


def test_dirichlet_counts():
    counts, prior, reduced = torch.tensor([3.0, 0.0, 5.0]).double(), *float64([0.7, 1.2, 2.0], [2.0, 2.0, 0.5])

    def log_evidence(a):
        return (torch.lgamma(a.sum()) - torch.lgamma(a).sum() + torch.lgamma(a + counts).sum() - torch.lgamma((a + counts).sum())).item()

    gain = natural_delta_f(Dirichlet(prior + counts), Dirichlet(prior), Dirichlet(reduced))
    assert gain.item() == pytest.approx(log_evidence(reduced) - log_evidence(prior), abs=1e-10)


def test_gamma_by_quadrature():
    q, p, r = (4.0, 3.0), (2.2, 1.3), (3.5, 2.1)
    ratio, _ = integrate.quad(
        lambda x: stats.gamma(q[0], scale=1 / q[1]).pdf(x) * stats.gamma(r[0], scale=1 / r[1]).pdf(x) / stats.gamma(p[0], scale=1 / p[1]).pdf(x), 0, 60
    )
    gain = natural_delta_f(*(Gamma(*float64(*g)) for g in (q, p, r)))
    assert gain.exp().item() == pytest.approx(ratio, rel=1e-8)


def test_families_must_agree_and_a_reduced_posterior_must_exist():
    a, b = float64(1.5, 2.5)
    with pytest.raises(bmr.ReductionError, match="one exponential family; got Beta, Gamma, Beta"):
        natural_delta_f(Beta(a, b), Gamma(a, b), Beta(a, b))
    with pytest.raises(bmr.ReductionError, match="wider than its prior"):
        natural_delta_f(Normal(*float64(0.0, 2.0)), Normal(*float64(0.0, 1.0)), Normal(*float64(0.0, 5.0)))
