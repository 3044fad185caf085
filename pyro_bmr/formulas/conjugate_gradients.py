r"""Conjugate gradients for the multipliers of held entries: (R X C)_S = M_S with X zero outside of
S.

Owns `System`, and `precision`, the inverse of a factor. Source: Hestenes & Stiefel 1952; the
preconditioners are the diagonal, R_ii C_jj, and the inverse of the whole cut to S where nearly all
entries are held. The residual is kept as M − R X C over all entries: outside of S it is the answer.
Imports torch only. Next: `held_entries.py`.
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
_ROWS = 64  # at once, so that they remain in the cache
_COLUMNS = 512
_NEARLY_ALL = 0.9  # of the entries are held: Σ⁻¹ is near to the inverse of Σ_SS

NOT_POSITIVE = (
    "the covariance of the held entries is not positive definite: give row_cov and col_cov that are"
    " symmetric positive definite, in torch.float64 where they are near to singular"
)


class Solved(NamedTuple):
    """X, M − R X C, the iterations, the residual ‖(M − R X C)_S‖ in standard deviations, and what
    rounding leaves of that. M − R X C is the sum over a few iterations, or a product.
    """

    x: Tensor
    rest: Tensor
    iterations: int
    error: float
    rounding: float


class System(NamedTuple):
    """(R X C)_S = M_S."""

    rows: Tensor
    cols: Tensor
    free: Tensor  # M
    weights: Tensor  # 1 / (R_ii C_jj) at S, else 0
    inverses: tuple[Tensor, Tensor] | None  # R⁻¹ and C⁻¹, if they precondition
    size: float  # ‖R‖ ‖C‖ in the norms of the largest row, in units of standard deviations

    @classmethod
    def of(cls, rows: Tensor, cols: Tensor, free: Tensor, held: Tensor) -> System:
        weights = held / rows.diagonal()[:, None]
        weights /= cols.diagonal()
        inverses = None
        if int(held.count_nonzero()) >= _NEARLY_ALL * held.numel():
            inverses = (
                precision(rows, "rows").to(rows.dtype),
                precision(cols, "columns").to(rows.dtype),
            )
        return cls(rows, cols, free, weights, inverses, _row_norm(rows) * _row_norm(cols))

    def length(self, t: Tensor) -> float:
        """‖t_S‖ in units of standard deviations."""
        parts = zip(t.split(_ROWS), self.weights.split(_ROWS), strict=True)
        return sum(_dot(part * weight, part) for part, weight in parts) ** 0.5

    def solved(self, start: Tensor | None, limit: float, most: int) -> Solved:
        """From `start` on, to a residual of `limit`, by no more than `most` iterations."""
        x = torch.zeros_like(self.free) if start is None else start.where(self.weights > 0, 0)
        rest = self._rest(x) if start is not None and bool(x.any()) else self.free.clone()
        if self.length(rest) > self.length(self.free):
            x, rest = x.zero_(), rest.copy_(self.free)
        used, last = 0, float("inf")
        while True:
            error, rounding = self.length(rest), self._rounding(x)
            # the recursion's residual is not the residual: begin again while that helps
            if error <= max(limit, rounding) or used >= most or not error < 0.5 * last:
                return Solved(x, rest, used, error, rounding)
            count = self._descend(x, rest, limit, most - used)
            used += count
            if count > _FEW:
                rest = self._rest(x)
            last = error

    def _descend(self, x: Tensor, rest: Tensor, limit: float, most: int) -> int:
        """Conjugate gradients from X, in place, with M − R X C; how many iterations."""
        direction, image = torch.zeros_like(x), torch.empty_like(x)
        slope = self._turn(direction, rest, None)
        for count in range(most):
            if self.length(rest) <= limit:
                return count
            self._product(direction, image)
            curvature = _inner(direction, image)  # the direction is 0 outside of S
            if not (curvature > 0 and slope > 0):
                # at the last digits, or not positive definite
                if self.length(rest) < 1e3 * self._rounding(x):
                    return count
                raise ReductionError(NOT_POSITIVE)
            step = slope / curvature
            x.add_(direction, alpha=step)
            rest.sub_(image, alpha=step)
            slope = self._turn(direction, rest, slope)
        return most

    def _turn(self, direction: Tensor, rest: Tensor, before: float | None) -> float:
        """Turns the direction, in place, to the preconditioned residual, conjugate to where it
        pointed when the slope was `before`; the slope, the product of the two residuals.
        """
        if self.inverses is None:
            slope = self.length(rest) ** 2
            better = None
        else:
            inside = self.weights > 0
            better = (self.inverses[0] @ rest.where(inside, 0) @ self.inverses[1]).mul_(inside)
            slope = _inner(rest, better)
        direction.mul_(slope / before if before else 0.0)
        if better is None:
            direction.addcmul_(rest, self.weights)
        else:
            direction.add_(better)
        return slope

    def _product(self, x: Tensor, out: Tensor) -> Tensor:
        """R X C, written to `out`; some columns at a time, for which X C is small."""
        for part, columns in zip(out.split(_COLUMNS, 1), self.cols.split(_COLUMNS, 1), strict=True):
            torch.mm(self.rows, x @ columns, out=part)
        return out

    def _rest(self, x: Tensor) -> Tensor:
        """M − R X C."""
        product = self._product(x, torch.empty_like(x))
        return torch.sub(self.free, product, out=product)

    def _rounding(self, x: Tensor) -> float:
        """‖R‖ ‖X‖ ‖C‖ in roundings."""
        row_var, col_var = self.rows.diagonal(), self.cols.diagonal()
        parts = zip(x.split(_ROWS), row_var.split(_ROWS), strict=True)
        square = sum(float(((part * part) @ col_var) @ var) for part, var in parts)
        return _ROUNDING * torch.finfo(x.dtype).eps * self.size * square**0.5


def _row_norm(cov: Tensor) -> float:
    """The largest Σ_j |R_ij| in units of standard deviations."""
    scale = cov.diagonal().rsqrt()
    parts = zip(cov.split(_ROWS), scale.split(_ROWS), strict=True)
    return max(float((rows.abs() @ scale).mul_(own).max()) for rows, own in parts)


def _inner(a: Tensor, b: Tensor) -> float:
    return sum(map(_dot, a.split(_ROWS), b.split(_ROWS)))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def precision(cov: Tensor, side: str) -> Tensor:
    """The inverse of the covariance of the rows or columns, in float64."""
    return inverse_of_factor(covariance_factor(cov, f"{side} of the posterior"))
