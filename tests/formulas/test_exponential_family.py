"""The law by natural parameters, against the Gaussian form, conjugate counts, quadrature, and the
densities of every family of torch.
"""

import math

import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch.distributions import Beta, Dirichlet, Gamma, Normal

import pyro_bmr as bmr
from pyro_bmr.formulas.exponential_family import natural_delta_f, natural_form, natural_posterior


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

    gain = natural_delta_f(
        Beta(*float64(prior[0] + successes, prior[1] + failures)),
        Beta(*float64(*prior)),
        Beta(*float64(*reduced)),
    )
    assert gain.item() == pytest.approx(log_evidence(*reduced) - log_evidence(*prior), abs=1e-10)


def test_gamma_rate():
    """Gamma prior on a Poisson rate."""
    total, n = 23, 6
    prior, reduced = (2.2, 1.3), (5.0, 0.6)

    def log_evidence(a, b):
        return (
            a * special.xlogy(1, b)
            + special.gammaln(a + total)
            - special.gammaln(a)
            - (a + total) * special.xlogy(1, b + n)
        )

    gain = natural_delta_f(
        Gamma(*float64(prior[0] + total, prior[1] + n)),
        Gamma(*float64(*prior)),
        Gamma(*float64(*reduced)),
    )
    assert gain.item() == pytest.approx(log_evidence(*reduced) - log_evidence(*prior), abs=1e-10)


def test_dirichlet_counts():
    counts, prior, reduced = (
        torch.tensor([3.0, 0.0, 5.0]).double(),
        *float64([0.7, 1.2, 2.0], [2.0, 2.0, 0.5]),
    )

    def log_evidence(a):
        return (
            torch.lgamma(a.sum())
            - torch.lgamma(a).sum()
            + torch.lgamma(a + counts).sum()
            - torch.lgamma((a + counts).sum())
        ).item()

    gain = natural_delta_f(Dirichlet(prior + counts), Dirichlet(prior), Dirichlet(reduced))
    assert gain.item() == pytest.approx(log_evidence(reduced) - log_evidence(prior), abs=1e-10)


@pytest.mark.slow
def test_gamma_by_quadrature():
    q, p, r = (4.0, 3.0), (2.2, 1.3), (3.5, 2.1)
    ratio, _ = integrate.quad(
        lambda x: (
            stats.gamma(q[0], scale=1 / q[1]).pdf(x)
            * stats.gamma(r[0], scale=1 / r[1]).pdf(x)
            / stats.gamma(p[0], scale=1 / p[1]).pdf(x)
        ),
        0,
        60,
    )
    gain = natural_delta_f(*(Gamma(*float64(*g)) for g in (q, p, r)))
    assert gain.exp().item() == pytest.approx(ratio, rel=1e-8)


def test_families_must_agree_and_a_reduced_posterior_must_exist():
    a, b = float64(1.5, 2.5)
    with pytest.raises(
        bmr.errors.ReductionError, match="one exponential family, got Beta, Gamma, Beta"
    ):
        natural_delta_f(Beta(a, b), Gamma(a, b), Beta(a, b))
    with pytest.raises(bmr.errors.ReductionError, match="wider than its prior"):
        natural_delta_f(
            Normal(*float64(0.0, 2.0)), Normal(*float64(0.0, 1.0)), Normal(*float64(0.0, 5.0))
        )


def spd(*diagonal, off=0.2):
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    return matrix + off * torch.ones_like(matrix)


LAM = torch.tensor([[0.4, 1.1, 0.7], [2.0, 0.3, 0.9]], dtype=torch.float64)
# family → (posterior, prior, reduced prior) by one constructor, made when a test takes them
MEMBERS = {
    "Normal": lambda: [
        td.Normal(*float64(m, s)) for m, s in ((0.83, 0.43), (0.3, 1.7), (-0.4, 0.86))
    ],
    "MultivariateNormal": lambda: [
        td.MultivariateNormal(torch.tensor(m).double(), spd(*v))
        for m, v in (((0.8, -1.1), (0.1, 0.2)), ((0.3, 0.2), (1.7, 1.1)), ((-0.4, 0.5), (0.6, 2.3)))
    ],
    "LowRankMultivariateNormal": lambda: [
        td.LowRankMultivariateNormal(
            torch.tensor(m).double(), torch.tensor([[w], [-0.3]]).double(), torch.tensor(v).double()
        )
        for m, w, v in (
            ((0.8, -1.1), 0.1, (0.1, 0.2)),
            ((0.3, 0.2), 0.8, (1.7, 1.1)),
            ((-0.4, 0.5), 0.5, (0.6, 2.3)),
        )
    ],
    "Gamma": lambda: [td.Gamma(*float64(a, b)) for a, b in ((4.0, 3.0), (2.2, 1.3), (3.5, 2.1))],
    "Exponential": lambda: [
        td.Gamma(*float64(4.0, 3.0)),
        td.Exponential(*float64(1.3)),
        td.Exponential(*float64(0.4)),
    ],
    "Chi2": lambda: [td.Gamma(*float64(4.0, 3.0)), td.Chi2(*float64(3.3)), td.Chi2(*float64(1.7))],
    "Beta": lambda: [td.Beta(*float64(a, b)) for a, b in ((8.5, 4.5), (1.5, 2.5), (4.0, 0.8))],
    "Dirichlet": lambda: [
        td.Dirichlet(torch.tensor(a).double())
        for a in ((3.7, 1.2, 7.0), (0.7, 1.2, 2.0), (2.0, 2.0, 0.5))
    ],
    "Bernoulli": lambda: [td.Bernoulli(*float64(p)) for p in (0.83, 0.4, 0.2)],
    "Bernoulli by logits": lambda: [
        td.Bernoulli(logits=torch.tensor(p).double()) for p in (1.3, -0.4, 0.9)
    ],
    "Binomial": lambda: [td.Binomial(5, *float64(p)) for p in (0.83, 0.4, 0.2)],
    "Categorical": lambda: [
        td.Categorical(p / p.sum(-1, keepdim=True))
        for p in (LAM, LAM.flip(-1) + 0.2, LAM.roll(1, -1))
    ],
    "OneHotCategorical": lambda: [
        td.OneHotCategorical(logits=x) for x in (LAM, LAM.flip(-1), LAM.square())
    ],
    "Multinomial": lambda: [td.Multinomial(4, p) for p in (LAM, LAM.flip(-1), LAM.square())],
    "Geometric": lambda: [td.Geometric(*float64(p)) for p in (0.7, 0.4, 0.6)],
    "NegativeBinomial": lambda: [td.NegativeBinomial(3.5, *float64(p)) for p in (0.3, 0.6, 0.5)],
    "Poisson": lambda: [td.Poisson(*float64(r)) for r in (4.2, 2.5, 3.1)],
    "ContinuousBernoulli": lambda: [td.ContinuousBernoulli(*float64(p)) for p in (0.83, 0.4, 0.2)],
    "VonMises": lambda: [
        td.VonMises(*float64(m, k)) for m, k in ((0.8, 6.0), (0.3, 1.4), (-1.2, 2.2))
    ],
    "Wishart": lambda: [
        td.Wishart(torch.tensor(df).double(), s)
        for df, s in ((9.0, spd(0.1, 0.3, off=0.02)), (4.2, spd(1.2, 0.7)), (3.1, spd(0.5, 0.9)))
    ],
    "LogNormal": lambda: [
        td.LogNormal(*float64(m, s)) for m, s in ((0.83, 0.43), (0.3, 1.7), (-0.4, 0.86))
    ],
    "InverseGamma": lambda: [
        td.InverseGamma(*float64(a, b)) for a, b in ((4.0, 3.0), (2.2, 1.3), (3.5, 2.1))
    ],
    "HalfNormal": lambda: [td.HalfNormal(*float64(s)) for s in (0.4, 1.7, 0.9)],
    "Pareto": lambda: [td.Pareto(*float64(1.3, a)) for a in (4.0, 1.2, 2.1)],
    "Pyro's event": lambda: [
        dist.Gamma(*float64([a, a + 0.3], [b, b * 2])).to_event(1)
        for a, b in ((4.0, 3.0), (2.2, 1.3), (3.5, 2.1))
    ],
}


@pytest.mark.parametrize("family", MEMBERS)
def test_the_reduced_posterior_is_the_density_of_the_law(family):
    """log q̃(x) = log q(x) + log p̃(x) − log p(x) − ΔF at every x, by the normalised densities of
    torch: what is wrong in A, h or λ̃' shows.
    """
    q, p, r = MEMBERS[family]()
    x = torch.stack([spd(0.4, 1.3), spd(2.1, 0.6)]) if family == "Wishart" else q.sample((7,))
    expected = q.log_prob(x) + r.log_prob(x) - p.log_prob(x) - natural_delta_f(q, p, r)
    # torch knows I₀ to 1e-7
    torch.testing.assert_close(
        natural_posterior(q, p, r).log_prob(x),
        expected,
        rtol=0,
        atol=1e-6 if family == "VonMises" else 1e-9,
    )
    assert natural_delta_f(q, p, r).abs().max() > 1e-3


def test_every_exponential_family_of_torch_is_known():
    def below(cls):
        return {cls, *(k for sub in cls.__subclasses__() for k in below(sub))}

    known = below(td.ExponentialFamily) - {td.ExponentialFamily}
    for cls in (c for c in known if c.__module__.startswith("torch.")):
        assert natural_form.dispatch(cls) is not natural_form.dispatch(object), cls.__name__


def test_a_category_can_be_ruled_out():
    """Bernoulli inclusion with a reduced prior that is sure: ΔF = log q(0) − log p(0)."""
    gain = natural_delta_f(
        td.Bernoulli(*float64(0.7)), td.Bernoulli(*float64(0.4)), td.Bernoulli(*float64(0.0))
    )
    assert gain.item() == pytest.approx(math.log(0.3 / 0.6), abs=1e-12)
    certain = natural_posterior(
        td.Categorical(*float64([0.2, 0.5, 0.3])),
        td.Categorical(*float64([0.3, 0.3, 0.4])),
        td.Categorical(*float64([0.5, 0.0, 0.5])),
    )
    odds = (0.2 * 0.5 / 0.3) / (0.3 * 0.5 / 0.4)
    torch.testing.assert_close(
        certain.probs, torch.tensor([odds / (1 + odds), 0, 1 / (1 + odds)], dtype=torch.float64)
    )
    with pytest.raises(bmr.errors.ReductionError, match="rules out|wider"):
        natural_delta_f(
            td.Bernoulli(*float64(0.0)), td.Bernoulli(*float64(0.0)), td.Bernoulli(*float64(0.5))
        )


@pytest.mark.parametrize(
    "q, p, r, words",
    [
        # λ̃' = −0.8, where log Γ is finite
        (td.Beta(0.5, 1.0), td.Beta(2.0, 1.0), td.Beta(0.7, 1.0), "wider than its prior"),
        (
            td.Binomial(5, torch.tensor(0.5)),
            td.Binomial(5, torch.tensor(0.4)),
            td.Binomial(6, torch.tensor(0.4)),
            "carrier measure",
        ),
        (
            td.Normal(0.0, 0.1),
            td.Normal(torch.zeros(3), 1.0),
            td.Normal(0.0, 0.5),
            r"batch shape \(3,\).*does not fit.*batch shape \(\)",
        ),
        (
            td.Dirichlet(torch.ones(3)),
            td.Dirichlet(torch.ones(1, 2)),
            td.Dirichlet(torch.ones(3)),
            "event shape",
        ),
        (
            td.Normal(torch.zeros(2), 1.0),
            td.Independent(td.Normal(torch.zeros(2), 1.0), 1),
            td.Normal(0.0, 0.5),
            "Independent is not known|event shape",
        ),
        (
            td.Independent(td.Normal(torch.zeros(2), 1.0), 1),
            td.Normal(torch.zeros(2), 1.0),
            td.Normal(0.0, 0.5),
            "one event shape",
        ),
        (
            td.Cauchy(0.0, 0.1),
            td.Cauchy(0.0, 1.0),
            td.Cauchy(0.0, 0.5),
            "Cauchy.*monte_carlo_delta_f",
        ),
        (td.TransformedDistribution(td.Gamma(1.0, 1.0), td.AbsTransform()),) * 3 + ("no inverse",),
        (
            td.Poisson(torch.tensor(math.inf), validate_args=False),
            td.Poisson(1.0),
            td.Poisson(2.0),
            "not finite",
        ),
    ],
)
def test_what_the_law_refuses(q, p, r, words):
    with pytest.raises(bmr.errors.ReductionError, match=words):
        natural_delta_f(q, p, r)


positive = st.floats(1e-3, 1e3)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    positive,
    positive,
    positive,
    positive,
    positive,
    positive,
)
def test_conjugate_updates_are_never_nan(dtype, a, b, c, d, more, exposure):
    """A posterior that adds counts to a prior has a reduced posterior under any reduced prior, in
    either precision.
    """
    a, b, c, d, more, exposure = (
        torch.tensor(v, dtype=dtype) for v in (a, b, c, d, more, exposure)
    )
    for family in (td.Gamma, td.Beta):
        gain = natural_delta_f(family(a + more, b + exposure), family(a, b), family(c, d))
        assert gain.dtype == dtype and gain.isfinite()
