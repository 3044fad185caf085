"""Targets that do not fit the dtype, or the support, of their observed site."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_bmr as bmr

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=GENERATOR)
Y = X @ torch.tensor([1.0, 0.0, -1.0]) + 0.5 * torch.randn(40, generator=GENERATOR)
fit = partial(bmr.fit, epochs=1, batch_size=40, progress=False)


def likelihood_of(family):
    def program(x, y=None):
        f = x @ pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", family(f), obs=y)

    return program


POSITIVE = (Y > 0).float()
DTYPES = {
    "Bernoulli of truth values": (lambda f: dist.Bernoulli(logits=f), torch.bool),
    "Bernoulli of whole numbers": (lambda f: dist.Bernoulli(logits=f), torch.int64),
    "Bernoulli of bytes": (lambda f: dist.Bernoulli(logits=f), torch.uint8),
    "Normal of truth values": (lambda f: dist.Normal(f, 1.0), torch.bool),
    "Geometric of truth values": (lambda f: dist.Geometric(logits=f), torch.bool),
    "ContinuousBernoulli of whole numbers": (
        lambda f: dist.ContinuousBernoulli(logits=f),
        torch.int64,
    ),
}


@pytest.mark.parametrize("case", DTYPES)
def test_targets_of_a_dtype_without_a_density_are_told_another(case):
    family, dtype = DTYPES[case]
    program, name = likelihood_of(family), case.split()[0]
    words = rf"observed site 'y': {name} has no log density of .*; write obs=y.float\(\)"
    with pytest.raises(bmr.errors.FitError, match=words) as caught:
        fit(program, (X, POSITIVE.to(dtype)))
    assert "BayesianNetwork" not in str(caught.value)
    fit(program, (X, POSITIVE))


COUNTS = torch.arange(40) % 6
SUPPORTS = {
    "too large": (COUNTS + 4, r"upper_bound=5.*got 6 in row 2$"),
    "late": (torch.where(torch.arange(40) == 33, 77, COUNTS), r"upper_bound=5.*got 77 in row 33$"),
    "no count": (COUNTS + 0.5, "got 0.5 in row 0$"),
}


def test_the_bounds_of_a_binomial_are_those_of_all_rows():
    program = likelihood_of(lambda f: dist.Binomial(5, logits=f))
    assert "w" in fit(program, (X, COUNTS)).posterior.sites
    for y, words in SUPPORTS.values():
        with pytest.raises(bmr.errors.DataError, match=words):
            fit(program, (X, y))


def test_bounds_that_differ_between_the_rows_are_not_printed():
    program = likelihood_of(lambda f: dist.Uniform(0 * f - torch.arange(len(f)) - 20.0, 20.0))
    assert "w" in fit(program, (X, Y)).posterior.sites
    with pytest.raises(bmr.errors.DataError, match=r"site 'y' \(Interval\): got .* in row 0$"):
        fit(program, (X, Y + 100))


def test_a_row_that_is_outside_a_support_of_rows_is_shown():
    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=w), obs=y)

    with pytest.raises(bmr.errors.DataError, match=r"got \[1.0, 1.0, 1.0\] in row 0"):
        fit(program, (X, torch.ones(40, 3)))


def test_bounds_that_are_alike_in_the_first_rows_may_differ_later():
    size = torch.where(torch.arange(40) < 20, 5.0, 50.0)
    y = torch.where(torch.arange(40) < 20, 3.0, 33.0)

    def program(x, y=None):
        f = x[:, :3] @ pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Binomial(x[:, 3], logits=f), obs=y)

    assert "w" in fit(program, (torch.cat([X, size[:, None]], 1), y)).posterior.sites
