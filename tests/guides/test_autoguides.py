"""Pyro's autoguides read as moments, against the moments of their own draws and, after a fit, the
exact posterior.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)

import pyro_bmr as bmr
from tests.exact import linear_gaussian
from tests.parameters import others_slow

NOISE = 0.7
MODEL = linear_gaussian(seed=4, n=30, d=3, noise=NOISE)
X, Y = torch.tensor(MODEL.x), torch.tensor(MODEL.y)
STRUCTURED = {
    "conditionals": {"scale": "normal", "w": "mvn", "v": "normal"},
    "dependencies": {"w": {"scale": "linear"}, "v": {"w": "linear", "scale": "linear"}},
}
GUIDES = {
    "diagonal": AutoDiagonalNormal,
    "full": AutoMultivariateNormal,
    "low rank": lambda program: AutoLowRankMultivariateNormal(program, rank=2),
    "structured": lambda program: AutoStructured(program, **STRUCTURED),
    "gaussian": AutoGaussian,
    "list": lambda program: listed(
        program, {"scale": AutoNormal, "w": AutoMultivariateNormal, "v": AutoDiagonalNormal}
    ),
}


def listed(program, members, of=None):
    guide = AutoGuideList(program)
    for name, kind in members.items():
        guide.append(kind(poutine.block(of or program, expose=[name])))
    return guide


def hierarchical(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.2), 0.5))
    w = pyro.sample("w", dist.Normal(x.new_tensor(0.3), scale).expand([3]).to_event(1))
    with pyro.plate("pairs", 2):
        v = pyro.sample("v", dist.Normal(x.new_tensor(-0.4), 1.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w + v.sum(), NOISE), obs=y)


def conjugate(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.full((3,), 0.4, dtype=x.dtype), 1.3).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


@pytest.mark.parametrize("name", others_slow(GUIDES, "diagonal", "low rank", "gaussian"))
def test_the_moments_are_those_of_the_guides_draws(name):
    guide = GUIDES[name](hierarchical)
    # they know the default dtype alone
    batch = (X.float(), Y.float()) if name in ("structured", "gaussian") else (X, Y)
    guide(*batch)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
        posterior = bmr.Posterior.from_guide(guide, hierarchical, *batch)
        draws = [guide(*batch) for _ in range(150)]
    assert (
        posterior["scale"].support == "positive"
        and posterior["w"].support == "real"
        and posterior["w"].given == ("scale",)
    )
    for site in ("scale", "w", "v"):
        z = torch.stack([d[site].log() if site == "scale" else d[site] for d in draws]).view(
            len(draws), -1
        )
        mean, joint = posterior[site].mean.flatten(), posterior[site].joint
        products = torch.einsum("ni,nj->nij", z - mean, z - mean)
        cov = posterior[site].var.flatten().diag()
        if joint is not None:
            cov = (
                joint.cov
                if isinstance(joint, bmr.formulas.Dense)
                else joint.var.diag() + joint.factor @ joint.factor.mT
            )
            torch.testing.assert_close(cov.diagonal(), posterior[site].var.flatten())
        assert ((z.mean(0) - mean).abs() < 5 * z.std(0) / 150**0.5).all()
        assert ((products.mean(0) - cov).abs() < 5 * products.std(0) / 150**0.5).all()
    assert (posterior["w"].joint is None) == (name == "diagonal")


def test_the_members_of_a_list_are_read_one_by_one_points_and_lists_in_it_included():
    def inner(program):
        return listed(hierarchical, {"w": AutoMultivariateNormal, "v": AutoDelta}, of=program)

    guide = AutoGuideList(hierarchical)
    guide.append(AutoDelta(poutine.block(hierarchical, expose=["scale"])))
    guide.append(inner(hierarchical))
    first = bmr.Posterior.from_guide(guide, hierarchical, X, Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3
    posterior = bmr.Posterior.from_guide(guide, hierarchical, X, Y)
    assert (
        not posterior["scale"].var.any()
        and not posterior["v"].var.any()
        and posterior["scale"].support == "positive"
    )
    torch.testing.assert_close(posterior["v"].mean, first["v"].mean + 0.3)
    torch.testing.assert_close(posterior["scale"].mean, first["scale"].mean + 0.3)
    q = guide[1][0].get_posterior()
    torch.testing.assert_close(posterior["w"].mean, q.mean.detach())
    torch.testing.assert_close(posterior["w"].joint.cov, q.covariance_matrix.detach())
    with pytest.raises(bmr.errors.ModelError, match="site 'w': the posterior of AutoIAFNormal"):
        bmr.Posterior.from_guide(
            listed(hierarchical, {"scale": AutoNormal, "w": AutoIAFNormal, "v": AutoDelta}),
            hierarchical,
            X.float(),
            Y.float(),
        )


def test_a_laplace_approximation_is_a_point_in_the_fit_and_exact_after_its_second_stage():
    fit = bmr.fit(
        conjugate,
        (X, Y),
        guide=AutoLaplaceApproximation,
        epochs=200,
        batch_size=30,
        optimizer=bmr.adam(0.1),
        progress=False,
    )
    mean, cov = MODEL.posterior(np.full(3, 0.4), 1.3**2 * np.eye(3))
    assert not fit.posterior["w"].var.any()
    site = bmr.Posterior.from_guide(fit.guide.laplace_approximation(X, Y), conjugate, X, Y)["w"]
    np.testing.assert_allclose(site.mean, mean, atol=1e-3)
    np.testing.assert_allclose(site.joint.cov, cov, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(site.var, np.diag(cov), rtol=1e-6)


@pytest.mark.parametrize(
    "guide",
    [
        AutoMultivariateNormal,
        lambda program: AutoLowRankMultivariateNormal(program, rank=2),
        AutoDiagonalNormal,
        AutoStructured,
    ],
)
def test_fit_takes_them(guide):
    fit = bmr.fit(conjugate, (X, Y), guide=guide, epochs=3, progress=False)
    assert fit.posterior["w"].var.min() > 0 and np.isfinite(fit.history["elbo"]).all()


@pytest.mark.parametrize(
    "guide, words",
    [
        (AutoIAFNormal, "site 'w'.*AutoIAFNormal.*TransformedDistribution"),
        (
            lambda program: AutoNormalizingFlow(program, lambda n: dist.transforms.planar(n)),
            "site 'w'.*AutoNormalizingFlow",
        ),
        (
            lambda program: AutoStructured(
                program, conditionals={"w": lambda: torch.randn(3)}, dependencies={}
            ),
            "site 'w'.*nothing that the guide draws by",
        ),
    ],
    ids=["IAF", "flow", "own conditional"],
)
def test_those_that_are_not_gaussian_are_refused_by_name(guide, words):
    with pytest.raises(bmr.errors.ModelError, match=words):
        bmr.Posterior.from_guide(guide(conjugate), conjugate, X.float(), Y.float())
