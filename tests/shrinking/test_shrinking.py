"""A shrunk network is as small as its pruned units, channels and heads allow, by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.models import mlp
from pyro_bmr.shrinking import masked
from tests.parameters import others_slow
from tests.shrinking.networks import (
    NETS,
    Branches,
    ResNet,
    largest_difference,
    made,
    random_masks,
)


def test_a_constant_is_folded_into_the_bias_by_hand():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].bias[:] = torch.tensor([0.2, -0.7, 1.1])
    masks = {
        "0.weight": torch.tensor([[True, True], [False, False], [True, True]]),
        "2.weight": torch.tensor([[True, True, False], [True, True, False]]),
    }
    small = bmr.shrink(net, masks, torch.zeros(1, 2).double())
    assert isinstance(small, nn.Sequential)
    assert small[0].weight.shape == (1, 2)
    assert small[2].weight.shape == (2, 1)
    torch.testing.assert_close(
        small[2].bias,
        net[2].bias + net[2].weight[:, 1] / (1 + torch.tensor(0.7, dtype=torch.float64).exp()),
    )
    torch.testing.assert_close(small[2].weight, net[2].weight[:, :1])


def test_what_only_pruned_units_read_is_pruned():
    net = nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)
    ).double()
    masks = {
        "2.weight": torch.tensor([[False, False, True], [True, True, True], [True, True, True]]),
        "4.weight": torch.tensor([[True, False, False]] * 2),
    }
    x = torch.randn(9, 4).double()
    small = bmr.shrink(net, masks, x)
    assert [tuple(layer.weight.shape) for layer in small[::2]] == [(1, 4), (1, 1), (2, 1)]
    assert largest_difference(net, masks, small, x) <= 1e-12


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x)
        return self.out(x + self.b(x))


@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_branch_of_a_sum_is_its_constant(bias):
    net = made(Sum, 0)
    masks = {"b.weight": torch.zeros(4, 4, dtype=torch.bool), "b.bias": torch.full((4,), bias)}
    x = torch.randn(9, 3).double()
    plan = bmr.shrinking.shrink_plan(net, masks, x)
    assert largest_difference(net, masks, plan.apply(), x) <= 1e-12
    assert plan.parameters[1] == 16 + 10 + 4 * bias


def test_a_constant_channel_is_no_constant_behind_a_norm():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    masks = {
        "0.weight": torch.ones(4, 3, dtype=torch.bool),
        "2.weight": torch.zeros(2, 4, dtype=torch.bool),
    }
    # the outputs read the constant channel, normed
    masks["0.weight"][1], masks["2.weight"][:, 1] = False, True
    x = torch.randn(9, 3).double()
    assert float(masked(net, masks)(x).detach().std(0).min()) > 1e-3
    assert largest_difference(net, masks, bmr.shrink(net, masks, x), x) <= 1e-12


def test_an_output_bias_is_all_that_is_left_of_an_empty_network():
    net = made(NETS["mlp"], 0)
    masks = {
        name: torch.full_like(p, not name.endswith("weight"), dtype=torch.bool)
        for name, p in net.named_parameters()
    }
    small = bmr.shrink(net, masks, torch.zeros(1, 64).double())
    assert [tuple(p.shape) for p in small.parameters()] == [(1, 10)]
    for rows in (1, 3):
        assert torch.equal(small(torch.randn(rows, 64).double()), net[-1].bias.expand(rows, 10))


@pytest.mark.parametrize(
    ("mode", "bias", "channels"),
    [("zeros", 0.4, 3), ("zeros", -0.4, 2), ("circular", 0.4, 2), ("replicate", 0.4, 2)],
)
def test_a_constant_channel_before_a_padded_convolution(mode, bias, channels):
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode)
    ).double()
    with torch.no_grad():
        net[0].bias[1] = bias
    masks = {
        "0.weight": torch.tensor([True, False, True]).view(3, 1, 1, 1).expand(3, 1, 3, 3).clone()
    }
    x = torch.randn(4, 1, 6, 6).double()
    plan = bmr.shrinking.shrink_plan(net, masks, x)
    small = plan.apply()
    assert small[0].out_channels == channels and largest_difference(net, masks, small, x) <= 1e-12
    assert ("constant input channels [1] through zero padding" in str(plan)) == (channels == 3)


@pytest.mark.slow
def test_heads_are_pruned_as_a_whole():
    net = made(Branches, 3)
    masks = {"attention.in_proj_weight": torch.ones(36, 12, dtype=torch.bool)}
    # the values of the second and the third of four heads
    masks["attention.in_proj_weight"][24 + 3 : 24 + 9] = False
    attention = bmr.shrink(net, masks, torch.zeros(1, 1, 8, 8).double()).attention
    assert attention.in_proj_weight.shape == (18, 12) and attention.in_proj_bias.shape == (18,)
    assert attention.out_proj.weight.shape == (12, 6)


class Lookup(nn.Module):
    """Attention over values that are constants, but not the same at every position."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.v = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(1, 5, 4))

    def forward(self, x):
        x = x.view(x.size(0), 5, 4)
        values = self.v(self.table.expand(x.size(0), -1, -1))
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), values)).mean(1)


@pytest.mark.slow
def test_attention_over_constants_depends_on_the_input():
    net = made(Lookup, 0)
    x = torch.randn(30, 20).double()
    assert float(net(x).detach().std(0).max()) > 0.01
    assert largest_difference(net, {}, bmr.shrink(net, {}, x), x) <= 1e-12
    # now the values are the bias, everywhere
    same = {"v.weight": torch.zeros(4, 4, dtype=torch.bool)}
    plan = bmr.shrinking.shrink_plan(net, same, x)
    assert largest_difference(net, same, plan.apply(), x) <= 1e-12 and plan.parameters[1] == 3


def test_residual_sums_tie_their_channels():
    net = made(ResNet, 1)
    masks = random_masks(net, 0.0, "rows", 0)
    masks["stem.weight"][2] = masks["stem.bias"][2] = False
    x = torch.zeros(1, 1, 8, 8).double()
    plan = bmr.shrinking.shrink_plan(net, masks, x)
    assert plan.layers.set_index("layer").loc["stem", "after"] == "8×1×3×3"
    for name in ("down.weight", "a.c1.weight"):
        masks[name][:, 2] = False  # channel 2 of the sum is not read
    plan = bmr.shrinking.shrink_plan(net, masks, x)
    table = plan.layers.set_index("layer")["after"]
    assert table["stem"] == "7×1×3×3"
    assert table["a.c2"] == "7×8×3×3"
    assert table["a.c1"] == "8×7×3×3"
    assert table["down"] == "12×7×1×1"


@pytest.mark.parametrize(
    "name",
    others_slow(["mlp", "vit", "residual with batch norm"], "mlp", "residual with batch norm"),
)
def test_the_result_is_a_plain_module(name, digits):
    net = made(NETS[name], 2)
    small = bmr.shrink(net, random_masks(net, 0.4, "rows", 2), digits[:1])
    want = small(digits[:5])
    clean = copy.deepcopy(small)
    for p in clean.parameters():
        p.data.zero_()
    clean.load_state_dict(small.state_dict())
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), clean):
        assert torch.equal(other(digits[:5]), want)
    assert not any(type(m).__module__.startswith("pyro") for m in small.modules())
    want.sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.filterwarnings("ignore:ΔF.*parameters > rows")
def test_masks_of_a_real_reduction():
    data = bmr.load("digits")
    torch.manual_seed(0)
    program = bmr.BayesianNetwork(mlp.network(64, (60,), 10), bmr.Gaussian(), bmr.Categorical())
    rows = (data.x_train[:300], data.y_train[:300])
    fit = bmr.fit(
        program,
        rows,
        epochs=8,
        batch_size=30,
        reduce=bmr.Every(2, start=0.3),
        optimizer=bmr.adam(1e-2),
        progress=False,
    )
    reduction = bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0), kept=0.05)
    dense = bmr.export(fit.program, reduction.posterior)
    plan = bmr.shrinking.shrink_plan(dense, reduction.masks, data.x_test[:1])
    small = plan.apply()
    x = torch.cat([data.x_train, data.x_test])[:1000]
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=0, atol=1e-5)
    kept = reduction.masks["1.weight"].any(1) & reduction.masks["3.weight"].any(0)
    assert plan.layers["after"].tolist() == [f"{int(kept.sum())}×64", f"10×{int(kept.sum())}"]
    assert int(kept.sum()) < 60
    assert len(plan.unread_inputs) == int((~reduction.masks["1.weight"][kept].any(0)).sum()) > 0


def test_a_single_layer_and_an_embedding():
    net = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 4)).double()
    masks = {"0.weight": torch.tensor([True, False, True, True, False]).expand(7, 5).clone()}
    tokens = torch.randint(7, (20, 3))
    small = bmr.shrink(net, masks, tokens[:1])
    assert small[0].weight.shape == (7, 3) and small[2].weight.shape == (4, 9)
    assert largest_difference(net, masks, small, tokens) <= 1e-12
    layer, rows = nn.Linear(4, 3), torch.ones(2, 4)
    assert torch.equal(bmr.shrink(layer, {}, torch.randn(1, 4))(rows), layer(rows))


class ReadOut(nn.Module):
    """An embedding whose weights are those of the last layer, too."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.mixed = nn.Linear(16, 16)
        self.read = nn.Linear(16, 20)
        self.read.weight = self.tokens.weight

    def forward(self, x):
        return self.read(torch.relu(self.mixed(self.tokens(x))))


@pytest.mark.parametrize("alike", [True, False])
def test_tied_parameters_that_are_cut_alike_are_still_one(alike):
    torch.manual_seed(3)
    net = ReadOut().eval()
    with torch.no_grad():
        net.tokens.weight[:, :4] = 0
        if alike:
            net.mixed.weight[:4] = 0
            net.mixed.bias[:4] = 0
        else:
            net.mixed.weight[:7] = 0
            net.mixed.bias[:7] = 0
    x = torch.arange(20)
    plan = bmr.shrinking.shrink_plan(net, {}, x)
    small = plan.apply()
    torch.testing.assert_close(small(x), net(x))
    assert (small.tokens.weight is small.read.weight) == alike
    assert plan.parameters[1] == sum(p.numel() for p in small.parameters())
    if alike:
        assert plan.parameters == (20 * 16 + 16 * 17 + 20, 20 * 12 + 12 * 13 + 20)
