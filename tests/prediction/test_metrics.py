"""Scores against loops over numpy arrays, and predictive densities against their formulas, in
float64.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import pyro_bmr as bmr
from pyro_bmr.posteriors.site import Site
from pyro_bmr.prediction import metrics
from pyro_bmr.prediction.predict import ClassPrediction, RealPrediction

N, C = 90, 4


@pytest.fixture
def scored():
    """Probabilities that are neither sharp nor flat, and labels that they predict better than
    chance.
    """
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 1.7, (N, C))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.array([rng.choice(C, p=0.6 * p + 0.4 / C) for p in probs])
    return torch.from_numpy(probs), torch.from_numpy(y), probs, y


def test_accuracy(scored):
    probs, y, p, labels = scored
    right = sum(
        1
        for row, label in zip(p, labels, strict=True)
        if max(range(C), key=lambda c: row[c]) == label
    )
    assert 0.3 < right / N < 0.9 and metrics.accuracy(probs, y) == pytest.approx(
        right / N, abs=1e-15
    )


def test_brier(scored):
    probs, y, p, labels = scored
    total = 0.0
    for row, label in zip(p, labels, strict=True):
        for c in range(C):
            total += (row[c] - (1.0 if c == label else 0.0)) ** 2
    assert metrics.brier(probs, y) == pytest.approx(total / N, rel=1e-13)
    assert metrics.brier(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == 2.0


def by_width(p, labels, bins):
    """Bin b holds the confidences in (b/bins, (b+1)/bins]."""
    table = []
    for b in range(bins):
        inside = [
            (max(row), int(np.argmax(row) == label))
            for row, label in zip(p, labels, strict=True)
            if b / bins < max(row) <= (b + 1) / bins
        ]
        if inside:
            table.append(
                [
                    np.mean([c for c, _ in inside]),
                    np.mean([r for _, r in inside]),
                    len(inside) / len(p),
                ]
            )
    return np.array(table)


def by_mass(p, labels, bins):
    """Bin b holds the b-th of `bins` equal parts of the rows in order of confidence."""
    pairs = sorted(
        (max(row), int(np.argmax(row) == label)) for row, label in zip(p, labels, strict=True)
    )
    parts = [pairs[k * len(pairs) // bins : (k + 1) * len(pairs) // bins] for k in range(bins)]
    return np.array(
        [
            [np.mean([c for c, _ in part]), np.mean([r for _, r in part]), len(part) / len(pairs)]
            for part in parts
            if part
        ]
    )


@pytest.mark.parametrize(("binning", "table"), [("width", by_width), ("mass", by_mass)])
@pytest.mark.parametrize("bins", [1, 6, 15])
def test_calibration_and_ece(scored, binning, table, bins):
    probs, y, p, labels = scored
    want = table(p, labels, bins)
    got = metrics.calibration(probs, y, bins, binning)
    assert got.dtype == torch.float64 and np.allclose(got, want, rtol=0, atol=1e-13)
    ece = sum(fraction * abs(accuracy - confidence) for confidence, accuracy, fraction in want)
    assert ece > 0.02 and metrics.ece(probs, y, bins, binning) == pytest.approx(ece, abs=1e-13)


def test_ece_defaults_to_15_bins_of_equal_width(scored):
    probs, y, p, labels = scored
    want = by_width(p, labels, 15)
    assert len(want) > 8 and metrics.ece(probs, y) == pytest.approx(
        float((want[:, 2] * np.abs(want[:, 0] - want[:, 1])).sum()), abs=1e-13
    )
    assert abs(metrics.ece(probs, y) - metrics.ece(probs, y, binning="mass")) > 1e-3


def test_mass_bins_share_the_rows_that_do_not_divide(scored):
    probs, y, _, _ = scored
    fractions = metrics.calibration(probs, y, 7, "mass")[:, 2] * N
    assert (
        len(fractions) == 7
        and float(fractions.sum()) == pytest.approx(N)
        and float(fractions.max() - fractions.min()) == pytest.approx(1)
    )


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    probs = torch.tensor([[0.5, 0.5 - 1e-9], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    table = metrics.calibration(probs, torch.tensor([0, 1, 0]), 4)
    assert table.tolist() == [
        [0.5, 1.0, pytest.approx(1 / 3)],
        [0.75, 0.0, pytest.approx(1 / 3)],
        [1.0, 1.0, pytest.approx(1 / 3)],
    ]


def test_rmse():
    rng = np.random.default_rng(2)
    mean, y = rng.normal(3, 2, 40), rng.normal(1, 5, 40)
    want = math.sqrt(sum((a - b) ** 2 for a, b in zip(mean, y, strict=True)) / 40)
    assert metrics.rmse(torch.from_numpy(mean), torch.from_numpy(y)) == pytest.approx(
        want, rel=1e-14
    )


def test_log_prob_of_classes(scored):
    probs, y, p, labels = scored
    prediction = ClassPrediction(probs, torch.zeros(N), torch.zeros(N))
    want = [math.log(row[label]) for row, label in zip(p, labels, strict=True)]
    assert np.allclose(prediction.log_prob(y), want, rtol=1e-14, atol=0)


def test_log_prob_of_an_impossible_class_is_finite():
    prediction = ClassPrediction(torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.zeros(1))
    with pytest.warns(bmr.PyroBMRWarning, match="probability of 0"):
        value = float(prediction.log_prob(torch.tensor([1])))
    assert math.isfinite(value) and value < -80


@pytest.fixture
def mixture():
    rng = np.random.default_rng(6)
    locs, scales, y = (
        rng.normal(2, 1.5, (7, 12)),
        rng.uniform(0.3, 2.0, (7, 12)),
        rng.normal(2, 2, 12),
    )
    return RealPrediction(torch.from_numpy(locs), torch.from_numpy(scales)), locs, scales, y


def test_log_prob_of_real_targets(mixture):
    prediction, locs, scales, y = mixture
    want = []
    for n in range(12):
        density = 0.0
        for k in range(7):
            density += (
                math.exp(-0.5 * ((y[n] - locs[k, n]) / scales[k, n]) ** 2)
                / (scales[k, n] * math.sqrt(2 * math.pi))
                / 7
            )
        want.append(math.log(density))
    assert np.allclose(prediction.log_prob(torch.from_numpy(y)), want, rtol=0, atol=1e-12)


def test_moments_of_real_targets(mixture):
    prediction, locs, scales, _ = mixture
    mean = locs.sum(0) / 7
    total = (locs**2 + scales**2).sum(0) / 7 - mean**2
    assert np.allclose(prediction.mean, mean, atol=1e-14) and np.allclose(
        prediction.aleatoric, (scales**2).sum(0) / 7, atol=1e-14
    )
    assert np.allclose(prediction.epistemic + prediction.aleatoric, total, atol=1e-13)


def sites(net, spread):
    generator = torch.Generator().manual_seed(4)
    return {
        name: Site(p.detach(), spread * torch.rand(p.shape, generator=generator, dtype=p.dtype))
        for name, p in net.named_parameters()
    }


def draws(posterior, number, seed):
    generator = torch.Generator().manual_seed(seed)
    return list(posterior.draws(number, generator))


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def test_predicted_classes_are_the_mean_over_draws():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)).double()
    program, posterior = (
        bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Categorical()),
        bmr.Posterior(sites(net, 0.9)),
    )
    x = torch.randn(11, 3, dtype=torch.float64)
    each = np.stack(
        [
            functional_call(net, values, (x,)).softmax(1).detach().numpy()
            for values in draws(posterior, 6, 3)
        ]
    )
    got = bmr.predict(program, posterior, x, draws=6, seed=3, batch_size=4)
    assert np.allclose(got.probs, each.mean(0), atol=1e-13)
    assert np.allclose(got.aleatoric, entropy(each).mean(0), atol=1e-13)
    assert np.allclose(got.epistemic + got.aleatoric, entropy(each.mean(0)), atol=1e-13)
    assert float(got.epistemic.min()) > 1e-3, "the draws disagree"


def test_predicted_reals_are_a_mixture_over_draws():
    net = nn.Linear(3, 1).double()
    noise = Site(
        torch.tensor(-0.4, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64),
        support="positive",
    )
    posterior = bmr.Posterior({**sites(net, 0.9), "noise": noise})
    x = torch.randn(8, 3, dtype=torch.float64)
    values = draws(posterior, 5, 2)
    got = bmr.predict(
        bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Normal()), posterior, x, draws=5, seed=2
    )
    locs = np.stack([(x @ v["weight"][0] + v["bias"]).numpy() for v in values])
    scales = np.array([float(v["noise"]) for v in values])
    assert np.allclose(got.locs, locs, atol=1e-13) and np.allclose(
        got.scales, scales[:, None].repeat(8, 1), atol=1e-13
    )
    assert np.allclose(
        got.epistemic, ((locs - locs.mean(0)) ** 2).mean(0), atol=1e-13
    ) and np.allclose(got.aleatoric, (scales**2).mean(), atol=1e-13)
    assert scales.std() > 0.05


def test_the_point_has_no_epistemic_part():
    net = nn.Linear(3, C).double()
    posterior = bmr.Posterior(sites(net, 0.9))
    x = torch.randn(6, 3, dtype=torch.float64)
    got = bmr.predict(
        bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Categorical()), posterior, x, draws=0
    )
    assert (
        torch.allclose(got.probs, net(x).softmax(1), atol=1e-14) and float(got.epistemic.max()) == 0
    )
