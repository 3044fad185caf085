"""What a fit says of a program that does not run, or observes nothing."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_bmr as bmr

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=GENERATOR)
Y = X @ torch.tensor([1.0, 0.0, -1.0]) + 0.5 * torch.randn(40, generator=GENERATOR)
fit = partial(bmr.fit, epochs=1, batch_size=40, progress=False)


def weights():
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def without_obs(likelihood, latents=weights):
    def program(x, y=None):
        likelihood(x, y, latents())

    return program


def forgotten(x, y, w):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0))


def forgotten_in_a_loop(x, y, w):
    for row in pyro.plate("data", len(x)):
        pyro.sample(f"y_{row}", dist.Normal(x[row] @ w, 1.0))


def forgotten_classes(x, y, w):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w))


def forgotten_event(x, y, w):
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1))


NOTHING_OBSERVED = {
    "no likelihood": (lambda x, y, w: None, "no observed site.*'w'; did you forget obs=y"),
    "a site": (forgotten_event, "no observed site.*'w', 'y'; did you forget obs=y"),
    "a plate": (forgotten, r"'y' has an entry per row in plate 'data'.*sample\('y', ..., obs=y\)"),
    "a loop": (forgotten_in_a_loop, "site 'y_0' has an entry per row in plate 'data'.*obs=y"),
    "classes": (forgotten_classes, "site 'y' has an entry per row in plate 'data'.*obs=y"),
}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 10}, {"validation": 0.2}])
@pytest.mark.parametrize("case", NOTHING_OBSERVED)
def test_a_program_that_observes_nothing_is_refused(case, settings):
    likelihood, words = NOTHING_OBSERVED[case]
    with pytest.raises(bmr.errors.FitError, match=words):
        fit(without_obs(likelihood), (X, Y), **settings)


def test_many_latent_sites_are_not_all_named():
    def many(x, y=None):
        for k in range(30):
            pyro.sample(f"w_{k}", dist.Normal(0.0, 1.0))

    with pytest.raises(bmr.errors.FitError, match="'w_0'.*'w_4' and 25 more; did you"):
        fit(many, (X, Y))


def test_a_program_without_sites_is_refused():
    with pytest.raises(bmr.errors.FitError, match="no latent site and no observed site; write it"):
        fit(lambda x, y=None: x.sum(), (X, Y))


def with_factor(x, y, w):
    pyro.factor("likelihood", -0.5 * (y - x @ w).square().sum())


def with_factors(x, y, w):
    with pyro.plate("data", len(x)):
        pyro.factor("likelihood", -0.5 * (y - x @ w).square())


def observed(x, y, w, **settings):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y, **settings)


def observed_under_a_mask(x, y, w):
    with poutine.mask(mask=y > 0):
        observed(x, y, w)


def observed_in_part(x, y, w):
    observed(x, y, w, obs_mask=y > 0)


def with_local_latents(x, y, w):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ w + u, 1.0), obs=y)


def in_a_loop(x, y, w):
    for row in pyro.plate("data", len(x)):
        pyro.sample(f"y_{row}", dist.Normal(x[row] @ w, 1.0), obs=y[row])


OBSERVED = [
    with_factor,
    with_factors,
    observed_under_a_mask,
    observed_in_part,
    with_local_latents,
    in_a_loop,
]


@pytest.mark.parametrize("likelihood", OBSERVED)
def test_every_way_to_observe_is_fitted(likelihood):
    assert "w" in fit(without_obs(likelihood), (X, Y)).posterior.sites


def test_a_condition_observes():
    def conditioned(x, y):
        poutine.condition(without_obs(forgotten), data={"y": y})(x)

    assert "w" in fit(conditioned, (X, Y)).posterior.sites


def several(x, offset, y=None):
    observed(x, y - offset, weights())


def tuple_as_tensor(x, y=None):
    observed(x, y, weights())


BOTH = {"x": X, "off": Y}
NETWORK = "BayesianNetwork"
MENDS = {
    "three arguments": (lambda x, off, y: None, ((X, Y), Y), r"a tuple of 2.*xs\[0\], xs\[1\]$"),
    "y by default": (
        several,
        ((X, Y), Y),
        r"NoneType.*a tuple of 2.*xs\[0\], xs\[1\]$",
    ),
    "a tuple as a tensor": (tuple_as_tensor, ((X, Y), Y), r"one argument, a tuple of 2: write"),
    "a list of inputs": (tuple_as_tensor, ([X, Y], Y), r"one argument, a tuple of 2: write"),
    "a dict as a tensor": (tuple_as_tensor, (BOTH, Y), r"a dict of 2.*xs\['x'\], xs\['off'\]$"),
    "one argument": (lambda x: None, (X, Y), r"two arguments: write program\(x, y=None\)"),
    "three, of one input": (lambda x, off, y: None, (X, Y), "several inputs are one x, a tuple$"),
    "a network": (nn.Linear(3, 1), (X, Y), NETWORK),
}


@pytest.mark.parametrize("case", MENDS)
def test_a_program_that_takes_other_arguments_is_told_the_mend(case):
    program, data, words = MENDS[case]
    with pytest.raises(bmr.errors.FitError, match=words) as caught:
        fit(program, data)
    assert (NETWORK in str(caught.value)) == (words == NETWORK)


def test_a_network_that_takes_y_is_told_how_it_becomes_a_program():
    class Two(nn.Module):
        def forward(self, x, mask=None):
            return x

    with pytest.raises(bmr.errors.FitError, match=f"no latent site.*{NETWORK}"):
        fit(Two(), (X, Y))


def test_other_errors_of_a_program_have_no_mend_that_does_not_fit():
    def program(x, y=None):
        return weights() @ torch.zeros(2)

    class Program(nn.Module):
        def forward(self, x, y=None):
            return program(x, y)

    network = bmr.BayesianNetwork(nn.Linear(2, 1), bmr.Gaussian(), bmr.Normal())
    for wrong in (program, Program(), network):
        with pytest.raises(bmr.errors.FitError, match="does not run") as caught:
            fit(wrong, (X, Y))
        assert NETWORK not in str(caught.value) and "arrives as" not in str(caught.value)


def subsampled(x, y, w):
    with pyro.plate("data", 40, subsample_size=20) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])


def looped(x, y, w):
    for row in pyro.plate("data", 40, subsample_size=20):
        pyro.sample(f"y_{row}", dist.Normal(x[row] @ w, 1.0), obs=y[row])


def by_pyro(x, y, w):
    with pyro.plate("data", 40, subsample_size=20):
        pyro.sample("y", dist.Normal(pyro.subsample(x, 0) @ w, 1.0), obs=pyro.subsample(y, 0))


def all_rows(x, y, w):
    with pyro.plate("data", 40):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("likelihood", [subsampled, looped, by_pyro, all_rows])
def test_a_plate_of_all_rows_is_told_that_the_batch_comes(likelihood):
    draws = "" if likelihood is all_rows else ", of which it draws 20"
    words = rf"plate 'data' has 40 rows{draws}, and.* given 8: .*the batch.*\(\"data\", len\(x\)\)"
    with pytest.raises(bmr.errors.FitError, match=words):
        fit(without_obs(likelihood), (X, Y), batch_size=10)


def test_an_index_error_of_another_tensor_is_no_plate_of_rows():
    def program(x, y=None):
        with pyro.plate("words", 50):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        return torch.zeros(5)[torch.tensor(7)]

    with pytest.raises(bmr.errors.FitError, match="out of bounds") as caught:
        fit(program, (X, Y))
    assert "plate" not in str(caught.value)
