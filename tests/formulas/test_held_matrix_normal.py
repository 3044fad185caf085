"""The structure of a matrix normal with entries held at zero, against the dense Gaussian."""

import math
import warnings
from dataclasses import fields, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_bmr.errors import PyroBMRWarning, ReductionError
from pyro_bmr.formulas import (
    Dense,
    Diagonal,
    HeldMatrixNormal,
    MatrixNormal,
    held_entries,
    held_evidence,
    held_matrix_normal,
    prune_subset,
)
from pyro_bmr.formulas.held_matrix_normal import held_gain
from tests.exact import random_spd


def problem(seed, n, m, *shares):
    """A matrix normal, a prior, and masks, with nothing neutral in them."""
    rng = np.random.default_rng(seed)
    mean, rows, cols = rng.normal(size=(n, m)), random_spd(rng, n, 0.4), random_spd(rng, m, 0.8)
    prior = Diagonal(torch.tensor(rng.normal(size=(n, m))), torch.tensor(rng.uniform(1, 3, (n, m))))
    masks = [torch.tensor(rng.random((n, m)) < share) for share in shares]
    return MatrixNormal(*(torch.tensor(t) for t in (mean, rows, cols))), prior, *masks


def as_dense(q, prior):
    """Both over all entries."""
    return (
        Dense(q.mean.flatten(), torch.kron(q.row_cov, q.col_cov)),
        Dense(prior.mean.flatten(), torch.diag(prior.var.flatten())),
    )


def no_dense(limit=-1):
    """No factor over more entries than that, wherever one is made."""
    modules = (held_entries, held_evidence, held_matrix_normal)
    return [patch.multiple(module, DENSE_UP_TO=limit) for module in modules]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(1, 6), m=st.integers(2, 6), share=st.floats(0, 1))
def test_single_entries_are_pruned_as_from_the_dense_form(seed, n, m, share):
    q, prior, pruned = problem(seed, n, m, share)
    dense, flat = as_dense(q, prior)
    gain, rest = prune_subset(q, prior, pruned if n > 1 else pruned.expand(n, m))
    exact, left = prune_subset(dense, flat, pruned.flatten())
    assert float(gain) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)
    if isinstance(rest, HeldMatrixNormal):
        kept = ~pruned
        torch.testing.assert_close(rest.mean[kept], left.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(rest.var[kept], left.cov.diagonal(), atol=1e-10, rtol=0)
        assert not rest.mean[pruned].any() and not rest.var[pruned].any() and rest.fits()


def test_step_by_step_is_at_once():
    """Nested sets, the later with entries that were held before or not, come to one answer."""
    q, prior, first, second = problem(4, 7, 8, 0.3, 0.4)
    dense, flat = as_dense(q, prior)
    both = first | second
    one, then = prune_subset(q, prior, first)
    two, last = prune_subset(then, prior, second & then.kept)
    whole, once = prune_subset(q, prior, both)
    assert float(one + two) == pytest.approx(float(whole), abs=1e-10)
    for name in ("mean", "var", "multipliers", "energy", "log_det"):
        torch.testing.assert_close(getattr(last, name), getattr(once, name), atol=1e-9, rtol=1e-10)
    exact = prune_subset(dense, flat, both.flatten())[1]
    torch.testing.assert_close(last.mean[~both], exact.mean, atol=1e-10, rtol=0)
    # M, R and C are as they were
    assert last.free_mean is q.mean and last.row_cov is q.row_cov and last.col_cov is q.col_cov
    with pytest.raises(ReductionError, match=f"{int(first.sum())} entries are no longer there"):
        prune_subset(then, prior, first)


@pytest.mark.parametrize("shares", [(0.3, 0.5), (0.5, 0.9)])
def test_gains_of_steps_are_bounds_where_no_factor_is_exact(shares):
    q, prior, first, second = problem(5, 12, 9, *shares)
    second = first | second
    dense, flat = as_dense(q, prior)
    exact = [float(prune_subset(dense, flat, s.flatten())[0]) for s in (first, second)]
    patches = no_dense()
    with patches[0], patches[1], patches[2]:
        free = HeldMatrixNormal.of(q.mean, q.row_cov, q.col_cov)
        one = free.holding(first)
        two = one.holding(second)
        gains = [held_gain(*pair, prior) for pair in ((free, one), (one, two), (free, two))]
    for (low, high), true in zip(gains, (exact[0], exact[1] - exact[0], exact[1]), strict=True):
        assert low < true < high
    # the whole from the beginning is known as well as by one step
    assert gains[2].upper - gains[2].lower < sum(high - low for low, high in gains[:2])
    assert held_gain(two, two, prior) == (0.0, 0.0)


def test_one_more_entry_is_bounded_by_its_variance_at_first():
    """However wide the bounds of those that were held."""
    q, prior, first = problem(5, 12, 9, 0.6)
    place = tuple((~first).nonzero()[3].tolist())
    second = first.clone()
    second[place] = True
    dense, flat = as_dense(q, prior)
    gains = [float(prune_subset(dense, flat, s.flatten())[0]) for s in (first, second)]
    patches = no_dense()
    with patches[0], patches[1], patches[2]:
        one = HeldMatrixNormal.of(q.mean, q.row_cov, q.col_cov).holding(first)
        two = one.holding(second)
        low, high = held_gain(one, two, prior)
    energy = float(two.energy - one.energy)
    eta, var = (float(t[place]) for t in (prior.mean, prior.var))
    at_first = 0.5 * (math.log(var / float(q.marginal_var[place])) + eta**2 / var - energy)
    assert low == pytest.approx(at_first, abs=1e-9)
    assert low < gains[1] - gains[0] < high


WAYS = {"the kept": (1024, 1), "Σ_SS": (20, 3), "conjugate gradients": (-1, 2)}


def layer():
    """A layer of 4 × 10 with 12 entries held, and the rest in the dense form."""
    q, prior, _ = problem(11, 4, 10, 0.3)
    pruned = torch.zeros(40, dtype=torch.bool)
    pruned[torch.randperm(40, generator=torch.Generator().manual_seed(1))[:12]] = True
    exact = prune_subset(*as_dense(q, prior), pruned)[1]
    return prune_subset(q, prior, pruned.view(4, 10))[1], exact, ~pruned


@pytest.mark.parametrize("way", WAYS)
def test_draws_have_the_conditional_moments(way):
    """By a root of the rest, by one factor of the held entries, and by conjugate gradients for each
    draw. A draw is linear in its noise: A of it gives the covariance AAᵀ of all.
    """
    held, exact, kept = layer()
    limit, count = WAYS[way]
    patches = no_dense(limit)
    with patches[0], patches[1], patches[2]:
        roots = held.roots()
        assert len(roots) == count
        noise = torch.eye(28 if count == 1 else 40).double()
        maps = [
            held.draw(roots, lambda *s, e=e: e.view(s)).flatten() - held.mean.flatten()
            for e in noise
        ]
        none = held.draw(roots, lambda *s: torch.zeros(s).double()).flatten()
    a = torch.stack(maps, 1)
    assert not a[~kept].any() and not none[~kept].any()
    torch.testing.assert_close(none[kept], exact.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(a[kept] @ a[kept].mT, exact.cov, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_20_000_draws_have_the_conditional_moments(way):
    held, exact, kept = layer()
    generator, count = torch.Generator().manual_seed(3), 20_000
    patches = no_dense(WAYS[way][0])
    with patches[0], patches[1], patches[2]:
        roots = held.roots()
        draws = torch.stack(
            [
                held.draw(roots, lambda *s: torch.randn(s, generator=generator).double())
                for _ in range(count)
            ]
        ).flatten(1)
    assert not draws[:, ~kept].any()
    scale = exact.cov.diagonal().sqrt()
    error = (draws[:, kept].mean(0) - exact.mean) / scale
    assert float(error.abs().max()) < 4.5 / math.sqrt(count)
    found = draws[:, kept].mT.cov() / scale / scale[:, None]
    target = exact.cov / scale / scale[:, None]
    assert float((found - target).abs().max()) < 4.8 * math.sqrt(2 / count)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_held_and_all_held(share):
    q, prior, pruned = problem(6, 5, 4, share)
    dense, flat = as_dense(q, prior)
    gain, rest = prune_subset(q, prior, pruned)
    exact = float(prune_subset(dense, flat, pruned.flatten())[0])
    assert float(gain) == pytest.approx(exact, abs=1e-10)
    drawn = rest.draw(rest.roots(), lambda *s: torch.ones(s, dtype=torch.float64))
    if share:
        assert not rest.mean.any() and not rest.var.any() and not drawn.any()
    else:
        torch.testing.assert_close(rest.mean, q.mean)
        torch.testing.assert_close(drawn, q.draw(q.roots(), lambda *s: torch.ones(s).double()))


def test_with_a_multiple_of_the_covariance():
    """The rest has the same mean, so many times the variance, and the evidence of such a Σ."""
    q, prior, pruned = problem(2, 5, 6, 0.4)
    wide = prune_subset(q, prior, pruned)[1].scaled(2.5)
    other = MatrixNormal(q.mean, q.row_cov * 2.5, q.col_cov)
    gain, direct = prune_subset(other, prior, pruned)
    free = HeldMatrixNormal.of(other.mean, other.row_cov, other.col_cov)
    assert held_gain(free, wide, prior).lower == pytest.approx(float(gain), abs=1e-10)
    for name in ("mean", "var", "multipliers"):
        torch.testing.assert_close(getattr(wide, name), getattr(direct, name))
    point = wide.scaled(0.0)
    assert not point.var.any() and torch.equal(point.mean, wide.mean)


def test_masked_entries_are_left_out_and_not_held():
    """The others keep their distribution, before and after more is held."""
    q, prior, out, pruned = problem(9, 4, 5, 0.3, 0.3)
    pruned = pruned & ~out
    dense, _ = as_dense(q, prior)
    masked = q.masked(~out)
    assert isinstance(masked, HeldMatrixNormal) and torch.equal(masked.kept, ~out)
    torch.testing.assert_close(masked.var, q.marginal_var.where(~out, 0))
    keep = (~out).flatten()
    part = Dense(dense.mean[keep], dense.cov[keep][:, keep])
    own = Diagonal(prior.mean.flatten()[keep], prior.var.flatten()[keep])
    exact, left = prune_subset(part, own, pruned.flatten()[keep])
    gain, rest = prune_subset(masked, prior, pruned)
    assert float(gain) == pytest.approx(float(exact), abs=1e-10)
    kept = ~out & ~pruned
    torch.testing.assert_close(rest.mean[kept], left.mean)
    torch.testing.assert_close(rest.var[kept], left.cov.diagonal())
    assert not rest.mean[~kept].any() and not rest.var[~kept].any()
    # Matheron's rule on the part: the covariance that a draw's linear map leaves
    unit = torch.eye(20).double().view(20, 4, 5)
    zero = replace(rest, mean=torch.zeros_like(rest.mean))
    patches = no_dense(-1)
    with patches[0], patches[1], patches[2]:
        maps = torch.stack([zero.draw(zero.roots(), lambda *s, e=e: e) for e in unit], -1)
    assert not maps[~kept].any()
    flat = maps.view(20, 20)[kept.flatten()]
    torch.testing.assert_close(flat @ flat.mT, left.cov)


def test_rows_among_pruned_ones():
    q, prior, pruned = problem(3, 4, 3, 0.4)
    held = prune_subset(q, prior, pruned)[1]
    kept = torch.tensor([True, False, True, True, False, True])
    wide = held.embedded(kept)
    assert wide.fits() and torch.equal(wide.mean[kept], held.mean) and not wide.mean[~kept].any()
    assert wide.whole(kept, False) is wide and held.unit_count == 4
    fresh, _ = problem(3, 4, 3)
    # more is held of the rows that are there, with the same result
    more = torch.zeros(6, 3, dtype=torch.bool)
    more[0] = True
    both = pruned | more[kept]
    torch.testing.assert_close(
        wide.holding(more).mean[kept], prune_subset(fresh, prior, both)[1].mean
    )


def test_a_residual_that_is_left_is_told():
    q, prior, pruned = problem(2, 48, 48, 0.52)
    with (
        patch.object(held_matrix_normal, "held_at_zero", _three_iterations),
        pytest.warns(PyroBMRWarning, match="have not converged: a residual of"),
    ):
        _, rest = prune_subset(q, prior, pruned)
    assert float(rest.residual) > 1e-12
    with (
        patch.object(held_matrix_normal, "held_at_zero", _three_iterations),
        pytest.warns(PyroBMRWarning, match="for a draw of a matrix normal"),
    ):
        rest.draw(rest.roots(), lambda *s: torch.ones(s).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not float(prune_subset(q, prior, pruned)[1].residual)


def _three_iterations(*args, **kwargs):
    return held_entries.held_at_zero(*args, **{**kwargs, "most": 3, "start": None})


def test_what_does_not_fit_is_seen():
    q, prior, pruned = problem(1, 4, 3, 0.4)
    held = prune_subset(q, prior, pruned)[1]
    assert held.fits()
    for field in fields(held):
        assert not replace(held, **{field.name: torch.ones(7)}).fits()
    assert not replace(held, held=held.held.double()).fits()
    for mask, words in (
        (torch.ones(3, 4, dtype=torch.bool), "by whole columns, (1, 3), or by single entries"),
        (torch.ones(4, 3), "expected a bool tensor"),
    ):
        with pytest.raises(ReductionError, match=words.replace("(", r"\(").replace(")", r"\)")):
            prune_subset(q, prior, mask)
    with pytest.raises(ReductionError, match=r"expected a bool tensor of shape \(4, 3\)"):
        prune_subset(held, prior, torch.ones(4, dtype=torch.bool))
    bad = MatrixNormal(q.mean, -q.row_cov, q.col_cov)
    with pytest.raises(ReductionError, match="rows of the posterior is not positive definite"):
        prune_subset(bad, prior, pruned)
