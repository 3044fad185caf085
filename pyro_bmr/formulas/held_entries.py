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
from pyro_bmr.formulas.covariance import check_mean, covariance_factor

DENSE_UP_TO = 1024  # entries whose covariance is formed: 8 MB, and exact
_MOST = 2000  # iterations
_ROUNDING = 16  # roundings of a product; a residual below them has no digits left
_NEARLY_ALL = 0.9  # of the entries are held: Σ⁻¹ is near to the inverse of Σ_SS


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
    zero = torch.zeros_like(free)
    if count == 0:
        return HeldAtZero(free.clone(), zero, zero.new_zeros(()).double(), 0.0, 0, True)
    all_vary = bool((rows.diagonal() > 0).all()) and bool((cols.diagonal() > 0).all())
    iterations, rounding = 0, 0.0
    if count <= DENSE_UP_TO:
        values = _by_held(free, rows, cols, held)
    elif held.numel() - count <= DENSE_UP_TO and all_vary:
        values = _by_kept(free, rows, cols, held)
    else:
        values, iterations, rounding = _by_gradients(free, rows, cols, held, start, tolerance, most)
    return _result(free, rows, cols, held, values, iterations, max(tolerance, rounding))


def _result(
    free: Tensor,
    rows: Tensor,
    cols: Tensor,
    held: Tensor,
    values: Tensor,
    iterations: int,
    tolerance: float,
) -> HeldAtZero:
    """What follows from the multipliers, with the residual that they leave."""
    rest = (free - _product(rows, values, cols)).to(free.dtype)
    left = rest.where(held, 0)
    deviations = (rows.diagonal()[:, None] * cols.diagonal()).sqrt()
    size, error = (float((t / deviations)[held].norm()) for t in (free, left))
    residual = error / size if size else 0.0
    # 2⟨Λ, M⟩ − ⟨Λ, RΛC⟩: of second order in the residual
    energy = (values.double() * (free.double() + left.double())).sum()
    return HeldAtZero(
        rest.masked_fill_(held, 0),
        values.to(free.dtype),
        energy,
        residual,
        iterations,
        residual <= tolerance,
    )


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


def precision(cov: Tensor, side: str) -> Tensor:
    """The inverse of the covariance of the rows or columns, in float64."""
    return torch.cholesky_inverse(covariance_factor(cov, f"{side} of the posterior"))


def entries_factor(rows: Tensor, cols: Tensor, where: Tensor) -> Tensor:
    """The Cholesky factor of rows ⊗ cols at the entries `where`, in float64."""
    i, j = where.nonzero().unbind(1)
    block = rows[i][:, i].double() * cols[j][:, j].double()
    chol, info = torch.linalg.cholesky_ex(block)
    if int(info) or not bool(chol.isfinite().all()):
        raise ReductionError(_NOT_POSITIVE)
    return chol


def _by_gradients(
    free: Tensor,
    rows: Tensor,
    cols: Tensor,
    held: Tensor,
    start: Tensor | None,
    tolerance: float,
    most: int,
) -> tuple[Tensor, int, float]:
    """Λ by conjugate gradients in units of standard deviations, on the rows and columns that hold
    an entry; how many iterations; and the relative residual that rounding explains.

    Where float32 has no digits left, they go on in float64.
    """
    i, j = (held.any(axis).nonzero()[:, 0] for axis in (1, 0))
    x = free.new_zeros(len(i), len(j)) if start is None else start[i][:, j]
    used, size, rounding = 0, 0.0, 0.0
    for dtype in dict.fromkeys((free.dtype, torch.float64)):
        factors = rows[i][:, i].to(dtype), cols[j][:, j].to(dtype)
        system, deviations = _System.of(*factors, free[i][:, j].to(dtype), held[i][:, j])
        size = float(system.target.norm())
        x, more, error, rounding = system.solved(
            x.to(dtype) * deviations, tolerance * size, most - used
        )
        x, used = x / deviations, used + more
        if error <= tolerance * size or used >= most:
            break
    values = x.new_zeros(free.shape)
    values[i[:, None], j] = x
    return values, used, rounding / size if size else 0.0


class _System(NamedTuple):
    """(R X C)_S = T with ones on the diagonals of R and C."""

    rows: Tensor
    cols: Tensor
    held: Tensor  # S as numbers
    target: Tensor
    inverses: tuple[Tensor, Tensor] | None  # R⁻¹ and C⁻¹, if they precondition

    @classmethod
    def of(cls, rows: Tensor, cols: Tensor, free: Tensor, held: Tensor) -> tuple[_System, Tensor]:
        """In units of standard deviations, and these."""
        row_std, col_std = rows.diagonal().sqrt()[:, None], cols.diagonal().sqrt()
        inside = held.to(rows.dtype)
        across, along = rows / row_std / row_std.mT, cols / col_std[:, None] / col_std
        target = free / row_std / col_std * inside
        inverses = None
        if int(held.count_nonzero()) >= _NEARLY_ALL * held.numel():
            inverses = (
                precision(across, "rows").to(rows.dtype),
                precision(along, "columns").to(rows.dtype),
            )
        return cls(across, along, inside, target, inverses), row_std * col_std

    def times(self, x: Tensor) -> Tensor:
        return (self.rows @ x @ self.cols).mul_(self.held)

    def preconditioned(self, left: Tensor) -> Tensor:
        if self.inverses is None:
            return left
        return (self.inverses[0] @ left @ self.inverses[1]).mul_(self.held)

    def solved(self, x: Tensor, limit: float, most: int) -> tuple[Tensor, int, float, float]:
        """X, the iterations, its residual, and what rounding leaves of one."""
        x, used, last = x * self.held, 0, float("inf")
        if bool(x.any()) and not float((self.target - self.times(x)).norm()) < float(
            self.target.norm()
        ):
            x = torch.zeros_like(x)
        while True:
            left = self.target - self.times(x)
            error, rounding = float(left.norm()), self._rounding(x)
            # the recursion's residual is not the residual: begin again while that helps
            if error <= max(limit, rounding) or used >= most or not error < 0.5 * last:
                return x, used, error, rounding
            used += self._descend(x, left, limit, most - used)
            last = error

    def _descend(self, x: Tensor, left: Tensor, limit: float, most: int) -> int:
        """Conjugate gradients from X, in place, with its residual; how many iterations."""
        direction = self.preconditioned(left).clone()
        product = _inner(left, direction)
        for count in range(most):
            if float(left.norm()) <= limit:
                return count
            image = self.times(direction)
            curvature = _inner(direction, image)
            if not (curvature > 0 and product > 0):
                # at the last digits, or not positive definite
                if float(left.norm()) < 1e3 * self._rounding(x):
                    return count
                raise ReductionError(_NOT_POSITIVE)
            step = product / curvature
            x.add_(direction, alpha=step)
            left.sub_(image, alpha=step)
            better = self.preconditioned(left)
            before, product = product, _inner(left, better)
            direction.mul_(product / before).add_(better)
        return most

    def _rounding(self, x: Tensor) -> float:
        """‖R‖ ‖X‖ ‖C‖ in roundings."""
        norms = [float(torch.linalg.matrix_norm(t, float("inf"))) for t in (self.rows, self.cols)]
        return _ROUNDING * torch.finfo(x.dtype).eps * norms[0] * norms[1] * float(x.norm())


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


_NOT_POSITIVE = (
    "the covariance of the held entries is not positive definite: give row_cov and col_cov that are"
    " symmetric positive definite, in torch.float64 where they are near to singular"
)


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
