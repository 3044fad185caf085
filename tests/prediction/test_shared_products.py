"""Predictions that take the products of the inputs for several draws at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import pyro_bmr as bmr
from pyro_bmr.posteriors.weights import declared_weights
from pyro_bmr.prediction import shared_products
from pyro_bmr.prediction.shared_products import SharedProducts

ROWS = 600


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Small networks share products too."""
    monkeypatch.setattr(shared_products, "_LEAST_WORK", 0)
    monkeypatch.setattr(shared_products, "_LEAST_INPUTS", 0)


class Twice(nn.Module):
    """Two layers read the inputs, one of them through a view and without a bias."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 5), nn.Linear(4, 5, bias=False)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.one(x)) + self.other(x[:, 2:6]) + self.other(x[:, 4:]))


class Scaled(nn.Module):
    """A bias that is computed from a parameter, and inputs that are no view of x."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        h = F.linear(x, self.first.weight, self.first.bias * 2) + self.second(x * 0.5)
        return self.last(torch.tanh(h))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def rows(count=ROWS):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(3)).double()


def model_of(net, prior, likelihood=None):
    torch.manual_seed(1)
    return bmr.BayesianNetwork(net().double(), prior, likelihood or bmr.Categorical())


def posterior_of(program, y):
    guide = bmr.MeanField(program, rows(20), y)
    with torch.no_grad():
        guide.log_scale.add_(torch.linspace(0.5, 2.5, guide.log_scale.numel()).double())
    return bmr.Posterior.from_guide(guide, program, rows(20), y)


class Seen(TorchFunctionMode):
    """The shapes of the weights of all products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.conv1d, torch.conv2d):
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def one_by_one(program, posterior, x, draws, seed):
    """The outputs of the network at each draw."""
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for values in posterior.draws(draws, generator):
        values = declared_weights(posterior.sites, values)
        weights = {name: values[name] for name in program.priors}
        outputs.append(torch.func.functional_call(program.net, weights, (x,)))
    return torch.stack(outputs).detach()


@pytest.mark.parametrize("prior", [bmr.Gaussian(0.7), bmr.Gaussian("layer"), bmr.Horseshoe()])
@pytest.mark.parametrize("net", [perceptron, convolutions, grouped, Twice, Scaled])
def test_draws_at_many_rows_are_those_one_by_one(net, prior):
    program = model_of(net, prior)
    posterior = posterior_of(program, torch.arange(20) % 3)
    prediction = bmr.predict(program, posterior, rows(), draws=7, seed=2, batch_size=2100)
    probs = one_by_one(program, posterior, rows(), 7, 2).softmax(-1)
    entropy = -(probs * probs.log()).sum(-1).mean(0)
    assert probs.std(0).mean() > 1e-2
    torch.testing.assert_close(prediction.probs, probs.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(prediction.aleatoric, entropy, rtol=1e-10, atol=1e-12)


def test_real_numbers_and_point_estimates_of_biases():
    program = model_of(perceptron, {"*.weight": bmr.Gaussian(0.7)}, bmr.Normal())
    posterior = posterior_of(program, torch.randn(20, 3).double())
    prediction = bmr.predict(program, posterior, rows(), draws=6, seed=4, batch_size=2100)
    generator = torch.Generator().manual_seed(4)
    scales = [values["noise"] for values in posterior.draws(6, generator)]
    torch.testing.assert_close(prediction.locs, one_by_one(program, posterior, rows(), 6, 4))
    for scale, want in zip(prediction.scales, scales, strict=True):
        torch.testing.assert_close(scale, want.expand_as(scale))


@pytest.mark.parametrize(
    "net, together, alone",
    [
        # the mean and four draws, twenty-five rows and some of zeros, or twenty filters
        (perceptron, (32, 8), (5, 8)),
        (convolutions, (20, 2, 2, 2), (4, 2, 2, 2)),
        (Twice, (32, 4), (5, 4)),
    ],
)
@pytest.mark.parametrize("prior", [bmr.Gaussian(0.7), bmr.Gaussian("layer", per="unit")])
def test_the_inputs_are_read_once_for_eight_draws(net, prior, together, alone):
    program = model_of(net, prior)
    posterior = posterior_of(program, torch.arange(20) % 3)
    with Seen() as seen:
        bmr.predict(program, posterior, rows(), draws=18, seed=2, batch_size=2100)
    per_pass = 2 if alone == (5, 4) else 1  # Twice reads two views with one weight
    # three blocks of two groups of eight draws; alone the first draw, in one batch, and its fellow
    assert seen.shapes.count(together) == 3 * 2 * per_pass
    assert seen.shapes.count(alone) == (1 + 3) * per_pass


def test_inputs_that_were_written_into_are_multiplied_anew():
    x, weights = rows(300), [torch.randn(5, 8).double() for _ in range(2)]
    mode = SharedProducts([{"w": weight} for weight in weights], [])
    with mode.of(x):
        before = F.linear(x, weights[0])
        x.mul_(-3)
        mode.current = 1
        after = F.linear(x.view(300, 8), weights[1])
    torch.testing.assert_close(before, rows(300) @ weights[0].T)
    torch.testing.assert_close(after, -3 * rows(300) @ weights[1].T)


class WritesInto(nn.Module):
    """A network that writes into the product of its inputs, and asks for it again."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu_(self.first(x))
        return self.last(h - 0.5 * self.first(x))


class OtherBias(nn.Module):
    """One weight with two biases, and without."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(5, 3)
        self.other.weight = self.one.weight

    def forward(self, x):
        h = torch.tanh(self.one(x)) + torch.tanh(self.other(x))
        return self.last(h + torch.tanh(F.linear(x, self.one.weight)))


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("net", [WritesInto, OtherBias])
def test_what_else_a_network_does_with_its_inputs(net, count):
    program = model_of(net, bmr.Gaussian(0.7))
    posterior = posterior_of(program, torch.arange(20) % 3)
    found = bmr.predict(program, posterior, rows(), draws=count, seed=2, batch_size=2100)
    want = bmr.predict(program, posterior, rows(), draws=count, seed=2, batch_size=100)
    torch.testing.assert_close(found.probs, want.probs, rtol=1e-10, atol=1e-12)


def test_under_autocast_products_have_the_precision_of_the_layer():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.first(x)
            assert h.dtype == torch.bfloat16
            return self.last(h.float())

    torch.manual_seed(1)
    program = bmr.BayesianNetwork(Low(), bmr.Gaussian(0.7), bmr.Categorical())
    guide = bmr.MeanField(program, rows(20).float(), torch.arange(20) % 3)
    posterior = bmr.Posterior.from_guide(guide, program, rows(20).float(), torch.arange(20) % 3)
    x = rows().float()
    found = bmr.predict(program, posterior, x, draws=8, seed=2, batch_size=2100)
    want = bmr.predict(program, posterior, x, draws=8, seed=2, batch_size=100)
    torch.testing.assert_close(found.probs, want.probs, rtol=0.02, atol=0.02)


def test_the_memory_of_the_weights_bounds_the_draws_together(monkeypatch):
    program = model_of(perceptron, bmr.Gaussian(0.7))
    posterior = posterior_of(program, torch.arange(20) % 3)
    monkeypatch.setattr("pyro_bmr.prediction.shared_products._KEPT", 1)
    with Seen() as seen:
        bmr.predict(program, posterior, rows(), draws=5, seed=2, batch_size=2100)
    assert set(seen.shapes) == {(5, 8), (3, 5)}


def test_a_small_network_is_left_to_vmap(monkeypatch):
    program = model_of(perceptron, bmr.Gaussian(0.7))
    posterior = posterior_of(program, torch.arange(20) % 3)
    weights = sum(p.numel() for p in program.net.parameters())
    for least, shared in ((ROWS * weights, True), (ROWS * weights + 1, False)):
        monkeypatch.setattr(shared_products, "_LEAST_WORK", least)
        with Seen() as seen:
            bmr.predict(program, posterior, rows(), draws=6, seed=2)
        assert ((16, 8) in seen.shapes) is shared
