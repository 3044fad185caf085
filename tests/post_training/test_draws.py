"""Draws of a pruned network, held against the dense Gaussian given the zeros."""

import math

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.errors import ModelError
from tests.post_training.test_layer import dense_of, one_layer


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_draws_have_the_mean_and_covariance_given_the_zeros(turned):
    """4,000 draws; the bias takes part."""
    _, _, layer = one_layer(turned)
    size = len(layer.mean), layer.columns
    pruned = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.4
    after, _, _ = layer.holding(layer.as_parameter(pruned))
    flat = after.held.flatten()
    cov = dense_of(layer).cov
    gain = torch.linalg.solve(cov[flat][:, flat], cov[flat][:, ~flat])
    expected = 2.5 * (cov[~flat][:, ~flat] - cov[~flat][:, flat] @ gain)
    drawn = torch.stack(
        [one.mean.flatten() for one in after.draws(4_000, 2.5, torch.Generator().manual_seed(0))]
    )
    assert bool((drawn[:, flat] == 0).all())
    std = expected.diagonal().sqrt()
    error = (drawn[:, ~flat].mean(0) - after.mean.flatten()[~flat]) / std
    assert float(error.abs().max()) < 5 / math.sqrt(4_000)
    found = drawn[:, ~flat].mT.cov()
    error = (found - expected) / std[:, None] / std
    assert float(error.abs().max()) < 5 * math.sqrt(2 / 4_000)


@pytest.fixture(scope="module")
def pruned():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        x = torch.randn(60, 5)
    return bmr.prune(net, x, bmr.Categorical(), 0.4, path=[], corrections=0, progress=False), x


def test_networks_are_drawn_with_their_zeros_and_the_rest_of_the_network(pruned):
    done, _ = pruned
    before = torch.random.get_rng_state()
    first, second = done.draws(2)
    (again,) = done.draws(1)
    (other,) = done.draws(1, seed=1)
    (narrow,) = done.draws(1, widening=1e-12)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, mask in done.masks.items():
        drawn = [net.get_parameter(name) for net in (first, second, other)]
        assert all(bool((one[~mask] == 0).all()) for one in drawn)
        assert all(bool((one[mask] != done.net.get_parameter(name)[mask]).all()) for one in drawn)
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert torch.equal(again.get_parameter(name), drawn[0])
        near = narrow.get_parameter(name)
        torch.testing.assert_close(near, done.net.get_parameter(name), rtol=0, atol=1e-4)
    assert torch.equal(first[1].weight, done.net[1].weight)


@pytest.mark.parametrize("settings", [{"count": 0}, {"count": 1, "widening": 0.0}])
def test_draws_refuse(pruned, settings):
    with pytest.raises(ModelError, match="expected a (whole|finite) number > 0"):
        pruned[0].draws(**settings)


def test_the_prediction_is_the_average_over_networks(pruned):
    done, x = pruned
    found = bmr.prediction.predict_networks(done.draws(3), bmr.Categorical(), x, batch_size=7)
    probs = torch.stack([net(x).softmax(1) for net in done.draws(3)])
    torch.testing.assert_close(found.probs, probs.mean(0))
    entropies = -(probs * probs.log()).sum(2).mean(0)
    torch.testing.assert_close(found.aleatoric, entropies)


def test_other_likelihoods_are_mixtures_over_networks():
    torch.manual_seed(3)
    nets = [nn.Linear(2, 1).double() for _ in range(3)]
    x, counts = torch.randn(6, 2).double(), torch.tensor([0.0, 1, 2, 0, 3, 1]).double()
    rates = torch.stack([net(x)[:, 0].exp() for net in nets]).detach()
    found = bmr.prediction.predict_networks(nets, bmr.Poisson(), x)
    log_p = counts * rates.log() - rates - torch.lgamma(counts + 1)
    torch.testing.assert_close(found.log_prob(counts), log_p.logsumexp(0) - math.log(3))
    real = bmr.prediction.predict_networks(nets, bmr.Normal(noise=0.5), x)
    means = torch.stack([net(x)[:, 0] for net in nets]).detach()
    torch.testing.assert_close(real.mean, means.mean(0))
    torch.testing.assert_close(real.epistemic, means.var(0, correction=0))
    with pytest.raises(ModelError, match="at least one"):
        bmr.prediction.predict_networks([], bmr.Normal(), x)
