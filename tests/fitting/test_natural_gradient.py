"""The natural-gradient fit against exact posteriors and the equations of the papers."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from tests.exact import LinearGaussian, linear_gaussian
from tests.fitting.test_elbo import X, Y, network

PROBLEM = linear_gaussian(n=60)
ROWS = (torch.tensor(PROBLEM.x), torch.tensor(PROBLEM.y))


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.full((5,), 0.3, dtype=torch.float64), 1.7).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.2])
def test_the_fixed_point_is_the_exact_mean_and_the_diagonal_of_the_exact_precision(temperature):
    exact = LinearGaussian(PROBLEM.x, PROBLEM.y, 0.7 * math.sqrt(temperature))
    mean, cov = exact.posterior(np.full(5, 0.3), 1.7**2 * np.eye(5))
    fit = bmr.fit(
        regression,
        ROWS,
        epochs=700,
        batch_size=60,
        optimizer=bmr.natural_gradient(),
        temperature=temperature,
        progress=False,
    )
    site = fit.posterior["w"]
    assert ((site.mean.numpy() - mean) / np.sqrt(np.diag(cov))) == pytest.approx(0, abs=0.2)
    assert site.var.numpy() * np.diag(np.linalg.inv(cov)) == pytest.approx(1, abs=0.2)


def test_one_step_is_that_of_the_papers():
    """h, m and the average gradient by the equations in h and δ, with the gradient of the mean loss
    at the draw by autograd.
    """
    program, rows, temperature = network(bmr.Gaussian(0.6, mean=0.2)), 50, 0.4
    guide = bmr.MeanField(program, X, Y)
    step = MeanFieldStep(program, guide, rows, temperature, seed=4)
    optimizer = bmr.natural_gradient(0.02, momentum=0.8, averaging=1e-3, cap=1e6).optimizer(
        step, ()
    )
    lam, delta = rows / temperature, temperature / (rows * 0.36)
    m, h, average = (
        guide.loc.detach().clone(),
        guide.log_scale.detach().mul(-2).exp() / lam - delta,
        torch.zeros_like(guide.loc),
    )
    for number in (1, 2):
        draw = step.run((X, Y), number)
        noise = draw.sign * draw.noise
        std = (lam * (h + delta)).rsqrt()
        w = (m + std * noise).requires_grad_()
        terms = bmr.fitting.elbo_terms(
            program, guide, X, Y, noise=(w - guide.loc.detach()) / guide.log_scale.detach().exp()
        )
        z = {name: part.detach().requires_grad_() for name, part in guide.views(w).items()}
        logits = torch.func.functional_call(program.net, z, (X,))
        loss = nn.functional.cross_entropy(logits, Y)
        assert loss.item() == pytest.approx(-terms.expected_log_likelihood.item() / rows)
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(z.values()))])
        average = 0.8 * average + 0.2 * g
        m = m - 0.02 * (average / (1 - 0.8**number) + delta * (m - 0.2)) / (h + delta)
        rho = max(1e-3, 2 / (number + 100))
        h_hat = g * noise / std
        u = (rho * (h_hat - h) / (h + delta)).clamp(-0.1, 0.5)
        previous, h = h, (h + delta) * u.exp() - delta
        retraction = (
            previous
            + rho * (h_hat - previous)
            + 0.5 * rho**2 * (h_hat - previous) ** 2 / (previous + delta)
        )
        free = u.abs() < 0.1  # not bounded
        difference = ((h + delta) / (retraction + delta)).log().abs()[free]
        # the same to second order
        assert free.float().mean() > 0.9 and bool(
            (difference < 0.2 * u[free].abs() ** 3 + 1e-12).all()
        )
        optimizer.step(lambda draw=draw: draw)
        torch.testing.assert_close(guide.loc.detach(), m, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            guide.log_scale.detach(), -0.5 * (lam * (h + delta)).log(), rtol=1e-9, atol=1e-12
        )


@pytest.mark.slow  # the one above takes it at every step
def test_a_curvature_taken_every_fourth_step_has_the_same_fixed_point():
    """Many weights under a likelihood that knows each by itself: the exact precision, in the mean
    over the weights.
    """
    x, size = torch.zeros(40, 1).double(), 12_000

    def means(x, y=None):
        w = pyro.sample(
            "w", dist.Normal(torch.full((size,), 0.3, dtype=torch.float64), 1.7).to_event(1)
        )
        with pyro.plate("data", 40):
            return pyro.sample("y", dist.Normal(w.mean().expand(40), 0.01), obs=y)

    y = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    guide = bmr.MeanField(means, x, y)
    guide.log_scale.data.fill_(0.5)
    step = MeanFieldStep(means, guide, 40, 1.0, seed=4)
    optimizer = bmr.natural_gradient(0.01, averaging=2.5e-3).optimizer(step, ())
    optimizer.steps = 500
    before = guide.log_scale.detach().clone()
    optimizer.step(lambda: step.run((x, y), 1))
    assert torch.equal(guide.log_scale, before)  # step 501 is not the turn of its only chunk
    for number in range(2, 800):
        optimizer.step(lambda number=number: step.run((x, y), number))
    precision = 40 / 0.01**2 / size**2 + 1 / 1.7**2
    assert guide.log_scale.mul(2).exp().mean().item() == pytest.approx(1 / precision, rel=0.02)


def test_the_cap_bounds_every_step():
    program = network(bmr.Gaussian(0.6))
    guide = bmr.MeanField(program, X, Y)
    step = MeanFieldStep(program, guide, 50, 1.0, seed=4)
    before = guide.loc.detach().clone()
    bmr.natural_gradient(10.0, cap=0.003).optimizer(step, ()).step(lambda: step.run((X, Y), 1))
    assert (guide.loc - before).abs().max().item() == pytest.approx(0.003)


@pytest.mark.parametrize(
    "prior",
    [bmr.Gaussian(0.5), bmr.Gaussian(), bmr.Gaussian("layer"), bmr.Horseshoe(), bmr.SpikeAndSlab()],
)
def test_every_prior_fits_and_left_parameters_are_trained(prior):
    y = torch.arange(90) % 3
    x = torch.randn(
        90, 4, generator=torch.Generator().manual_seed(1)
    ) + 2.0 * nn.functional.one_hot(y, 4)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    model = bmr.BayesianNetwork(net, prior, bmr.Categorical())
    fit = bmr.fit(
        model,
        (x, y),
        epochs=25,
        batch_size=32,
        optimizer=bmr.natural_gradient(),
        temperature=0.1,
        progress=False,
    )
    assert bmr.metrics.accuracy(bmr.predict(fit.program, fit.posterior, x, draws=0).probs, y) > 0.8
    assert not torch.equal(fit.program.net[1].weight, net[1].weight)


def test_reduction_during_the_fit_finds_the_zeros():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    y = x @ torch.tensor([2.0, 0, 0, -1.5, 0, 0]) + 0.3 * torch.randn(64, generator=generator)

    def linear(x, y=None):
        w = bmr.Gaussian().sample("w", (6,), x.new_zeros(6))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    schedule = bmr.Every(epochs=20, start=0.4, stop=0.9)
    fit = bmr.fit(
        linear,
        (x, y),
        epochs=300,
        batch_size=64,
        optimizer=bmr.natural_gradient(),
        reduce=schedule,
        progress=False,
    )
    assert fit.masks["w"].tolist() == [True, False, False, True, False, False]
    site = fit.posterior["w"]
    precision = x[:, fit.masks["w"]].square().sum(0) / 0.09 + fit.scales["w"] ** -2
    assert (site.var[fit.masks["w"]] * precision).tolist() == pytest.approx([1, 1], abs=0.3)


def test_arguments_out_of_range_and_guides_that_do_not_fit():
    for name, value in {
        "learning_rate": 0.0,
        "averaging": -1.0,
        "curvature": math.inf,
        "cap": 0.0,
        "momentum": 1.0,
    }.items():
        with pytest.raises(bmr.errors.FitError, match=rf"natural_gradient\({name}="):
            bmr.natural_gradient(**{name: value})
    with pytest.raises(bmr.errors.FitError, match=r"expected guide=MeanField.*got Point"):
        bmr.fit(regression, ROWS, guide=bmr.Point, optimizer=bmr.natural_gradient(), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02])
def test_it_does_not_diverge(temperature):
    """Ten seeds of a short fit of real images, without and with reductions; a NaN would stop the
    fit.
    """
    data = bmr.load("digits")
    for seed in range(10):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 100),
            nn.ReLU(),
            nn.Linear(100, 50),
            nn.ReLU(),
            nn.Linear(50, 10),
        )
        run = partial(
            bmr.fit,
            bmr.BayesianNetwork(net, bmr.Gaussian("layer" if seed % 2 else 0.3), data.likelihood()),
            data,
            epochs=30,
            seed=seed,
        )
        fit = run(
            optimizer=bmr.natural_gradient(),
            temperature=temperature,
            reduce=bmr.Every() if seed % 3 == 0 else None,
            progress=False,
        )
        probs = bmr.predict(fit.program, fit.posterior, data.x_test).probs
        assert bmr.metrics.accuracy(probs, data.y_test) > 0.9
