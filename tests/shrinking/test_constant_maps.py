"""Constants that padded convolutions read, folded into numbers for each pixel."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pyro_bmr as bmr
from pyro_bmr.shrinking import masked
from tests.parameters import others_slow


def settled(net):
    """Running statistics, gains and offsets that are not neutral."""
    generator = torch.Generator().manual_seed(2)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.4, 2, generator=generator)
            nn.init.normal_(m.weight, 1, 0.3, generator=generator)
            nn.init.normal_(m.bias, 0, 0.5, generator=generator)
    return net.double().eval()


class PaddedFirst(nn.Module):
    """Pads on its own, before a convolution; the batch norm stands behind the activation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 10, 3, padding=1), nn.Conv2d(10, 6, 4)
        self.norm, self.out = nn.BatchNorm2d(10), nn.Linear(6, 2)

    def forward(self, x):
        h = functional.max_pool2d(self.norm(torch.relu(self.a(x))), 2)
        return self.out(torch.relu(self.b(functional.pad(h, (1, 2, 0, 1)))).mean((2, 3)))


class Gated(nn.Module):
    """A third of the constant channels is read by a product as well, and so is kept."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 12, 1), nn.BatchNorm2d(12)
        self.gate, self.b = nn.Conv2d(1, 12, 1), nn.Conv2d(12, 5, 3, padding=1)
        self.gate.weight.data[3:] = self.gate.bias.data[3:] = 0

    def forward(self, x):
        h = self.norm(self.a(x))
        return self.b(h).mean((2, 3)), (h * self.gate(x)).sum((1, 2, 3))


def test_a_constant_that_is_kept_is_not_in_the_map():
    torch.manual_seed(3)
    net, x = settled(Gated()), torch.randn(2, 1, 5, 5).double()
    masks = {"a.weight": torch.zeros(12, 1, 1, 1).bool()}
    masks["a.weight"][8:] = True
    small = bmr.shrink(net, masks, x, fold_padded=True)
    assert len(small.get_parameter("b.weight")[0]) == 4 + 3  # of 12
    for got, want in zip(small(x), masked(net, masks)(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


NETWORKS = {
    "norm behind the activation": (PaddedFirst, (1, 6, 8), "a"),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 12, 1), nn.BatchNorm2d(12), nn.ELU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False), nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=(0, 1), stride=2),
        ),
        (2, 5, 5), "0",
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 12, 1), nn.BatchNorm2d(12), nn.ELU(),
            nn.ConvTranspose2d(12, 7, 4, 2, 1), nn.Sigmoid(),
        ),
        (2, 4, 4), "0",
    ),
    "three dimensions": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 9, 2), nn.BatchNorm3d(9), nn.Conv3d(9, 5, 3, padding=(1, 0, 1))
        ),
        (1, 4, 4, 4), "0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", others_slow(NETWORKS, "grouped", "three dimensions"))
def test_the_smaller_network_has_the_function_of_the_masked_one(name):
    build, shape, layer = NETWORKS[name]
    torch.manual_seed(3)
    net = settled(build())
    weight = net.get_parameter(f"{layer}.weight")
    kept = torch.arange(len(weight)) % 3 == 1
    masks = {f"{layer}.weight": kept.view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)}
    x = torch.randn(5, *shape).double()
    whole = bmr.shrinking.shrink_plan(net, masks, x)
    assert any("through zero padding" in why for why in whole.kept.values()) or name.startswith(
        "norm"
    )
    plan = bmr.shrinking.shrink_plan(net, masks, x, fold_padded=True)
    small = plan.apply()
    with torch.no_grad():
        want, got = masked(net, masks)(x), small(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert len(small.get_parameter(f"{layer}.weight")) == (len(weight) + 1) // 3
    assert plan.parameters[1] < whole.parameters[1] and not plan.own_class
    assert not any("through zero padding" in why for why in plan.kept.values())


def test_a_map_is_not_larger_than_the_weights_that_it_saves():
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
    net, x = settled(nn.Sequential(*layers)), torch.randn(2, 1, 9, 9).double()
    masks = {"0.weight": (torch.arange(4) != 2).view(4, 1, 1, 1)}
    plan = bmr.shrinking.shrink_plan(net, masks, x, fold_padded=True)  # 27 weights, 243 pixels
    assert plan.own_class and plan.parameters[1] == plan.parameters[0]
    assert "[2] through zero padding" in plan.kept["2"]


class OverTime(nn.Module):
    """Convolutions over the time of a sequence (rows, time, features) of any length."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv1d(2, 30, 3), nn.BatchNorm1d(30)
        self.b = nn.Conv1d(30, 4, 5, padding=2)

    def forward(self, x):
        return self.b(self.norm(self.a(x.transpose(1, 2)))).mean(2)


@pytest.mark.slow
def test_a_length_that_is_open_stays_open():
    torch.manual_seed(3)
    net, x = settled(OverTime()), torch.randn(2, 9, 2).double()
    masks = {"a.weight": (torch.arange(30) < 5).view(-1, 1, 1).expand(30, 2, 3)}
    small = bmr.shrink(net, masks, x, fold_padded=True)
    longer = torch.randn(3, 14, 2).double()
    torch.testing.assert_close(small(longer), masked(net, masks)(longer), rtol=1e-12, atol=1e-12)


def test_nothing_changes_where_a_bias_takes_the_constants_up():
    torch.manual_seed(3)
    net = settled(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3)))
    masks = {"0.weight": (torch.arange(8) < 3).view(-1, 1, 1, 1).expand(8, 1, 3, 3)}
    x = torch.randn(2, 1, 6, 6).double()
    plan = bmr.shrinking.shrink_plan(net, masks, x, fold_padded=True)
    assert plan.own_class and len(plan.apply()[0].weight) == 3
