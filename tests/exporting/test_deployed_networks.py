"""Networks of many forms are deployed: outputs of any structure, parameters anywhere, forwards with
flags and sizes, and networks that cannot be written as Python of torch alone.
"""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_structure

import pyro_bmr as bmr
from pyro_bmr.exporting.written_files import loaded_module
from pyro_bmr.shrinking.verification import leaves
from tests.exporting.networks import NETS, Flag, InPlace, Measured
from tests.shrinking.kinds import KINDS


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
    assert "'len'" in report["not_in_python"]
    assert sorted(report["tensors"]) == sorted(net.state_dict())
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
    for example in ((x, x), {"x": x}):
        with pytest.raises(bmr.errors.ModelError, match=r"Linear gives no tensor on .*\(5, 4\)"):
            bmr.deploy(nn.Linear(4, 2), tmp_path / "out", example)
    for example in ((x, 3), {"x": x[:0]}, x[:0], torch.tensor(1.0)):
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


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        weight = attention_mask[..., None]
        return self.head((self.table(input_ids) * weight).sum(1) / weight.sum(1))


@pytest.mark.parametrize("formats", [("half",), pytest.param(("program",), marks=pytest.mark.slow)])
def test_a_network_of_several_inputs_is_deployed(formats, tmp_path):
    """Of texts, of which the exported program takes others of another length."""
    ids = torch.randint(1, 9, (5, 6), generator=torch.Generator().manual_seed(1))
    example = {"input_ids": ids, "attention_mask": (ids > 3).float()}
    net = Texts()
    with pytest.warns(bmr.PyroBMRWarning, match="it has 2 inputs"):
        table = bmr.deploy(net, tmp_path, example, formats=formats, seconds=0)
    assert list(table.format) == ["safetensors", *formats] and (table.FLOPs == 16).all()
    network = loaded_module(tmp_path / "network.py")
    vars(network)["Network"] = Texts
    other = {name: t[:3, :4] for name, t in example.items()}
    loads = [network.load, *([network.load_program] if "program" in formats else [])]
    for load in loads:
        torch.testing.assert_close(load()(**other), net(**other))
    kinds = json.loads((tmp_path / "report.json").read_text())["input"]
    assert kinds["['input_ids']"] == {"shape": [6], "dtype": "int64"}


@pytest.mark.slow
def test_a_decoder_with_a_mask_becomes_a_program(tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd number of heads
        net, x = KINDS["encoder_and_decoder"]()
    with pytest.warns(bmr.PyroBMRWarning, match="cannot be written as Python"):
        bmr.deploy(net, tmp_path, x, formats=["program"], seconds=0, batches=(1,))
    rows = torch.randn(3, *x.shape[1:])
    agree(net, loaded_module(tmp_path / "network.py").load_program(), rows)
