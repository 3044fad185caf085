"""Exported networks are plain torch: exact means, exact zeros, no hooks."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import pyro_bmr as bmr
from pyro_bmr.exporting import point_weights
from tests.exporting.networks import X, Y, normed


def test_means_are_exact_and_masks_are_zeros(pruned, exported):
    _, fit, reduction = pruned
    parameters = dict(exported.named_parameters())
    for name, mask in reduction.masks.items():
        assert torch.equal(parameters[name], reduction.posterior[name].mean)
        assert not parameters[name][~mask].any() and parameters[name][mask].all()
    assert sum(int(m.sum()) for m in reduction.masks.values()) == round(0.4 * (35 + 7 + 21 + 3))
    assert set(reduction.masks) == set(fit.program.priors)


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
        assert type(module).__module__.startswith("torch.nn")
        assert not any(getattr(module, name) for name in hooks)
    for parameter in exported.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._backward_hooks
    assert not exported.training
    ours = {p.data_ptr() for p in exported.parameters()}
    assert not ours & {p.data_ptr() for p in pruned[1].program.net.parameters()}
    assert not ours & {s.mean.data_ptr() for s in pruned[2].posterior.sites.values()}


def test_it_can_be_copied_pickled_and_loaded(exported):
    clean = normed().eval()
    assert not torch.allclose(clean(X), exported(X), atol=0.05)
    clean.load_state_dict(exported.state_dict())
    raw = pickle.dumps(exported)
    assert b"pyro" not in raw
    for other in (copy.deepcopy(exported), pickle.loads(raw), clean):
        assert torch.equal(other(X), exported(X))
        assert all(torch.equal(v, exported.state_dict()[k]) for k, v in other.state_dict().items())


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
    assert torch.allclose(got, scale * point["weight"] / math.sqrt(5), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(got, point["weight"], rtol=0.05)


def test_point_weights_of_a_network_and_of_a_program(pruned, exported):
    got = point_weights(pruned[1].program, pruned[2].posterior)
    assert list(got) == list(exported.state_dict())
    assert all(torch.equal(got[k], v) for k, v in exported.state_dict().items())
    values = point_weights(lambda x, y=None: None, pruned[1].posterior)
    assert list(values) == list(pruned[1].posterior)
    assert torch.equal(values["0.weight"], pruned[1].posterior["0.weight"].mean)


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
        assert torch.equal(made[0].weight, raw["0.weight_orig"] * net[0].weight_mask)
        assert torch.equal(made[0].bias, raw["0.bias"])
        assert copy.deepcopy(made)


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
