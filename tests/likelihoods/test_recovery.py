"""Fits recover the parameters of simulated data: those of the likelihood, and the weights.

The allowed errors are four standard errors of the maximum-likelihood estimate, by its Fisher
information or from one run of a bootstrap, at these N.
"""

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr import likelihoods
from pyro_bmr.likelihoods.ordinal import cut_points

pytestmark = pytest.mark.slow
N = 1200
WEIGHT = torch.tensor([0.8, -0.5, 0.0])


class Simulated(NamedTuple):
    """`sites`: site → value and allowed error."""

    likelihood: object
    x: torch.Tensor
    y: torch.Tensor
    sites: dict[str, tuple[object, float]]
    outputs: int = 1
    bias: bool = True


def rows():
    torch.manual_seed(11)
    x = torch.randn(N, 3)
    return x, x @ WEIGHT


def normal():
    x, f = rows()
    y = f + 0.4 * torch.randn(N)
    return Simulated(bmr.Normal(), x, y, {"weight": (WEIGHT, 0.047), "noise": (0.4, 0.033)})


def normal_in_large_units():
    x, f = rows()
    y = 300 * (f + 0.4 * torch.randn(N))
    x = x * 300  # a column per unit of the target, so that the weights have their prior's size
    likelihood = bmr.Normal(noise_scale=300.0)
    return Simulated(likelihood, x, y, {"weight": (WEIGHT, 0.047), "noise": (120.0, 9.8)})


def noise_of_each_output():
    x, f = rows()
    y = torch.stack([f, -f], 1) + torch.tensor([0.3, 0.9]) * torch.randn(N, 2)
    likelihood = bmr.Normal(noise="per output")
    weights = torch.stack([WEIGHT, -WEIGHT])
    sites = {"weight": (weights, 0.105), "noise": ([0.3, 0.9], 0.074)}
    return Simulated(likelihood, x, y, sites, outputs=2)


def noise_of_the_network():
    x, f = rows()
    slopes = torch.tensor([0.0, 0.1, 0.5])
    y = f + (x @ slopes - 0.8).exp() * torch.randn(N)
    sites = {"weight": (torch.stack([WEIGHT, slopes]), 0.085), "bias": ([0.0, -0.8], 0.085)}
    return Simulated(bmr.Normal(noise="network"), x, y, sites, outputs=2)


def student():
    x, f = rows()
    y = f + 0.4 * torch.distributions.StudentT(4.0).sample((N,))
    sites = {"weight": (WEIGHT, 0.055), "noise": (0.4, 0.055), "df": (4.0, 1.9)}
    return Simulated(likelihoods.StudentT(), x, y, sites)


def missing():
    x, f = rows()
    y = torch.stack([f, -f], 1) + 0.4 * torch.randn(N, 2)
    y[torch.rand(N, 2) < 0.4] = math.nan
    weights = torch.stack([WEIGHT, -WEIGHT])
    sites = {"weight": (weights, 0.06), "noise": (0.4, 0.03)}
    return Simulated(bmr.Normal(missing="ignore"), x, y, sites, outputs=2)


def poisson():
    x, f = rows()
    time = 0.2 + 3 * torch.rand(N)
    y = torch.poisson(time * (f - 0.3).exp())
    likelihood = bmr.Poisson(exposure=3)
    given = torch.cat([x, time[:, None]], 1)
    return Simulated(likelihood, given, y, {"weight": (WEIGHT, 0.10), "bias": (-0.3, 0.13)})


def negative_binomial():
    x, f = rows()
    time = 0.5 + torch.rand(N)
    rate = torch.distributions.Gamma(1.5, 1.5 / (time * (f + 1.2).exp())).sample()
    given = torch.cat([time[:, None], x], 1)
    sites = {"weight": (WEIGHT, 0.13), "bias": (1.2, 0.13), "concentration": (1.5, 0.45)}
    return Simulated(bmr.NegativeBinomial(exposure=0), given, torch.poisson(rate), sites)


def bernoulli():
    x, f = rows()
    y = torch.bernoulli((2 * f + 0.4).sigmoid())
    return Simulated(
        bmr.Bernoulli(), x, y.long(), {"weight": (2 * WEIGHT, 0.42), "bias": (0.4, 0.3)}
    )


def weighted():
    """Rows of another world with weight 0, and each of the others twice as likely as a half."""
    x, f = rows()
    own = torch.arange(N) % 2 == 0
    y = torch.where(own, f + 0.4 * torch.randn(N), 3 - 2 * f)
    given = torch.cat([x, 1.0 * own[:, None]], 1)
    sites = {"weight": (WEIGHT, 0.066), "noise": (0.4, 0.047)}
    return Simulated(likelihoods.Weighted(bmr.Normal(), -1), given, y, sites)


def ordinal():
    x, f = rows()
    cuts = torch.tensor([-1.5, 0.2, 1.8])
    y = (2 * f + torch.logit(torch.rand(N)) > cuts[:, None]).sum(0)
    sites = {"weight": (2 * WEIGHT, 0.35), "lowest_class": (0.182, 0.06)}
    sites["gaps"] = ([1.7, 1.6], 0.4)
    return Simulated(bmr.Ordinal(4), x, y, sites, bias=False)


def tokens():
    """A class at each of five positions; in each row some are padding."""
    torch.manual_seed(11)
    x = torch.randn(N // 4, 5, 3)
    weights = torch.stack([WEIGHT, WEIGHT.flip(0), -WEIGHT])
    y = torch.distributions.Categorical(logits=x @ weights.T).sample()
    lengths = torch.randint(2, 6, (len(x), 1))
    y[torch.arange(5) >= lengths] = -100
    # what all classes share is not determined by the data, and taken off below
    return Simulated(
        bmr.Categorical(ignore_index=-100), x, y, {"weight": (weights, 0.4)}, outputs=3
    )


CASES = [
    normal, normal_in_large_units, noise_of_each_output, noise_of_the_network, student, missing,
    poisson, negative_binomial, bernoulli, weighted, ordinal, tokens,
]  # fmt: skip


@pytest.mark.parametrize("simulated", CASES, ids=lambda case: case.__name__)
def test_the_parameters_are_recovered(simulated):
    case = simulated()
    net = nn.Linear(3, case.outputs, bias=case.bias)
    model = bmr.BayesianNetwork(net, bmr.Gaussian(2.0), case.likelihood)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the bound of so few steps is noisy; the parameters below say how near the fit is
        warnings.filterwarnings("ignore", message="the fit has not converged")
        settings = {"epochs": 40, "optimizer": bmr.natural_gradient(), "progress": False}
        fit = bmr.fit(model, (case.x, case.y), **settings)
    for name, (value, error) in case.sites.items():
        site = fit.posterior[name]
        got, value = site.value(site.mean), torch.as_tensor(value)
        if case.outputs == 3:
            got, value = got - got.mean(0), value - value.mean(0)
        torch.testing.assert_close(got.view(value.shape), value, rtol=0, atol=error)
        assert 0 < float(site.var.sqrt().max()) < 0.5


@pytest.mark.filterwarnings("ignore:y has a mean of", "ignore:the fit has not converged")
@pytest.mark.parametrize("unit", [1e-3, 1.0, 200.0])
def test_the_noise_is_learned_in_tens_of_steps_in_any_units(unit):
    torch.manual_seed(2)
    x = unit * torch.randn(300, 2)  # so that the weights have no unit
    y = x @ torch.tensor([0.8, -0.5]) + 0.4 * unit * torch.randn(300)
    net = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    model = bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Normal())
    settings = {"epochs": 60, "batch_size": 300, "optimizer": bmr.adam(5e-2), "progress": False}
    site = bmr.fit(model, (x, y), **settings).posterior["noise"]
    assert float(site.value(site.mean)) / unit == pytest.approx(0.4, rel=0.12)


def test_the_sites_of_ordinal_are_its_cut_points():
    cuts = cut_points(torch.tensor(0.182), torch.tensor([1.7, 1.6]))
    assert cuts.tolist() == pytest.approx([-1.503, 0.197, 1.797], abs=1e-3)
