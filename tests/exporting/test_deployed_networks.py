"""Networks of many forms are deployed: outputs of any structure, parameters anywhere, forwards with
flags and sizes, and those that are no Python of torch.
"""

import json
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._pytree import tree_structure

import pyro_bmr as bmr
from pyro_bmr.exporting.costs import flops
from pyro_bmr.exporting.written_files import loaded_module
from pyro_bmr.shrinking.verification import leaves


class Lists(nn.Module):
    """Parameters in lists, dicts and the root, a buffer that no state_dict has, and an integer."""

    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList(
            [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 8))]
        )
        self.gains = nn.ParameterDict({"a b": nn.Parameter(torch.rand(8))})
        self.scale, self.shift = (
            nn.Parameter(torch.randn(3)),
            nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False),
        )
        self.register_buffer("center", torch.randn(4), persistent=False)

    def forward(self, x):
        h = torch.relu(F.linear(x - self.center, self.ws[0])) * self.gains["a b"]
        return F.linear(h, self.ws[1]) * self.scale + self.shift


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU()),
            nn.ModuleList([nn.Linear(16, 3)]),
        )

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
        self.i, self.a, self.o = (
            nn.Linear(1, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )
        self.q = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x):
        h = self.i(x.unsqueeze(-1))
        return self.o(self.a(self.q.expand(h.size(0), -1, -1), h, h, need_weights=False)[0].mean(1))


Pair = namedtuple("Pair", "box label")


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.t, self.box, self.label, self.kind = (
            nn.Linear(4, 8),
            nn.Linear(8, 1),
            nn.Linear(8, 3),
            kind,
        )

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


def pruned():
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
    "pruned by torch": pruned,
}


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def agree(net, run, x, structure=True):
    with torch.no_grad():
        want, got = net.eval()(x), run(x)
    assert tree_structure(want) == tree_structure(got) or not structure
    for a, b in zip(leaves(want), leaves(got), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_networks_of_many_forms(name, x, tmp_path):
    torch.manual_seed(0)
    net = NETS[name]().train()
    python = name != "named tuple"
    if python:
        bmr.deploy(net, tmp_path, x, formats=["state_dict"], seconds=0)
    else:
        with pytest.warns(bmr.PyroBMRWarning, match="cannot be written as Python of torch alone"):
            bmr.deploy(net, tmp_path, x, formats=["state_dict"], seconds=0)
    assert all(m.training for m in net.modules())
    network = loaded_module(tmp_path / "network.py")
    if not python:
        vars(network)["Network"] = NETS[name]
    rows = torch.randn(7, 4)
    for run in (network.load(), network.load_state_dict()):
        agree(net, run, rows)


def test_modes_and_statistics_are_left_as_they_were(x, tmp_path):
    def build():
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        net[2].eval()
        return net

    net, before = build(), build()
    states = [{k: t.clone() for k, t in n.state_dict().items()} for n in (net, before)]
    bmr.deploy(net, tmp_path, x, before=before, seconds=0)
    bmr.deploy(InPlace(), tmp_path, kept := x.clone(), seconds=0)
    assert torch.equal(x, kept)
    for n, state in zip((net, before), states, strict=True):
        assert [m.training for m in n] == [True, True, False, True]
        assert all(torch.equal(t, state[k]) for k, t in n.state_dict().items())


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


def test_a_network_without_python_is_deployed_in_other_formats(x, tmp_path):
    net = Measured()
    with pytest.warns(
        bmr.PyroBMRWarning,
        match=(
            r"Measured cannot be written as Python .*'len'.*network\.py reads the other files"
            r" without its class"
        ),
    ):
        table = bmr.deploy(
            net, tmp_path, x, formats=["state_dict", "half", "prune", "program"], seconds=0
        )
    assert table["format"].tolist() == ["safetensors", "state_dict", "half", "prune", "program"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert "'len'" in report["not_in_python"] and sorted(report["tensors"]) == sorted(
        net.state_dict()
    )
    network = loaded_module(tmp_path / "network.py")
    agree(net, network.load_program(), torch.randn(9, 4))
    assert torch.equal(network.read("model.safetensors")["a.weight"], net.a.weight)
    with pytest.raises(
        ValueError, match=r"class of the network is not in this file; set network\.Network"
    ):
        network.load()
    vars(network)["Network"] = Measured
    agree(net, network.load(), x)


@pytest.mark.parametrize(
    "change", [("tanh", "relu"), ("return b", "return (b,)"), ("= self.a(x)", "= self.c(x)")]
)
def test_python_that_is_not_the_network_is_not_kept(change, x, tmp_path, monkeypatch):
    from pyro_bmr.exporting import written_files

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h * self.g)

    monkeypatch.setattr(Flag, "forward", forward)
    net = Flag()
    net.g = nn.Parameter(torch.rand(8))
    source = written_files.network_source
    monkeypatch.setattr(
        written_files, "network_source", lambda *args: source(*args).replace(*change)
    )
    with pytest.warns(
        bmr.PyroBMRWarning, match="cannot be written as Python .*(written so, |AttributeError)"
    ):
        bmr.deploy(net, tmp_path, x, seconds=0)
    assert "Not here: " in (tmp_path / "network.py").read_text()


def test_what_cannot_be_deployed_is_refused_by_name(x, tmp_path):
    for example in ((x, x), {"x": x}, x[:0], torch.tensor(1.0)):
        with pytest.raises(
            bmr.errors.ModelError,
            match=(
                r"example: expected rows of the network's input, as one tensor, got a"
                r" (tuple of 2|dict of 1|float32 tensor of shape \((0, 4)?\))"
            ),
        ):
            bmr.deploy(nn.Linear(4, 3), tmp_path / "new", example, seconds=0)
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"Linear gives no tensor on rows of the example, of shape \(5, 3\)",
    ):
        bmr.deploy(nn.Linear(4, 3), tmp_path / "new", x[:, :3], seconds=0)
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"'safetensors' does not run on batches of \(1, 128\) rows \(RuntimeError",
    ):
        bmr.deploy(Fixed(), tmp_path / "new", x, seconds=0)
    broken = nn.Linear(4, 3)
    with torch.no_grad():
        broken.bias[1] = torch.nan
    with pytest.raises(
        bmr.errors.ModelError, match=r"'bias' of shape \(3,\) has 1 of 3 values that are NaN"
    ):
        bmr.deploy(broken, tmp_path / "new", x, seconds=0)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rows = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return self.a(x) + self.rows


def test_flops_of_attention():
    assert flops(Queries().eval(), torch.randn(2, 4)) == 2 * (
        4 * 8 + 3 * 8 * 8 + 2 * 4 * 8 * 8 + 2 * 3 * 4 * 8 + 3 * 8 * 8 + 8 * 3
    )
    # in one step where torch is left to choose
    layer, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.randn(2, 5, 8)
    by_hand = 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 12)
    assert (
        flops(layer, x) == flops(bmr.shrink(layer, {}, x), x) == by_hand
        and torch.backends.mha.get_fastpath_enabled()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuple", "list in a dict", "sizes", "a flag"])
def test_onnx_gives_all_outputs(name, x, tmp_path):
    pytest.importorskip("onnx")
    net = NETS[name]()
    bmr.deploy(net, tmp_path, x, formats=["onnx", "program"], seconds=0)
    network = loaded_module(tmp_path / "network.py")
    agree(net, network.load_onnx(), torch.randn(7, 4), structure=False)
    # of torch.fx, whose dicts are a class of their own
    agree(net, network.load_program(), torch.randn(7, 4), structure=False)
