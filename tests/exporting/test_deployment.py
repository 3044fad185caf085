"""A deployed folder: every format read back without pyro and pyro_bmr, sizes, the report, damage,
and no half-written folders.
"""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.exporting import costs
from pyro_bmr.exporting.formats import FORMATS
from pyro_bmr.exporting.weights_file import save_tensors
from pyro_bmr.exporting.written_files import loaded_module
from pyro_bmr.models import mlp
from tests.shrinking.test_shrinking import NETS, made, random_masks

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


def sparse_net(dead=0.5):
    net = made(NETS["mlp"], 1).float()
    masks = random_masks(net, dead, "weights", 1)
    return net, masks


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


def test_formats_round_trip_without_pyro(x, tmp_path):
    net = made(NETS["vit"], 4).float()
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
    assert (
        tensors["1.values"].tolist() == net[1].weight[masks["1.weight"]].tolist()
        and "5.weight" in tensors
        and "3.weight" not in tensors
    )
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
    assert (table[["ms at batch 1", "ms at batch 128"]] > 0).all(axis=None)
    assert table.loc["before", "FLOPs"] == 2 * (64 * 20 + 20 * 15 + 15 * 10)


def test_the_report(x, tmp_path):
    net, masks = sparse_net()
    table = bmr.deploy(
        bmr.shrinking.masked(net, masks),
        tmp_path,
        x,
        report={"delta_f": 12.5, "prior": "Gaussian()", "data": "digits", "seed": 3},
        seconds=0,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["delta_f"],
        report["prior"],
        report["data"],
        report["seed"],
        report["version"],
    ) == (12.5, "Gaussian()", "digits", 3, bmr.__version__)
    assert report["input"] == {"shape": [1, 8, 8], "dtype": "float32"} and report[
        "costs"
    ] == table.to_dict(orient="records")
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
    assert (
        '("1", nn.Linear(in_features=64, out_features=20, bias=True)),' in text
        and "pyro" not in text.replace("pyro_bmr", "", 1)
    )


def loaders(folder):
    return loaded_module(folder / "network.py")


@pytest.mark.parametrize("file", ["model.safetensors", "state_dict.pt", "model.pt2"])
@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_damaged_files_are_refused(file, damage, deployed):
    raw = (deployed / file).read_bytes()
    try:
        (deployed / file).write_bytes(
            raw[:-9] if damage == "truncated" else raw[:-1] + bytes([raw[-1] ^ 1])
        )
        loader = next(f.loader for f in FORMATS.values() if f.file == file)
        with pytest.raises(
            ValueError, match=rf"{file} is not the file that was written: its sha256"
        ):
            getattr(loaders(deployed), loader)()
    finally:
        (deployed / file).write_bytes(raw)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, x):
    folder = tmp_path_factory.mktemp("deployed")
    bmr.deploy(
        made(NETS["mlp"], 2).float(), folder, x, formats=["state_dict", "program"], seconds=0
    )
    return folder


def test_a_truncated_file_is_refused_without_a_report_too(x, tmp_path):
    net, _ = sparse_net()
    bmr.deploy(net, tmp_path, x, seconds=0)
    (tmp_path / "report.json").unlink()
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert torch.equal(loaders(tmp_path).load()(x), net(x))
    for cut in (raw[:-4], raw[:40], raw[:5], b""):
        (tmp_path / "model.safetensors").write_bytes(cut)
        with pytest.raises(
            ValueError, match=r"model\.safetensors is truncated or no safetensors file"
        ):
            loaders(tmp_path).load()


class Odd(nn.Module):
    def forward(self, x):
        return x.double().round().to(x.dtype) if x.sum() > 0 else x


REFUSED = {
    "unknown format": (
        lambda: sparse_net()[0],
        ["tflite"],
        bmr.errors.ModelError,
        r"no format 'tflite'; the formats are: state_dict, safetensors",
    ),
    "csr of a dense network": (
        lambda: sparse_net()[0],
        ["state_dict", "csr"],
        bmr.errors.ModelError,
        r"'csr': expected a Linear layer with at least 97% zeros, got 0\.0% in the sparsest",
    ),
    "2:4 on a CPU": (
        lambda: sparse_net()[0],
        ["half", "2:4"],
        bmr.errors.ModelError,
        r"'2:4': expected a CUDA device.*'cpu'",
    ),
    "no layers to prune": (
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
        ["prune"],
        bmr.errors.ModelError,
        r"'prune': expected a Linear or Conv layer",
    ),
    "control flow": (
        Odd,
        ["program"],
        bmr.errors.ModelError,
        r"format 'program' cannot hold this network .*leave it out of `formats`",
    ),
}


@pytest.mark.parametrize(("build", "formats", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_leave_nothing_behind(build, formats, error, message, x, tmp_path):
    with pytest.raises(error, match=message):
        bmr.deploy(build(), tmp_path / "new", x, formats=formats, seconds=0)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_a_format_that_changes_the_outputs_is_refused(x, tmp_path):
    net, _ = sparse_net()
    bmr.deploy(net, tmp_path, x, seconds=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        net[1].weight.mul_(1e6)  # beyond half precision
    with pytest.raises(bmr.errors.ModelError, match=r"'half': read back, its outputs differ"):
        bmr.deploy(net, tmp_path, x, formats=["half"], seconds=0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(x, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(bmr.PyroBMRError, match="cannot write to"):
        bmr.deploy(sparse_net()[0], tmp_path / "file", x, seconds=0)


def test_an_ensemble_of_shrunk_draws(x, tmp_path):
    torch.manual_seed(0)
    program = bmr.BayesianNetwork(mlp.network(64, (30,), 10), bmr.Gaussian(0.5), bmr.Categorical())
    data = bmr.load("digits")
    fit = bmr.fit(
        program, (data.x_train[:200], data.y_train[:200]), epochs=3, batch_size=50, progress=False
    )
    masks = {
        name: torch.ones_like(site.mean, dtype=torch.bool)
        for name, site in fit.posterior.sites.items()
    }
    masks["1.weight"][:20] = masks["1.bias"][:20] = False
    posterior = fit.posterior.masked(masks)
    draws = bmr.exporting.ensemble(fit.program, posterior, draws=64, seed=1, example=x[:1])
    small = bmr.shrink(bmr.export(fit.program, posterior), {}, x[:1])
    assert {name: tuple(t.shape) for name, t in draws.items()} == {
        name: (64, *t.shape) for name, t in small.state_dict().items()
    }
    bmr.deploy(small, tmp_path, x, ensemble=draws, seconds=0)
    with torch.no_grad():
        mine = torch.stack([net(x).softmax(1) for net in loaders(tmp_path).load_ensemble()]).mean(0)
        want = bmr.predict(fit.program, posterior, x, draws=64, seed=1).probs
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-5)  # the same draws
        assert float((mine - small(x).softmax(1)).abs().max()) > 1e-3
    with pytest.raises(
        bmr.errors.ModelError, match="ensemble: expected draws of at least 1, got draws=0"
    ):
        bmr.exporting.ensemble(fit.program, posterior, draws=0)


def test_draws_that_shrink_to_different_shapes():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(72, 3)
    )
    sites = {n: bmr.Site(p.detach(), torch.full_like(p, 0.04)) for n, p in net.named_parameters()}
    program = bmr.BayesianNetwork(net, bmr.Gaussian(0.5), bmr.Categorical())
    masks = {"0.weight": torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 3, 3).clone()}
    posterior = bmr.Posterior(sites).masked(masks)
    with pytest.raises(bmr.errors.ModelError, match="shrink to different shapes"):
        bmr.exporting.ensemble(program, posterior, draws=12, example=torch.zeros(1, 1, 8, 8))
    assert bmr.exporting.ensemble(program, posterior, draws=12)["0.weight"].shape == (
        12,
        2,
        1,
        3,
        3,
    )


def test_flops_are_counted_by_hand(x):
    assert costs.flops(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 4)), x
    ) == 2 * (3 * 9 * 36 + 108 * 4)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    assert costs.parameters(layer) == {"parameters": 15, "nonzero": 11}


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
