"""Exported networks are plain torch: exact means, exact zeros, files that load where Pyro is not
installed.
"""

import copy
import json
import math
import pickle
import subprocess
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import pyro_bmr as bmr
from pyro_bmr.exporting import point_weights
from pyro_bmr.models import lenet

X, Y = torch.randn(40, 5, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 3
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


def normed():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


@pytest.fixture(scope="module")
def pruned():
    """A small network with a norm layer, fitted and reduced to 40% of its weights."""
    torch.manual_seed(2)
    program = bmr.BayesianNetwork(normed(), bmr.Gaussian(0.5), bmr.Categorical())
    fit = bmr.fit(
        program,
        (X, Y),
        epochs=4,
        batch_size=10,
        reduce=bmr.Every(1, kept=0.4, start=0, stop=0.75),
        progress=False,
    )
    return program, fit, bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0), kept=0.4)


@pytest.fixture
def exported(pruned):
    return bmr.export(pruned[1].program, pruned[2].posterior)


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_means_are_exact_and_masks_are_zeros(pruned, exported):
    _, fit, reduction = pruned
    parameters = dict(exported.named_parameters())
    for name, mask in reduction.masks.items():
        assert torch.equal(parameters[name], reduction.posterior[name].mean)
        assert not parameters[name][~mask].any() and parameters[name][mask].all()
    assert sum(int(m.sum()) for m in reduction.masks.values()) == round(
        0.4 * (35 + 7 + 21 + 3)
    ) and set(reduction.masks) == set(fit.program.priors)


def test_what_was_not_lifted_is_that_of_the_fitted_program(pruned, exported):
    program, fit, _ = pruned
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(exported[1], name), getattr(fit.program.net[1], name))
        assert not torch.equal(getattr(exported[1], name), getattr(program.net[1], name))


def test_it_predicts_as_the_posterior_point(pruned, exported):
    _, fit, reduction = pruned
    want = bmr.predict(fit.program, reduction.posterior, X, draws=0).probs
    assert torch.allclose(exported(X).softmax(1), want, atol=1e-6)
    by_hand = functional_call(
        fit.program.net.eval(),
        {name: reduction.posterior[name].mean for name in reduction.masks},
        (X,),
    )
    assert torch.equal(exported(X), by_hand)


def test_it_is_plain_torch(pruned, exported):
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    for module in exported.modules():
        assert type(module).__module__.startswith("torch.nn") and not any(
            getattr(module, name) for name in hooks
        )
    for parameter in exported.parameters():
        assert (
            type(parameter) is nn.Parameter
            and parameter.is_leaf
            and parameter.requires_grad
            and parameter.grad is None
            and not parameter._backward_hooks
        )
    assert not exported.training
    ours = {p.data_ptr() for p in exported.parameters()}
    assert not ours & {p.data_ptr() for p in pruned[1].program.net.parameters()} and not ours & {
        s.mean.data_ptr() for s in pruned[2].posterior.sites.values()
    }


def test_it_can_be_copied_pickled_and_loaded(exported):
    clean = normed().eval()
    assert not torch.allclose(clean(X), exported(X), atol=0.05)
    clean.load_state_dict(exported.state_dict())
    raw = pickle.dumps(exported)
    assert b"pyro" not in raw
    for other in (copy.deepcopy(exported), pickle.loads(raw), clean):
        assert torch.equal(other(X), exported(X)) and all(
            torch.equal(v, exported.state_dict()[k]) for k, v in other.state_dict().items()
        )


def test_it_can_be_trained_on(exported):
    before = exported[0].weight.detach().clone()
    optimizer = torch.optim.SGD(exported.parameters(), 0.1)
    nn.functional.cross_entropy(exported(X), Y).backward()
    optimizer.step()
    assert not torch.equal(exported[0].weight, before)


@pytest.mark.parametrize(
    "prior",
    [bmr.Gaussian("layer"), bmr.Horseshoe(tau0=0.6, slab_scale=1.5), bmr.SpikeAndSlab()],
    ids=lambda p: type(p).__name__,
)
def test_standardised_weights_are_taken_at_the_scales_median(prior):
    program = bmr.BayesianNetwork(nn.Linear(5, 3), {"weight": prior}, bmr.Categorical())
    fit = bmr.fit(program, (X, Y), epochs=2, batch_size=10, progress=False)
    point = {
        name: site.mean if site.support == "real" else site.mean.exp()
        for name, site in fit.posterior.sites.items()
        if site.support != "unit_interval"
    }
    if isinstance(prior, bmr.Horseshoe):
        psi = point["weight_tau"] * point["weight_lambda"]
        scale = psi / (1 + (psi / 1.5) ** 2).sqrt()
    else:
        scale = point["weight_precision"] ** -0.5
    got = bmr.export(fit.program, fit.posterior).weight
    assert torch.allclose(
        got, scale * point["weight"] / math.sqrt(5), rtol=1e-5, atol=1e-7
    ) and not torch.allclose(got, point["weight"], rtol=0.05)


def test_point_weights_of_a_network_and_of_a_program(pruned, exported):
    got = point_weights(pruned[1].program, pruned[2].posterior)
    assert list(got) == list(exported.state_dict()) and all(
        torch.equal(got[k], v) for k, v in exported.state_dict().items()
    )
    values = point_weights(lambda x, y=None: None, pruned[1].posterior)
    assert list(values) == list(pruned[1].posterior) and torch.equal(
        values["0.weight"], pruned[1].posterior["0.weight"].mean
    )


def test_what_cannot_be_exported(pruned):
    _, fit, _ = pruned
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"export: expected a BayesianNetwork, got function.*posterior\.point\(\)",
    ):
        bmr.export(lambda x, y=None: None, fit.posterior)
    other = bmr.BayesianNetwork(
        nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), bmr.Gaussian(1.0), bmr.Categorical()
    )
    with pytest.raises(
        bmr.errors.ModelError, match=r"no site '1\.weight'.*0\.weight, 0\.bias, 3\.weight, 3\.bias"
    ):
        bmr.export(other, fit.posterior)


@pytest.mark.parametrize("hidden", [6, 1])
def test_the_posterior_of_a_network_of_other_sizes(pruned, hidden):
    net = nn.Sequential(nn.Linear(5, hidden), nn.Identity(), nn.Tanh(), nn.Linear(hidden, 3))
    other = bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Categorical())
    with pytest.raises(
        bmr.errors.ModelError, match=rf"0\.weight.*\({hidden}, 5\)|0\.weight.*\(7, 5\)"
    ):
        bmr.export(other, pruned[2].posterior)


def test_a_smaller_posterior_is_not_broadcast(pruned):
    site = pruned[1].posterior["3.bias"]
    small = bmr.Posterior(
        {**pruned[1].posterior.sites, "3.bias": type(site)(site.mean[:1], site.var[:1])}
    )
    with pytest.raises(bmr.errors.ModelError, match=r"3\.bias"):
        bmr.export(pruned[1].program, small)


def test_save_and_load(exported, tmp_path):
    folder = tmp_path / "deep" / "er"
    bmr.save(exported, folder, {"accuracy": 0.75, "note": "über", "nested": {"kept": [1, None]}})
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "report.json"]
    loaded = load_file(folder / "model.safetensors")
    assert set(loaded) == set(exported.state_dict())
    for name, value in exported.state_dict().items():
        assert (
            loaded[name].dtype == value.dtype
            and loaded[name].shape == value.shape
            and torch.equal(loaded[name], value)
        )
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
    ) and report["format"] == "pyro_bmr report 1"
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


def test_a_plain_network_that_torch_has_pruned_is_exported_under_either_name():
    net = nn.Sequential(nn.Linear(5, 3))
    prune.custom_from_mask(net[0], "weight", torch.arange(15).view(3, 5) % 3 > 0)
    net(X).sum().backward()
    raw = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    for names in ({}, {"0.weight_orig": "0.weight"}):
        values = {names.get(name, name): t for name, t in raw.items()}
        posterior = bmr.Posterior.from_curvature(
            values,
            {name: torch.ones_like(t) for name, t in values.items()},
            prior=bmr.Gaussian(1e3),
        )
        made = bmr.export(net, posterior)
        assert (
            torch.equal(made[0].weight, raw["0.weight_orig"] * net[0].weight_mask)
            and torch.equal(made[0].bias, raw["0.bias"])
            and copy.deepcopy(made)
        )


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
    assert set(loaded) == set(weights) and all(
        torch.equal(loaded[name], value.detach()) for name, value in weights.items()
    )


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
    assert zeros > 1000 and all(
        not dict(net.named_parameters())[name][~mask].any() for name, mask in fit.masks.items()
    )
    assert float(want.std()) > 0.05

    bmr.save(net, tmp_path / "net")
    save_file({"x": x.contiguous()}, tmp_path / "inputs.safetensors")
    (tmp_path / "child.py").write_text(CHILD)
    paths = [
        str(tmp_path / "net" / "model.safetensors"),
        str(tmp_path / "inputs.safetensors"),
        str(tmp_path / "outputs.safetensors"),
    ]
    run = subprocess.run(
        [sys.executable, str(tmp_path / "child.py"), *paths],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    got = load_file(tmp_path / "outputs.safetensors")["y"]
    assert got.shape == (50, 10) and torch.allclose(got, want, rtol=0, atol=1e-6)
    by_hand = functional_call(lenet.network(SHAPE, SIZES, 10), fit.posterior.point(), (x,))
    assert torch.allclose(got, by_hand, rtol=0, atol=1e-6)
    assert int(sum((t == 0).sum() for t in load_file(paths[0]).values())) == zeros


def test_a_hand_written_program_exports_its_weights_not_their_standardised_sites():
    def program(x, y=None):
        w = bmr.Horseshoe(tiers=("layer", "unit")).sample("w", (4, 3), x.new_zeros(4, 3))
        b = pyro.sample("b", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal((x @ w.T + b).sum(1), 1.0), obs=y)

    x = torch.randn(20, 3)
    fit = bmr.fit(program, (x, x.sum(1)), epochs=5, progress=False)
    weights = point_weights(program, fit.posterior)
    values = fit.posterior.point()
    psi = values["w_tau"] * values["w_unit"]
    gamma = psi / (1 + (psi / 2) ** 2).sqrt() / 3**0.5
    assert list(weights) == ["w", "b"]
    torch.testing.assert_close(weights["w"], gamma * values["w"])
