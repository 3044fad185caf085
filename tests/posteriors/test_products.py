"""Sites that a program multiplies are found, whatever the program; sites with something between
them are not; what is found is kept with the posterior.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.posteriors.products import with_products

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def found(program, x=X, y=Y):
    guide = bmr.MeanField(program, x, y)
    sites = bmr.Posterior.from_guide(guide, program, x, y).sites
    without = bmr.Posterior.from_guide(guide, program, x, y, products=False).sites
    assert list(sites) == list(without) and not any(site.multiplies for site in without.values())
    return {
        tuple(sorted((name, other))) for name, site in sites.items() for other in site.multiplies
    }


def lift(net, prior=bmr.Gaussian(1.0)):
    return bmr.BayesianNetwork(net, prior, bmr.Categorical())


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 6) / 2), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        return x @ self.a.T @ self.b.T


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(1, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        h = torch.tanh(self.embed(x[..., None]))
        return self.head(torch.tanh(self.attention(h, h, h, need_weights=False)[0]).mean(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(6, 10), nn.Linear(5, 3)

    def forward(self, x):
        a, b = self.gate(x).chunk(2, -1)
        return self.out(nn.functional.silu(a) * b)


@pytest.mark.parametrize(
    "prior",
    [bmr.Gaussian(0.5), bmr.Gaussian("layer"), bmr.Horseshoe()],
    ids=["given", "layer", "horseshoe"],
)
def test_the_factors_of_a_low_rank_matrix_also_where_one_starts_at_zero(prior):
    assert found(lift(LowRank(), prior)) == {("a", "b")}


@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), nn.LeakyReLU(0.5), nn.Tanh(), nn.GELU(), nn.LayerNorm(5)],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_something_between_them_do_not_multiply(between, bias):
    assert (
        found(lift(nn.Sequential(nn.Linear(6, 5, bias=bias), between, nn.Linear(5, 3, bias=bias))))
        == set()
    )


def test_layers_with_nothing_between_them_do():
    nets = [
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
        nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 5, 1), nn.Conv1d(5, 1, 1), nn.Flatten()
        ),
    ]
    assert found(lift(nets[0])) == {("0.weight", "1.weight")} and found(lift(nets[1])) == {
        ("1.weight", "2.weight")
    }


def test_fused_projections_of_attention_and_of_a_gate():
    assert found(lift(Attention())) == {
        ("attention.in_proj_weight", "attention.in_proj_weight"),  # queries and keys
        ("attention.in_proj_weight", "attention.out_proj.weight"),  # values and output
    }
    assert found(lift(Gated())) == {("gate.weight", "out.weight")}


def test_hand_written_programs():
    def product(x, y=None):
        a, b = (pyro.sample(name, dist.Normal(x.new_zeros(6), 1.0).to_event(1)) for name in "ab")
        s, tau = pyro.sample("s", dist.Normal(1.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ (a * b * tau) * s, 0.5), obs=y)

    def regression(x, y=None):
        w, c = (
            pyro.sample("w", dist.Normal(x.new_zeros(6), 1.0).to_event(1)),
            pyro.sample("c", dist.Normal(0.0, 1.0)),
        )
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        return pyro.sample("y", dist.Normal(x @ (w * tau) + c, 0.5).to_event(1), obs=y)

    y = torch.randn(8)
    assert found(product, X, y) == {
        ("a", "b"),
        ("a", "s"),
        ("b", "s"),
    }, "a positive scale is no factor to be pruned"
    assert found(regression, X, y) == set()


def test_nothing_is_left_behind():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    program = lift(net)
    net.train()
    net[2].eval()
    before, state = {name: t.clone() for name, t in net.state_dict().items()}, torch.get_rng_state()
    posterior = bmr.Posterior(
        {
            name: bmr.Site(p.detach(), torch.ones_like(p))
            for name, p in net.named_parameters()
            if name in program.priors
        }
    )
    assert with_products(posterior.sites, lambda x, y: program(x, y), (X, Y), {})[
        "0.weight"
    ].multiplies == ("3.weight",)
    assert all(
        torch.equal(before[name], t) for name, t in net.state_dict().items()
    ) and torch.equal(state, torch.get_rng_state())
    assert (
        net.training
        and net[1].training
        and not net[2].training
        and len(pyro.get_param_store()) == 0
    )


def test_a_program_that_takes_no_other_values_has_none():
    def fragile(x, y=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        if bool(a.any()):
            raise ValueError("only at its start")
        return pyro.sample("y", dist.Normal(x[:, 0] * a.prod(), 1.0).to_event(1), obs=y)

    assert (
        with_products(
            {"a": bmr.Site(torch.zeros(2), torch.ones(2))}, fragile, (X, torch.randn(8)), {}
        )["a"].multiplies
        == ()
    )


def test_a_fit_and_a_file_keep_what_was_found(tmp_path):
    fit = bmr.fit(lift(LowRank()), (X, Y), epochs=2, batch_size=8, progress=False)
    assert {name: site.multiplies for name, site in fit.posterior.sites.items()} == {
        "a": ("b",),
        "b": ("a",),
    }
    fit.posterior.masked({"a": torch.ones(4, 6).bool()}).save(tmp_path / "posterior.safetensors")
    assert bmr.Posterior.load(tmp_path / "posterior.safetensors")["b"].multiplies == ("a",)
