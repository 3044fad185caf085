"""A shrunk network has the function of the masked one: networks of many kinds, random masks, random
architectures.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.shrinking import masked
from pyro_bmr.shrinking.plan import shrink_each
from tests.parameters import others_slow
from tests.shrinking.networks import NETS, largest_difference, made, random_masks

# two to ten seconds each; "lenet" goes the same way, and test_recurrent.py has recurrent layers
SLOW = (
    *("vit", "vit, norm after", "branches", "lenet", "lstm", "gru", "mixer"),
    "residual with batch norm",
)
# the fraction that is pruned, and of what
PRUNED = [(0.4, "rows"), (0.5, "columns"), (0.9, "weights"), (0.99, "weights"), (1.0, "weights")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETS],
)
def test_the_function_is_that_of_the_masked_network(name, digits):
    nets = [made(NETS[name], k) for k in range(len(PRUNED))]
    masks = [random_masks(net, *PRUNED[k], k) for k, net in enumerate(nets)]
    plan = bmr.shrinking.shrink_plan(nets[0], masks[0], digits[:1])
    # the graph of the first of the others is that of all
    others = shrink_each(
        [masked(net, mask) for net, mask in zip(nets[1:], masks[1:], strict=True)], digits[:1]
    )
    removed = []
    for k, small in enumerate([plan.apply(), *others]):
        rows = digits if k < 1 else digits[:50]
        assert largest_difference(nets[k], masks[k], small, rows) <= 1e-12
        before, after = (sum(p.numel() for p in n.parameters()) for n in (nets[k], small))
        assert after <= before and (k or plan.parameters == (before, after))
        removed.append(1 - after / before)
    with torch.no_grad():
        assert float(plan.apply()(digits[:50]).std(0).max()) > 1e-3, (
            "a network that is constant anyway shows nothing"
        )
    single = bmr.shrink(nets[0].float(), masks[0], digits[:1].float())
    assert largest_difference(nets[0], masks[0], single, digits.float()) <= 1e-5
    assert removed[0] > (0.03 if name in ("lstm", "gru") else 0.1) and removed[-1] > 0.9


@pytest.mark.parametrize("seed", others_slow([2, 4], 4))
def test_random_architectures(seed):
    check_random_architecture(seed, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(8), *range(100, 200)])
def test_more_random_architectures(seed):
    check_random_architecture(seed, 3)


def check_random_architecture(seed, times):
    """The same function under each of a few random masks; the graph is read once."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    net = made(lambda: random_architecture(pick), seed)
    masks = [
        random_masks(net, pick(0.3, 0.6, 0.9), pick("rows", "rows", "columns", "weights"), seed + k)
        for k in range(times)
    ]
    x = torch.randn(30, 2, 8, 8, generator=generator, dtype=torch.float64)
    for one, small in zip(masks, shrink_each([masked(net, m) for m in masks], x[:1]), strict=True):
        assert largest_difference(net, one, small, x) <= 1e-12


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
