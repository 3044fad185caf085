"""Entries of a matrix normal held at zero, against the dense Gaussian over all entries."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas import (
    Diagonal,
    conjugate_gradients,
    held_at_zero,
    held_delta_f,
    held_entries,
    held_var,
)
from pyro_bmr.formulas import held_evidence as evidence
from tests.exact import random_spd
from tests.parameters import others_slow


def problem(seed, n, m, share):
    """Mean, factors, prior moments and the held entries, with nothing neutral in them."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(n, m))
    rows, cols = random_spd(rng, n, 0.4), random_spd(rng, m, 0.8)
    prior = rng.normal(size=(n, m)) * 0.3, rng.uniform(0.9, 2.5, (n, m))
    return mean, rows, cols, prior, rng.random((n, m)) < share


def dense(mean, rows, cols, held):
    """The mean, covariance, energy and log |Σ_SS| by algebra over all entries."""
    cov, s = np.kron(rows, cols), held.flatten()
    block, gain = cov[np.ix_(s, s)], np.zeros((s.sum(), len(s)))
    if s.any():
        gain = np.linalg.solve(block, cov[s])
    rest = mean.flatten() - mean.flatten()[s] @ gain
    energy = mean.flatten()[s] @ np.linalg.solve(block, mean.flatten()[s]) if s.any() else 0.0
    return (
        np.where(s, 0, rest).reshape(mean.shape),
        cov - cov[:, s] @ gain,
        energy,
        np.linalg.slogdet(block)[1] if s.any() else 0.0,
    )


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def limit(entries):
    """No more than so many entries by a dense factor."""
    return patch.multiple(held_entries, DENSE_UP_TO=entries), patch.multiple(
        evidence, DENSE_UP_TO=entries
    )


CASES = [
    (shape, share, way)
    for shape in ((3, 4), (6, 9), (1, 5), (5, 1), (12, 7))
    for share in (0.0, 0.3, 0.7, 1.0)
    for way in ("by_held", "by_gradients", "by_kept")
    if way != "by_kept" or share == 1 or (share == 0.7 and min(shape) > 1)
]


@pytest.mark.parametrize(("shape", "share", "way"), CASES)
def test_mean_and_energy(shape, share, way):
    mean, rows, cols, _, held = problem(7, *shape, share)
    exact, _, energy, _ = dense(mean, rows, cols, held)
    most = {"by_held": 1024, "by_kept": int((~held).sum()), "by_gradients": -1}[way]
    assert way != "by_kept" or held.sum() > most
    with patch.multiple(held_entries, DENSE_UP_TO=most):
        found = held_at_zero(*tensors(mean, rows, cols, held))
    np.testing.assert_allclose(found.mean, exact, atol=1e-10)
    assert float(found.energy) == pytest.approx(energy, abs=1e-10, rel=1e-10)
    assert found.converged and (found.iterations > 0) == (way == "by_gradients" and held.any())
    assert not found.mean[torch.tensor(held)].any()
    assert not found.multipliers[~torch.tensor(held)].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    share=st.floats(0, 1),
    most=st.sampled_from([-1, 8, 1024]),
)
def test_any_shape_and_mask(seed, n, m, share, most):
    mean, rows, cols, prior, held = problem(seed, n, m, share)
    exact, cov, energy, log_det = dense(mean, rows, cols, held)
    first, second = limit(most)
    with first, second:
        row_cov, col_cov, mask = tensors(rows, cols, held)
        found = held_at_zero(torch.tensor(mean), row_cov, col_cov, mask)
        given_prior = Diagonal(*tensors(*prior))
        low, high = held_delta_f(row_cov, col_cov, mask, found.energy, given_prior)
        var, is_exact = held_var(row_cov, col_cov, mask)
    np.testing.assert_allclose(found.mean, exact, atol=1e-9)
    p = 0.5 * (np.log(prior[1]) + prior[0] ** 2 / prior[1])[held].sum()
    true = -0.5 * log_det - 0.5 * energy + p
    slack = 1e-9 * (1 + abs(true))
    assert low - slack <= true <= high + slack
    # nothing, or all, or few: exact
    if most == 1024 or held.all() or not held.any():
        assert low == pytest.approx(true, abs=slack) and high == pytest.approx(true, abs=slack)
        assert is_exact
    diagonal = np.where(held, 0, cov.diagonal().reshape(held.shape))
    if is_exact:
        np.testing.assert_allclose(var, diagonal, atol=1e-9)
    assert (var.numpy() >= diagonal - 1e-9).all()


@pytest.mark.parametrize("share", others_slow([0.2, 0.5, 0.9], 0.2))
def test_the_bounds_of_a_layer_are_near_its_log_determinant(share):
    """Far nearer than the sums over the variances given nothing and given all others."""
    mean, rows, cols, _, held = problem(5, 40, 60, share)
    log_det = dense(mean, rows, cols, held)[3]
    with limit(0)[1]:
        tight = evidence.log_det_bounds(*tensors(rows, cols, held))
        cheap = evidence.log_det_bounds(*tensors(rows, cols, held), work=0)
    alone = np.log(np.outer(rows.diagonal(), cols.diagonal()))[held].sum()
    inverse = np.outer(np.linalg.inv(rows).diagonal(), np.linalg.inv(cols).diagonal())
    given_all = -np.log(inverse)[held].sum()
    assert given_all <= cheap.lower <= tight.lower <= log_det <= tight.upper <= cheap.upper
    assert cheap.upper <= alone
    assert tight.upper - tight.lower < 0.3 * (alone - given_all)


def test_whole_rows_or_columns_and_all_are_exact_without_a_dense_factor():
    mean, rows, cols, _, _ = problem(3, 9, 11, 0.5)
    held = np.zeros((9, 11), bool)
    for mask in (held | True, held | (np.arange(9) % 3 == 0)[:, None], held | (np.arange(11) < 4)):
        log_det = dense(mean, rows, cols, mask)[3]
        with limit(0)[1]:
            assert evidence.log_det_bounds(*tensors(rows, cols, mask)) == pytest.approx(
                (log_det, log_det), rel=1e-12
            )


def test_the_variances_of_many_that_are_left_where_few_are_held():
    mean, rows, cols, _, held = problem(8, 40, 30, 0.03)
    cov = dense(mean, rows, cols, held)[1]
    assert 0 < held.sum() < 60 and (~held).sum() > held_entries.DENSE_UP_TO
    var, exact = held_var(*tensors(rows, cols, held))
    np.testing.assert_allclose(var, cov.diagonal().reshape(held.shape), atol=1e-12)
    assert exact
    with patch.multiple(evidence, _VAR_WORK=1):
        first, exact = held_var(*tensors(rows, cols, held))
    assert not exact and float((first - var).max()) > 1e-3


def test_rows_and_columns_without_variance_are_left_out():
    mean, rows, cols, _, held = problem(8, 6, 5, 0.4)
    _, cov, _, log_det = dense(mean, rows, cols, held)
    wide = [np.zeros((8, 8)), np.zeros((6, 6)), np.zeros((8, 6), bool)]
    i, j = np.array([0, 1, 3, 4, 5, 7]), np.array([0, 2, 3, 4, 5])
    wide[0][np.ix_(i, i)], wide[1][np.ix_(j, j)], wide[2][np.ix_(i, j)] = rows, cols, held
    var, exact = held_var(*tensors(*wide))
    inner = var.numpy()[np.ix_(i, j)]
    np.testing.assert_allclose(inner, np.where(held, 0, cov.diagonal().reshape(6, 5)), atol=1e-12)
    assert exact and float(var.sum()) == pytest.approx(inner.sum())
    assert evidence.log_det_bounds(*tensors(*wide)) == pytest.approx((log_det, log_det), rel=1e-12)


def test_a_start_saves_iterations_and_changes_nothing():
    mean, rows, cols, _, held = problem(2, 48, 48, 0.52)
    more = held | (np.random.default_rng(9).random(held.shape) < 0.05)
    arguments = tensors(mean, rows, cols, more)
    fewer = held_at_zero(*tensors(mean, rows, cols, held))
    cold = held_at_zero(*arguments)
    warm = held_at_zero(*arguments, start=fewer.multipliers)
    again = held_at_zero(*arguments, start=cold.multipliers)
    assert again.iterations == 0 < warm.iterations < cold.iterations
    torch.testing.assert_close(warm.mean, cold.mean, atol=1e-10, rtol=0)
    # one that is far from the solution is not taken
    bad = held_at_zero(*arguments, start=1e6 * torch.ones(48, 48).double())
    torch.testing.assert_close(bad.mean, cold.mean, atol=1e-10, rtol=0)
    assert bad.iterations == cold.iterations


def test_float32_keeps_its_tolerance_where_its_own_digits_do_not_do():
    """Factors of condition 1e6: conjugate gradients in float32 stop short of the tolerance."""
    rng = np.random.default_rng(4)
    rows, cols = (
        (basis * np.geomspace(1, 1e-6, 50)) @ basis.T
        for basis in (np.linalg.qr(rng.normal(size=(50, 50)))[0] for _ in range(2))
    )
    mean, held = rng.normal(size=(50, 50)), rng.random((50, 50)) < 0.2
    single = [t.float() if t.is_floating_point() else t for t in tensors(mean, rows, cols, held)]
    rounded = [t.double().numpy() if t.is_floating_point() else t.numpy() for t in single]
    exact, _, energy, _ = dense(*rounded)
    with limit(-1)[0]:
        found = held_at_zero(*single)
    assert found.converged and found.residual <= 1e-4 and found.mean.dtype == torch.float32
    assert float(found.energy) == pytest.approx(energy, rel=1e-4)
    deviation = np.sqrt(np.outer(rows.diagonal(), cols.diagonal()))
    error, moved = (np.abs(d / deviation).max() for d in (found.mean.numpy() - exact, exact - mean))
    assert error < 1e-3 * moved


@pytest.mark.parametrize(("share", "most", "converged"), [(0.2, 1000, True), (0.5, 2000, False)])
def test_what_float32_cannot_say_is_not_said_to_have_converged(share, most, converged):
    """Half of the iterations are left to float64, whose roundings count."""
    rng = np.random.default_rng(4)
    rows, cols = (
        (basis * np.geomspace(1, 1e-6, 50)) @ basis.T
        for basis in (np.linalg.qr(rng.normal(size=(50, 50)))[0] for _ in range(2))
    )
    mean, held = rng.normal(size=(50, 50)), rng.random((50, 50)) < share
    single = [t.float() if t.is_floating_point() else t for t in tensors(mean, rows, cols, held)]
    with limit(-1)[0]:
        found = held_at_zero(*single, most=most)
    assert found.converged == converged == (found.residual <= 1e-4)
    assert found.iterations <= most


def test_few_that_are_left_precondition():
    """Where nine in ten are held, the inverse of the whole takes a tenth of the iterations."""
    mean, rows, cols, _, held = problem(6, 32, 32, 0.92)
    exact, _, energy, _ = dense(mean, rows, cols, held)
    found = []
    for share in (0.9, 1.1):
        with limit(-1)[0], patch.multiple(conjugate_gradients, _NEARLY_ALL=share):
            found.append(held_at_zero(*tensors(mean, rows, cols, held)))
        np.testing.assert_allclose(found[-1].mean, exact, atol=1e-10)
        assert float(found[-1].energy) == pytest.approx(energy, rel=1e-12)
    assert found[0].iterations < 0.2 * found[1].iterations


def test_one_that_has_not_converged_says_so():
    mean, rows, cols, _, held = problem(2, 48, 48, 0.52)
    found = held_at_zero(*tensors(mean, rows, cols, held), most=3)
    assert found.iterations == 3 and not found.converged and found.residual > 1e-12


@pytest.mark.slow
def test_the_energy_is_of_second_order_in_the_residual():
    """From any start, and from below."""
    mean, rows, cols, _, held = problem(2, 48, 48, 0.52)
    exact = dense(mean, rows, cols, held)[2]
    arguments = tensors(mean, rows, cols, held)
    solved = held_at_zero(*arguments).multipliers
    wrong = torch.tensor(np.random.default_rng(1).normal(size=(48, 48)))
    for size in (1e-3, 1e-5):
        start = solved + size * solved.norm() / wrong.norm() * wrong
        found = held_at_zero(*arguments, start=start, most=0)
        assert found.residual > 0.1 * size and found.iterations == 0
        assert 0 < exact - float(found.energy) < 100 * found.residual**2 * exact


def test_draws_by_the_same_function_have_the_conditional_moments():
    """Matheron's rule: the map from a draw to the new mean is linear, so that its matrix A gives
    the mean Aμ and the covariance AΣAᵀ of all draws.
    """
    mean, rows, cols, _, held = problem(11, 4, 5, 0.4)
    exact, cov, _, _ = dense(mean, rows, cols, held)
    factors = tensors(rows, cols, held)
    unit = torch.eye(20).double().view(20, 4, 5)
    a = torch.stack([held_at_zero(one, *factors).mean.flatten() for one in unit], 1).numpy()
    np.testing.assert_allclose(a @ mean.flatten(), exact.flatten(), atol=1e-12)
    np.testing.assert_allclose(
        a @ np.kron(rows, cols) @ a.T, np.where(held.flatten(), 0, cov), atol=1e-12
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held": torch.ones(3, 4)}, r"held: expected a bool tensor of shape \(3, 4\), got"),
        ({"row_cov": torch.eye(4)}, r"expected mean \(n, m\), row_cov \(n, n\)"),
        ({"start": torch.ones(4, 3)}, r"start: expected multipliers of shape \(3, 4\)"),
        ({"mean": torch.full((3, 4), math.nan)}, "12 not finite"),
        (
            {"row_cov": torch.diag(torch.tensor([1.0, 0.0, 1.0]))},
            "4 of 12 entries have no variance",
        ),
        ({"col_cov": torch.ones(4, 4)}, "not positive definite"),
    ],
)
def test_what_it_refuses(change, words):
    given_ = {
        "mean": torch.ones(3, 4),
        "row_cov": torch.eye(3),
        "col_cov": torch.eye(4),
        "held": torch.ones(3, 4, dtype=torch.bool),
    }
    with pytest.raises(ReductionError, match=words):
        held_at_zero(**(given_ | change))


def test_an_indefinite_covariance_is_refused_by_conjugate_gradients_too():
    mean, rows, cols, _, held = problem(2, 48, 48, 0.52)
    rows[0, 1] = rows[1, 0] = 2 * rows.max()
    with pytest.raises(ReductionError, match="not positive definite"):
        held_at_zero(*tensors(mean, rows, cols, held))


def test_variances_beyond_the_range_of_float32_are_taken_in_float64():
    mean, rows, cols, _, held = problem(2, 48, 48, 0.52)
    arguments = [t.float() if t.is_floating_point() else t for t in tensors(mean, rows, cols, held)]
    known = held_at_zero(*arguments)
    small = held_at_zero(arguments[0], 1e-22 * arguments[1], 1e-21 * arguments[2], arguments[3])
    assert known.converged and small.converged and known.mean.dtype == torch.float32
    torch.testing.assert_close(small.mean, known.mean, atol=1e-3, rtol=0)
