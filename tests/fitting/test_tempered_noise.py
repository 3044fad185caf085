"""A fit at a temperature refuses what infers the spread of the targets, in any program, and takes
what does not; what it takes has the exact tempered posterior of a linear model.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model
from pyro_bmr.fitting.tempered_noise import check_noise

GENERATOR = torch.Generator().manual_seed(4)
X = torch.randn(40, 2, generator=GENERATOR)
Y = X @ torch.tensor([0.8, -0.4]) + 0.5 * torch.randn(40, generator=GENERATOR)
COUNTS = (3 * X[:, 0].abs()).round()
TERNARY = (X[:, 0] > 0).long() + (X[:, 0] > 1).long()


def by_hand(observed, y=Y):
    """A program with two weights and a positive site z, observed as `observed` says."""

    def program(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.7).to_event(1))
        z = pyro.sample("z", dist.LogNormal(torch.tensor(-0.5), 0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", observed(x, x @ w, z), obs=y)

    return program, (X, y)


class OwnNoise(nn.Module):
    """A program whose noise is a parameter, not a site."""

    def __init__(self):
        super().__init__()
        self.log_noise = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.7).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, self.log_noise.exp()), obs=y)


def network(likelihood, outputs, y, priors=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs))
    return bmr.BayesianNetwork(net, priors or bmr.Gaussian(0.7), likelihood), (X, y)


def affine(x, f, z):
    moved = [dist.transforms.AffineTransform(f, z)]
    return dist.TransformedDistribution(dist.Normal(torch.zeros(len(x)), 1.0), moved)


def mixture(x, f, z):
    parts = dist.Normal(torch.stack([f, -f], -1), torch.stack([z, z + 1.0], -1).expand(len(x), 2))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(x), 2)), parts)


def rows_of(name):
    data = bmr.load("diabetes")
    return load_model(name)(data, bmr.Gaussian(0.5)), (data.x_train[:60], data.y_train[:60])


INFERRED = {
    "a model of the library": (lambda: rows_of("linear_regression"), "'scale' .*'y'.*'noise'"),
    "Normal": (lambda: by_hand(lambda x, f, z: dist.Normal(f, z)), "'scale' .*'y'.*'z'"),
    "one scale per row": (
        lambda: by_hand(lambda x, f, z: dist.Normal(f, z * x[:, 0].exp())),
        "'scale' .*'z'",
    ),
    "a scale of the weights": (lambda: by_hand(lambda x, f, z: dist.Normal(f, f.exp())), "'w'"),
    "affine": (lambda: by_hand(affine), "'scale' .*'z'"),
    "mixture": (lambda: by_hand(mixture), "'scale' .*'z'"),
    "StudentT": (lambda: by_hand(lambda x, f, z: dist.StudentT(z + 2, f, 0.5)), "'df' .*'z'"),
    "Gamma": (
        lambda: by_hand(lambda x, f, z: dist.Gamma(z, z / f.exp()), Y.exp()),
        "'concentration' .*'z'",
    ),
    "NegativeBinomial": (
        lambda: by_hand(lambda x, f, z: dist.NegativeBinomial(z, logits=f - z.log()), COUNTS),
        "'total_count' .*'z'",
    ),
    "many targets": (
        lambda: by_hand(
            lambda x, f, z: dist.MultivariateNormal(
                torch.stack([f, -f], -1), z * torch.eye(2).expand(len(x), 2, 2)
            ),
            torch.stack([Y, -Y], 1),
        ),
        "depends on 'z'",
    ),
    "a parameter": (lambda: (OwnNoise(), (X, Y)), "'log_noise'"),
    "a network's noise": (
        lambda: network(bmr.Normal(noise="network"), 2, Y),
        "'scale' .*'2.weight'",
    ),
    "a network's noise without a prior": (
        lambda: network(bmr.Normal(noise="network"), 2, Y, {"0.*": bmr.Gaussian(0.7), "*": None}),
        "'scale'",
    ),
    "missing targets": (
        lambda: network(bmr.Normal(missing="ignore"), 1, Y),
        "'scale' .*'noise'",
    ),
    "counts": (lambda: network(bmr.NegativeBinomial(), 1, COUNTS), "'concentration'"),
}

KNOWN = {
    "Normal": lambda: by_hand(lambda x, f, z: dist.Normal(f * z, 0.5)),
    "one scale per row": lambda: by_hand(lambda x, f, z: dist.Normal(f * z, x[:, 0].exp())),
    "affine": lambda: by_hand(lambda x, f, z: affine(x, f * z, 0.5)),
    "Poisson": lambda: by_hand(lambda x, f, z: dist.Poisson((f * z).exp()), COUNTS),
    "Gamma": lambda: by_hand(lambda x, f, z: dist.Gamma(2.0, z * f.exp()), Y.exp()),
    "Weibull": lambda: by_hand(lambda x, f, z: dist.Weibull(z * f.exp(), 2.0), Y.exp()),
    "Beta": lambda: by_hand(
        lambda x, f, z: dist.Beta(9 * (f * z).sigmoid(), 9 * (-f * z).sigmoid()), Y.sigmoid()
    ),
    "cut points by hand": lambda: by_hand(
        lambda x, f, z: dist.OrderedLogistic(f, torch.stack([-z, z])), TERNARY
    ),
    "Ordinal": lambda: network(bmr.likelihoods.Ordinal(3), 1, TERNARY),
    "Categorical": lambda: network(bmr.Categorical(), 3, TERNARY),
    "a given noise": lambda: network(bmr.Normal(noise=0.5), 1, Y),
}


def fitted(program, data, temperature):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the fit has not converged")
        return bmr.fit(program, data, epochs=2, temperature=temperature, progress=False)


@pytest.mark.parametrize("case", INFERRED)
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_an_inferred_spread_is_refused(case, temperature):
    make, match = INFERRED[case]
    with pytest.raises(bmr.errors.FitError, match=f"temperature={temperature:g}: .*{match}"):
        fitted(*make(), temperature)


@pytest.mark.parametrize("case", KNOWN)
def test_a_known_spread_is_taken(case):
    assert fitted(*KNOWN[case](), 0.3).temperature == 0.3


@pytest.mark.parametrize("case", ["Normal", "a parameter", "a network's noise"])
def test_without_a_temperature_nothing_is_refused(case):
    assert fitted(*INFERRED[case][0](), 1.0).temperature == 1.0


def test_a_density_of_any_form_warns():
    def program(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.7).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("density", dist.Normal(x @ w, noise).log_prob(y))

    with pytest.warns(bmr.errors.PyroBMRWarning, match="'density' does not tell its parameters"):
        fitted(program, (X, Y), 0.5)


def test_the_check_changes_nothing():
    program = OwnNoise()
    before, state = program.log_noise.detach().clone(), torch.get_rng_state()
    with pytest.raises(bmr.errors.FitError):
        check_noise(program, (X, Y), {"w": torch.zeros(2)}, 0.5)
    assert torch.equal(program.log_noise, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.4, 1.7])
def test_a_program_by_hand_with_a_given_noise_has_the_exact_tempered_posterior(temperature):
    """N(y; f, σ²)^{1/T} is N(y; f, Tσ²) up to a factor."""

    def program(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.7).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    step = bmr.natural_gradient()
    fit = bmr.fit(
        program, (X, Y), epochs=1_500, optimizer=step, temperature=temperature, progress=False
    )
    variance = temperature * 0.5**2
    precision = X.T @ X / variance + torch.eye(2) / 0.7**2
    mean = torch.linalg.solve(precision, X.T @ Y / variance)
    sd = precision.diagonal().rsqrt()
    site = fit.posterior["w"]
    assert torch.allclose(site.mean, mean, atol=0.2 * float(sd.min()))
    assert torch.allclose(site.var.sqrt(), sd, rtol=0.06)
