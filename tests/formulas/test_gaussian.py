"""ΔF and reduced moments of every Gaussian structure, against exact evidences, refits, each other,
and Monte Carlo.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import delta_f, point_spike_delta_f, prune_subset, reduced_posterior
from pyro_bmr.formulas.low_rank import LowRank
from pyro_bmr.formulas.matrix_blocks import reduced_mean
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from tests.exact import linear_gaussian, random_spd

D = 5


def tensors(*arrays):
    return [torch.as_tensor(np.asarray(a), dtype=torch.float64) for a in arrays]


@pytest.fixture
def problem():
    rng = np.random.default_rng(11)
    priors = [(rng.normal(size=D), random_spd(rng, D, scale)) for scale in (1.7, 0.4, 0.9)]
    return linear_gaussian(d=D), priors


def dense(mean, cov):
    return Dense(*tensors(mean, cov))


def test_dense_is_the_difference_of_exact_log_evidences(problem):  # (a)
    model, (full, reduced, _) = problem
    gain = delta_f(dense(*model.posterior(*full)), dense(*full), dense(*reduced))
    assert gain.item() == pytest.approx(
        model.log_evidence(*reduced) - model.log_evidence(*full), abs=1e-9
    )


def test_dense_reduced_moments_are_those_of_a_refit(problem):  # (a)
    model, (full, reduced, _) = problem
    got = reduced_posterior(dense(*model.posterior(*full)), dense(*full), dense(*reduced))
    mean, cov = model.posterior(*reduced)
    np.testing.assert_allclose(got.mean, mean, atol=1e-9)
    np.testing.assert_allclose(got.cov, cov, atol=1e-9)


def test_an_unchanged_prior_changes_nothing(problem):  # (b)
    model, (full, _, _) = problem
    posterior = dense(*model.posterior(*full))
    assert delta_f(posterior, dense(*full), dense(*full)).item() == pytest.approx(0, abs=1e-10)
    q, p = Diagonal(*tensors([0.4, -1.3], [0.2, 0.05])), Diagonal(*tensors([0.3, 0.1], [0.8, 1.9]))
    assert delta_f(q, p, p).abs().max() < 1e-14


def test_reductions_chain(problem):  # (c)
    model, (a, b, c) = problem
    first = dense(*model.posterior(*a))
    second = reduced_posterior(first, dense(*a), dense(*b))
    direct = delta_f(first, dense(*a), dense(*c))
    assert (
        delta_f(first, dense(*a), dense(*b)) + delta_f(second, dense(*b), dense(*c))
    ).item() == pytest.approx(direct.item(), abs=1e-9)


def test_diagonal_reductions_chain():  # (c)
    rng = np.random.default_rng(5)
    a, b, c = (Diagonal(*tensors(rng.normal(size=7), rng.uniform(0.5, 2.5, 7))) for _ in range(3))
    q = Diagonal(*tensors(rng.normal(size=7), rng.uniform(0.05, 0.4, 7)))
    second = reduced_posterior(q, a, b)
    torch.testing.assert_close(
        delta_f(q, a, b) + delta_f(second, b, c), delta_f(q, a, c), rtol=0, atol=1e-10
    )


def test_the_point_spike_is_the_savage_dickey_ratio_and_the_limit_of_narrow_priors():  # (d)
    mean, var, eta, prior_var = 0.83, 0.19, 0.3, 2.89
    q, p = Diagonal(*tensors(mean, var)), Diagonal(*tensors(eta, prior_var))
    savage_dickey = stats.norm(mean, var**0.5).logpdf(0) - stats.norm(eta, prior_var**0.5).logpdf(0)
    spike = delta_f(q, p, bmr.Gaussian(scale=0)).item()
    assert spike == pytest.approx(savage_dickey, abs=1e-12)
    gaps = [abs(delta_f(q, p, bmr.Gaussian(scale=s)).item() - spike) for s in (1e-2, 1e-4, 1e-6)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-9


def test_a_spike_elsewhere_than_zero():
    """The null of a gain is 1."""
    q, p = Diagonal(*tensors(1.2, 0.04)), Diagonal(*tensors(0.9, 0.5))
    expected = stats.norm(1.2, 0.2).logpdf(1) - stats.norm(0.9, 0.5**0.5).logpdf(1)
    assert delta_f(q, p, bmr.Gaussian(scale=0, mean=1.0)).item() == pytest.approx(
        expected, abs=1e-12
    )
    assert reduced_posterior(q, p, bmr.Gaussian(scale=0, mean=1.0)).mean.item() == pytest.approx(
        1.0, abs=1e-12
    )


def test_invariance_under_linear_maps(problem):  # (e)
    model, (full, reduced, _) = problem
    a = np.random.default_rng(2).normal(size=(D, D)) + 2 * np.eye(D)
    mapped = [(a @ mean, a @ cov @ a.T) for mean, cov in (model.posterior(*full), full, reduced)]
    before = delta_f(dense(*model.posterior(*full)), dense(*full), dense(*reduced))
    assert delta_f(*(dense(*g) for g in mapped)).item() == pytest.approx(before.item(), abs=1e-9)


def test_monte_carlo_over_the_posterior(problem):  # (f)
    model, (full, reduced, _) = problem
    mean, cov = model.posterior(*full)
    draws = np.random.default_rng(0).multivariate_normal(mean, cov, size=200_000)
    log_ratio = stats.multivariate_normal(*reduced).logpdf(draws) - stats.multivariate_normal(
        *full
    ).logpdf(draws)
    ratio = np.exp(log_ratio - log_ratio.max())
    estimate = np.log(ratio.mean()) + log_ratio.max()
    standard_error = ratio.std() / ratio.mean() / np.sqrt(len(draws))
    assert (
        abs(delta_f(dense(mean, cov), dense(*full), dense(*reduced)).item() - estimate)
        < 4 * standard_error
    )


def test_diagonal_is_dense_without_correlation():  # (g)
    rng = np.random.default_rng(8)
    means, variances = (
        rng.normal(size=(3, D)),
        rng.uniform(0.6, 2.0, (3, D)) * np.array([[0.1], [1.0], [0.5]]),
    )
    diagonals = [Diagonal(*tensors(m, v)) for m, v in zip(means, variances, strict=True)]
    denses = [dense(m, np.diag(v)) for m, v in zip(means, variances, strict=True)]
    assert delta_f(*diagonals).sum().item() == pytest.approx(delta_f(*denses).item(), abs=1e-10)
    torch.testing.assert_close(
        reduced_posterior(*diagonals).mean, reduced_posterior(*denses).mean, rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        reduced_posterior(*diagonals).var,
        reduced_posterior(*denses).cov.diagonal(),
        rtol=0,
        atol=1e-10,
    )


def test_low_rank_is_dense():  # (g)
    rng = np.random.default_rng(9)
    mean, var, factor = tensors(
        rng.normal(size=D), rng.uniform(0.05, 0.2, D), 0.3 * rng.normal(size=(D, 2))
    )
    p, p_ = (
        Diagonal(*tensors(rng.normal(size=D), rng.uniform(lo, lo + 1, D))) for lo in (1.5, 0.5)
    )
    full = [
        Dense(mean, var.diag() + factor @ factor.mT),
        Dense(p.mean, p.var.diag()),
        Dense(p_.mean, p_.var.diag()),
    ]
    low = LowRank(mean, var, factor)
    assert delta_f(low, p, p_).item() == pytest.approx(delta_f(*full).item(), abs=1e-10)
    got, expected = reduced_posterior(low, p, p_), reduced_posterior(*full)
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        got.var.diag() + got.factor @ got.factor.mT, expected.cov, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("shape", [(3, 1), (1, 4), ()], ids=["per row", "per column", "one"])
def test_matrix_normal_is_dense(shape):  # (g)
    rng = np.random.default_rng(10)
    mean, rows, cols, eta, eta_ = tensors(
        rng.normal(size=(3, 4)),
        random_spd(rng, 3, 0.4),
        random_spd(rng, 4, 0.5),
        rng.normal(size=(3, 4)),
        rng.normal(size=(3, 4)),
    )
    p, p_ = (
        Diagonal(m, torch.as_tensor(rng.uniform(lo, lo + 1, shape)))
        for m, lo in ((eta, 2.0), (eta_, 0.6))
    )
    full = [Dense(mean.flatten(), torch.kron(rows, cols))]
    full += [Dense(g.mean.flatten(), g.var.expand(3, 4).flatten().diag()) for g in (p, p_)]
    q = MatrixNormal(mean, rows, cols)
    assert delta_f(q, p, p_).item() == pytest.approx(delta_f(*full).item(), abs=1e-9)
    torch.testing.assert_close(
        reduced_mean(q, p, p_), reduced_posterior(*full).mean.view(3, 4), rtol=0, atol=1e-9
    )


def test_pruning_a_subset_is_the_refit_without_it(problem):
    """The evidence of the model without the columns, and the posterior of the others, exactly."""
    model, (_, (eta, cov), _) = problem
    cov = np.diag(cov.diagonal())
    full = (eta, cov)
    pruned = torch.tensor([False, True, False, True, False])
    keep = ~pruned.numpy()
    gain, rest = prune_subset(dense(*model.posterior(*full)), dense(*full), pruned)
    smaller = type(model)(model.x[:, keep], model.y, model.noise)
    part = (eta[keep], cov[keep][:, keep])
    assert gain.item() == pytest.approx(
        smaller.log_evidence(*part) - model.log_evidence(*full), abs=1e-9
    )
    mean, covariance = smaller.posterior(*part)
    np.testing.assert_allclose(rest.mean, mean, atol=1e-9)
    np.testing.assert_allclose(rest.cov, covariance, atol=1e-9)


def test_a_mean_field_posterior_wider_than_its_prior_says_nothing():
    q, p = Diagonal(*tensors([0.3, 0.3], [1.4, 0.2])), Diagonal(*tensors([0.0, 0.0], [1.1, 1.1]))
    gain = delta_f(q, p, bmr.Gaussian(scale=0.5))
    assert gain[0] == 0 and gain[1] != 0
    reduced = reduced_posterior(q, p, bmr.Gaussian(scale=0.5))
    assert reduced.mean[0] == 0 and reduced.var[0] == 0.25
    assert delta_f(q, p, bmr.Gaussian(scale=3.0)).isfinite().all()


def test_float32_agrees_with_float64_down_to_a_spike():
    rng = np.random.default_rng(12)
    mean, var = rng.normal(size=2000), 10 ** rng.uniform(-8, -0.5, 2000)
    prior = bmr.Gaussian(scale=1.3)
    for scale in (0.0, 1e-12, 1e-4, 0.2):
        wide = delta_f(Diagonal(*tensors(mean, var)), prior, bmr.Gaussian(scale=scale))
        narrow = delta_f(
            Diagonal(*(t.float() for t in tensors(mean, var))), prior, bmr.Gaussian(scale=scale)
        )
        torch.testing.assert_close(narrow.double(), wide, rtol=2e-5, atol=1e-5)


def test_torch_distributions_are_accepted():
    gain = bmr.delta_f(torch.distributions.Normal(0.1, 0.5), bmr.Gaussian(1.0), bmr.Gaussian(0.0))
    assert gain.item() == pytest.approx(np.log(2) - 0.5 * 0.04, abs=1e-6)


def test_dense_posterior_wider_than_its_prior_is_an_error_with_a_mend():
    prior, posterior, reduced = (
        dense(np.zeros(2), np.diag(v)) for v in ([1.0, 0.7], [0.5, 1.6], [3.0, 4.0])
    )
    with pytest.raises(bmr.errors.ReductionError, match="wider than its prior.*fit longer"):
        delta_f(posterior, prior, reduced)


def test_bad_moments_are_named():
    one = torch.ones(3)
    with pytest.raises(
        bmr.errors.ReductionError, match="posterior: expected finite moments and variance > 0"
    ):
        delta_f(Diagonal(one, 0 * one), bmr.Gaussian(1.0), bmr.Gaussian(0.5))
    with pytest.raises(bmr.errors.ReductionError, match="posterior: expected finite"):
        delta_f(Diagonal(one * torch.nan, one), bmr.Gaussian(1.0), bmr.Gaussian(0.5))
    with pytest.raises(
        bmr.errors.ReductionError, match=r"prior: .* the posterior's shape \(3,\), got \(2,\)"
    ):
        delta_f(Diagonal(one, one), Diagonal(torch.zeros(2), torch.ones(2)), bmr.Gaussian(0.5))


def test_point_spikes_on_other_structures_are_sent_to_prune_subset():
    one = torch.ones(2, dtype=torch.float64)
    prior, spike = Diagonal(0 * one, one), Diagonal(0 * one, 0 * one)
    for q, p, p_ in (
        (LowRank(one, 0.1 * one, 0.1 * one[:, None]), prior, spike),
        (
            MatrixNormal(one[None], 0.3 * torch.eye(1).double(), 0.2 * torch.eye(2).double()),
            bmr.Gaussian(1.0),
            bmr.Gaussian(0.0),
        ),
    ):
        with pytest.raises(bmr.errors.ReductionError, match="prune_subset"):
            delta_f(q, p, p_)


def test_the_point_spike_in_pieces(monkeypatch):
    """Against densities by scipy: priors that are numbers and that are not, with a mask, in pieces
    of every size.
    """
    rng = np.random.default_rng(9)
    mean, var, eta, prior_var = tensors(
        rng.normal(size=(5, 7)),
        rng.uniform(0.01, 0.5, (5, 7)),
        rng.normal(size=(5, 7)),
        rng.uniform(0.6, 2, (5, 7)),
    )
    mask = torch.rand(5, 7) < 0.6
    expected = stats.norm(mean, var**0.5).logpdf(0) - stats.norm(eta, prior_var**0.5).logpdf(0)
    dead = Diagonal(mean.where(mask, 0), var.where(mask, 0))
    for size in (1, 6, 64):
        monkeypatch.setattr("pyro_bmr.formulas.gaussian._PIECE", size)
        np.testing.assert_allclose(
            point_spike_delta_f(Diagonal(mean, var), Diagonal(eta, prior_var)), expected, atol=1e-12
        )
        got = point_spike_delta_f(dead, Diagonal(eta, prior_var), mask)
        assert got[~mask].isnan().all()
        np.testing.assert_allclose(got[mask], expected[mask], atol=1e-12)
        number = point_spike_delta_f(Diagonal(mean.mT, var.mT), Diagonal(*tensors(0.4, 1.3)))
        np.testing.assert_allclose(
            number,
            stats.norm(mean.mT, var.mT**0.5).logpdf(0) - stats.norm(0.4, 1.3**0.5).logpdf(0),
            atol=1e-12,
        )
    with pytest.raises(
        bmr.errors.ReductionError,
        match="posterior: expected finite moments and variance > 0, got 1 of",
    ):
        point_spike_delta_f(
            Diagonal(
                mean,
                var.clone().index_put_(
                    (torch.tensor(2), torch.tensor(3)), torch.tensor(-0.1).double()
                ),
            ),
            Diagonal(eta, prior_var),
        )
    assert point_spike_delta_f(Diagonal(*tensors([], [])), Diagonal(*tensors(0.0, 1.0))).shape == (
        0,
    )


magnitude = st.floats(-15, 15).map(lambda x: 10.0**x)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(), (1,), (3,), (2, 3), (0, 2)]),
    st.tuples(magnitude, magnitude, magnitude),
    st.one_of(st.just(0.0), magnitude),
)
def test_no_diagonal_reduction_is_nan(dtype, shape, values, reduced_var):
    """Means, variances and priors over thirty orders of magnitude, the point spike among the
    targets: shapes and dtypes stay, nothing is NaN.
    """
    mean, var, prior_var = (torch.full(shape, v, dtype=dtype) for v in values)
    q, p, r = (
        Diagonal(mean, var),
        Diagonal(torch.zeros((), dtype=dtype), prior_var),
        Diagonal(torch.zeros(()), torch.tensor(reduced_var)),
    )
    try:
        gain, reduced = delta_f(q, p, r), reduced_posterior(q, p, r)
        point_spike_delta_f(q, p)
    except bmr.errors.ReductionError as error:  # beyond the largest float32, or below the smallest
        assert "the range of torch.float32" in str(error) and dtype == torch.float32
        return
    for t in (gain, reduced.mean, reduced.var, point_spike_delta_f(q, p)):
        assert t.shape == shape and t.dtype == dtype and not t.isnan().any()
    assert (reduced.var >= 0).all()
    # for a wider posterior 1 + σ₀²L has no digits left
    if reduced_var == 0 and values[1] <= values[2] and gain.isfinite().all():
        torch.testing.assert_close(gain, point_spike_delta_f(q, p), rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(3,), (2, 4), (5, 1)]), st.sampled_from([(4,), (3, 2), (2, 3, 4), (7,)]))
def test_a_prior_of_another_shape_is_no_silent_broadcast(shape, other):
    q = Diagonal(torch.zeros(shape), torch.ones(shape))
    p = Diagonal(torch.zeros(other), torch.full(other, 2.0))
    fits = len(other) <= len(shape) and all(
        a in (1, b) for a, b in zip(other[::-1], shape[::-1], strict=False)
    )
    if not fits:
        with pytest.raises(
            bmr.errors.ReductionError, match="prior: expected one number or the posterior's shape"
        ):
            delta_f(q, p, bmr.Gaussian(0.0))


TENTH, ONES, ZEROS, NAN = (
    0.1 * torch.eye(2),
    torch.ones(2),
    torch.zeros(2),
    torch.tensor([torch.nan, 0.0]),
)
FLAT = bmr.formulas.Dense(ZEROS, torch.eye(2))


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: delta_f(bmr.formulas.Dense(NAN, torch.eye(2)), FLAT, FLAT),
            "mean of the posterior: expected finite",
        ),
        (
            lambda: delta_f(
                bmr.formulas.Dense(ZEROS, torch.tensor([[0.5, 0.45], [0.0, 0.5]])), FLAT, FLAT
            ),
            "posterior is not symmetric: 1 pairs",
        ),
        (
            lambda: prune_subset(
                bmr.formulas.Dense(ZEROS, TENTH * torch.nan), bmr.Gaussian(1.0), ONES > 0
            ),
            "4 entries that are not finite",
        ),
        (
            lambda: delta_f(
                LowRank(ZEROS, -ONES, ONES[:, None]), bmr.Gaussian(1.0), bmr.Gaussian(0.1)
            ),
            "2 of 2 variances outside",
        ),
        (
            lambda: prune_subset(LowRank(NAN, ONES, ONES[:, None]), bmr.Gaussian(1.0), ONES > 0),
            "1 not finite",
        ),
        (
            lambda: delta_f(
                MatrixNormal(TENTH, -torch.eye(2), torch.eye(2)),
                bmr.Gaussian(1.0),
                bmr.Gaussian(0.1),
            ),
            "rows of the posterior is not positive",
        ),
        (
            lambda: delta_f(
                Diagonal(ONES * 1e30, ONES * 1e-30), bmr.Gaussian(1.0), bmr.Gaussian(0.0)
            ),
            "leaves the range of torch.float32 for 2 of 2",
        ),
        (
            lambda: delta_f(Diagonal(ONES.int(), ONES.int()), bmr.Gaussian(0.5), bmr.Gaussian(0.1)),
            "expected floating-point mean and var, got torch.int32",
        ),
        (
            lambda: bmr.formulas.best_var(bmr.formulas.Message(ONES * torch.inf, ONES), ONES),
            "got 2 of 2 infinite or NaN",
        ),
    ],
)
def test_what_is_no_gaussian_is_refused_by_name(call, words):
    with pytest.raises(bmr.errors.ReductionError, match=words):
        call()


def test_tiny_variances_in_float32():
    one = torch.ones(1)
    reduced = reduced_posterior(Diagonal(one, one * 1e-40), bmr.Gaussian(1.0), bmr.Gaussian(0.5))
    assert reduced.mean.item() == 1 and reduced.var.item() == pytest.approx(1e-40, rel=1e-4)
    assert delta_f(
        Diagonal(one, one * 1e-40), bmr.Gaussian(1.0), bmr.Gaussian(0.5)
    ).item() == pytest.approx(np.log(2) - 1.5, abs=1e-6)
    wide = delta_f(Diagonal(0 * one, one * 1e-30), bmr.Gaussian(1e-20), bmr.Gaussian(0.0))
    assert wide.item() == pytest.approx(0.5 * np.log(1e-40 / float(np.float32(1e-30))), abs=1e-6)
    q, p, spike = Diagonal(0 * one, one * 1e-10), Diagonal(one, one * 0.01), bmr.Gaussian(0.0)
    assert delta_f(q, p, spike).item() == pytest.approx(59.2103, abs=1e-3)


def test_moments_that_are_arrays_or_no_numbers():
    q = Diagonal(np.array([0.3, -1.1]), np.array([0.02, 0.3], dtype=np.float32))
    tensors = Diagonal(torch.tensor(q.mean), torch.tensor(q.var))
    assert torch.equal(
        delta_f(q, bmr.Gaussian(0.9), bmr.Gaussian(0.4)),
        delta_f(tensors, bmr.Gaussian(0.9), bmr.Gaussian(0.4)),
    )
    with pytest.raises(bmr.errors.ReductionError, match="got 'a'"):
        delta_f(Diagonal("a", "b"), bmr.Gaussian(0.9), bmr.Gaussian(0.4))
