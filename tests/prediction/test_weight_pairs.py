"""Antithetic draws of a weight, and their products."""

import pytest
import torch
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.prediction.weight_pairs import weight_pairs

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(4)).double()


def draws(count=4, scales=True):
    """The site and the weight of `count` draws in pairs, with a scale for each output."""
    torch.manual_seed(0)
    centre = torch.randn(5, 6).double()
    sites, weights = [], []
    for _ in range(count // 2):
        deviation = torch.randn(5, 6).double()
        for sign in (1, -1):
            site = centre + sign * deviation
            site[2] = 0.0  # a unit that is pruned
            sites.append(site)
            weights.append(site * (0.2 + torch.rand(5, 1).double()) if scales else site)
    return weights, sites


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_products_of_both_are_found(scales, biased):
    weights, sites = draws(6, scales)
    pairs = weight_pairs(weights, sites)
    assert len(pairs.weights) == 4
    biases = [torch.randn(5).double() for _ in weights] if biased else None
    found = pairs.both([F.linear(X, w) for w in pairs.weights], biases, -1)
    for k, (product, w) in enumerate(zip(found, weights, strict=True)):
        want = F.linear(X, w, biases[k] if biases else None)
        torch.testing.assert_close(product, want, rtol=1e-12, atol=1e-13)


def test_the_outputs_may_be_channels():
    weights, sites = draws(2)
    images = X.view(3, 3, 6).mT  # rows, inputs, places
    filters = [w[..., None] for w in weights]
    pairs = weight_pairs(filters, [s[..., None] for s in sites])
    found = pairs.both([F.conv1d(images, w) for w in pairs.weights], [X[0, :5], X[1, :5]], 1)
    for product, w, bias in zip(found, filters, X[:, :5], strict=False):
        torch.testing.assert_close(product, F.conv1d(images, w, bias), rtol=1e-12, atol=1e-13)


def independent(weights, sites):
    return [w + torch.randn(1).double() for w in weights], sites


def other_centres(weights, sites):
    return weights, [site + 1e-6 * (k > 1) for k, site in enumerate(sites)]


def scales_of_inputs(weights, sites):
    return [site * torch.rand(6).double() for site in sites], sites


def one_missing(weights, sites):
    return weights[:3], sites[:3]


def no_site(weights, sites):
    return weights, []


def no_scale(weights, sites):
    return [0 * weights[0], *weights[1:]], sites


def differences(weights, sites):
    """The second draw is the small difference of large numbers."""
    pairs = [(c + d, c - d) for c, d in [(torch.ones(5, 1).double(), 1 - 1e-6)] * 2]
    sites = [site for pair in pairs for site in pair]
    return [5 + site for site in sites], sites


@pytest.mark.parametrize(
    "change",
    [independent, other_centres, scales_of_inputs, one_missing, no_site, no_scale, differences],
)
def test_what_is_no_pair_is_left_alone(change):
    weights, sites = draws()
    assert weight_pairs(weights, sites) is not None
    assert weight_pairs(*change(weights, sites)) is None


def test_draws_of_a_posterior_are_pairs_around_its_mean_and_spread_as_it_is():
    mean, var = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([0.25, 4.0, 0.01])
    posterior = bmr.Posterior(
        {
            "w": bmr.Site(mean, var),
            "s": bmr.Site(torch.tensor([-1.0]), torch.tensor([0.3]), support="positive"),
        }
    )
    found = list(posterior.draws(4001, torch.Generator().manual_seed(1)))
    first, second = (torch.stack([d["w"] for d in found[k:4000:2]]) for k in (0, 1))
    torch.testing.assert_close(first + second, (2 * mean).expand(2000, 3))
    torch.testing.assert_close(first.var(0), var, rtol=0.15, atol=0.0)
    logs = torch.stack([d["s"] for d in found[:4000]]).log().view(2000, 2)
    torch.testing.assert_close(logs.sum(1), torch.full((2000,), -2.0))
    alone = posterior.draw(torch.Generator().manual_seed(1))
    assert torch.equal(alone["w"], found[0]["w"]) and not torch.equal(found[0]["w"], found[2]["w"])
    # the pair leaves the generator where one draw does, so the last has the next numbers
    assert not any(torch.equal(found[-1]["w"], d["w"]) for d in found[:-1])


def test_antithetic_draws_have_the_smaller_error_of_a_nearly_linear_mean():
    """f = tanh(0.3 w), whose mean over q is known from 200,000 numbers."""
    posterior = bmr.Posterior({"w": bmr.Site(torch.tensor([1.0]), torch.tensor([0.5]))})
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(9))
    truth = (0.3 * (1 + 0.5**0.5 * numbers)).tanh().mean()

    def error(draws):
        return (torch.stack([d["w"] for d in draws]).mul(0.3).tanh().mean() - truth).square()

    errors = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        alone = [posterior.draw(generator) for _ in range(16)]
        errors.append((error(posterior.draws(16, generator)), error(alone)))
    paired, independent = torch.tensor(errors).mean(0).sqrt()
    assert paired < 0.4 * independent
