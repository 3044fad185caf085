r"""Conjugate gradients for the multipliers of held entries, (R X C)_S = T with X and T zero outside
of S.

Owns `System`, and `precision`, the inverse of a factor. Source: Hestenes & Stiefel 1952; the
preconditioners are the diagonal (the units are standard deviations), and the inverse of the whole
cut to S where nearly all entries are held. Imports torch only. Next: `held_entries.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.covariance import covariance_factor
from pyro_bmr.formulas.factor_inverse import inverse_of_factor

_ROUNDING = 16  # roundings of a product; a residual below them has no digits left
_FEW = 8  # iterations whose sum R X C has no more rounding than a product
_ROWS = 256  # at once
_NEARLY_ALL = 0.9  # of the entries are held: Σ⁻¹ is near to the inverse of Σ_SS

NOT_POSITIVE = (
    "the covariance of the held entries is not positive definite: give row_cov and col_cov that are"
    " symmetric positive definite, in torch.float64 where they are near to singular"
)


class Solved(NamedTuple):
    """X, R X C, the iterations, ‖T − (RXC)_S‖, and what rounding leaves of that. R X C is the sum
    over a few iterations, or a product.
    """

    x: Tensor
    product: Tensor
    iterations: int
    error: float
    rounding: float


class System(NamedTuple):
    """(R X C)_S = T with ones on the diagonals of R and C."""

    rows: Tensor
    cols: Tensor
    held: Tensor  # S as numbers
    target: Tensor
    inverses: tuple[Tensor, Tensor] | None  # R⁻¹ and C⁻¹, if they precondition
    size: float  # ‖R‖ ‖C‖ in the norms of the largest row

    @classmethod
    def of(cls, rows: Tensor, cols: Tensor, free: Tensor, held: Tensor) -> tuple[System, Tensor]:
        """In units of standard deviations, and these."""
        row_std, col_std = rows.diagonal().sqrt()[:, None], cols.diagonal().sqrt()
        inside = held.to(rows.dtype)
        across = (rows / row_std).div_(row_std.mT)
        along = (cols / col_std[:, None]).div_(col_std)
        target = free / row_std / col_std * inside
        inverses = None
        if int(held.count_nonzero()) >= _NEARLY_ALL * held.numel():
            inverses = (
                precision(across, "rows").to(rows.dtype),
                precision(along, "columns").to(rows.dtype),
            )
        size = _row_norm(across) * _row_norm(along)
        return cls(across, along, inside, target, inverses, size), row_std * col_std

    def preconditioned(self, left: Tensor) -> Tensor:
        if self.inverses is None:
            return left
        return (self.inverses[0] @ left @ self.inverses[1]).mul_(self.held)

    def solved(self, x: Tensor, limit: float, most: int) -> Solved:
        """From X on, to a residual of `limit`, by no more than `most` iterations."""
        x = x * self.held
        product = self.rows @ x @ self.cols if bool(x.any()) else torch.zeros_like(x)
        left, used, last = self.target - product * self.held, 0, float("inf")
        if float(left.norm()) > float(self.target.norm()):
            x, product, left = x.zero_(), product.zero_(), self.target.clone()
        while True:
            error, rounding = float(left.norm()), self._rounding(x)
            # the recursion's residual is not the residual: begin again while that helps
            if error <= max(limit, rounding) or used >= most or not error < 0.5 * last:
                return Solved(x, product, used, error, rounding)
            count = self._descend(x, product, left, limit, most - used)
            used += count
            if count > _FEW:
                product = self.rows @ x @ self.cols
            last = error
            left = self.target - product * self.held

    def _descend(self, x: Tensor, product: Tensor, left: Tensor, limit: float, most: int) -> int:
        """Conjugate gradients from X, in place, with R X C and the residual; how many
        iterations.
        """
        direction = self.preconditioned(left).clone()
        slope = _inner(left, direction)
        for count in range(most):
            if float(left.norm()) <= limit:
                return count
            image = self.rows @ direction @ self.cols
            curvature = _inner(direction, image)  # the direction is 0 outside of S
            if not (curvature > 0 and slope > 0):
                # at the last digits, or not positive definite
                if float(left.norm()) < 1e3 * self._rounding(x):
                    return count
                raise ReductionError(NOT_POSITIVE)
            step = slope / curvature
            x.add_(direction, alpha=step)
            product.add_(image, alpha=step)
            left.addcmul_(image, self.held, value=-step)
            better = self.preconditioned(left)
            before, slope = slope, _inner(left, better)
            direction.mul_(slope / before).add_(better)
        return most

    def _rounding(self, x: Tensor) -> float:
        """‖R‖ ‖X‖ ‖C‖ in roundings."""
        return _ROUNDING * torch.finfo(x.dtype).eps * self.size * float(x.norm())


def _row_norm(matrix: Tensor) -> float:
    return max(float(rows.abs().sum(1).max()) for rows in matrix.split(_ROWS))


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def precision(cov: Tensor, side: str) -> Tensor:
    """The inverse of the covariance of the rows or columns, in float64."""
    return inverse_of_factor(covariance_factor(cov, f"{side} of the posterior"))
