"""A network called with other weights in the places of its parameters."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal

from pyro_bmr.networks.placed_weights import PlacedWeights

X = torch.randn(5, 4)


class Tied(nn.Module):
    """Linear maps with one weight, one of them parametrised, batch norm, and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.three = orthogonal(nn.Linear(4, 4))
        self.norm, self.recurrent = nn.BatchNorm1d(4), nn.GRU(4, 3, batch_first=True)

    def forward(self, x, factor=1.0):
        if factor is None:
            raise ValueError("no factor")
        h = self.three(self.two(torch.tanh(self.norm(self.one(x)))))
        return factor * self.recurrent(h[None])[0]


def test_the_output_is_that_of_functional_call_and_the_parameters_are_put_back():
    net = Tied()
    placed, before = PlacedWeights(net), dict(net.named_parameters())
    given = {name: torch.randn_like(p) for name, p in before.items() if name != "one.bias"}
    expected = functional_call(net, given, (X,), {"factor": 2.0})
    torch.testing.assert_close(placed.call(given, (X,), {"factor": 2.0}), expected)
    assert not torch.allclose(expected, net(X, factor=2.0))
    with pytest.raises(ValueError, match="no factor"):
        placed.call(given, (X,), {"factor": None})
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert net.two.weight is net.one.weight
