"""FLOPs and parameters against counts by hand."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.exporting import costs
from pyro_bmr.exporting.costs import flops
from tests.exporting.networks import Queries


@pytest.fixture(scope="module")
def x():
    return bmr.load("digits").x_train[:40]


def test_flops_are_counted_by_hand(x):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 4))
    assert costs.flops(net, x) == 2 * (3 * 9 * 36 + 108 * 4)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    assert costs.parameters(layer) == {"parameters": 15, "nonzero": 11}


def test_flops_of_attention():
    assert flops(Queries().eval(), torch.randn(2, 4)) == 2 * (
        4 * 8 + 3 * 8 * 8 + 2 * 4 * 8 * 8 + 2 * 3 * 4 * 8 + 3 * 8 * 8 + 8 * 3
    )
    # in one step where torch is left to choose
    layer, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.randn(2, 5, 8)
    by_hand = 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 12)
    assert flops(layer, x) == flops(bmr.shrink(layer, {}, x), x) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()
