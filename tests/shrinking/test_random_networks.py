"""A shrunk network has the function of the masked one: networks of many kinds, random masks, random
architectures.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from tests.shrinking.networks import NETS, largest_difference, made, random_masks

SLOW = ("vit", "vit, norm after", "branches", "gru")  # five to ten seconds each
# the fraction that is pruned, and of what
PRUNED = [(0.4, "rows"), (0.5, "columns"), (0.9, "weights"), (0.99, "weights"), (1.0, "weights")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETS],
)
def test_the_function_is_that_of_the_masked_network(name, digits):
    removed = []
    for k, (pruned, kind) in enumerate(PRUNED):
        net = made(NETS[name], k)
        masks = random_masks(net, pruned, kind, k)
        plan = bmr.shrinking.shrink_plan(net, masks, digits[:1])
        small = plan.apply()
        rows = digits if k < 1 else digits[:50]
        assert largest_difference(net, masks, small, rows) <= 1e-12
        before, after = plan.parameters
        sizes = [sum(p.numel() for p in n.parameters()) for n in (net, small)]
        assert [before, after] == sizes and after <= before
        removed.append(1 - after / before)
        if k == 0:
            with torch.no_grad():
                assert float(small(digits[:50]).std(0).max()) > 1e-3, (
                    "a network that is constant anyway shows nothing"
                )
            single = bmr.shrink(net.float(), masks, digits[:1].float())
            assert largest_difference(net, masks, single, digits.float()) <= 1e-5
    assert removed[0] > (0.03 if name in ("lstm", "gru") else 0.1) and removed[-1] > 0.9


@pytest.mark.parametrize("seed", range(8))
def test_random_architectures(seed):
    check_random_architecture(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400))
def test_more_random_architectures(seed):
    check_random_architecture(seed)


def check_random_architecture(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    net = made(lambda: random_architecture(pick), seed)
    masks = random_masks(net, pick(0.3, 0.6, 0.9), pick("rows", "rows", "columns", "weights"), seed)
    x = torch.randn(30, 2, 8, 8, generator=generator, dtype=torch.float64)
    assert largest_difference(net, masks, bmr.shrink(net, masks, x[:1]), x) <= 1e-12


class Residual(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


def random_architecture(pick):
    """A network for images of 2 channels and 8×8; `pick` draws one of its arguments."""
    layers, channels, side = [], 2, 8
    for _ in range(pick(1, 2, 3)):
        block, channels, side = random_convolutions(pick, channels, side)
        layers += block
    layers.append(nn.Flatten())
    size = channels * side * side
    for _ in range(pick(1, 2)):
        layers += [
            nn.Linear(size, 9),
            pick(nn.Softplus(), nn.Hardtanh()),
            pick(nn.BatchNorm1d(9), nn.LayerNorm(9), nn.Dropout(0.5)),
        ]
        size = 9
        if pick(0, 1):
            layers.append(Residual(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 9)))
    return nn.Sequential(*layers, nn.Linear(size, 3))


def random_convolutions(pick, channels, side):
    """Layers for images of `channels` and side × side, and the channels and the side after them."""
    width = pick(3, 5, 6)
    padding = 1 if side < 3 else pick(0, 1)
    mode, bias = pick("zeros", "circular", "reflect" if side > 1 else "zeros"), pick(True, False)
    layers = [nn.Conv2d(channels, width, 3, padding=padding, padding_mode=mode, bias=bias)]
    channels, side = width, side - 2 + 2 * padding
    layers += [
        pick(nn.BatchNorm2d(channels), nn.Identity(), nn.GroupNorm(1, channels)),
        pick(nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Sigmoid()),
    ]
    if pick(0, 1):
        narrow, act = nn.Conv2d(channels, 4, 1), pick(nn.SiLU(), nn.ELU())
        layers.append(Residual(narrow, act, nn.Conv2d(4, channels, 3, padding=1)))
    if pick(0, 1):
        layers.append(nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels))
        channels *= 2
    if side >= 5 and pick(0, 1):
        overlapping = nn.AvgPool2d(3, 2, padding=1), nn.MaxPool2d(3, 2, padding=1)
        layers.append(pick(nn.MaxPool2d(2), nn.AvgPool2d(2), *overlapping))
        side = layers[-1](torch.zeros(1, 1, side, side)).shape[-1]
    return layers, channels, side
