"""Scales that weights share: tiers, blocks, empirical scales per group, what a prior decides after
a fit, and priors on disk.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.posteriors.site import Site
from pyro_bmr.priors.empirical_bayes import EmpiricalScales
from pyro_bmr.priors.tiers import spread, tier_parts, tier_shape
from tests.exact import windowed

KERNEL = (6, 4, 3, 2)
GROUPS = [("layer", 1), ("unit", 1), ("unit", 3), ("input", 1), ("input", 2), ("weight", 1)]


def group_of(index, tier, block):
    """The label of the scale of one entry, by its index alone."""
    return (
        {"layer": (), "unit": index[:1], "input": index[1:2], "weight": index}[tier]
        if block == 1
        else (index[tier == "input"] // block,)
    )


@pytest.mark.parametrize("shape", [KERNEL, (6, 4), (6,)])
@pytest.mark.parametrize("tier, block", GROUPS)
def test_entries_share_a_scale_exactly_with_their_group(tier, block, shape):
    rows = tier_shape(shape, tier, block)
    scales = torch.arange(1.0, 1 + math.prod(rows)).view(rows)
    full = spread(scales, tier, block).expand(shape)
    labels = {}
    for index in np.ndindex(shape):
        label = group_of(index, tier, block) if not (tier == "input" and len(shape) == 1) else ()
        assert labels.setdefault(label, full[index].item()) == full[index].item()
    assert len(set(labels.values())) == len(labels) == math.prod(rows)
    parts = tier_parts(full, tier, block)
    assert parts.shape[:-1] == rows and (parts == scales[..., None]).all()


@pytest.mark.parametrize(
    "prior",
    [
        bmr.Gaussian("layer", per="input", block=2),
        bmr.Horseshoe(tiers=("layer", "input"), block=2, slab_scale=None),
    ],
)
def test_blocks_of_inputs_share_the_scale(prior):
    ones = torch.ones(3, 6, dtype=torch.float64)
    site = "w_precision" if isinstance(prior, bmr.Gaussian) else "w_input"
    trace = poutine.trace(
        poutine.condition(lambda: prior.sample("w", (3, 6), ones), data={"w": ones})
    ).get_trace()
    weight, scales = trace.nodes["_RETURN"]["value"], trace.nodes[site]["value"]
    assert scales.shape == (1, 3)
    factor = (
        scales.rsqrt()
        if isinstance(prior, bmr.Gaussian)
        else trace.nodes["w_tau"]["value"] * scales
    )
    torch.testing.assert_close(weight * 6**0.5, factor.repeat_interleave(2, 1).expand(3, 6))


@pytest.mark.parametrize("tier, block", GROUPS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_m_step_per_group_is_the_best_scale_of_each_group(tier, block, masked):
    """No other scale of a group has a smaller KL from the same posterior; a group without a
    survivor keeps its scale.
    """
    prior = bmr.Gaussian(mean=0.15, per=tier, block=block)
    mean, var = (
        torch.randn(KERNEL, dtype=torch.float64),
        torch.rand(KERNEL, dtype=torch.float64) + 0.02,
    )
    mask = torch.rand(KERNEL) < 0.6 if masked else None
    if masked and tier != "layer":
        mask[:3], mask[:, :2] = False, False
    handler = EmpiricalScales()
    handler.update("w", prior, mean, var, mask)
    kept = torch.ones(KERNEL, dtype=torch.bool) if mask is None else mask

    def kl(scales):
        terms = torch.distributions.kl_divergence(
            dist.Normal(mean, var.sqrt()),
            dist.Normal(0.15, spread(scales, tier, block).expand(KERNEL)),
        )
        return tier_parts(terms.where(kept, 0), tier, block).sum(-1)

    best, empty = handler.scales["w"], tier_parts(kept, tier, block).sum(-1) == 0
    assert empty.any() == (masked and tier != "layer") and (best[empty] == 1).all()
    assert ((kl(best) < kl(best * 0.99)) & (kl(best) < kl(best * 1.01)) | empty).all()

    def program():
        return prior.sample("w", KERNEL, mean)

    site = poutine.trace(handler(program)).get_trace().nodes["w"]["fn"].base_dist
    assert (
        torch.equal(site.scale, spread(best, tier, block).expand(KERNEL))
        and (site.loc == 0.15).all()
    )


def test_the_m_step_around_a_pretrained_network():
    prior, start = bmr.Gaussian(mean="init"), torch.randn(3, 4, dtype=torch.float64)
    handler = EmpiricalScales()
    handler(lambda: prior.sample("w", (3, 4), start))()
    mean = start + 0.3
    handler.update("w", prior, mean, torch.full_like(mean, 0.07), None)
    assert handler.scales["w"].item() == pytest.approx(math.sqrt(0.09 + 0.07), abs=1e-12)


def test_a_fit_stays_near_a_pretrained_network_where_the_data_are_silent():
    """The second input is always 0, so its weights have the prior as their posterior."""
    net = nn.Linear(2, 2, bias=False)
    pretrained = torch.tensor([[0.4, -0.7], [0.1, 0.9]])
    with torch.no_grad():
        net.weight.copy_(pretrained)
    x = torch.randn(80, 2) * torch.tensor([1.0, 0.0])
    y = (x[:, 0] > 0).long()
    fit = bmr.fit(
        bmr.BayesianNetwork(net, bmr.Gaussian(0.2, mean="init"), bmr.Categorical()),
        (x, y),
        epochs=200,
        optimizer=bmr.adam(0.05),
        progress=False,
    )
    site = fit.posterior["weight"]
    torch.testing.assert_close(site.prior.mean, pretrained)
    torch.testing.assert_close(site.mean[:, 1], pretrained[:, 1], atol=0.02, rtol=0)
    torch.testing.assert_close(site.var[:, 1].sqrt(), torch.full((2,), 0.2), atol=0.02, rtol=0)
    assert site.mean[1, 0] - site.mean[0, 0] > 0.3


def posterior_of(prior, **sites):
    return bmr.Posterior(
        {
            "w": Site(
                sites.pop("mean"), sites.pop("var"), declared=prior, mask=sites.pop("mask", None)
            ),
            **sites,
        }
    )


def test_a_horseshoe_decides_by_the_evidence_given_its_scales():
    """Per weight the point spike's ΔF under N(0, 1) and 0.02 nats; without scales per weight the
    sum over the kept entries of a unit or input. Those that cost little go as well.
    """
    mean = torch.tensor([[0.1, 2.5, -0.2], [0.3, 2.9, 0.1], [0.0, 0.6, -2.9], [0.0, 2.8, 0.0]])
    var = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.2, 1.1], [0.0, 0.6, 0.6], [0.0, 0.1, 0.0]])
    mask = var > 0
    site = bmr.formulas.Diagonal(mean[mask], var[mask].clamp(max=1))
    gain = torch.full((4, 3), torch.inf).masked_scatter(
        mask, bmr.delta_f(site, bmr.Gaussian(1.0), bmr.Gaussian(0.0)) + 0.02
    )

    def drop(prior, mean, var, mask=None):
        return (
            bmr.reduce(posterior_of(prior, mean=mean, var=var, mask=mask), to=None)
            .sites["w"]
            .drop_log_odds
        )

    by_weight = drop(bmr.Horseshoe(tiers=("unit", "weight")), mean, var, mask)
    torch.testing.assert_close(by_weight.flatten(), torch.tensor(windowed(gain.flatten(), 12)))
    assert (gain <= 0)[2].tolist() == [False, True, True]
    assert (by_weight <= 0).tolist() == [
        [False, True, False],
        [False, True, False],
        [False, False, True],
        [False, True, False],
    ]
    by_unit = drop(bmr.Horseshoe(tiers=("layer", "unit")), mean, var, mask)
    units = torch.tensor(windowed(gain.where(mask, 0).sum(1), 4))
    torch.testing.assert_close(by_unit[mask], units[:, None].expand(4, 3)[mask])
    both = drop(bmr.Horseshoe(tiers=("unit", "input")), mean[:2], var[:2])
    units, inputs = (torch.tensor(windowed(gain[:2].sum(k), n)) for k, n in ((1, 2), (0, 3)))
    torch.testing.assert_close(both, torch.maximum(units[:, None], inputs))
    in_pairs = drop(bmr.Horseshoe(tiers=("input",), block=2), mean[:2, :2], var[:2, :2])
    torch.testing.assert_close(in_pairs, gain[:2, :2].sum().expand(2, 2))


def test_a_relaxed_indicator_decides_for_its_group():
    slab = Site(
        torch.tensor([[1.2], [-0.4]]), torch.tensor(0.3).expand(2, 1), support="unit_interval"
    )
    prior = bmr.SpikeAndSlab(temperature=0.5, per="unit", block=2)
    reduction = bmr.reduce(
        posterior_of(prior, mean=torch.ones(4, 3), var=torch.ones(4, 3), w_slab=slab), to=None
    )
    torch.testing.assert_close(
        reduction.sites["w"].drop_log_odds,
        torch.tensor([-1.2, -1.2, 0.4, 0.4])[:, None].expand(4, 3),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_prior_without_a_decision_keeps_all():
    assert (
        bmr.reduce(
            posterior_of(bmr.Laplace(), mean=torch.zeros(3), var=torch.ones(3)), to=None
        ).kept
        == 1.0
    )


def test_groups_come_back_from_disk(tmp_path):
    priors = {
        "a": bmr.Gaussian(0.3, mean=torch.tensor([0.1, -0.2, 0.4])),
        "b": bmr.Horseshoe.tiered(weights=True),
        "c": bmr.SpikeAndSlab(temperature=0.4, per="unit"),
        "d": bmr.Gaussian("layer", per="input", mean=0),
        "e": bmr.StudentT(3.0),
        "f": bmr.Gaussian(mean="init", per="unit"),
    }

    def program(x, y=None):
        weights = [prior.sample(name, (2, 3), x.new_ones(2, 3)) for name, prior in priors.items()]
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal((x @ sum(weights).T).sum(1), 1.0), obs=y)

    x = torch.randn(5, 3)
    posterior = bmr.Posterior.from_guide(bmr.MeanField(program, x, x[:, 0]), program, x, x[:, 0])
    posterior.save(tmp_path / "p.safetensors")
    loaded = bmr.Posterior.load(tmp_path / "p.safetensors")
    assert {name: loaded[name].declared for name in priors} == priors
    torch.testing.assert_close(loaded["a"].prior.mean, priors["a"].mean.expand(2, 3))


@pytest.mark.slow
def test_large_sites_start_near_the_median_without_the_memory_of_a_thousand_draws():
    prior = bmr.Gaussian("layer", per="weight")

    def program(x, y=None):
        w = prior.sample("w", (200, 300), x.new_zeros(200, 300))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal((x @ w.T).sum(1), 1.0), obs=y)

    x = torch.randn(2, 300)
    guide = bmr.MeanField(program, x, x[:, 0])
    starts = guide.views(guide.loc.detach())["w_precision"]
    assert starts.mean().item() == pytest.approx(
        math.log(stats.gamma(2, scale=0.5).median()), abs=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mean, std",
    [(0.3, 1.7), *(pytest.param(*q, marks=pytest.mark.slow) for q in ((-3.2, 0.4), (4.1, 0.9)))],
)
def test_the_scale_of_a_pruned_weight_returns_to_its_prior(mean, std):
    """The log odds are ΔF given the scales and the divergence of λ, or of both its Gammas, which
    quadrature over the densities of scipy gives.
    """

    def divergence(prior, m, s):
        q = stats.lognorm(s, scale=math.exp(m))

        def integrand(u):  # u = log λ
            value = math.exp(u)
            return stats.norm(m, s).pdf(u) * (q.logpdf(value) - prior.logpdf(value))

        return integrate.quad(integrand, m - 12 * s, m + 12 * s, limit=200)[0]

    def odds(prior, shape, **scales):
        sites = {
            name: Site(
                torch.full(shape, m).double(), torch.full(shape, s**2).double(), support="positive"
            )
            for name, (m, s) in scales.items()
        }
        w = Site(torch.full((2, 3), 2.7).double(), torch.full((2, 3), 0.3).double(), declared=prior)
        reduction = bmr.reduce(bmr.Posterior({"w": w, **sites}), to=None)
        return reduction.sites["w"].drop_log_odds

    given = -0.5 * math.log(0.3) - 0.5 * 2.7**2 / 0.3 + 0.02
    own = divergence(stats.halfcauchy, mean, std)
    direct = odds(bmr.Horseshoe(), (2, 3), w_lambda=(mean, std), w_tau=(0.4, 0.2))
    torch.testing.assert_close(direct, torch.full((2, 3), given + own).double(), rtol=1e-4, atol=0)
    per_unit = odds(bmr.Horseshoe(tiers=("layer", "unit")), (2, 1), w_unit=(mean, std))
    expected = torch.full((2, 3), 3 * given + own).double()
    torch.testing.assert_close(per_unit, expected, rtol=1e-4, atol=0)
    gamma = bmr.Horseshoe(parametrization="gamma")
    pair = {"w_lambda_numerator": (mean / 4, std), "w_lambda_denominator": (-0.8, 0.6)}
    own = sum(divergence(stats.gamma(0.5), m, s) for m, s in pair.values())
    expected = torch.full((2, 3), given + own).double()
    torch.testing.assert_close(odds(gamma, (2, 3), **pair), expected, rtol=1e-4, atol=0)
