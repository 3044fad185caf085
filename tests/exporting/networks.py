"""Networks that are exported and deployed, and the loaders of a deployed one."""

from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from pyro_bmr.exporting.written_files import loaded_module
from tests.shrinking.networks import NETS as SHRUNK
from tests.shrinking.networks import made, random_masks

X, Y = torch.randn(40, 5, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 3


def normed():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


class Lists(nn.Module):
    """Parameters in lists, dicts and the root, a buffer that no state_dict has, and an integer."""

    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList(
            [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 8))]
        )
        self.gains = nn.ParameterDict({"a b": nn.Parameter(torch.rand(8))})
        self.scale = nn.Parameter(torch.randn(3))
        self.shift = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.register_buffer("center", torch.randn(4), persistent=False)

    def forward(self, x):
        h = torch.relu(F.linear(x - self.center, self.ws[0])) * self.gains["a b"]
        return F.linear(h, self.ws[1]) * self.scale + self.shift


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU())
        self.b = nn.ModuleList([nn.Linear(16, 3)])

    def forward(self, x):
        h = self.a(x.unsqueeze(1))
        return self.b[0](h.reshape(h.shape[0], -1)) / h.shape[1]


class Flag(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: "torch.Tensor", embed: bool = False) -> "torch.Tensor":
        h = torch.relu(self.a(x))
        if embed:
            return h
        return self.b(h)


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(1, 8)
        self.a = nn.MultiheadAttention(8, 2, batch_first=True)
        self.o = nn.Linear(8, 3)
        self.q = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x):
        h = self.i(x.unsqueeze(-1))
        return self.o(self.a(self.q.expand(h.size(0), -1, -1), h, h, need_weights=False)[0].mean(1))


Pair = namedtuple("Pair", "box label")


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.t = nn.Linear(4, 8)
        self.box = nn.Linear(8, 1)
        self.label = nn.Linear(8, 3)
        self.kind = kind

    def forward(self, x):
        h = torch.relu(self.t(x))
        return self.kind(self.box(h), self.label(h))


class OneInADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.a(x)}


class Infinite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return F.softmax(
            self.a(x).masked_fill(x[:, :3] > 0, float("-inf")) + torch.arange(3, device=x.device), 1
        ).nan_to_num()


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(3, dtype=torch.cfloat)), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=4))


class Unused(nn.Module):
    """A layer is called for nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.a(x)
        return self.b(x)


def shared():
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))


def pruned_by_torch():
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
    )
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    net(torch.zeros(2, 4))
    return net


NETS = {
    "parameters anywhere": Lists,
    "sizes": Sizes,
    "a flag": Flag,
    "learned queries": Queries,
    "tuple": lambda: Heads(lambda a, b: (a, b)),
    "list in a dict": lambda: Heads(lambda a, b: {"box": a, "rest": [b]}),
    "named tuple": lambda: Heads(Pair),
    "one output in a dict": OneInADict,
    "infinities": Infinite,
    "complex": Waves,
    "a layer called for nothing": Unused,
    "a shared activation": shared,
    "pruned by torch": pruned_by_torch,
}


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        x -= 1
        return self.a(x)


class Measured(nn.Module):
    """Its forward cannot be read: `len` of a value."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h) / len(h[0])


def sparse_net(pruned=0.5):
    net = made(SHRUNK["mlp"], 1).float()
    masks = random_masks(net, pruned, "weights", 1)
    return net, masks


def loaders(folder):
    return loaded_module(folder / "network.py")
