"""The conditional of a weight given its scales, against Bayes' rule on a grid and the exact
marginal likelihood; what the coupling gains over mean field.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.guides.scale_coupled import conditional, multiplier
from pyro_bmr.guides.site_normal import gaussian_kl

NOISE = 0.7
X = torch.randn(12, 1, dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    "factor, estimate, precision",
    [(0.3, 1.4, 6.0), (2.5, -0.8, 0.4), (-0.9, 0.5, 20.0), (1e-4, 2.0, 9.0)],
)
def test_the_conditional_is_bayes_rule(factor, estimate, precision):
    w = np.linspace(-12, 12, 200_001)
    density = np.exp(-0.5 * w**2 - 0.5 * precision * (factor * w - estimate) ** 2)
    mass, mean, square = ((w**k * density).sum() for k in range(3))
    q = conditional(number([precision * estimate]), number([precision]), number([factor]), None)
    assert float(q.mean) == pytest.approx(mean / mass, rel=1e-6, abs=1e-9)
    assert float(q.var) == pytest.approx(square / mass - (mean / mass) ** 2, rel=1e-6)


def test_with_the_message_of_the_data_the_bound_is_the_exact_evidence_at_every_scale():
    """y = x w + N(0, 0.7²): L = Σx²/0.49, m = Σxy/Σx². E over ±1 is exact, for the log likelihood
    is quadratic.
    """
    y = 1.3 * X[:, 0] + NOISE * torch.randn(12, dtype=torch.float64)
    precision, h = X.square().sum()[None] / NOISE**2, (X[:, 0] @ y)[None] / NOISE**2
    for scale in (0.02, 0.6, 3.0):
        q = conditional(h, precision, number([scale]), None)
        expected = (
            sum(
                dist.Normal(X[:, 0] * scale * q.draw(number([sign])), NOISE).log_prob(y).sum()
                for sign in (-1.0, 1.0)
            )
            / 2
        )
        cov = NOISE**2 * torch.eye(12).double() + scale**2 * X @ X.mT
        exact = stats.multivariate_normal(torch.zeros(12), cov).logpdf(y)
        assert float(expected - gaussian_kl(q, number(0.0), number(1.0))) == pytest.approx(
            exact, abs=1e-9
        )


@pytest.mark.parametrize(
    "prior",
    [
        bmr.Horseshoe(0.4),
        bmr.Horseshoe(0.4, None, ("layer", "unit")),
        bmr.SpikeAndSlab(),
        bmr.Gaussian("layer"),
    ],
    ids=repr,
)
def test_the_factor_is_what_the_program_multiplies_by(prior):
    model = bmr.BayesianNetwork(nn.Linear(3, 2).double(), {"weight": prior}, bmr.Categorical())
    with pyro.poutine.trace() as trace:
        weights = model.weights()
    values = {name: site["value"] for name, site in trace.trace.nodes.items()}
    factor = multiplier(prior, "weight", values["weight"], values)
    torch.testing.assert_close(factor * values["weight"], weights["weight"])
    guide = bmr.ScaleCoupled(model, torch.randn(4, 3).double(), torch.zeros(4).long())
    assert guide.table().set_index("site")["structure"].to_dict() == {
        name: "given its scales" if name == "weight" else "independent" for name in values
    }


@pytest.mark.parametrize("centred", [False, True], ids=["shifted", "centred"])
def test_a_weight_that_is_no_multiple_of_its_site_by_its_scales_is_left_independent(centred):
    class Own:
        shrinkage = False

        def sample(self, name, shape, init=None):
            scale = pyro.sample(f"{name}_scale", dist.HalfCauchy(number(1.0)))
            fn = (
                dist.Normal(number(0.0), scale if centred else 1.0)
                .expand(shape)
                .to_event(len(shape))
            )
            site = pyro.sample(name, fn, infer={"prior": self, "init": init})
            return site if centred else 0.3 + scale * site

    model = bmr.BayesianNetwork(nn.Linear(3, 2).double(), {"weight": Own()}, bmr.Categorical())
    assert set(
        bmr.ScaleCoupled(model, torch.randn(4, 3).double(), torch.zeros(4).long()).table()[
            "structure"
        ]
    ) == {"independent"}


def regression(x, y=None):
    w = bmr.Horseshoe(0.1).sample("w", (x.shape[1],), torch.zeros(x.shape[1], dtype=x.dtype))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def test_a_posterior_keeps_the_coupling_of_its_guide(tmp_path):
    """A horseshoe whose scales are nearly known: the conditional at their medians in closed form,
    and the weight's moments over the scales from guide and posterior alike.
    """
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = x[:, 2]
    guide = bmr.ScaleCoupled(regression, x, y)
    h, precision = number([3.0, -40.0, 90.0]), number([2.0, 50.0, 60.0])
    (site,) = (m for m in guide.modules() if hasattr(m, "estimate"))
    with torch.no_grad():
        site.estimate.copy_(h / precision)
        site.log_precision.copy_(precision.log())
    bmr.Posterior.from_guide(guide, regression, x, y).save(tmp_path / "p.safetensors")
    posterior = bmr.Posterior.load(tmp_path / "p.safetensors")

    def weights(values):
        return multiplier(bmr.Horseshoe(0.1), "w", values["w"], values) * values["w"]

    point = posterior.point()
    scale = weights({**point, "w": torch.ones(3, dtype=torch.float64)})
    kappa = 1 / (1 + scale**2 * precision)
    torch.testing.assert_close(posterior["w"].var, kappa)
    torch.testing.assert_close(weights(point), scale**2 * h * kappa)
    with torch.no_grad():
        drawn = [
            torch.stack([weights(draw()) for _ in range(60)])
            for draw in (posterior.draw, lambda: guide(x, y))
        ]
    mean, other = (d.mean(0) for d in drawn)
    error = (sum(d.var(0) for d in drawn) / 60).sqrt()
    assert ((mean - other).abs() < 4 * error).all()
    assert ((drawn[0].std(0) / drawn[1].std(0)).log().abs() < 4 * 60**-0.5).all()


@pytest.mark.slow
def test_the_coupling_raises_the_bound_and_a_posterior_keeps_it(tmp_path):
    """A horseshoe regression, one coefficient of eight at work: nats gained over mean field, and
    the coefficient's spread from guide and posterior alike.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    y = 1.5 * x[:, 2] + NOISE * torch.randn(40, generator=generator, dtype=torch.float64)
    bounds, guides = {}, {}
    for guide in (bmr.MeanField, bmr.ScaleCoupled):
        q = guides[guide] = guide(regression, x, y)
        optimizer = torch.optim.Adam(q.parameters(), lr=0.1)
        for _ in range(220):
            terms = bmr.fitting.elbo_terms(regression, q, x, y)
            optimizer.zero_grad()
            (terms.kl - terms.expected_log_likelihood).backward()
            optimizer.step()
        with torch.no_grad():
            bounds[guide] = torch.stack(
                [
                    t.expected_log_likelihood - t.kl
                    for t in (bmr.fitting.elbo_terms(regression, q, x, y) for _ in range(80))
                ]
            ).mean()
    assert bounds[bmr.ScaleCoupled] > bounds[bmr.MeanField] + 1
    posterior = bmr.Posterior.from_guide(guides[bmr.ScaleCoupled], regression, x, y)
    posterior.save(tmp_path / "p.safetensors")
    posterior = bmr.Posterior.load(tmp_path / "p.safetensors")

    def weights(values):
        return multiplier(bmr.Horseshoe(0.1), "w", values["w"], values) * values["w"]

    posterior_draws = torch.stack([weights(posterior.draw()) for _ in range(150)])
    with torch.no_grad():
        guide_draws = torch.stack([weights(guides[bmr.ScaleCoupled](x, y)) for _ in range(150)])
    least_squares = float((torch.linalg.inv(x.mT @ x)[2, 2] * NOISE**2).sqrt())
    for draws in (posterior_draws, guide_draws):
        assert float(draws[:, 2].mean()) == pytest.approx(1.5, abs=0.4)
        # the product of independent factors would be several times as wide
        assert float(draws[:, 2].std()) == pytest.approx(least_squares, rel=0.5)
    point = posterior.point()
    assert float(weights(point)[2]) == pytest.approx(float(posterior_draws[:, 2].mean()), abs=0.1)
    kappa = posterior["w"].var  # given the scales at their medians
    assert kappa[2] < 0.2 and (kappa[torch.arange(8) != 2] > 0.5).all()
    masks = bmr.reduce(posterior, to=None).masks["w"]
    assert masks[2] and int(masks.sum()) <= 3
