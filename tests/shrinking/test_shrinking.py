"""A shrunk network has the function of the masked one, and is as small as its dead units, channels
and heads allow.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.models import lenet, mlp
from pyro_bmr.shrinking import masked


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.c1, self.c2 = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.b1, self.b2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.b2(self.c2(F.relu(self.b1(self.c1(x))))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.a, self.down, self.b, self.head = (
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), Block(8), nn.Conv2d(8, 12, 1,
            stride=2), Block(12), nn.Linear(12, 10),
        )  # fmt: skip

    def forward(self, x):
        x = self.b(self.down(self.a(F.relu(self.bn(self.stem(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ViT(nn.Module):
    def __init__(self, norm_first=True):
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(1, 12, 2, 2),
            nn.Parameter(torch.randn(1, 1, 12)),
            nn.Parameter(torch.randn(1, 17, 12)),
        )
        layer = nn.TransformerEncoderLayer(
            12, 3, 20, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder, self.norm, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.LayerNorm(12),
            nn.Linear(12, 10),
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.size(0), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.encoder(x))[:, 0])


class MixerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.t1, self.t2, self.n2, self.f1, self.f2 = (
            nn.LayerNorm(10), nn.Linear(16, 12), nn.Linear(12, 16), nn.LayerNorm(10), nn.Linear(10,
            14), nn.Linear(14, 10),
        )  # fmt: skip

    def forward(self, x):
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.f2(F.gelu(self.f1(self.n2(x))))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.blocks, self.norm, self.head = (
            nn.Conv2d(1, 10, 2, 2),
            nn.Sequential(MixerBlock(), MixerBlock()),
            nn.LayerNorm(10),
            nn.Linear(10, 10),
        )

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inputs, self.rnn, self.hidden, self.head = (
            nn.Linear(8, 9),
            kind(9, 7, batch_first=True),
            nn.Linear(7, 11),
            nn.Linear(11, 10),
        )

    def forward(self, x):
        y, _ = self.rnn(torch.tanh(self.inputs(x.squeeze(1))))
        return self.head(torch.relu(self.hidden(y[:, -1])))


class Branches(nn.Module):
    """Depthwise convolution, concatenation, group norm, constant padding, view, and attention with
    the batch in the second axis.
    """

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = (
            nn.Conv2d(1, 6, 3),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.Conv2d(12, 8, 3, padding=1, padding_mode="circular"),
        )
        self.pad, self.gn, self.fc = (
            nn.ConstantPad2d(1, 0.3),
            nn.GroupNorm(2, 8),
            nn.Linear(8 * 16, 12),
        )
        self.attention, self.norm, self.out = (
            nn.MultiheadAttention(12, 4),
            nn.BatchNorm1d(12),
            nn.Linear(12, 10),
        )

    def forward(self, x):
        x = torch.tanh(self.c1(x))
        x = torch.cat([x, torch.sigmoid(self.c2(x))], 1)
        x = F.avg_pool2d(self.gn(self.c3(self.pad(x))), 2)
        x = F.silu(self.fc(x.view(x.size(0), -1)))
        y = x.unsqueeze(0)
        return self.out(self.norm(x + self.attention(y, y, y, need_weights=False)[0].squeeze(0)))


NETS = {
    "mlp": lambda: mlp.network(64, (20, 15), 10),
    "lenet": lambda: lenet.network((1, 8, 8), (4, 6, 14, 12), 10),
    "residual with batch norm": ResNet,
    "vit": ViT,
    "vit, norm after": lambda: ViT(False),
    "mixer": Mixer,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "branches": Branches,
}


@pytest.fixture(scope="module")
def digits():
    return bmr.load("digits").x_train[:300].double()


def made(build, seed):
    """A network whose parameters and running statistics are far from their neutral start."""
    torch.manual_seed(seed)
    net = build().double().eval()
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(
                0.3 * torch.randn_like(p)
                if p.ndim < 2
                else p.square().mean().sqrt() * torch.randn_like(p)
            )
    return net


def random_masks(net, dead, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, p in net.named_parameters():
        shape = {
            "weights": p.shape,
            "rows": (len(p), *[1] * (p.ndim - 1)),
            "columns": (1, *p.shape[1:2], *[1] * (p.ndim - 2)) if p.ndim > 1 else (1,),
        }[kind]
        masks[name] = (torch.rand(shape, generator=generator) >= dead).expand(p.shape).clone()
        if kind == "columns" and p.ndim == 1:
            masks[name][:] = True
    return masks


def largest_difference(net, masks, small, x):
    with torch.no_grad():
        return float((small(x) - masked(net, masks)(x)).abs().max())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("vit, norm after", "gru") else name
        for name in NETS
    ],
)
def test_the_function_is_that_of_the_masked_network(name, digits):
    removed = []
    for k, (dead, kind) in enumerate(
        [(0.4, "rows"), (0.5, "columns"), (0.9, "weights"), (0.99, "weights"), (1.0, "weights")]
    ):
        net = made(NETS[name], k)
        masks = random_masks(net, dead, kind, k)
        plan = bmr.shrinking.shrink_plan(net, masks, digits[:1])
        small = plan.apply()
        rows = digits if k < 1 else digits[:50]
        assert largest_difference(net, masks, small, rows) <= 1e-12
        before, after = plan.parameters
        assert (
            after
            == sum(p.numel() for p in small.parameters())
            <= before
            == sum(p.numel() for p in net.parameters())
        )
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

    class Residual(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x + self.inner(x)

    def build():
        layers, channels, side = [], 2, 8
        for _ in range(pick(1, 2, 3)):
            width = pick(3, 5, 6)
            padding, mode = (
                1 if side < 3 else pick(0, 1),
                pick("zeros", "circular", "reflect" if side > 1 else "zeros"),
            )
            layers.append(
                nn.Conv2d(
                    channels, width, 3, padding=padding, padding_mode=mode, bias=pick(True, False)
                )
            )
            channels, side = width, side - 2 + 2 * padding
            layers += [
                pick(nn.BatchNorm2d(channels), nn.Identity(), nn.GroupNorm(1, channels)),
                pick(nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Sigmoid()),
            ]
            if pick(0, 1):
                layers.append(
                    Residual(
                        nn.Sequential(
                            nn.Conv2d(channels, 4, 1),
                            pick(nn.SiLU(), nn.ELU()),
                            nn.Conv2d(4, channels, 3, padding=1),
                        )
                    )
                )
            if pick(0, 1):
                layers.append(nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels))
                channels *= 2
            if side >= 5 and pick(0, 1):
                layers.append(
                    pick(
                        nn.MaxPool2d(2),
                        nn.AvgPool2d(2),
                        nn.AvgPool2d(3, 2, padding=1),
                        nn.MaxPool2d(3, 2, padding=1),
                    )
                )
                side = layers[-1](torch.zeros(1, 1, side, side)).shape[-1]
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
                layers.append(Residual(nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 9))))
        return nn.Sequential(*layers, nn.Linear(size, 3))

    net = made(build, seed)
    masks = random_masks(net, pick(0.3, 0.6, 0.9), pick("rows", "rows", "columns", "weights"), seed)
    x = torch.randn(30, 2, 8, 8, generator=generator, dtype=torch.float64)
    assert largest_difference(net, masks, bmr.shrink(net, masks, x[:1]), x) <= 1e-12


def test_a_constant_is_folded_into_the_bias_by_hand():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].bias[:] = torch.tensor([0.2, -0.7, 1.1])
    masks = {
        "0.weight": torch.tensor([[True, True], [False, False], [True, True]]),
        "2.weight": torch.tensor([[True, True, False], [True, True, False]]),
    }
    small = bmr.shrink(net, masks, torch.zeros(1, 2).double())
    assert (
        isinstance(small, nn.Sequential)
        and small[0].weight.shape == (1, 2)
        and small[2].weight.shape == (2, 1)
    )
    torch.testing.assert_close(
        small[2].bias,
        net[2].bias + net[2].weight[:, 1] / (1 + torch.tensor(0.7, dtype=torch.float64).exp()),
    )
    torch.testing.assert_close(small[2].weight, net[2].weight[:, :1])


def test_what_only_dead_units_read_is_dead():
    net = nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)
    ).double()
    masks = {
        "2.weight": torch.tensor([[False, False, True], [True, True, True], [True, True, True]]),
        "4.weight": torch.tensor([[True, False, False]] * 2),
    }
    x = torch.randn(9, 4).double()
    small = bmr.shrink(net, masks, x)
    assert [tuple(layer.weight.shape) for layer in small[::2]] == [
        (1, 4),
        (1, 1),
        (2, 1),
    ] and largest_difference(net, masks, small, x) <= 1e-12


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
    assert (
        largest_difference(net, masks, plan.apply(), x) <= 1e-12
        and plan.parameters[1] == 16 + 10 + 4 * bias
    )


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
        name: (
            torch.zeros_like(p, dtype=torch.bool)
            if name.endswith("weight")
            else torch.ones_like(p, dtype=torch.bool)
        )
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


def test_heads_go_whole():
    net = made(lambda: Branches(), 3)
    masks = {"attention.in_proj_weight": torch.ones(36, 12, dtype=torch.bool)}
    # the values of the second and the third of four heads
    masks["attention.in_proj_weight"][24 + 3 : 24 + 9] = False
    small = bmr.shrink(net, masks, torch.zeros(1, 1, 8, 8).double())
    assert [small.get_submodule(f"attention.{n}").weight.shape for n in ("q", "k", "v", "out")] == [
        (6, 12)
    ] * 3 + [(12, 6)]


class Lookup(nn.Module):
    """Attention over values that are constants, but not the same at every position."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out, self.table = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            nn.Parameter(torch.randn(1, 5, 4)),
        )

    def forward(self, x):
        x = x.view(x.size(0), 5, 4)
        y = F.scaled_dot_product_attention(
            self.q(x), self.k(x), self.v(self.table.expand(x.size(0), -1, -1))
        )
        return self.out(y).mean(1)


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
    assert (
        bmr.shrinking.shrink_plan(net, masks, torch.zeros(1, 1, 8, 8).double())
        .layers.set_index("layer")
        .loc["stem", "after"]
        == "8×1×3×3"
    )
    for name in ("down.weight", "a.c1.weight"):
        masks[name][:, 2] = False  # nobody reads the sum's channel 2
    table = bmr.shrinking.shrink_plan(
        net, masks, torch.zeros(1, 1, 8, 8).double()
    ).layers.set_index("layer")["after"]
    assert (
        table["stem"] == "7×1×3×3"
        and table["a.c2"] == "7×8×3×3"
        and table["a.c1"] == "8×7×3×3"
        and table["down"] == "12×7×1×1"
    )


def test_the_plan_says_what_goes_and_changes_nothing(digits):
    net = made(NETS["lenet"], 5)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    masks = random_masks(net, 0.0, "rows", 0)
    masks["4.weight"][:4] = False  # four of six channels of 25 positions each
    masks["4.bias"][:4] = False
    plan = bmr.shrinking.shrink_plan(net, masks, digits[:1])
    table = plan.layers.set_index("layer")
    assert table.loc[
        "4", ["before", "after", "parameters before", "parameters after"]
    ].tolist() == ["6×4×5×5", "2×4×5×5", 606, 202]
    assert table.loc["8", ["before", "after", "parameters after"]].tolist() == [
        "14×150",
        "14×50",
        14 * 51,
    ]
    assert (
        table.loc["4", "FLOPs before"] == 2 * 6 * 4 * 25 * 100
        and table.loc["8", "FLOPs after"] == 2 * 14 * 50
    )
    assert plan.parameters[0] - plan.parameters[1] == 404 + 14 * 100
    assert "14×150" in str(plan) and "57.6% removed" in str(plan)
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def test_inputs_that_nobody_reads():
    net = made(NETS["mlp"], 0)
    masks = {"1.weight": torch.ones(20, 64, dtype=torch.bool)}
    masks["1.weight"][:, [0, 7, 63]] = False
    masks["1.weight"][:5, 9], masks["3.weight"] = False, torch.ones(15, 20, dtype=torch.bool)
    masks["3.weight"][:, 5:] = False  # of the units that read input 9, none is read
    plan = bmr.shrinking.shrink_plan(net, masks, torch.zeros(1, 1, 8, 8).double())
    assert plan.unread_inputs.tolist() == [0, 7, 9, 63] and "inputs no longer read: 4" in str(plan)
    convolution = bmr.shrinking.shrink_plan(
        made(NETS["lenet"], 0), {}, torch.zeros(1, 1, 8, 8).double()
    )
    assert convolution.unread_inputs.tolist() == []


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("vit", "encoder.layers.0.norm1", "kept together"),
        ("lstm", "rnn", "units of an LSTM are kept"),
    ],
)
def test_what_is_kept_is_named(name, layer, why):
    plan = bmr.shrinking.shrink_plan(made(NETS[name], 0), {}, torch.zeros(1, 1, 8, 8).double())
    assert why in plan.kept[layer] and f"kept: {layer}: " in str(plan)


@pytest.mark.parametrize("name", ["mlp", "vit", "residual with batch norm"])
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
    alive = reduction.masks["1.weight"].any(1) & reduction.masks["3.weight"].any(0)
    assert (
        plan.layers["after"].tolist() == [f"{int(alive.sum())}×64", f"10×{int(alive.sum())}"]
        and int(alive.sum()) < 60
    )
    assert len(plan.unread_inputs) == int((~reduction.masks["1.weight"][alive].any(0)).sum()) > 0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


class Rolled(nn.Module):
    def forward(self, x):
        return torch.roll(x, 1, 1)


class RandomDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = x.unsqueeze(0)
        return self.a(x, x, x, attn_mask=torch.zeros(1, 1))[0][0]


REFUSED = {
    "control flow": (Branching, r"Branching cannot be traced.*masked network"),
    "unknown function": (
        Rolled,
        r"'roll' at 'roll' is not a supported pattern; supported are Linear.*masked network",
    ),
    "unknown layer": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.ConvTranspose1d(1, 2, 2)),
        r"layer '1' \(ConvTranspose1d\) is not a supported",
    ),
    "dropout that stays on": (RandomDropout, r"'dropout' at 'dropout'"),
    "attention mask": (WithMask, r"'a': attention with a mask"),
    "wrong input": (
        lambda: nn.Linear(5, 4),
        r"does not run on two rows of the example, of shape \(2, 4\)",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_have_names(build, message):
    with pytest.raises(bmr.errors.ShrinkError, match=message):
        bmr.shrinking.shrink_plan(build(), {}, torch.randn(3, 4))


MASKS = {
    "name": (
        {"7.weight": torch.ones(3, 4, dtype=torch.bool)},
        r"mask '7\.weight': expected the name of a parameter of the network.*0\.weight",
    ),
    "shape": (
        {"0.weight": torch.ones(4, 3, dtype=torch.bool)},
        r"mask '0\.weight': expected a bool .*\(3, 4\), got a bool tensor of shape \(4, 3\)",
    ),
    "dtype": ({"0.weight": torch.ones(3, 4)}, r"got a float32 tensor of shape \(3, 4\)"),
    "no tensor": ({"0.bias": [True] * 3}, r"got \[True, True, True\]"),
}


@pytest.mark.parametrize(("masks", "message"), MASKS.values(), ids=MASKS)
def test_masks_that_do_not_fit(masks, message):
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(bmr.errors.ShrinkError, match=message):
        bmr.shrink(net, masks, torch.randn(3, 4))
    with pytest.raises(bmr.errors.ShrinkError, match="example: expected rows"):
        bmr.shrink(net, {}, torch.empty(0, 4))


def test_a_single_layer_and_an_embedding():
    net = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 4)).double()
    masks = {"0.weight": torch.tensor([True, False, True, True, False]).expand(7, 5).clone()}
    tokens = torch.randint(7, (20, 3))
    small = bmr.shrink(net, masks, tokens[:1])
    assert small[0].weight.shape == (7, 3) and small[2].weight.shape == (4, 9)
    assert largest_difference(net, masks, small, tokens) <= 1e-12
    layer = nn.Linear(4, 3)
    assert torch.equal(
        bmr.shrink(layer, {}, torch.randn(1, 4))(torch.ones(2, 4)), layer(torch.ones(2, 4))
    )


class ReadOut(nn.Module):
    """An embedding whose weights are those of the last layer, too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.mixed, self.read = (
            nn.Embedding(20, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 20),
        )
        self.read.weight = self.tokens.weight

    def forward(self, x):
        return self.read(torch.relu(self.mixed(self.tokens(x))))


@pytest.mark.parametrize("alike", [True, False])
def test_tied_parameters_that_are_cut_alike_stay_one(alike):
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
