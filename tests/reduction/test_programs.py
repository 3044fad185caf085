"""Reductions as Pyro programs: the factor against the exact reduction, SVI on it, and whole priors
by their ratio over NUTS-like draws.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_bmr as bmr
from pyro_bmr.formulas.monte_carlo import log_ratio_delta_f, monte_carlo_delta_f
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.programs import ScaleFlow, log_prior_ratio, reduction_program
from pyro_bmr.reduction.reduced_site import site_reduction


def layer(rows, columns, seed=3, mask=None):
    generator = torch.Generator().manual_seed(seed)
    large = torch.rand(rows, columns, generator=generator) < 0.15
    mean = torch.where(large, 1.0, 0.05).double() * torch.randn(
        rows, columns, generator=generator, dtype=torch.float64
    )
    var = 0.005 + 0.01 * torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    prior = bmr.formulas.Diagonal(*(torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.5)))
    return bmr.Posterior({"w": Site(mean, var, prior, mask=mask)})


def test_the_factor_is_the_gaussian_reduction_at_the_scales():
    """Conditioned on its scales the program's log density is the hyper-priors' plus the ΔF of that
    Gaussian.
    """
    mask = torch.rand(3, 4) < 0.8
    posterior = layer(3, 4, mask=mask)
    program = reduction_program(
        posterior,
        "w",
        bmr.Horseshoe(0.7, tiers=("layer", "unit", "weight"), slab_scale=1.3, slab_df=3.0),
    )
    values = {
        "w_tau": torch.tensor(0.4, dtype=torch.float64),
        "w_unit": torch.rand(3, 1).double() + 0.2,
        "w_lambda": torch.rand(3, 4).double() + 0.1,
        "w_slab_precision": torch.tensor(0.6, dtype=torch.float64),
    }
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace()
    psi = values["w_tau"] * values["w_unit"] * values["w_lambda"]
    var = psi**2 / 0.6 / (1 / 0.6 + psi**2)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], var)
    direct = bmr.reduce(posterior, to={"w": bmr.formulas.Diagonal(torch.zeros(()), var)})
    assert trace.nodes["delta_f"]["fn"].log_factor.item() == pytest.approx(direct.delta_f, abs=1e-9)
    hyper = dist.HalfCauchy(1.0).log_prob(values["w_unit"]).sum() + dist.Gamma(
        1.5, 1.5 * 1.3**2
    ).log_prob(values["w_slab_precision"])
    total = (
        hyper
        + dist.HalfCauchy(0.7).log_prob(values["w_tau"])
        + dist.HalfCauchy(1.0).log_prob(values["w_lambda"]).sum()
    )
    assert trace.log_prob_sum().item() == pytest.approx(total.item() + direct.delta_f, abs=1e-4)


@pytest.mark.slow
def test_a_flow_starts_as_log_normals_and_has_their_median():
    guide = ScaleFlow(reduction_program(layer(2, 3), "w", bmr.Horseshoe()))
    median = guide.median()
    assert median["w_tau"].shape == () and median["w_lambda"].shape == (2, 3)
    torch.testing.assert_close(median["w_lambda"], torch.ones(2, 3).double(), rtol=1e-6, atol=1e-6)
    draws = torch.stack([guide()["w_tau"] for _ in range(200)]).log()
    assert draws.mean().item() == pytest.approx(
        0, abs=4 * math.exp(0.4) / 14
    ) and draws.std().item() == pytest.approx(math.exp(0.4), rel=0.2)


def test_what_programs_refuse():
    with pytest.raises(bmr.errors.ReductionError, match="site 'w'.*no sample_scale"):
        reduction_program(layer(2, 3), "w", bmr.Laplace(0.5))
    shifted = bmr.Posterior(
        {
            "w": Site(
                torch.ones(2),
                torch.ones(2),
                bmr.formulas.Diagonal(torch.tensor(0.5), torch.tensor(2.0)),
            )
        }
    )
    with pytest.raises(bmr.errors.ReductionError, match="site 'w'.*mean 0"):
        reduction_program(shifted, "w", bmr.Horseshoe())
    with pytest.raises(bmr.errors.ModelError, match="site 'w'.*positive"):
        ScaleFlow(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))


def test_the_ratio_of_two_programs_is_that_of_their_priors():
    """A hierarchical prior: the ratio of the programs over draws is the sum of the ratios of its
    sites; observed sites cancel.
    """
    x = torch.randn(6)

    def program(scale, x):
        s = pyro.sample("s", dist.Gamma(2.0, scale))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), s).to_event(1))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(w.sum(), 0.3), obs=x)

    generator = torch.Generator().manual_seed(1)
    draws = {
        "s": 0.5 + torch.rand(40, generator=generator),
        "w": torch.randn(40, 3, generator=generator),
    }
    ratio = log_prior_ratio(draws, lambda x: program(1.5, x), lambda x: program(0.6, x), x)
    torch.testing.assert_close(
        ratio, dist.Gamma(2.0, 0.6).log_prob(draws["s"]) - dist.Gamma(2.0, 1.5).log_prob(draws["s"])
    )
    direct = monte_carlo_delta_f(
        {"s": draws["s"]}, {"s": dist.Gamma(2.0, 1.5)}, {"s": dist.Gamma(2.0, 0.6)}
    )
    assert log_ratio_delta_f(ratio).delta_f == pytest.approx(direct.delta_f, abs=1e-5)
    with pytest.raises(bmr.errors.ReductionError, match="site 's': no draws"):
        log_prior_ratio({"w": draws["w"]}, lambda x: program(1.5, x), lambda x: program(0.6, x), x)


@pytest.mark.slow
def test_svi_finds_the_tau_of_the_exact_reduction():
    """τ and λ fitted by SVI on Σ ΔF against τ by quadrature; 1,000 weights, 1,500 steps."""
    posterior = layer(50, 20)
    exact = site_reduction(posterior, "w", bmr.Horseshoe(slab_scale=None))
    program = reduction_program(posterior, "w", bmr.Horseshoe(slab_scale=None))
    guide = ScaleFlow(program)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / 1500))
    for _ in range(1500):
        optimizer.zero_grad()
        Trace_ELBO().differentiable_loss(program, guide).backward()
        optimizer.step()
        schedule.step()
    assert guide.median()["w_tau"].item() == pytest.approx(exact.scale, rel=0.05)
