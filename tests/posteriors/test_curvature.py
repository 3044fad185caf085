"""Posteriors from elsewhere: moments, draws, and curvatures of a network trained in plain torch,
against the exact conjugate model.
"""

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.priors import Gaussian
from tests.exact import linear_gaussian, random_spd

D, SCALE = 4, 1.4
MODEL = linear_gaussian(d=D)
GRAM = torch.tensor(MODEL.x.T @ MODEL.x / MODEL.noise**2)
EXACT_MEAN, EXACT_COV = MODEL.posterior(np.zeros(D), SCALE**2 * np.eye(D))
LEAST_SQUARES = torch.tensor(np.linalg.lstsq(MODEL.x, MODEL.y, rcond=None)[0])


@pytest.mark.parametrize("penalised", [True, False])
def test_the_full_curvature_is_the_exact_posterior_of_a_linear_model(penalised):
    value = torch.tensor(EXACT_MEAN) if penalised else LEAST_SQUARES
    post = bmr.Posterior.from_curvature(
        {"w": value}, {"w": GRAM}, Gaussian(SCALE), penalised=penalised
    )
    np.testing.assert_allclose(post["w"].mean, EXACT_MEAN, atol=1e-9)
    np.testing.assert_allclose(post["w"].joint.cov, EXACT_COV, atol=1e-9)
    result = bmr.reduce(post, to=Gaussian(0), kept=0.5)
    alive = result.masks["w"].numpy().astype(float)
    exact = MODEL.log_evidence(np.zeros(D), SCALE**2 * np.diag(alive)) - MODEL.log_evidence(
        np.zeros(D), SCALE**2 * np.eye(D)
    )
    assert result.delta_f == pytest.approx(exact, abs=1e-9) and alive.sum() == 2


def test_a_cold_posterior_counts_the_data_more():
    twice = bmr.Posterior.from_curvature(
        {"w": LEAST_SQUARES}, {"w": 2 * GRAM}, Gaussian(SCALE), penalised=False
    )
    cold = bmr.Posterior.from_curvature(
        {"w": LEAST_SQUARES}, {"w": GRAM}, Gaussian(SCALE), penalised=False, temperature=0.5
    )
    assert (
        cold.temperature == 0.5
        and torch.equal(cold["w"].joint.cov, twice["w"].joint.cov)
        and torch.equal(cold["w"].mean, twice["w"].mean)
    )
    value, factors = torch.ones(2, 2).double(), (torch.eye(2).double() * 3, torch.eye(2).double())
    pair, flat = (
        bmr.Posterior.from_curvature({"w": value}, {"w": h}, Gaussian(1e5), temperature=0.1)
        for h in (factors, 3 * value)
    )
    torch.testing.assert_close(pair["w"].var, flat["w"].var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("penalised", [True, False])
def test_a_diagonal_curvature_is_that_of_orthogonal_regressors(penalised):
    prior = bmr.formulas.Diagonal(torch.tensor(0.3).double(), torch.tensor([0.7, 2.5]).double())
    h, estimate = torch.tensor([3.0, 0.4]).double(), torch.tensor([0.9, -1.2]).double()
    # precision-weighted mean of the likelihood's and the prior's
    q = (h * estimate + prior.mean / prior.var) / (h + 1 / prior.var)
    post = bmr.Posterior.from_curvature(
        {"w": q if penalised else estimate}, {"w": h}, prior, penalised=penalised
    )
    torch.testing.assert_close(post["w"].mean, q)
    torch.testing.assert_close(post["w"].var, 1 / (h + 1 / prior.var))
    assert post["w"].joint is None and post["w"].declared is None


def test_kronecker_factors():
    rng = np.random.default_rng(1)
    rows, columns, value = (
        torch.tensor(random_spd(rng, 3, 40.0)),
        torch.tensor(random_spd(rng, 2, 9.0)),
        torch.tensor(rng.normal(size=(3, 2))),
    )
    # a prior that adds next to nothing
    wide = bmr.Posterior.from_curvature({"w": value}, {"w": (rows, columns)}, Gaussian(1e4))
    torch.testing.assert_close(
        torch.kron(wide["w"].joint.row_cov, wide["w"].joint.col_cov),
        torch.linalg.inv(torch.kron(rows, columns)),
        rtol=1e-4,
        atol=0,
    )
    torch.testing.assert_close(
        wide["w"].var.flatten(),
        torch.kron(wide["w"].joint.row_cov, wide["w"].joint.col_cov).diagonal(),
    )
    # data that add next to nothing
    flat = bmr.Posterior.from_curvature(
        {"w": value}, {"w": (1e-9 * rows, columns * 1e-9)}, Gaussian(1.3)
    )
    torch.testing.assert_close(
        flat["w"].var, torch.full((3, 2), 1.3**2).double(), rtol=1e-3, atol=0
    )
    pulled = bmr.Posterior.from_curvature(
        {"w": value}, {"w": (rows, columns)}, Gaussian(0.5), penalised=False
    )
    cov = torch.kron(pulled["w"].joint.row_cov, pulled["w"].joint.col_cov)
    torch.testing.assert_close(
        pulled["w"].mean.flatten(), value.flatten() - cov @ value.flatten() / 0.25
    )


def test_an_online_newton_optimiser():
    """Posterior precision λ(h + δ), prior precision λδ, as IVON has them."""
    lam, delta, m, h = (
        500.0,
        0.01,
        torch.tensor([0.3, -0.02]).double(),
        torch.tensor([0.2, 0.05]).double(),
    )
    post = bmr.Posterior.from_curvature({"w": m}, {"w": lam * h}, Gaussian((lam * delta) ** -0.5))
    torch.testing.assert_close(post["w"].var, 1 / (lam * (h + delta)))
    assert post["w"].prior.var.item() == pytest.approx(1 / (lam * delta))


def test_a_curvature_may_be_negative_as_far_as_the_prior_allows():
    """IVON's own Hessian is, by its noise; only the sum is a precision."""
    h, prior = (
        torch.tensor([-0.3, 2.0]).double(),
        bmr.formulas.Diagonal(torch.tensor(0.1).double(), torch.tensor(2.5).double()),
    )
    post = bmr.Posterior.from_curvature(
        {"w": torch.tensor([0.7, -0.2]).double()}, {"w": h}, prior, penalised=False
    )
    torch.testing.assert_close(post["w"].var, 1 / (h + 0.4))
    torch.testing.assert_close(
        post["w"].mean, torch.tensor([0.7 - 10 * 0.4 * 0.6, -0.2 + 0.4 * 0.3 / 2.4]).double()
    )
    with pytest.raises(bmr.errors.ModelError, match="got 1 of 2 entries"):
        bmr.Posterior.from_curvature({"w": h}, {"w": torch.tensor([-0.4, 2.0]).double()}, prior)


def test_a_curvature_out_of_a_graph_and_of_low_precision_is_reduced():
    weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    whole = (weight.square() + 0.1).diag()
    for curvature in (
        weight.square() + 0.1,
        whole,
        (whole, torch.ones(1, 1, requires_grad=True)),
        (weight.square() + 0.1).bfloat16(),
    ):
        post = bmr.Posterior.from_curvature({"w": weight}, {"w": curvature}, Gaussian(1.3))
        assert not post["w"].var.requires_grad and post["w"].var.dtype == torch.float32
        if not isinstance(curvature, tuple):
            torch.testing.assert_close(
                post["w"].var, 1 / (weight.detach().square() + 0.1 + 1.3**-2), rtol=3e-3, atol=0
            )
        bmr.reduce(post, to=Gaussian(0))


def test_autocast_and_inference_mode_change_nothing():
    curvature, value = GRAM.float(), torch.tensor(EXACT_MEAN).float()
    draws = torch.tensor(np.random.default_rng(2).normal(size=(90, 3))).float()

    def read():
        return bmr.Posterior.from_curvature(
            {"w": value}, {"w": curvature}, Gaussian(SCALE), penalised=False
        ), bmr.Posterior.from_samples({"w": draws}, None)

    plain = read()
    with torch.autocast("cpu"):
        cast = read()
    with torch.inference_mode():
        curvature, value, draws = curvature.clone(), value.clone(), draws.clone()
        inferred = read()
    for posteriors in (cast, inferred):
        for a, b in zip(plain, posteriors, strict=True):
            assert (
                torch.equal(a["w"].mean, b["w"].mean)
                and torch.equal(a["w"].joint.cov, b["w"].joint.cov)
                and not b["w"].mean.is_inference()
            )
    bmr.reduce(inferred[0], to=Gaussian(0))


def test_draws_of_the_exact_posterior_reduce_as_it_does():
    draws = torch.tensor(
        np.random.default_rng(0).multivariate_normal(EXACT_MEAN, EXACT_COV, size=40_000)
    )
    noise = torch.tensor(np.random.default_rng(1).lognormal(0.3, 0.2, size=40_000))
    post = bmr.Posterior.from_samples(
        {"w": draws, "noise": noise}, {"w": Gaussian(SCALE)}, supports={"noise": "positive"}
    )
    result = bmr.reduce(post, to=Gaussian(0), kept=0.5)
    alive = result.masks["w"].numpy().astype(float)
    exact = MODEL.log_evidence(np.zeros(D), SCALE**2 * np.diag(alive)) - MODEL.log_evidence(
        np.zeros(D), SCALE**2 * np.eye(D)
    )
    assert list(result.sites) == ["w"] and result.delta_f == pytest.approx(exact, rel=0.05)
    assert post["noise"].mean.item() == pytest.approx(0.3, abs=0.005) and post[
        "noise"
    ].var.item() == pytest.approx(0.04, rel=0.05)
    assert post["noise"].joint is None and post.point()["noise"].item() == pytest.approx(
        np.exp(0.3), rel=0.01
    )
    few = bmr.Posterior.from_samples({"w": draws[:39]}, Gaussian(SCALE))
    assert (
        few["w"].joint is None
        and bmr.Posterior.from_samples({"w": draws[:40]}, Gaussian(SCALE), joint_up_to=3)["w"].joint
        is None
    )


def test_a_plain_network_is_pruned_and_exported():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    weights = {name: p.detach() for name, p in net.named_parameters()}
    post = bmr.Posterior.from_curvature(
        weights,
        {name: torch.rand_like(p) * 60 for name, p in weights.items()},
        {"*.weight": Gaussian(1.0), "*.bias": Gaussian(2.0)},
    )
    assert post["0.bias"].prior.var.item() == 4.0 and post["0.weight"].declared == Gaussian(1.0)
    result = bmr.reduce(post, to=Gaussian(0), kept=0.5)
    pruned = bmr.export(net, result.posterior)
    for name, p in pruned.named_parameters():
        assert torch.equal(p == 0, ~result.masks[name]) and torch.equal(
            p[p != 0], weights[name][p != 0]
        )
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    part = bmr.export(net, bmr.Posterior({"2.weight": result.posterior["2.weight"]}))
    assert torch.equal(part[0].weight, net[0].weight) and torch.equal(
        part[2].weight == 0, ~result.masks["2.weight"]
    )
    with pytest.raises(bmr.errors.ModelError, match="export: expected a BayesianNetwork"):
        bmr.export(net, bmr.Posterior({"other": result.posterior["2.weight"]}))


def test_what_is_refused():
    one = torch.ones(3).double()
    curvature, moments, samples = (
        bmr.Posterior.from_curvature,
        bmr.Posterior.from_moments,
        bmr.Posterior.from_samples,
    )
    for call, message in (
        (lambda: curvature({"w": one}, {}, Gaussian(1.0)), "site 'w': it has no curvature"),
        (
            lambda: curvature({"w": one}, {"w": -one}, Gaussian(1.0)),
            "prior precision > 0 and finite, got 3 of 3 entries",
        ),
        (
            lambda: curvature({"w": one}, {"w": one[:2]}, Gaussian(1.0)),
            r"of shape \(3,\), or \(3, 3\)",
        ),
        (
            lambda: curvature({"w": one}, {"w": -torch.eye(3).double()}, Gaussian(3.0)),
            "not positive definite",
        ),
        (
            lambda: curvature({"w": one}, {"w": (torch.eye(2), torch.eye(1))}, Gaussian(3.0)),
            r"shapes \[\(3, 3\), \(1, 1\)\]",
        ),
        (
            lambda: curvature({"w": one}, {"w": (0 * torch.eye(3), torch.eye(1))}, Gaussian(3.0)),
            "positive trace",
        ),
        (
            lambda: curvature({"w": one}, {"w": one}, {"v": Gaussian(1.0)}),
            "a Laplace posterior needs a Gaussian prior",
        ),
        (lambda: curvature({"w": one}, {"w": one}, bmr.Horseshoe()), "no mean and variance"),
        (
            lambda: curvature({"w": one}, {"w": one}, Gaussian(1.0), temperature=0.0),
            "temperature: .* finite number > 0 .*, got 0.0",
        ),
        (
            lambda: curvature({"w": one}, {"w": one * torch.nan}, Gaussian(1.0)),
            "finite, got 3 of 3 entries",
        ),
        (
            lambda: curvature({"w": one}, {"w": one * torch.inf}, Gaussian(1.0)),
            "finite, got 3 of 3 entries",
        ),
        (
            lambda: curvature({"w": one}, {"w": one.long()}, Gaussian(1.0)),
            "expected a tensor of floating-point numbers as curvature, got torch.int64",
        ),
        (
            lambda: curvature({"w": one.long()}, {"w": one}, Gaussian(1.0)),
            "expected a tensor of floating-point numbers as mean",
        ),
        (
            lambda: curvature({"w": one * torch.nan}, {"w": one}, Gaussian(1.0)),
            "expected finite means, got 3",
        ),
        (
            lambda: curvature({"w": one}, {"w": (torch.eye(3),) * 3}, Gaussian(1.0)),
            "a pair of Kronecker factors, got 3 parts",
        ),
        (
            lambda: curvature({"w": one}, {"w": torch.ones(3, 3).double().triu()}, Gaussian(1.0)),
            "not symmetric",
        ),
        (
            lambda: curvature({"w": one}, {"w": torch.eye(3).double() * torch.nan}, Gaussian(1.0)),
            "not symmetric, or not finite",
        ),
        (
            lambda: curvature(
                {"w": one}, {"w": (torch.ones(3, 3).triu(), torch.eye(1))}, Gaussian(1.0)
            ),
            "not symmetric",
        ),
        (
            lambda: curvature(
                {"w": one}, {"w": (-0.01 * torch.eye(3), -0.01 * torch.eye(1))}, Gaussian(1.0)
            ),
            "without negative eigenvalues",
        ),
        (
            lambda: curvature(
                {"w": one}, {"w": one}, bmr.formulas.Diagonal(0 * one, one * torch.inf)
            ),
            "finite moments",
        ),
        (
            lambda: curvature(
                {"w": one}, {"w": one}, {"w": Gaussian(1.0), "*.bias": Gaussian(2.0)}
            ),
            r"prior: '\*.bias' names none of the sites \(w\)",
        ),
        (lambda: moments({"w": one, "v": one}, {"w": one}, None), "a mean and no variance"),
        (
            lambda: moments({"w": one}, {"w": one, "v": one}, None),
            "site 'v': it has a variance and no mean",
        ),
        (lambda: moments({"w": one}, {"w": one[:2]}, None), r"of one shape.*shapes \(3,\), \(2,\)"),
        (lambda: moments({"w": one}, {"w": one * torch.inf}, None), "3 variances infinite or NaN"),
        (
            lambda: moments({"w": one}, {"w": one}, torch.distributions.HalfCauchy(1.0)),
            "no mean and variance",
        ),
        (
            lambda: moments({"w": one}, {"w": one}, bmr.formulas.Diagonal(one * torch.nan, one)),
            "finite moments",
        ),
        (
            lambda: moments({"w": one}, {"w": one}, bmr.formulas.Diagonal(one[:2], one[:2])),
            r"a shape that fits \(3,\)",
        ),
        (
            lambda: moments({"w": one}, {"w": one}, Gaussian(1.0, mean="init")),
            "no mean and variance",
        ),
        (
            lambda: moments({"w": one}, {"w": one}, None, supports={"v": "positive"}),
            "supports: 'v' names none of the sites",
        ),
        (
            lambda: bmr.Posterior(
                moments({"w": one}, {"w": one}, None).sites, temperature=float("nan")
            ),
            "temperature: expected .*, got nan",
        ),
        (lambda: moments({"w": one}, {"w": -one}, None), "finite means and variances >= 0"),
        (
            lambda: moments({"w": one}, {"w": one}, bmr.formulas.Diagonal(0 * one, 0 * one)),
            "expected a prior with a variance > 0",
        ),
        (
            lambda: moments({"w": one}, {"w": one}, None, supports={"w": "simplex"}),
            "expected a support of 'real', .*, got 'simplex'",
        ),
        (lambda: samples({"w": one[:1]}, None), "1 draw; a variance needs at least two"),
    ):
        with pytest.raises(bmr.errors.ModelError, match=message):
            call()


def test_a_reduction_after_another_of_a_correlated_posterior_is_that_of_the_exact_evidence():
    """The spike, and then other priors over what it left; the other way round; with means that are
    not zero.
    """

    def evidence(alive, scale, mean):
        alive = alive.numpy().astype(float)
        return MODEL.log_evidence(mean * alive, scale**2 * np.diag(alive))

    start, all_ = (SCALE, 0.3), torch.ones(D, dtype=torch.bool)
    mean, _ = MODEL.posterior(np.full(D, 0.3), SCALE**2 * np.eye(D))
    first = bmr.reduce(
        bmr.Posterior.from_curvature({"w": torch.tensor(mean)}, {"w": GRAM}, Gaussian(*start)),
        to=Gaussian(0),
        kept=0.5,
    )
    living = first.masks["w"]
    second = bmr.reduce(first.posterior, to=Gaussian(0.6, mean=-0.2))
    assert second.delta_f == pytest.approx(
        evidence(living, 0.6, -0.2) - evidence(living, *start), abs=1e-8
    )
    assert (
        not second.posterior["w"].mean[~living].any()
        and not second.posterior["w"].joint.cov[~living].any()
    )
    third = bmr.reduce(second.posterior, to=Gaussian(0), kept=0.25)
    assert first.then(second).then(third).delta_f == pytest.approx(
        evidence(third.masks["w"], 0.6, -0.2) - evidence(all_, *start), abs=1e-8
    )
    assert (
        bmr.reduce(first.posterior, to=Gaussian()).delta_f
        >= bmr.reduce(first.posterior, to=Gaussian(0.6)).delta_f - 1e-3
    )


def test_kronecker_factors_after_a_spike_on_rows_are_reduced_as_the_dense_covariance():
    rng = np.random.default_rng(4)
    rows, columns, value = (
        torch.tensor(random_spd(rng, 3)),
        torch.tensor(random_spd(rng, 2)),
        torch.tensor(rng.normal(size=(3, 2))),
    )
    first = bmr.reduce(
        bmr.Posterior.from_curvature({"w": value}, {"w": (rows, columns)}, Gaussian(0.8, mean=0.2)),
        to=Gaussian(0),
        per="unit",
        kept=0.7,
    )
    site, alive = first.posterior["w"], first.masks["w"].flatten()
    assert int(alive.sum()) == 4
    cov = torch.kron(site.joint.row_cov, site.joint.col_cov)[alive][:, alive]
    eye, one = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    dense = (
        bmr.formulas.Dense(site.mean.flatten()[alive], cov),
        bmr.formulas.Dense(0.2 * one, 0.64 * eye),
        bmr.formulas.Dense(0.1 * one, 0.25 * eye),
    )
    second = bmr.reduce(first.posterior, to=Gaussian(0.5, mean=0.1))
    assert second.delta_f == pytest.approx(float(bmr.delta_f(*dense)), abs=1e-9)
    torch.testing.assert_close(
        second.posterior["w"].mean.flatten()[alive], bmr.formulas.reduced_posterior(*dense).mean
    )


@pytest.mark.parametrize("full", [True, False])
def test_a_strong_prior_leaves_the_mean_its_digits_in_float32(full):
    """η + H(ŵ − η)/(H + Π), where ŵ minus its shift would be a rounding of ŵ."""
    h, pi, w, eta = 1.3, 1e10, 3.1, 0.001
    value = torch.full((2,), w)
    post = bmr.Posterior.from_curvature(
        {"w": value},
        {"w": h * torch.eye(2) if full else h * torch.ones(2)},
        Gaussian(pi**-0.5, mean=eta),
        penalised=False,
    )
    assert post["w"].mean.tolist() == pytest.approx([eta + h / (h + pi) * (w - eta)] * 2, rel=3e-7)


def test_a_curvature_of_nearly_collinear_weights_in_float32():
    """The covariance is the inverse of the float32 matrix, not an inverse in float32."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 3))
    x[:, 1] = x[:, 0] + 2e-3 * x[:, 1]
    curvature = torch.tensor(x.T @ x).float()
    post = bmr.Posterior.from_curvature({"w": torch.zeros(3)}, {"w": curvature}, Gaussian(100.0))
    exact = torch.linalg.inv(curvature.double() + 1e-4 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(post["w"].joint.cov.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.003, 0.2, 100.0])
def test_kronecker_factors_in_float32(scale):
    """As in float64, up to the digits that the factors have; a strong prior damps by more than an
    eigenvalue may be negative, so that they are checked by themselves.
    """
    rng = np.random.default_rng(3)
    given = [torch.tensor(random_spd(rng, k, 40.0)).float() for k in (40, 60)]
    value = torch.tensor(rng.normal(size=(40, 60))).float()
    before = [t.clone() for t in (value, *given)]
    single, double = (
        bmr.Posterior.from_curvature(
            {"w": value.to(dtype)},
            {"w": tuple(t.to(dtype) for t in given)},
            Gaussian(scale),
            temperature=0.05,
        )["w"]
        for dtype in (torch.float32, torch.float64)
    )
    for one, exact in zip(
        (single.joint.row_cov, single.joint.col_cov, single.var),
        (double.joint.row_cov, double.joint.col_cov, double.var),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert float((one - exact).norm()) < 1e-4 * float(exact.norm())
    assert torch.equal(single.mean, value)
    single.mean.zero_()
    assert all(torch.equal(a, b) for a, b in zip((value, *given), before, strict=True))


@pytest.mark.parametrize("penalised", [True, False])
def test_an_empirical_scale_is_that_of_the_most_evidence(penalised):
    """Of each site, about the mean of its prior, at the temperature; the weights are the maximum of
    the likelihood for it, whatever they are for the posterior.
    """
    rng = np.random.default_rng(5)
    rows, columns = (torch.tensor(random_spd(rng, 4, 3.0)) for _ in range(2))
    value = {"w": torch.tensor(rng.normal(size=(4, 4))), "v": torch.tensor(rng.normal(size=5))}
    diagonal = torch.tensor(rng.uniform(0, 3, 5))
    curvature = {"w": (rows, columns), "v": diagonal}

    def posterior(prior):
        return bmr.Posterior.from_curvature(
            value, curvature, prior, temperature=0.3, penalised=penalised
        )

    found = posterior({"w": Gaussian(), "v": Gaussian(mean=0.4)})
    evidence = {
        "w": bmr.formulas.LaplaceEvidence.of(value["w"], rows, columns, 0.3, False),
        "v": bmr.formulas.LaplaceEvidence.of(value["v"] - 0.4, diagonal, None, 0.3, False),
    }
    scales = {name: one.best_scale() for name, one in evidence.items()}
    assert {name: site.declared.scale for name, site in found.sites.items()} == scales
    given = posterior({"w": Gaussian(scales["w"]), "v": Gaussian(scales["v"], mean=0.4)})
    for name, site in found.sites.items():
        torch.testing.assert_close(site.var, given[name].var, rtol=1e-12, atol=0)
    for prior, change, message in (
        (Gaussian(per="unit"), {}, "for all weights of a site"),
        (Gaussian(mean="init"), {}, "a mean that is given"),
        (Gaussian(), {"curvature": {"v": 0 * diagonal}}, "curvature is 0 or less"),
        (Gaussian(), {"curvature": {"v": -diagonal}}, "curvature is 0 or less"),
        (Gaussian(), {"curvature": {"v": diagonal / 0}}, "a finite curvature"),
        (Gaussian(), {"mean": {"v": 0 * diagonal}}, "no better than the mean"),
        (Gaussian(), {"curvature": {"v": diagonal[:2]}}, r"of shape \(5,\), or \(5, 5\)"),
    ):
        arguments = {"mean": {"v": value["v"]}, "curvature": {"v": diagonal}, "prior": prior}
        with pytest.raises(bmr.errors.ModelError, match=message):
            bmr.Posterior.from_curvature(**(arguments | change))


@pytest.mark.parametrize("full", [False, True])
def test_an_empirical_scale_of_weights_in_any_layout(full):
    rng = np.random.default_rng(6)
    value = torch.tensor(rng.normal(size=(4, 3, 2, 2)))
    diagonal = torch.tensor(rng.uniform(0, 9, (4, 3, 2, 2)))

    def scale(value):
        own = torch.diag(diagonal.flatten()) if full else diagonal
        found = bmr.Posterior.from_curvature({"w": value}, {"w": own}, Gaussian(), rows=100)
        return found["w"].declared.scale

    assert scale(value.to(memory_format=torch.channels_last)) == scale(value)
