"""Networks that are shrunk, masks for them, and the comparison of a smaller network with the masked
one.
"""

import torch
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.models import lenet, mlp
from pyro_bmr.shrinking import masked
from pyro_bmr.shrinking.verification import (
    leaves,
)


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
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.a = Block(8)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.b = Block(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.b(self.down(self.a(F.relu(self.bn(self.stem(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ViT(nn.Module):
    def __init__(self, norm_first=True):
        super().__init__()
        self.patch = nn.Conv2d(1, 12, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, 12))
        self.pos = nn.Parameter(torch.randn(1, 17, 12))
        layer = nn.TransformerEncoderLayer(
            12, 3, 20, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.size(0), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.encoder(x))[:, 0])


class MixerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1 = nn.LayerNorm(10)
        self.t1 = nn.Linear(16, 12)
        self.t2 = nn.Linear(12, 16)
        self.n2 = nn.LayerNorm(10)
        self.f1 = nn.Linear(10, 14)
        self.f2 = nn.Linear(14, 10)

    def forward(self, x):
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.f2(F.gelu(self.f1(self.n2(x))))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 10, 2, 2)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inputs = nn.Linear(8, 9)
        self.rnn = kind(9, 7, batch_first=True)
        self.hidden = nn.Linear(7, 11)
        self.head = nn.Linear(11, 10)

    def forward(self, x):
        y, _ = self.rnn(torch.tanh(self.inputs(x.squeeze(1))))
        return self.head(torch.relu(self.hidden(y[:, -1])))


class Branches(nn.Module):
    """Depthwise convolution, concatenation, group norm, constant padding, view, and attention with
    the batch in the second axis.
    """

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 3)
        self.c2 = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.c3 = nn.Conv2d(12, 8, 3, padding=1, padding_mode="circular")
        self.pad = nn.ConstantPad2d(1, 0.3)
        self.gn = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8 * 16, 12)
        self.attention = nn.MultiheadAttention(12, 4)
        self.norm = nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 10)

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


def random_masks(net, pruned, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, p in net.named_parameters():
        shape = {
            "weights": p.shape,
            "rows": (len(p), *[1] * (p.ndim - 1)),
            "columns": (1, *p.shape[1:2], *[1] * (p.ndim - 2)) if p.ndim > 1 else (1,),
        }[kind]
        masks[name] = (torch.rand(shape, generator=generator) >= pruned).expand(p.shape).clone()
        if kind == "columns" and p.ndim == 1:
            masks[name][:] = True
    return masks


def largest_difference(net, masks, small, x):
    with torch.no_grad():
        return float((small(x) - masked(net, masks)(x)).abs().max())


class Three(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b = nn.Linear(16, 16)
        self.c = nn.Linear(16, 3)
        self.g = nn.Parameter(torch.randn(16))
        self.function = function

    def forward(self, x):
        return self.function(self, torch.tanh(self.a(x)), x)


def every_other(net, *layers):
    masks = {}
    for name in layers:
        p = net.get_parameter(f"{name}.weight")
        kept = torch.arange(len(p)) % 2 == 0
        masks |= {
            f"{name}.weight": kept.view(-1, *[1] * (p.ndim - 1)).expand(p.shape),
            f"{name}.bias": kept,
        }
    return masks


def check(net, masks, x, left=None):
    """The smaller network, whose outputs are those of the masked one, at other rows and another
    number of them.
    """
    plan = bmr.shrinking.shrink_plan(net, masks, x[:1])
    small = plan.apply()
    with torch.no_grad():
        for rows in (
            x,
            torch.randn(7, *x.shape[1:], dtype=x.dtype) if x.is_floating_point() else x.flip(0),
        ):
            want, got = leaves(masked(net, masks)(rows)), leaves(small(rows))
            assert len(want) == len(got) > 0
            for p, q in zip(want, got, strict=True):
                torch.testing.assert_close(q, p, rtol=0, atol=1e-12)
            assert float(want[0].std(0).max()) > 1e-4, (
                "a network that is constant anyway shows nothing"
            )
    assert left is None or sum(p.numel() for p in small.parameters()) == left == plan.parameters[1]
    return small
