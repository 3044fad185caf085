"""A number fitted on held-out rows: what it is, and what it leaves alone."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.experiments.methods import method_named
from pyro_bmr.experiments.models import load_model
from pyro_bmr.posteriors.site import Site
from pyro_bmr.prediction.predictive import prediction_of

NOISE = 0.3
PRIOR = bmr.Gaussian(1.0)


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def test_the_temperature_is_the_best_of_a_grid():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 5, generator=generator)
    y = torch.distributions.Categorical(logits=logits / 2.7).sample()
    grid = torch.linspace(0.5, 6, 2001)
    losses = torch.stack([F.cross_entropy(logits / t, y) for t in grid])
    assert bmr.prediction.best_temperature(logits, y) == pytest.approx(
        float(grid[losses.argmin()]), abs=4e-3
    )


def test_the_temperature_of_averaged_probabilities():
    """Powers of the mean of two draws by hand, and the parts of the entropy."""
    draws = torch.tensor(
        [
            [[0.6, 0.3, 0.1], [0.2, 0.8, 0.0], [1.0, 0.0, 0.0]],
            [[0.1, 0.7, 0.2], [0.4, 0.6, 0.0], [1.0, 0.0, 0.0]],
        ],
        dtype=torch.float64,
    )
    before = prediction_of([(draws,)], 2)
    for temperature in (0.4, 2.5):
        after = bmr.prediction.temperature_scaled(before, temperature)
        powers = [
            [p ** (1 / temperature) for p in row]
            for row in ([0.35, 0.5, 0.15], [0.3, 0.7, 0.0], [1.0, 0.0, 0.0])
        ]
        expected = torch.tensor([[p / sum(row) for p in row] for row in powers]).double()
        torch.testing.assert_close(after.probs, expected, atol=1e-7, rtol=1e-6)
        total = -sum(p * math.log(p) for p in expected[0].tolist())
        assert float(after.aleatoric[0] + after.epistemic[0]) == pytest.approx(total, rel=1e-6)
        shares = before.epistemic / before.aleatoric
        torch.testing.assert_close((after.epistemic / after.aleatoric)[:2], shares[:2])
        assert float(shares[0]) > 0.05 and float(after.aleatoric[2] + after.epistemic[2]) == 0
    same = bmr.prediction.temperature_scaled(before, 1.0)
    torch.testing.assert_close(same.probs, before.probs)
    for wrong in (0.0, -1.0, math.inf, math.nan, True, "2"):
        with pytest.raises(bmr.errors.ModelError, match="temperature=.*expected a finite number"):
            bmr.prediction.temperature_scaled(before, wrong)
    real = bmr.prediction.RealPrediction(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(bmr.errors.ModelError, match="a ClassPrediction, got RealPrediction"):
        bmr.prediction.temperature_scaled(real, 2.0)


@pytest.mark.slow
def test_the_widening_is_the_best_of_a_grid_by_the_exact_predictive():
    """The predictive of a line is Normal(xμ, c Σ x²σ² + noise²): held-out rows whose weights vary 7
    times as much as the posterior says.
    """
    generator = torch.Generator().manual_seed(1)
    mean, var = torch.tensor([0.7, -1.1]).double(), torch.tensor([0.02, 0.05]).double()
    x = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(1500, 3, generator=generator, dtype=torch.float64)
    y = (x * (mean + (7 * var).sqrt() * noise[:, :2])).sum(1) + NOISE * noise[:, 2]
    posterior = bmr.Posterior.from_moments({"w": mean}, {"w": var}, PRIOR)
    factors = torch.logspace(-1, 1.6, 400).double()
    spread = (factors[:, None] * (x.square() @ var) + NOISE**2).sqrt()
    losses = -torch.distributions.Normal(x @ mean, spread).log_prob(y).mean(1)
    best = float(factors[losses.argmin()])
    assert 5 < best < 9
    assert bmr.prediction.best_widening(line, posterior, (x, y), draws=300) == pytest.approx(
        best, rel=0.12
    )
    # the end of the range
    assert bmr.prediction.best_widening(line, posterior, (x, y), most=2.0) == pytest.approx(
        2.0, rel=0.06
    )


def covariance_of_draws(posterior, count=400):
    generator = torch.Generator().manual_seed(4)
    return torch.stack([posterior.draw(generator)["w"].flatten() for _ in range(count)]).T.cov()


@pytest.mark.parametrize(
    "joint",
    [
        None,
        bmr.formulas.Dense(
            torch.zeros(2).double(), torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
        ),
        bmr.formulas.LowRank(
            torch.zeros(2).double(),
            torch.tensor([1.0, 0.5]).double(),
            torch.tensor([[1.0], [0.6]]).double(),
        ),
        bmr.formulas.MatrixNormal(
            torch.zeros(1, 2).double(),
            torch.tensor([[2.0]]).double(),
            torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double(),
        ),
    ],
    ids=["independent", "dense", "low rank", "matrix normal"],
)
def test_widened_draws_have_so_many_times_the_covariance(joint):
    site = Site(torch.zeros(2).double(), torch.tensor([2.0, 0.86]).double(), joint=joint)
    before = bmr.Posterior({"w": site})
    assert torch.allclose(
        covariance_of_draws(before.widened(2.3)), 2.3 * covariance_of_draws(before), atol=1e-9
    )
    assert torch.equal(before.widened(2.3)["w"].var, 2.3 * site.var)


def test_what_is_widened_and_what_is_not():
    mask = torch.tensor([True, False])
    posterior = bmr.Posterior.from_moments(
        {"w": torch.ones(2), "scale": torch.zeros(1)},
        {"w": torch.ones(2), "scale": torch.full((1,), 0.25)},
        {"w": PRIOR},
        supports={"scale": "positive"},
    ).masked({"w": mask})
    wide = posterior.widened(5)
    assert (
        wide["w"].var.tolist() == [5.0, 0.0]
        and wide["scale"].var.tolist() == [0.25]
        and torch.equal(wide["w"].mean, posterior["w"].mean)
    )
    assert posterior.widened(0)["w"].var.tolist() == [0.0, 0.0]
    for wrong in (-1.0, math.inf, math.nan, "2"):
        with pytest.raises(bmr.errors.ModelError, match=r"widened: expected a finite number >= 0"):
            posterior.widened(wrong)


def test_a_site_whose_draws_follow_its_scales_is_refused():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20)
    program = bmr.BayesianNetwork(torch.nn.Linear(3, 1), bmr.Horseshoe(), bmr.Normal())
    posterior = bmr.fit(program, (x, y), guide=bmr.ScaleCoupled, epochs=2, progress=False).posterior
    with pytest.raises(bmr.errors.ModelError, match="ScaleCoupled"):
        posterior.widened(2.0)


@pytest.mark.slow
def test_options_of_a_study():
    data, build = bmr.load("digits"), load_model("mlp:12")
    options = {"epochs": 6, "optimizer": "adam", "learning_rate": 2e-2, "temperature": 0.02}
    options["kept"] = 0.5

    def trained(**more):
        return method_named("reduced")(build, data, 3, options | more, False)

    plain, fixed, found = trained(), trained(widen=9.0), trained(calibrate=True)
    entropies = [
        float(torch.special.entr(result.predict(data.x_test).probs).sum(1).mean())
        for result in (plain, fixed)
    ]
    assert (
        entropies[1] > entropies[0] + 0.01
        and "widen" not in plain.extra
        and fixed.extra == {"widen": 9.0}
    )
    # the network itself does not change
    assert all(torch.equal(w, fixed.weights[name]) for name, w in plain.weights.items())
    # fitted on fewer rows
    assert found.extra["widen"] != 1 and not torch.equal(
        found.weights["1.weight"], plain.weights["1.weight"]
    )
    with pytest.raises(
        bmr.errors.ModelError, match=r"widen: expected .*not calibrate as well, got 9\.0"
    ):
        trained(widen=9.0, calibrate=True)
    with pytest.raises(bmr.errors.ModelError, match="expected a route with variances, got map"):
        method_named("map")(build, data, 3, {"epochs": 2, "calibrate": True}, False)


@pytest.mark.parametrize("name", ["magnitude", "sparse-variational-dropout"])
def test_a_temperature_known_beforehand(name):
    data, build = bmr.load("digits"), load_model("mlp:12")
    plain, fixed, found = (
        method_named(name)(
            build, data, 3, {"epochs": 5, "learning_rate": 2e-2, "kept": 0.9, **more}, False
        )
        for more in ({}, {"scale": 1.7}, {"calibrate": True})
    )
    assert [result.extra["scale"] for result in (plain, fixed)] == [1.0, 1.7] and found.extra[
        "scale"
    ] != 1
    logits = plain.predict(data.x_test).probs.log()
    torch.testing.assert_close(
        fixed.predict(data.x_test).probs, (logits / 1.7).softmax(1), atol=1e-5, rtol=1e-4
    )
