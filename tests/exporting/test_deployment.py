"""A deployed folder: every format read back without pyro and pyro_bmr, sizes, the report."""

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.exporting.weights_file import save_tensors
from pyro_bmr.models import mlp
from tests.exporting.networks import loaders, sparse_net
from tests.parameters import others_slow
from tests.shrinking.networks import NETS, made, random_masks

CHILD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyro", "pyro_bmr", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import copy, importlib, pickle
import torch

torch.set_num_threads(1)
import network

x = network.read("inputs.safetensors")["x"]
want = network.read("outputs.safetensors")["y"]
for loader, file, tolerance in [line.split() for line in sys.argv[1:]]:
    net = getattr(network, loader)(file)
    with torch.no_grad():
        y = net(x.half() if "half" in file else x).to(want.dtype)
    error = float((y - want).abs().max())
    assert error <= float(tolerance), (loader, error)
    if loader in ("load", "load_state_dict") and "half" not in file:
        clean = network.Network()
        clean.load_state_dict(net.state_dict(), assign=True)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), clean.eval()):
            assert torch.equal(other(x), net(x))
assert not any(name.split(".")[0] in ("pyro", "pyro_bmr", "safetensors") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def x():
    return bmr.load("digits").x_train[:40]


def child(folder, net, x, formats):
    """Runs the loaders of `formats` in an interpreter that has neither pyro nor pyro_bmr nor
    safetensors.
    """
    with torch.no_grad():
        want = net(x)
    save_file({"x": x.contiguous()}, folder / "inputs.safetensors")
    save_file({"y": want.contiguous()}, folder / "outputs.safetensors")
    (folder / "child.py").write_text(CHILD)
    size = float(want.abs().max())
    lines = [
        f"{FORMATS[f].loader} {FORMATS[f].file} {2e-2 * size if f == 'half' else 1e-5 * size}"
        for f in formats
    ]
    run = subprocess.run(
        [sys.executable, "child.py", *lines],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_formats_round_trip_without_pyro(x, tmp_path):
    net = made(NETS["lenet"], 4).float()
    small = bmr.shrink(net, random_masks(net, 0.4, "rows", 4), x[:1])
    formats = ["state_dict", "safetensors", "half", "prune"]
    table = bmr.deploy(small, tmp_path, x, formats=formats, before=net, seconds=0)
    child(tmp_path, small, x, formats)
    assert table["format"].tolist() == [
        "before",
        "safetensors",
        *(f for f in formats if f != "safetensors"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_all_formats_of_all_networks(name, x, tmp_path):
    pytest.importorskip("onnx")
    net = made(NETS[name], 4).float()
    small = bmr.shrink(net, random_masks(net, 0.4, "rows", 4), x[:1])
    recurrent = name in ("lstm", "gru")
    formats = ["state_dict", "safetensors", "half", "prune", "program"] + ["onnx"] * (not recurrent)
    bmr.deploy(small, tmp_path, x, formats=formats, seconds=0)
    child(tmp_path, small, x, formats)


def test_compressed_rows(x, tmp_path):
    net = mlp.network(64, (100, 80), 10)
    masks = random_masks(net, 0.98, "weights", 0)
    masks["5.weight"][:] = True
    sparse = bmr.shrinking.masked(net, masks)
    table = bmr.deploy(sparse, tmp_path, x, formats=["csr"], seconds=0).set_index("format")
    with torch.no_grad():
        torch.testing.assert_close(loaders(tmp_path).load_csr()(x), sparse(x), rtol=1e-4, atol=1e-5)
    tensors = load_file(tmp_path / "csr.safetensors")
    assert tensors["1.values"].tolist() == net[1].weight[masks["1.weight"]].tolist()
    assert "5.weight" in tensors
    assert "3.weight" not in tensors
    assert table.loc["csr", "bytes"] < 0.25 * table.loc["safetensors", "bytes"]


def test_file_sizes(x, tmp_path):
    net = made(NETS["mlp"], 0).float()
    small = bmr.shrink(net, random_masks(net, 0.5, "rows", 0), x[:1])
    table = bmr.deploy(small, tmp_path, x, formats=["half"], before=net, seconds=0).set_index(
        "format"
    )
    dense, left = (sum(p.numel() for p in n.parameters()) for n in (net, small))
    for row, numbers, width in (("before", dense, 4), ("safetensors", left, 4), ("half", left, 2)):
        assert 0 <= table.loc[row, "bytes"] - width * numbers < 700  # the header
    assert left < 0.7 * dense
    assert table.loc["safetensors", ["bytes", "parameters"]].tolist() == [
        (tmp_path / "model.safetensors").stat().st_size,
        left,
    ]
    for batch in (1, 128):
        median, most = (table[f"{word}ms at batch {batch}"] for word in ("", "p90 "))
        assert (median > 0).all() and (most >= median).all()
    assert table.loc["before", "FLOPs"] == 2 * (64 * 20 + 20 * 15 + 15 * 10)


def test_the_report(x, tmp_path):
    net, masks = sparse_net()
    given = {"delta_f": 12.5, "prior": "Gaussian()", "data": "digits", "seed": 3}
    masked = bmr.shrinking.masked(net, masks)
    table = bmr.deploy(masked, tmp_path, x, report=given, seconds=0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {key: report[key] for key in given} == given
    assert report["version"] == bmr.__version__
    assert report["input"] == {"shape": [1, 8, 8], "dtype": "float32"}
    assert report["machine"]["threads"] == 1 and report["machine"]["processor"]
    assert report["costs"] == table.to_dict(orient="records")
    assert report["tensors"]["1.weight"] == {
        "shape": [20, 64],
        "nonzero": int(masks["1.weight"].sum()),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.safetensors",
        "network.py",
        "report.json",
    ]
    text = (tmp_path / "network.py").read_text()
    assert '("1", nn.Linear(in_features=64, out_features=20, bias=True)),' in text
    assert "pyro" not in text.replace("pyro_bmr", "", 1)


def test_files_of_the_same_network_share_a_latency(tmp_path):
    net, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)),
        torch.rand(4, 3, 5, 5),
    )
    formats = ["state_dict", "half", "prune"]
    table = bmr.deploy(net, tmp_path, x, formats=formats, seconds=0, batches=(2,))
    assert table["latency of"].tolist() == ["safetensors", "safetensors", "half", "prune"]
    columns = ["ms at batch 2", "p90 ms at batch 2"]
    assert table.loc[0, columns].tolist() == table.loc[1, columns].tolist()
    assert table["calls at batch 2"].tolist() == [3, 3, 3, 3]
    # safetensors has no place for an order of the axes in memory; state_dict has
    net[0].to(memory_format=torch.channels_last)
    table = bmr.deploy(net, tmp_path, x, formats=formats, seconds=0, batches=(2,))
    assert table["latency of"].tolist() == ["safetensors", "state_dict", "half", "prune"]


def test_tied_tensors_are_stored_once_each(tmp_path):
    t = torch.arange(6.0).view(2, 3)
    save_tensors({"a": t, "b": t.T}, tmp_path / "t.safetensors")
    loaded = load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded["a"], t) and torch.equal(loaded["b"], t.T)


def test_deploy_is_silent(x, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bmr.deploy(sparse_net()[0], tmp_path, x, formats=["program", "prune"], seconds=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_session_has_one_thread_where_latencies_are_measured(x, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    threads = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options=None, **rest):
            threads.append(options.intra_op_num_threads)
            super().__init__(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        net, _ = sparse_net()
        table = bmr.deploy(
            net, tmp_path, x, formats=["onnx"], before=net, seconds=0, batches=(3,)
        ).set_index("format")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1], "of the dense network and of the small one"
    assert list(table.index) == ["before", "before, onnx", "safetensors", "onnx"]
    assert (table["ms at batch 3"] > 0).all()
    assert table.loc["before, onnx", "bytes"] > 4 * table.loc["before", "parameters"]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["model.onnx", "model.safetensors", "network.py", "report.json"]


def test_numbers_of_8_bits(tmp_path):
    """A network with activations of both signs and an output with much larger weights."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 5)).eval()
    with torch.no_grad():
        net[2].weight[0] *= 50
    x = torch.randn(300, 32)
    table = bmr.deploy(net, tmp_path, x, formats=["onnx", "int8", "int8-static"], seconds=0)
    table = table.set_index("format")
    module = loaders(tmp_path)
    with torch.no_grad():
        want = net(x)
    for name in ("int8", "int8-static"):
        got = module.load_onnx(f"model-{name}.onnx")(x)
        error = float((got - want).abs().max() / want.abs().max())
        assert 1e-5 < error < 0.03
        assert 0 < table.loc[name, "difference"] < 0.03
        if name == "int8":  # each row of a weight has its own scale: the large one drowns none
            small = (got - want)[:, 1:].abs().max() / want[:, 1:].abs().max()
            assert float(small) < 0.1
        assert table.loc[name, "bytes"] < table.loc["onnx", "bytes"]
    assert table.loc["safetensors", "difference"] == 0


@pytest.mark.slow
def test_numbers_of_8_bits_that_are_far_off_are_warned_of(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("pyro_bmr.exporting.cost_table._ROUNDED_FAR", 1e-6)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    with pytest.warns(bmr.PyroBMRWarning, match="'int8' differ from the network's by"):
        bmr.deploy(net, tmp_path, torch.randn(30, 4), formats=["int8"], seconds=0)


class Cache:
    """What torch.export does not know."""


class Cached(nn.Module):
    """A model that returns its keys and values for the next call, as those of transformers do."""

    def __init__(self):
        super().__init__()
        self.config, self.a = SimpleNamespace(use_cache=True), nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.a(x), **({"cache": Cache()} if self.config.use_cache else {})}


@pytest.mark.parametrize("key", others_slow(["program", "onnx"], "program"))
def test_a_model_with_a_cache(key, tmp_path):
    if key == "onnx":
        pytest.importorskip("onnxruntime")
    net, x = Cached().eval(), torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bmr.PyroBMRWarning)  # it is not written as Python
        bmr.deploy(net, tmp_path, x, formats=[key], seconds=0)
    run = getattr(loaders(tmp_path), FORMATS[key].loader)()
    got = run(x)
    got = got["logits"] if isinstance(got, dict) else got
    torch.testing.assert_close(got, net.a(x), rtol=1e-4, atol=1e-5)
    assert net.config.use_cache and "cache" in net(x), "it is as it was"
