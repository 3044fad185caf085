r"""A matrix normal with single entries held at zero: the mean of the rest, and the energy of those
that are held.

Owns `held_at_zero`. With the multipliers Λ, zero outside of the held entries S, that solve
:math:`(R \Lambda C)_S = M_S`,

.. math:: E[W \mid W_S = 0] = M - R \Lambda C, \qquad
    M_S^\top \Sigma_{SS}^{-1} M_S = \langle \Lambda, M \rangle

for W ~ MN(M, R, C). No matrix over all entries is formed. The evidence of holding them is in
`held_evidence.py`. Imports torch only. Next: `held_evidence.py`.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conjugate_gradients import NOT_POSITIVE, System, precision
from pyro_bmr.formulas.covariance import check_mean

DENSE_UP_TO = 1024  # entries whose covariance is formed: 8 MB, and exact
_MOST = 5000  # iterations
_ROWS = 64  # at once, so that they remain in the cache


class HeldAtZero(NamedTuple):
    """`mean`: of W given the zeros, (n, m), exactly 0 there. `multipliers`: Λ. `energy`: M_Sᵀ
    Σ_SS⁻¹ M_S, one number in float64. `residual`: of the equations for Λ in standard deviations,
    relative to M_S. `iterations`: of conjugate gradients, 0 for a direct solution. `converged`:
    whether the residual is within the tolerance, or as small as the dtype allows.
    """

    mean: Tensor
    multipliers: Tensor
    energy: Tensor
    residual: float
    iterations: int
    converged: bool


def held_at_zero(
    mean: Tensor,
    row_cov: Tensor,
    col_cov: Tensor,
    held: Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float | None = None,
    most: int = _MOST,
) -> HeldAtZero:
    r"""W ~ MN(mean, row_cov, col_cov) given that the entries `held` are zero.

    By conjugate gradients with the preconditioner R_ii C_jj (Jacobi's), or (R⁻¹ ⊗ C⁻¹)_SS where
    nine in ten entries are held. An iteration takes 2(n²m + nm²) operations, or twice that, with n
    and m counted over the rows and columns that hold an entry. Where no more than 1,024 entries are
    held, or no more are left, by a Cholesky factor instead, in float64.

    A draw of MN(mean, row_cov, col_cov) in the place of `mean` gives, as the new mean, a draw given
    the zeros (Matheron's rule; Journel & Huijbregts 1978). The mean is the update of the optimal
    brain surgeon (Hassibi & Stork 1993) over a whole layer. The LLM Surgeon (van der Ouderaa et al.
    2024, arXiv 2312.17244) takes it within rows or blocks.

    Args:
        mean, row_cov, col_cov: (n, m), (n, n) and (m, m), with R_ii C_jj > 0 where held.
        held: bool, (n, m).
        start: multipliers to start from, such as those of fewer entries.
        tolerance: of `residual`; by default 1e-4, in float64 1e-12. The error of `energy` is of
            second order in it.
        most: iterations. A result that needs more says that it has not converged.

    Raises:
        ReductionError: shapes or dtypes do not fit, a held entry has no variance, or the covariance
            is not positive definite.
    """
    _check(mean, row_cov, col_cov, held, start)
    parts = torch.float32, mean.dtype, row_cov.dtype, col_cov.dtype
    dtype = reduce(torch.promote_types, parts)
    if tolerance is None:
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    free, rows, cols = (t.to(dtype) for t in (mean, row_cov, col_cov))
    count = int(held.count_nonzero())
    if count == 0:
        zero = torch.zeros_like(free)
        return HeldAtZero(free.clone(), zero, zero.new_zeros(()).double(), 0.0, 0, True)
    all_vary = bool((rows.diagonal() > 0).all()) and bool((cols.diagonal() > 0).all())
    if count <= DENSE_UP_TO:
        solution = _Solution(_by_held(free, rows, cols, held))
    elif held.numel() - count <= DENSE_UP_TO and all_vary:
        solution = _Solution(_by_kept(free, rows, cols, held))
    else:
        solution = _by_gradients(free, rows, cols, held, start, tolerance, most)
    return _result(free, rows, cols, held, solution, tolerance)


class _Solution(NamedTuple):
    """Λ; M − RΛC, if it is there; the iterations; the relative residual that rounding explains."""

    values: Tensor
    rest: Tensor | None = None
    iterations: int = 0
    rounding: float = 0.0


def _result(
    free: Tensor, rows: Tensor, cols: Tensor, held: Tensor, solution: _Solution, tolerance: float
) -> HeldAtZero:
    """What follows from the multipliers, with the residual that they leave."""
    values, rest = solution.values, solution.rest
    if rest is None:
        rest = free - _product(rows, values, cols)
    rest = rest.to(free.dtype)
    size = error = energy = torch.zeros((), dtype=torch.float64, device=free.device)
    col_var = cols.diagonal().double()
    for k, inside in enumerate(held.split(_ROWS)):
        part = slice(k * _ROWS, (k + 1) * _ROWS)
        own, left = (t[part].double().where(inside, 0) for t in (free, rest))
        var = rows.diagonal()[part, None].double() * col_var
        var = var.where(inside, 1)
        size = size + (own.square() / var).sum()
        error = error + (left.square() / var).sum()
        # 2⟨Λ, M⟩ − ⟨Λ, RΛC⟩: of second order in the residual
        energy = energy + (values[part] * (own + left)).sum()
    residual = float((error / size).sqrt()) if float(size) else 0.0
    converged = residual <= max(tolerance, solution.rounding)
    mean, multipliers = rest.masked_fill_(held, 0), values.to(free.dtype)
    return HeldAtZero(mean, multipliers, energy, residual, solution.iterations, converged)


def _by_held(free: Tensor, rows: Tensor, cols: Tensor, held: Tensor) -> Tensor:
    """Λ by the Cholesky factor of Σ_SS, in float64."""
    chol = entries_factor(rows, cols, held)
    own = torch.cholesky_solve(free[held].double()[:, None], chol)[:, 0]
    return free.double().new_zeros(free.shape).masked_scatter_(held, own)


def _by_kept(free: Tensor, rows: Tensor, cols: Tensor, held: Tensor) -> Tensor:
    r"""Λ = P(M − W) with P = Σ⁻¹ and W_K = M_K + P_KK⁻¹ P_KS M_S, K the entries that are not held;
    in float64.
    """
    inner, outer = (precision(cov, side) for cov, side in ((rows, "rows"), (cols, "columns")))
    mean = free.double()
    shift = mean.where(held, 0)
    if bool((~held).any()):
        pulled = (inner @ shift @ outer)[~held]
        chol = entries_factor(inner, outer, ~held)
        shift[~held] = -torch.cholesky_solve(pulled[:, None], chol)[:, 0]
    return (inner @ shift @ outer).where(held, 0)


def entries_factor(rows: Tensor, cols: Tensor, where: Tensor) -> Tensor:
    """The Cholesky factor of rows ⊗ cols at the entries `where`, in float64."""
    i, j = where.nonzero().unbind(1)
    block = rows[i][:, i].double() * cols[j][:, j].double()
    chol, info = torch.linalg.cholesky_ex(block)
    if int(info) or not bool(chol.isfinite().all()):
        raise ReductionError(NOT_POSITIVE)
    return chol


def _by_gradients(
    free: Tensor,
    rows: Tensor,
    cols: Tensor,
    held: Tensor,
    start: Tensor | None,
    tolerance: float,
    most: int,
) -> _Solution:
    """Λ by conjugate gradients on the rows and columns that hold an entry. Where float32 has no
    digits left, they go on in float64.
    """
    i, j = (held.any(axis).nonzero()[:, 0] for axis in (1, 0))
    whole = (len(i), len(j)) == tuple(held.shape)
    x, inside, used = start, held, 0
    if not whole:  # else no copies
        x = None if x is None else x[i][:, j]
        free, inside = (t[i][:, j] for t in (free, held))
        rows, cols = rows[i][:, i], cols[j][:, j]
    for dtype in dict.fromkeys((free.dtype, torch.float64)):
        if dtype != torch.float64 and not _in_range(rows, cols):
            continue
        system = System.of(rows.to(dtype), cols.to(dtype), free.to(dtype), inside)
        limit = tolerance * system.length(system.free)
        # what float32 cannot say is left to float64
        most_here = most if dtype == torch.float64 else -(-most // 2)
        done = system.solved(None if x is None else x.to(dtype), limit, most_here - used)
        x, used = done.x, used + done.iterations
        if done.error <= limit:
            break
    values = done.x
    if not whole:
        values = values.new_zeros(held.shape)
        values[i[:, None], j] = done.x
    rounding = done.rounding * tolerance / limit if limit else 0.0
    return _Solution(values, done.rest if whole else None, used, rounding)


def _in_range(rows: Tensor, cols: Tensor) -> bool:
    """Whether no variance, and no product of two, comes near to the ends of float32."""
    ends = [[float(end) for end in cov.diagonal().aminmax()] for cov in (rows, cols)]
    (low, high), (least, most) = ends
    return min(low, least, low * least) > 1e-30 and max(high, most, high * most) < 1e30


def _product(rows: Tensor, values: Tensor, cols: Tensor) -> Tensor:
    """R Λ C over the rows and columns where Λ is not 0, in the dtype of Λ."""
    i, j = (values.any(axis).nonzero()[:, 0] for axis in (1, 0))
    dtype = values.dtype
    if len(i) == len(rows) and len(j) == len(cols):
        return rows.to(dtype) @ values @ cols.to(dtype)
    return rows[:, i].to(dtype) @ values[i][:, j] @ cols[j].to(dtype)


def _check(
    mean: Tensor, row_cov: Tensor, col_cov: Tensor, held: Tensor, start: Tensor | None
) -> None:
    shape = tuple(mean.shape)
    square = [(size, size) for size in shape]
    if len(shape) != 2 or [tuple(row_cov.shape), tuple(col_cov.shape)] != square:
        shapes = ", ".join(str(tuple(t.shape)) for t in (mean, row_cov, col_cov))
        raise ReductionError(
            f"expected mean (n, m), row_cov (n, n) and col_cov (m, m), got {shapes}"
        )
    if held.dtype != torch.bool or tuple(held.shape) != shape:
        raise ReductionError(
            f"held: expected a bool tensor of shape {shape}, got {held.dtype} of shape"
            f" {tuple(held.shape)}; True holds an entry at zero"
        )
    if start is not None and tuple(start.shape) != shape:
        raise ReductionError(
            f"start: expected multipliers of shape {shape}, got {tuple(start.shape)}; give those of"
            " an earlier held_at_zero"
        )
    check_mean("posterior", mean)
    none = held & ~((row_cov.diagonal()[:, None] > 0) & (col_cov.diagonal() > 0))
    if bool(none.any()):
        raise ReductionError(
            f"held: {int(none.sum())} of {int(held.sum())} entries have no variance; hold entries"
            " whose row_cov and col_cov have positive diagonals"
        )
