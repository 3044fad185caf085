"""Saved weights load where Pyro is not installed, and nothing that is not finite is saved."""

import copy
import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import pyro_bmr as bmr
from pyro_bmr.models import lenet
from tests.exporting.networks import X, normed


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_save_and_load(exported, tmp_path):
    folder = tmp_path / "deep" / "er"
    bmr.save(exported, folder, {"accuracy": 0.75, "note": "über", "nested": {"kept": [1, None]}})
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "report.json"]
    loaded = load_file(folder / "model.safetensors")
    assert set(loaded) == set(exported.state_dict())
    for name, value in exported.state_dict().items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert torch.equal(loaded[name], value)
    clean = normed().eval()
    clean.load_state_dict(loaded)
    assert torch.equal(clean(X), exported(X))


def test_report(exported, tmp_path):
    bmr.save(
        exported, tmp_path, {"accuracy": 0.75, "nested": {"kept": [1, None]}, "path": tmp_path}
    )
    report = strict((tmp_path / "report.json").read_text())
    assert (report["accuracy"], report["nested"], report["path"]) == (
        0.75,
        {"kept": [1, None]},
        str(tmp_path),
    )
    assert report["format"] == "pyro_bmr report 1"
    assert list(report["tensors"]) == list(exported.state_dict())
    for name, value in exported.state_dict().items():
        nonzero = sum(1 for number in value.flatten().tolist() if number != 0)
        assert report["tensors"][name] == {
            "shape": list(value.shape),
            "dtype": str(value.dtype).split(".")[1],
            "nonzero": nonzero,
        }
    assert report["tensors"]["0.weight"]["nonzero"] < 35


def broken(net, name, value):
    """A copy with two such values in the parameter or buffer `name`."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.state_dict()[name].flatten()[:2] = value
    return net


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "1.running_var", "1.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_saved_that_is_not_finite(exported, tmp_path, name, value):
    net = broken(exported, name, value)
    size = net.state_dict()[name].numel()
    for weights in (net, net.state_dict()):
        with pytest.raises(
            bmr.errors.ModelError,
            match=rf"save: '{name}'.* has 2 of {size} values that are NaN or infinite",
        ):
            bmr.save(weights, tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
def test_nothing_is_exported_that_is_not_finite(pruned, name):
    program, posterior = pruned[1].program.copy(), pruned[1].posterior
    if name in posterior.sites:
        site = posterior[name]
        posterior = bmr.Posterior(
            {
                **posterior.sites,
                name: bmr.Site(
                    site.mean.clone().index_fill_(0, torch.tensor([2]), math.nan),
                    site.var,
                    site.prior,
                ),
            }
        )
    else:
        program.net = broken(program.net, name, math.nan)
    bad = 5 if name in posterior.sites else 2
    for make in (bmr.export, partial(bmr.exporting.ensemble, draws=2)):
        with pytest.raises(
            bmr.errors.ModelError,
            match=rf"'{name}'.* has {bad} of \d+ values that are NaN or infinite",
        ):
            make(program, posterior)
    with pytest.raises(bmr.errors.ModelError, match=f"export: '{name}'"):
        bmr.export(program.net, posterior)


def test_an_additive_mask_may_be_infinite(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_buffer("causal", torch.full((3, 3), -math.inf).triu(1))
    bmr.save(net, tmp_path / "module")
    bmr.save(net.state_dict(), tmp_path / "tensors")
    assert torch.equal(load_file(tmp_path / "tensors" / "model.safetensors")["causal"], net.causal)
    net.causal[0, 0] = 1.0
    with pytest.raises(bmr.errors.ModelError, match="'causal'.* has 3 of 9"):
        bmr.save(net, tmp_path / "no mask")


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex128),
    ],
    ids=["sparse", "meta", "c128"],
)
def test_what_safetensors_has_no_place_for_is_refused_by_name(tmp_path, value):
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"save: tensor 'b': expected dense values.*got a tensor of torch\.",
    ):
        bmr.save({"a": torch.ones(1), "b": value}, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_report_with_nan_is_refused_and_the_old_one_stays(tmp_path, bad):
    weights = {"w": torch.ones(2)}
    bmr.save(weights, tmp_path, {"nll": 1.5})
    with pytest.raises(bmr.errors.ModelError, match="report.*JSON"):
        bmr.save({"w": torch.zeros(2)}, tmp_path, {"nll": bad})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.ones(2))
    assert strict((tmp_path / "report.json").read_text())["nll"] == 1.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "report.json"]


def test_save_takes_any_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    weights = {
        "transposed": base.T,
        "shared": base,
        "part": base[:, 1],
        "number": torch.tensor(2.5, requires_grad=True),
    }
    bmr.save(weights, tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[name], value.detach()) for name, value in weights.items())


@pytest.mark.parametrize("below", ["file", "file/folder", "file/folder/deeper"])
def test_a_folder_that_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        bmr.PyroBMRError, match=rf"cannot write to '.*{below}'.*choose another folder"
    ):
        bmr.save({"w": torch.ones(1)}, tmp_path / below)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(bmr.PyroBMRError, match=r"cannot write '.*model\.safetensors'"):
        bmr.save({"w": torch.ones(1)}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


SHAPE, SIZES = (1, 8, 8), (6, 16, 120, 84)


CHILD = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyro", "pyro_bmr"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
for name in ("pyro", "pyro_bmr", "pyro_bmr.models"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")

import torch
from safetensors.torch import load_file, save_file
from torch import nn

torch.set_num_threads(1)
net = nn.Sequential(
    nn.ZeroPad2d(12),
    nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2),
    nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(400, 120), nn.Tanh(),
    nn.Linear(120, 84), nn.Tanh(),
    nn.Linear(84, 10),
)
weights, inputs, outputs = sys.argv[1:]
net.load_state_dict(load_file(weights))
with torch.no_grad():
    save_file({"y": net.eval()(load_file(inputs)["x"])}, outputs)
assert not any(name.split(".")[0] in ("pyro", "pyro_bmr") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_pruned_lenet_predicts_the_same_without_pyro(tmp_path):
    data = bmr.load("digits")
    torch.manual_seed(0)
    program = bmr.BayesianNetwork(
        lenet.network(SHAPE, SIZES, 10), bmr.Gaussian(), bmr.Categorical()
    )
    rows = (data.x_train[:200], data.y_train[:200])
    fit = bmr.fit(
        program,
        rows,
        epochs=2,
        batch_size=50,
        optimizer=bmr.adam(5e-3),
        reduce=bmr.Every(1, start=0, stop=1),
        progress=False,
    )
    net = bmr.export(fit.program, fit.posterior)
    x = data.x_test[:50]
    with torch.no_grad():
        want = net(x)
    zeros = sum(int((~mask).sum()) for mask in fit.masks.values())
    assert zeros > 1000
    assert all(
        not dict(net.named_parameters())[name][~mask].any() for name, mask in fit.masks.items()
    )
    assert float(want.std()) > 0.05

    bmr.save(net, tmp_path / "net")
    got = outputs_without_pyro(tmp_path, x)
    assert got.shape == (50, 10) and torch.allclose(got, want, rtol=0, atol=1e-6)
    by_hand = functional_call(lenet.network(SHAPE, SIZES, 10), fit.posterior.point(), (x,))
    assert torch.allclose(got, by_hand, rtol=0, atol=1e-6)
    saved = load_file(tmp_path / "net" / "model.safetensors")
    assert int(sum((t == 0).sum() for t in saved.values())) == zeros


def outputs_without_pyro(folder, x):
    """The outputs of the network saved in folder / "net", in an interpreter without pyro."""
    paths = [folder / "net" / "model.safetensors"]
    paths += [folder / f"{name}.safetensors" for name in ("inputs", "outputs")]
    save_file({"x": x.contiguous()}, paths[1])
    (folder / "child.py").write_text(CHILD)
    run = subprocess.run(
        [sys.executable, str(folder / "child.py"), *map(str, paths)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return load_file(paths[2])["y"]
