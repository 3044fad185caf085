"""The posterior of one layer, held against dense algebra."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.curvatures import Curvature, LayerCurvature
from pyro_bmr.formulas import Dense, prune_subset
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.post_training.layer import layers_of

TEMPERATURE, SCALE = 0.3, 0.7


def one_layer(turned=False):
    torch.manual_seed(4)
    if turned:

        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(5, 4))

            def forward(self, x):
                return x @ self.weight

        net = Turned().double()
    else:
        net = nn.Linear(5, 4).double()
    x = torch.randn(30, 5, dtype=torch.float64) + 0.5
    found = bmr.curvature(net, x, bmr.Categorical(), fisher="gauss-newton", progress=False)
    parameters = dict(net.named_parameters())
    layer = layers_of(found, parameters, {"weight": SCALE}, {}, TEMPERATURE)["weight"]
    return net, found.layers["weight"], layer


def dense_of(layer):
    return Dense(layer.mean.flatten(), torch.kron(layer.row_cov, layer.col_cov))


def test_the_precision_is_the_curvature_over_t_and_the_prior():
    net, curved, layer = one_layer()
    g, a = curved.outputs / TEMPERATURE, curved.inputs
    ratio = ((g.trace() / 4) / (a.trace() / 6)).sqrt()
    rows = g + ratio / SCALE * torch.eye(4).double()
    columns = a + torch.eye(6).double() / (ratio * SCALE)
    torch.testing.assert_close(torch.linalg.inv(layer.row_cov), rows)
    torch.testing.assert_close(torch.linalg.inv(layer.col_cov), columns)
    # their product has H/T, and the whole prior precision
    product = torch.kron(rows, columns)
    cross = product - torch.kron(g, a) - torch.eye(24).double() / SCALE**2
    mixed = torch.kron(g, torch.eye(6).double()) / (ratio * SCALE)
    mixed = mixed + torch.kron(torch.eye(4).double(), a) * ratio / SCALE
    torch.testing.assert_close(cross, mixed)
    expected = torch.cat([net.weight, net.bias[:, None]], 1).detach()
    torch.testing.assert_close(layer.mean, expected)


def test_holding_is_the_dense_conditional_mean_and_the_gain_a_lower_bound():
    _, _, layer = one_layer()
    pruned = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    after, gain, energy = layer.holding(pruned)
    flat = torch.cat([pruned, torch.zeros(4, 1, dtype=torch.bool)], 1).flatten()
    prior = Diagonal(torch.zeros(24).double(), torch.full((24,), SCALE**2).double())
    dense_gain, rest = prune_subset(dense_of(layer), prior, flat)
    torch.testing.assert_close(after.mean.flatten()[~flat], rest.mean, rtol=1e-9, atol=1e-9)
    assert bool((after.mean.flatten()[flat] == 0).all()) and torch.equal(after.held.flatten(), flat)
    cov = dense_of(layer).cov[flat][:, flat]
    mean = layer.mean.flatten()[flat]
    torch.testing.assert_close(
        torch.tensor(energy),
        (0.5 * mean @ torch.linalg.solve(cov, mean)).float(),
        rtol=1e-5,
        atol=0,
    )
    assert gain <= float(dense_gain) < gain + 0.2 * abs(gain) + 5


def test_more_can_be_held_later():
    _, _, layer = one_layer()
    first = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.3
    more = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.4
    assert bool((first & ~more).any())
    at_once = layer.holding(first | more)[0]
    in_turn, gain, _ = layer.holding(first)[0].holding(more)
    torch.testing.assert_close(in_turn.mean, at_once.mean, rtol=1e-9, atol=1e-9)
    assert torch.equal(in_turn.held, at_once.held)
    assert in_turn.holding(more)[1:] == (0.0, 0.0) and gain != 0


def test_delta_f_of_entries_is_that_of_their_marginals():
    _, _, layer = one_layer()
    one = layer.delta_f()[2, 3]
    var = layer.row_cov[2, 2] * layer.col_cov[3, 3]
    q = torch.distributions.Normal(layer.mean[2, 3], var.sqrt()).log_prob(torch.zeros(()))
    p = torch.distributions.Normal(0.0, SCALE).log_prob(torch.zeros(()).double())
    torch.testing.assert_close(one, q - p)


def test_a_turned_weight_has_its_entries_where_the_parameter_has_them():
    net, _, layer = one_layer(turned=True)
    assert layer.turned and layer.mean.shape == (4, 5) and layer.delta_f().shape == (5, 4)
    torch.testing.assert_close(layer.as_parameter(layer.mean), net.weight.detach())
    pruned = torch.zeros(5, 4, dtype=torch.bool)
    pruned[1, 3] = True
    after = layer.holding(pruned)[0]
    assert after.as_parameter(after.mean)[1, 3] == 0 and int(after.held.sum()) == 1


def with_eigenvalues(values, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    return basis * values @ basis.mT


@pytest.mark.parametrize("spread", [1.0, 3.0, 5.0, 6.0, 7.0])
def test_factors_in_float32_are_inverted_with_the_digits_that_they_have(spread):
    """Eigenvalues over 10^spread: beyond float32 the inverse is taken in float64."""
    n, m = 60, 90
    outputs, inputs = (
        with_eigenvalues(torch.logspace(0, -spread, size).double(), size).float() for size in (n, m)
    )
    # a small ridge, as of a wide prior
    scale, temperature = 1e8, 0.3
    weight = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    curved = LayerCurvature("w", None, outputs, inputs, (n, m))
    found = Curvature({"w": curved}, {}, {}, 100)
    layer = layers_of(found, {"w": weight}, {"w": scale}, {}, temperature)["w"]
    assert layer.row_cov.dtype == layer.col_cov.dtype == torch.float32
    g, a = outputs.double() / temperature, inputs.double()
    ratio = ((g.trace() / n) / (a.trace() / m)).sqrt()
    exact = (
        torch.linalg.inv(g + ratio / scale * torch.eye(n)),
        torch.linalg.inv(a + torch.eye(m) / (ratio * scale)),
    )
    for cov, true in zip((layer.row_cov, layer.col_cov), exact, strict=True):
        std = true.diagonal().sqrt()
        error = (cov.double() - true) / std[:, None] / std
        assert float(error.abs().max()) < 1e-3
