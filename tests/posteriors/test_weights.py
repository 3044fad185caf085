"""Weights from standardised sites and their scales: moments and draws; and what a posterior, a fit
and a reduction print and list.
"""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.posteriors.site import Site

MEAN = torch.tensor([[0.4, -1.2, 2.0], [0.5, 0.3, -0.7]]).double()
VAR = torch.tensor([[0.3, 0.1, 0.6], [0.2, 0.5, 0.9]]).double()


def positive(m, v):
    return Site(torch.tensor(m).double(), torch.tensor(v).double(), support="positive")


def layer(mask=None):
    """w = precision^-½ w̄/√3 with log precision ~ N(0.8, 0.25)."""
    prior = bmr.Gaussian("layer")
    w = Site(MEAN, VAR, declared=prior)
    w = w if mask is None else w.masked(mask)
    return bmr.Posterior({"w": w, "w_precision": positive(0.8, 0.25), "b": Site(MEAN[0], VAR[0])})


@pytest.mark.slow
def test_the_moments_of_a_weight_are_those_of_a_product():
    """w = s w̄/√3 with s = e^{−u/2} log-normal: E[s] = e^{−m/2 + v/8}, E[s²] = e^{−m + v/2}."""
    first, second = math.exp(-0.4 + 0.25 / 8), math.exp(-0.8 + 0.25 / 2)
    got = layer().weight("w", draws=4_000)
    torch.testing.assert_close(got.mean, MEAN * first / math.sqrt(3), rtol=2e-2, atol=0)
    expected = (second * (MEAN.square() + VAR) - first**2 * MEAN.square()) / 3
    torch.testing.assert_close(got.var, expected, rtol=4e-2, atol=0)
    assert torch.equal(layer().weight("b").mean, MEAN[0])
    mask = MEAN > 0
    pruned = layer(mask).weight("w")
    assert torch.equal(pruned.mean == 0, ~mask) and torch.equal(pruned.var == 0, ~mask)


def test_a_prior_without_scales_of_its_own_has_exact_moments():
    prior = bmr.Laplace(0.3)
    got = bmr.Posterior({"w": Site(MEAN, VAR, declared=prior)}).weight("w")
    torch.testing.assert_close(got.mean, MEAN)
    torch.testing.assert_close(got.var, VAR)


HORSESHOES = [
    bmr.Horseshoe(), bmr.Horseshoe.tiered(weights=True), bmr.Horseshoe(parametrization="gamma"),
]  # fmt: skip
OTHERS = [
    bmr.SpikeAndSlab(),
    bmr.SpikeAndSlab(temperature=0.5, per="unit"),
    bmr.StudentT(scale="layer"),
]


@pytest.mark.parametrize(
    ("draws", "of_mean", "of_var"), [(100, 5, 5), pytest.param(500, 6, 8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("prior", "guide"),
    [(prior, bmr.MeanField) for prior in (*HORSESHOES, *OTHERS)]
    + [(HORSESHOES[0], bmr.ScaleCoupled)]
    # each of the two priors and the guide are above
    + [pytest.param(prior, bmr.ScaleCoupled, marks=pytest.mark.slow) for prior in HORSESHOES[1:]],
    ids=repr,
)
def test_moments_and_draws_of_weights_agree_for_every_prior(prior, guide, draws, of_mean, of_var):
    """The moments against those of draws of all sites, put through the program's own statements."""
    torch.manual_seed(1)
    x, y = torch.randn(60, 3), torch.randn(60)
    program = bmr.BayesianNetwork(nn.Linear(3, 1), prior, bmr.Normal(noise=0.5))
    fit = bmr.fit(program, (x, y), guide=guide, epochs=20, progress=False)
    # narrow scales, so that the fourth moments of the draws are finite in practice
    sites = {
        name: site if site.support == "real" else replace(site, var=site.var.clamp(max=0.02))
        for name, site in fit.posterior.sites.items()
    }
    posterior = replace(fit.posterior, sites=sites)
    generator = torch.Generator().manual_seed(2)
    drawn = [posterior.draw(generator, weights=True) for _ in range(draws)]
    assert set(drawn[0]) == {"weight", "bias"}
    values = torch.stack([d["weight"] for d in drawn]).double()
    got = posterior.weight("weight", draws=draws)
    error = values.std(0) / math.sqrt(draws)
    assert bool(((got.mean - values.mean(0)).abs() < of_mean * error + 1e-6).all())
    fourth = (values - values.mean(0)).pow(4).mean(0)
    error = ((fourth - values.var(0).square()) / draws).sqrt()
    assert bool(((got.var - values.var(0)).abs() < of_var * error).all())
    # a draw of the weights is the program's weight at that draw of the sites
    generator = torch.Generator().manual_seed(2)
    sites = posterior.draw(generator)
    with bmr.tracing.Values(sites):
        weights = program.weights()
    torch.testing.assert_close(drawn[0]["weight"], weights["weight"])


def test_a_weight_that_cannot_be_known_is_refused():
    with pytest.raises(bmr.errors.ModelError, match="'w_precision', which is not in the posterior"):
        bmr.Posterior({"w": layer()["w"]}).weight("w")
    with pytest.raises(bmr.errors.ModelError, match="is positive: expected the site of a real"):
        layer().weight("w_precision")
    with pytest.raises(bmr.errors.ModelError, match="has no site 'v'"):
        layer().weight("v")
    with pytest.raises(bmr.errors.PyroBMRError, match="draws"):
        layer().weight("w", draws=0)


def test_the_draws_leave_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one, other = layer().weight("w", seed=3), layer().weight("w", seed=3)
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(one.var, other.var)


def test_what_is_printed_fits_on_a_line():
    posterior = layer(MEAN > 0)
    assert repr(posterior) == "Posterior(3 sites, 10 entries, 8 kept)"
    other = bmr.Posterior({"b": Site(MEAN, VAR)}, temperature=0.3, rows=1200)
    assert repr(other) == "Posterior(1 sites, 6 entries, temperature 0.3, 1,200 rows)"
    site = Site(MEAN, VAR / 10, prior=bmr.formulas.Diagonal(torch.zeros(()), torch.ones(())))
    reduction = bmr.reduce(bmr.Posterior({"w": site}), to=bmr.Gaussian(scale=0))
    kept = int(reduction.masks["w"].sum())
    assert repr(reduction) == (
        f"Reduction(1 sites, {kept / 6:.1%} of 6 entries kept, ΔF {reduction.delta_f:.1f} nats)"
    )


def test_a_table_of_entries_has_what_the_sites_have():
    mean = torch.tensor([[0.01, 1.5], [0.75, -0.02]]).double()
    prior = bmr.formulas.Diagonal(torch.zeros(()), torch.ones(()))
    site = Site(mean, torch.full((2, 2), 0.04).double(), prior=prior)
    reduction = bmr.reduce(bmr.Posterior({"w": site}), to=bmr.Gaussian(scale=0))
    table = reduction.table(entries=True)
    assert isinstance(table, pd.DataFrame)
    assert table["index"].tolist() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert table["kept"].tolist() == [False, True, True, False]
    assert table["mean"].tolist() == mean.flatten().tolist()
    assert table["mean_after"].tolist() == [0.0, 1.5, 0.75, 0.0]
    assert table["sd"].tolist() == pytest.approx([0.2] * 4)
    assert table["sd_after"].tolist() == pytest.approx([0, 0.2, 0.2, 0])
    # −½ log σ² − ½ μ²/σ² under a prior N(0, 1)
    expected = [-0.5 * math.log(0.04) - 0.5 * m * m / 0.04 for m in mean.flatten().tolist()]
    assert table["spike_delta_f"].tolist() == pytest.approx(expected)
    assert len(reduction.table()) == 1
