"""Corrupted images and scores under shift."""

import itertools

import pytest
import torch
from sklearn.metrics import roc_auc_score

import pyro_bmr as bmr
from pyro_bmr.experiments.shift import CORRUPTIONS, corrupted
from pyro_bmr.prediction import metrics

X = 0.1 * torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1)) + torch.linspace(
    0, 2, 28
)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_farther_from_the_image(name):
    distances = [
        float((corrupted(X, name, severity, seed=4) - X).square().mean())
        for severity in range(1, 6)
    ]
    assert distances[0] > 0 and all(a < b for a, b in itertools.pairwise(distances)), distances
    assert (
        torch.equal(corrupted(X, name, 3, seed=4), corrupted(X, name, 3, seed=4))
        and corrupted(X, name, 5).shape == X.shape
    )


def test_what_is_no_corruption_is_refused():
    with pytest.raises(bmr.errors.DataError, match="fog"):
        corrupted(X, "fog", 1)
    with pytest.raises(bmr.errors.DataError, match="6"):
        corrupted(X, next(iter(CORRUPTIONS)), 6)


def test_auroc_and_entropy():
    generator = torch.Generator().manual_seed(0)
    # with ties
    inside, outside = (
        torch.randn(50, generator=generator).round(decimals=1),
        (torch.randn(70, generator=generator) + 0.7).round(decimals=1),
    )
    expected = roc_auc_score([0] * 50 + [1] * 70, torch.cat([inside, outside]).numpy())
    assert metrics.auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    probs = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    assert metrics.predictive_entropy(probs).tolist() == pytest.approx(
        [-(0.2 * torch.tensor(0.2).log() + 0.8 * torch.tensor(0.8).log()).item(), 0.0]
    )
