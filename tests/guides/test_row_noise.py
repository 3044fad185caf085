"""Noise per row: the distribution of each row's output, the gradient's expectation, uses that are
not linear maps, and uses that are refused.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.guides.row_noise import RowNoise

ROWS = 5
LINEAR = torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
PLACES = torch.randn(ROWS, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


@pytest.fixture(autouse=True)
def seeded():
    """The same draws whatever ran before."""
    torch.manual_seed(7)


def weight(*shape, estimator="local", seed=1):
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return RowNoise(mean, std.abs() + 0.2, ROWS, estimator)


def plain(w):
    return RowNoise(w.q_mean, w.q_std, ROWS, w.estimator, w.factor).draw()


MAPS = {
    "linear": (LINEAR, (3, 4), lambda x, w: F.linear(x, w)),
    "scaled": (
        LINEAR,
        (3, 4),
        lambda x, w: F.linear(x, 0.7 * w * torch.tensor([1.3, -0.4, 0.9, 2.0]).double() / 1.9),
    ),
    "x @ W": (LINEAR, (4, 3), lambda x, w: x @ w),
    "x @ w": (LINEAR, (4,), lambda x, w: (x @ (w * 0.4))[:, None]),
    "tokens": (PLACES, (3, 6), lambda x, w: F.linear(x, 1.7 * w)),
    "convolution": (PLACES, (3, 2, 3), lambda x, w: F.conv1d(x, w, stride=2, padding=1)),
    "grouped": (PLACES, (4, 1, 3), lambda x, w: F.conv1d(x, w, groups=2)),
}


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("name", MAPS)
def test_each_row_has_the_mean_and_covariance_of_a_weight_drawn_for_it(name, estimator):
    """All outputs of one row together, against A m and A S² Aᵀ with A the Jacobian of the map;
    within 5 standard errors.
    """
    x, shape, use = MAPS[name]
    w = weight(*shape)
    jacobian = (
        torch.autograd.functional.jacobian(lambda w: use(x, w), w.q_mean)
        .flatten(1, -1 - w.ndim)
        .flatten(2)
    )
    mean = use(x, w.q_mean).flatten(1)
    covariance = jacobian @ w.q_std.flatten().square().diag() @ jacobian.mT
    draws = torch.stack(
        [use(x, weight(*shape, estimator=estimator)).flatten(1) for _ in range(300)]
    )
    deviation = draws - mean
    for got, expected in (
        (deviation, torch.zeros_like(mean)),
        (torch.einsum("dri,drj->drij", deviation, deviation), covariance),
    ):
        assert ((got.mean(0) - expected).abs() < 5 * got.std(0) / len(got) ** 0.5 + 1e-9).all()


def test_other_uses_get_one_ordinary_draw():
    x = LINEAR[:1].expand(ROWS, 4)
    out = x @ torch.tanh(weight(3, 4)).mT
    assert (
        type(out) is torch.Tensor
        and torch.equal(out, out[:1].expand_as(out))
        and not torch.allclose(out[0], x[0] @ torch.tanh(weight(3, 4)).mT)
    )
    # not the rows of the batch
    short = F.linear(LINEAR[:3], weight(1, 4)) - F.linear(LINEAR[:3], weight(1, 4).q_mean)
    assert torch.linalg.matrix_rank(torch.cat([short, LINEAR[:3]], 1)) <= 4


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_rows_are_independent_where_a_drawn_weight_makes_them_covary(estimator):
    x = LINEAR[:1].expand(ROWS, 4)
    out = torch.stack([F.linear(x, weight(1, 4, estimator=estimator))[:, 0] for _ in range(600)])
    correlation = torch.corrcoef(out.mT)[0, 1]
    assert abs(correlation) < 0.2
    assert (
        torch.corrcoef(torch.stack([F.linear(x, plain(weight(1, 4)))[:, 0] for _ in range(50)]).mT)[
            0, 1
        ]
        > 0.99
    )


def network(prior):
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 1)
    ).double()
    return bmr.BayesianNetwork(net, prior, bmr.Normal())


@pytest.mark.slow
@pytest.mark.parametrize(
    "prior",
    [bmr.Gaussian("layer"), bmr.SpikeAndSlab()],
    ids=["layer", "mixture"],
)
def test_scaled_sites_and_sampled_kls_go_through(prior):
    program, y = network(prior), torch.randn(ROWS, dtype=torch.float64)
    guide = bmr.MeanField(program, PLACES, y, estimator="local")
    whole = bmr.MeanField(program, PLACES, y)
    totals = [
        torch.stack(
            [torch.stack(bmr.fitting.elbo_terms(program, g, PLACES, y)).detach() for _ in range(30)]
        )
        for g in (guide, whole)
    ]
    error = sum(t.var(0) / len(t) for t in totals).sqrt()
    assert ((totals[0].mean(0) - totals[1].mean(0)).abs() < 4.5 * error).all()


@pytest.mark.slow
def test_the_bound_and_its_gradient_are_the_same_in_expectation_and_masks_hold():
    program, y = network(bmr.Gaussian(0.6)), torch.randn(ROWS, dtype=torch.float64)
    guides = {
        e: bmr.MeanField(program, PLACES, y, estimator=e) for e in ("weight", "local", "flipout")
    }
    masks = {
        "0.weight": torch.rand(3, 2, 3) < 0.6,
        "3.weight": torch.rand(2, 12) < 0.5,
        "5.weight": torch.tensor([[True, False]]),
    }
    results = {}
    for estimator, guide in guides.items():
        samples = []
        for _ in range(70):
            terms = bmr.fitting.elbo_terms(program, guide, PLACES, y, masks=masks)
            grads = torch.autograd.grad(
                terms.expected_log_likelihood - terms.kl, list(guide.parameters())
            )
            dead = torch.cat(
                [
                    ~masks.get(s.name, torch.ones(s.shape, dtype=torch.bool)).flatten()
                    for s in guide.latents
                ]
            )
            assert all(not g[dead].any() and g.isfinite().all() for g in grads)
            samples.append(torch.cat([terms.expected_log_likelihood.detach()[None], *grads]))
        results[estimator] = torch.stack(samples)
    expected = results.pop("weight")
    for got in results.values():
        error = (got.var(0) / len(got) + expected.var(0) / len(expected)).sqrt()
        assert ((got.mean(0) - expected.mean(0)).abs() < 4.5 * error + 1e-9).all()


def tied(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(4, 4, dtype=torch.float64), 0.7).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((torch.tanh(x @ w) @ w).sum(1), 0.5), obs=y)


@pytest.mark.slow
def test_a_weight_used_twice_is_one_per_row_under_flipout_and_refused_by_the_local_estimator():
    y = torch.randn(ROWS, dtype=torch.float64)
    with pytest.raises(bmr.errors.ModelError, match='used more than once.*estimator="flipout"'):
        bmr.fitting.elbo_terms(tied, bmr.MeanField(tied, LINEAR, y, estimator="local"), LINEAR, y)
    totals = {}
    for estimator in ("weight", "flipout"):
        guide = bmr.MeanField(tied, LINEAR, y, estimator=estimator, init_scale=1.0)
        with torch.no_grad():
            guide.log_scale += 1.5
            totals[estimator] = torch.stack(
                [
                    bmr.fitting.elbo_terms(tied, guide, LINEAR, y).expected_log_likelihood
                    for _ in range(200)
                ]
            )
    error = sum(t.var() / len(t) for t in totals.values()).sqrt()
    assert abs(totals["weight"].mean() - totals["flipout"].mean()) < 4 * error


def test_an_unknown_estimator_is_refused_with_the_choices():
    with pytest.raises(
        bmr.errors.ModelError, match="estimator='loca'.*'weight', 'antithetic', 'local', 'flipout'"
    ):
        bmr.MeanField(tied, LINEAR, LINEAR[:, 0], estimator="loca")


def test_fit_takes_the_estimator_as_an_option_of_the_guide():
    y = torch.randn(ROWS, dtype=torch.float64)
    fit = bmr.fit(
        network(bmr.Gaussian(0.6)),
        (PLACES, y),
        guide=partial(bmr.MeanField, estimator="local"),
        epochs=2,
        progress=False,
    )
    assert fit.guide.estimator == "local" and fit.posterior["0.weight"].var.min() > 0
