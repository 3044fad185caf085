"""A small network that is fitted, reduced and exported."""

import pytest
import torch

import pyro_bmr as bmr
from tests.exporting.networks import X, Y, normed


@pytest.fixture(scope="module")
def pruned():
    """A small network with a norm layer, fitted and reduced to 40% of its weights."""
    torch.manual_seed(2)
    program = bmr.BayesianNetwork(normed(), bmr.Gaussian(0.5), bmr.Categorical())
    fit = bmr.fit(
        program,
        (X, Y),
        epochs=4,
        batch_size=10,
        reduce=bmr.Every(1, kept=0.4, start=0, stop=0.75),
        progress=False,
    )
    return program, fit, bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0), kept=0.4)


@pytest.fixture
def exported(pruned):
    return bmr.export(pruned[1].program, pruned[2].posterior)
