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

_ROUNDING = 16  # roundings of a product; a residual below them has no digits left
_NEARLY_ALL = 0.9  # of the entries are held: Σ⁻¹ is near to the inverse of Σ_SS

NOT_POSITIVE = (
    "the covariance of the held entries is not positive definite: give row_cov and col_cov that are"
    " symmetric positive definite, in torch.float64 where they are near to singular"
)


class Solved(NamedTuple):
    """X, R X C, the iterations, ‖T − (RXC)_S‖, and what rounding leaves of that."""

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
        return cls(across, along, inside, target, inverses), row_std * col_std

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
            used += self._descend(x, left, limit, most - used)
            product, last = self.rows @ x @ self.cols, error
            left = self.target - product * self.held

    def _descend(self, x: Tensor, left: Tensor, limit: float, most: int) -> int:
        """Conjugate gradients from X, in place, with its residual; how many iterations."""
        direction = self.preconditioned(left).clone()
        product = _inner(left, direction)
        for count in range(most):
            if float(left.norm()) <= limit:
                return count
            image = (self.rows @ direction @ self.cols).mul_(self.held)
            curvature = _inner(direction, image)
            if not (curvature > 0 and product > 0):
                # at the last digits, or not positive definite
                if float(left.norm()) < 1e3 * self._rounding(x):
                    return count
                raise ReductionError(NOT_POSITIVE)
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


def precision(cov: Tensor, side: str) -> Tensor:
    """The inverse of the covariance of the rows or columns, in float64."""
    return torch.cholesky_inverse(covariance_factor(cov, f"{side} of the posterior"))
