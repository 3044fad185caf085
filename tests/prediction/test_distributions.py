"""What a prediction says of the distribution of y: moments, quantiles, draws, and scores, of every
kind, against SciPy, quadrature and enumeration.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

import pyro_bmr as bmr
from pyro_bmr import likelihoods
from pyro_bmr.prediction import predict as predicting
from pyro_bmr.prediction.distribution_functions import cdf
from pyro_bmr.prediction.predict import ChunkedPrediction, MixturePrediction, RealPrediction

DTYPE = torch.float64
GENERATOR = torch.Generator().manual_seed(4)
LOCS = torch.randn(3, 4, generator=GENERATOR, dtype=DTYPE) * 2 + 0.5
SCALES = torch.rand(3, 4, generator=GENERATOR, dtype=DTYPE) + 0.2
Y = torch.tensor([0.3, -1.2, 2.0, 4.0], dtype=DTYPE)


def mixture(make):
    """A mixture of three draws at four rows, in two batches."""
    return MixturePrediction([[make(k, slice(0, 3)), make(k, slice(3, 4))] for k in range(3)], -1)


C = torch.tensor([0.7, 2.5, 4.0], dtype=DTYPE)
RATES = LOCS.exp()
KINDS = {
    "Normals": (
        RealPrediction(LOCS, SCALES),
        lambda k, i: stats.norm(LOCS[k, i], SCALES[k, i]),
    ),
    "Student": (
        mixture(lambda k, i: dist.StudentT(C[k] + 2.0, LOCS[k, i], SCALES[k, i])),
        lambda k, i: stats.t(C[k] + 2.0, LOCS[k, i], SCALES[k, i]),
    ),
    "Student without a variance": (
        mixture(lambda k, i: dist.StudentT(C[0], LOCS[k, i], SCALES[k, i])),
        lambda k, i: stats.t(C[0], LOCS[k, i], SCALES[k, i]),
    ),
    "log-normals": (
        mixture(lambda k, i: dist.LogNormal(LOCS[k, i], SCALES[k, i])),
        lambda k, i: stats.lognorm(SCALES[k, i], scale=LOCS[k, i].exp()),
    ),
    "Poisson": (
        mixture(lambda k, i: dist.Poisson(RATES[k, i])),
        lambda k, i: stats.poisson(RATES[k, i]),
    ),
    "negative binomial": (
        mixture(lambda k, i: dist.NegativeBinomial(C[k], logits=LOCS[k, i] - C[k].log())),
        lambda k, i: stats.nbinom(C[k], C[k] / (C[k] + RATES[k, i])),
    ),
    "bits, some not observed": (
        mixture(lambda k, i: likelihoods.Ignoring(dist.Bernoulli(logits=LOCS[k, i]))),
        lambda k, i: stats.bernoulli(LOCS[k, i].sigmoid()),
    ),
}


def mixture_cdf(of, i, y):
    return sum(of(k, i).cdf(y) for k in range(3)) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_are_the_inverse_of_the_mixture(kind):
    prediction, of = KINDS[kind]
    at = prediction.cdf(Y)
    assert at.tolist() == pytest.approx(
        [mixture_cdf(of, i, float(Y[i])) for i in range(4)], rel=1e-9, abs=1e-12
    )
    levels = [0.03, 0.5, 0.9]
    found = prediction.quantile(levels)
    assert found.shape == (3, 4) and torch.equal(prediction.quantile(0.5), found[1])
    discrete = kind in ("Poisson", "negative binomial", "bits, some not observed")
    for q, values in zip(levels, found.tolist(), strict=True):
        for i, value in enumerate(values):
            if discrete:  # the least whole number with at least q at or below it
                assert value == round(value) and mixture_cdf(of, i, value) >= q
                assert mixture_cdf(of, i, value - 1) < q
            else:
                assert mixture_cdf(of, i, value) == pytest.approx(q, abs=1e-9)
    low, high = prediction.interval(0.8)
    torch.testing.assert_close(torch.stack([low, high]), prediction.quantile([0.1, 0.9]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "without" not in kind])
def test_moments_are_those_of_the_mixture(kind):
    prediction, of = KINDS[kind]
    means = torch.stack(
        [torch.as_tensor([float(of(k, i).mean()) for i in range(4)]) for k in range(3)]
    )
    vars_ = torch.stack(
        [torch.as_tensor([float(of(k, i).var()) for i in range(4)]) for k in range(3)]
    )
    second = (vars_ + means.square()).mean(0).to(DTYPE)
    mean = means.mean(0).to(DTYPE)
    torch.testing.assert_close(prediction.mean, mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(prediction.variance, second - mean.square(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(prediction.sd.square(), prediction.variance)
    samples = prediction.samples(8_000, seed=3)
    assert samples.shape == (8_000, 4)
    error = (samples.mean(0) - prediction.mean) / (prediction.sd / 8_000**0.5)
    assert error.abs().max() < 4
    below = (samples <= Y).double().mean(0)
    assert (below - prediction.cdf(Y)).abs().max() < 4 * 0.5 / 8_000**0.5
    assert torch.equal(prediction.samples(5, seed=1), prediction.samples(5, seed=1))


def test_all_rows_of_a_draw_have_one_draw_of_the_weights():
    narrow = RealPrediction(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.full((2, 2), 0.1))
    drawn = narrow.samples(10)
    assert torch.equal(drawn[:, 0] > 5, drawn[:, 1] > 5) and int((drawn[:, 0] > 5).sum()) == 5


@pytest.mark.parametrize("kind", ["Normals", "Student", "Poisson"])
def test_crps_is_the_integral_of_its_definition(kind):
    prediction, of = KINDS[kind]
    y = Y.abs().round() if kind == "Poisson" else Y
    found, sd = prediction.crps(y), prediction.sd
    for i, target in enumerate(y.tolist()):
        if kind == "Poisson":
            k = np.arange(200)
            expected = ((mixture_cdf(of, i, k) - (target <= k)) ** 2).sum()
        else:
            below, above = (
                np.linspace(target - 60, target, 8001),
                np.linspace(target, target + 60, 8001),
            )
            expected = integrate.simpson(mixture_cdf(of, i, below) ** 2, x=below)
            expected += integrate.simpson((1 - mixture_cdf(of, i, above)) ** 2, x=above)
        # from 2,000 draws, but for Normals: four standard errors of E|Y − y|
        within = 1e-6 if kind == "Normals" else 4 * float(sd[i]) / 2000**0.5
        assert float(found[i]) == pytest.approx(expected, abs=within)
    drawn = prediction.samples(8_000)
    within = 5 * float(sd.max()) / 2000**0.5
    assert bmr.metrics.crps(drawn, y) == pytest.approx(float(found.mean()), abs=within)


def test_crps_of_few_draws_is_that_of_their_pairs():
    few, some = LOCS, Y[:1].expand(4)
    pairs = sum((few[s] - few[t]).abs() for s in range(3) for t in range(3)) / 6
    expected = (few - some).abs().mean(0) - pairs / 2
    assert bmr.metrics.crps(few, some) == pytest.approx(float(expected.mean()))


def test_scores_of_bits_grades_and_intervals():
    p, bits = torch.tensor([[0.2, 0.9], [0.6, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, math.nan]])
    assert bmr.metrics.binary_brier(p, bits) == pytest.approx((0.04 + 0.01 + 0.36) / 3)
    two = torch.tensor([[0.8, 0.2], [0.1, 0.9]])
    assert bmr.metrics.brier(two, torch.tensor([0, 1])) == pytest.approx(
        2 * bmr.metrics.binary_brier(two[:, 1], torch.tensor([0, 1]))
    )
    probs, grades = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), torch.tensor([2, 1])
    expected = [0.5**2 + 0.8**2, 0.1**2 + (0.3 - 1) ** 2]
    assert bmr.metrics.ranked_probability(probs, grades) == pytest.approx(sum(expected) / 2)
    low, high = torch.zeros(4), torch.ones(4)
    y = torch.tensor([0.0, 0.5, 1.5, math.nan])
    assert bmr.metrics.coverage(low, high, y) == pytest.approx(2 / 3)
    with pytest.raises(bmr.errors.DataError, match="low: expected shape"):
        bmr.metrics.coverage(low[:2], high, y)
    with pytest.raises(bmr.errors.DataError, match="y of 0 and 1"):
        bmr.metrics.binary_brier(p, 2 * bits)


def test_what_has_no_distribution_function_has_quantiles_from_draws():
    beta = mixture(lambda k, i: dist.Beta(C[k] * torch.ones_like(LOCS[k, i]), 2.0))
    with pytest.raises(bmr.errors.ModelError, match="no distribution function of a Beta"):
        beta.cdf(Y)
    found = beta.quantile([0.2, 0.7])
    for q, value in zip((0.2, 0.7), found[:, 0].tolist(), strict=True):
        at = sum(float(stats.beta(c, 2.0).cdf(value)) for c in C) / 3
        assert at == pytest.approx(q, abs=4 * 0.5 / 2000**0.5)
    assert found.shape == (2, 4)
    for q in (0.0, 1.0, [0.2, 1.2], "half"):
        with pytest.raises(bmr.errors.DataError, match="expected numbers above 0 and below 1"):
            beta.quantile(q)
    two = dist.MultivariateNormal(torch.tensor([0.5, 1.0]), torch.tensor([[4.0, 1.0], [1.0, 9.0]]))
    at = torch.tensor([1.7, -0.4])
    assert cdf(two, at).tolist() == pytest.approx(stats.norm.cdf(at, [0.5, 1], [2, 3]).tolist())
    wide = dist.Uniform(torch.tensor([0.0, 3.0]), torch.tensor([2.0, 5.0]))
    assert cdf(wide, torch.tensor([0.5, 2.0])).tolist() == [0.25, 0.0]


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3 + x[:, 0].abs()), obs=y)
        pyro.sample("n", dist.Poisson((x @ w).exp()))


X = torch.randn(50, 3, generator=GENERATOR, dtype=DTYPE)
POSTERIOR = bmr.Posterior.from_moments(
    {"w": torch.tensor([0.4, -0.3, 0.2], dtype=DTYPE)},
    {"w": torch.full((3,), 0.05, dtype=DTYPE)},
    bmr.Gaussian(1.0),
)


@pytest.mark.parametrize("site", ["y", "n"])
def test_a_prediction_in_chunks_is_the_one_in_memory(site, monkeypatch):
    whole = bmr.predict(regression, POSTERIOR, X, draws=7, seed=5, site=site)
    needed = 2 * 7 * 50 * 2 * 8
    kept, count = (needed - 1, 2) if site == "y" else (needed // 3, 4)
    monkeypatch.setattr(predicting, "_KEPT", kept)
    chunked = bmr.predict(regression, POSTERIOR, X, draws=7, seed=5, site=site)
    assert type(chunked) is ChunkedPrediction and len(chunked.chunks) == count
    y = torch.arange(50, dtype=DTYPE) % 4
    for name in ("mean", "aleatoric", "epistemic", "variance", "sd"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name))
    torch.testing.assert_close(chunked.log_prob(y), whole.log_prob(y))
    torch.testing.assert_close(chunked.cdf(y), whole.cdf(y))
    torch.testing.assert_close(chunked.quantile([0.1, 0.6]), whole.quantile([0.1, 0.6]))
    torch.testing.assert_close(chunked.quantile(0.6), whole.quantile(0.6))
    if site == "y":
        torch.testing.assert_close(chunked.crps(y), whole.crps(y))
    both = chunked.each(lambda part: torch.stack([part.mean, part.sd]), rows_axis=1)
    torch.testing.assert_close(both, torch.stack([whole.mean, whole.sd]))
    drawn = chunked.samples(6)
    assert drawn.shape == (6, 50) and len(drawn[0].unique()) > 3
    with pytest.raises(bmr.errors.DataError, match=r"expected shape \(50,\)"):
        chunked.log_prob(y[:3])
    assert chunked.quantile(0.5).shape == (50,)


def test_noise_of_two_chunks_is_not_the_same(monkeypatch):
    monkeypatch.setattr(predicting, "_KEPT", 2 * 7 * 25 * 2 * 8)
    x = X[:25].repeat(2, 1)  # both chunks have the same rows
    drawn = bmr.predict(regression, POSTERIOR, x, draws=7, site="y").samples(8)
    assert (drawn[:, :25] != drawn[:, 25:]).all()


def test_an_observed_site_is_chosen_by_name():
    y = bmr.predict(regression, POSTERIOR, X, site="y")
    n = bmr.predict(regression, POSTERIOR, X, site="n")
    assert isinstance(y, RealPrediction) and isinstance(n, MixturePrediction)
    assert (n.mean > 0).all() and (y.mean < 0).any()
    with pytest.raises(
        bmr.errors.ModelError, match=r"one observed.*n \(Poisson\); say which, site"
    ):
        bmr.predict(regression, POSTERIOR, X)
    with pytest.raises(bmr.errors.ModelError, match=r"'z', got: y \(Normal\), n \(Poisson\)$"):
        bmr.predict(regression, POSTERIOR, X, site="z")


def second(x, y=None, n=None):
    """The rate of the counts depends on the other observed site."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)
        pyro.sample("n", dist.Poisson(y.exp()), obs=n)


def test_a_site_that_depends_on_another_does_not_depend_on_the_random_state():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(bmr.predict(second, POSTERIOR, X, site="n").mean)
        assert torch.initial_seed() == seed
    assert torch.equal(*found) and len(found[0].unique()) == 50


def test_targets_that_are_missing_are_not_scored():
    y = torch.tensor([[0.4, math.nan], [math.nan, math.nan], [1.2, -0.3]], dtype=DTYPE)
    locs, scales = LOCS.view(2, 3, 2), SCALES.view(2, 3, 2)
    prediction = RealPrediction(locs, scales, missing=True)
    each = torch.distributions.Normal(locs, scales).log_prob(y.nan_to_num(9.0))
    each = each.masked_fill(y.isnan(), 0.0).sum(-1)
    torch.testing.assert_close(prediction.log_prob(y), each.logsumexp(0) - math.log(2))
    assert prediction.log_prob(y)[1] == 0
    crps = prediction.crps(y)
    torch.testing.assert_close(crps.isnan(), y.isnan())
    whole = RealPrediction(locs, scales).crps(y.nan_to_num(0.5))
    torch.testing.assert_close(crps[~y.isnan()], whole[~y.isnan()])
    general = MixturePrediction(
        [
            [likelihoods.Ignoring(dist.Normal(loc, scale)).to_event(1)]
            for loc, scale in zip(locs, scales, strict=True)
        ],
        -2,
    )
    torch.testing.assert_close(general.log_prob(y), prediction.log_prob(y))
    x = torch.randn(6, 2)
    labels = torch.tensor([[0, -100], [2, 1], [-100, -100], [1, 1], [0, 2], [2, -100]])
    net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Unflatten(1, (2, 3)))
    model = bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Categorical(ignore_index=-100))
    posterior = bmr.Posterior.from_guide(bmr.MeanField(model, x, labels), model, x, labels)
    predicted = bmr.predict(model, posterior, x)
    log_p = predicted.log_prob(labels)
    picked = predicted.probs.gather(-1, labels.clamp_min(0)[..., None])[..., 0].log()
    torch.testing.assert_close(log_p, picked.masked_fill(labels < 0, 0.0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_bits_of_any_type_are_scored(dtype):
    prediction, of = KINDS["bits, some not observed"]
    bits = torch.tensor([1, 0, 0, 1])
    chance = [sum(of(k, i).pmf(int(bits[i])) for k in range(3)) / 3 for i in range(4)]
    assert prediction.log_prob(bits.to(dtype)).exp().tolist() == pytest.approx(chance)
    at_most = [mixture_cdf(of, i, int(bits[i])) for i in range(4)]
    assert prediction.cdf(bits.to(dtype)).tolist() == pytest.approx(at_most)
