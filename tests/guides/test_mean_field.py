"""Construction, start values and sites of `MeanField` and `Point`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.guides.latent_sites import latent_sites


def program(x, y=None):
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(0.3)))
    share = pyro.sample("share", dist.Beta(torch.tensor(2.0), torch.tensor(6.0)))
    with pyro.plate("features", x.shape[1]):
        w = pyro.sample("w", dist.Normal(torch.tensor(0.7), tau.clamp(min=0.1)))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ (w * share), 1.0), obs=y)


X = torch.randn(6, 3)


def test_sites_of_every_support_are_sampled_where_the_program_has_them():
    guide = bmr.MeanField(program, X, X[:, 0])
    trace = pyro.poutine.trace(guide).get_trace(X, X[:, 0])
    assert (trace.nodes["tau"]["value"] > 0) and 0 < trace.nodes["share"]["value"] < 1
    assert trace.nodes["w"]["fn"].batch_shape == (3,) and isinstance(
        trace.nodes["w"]["fn"], dist.Normal
    )
    assert [f.name for f in trace.nodes["w"]["cond_indep_stack"]] == ["features"]


def test_parameters_exist_at_construction_and_start_at_medians_and_means():
    guide = bmr.MeanField(program, X, X[:, 0])
    assert [name for name, _ in guide.named_parameters()] == ["loc", "log_scale"]
    start = guide.views(guide.loc.detach())
    # the half-Cauchy's median is its scale
    assert start["tau"].exp().item() == pytest.approx(0.3, rel=1e-5)
    assert start["share"].sigmoid().item() == pytest.approx(0.228, abs=0.03)  # the Beta's median
    torch.testing.assert_close(start["w"], torch.full((3,), 0.7))


def test_networks_start_at_their_own_weights_in_site_units():
    net = nn.Linear(4, 3)
    fixed = bmr.MeanField(
        bmr.BayesianNetwork(net, bmr.Gaussian(0.5), bmr.Categorical()),
        torch.randn(2, 4),
        torch.zeros(2).long(),
    )
    torch.testing.assert_close(fixed.views(fixed.loc.detach())["weight"], net.weight.detach())
    rms = net.weight.detach().square().mean().sqrt()
    torch.testing.assert_close(
        fixed.views(fixed.log_scale.detach())["weight"].exp(), (0.3 * rms).expand(3, 4)
    )
    layer = bmr.MeanField(
        bmr.BayesianNetwork(net, bmr.Gaussian("layer"), bmr.Categorical()),
        torch.randn(2, 4),
        torch.zeros(2).long(),
    )
    # units of 1/√fan_in
    torch.testing.assert_close(layer.views(layer.loc.detach())["weight"], net.weight.detach() * 2)


def test_construction_leaves_random_state_and_param_store_alone():
    before = torch.random.get_rng_state()
    bmr.MeanField(program, X, X[:, 0])
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(pyro.get_param_store()) == 0


def test_float64_follows_the_program():
    net = nn.Linear(4, 3).double()
    guide = bmr.MeanField(
        bmr.BayesianNetwork(net, bmr.Horseshoe(), bmr.Categorical()),
        torch.randn(2, 4).double(),
        torch.zeros(2).long(),
    )
    assert guide.loc.dtype == guide.log_scale.dtype == torch.float64


def discrete(x, y=None):
    pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))


def simplex(x, y=None):
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))


def local(x, y=None):
    with pyro.plate("data", 100, subsample_size=5):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def nothing(x, y=None):
    pyro.sample("y", dist.Normal(torch.tensor(0.0), 1.0), obs=x[0, 0])


@pytest.mark.parametrize(
    "bad, words",
    [
        (discrete, "site 'k'.*support"),
        (simplex, "site 'p'.*autoguides"),
        (local, "site 'z'.*subsampled plate 'data'"),
        (nothing, "no latent site"),
    ],
)
def test_sites_it_cannot_take_are_named(bad, words):
    with pytest.raises(bmr.errors.ModelError, match=words):
        latent_sites(bad, X, X[:, 0])


def test_point_has_one_value_per_site():
    guide = bmr.Point(program, X, X[:, 0])
    values = guide(X, X[:, 0])
    assert values["tau"].item() == pytest.approx(0.3, rel=1e-5) and torch.equal(
        values["w"], torch.full((3,), 0.7)
    )
    assert guide.loc.numel() == 5
