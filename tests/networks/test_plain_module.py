"""Wrapped, pruned and parametrised modules have plain names, masks and weights; what a prior cannot
be over is left or refused by name.
"""

import copy
from functools import partial

import pyro.infer.autoguide as auto
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import pyro_bmr as bmr
from pyro_bmr.networks.constraints import constraints_of
from pyro_bmr.networks.plain_module import module_copy, plain_copy, plain_module

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
G = bmr.Gaussian(0.7)
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def mlp():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def lift(net, prior=G):
    return bmr.BayesianNetwork(net, prior, bmr.Categorical())


def short_fit(program, **kwargs):
    return bmr.fit(program, (X, Y), epochs=4, batch_size=8, progress=False, **kwargs)


class Dropping(prune.BasePruningMethod):
    """A pruning of one's own: every weight below 0.1."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        return default_mask * (t.abs() > 0.1)


def pruned():
    net = mlp()
    prune.random_unstructured(net[0], "weight", 0.3)
    Dropping.apply(net[0], "weight")  # two in a row: a PruningContainer
    prune.l1_unstructured(net[2], "bias", 1)
    prune.global_unstructured(
        [(net[2], "weight"), (net[0], "weight")], prune.L1Unstructured, amount=3
    )
    net(X).sum().backward()  # leaves the product, which has a history, in the module
    return net


def state_of(net):
    return {name: t.clone() for name, t in net.state_dict().items()}, [
        type(module) for module in net.modules()
    ]


def unchanged(net, state):
    now = state_of(net)
    return (
        now[1] == state[1]
        and now[0].keys() == state[0].keys()
        and all(torch.equal(now[0][name], t) for name, t in state[0].items())
    )


def wrapped(kind):
    net = mlp()
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(net[0])
        net[0].parametrizations.weight.original0.data.mul_(1.7)
    elif kind == "inner":
        return nn.Sequential(
            net[0], torch.compile(net[1], backend="eager"), torch.compile(net[2], backend="eager")
        )
    return {
        "compiled": lambda n: torch.compile(n, backend="eager"),
        "parallel": nn.DataParallel,
        "average": AveragedModel,
    }.get(kind, lambda n: n)(net)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["compiled", "inner", "parallel", "average", "weight norm"])
def test_names_are_plain_and_files_load_into_the_plain_network(kind, tmp_path):
    net = wrapped(kind)
    state, program = state_of(net), lift(net)
    assert (
        list(program.priors) == NAMES == list(program.table()["parameter"]) and program.left == {}
    )
    assert kind == "weight norm" or torch.equal(program.net(X), mlp()(X))
    fit = short_fit(program)
    exported = bmr.export(fit.program, fit.posterior)
    assert list(fit.posterior) == NAMES == [name for name, _ in exported.named_parameters()]
    bmr.save(exported, tmp_path)
    clean = mlp().eval()
    clean.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(clean(X), exported(X)) and unchanged(net, state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("constraints", [False, True])
def test_a_plain_module_computes_the_same(constraints):
    net = pruned()
    for bound in (
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ):
        net.append(bound(nn.Linear(3, 3)))
    want = net.eval()(X)
    state = state_of(net)
    plain, masks = plain_module(net, constraints=constraints)
    assert (
        torch.allclose(plain(X), want, atol=1e-6)
        and unchanged(net, state)
        and torch.allclose(net(X), want)
    )
    assert set(masks) == {"0.weight", "2.weight", "2.bias"} and torch.equal(
        masks["0.weight"], net[0].weight_mask.bool()
    )
    names = [name for name, _ in plain.named_parameters()]
    assert names[:6] == [*NAMES, "3.weight", "3.bias"]
    assert (
        names[6:] == [f"{k}.{end}" for k in (4, 5, 6) for end in ("weight", "bias")]
    ) == constraints


def test_plain_modules_are_used_as_they_are_and_copies_are_copies():
    net = mlp()
    assert plain_module(net) == (net, {}) and lift(net).net is net
    for other, plain in (
        (net, net),
        (torch.compile(net, backend="eager"), net),
        (pruned(), pruned()),
    ):
        made = plain_copy(other)
        assert not made.training and not {p.data_ptr() for p in made.parameters()} & {
            p.data_ptr() for p in other.parameters()
        }
        assert torch.allclose(made(X), plain(X), atol=1e-6) and copy.deepcopy(made)


GUIDES = [
    bmr.MeanField,
    partial(bmr.MeanField, estimator="local"),
    bmr.FullRank,
    bmr.Point,
    auto.AutoNormal,
]


@pytest.mark.parametrize(
    "guide", GUIDES, ids=["MeanField", "local", "FullRank", "Point", "AutoNormal"]
)
def test_masks_of_torch_are_masks_from_the_start_and_nothing_revives(guide):
    net = pruned()
    state, masks = (
        state_of(net),
        {
            "0.weight": net[0].weight_mask.bool(),
            "2.weight": net[2].weight_mask.bool(),
            "2.bias": net[2].bias_mask.bool(),
        },
    )
    program = lift(net, bmr.Gaussian("layer") if guide is auto.AutoNormal else G)
    assert list(program.priors) == NAMES and all(
        torch.equal(program.masks[name], mask) for name, mask in masks.items()
    )
    fit = short_fit(
        program,
        guide=guide,
        reduce=bmr.Every(1, kept=0.3, start=0) if guide is bmr.MeanField else None,
    )
    assert unchanged(net, state) and torch.equal(
        net[0].weight, net[0].weight_orig * net[0].weight_mask
    )
    exported, drawn, prior = (
        bmr.export(fit.program, fit.posterior),
        fit.posterior.draw(),
        fit.program.weights(),
    )
    for name, mask in masks.items():
        assert not (fit.masks[name] & ~mask).any() and torch.equal(
            fit.posterior.masks[name], fit.masks[name]
        )
        for value in (exported.get_parameter(name), drawn[name], prior[name]):
            assert not value[~mask].any() and value[fit.masks[name]].all()
    assert bool(bmr.predict(fit.program, fit.posterior, X, draws=2).probs.isfinite().all())


def test_masks_of_torch_hold_in_posteriors_read_from_elsewhere():
    program = lift(pruned())
    mask = program.masks["0.weight"]
    read = bmr.Posterior.from_guide(bmr.MeanField(program, X, Y), program, X, Y)
    assert torch.equal(read.masks["0.weight"], mask) and not read["0.weight"].mean[~mask].any()
    narrower = bmr.Posterior.from_guide(
        bmr.MeanField(program, X, Y),
        program,
        X,
        Y,
        masks={"0.weight": torch.arange(24).view(6, 4) % 2 == 0},
    )
    assert torch.equal(narrower.masks["0.weight"], mask & (torch.arange(24).view(6, 4) % 2 == 0))
    begun = short_fit(
        program,
        start=bmr.Posterior(
            {
                name: bmr.Site(s.mean, s.var + 0.01, s.prior, s.declared)
                for name, s in read.sites.items()
            }
        ),
    )
    assert torch.equal(begun.masks["0.weight"], mask)


def test_a_pruned_point_estimate_stays_pruned():
    net = pruned()
    fit = short_fit(lift(net, {"2.*": G}))
    weight, mask = fit.program.net[0].weight, net[0].weight_mask.bool()
    assert not weight[~mask].any() and not torch.equal(weight[mask], net[0].weight[mask])


def test_tied_parameters_that_are_pruned():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    mask = torch.arange(16).view(4, 4) % 3 > 0
    prune.custom_from_mask(net[0], "weight", mask)
    with pytest.raises(bmr.errors.ModelError, match=r"'0\.weight'.*tied.*untie"):
        plain_module(net)
    prune.custom_from_mask(net[2], "weight", mask)
    plain, masks = plain_module(net)
    assert (
        plain[2].weight is plain[0].weight
        and list(masks) == ["0.weight"]
        and torch.allclose(plain(X), net(X))
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [False, True])
def test_weight_norm_is_reduced_without_a_nan(old, tmp_path):
    net = mlp()
    (nn.utils.weight_norm if old else parametrizations.weight_norm)(net[0])
    fit = short_fit(lift(net))
    masks = {"0.weight": torch.arange(6)[:, None].expand(6, 4) > 1}
    exported = bmr.export(fit.program, fit.posterior.masked(masks))
    assert not exported[0].weight[:2].any() and bool(exported(X).isfinite().all())
    with torch.no_grad():
        (net[0].weight_v if old else net[0].parametrizations.weight.original1)[0] = 0
    with pytest.raises(
        bmr.errors.ModelError, match=r"'0\.weight': 4 of its 24 values are not finite"
    ):
        lift(net)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_normed_weight_is_a_parameter_where_no_gradients_are_recorded(old, trained):
    net = mlp()
    (nn.utils.weight_norm if old else parametrizations.weight_norm)(net[0])
    net.requires_grad_(trained)
    with torch.no_grad():
        plain = plain_module(net).net
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == dict.fromkeys(
        NAMES, trained
    )
    masks = {"0.weight": torch.arange(6)[:, None].expand(6, 4) > 1}
    small = bmr.shrink(net, masks, X[:2])
    assert small[0].weight.shape == (4, 4)
    with torch.no_grad():
        hidden = torch.tanh(X @ (net[0].weight * masks["0.weight"]).T + net[0].bias)
        torch.testing.assert_close(small(X), net[2](hidden))


def test_a_constrained_buffer_stays_a_buffer():
    net = mlp()
    net.register_buffer("weight", torch.randn(3, 3))
    parametrize.register_parametrization(net, "weight", Symmetric())
    want = net.weight.clone()
    with torch.no_grad():
        plain = plain_copy(net)
    assert [n for n, _ in plain.named_parameters()] == NAMES
    torch.testing.assert_close(dict(plain.named_buffers())["weight"], want)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


class Softplus(nn.Module):
    def forward(self, x):
        return nn.functional.softplus(x)


class Rows(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


class Columns(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=0)


class Update(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, x):
        return x + self.b @ self.a


@pytest.mark.parametrize(
    ("kind", "left", "never"),
    [
        (Symmetric, "", False),
        (Update, "", False),
        (Softplus, "zero is not a zero", False),
        (Rows, "0/0", True),
        (Columns, "scale does not matter", True),
    ],
)
def test_a_parametrised_tensor_is_a_site_where_zero_is_zero(kind, left, never):
    net, name = nn.Sequential(nn.Linear(4, 4)), "0.parametrizations.weight.original"
    parametrize.register_parametrization(net[0], "weight", kind(), unsafe=True)
    program = lift(net)
    assert (name in program.priors) == (not left) and left in program.left.get(name, "")
    assert not left or left in program.table().set_index("parameter").loc[name, "why left"]
    if never:
        with pytest.raises(
            bmr.errors.ModelError, match=rf"{name}.*{left}.*remove_parametrizations"
        ):
            lift(net, {name: G, "*": G})
    else:
        assert name in lift(net, {name: G, "*": G}).priors


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "norm", [nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_norms_and_maps_that_bind_a_weight_leave_it_a_point_estimate(norm):
    net = nn.Sequential(norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))
    net(X)
    program = lift(net)
    assert (
        list(program.priors) == ["0.bias", "2.weight", "2.bias"]
        and len(program.left) == 1
        and len(constraints_of(net)) == 1
    )
    fit = short_fit(program)
    exported = bmr.export(
        fit.program, bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0), kept=0.0).posterior
    )
    assert bool(exported(X).isfinite().all()) and not exported[2].weight.any()


class Keeping(nn.Module):
    """Keeps its hidden state, with its history, as recurrent modules and those that show their
    attention do.
    """

    def __init__(self):
        super().__init__()
        self.layers, self.seen = mlp(), []

    def forward(self, x):
        self.hidden = self.layers[0](x)
        self.seen = [self.hidden, {"again": self.hidden}]
        return self.layers[2](torch.tanh(self.hidden))


def test_a_module_that_keeps_what_it_computed_is_copied_without_it():
    net = Keeping()
    net(X)
    copied = module_copy(net)
    assert (
        torch.equal(copied.hidden, net.hidden)
        and not copied.hidden.requires_grad
        and copied.seen[1]["again"] is copied.hidden
    )
    fit = short_fit(lift(net))
    assert torch.equal(
        bmr.export(fit.program, fit.posterior).layers[0].weight,
        fit.posterior["layers.0.weight"].mean,
    )
    net.lines = (line for line in "ab")
    with pytest.raises(bmr.errors.ModelError, match="Keeping cannot be copied.*generator"):
        module_copy(net)
