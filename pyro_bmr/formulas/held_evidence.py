r"""The evidence of holding entries of a matrix normal at zero, between two bounds, and the
variances of the rest.

Owns `held_delta_f`, `log_det_bounds` and `held_var`. With Σ = R ⊗ C, P its inverse, S the held and
K the other entries, log |Σ_SS| is the only part of ΔF that has no short form. Bounds that need no
matrix over all entries:

.. math:: \sum_S \log d_i c_j \le \log |\Sigma_{SS}| \le \min\Big(\sum_S \log R_{ii} C_{jj},\;
    \log |\Sigma| + \sum_K \log (R^{-1})_{ii} (C^{-1})_{jj}\Big)

with the pivots d, c of the Cholesky factors of R and C: a pivot is the variance given all entries
of the rows or columns before it, held or not; an inverse's diagonal is one over the variance given
all others.
:math:`\log |\Sigma_{SS}| = \log |\Sigma| + \log |P_{KK}|` is Jacobi's identity. Row by row, both
sides are tighter (Fischer's inequality above, the chain rule below):

.. math:: \sum_i |S_i| \log d_i + \log |C_{S_i S_i}| \le \log |\Sigma_{SS}| \le
    \sum_i \log |C_{S_i S_i}| + \min\Big(\sum_i |S_i| \log R_{ii},\;
    m \log |R| + \sum_i |K_i| \log (R^{-1})_{ii}\Big)

and column by column likewise. Imports torch only. Next:
`held_matrix_normal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.formulas.covariance import covariance_factor, half_log_and_energy
from pyro_bmr.formulas.factor_inverse import inverse_of_factor
from pyro_bmr.formulas.held_entries import DENSE_UP_TO, entries_factor

_WORK = 2e9  # operations on the factors of rows, and of columns
_VAR_WORK = 1e10  # operations on exact variances
_MOST_HELD = 0.6
_ROWS = 64  # at once


class Bounds(NamedTuple):
    """The number lies between `lower` and `upper`; they are equal where it is exact."""

    lower: float
    upper: float


def held_delta_f(
    row_cov: Tensor,
    col_cov: Tensor,
    held: Tensor,
    energy: Tensor | float,
    prior: Any,
    *,
    log_det: Bounds | None = None,
) -> Bounds:
    r"""ΔF of holding the entries `held` at zero, log q_S(0) − log p_S(0), between two bounds.

    .. math:: \Delta F = -\tfrac12 \log |\Sigma_{SS}| - \tfrac12 M_S^\top \Sigma_{SS}^{-1} M_S
        + \tfrac12 \sum_S \Big(\log \sigma_0^2 + \frac{\eta^2}{\sigma_0^2}\Big)

    Args:
        row_cov, col_cov, held: as for `held_at_zero`.
        energy: M_Sᵀ Σ_SS⁻¹ M_S, as `held_at_zero` gives it.
        prior: diagonal moments that broadcast to (n, m); its mean may be other than 0.
        log_det: `log_det_bounds`, if they are known.

    Returns:
        Bounds: in nats. The lower one is what is reported as ΔF.
    """
    low, high = log_det or log_det_bounds(row_cov, col_cov, held)
    like = row_cov.new_zeros(()).expand(held.shape)
    rest = float(half_log_and_energy(prior, like, held)) - 0.5 * float(energy)
    return Bounds(rest - 0.5 * high, rest - 0.5 * low)


def log_det_bounds(row_cov: Tensor, col_cov: Tensor, held: Tensor, work: float = _WORK) -> Bounds:
    """Bounds of log |Σ_SS|, in float64. Exact where no more than 1,024 entries are held or no more
    are left, where S is whole rows or whole columns, or all.

    Args:
        row_cov, col_cov, held: as for `held_at_zero`.
        work: the operations that the bounds row by row, or column by column, may take; they are
            left out where they would need more.

    Raises:
        ReductionError: a covariance is not symmetric positive definite.
    """
    i, j = (held.any(axis).nonzero()[:, 0] for axis in (1, 0))
    inside, count = held[i][:, j], int(held.count_nonzero())
    if count == 0:
        return Bounds(0.0, 0.0)
    if count <= DENSE_UP_TO:
        return _exact(2 * _log_diagonal(entries_factor(row_cov, col_cov, held)))
    # Σ over the rows and columns that hold an entry
    counts = _counts(inside)
    rows, cols = (
        _Side.of(_among(row_cov, i), counts[0], "rows"),
        _Side.of(_among(col_cov, j), counts[1], "columns"),
    )
    whole = inside.shape[1] * rows.log_det + inside.shape[0] * cols.log_det
    left = inside.numel() - count
    if left == 0:
        return _exact(whole)
    if left <= DENSE_UP_TO:
        root = entries_factor(rows.precision, cols.precision, ~inside)
        return _exact(whole + 2 * _log_diagonal(root))
    lower = [_over(counts, rows.log_pivot, cols.log_pivot)]
    upper = [_over(counts, rows.log_var, cols.log_var)]
    most = count > _MOST_HELD * inside.numel()  # else the inverses say less
    if most:
        others = inside.shape[1] - counts[0], inside.shape[0] - counts[1]
        upper.append(whole + _over(others, rows.log_precision, cols.log_precision))
    sides = (rows, cols, inside, counts[0]), (cols, rows, inside.mT, counts[1])
    for one, other, mask, size in sides:
        if _blocks_work(size, mask.shape[1]) > work:
            continue
        inner = _blocks(mask, other)
        lower.append(inner + float((size * one.log_pivot).sum()))
        upper.append(inner + float((size * one.log_var).sum()))
        if most:
            spread = mask.shape[1] * one.log_det
            rest = float(((mask.shape[1] - size) * one.log_precision).sum())
            upper.append(inner + spread + rest)
    return Bounds(max(lower), min(upper))


def held_var(row_cov: Tensor, col_cov: Tensor, held: Tensor) -> tuple[Tensor, bool]:
    r"""The variances of the entries given that those `held` are zero, 0 there, of shape (n, m); and
    whether they are exact.

    .. math:: R_{ii} C_{jj} - \Sigma_{kS} \Sigma_{SS}^{-1} \Sigma_{Sk}

    Exact where few entries are held or few are left, as far as 1,024 and 10¹⁰ operations go. Else
    R_ii C_jj, the variances before anything was held, which are at least the exact ones.
    """
    i, j = ((t.diagonal() > 0).nonzero()[:, 0] for t in (row_cov, col_cov))
    first = (row_cov.diagonal()[:, None] * col_cov.diagonal()).masked_fill(held, 0)
    if len(i) * len(j) < first.numel():  # rows or columns that are gone
        part, exact = held_var(row_cov[i][:, i], col_cov[j][:, j], held[i][:, j])
        first[i[:, None], j] = part
        return first, exact
    count = int(held.count_nonzero())
    left = held.numel() - count
    if count == 0 or left == 0:
        return first, True
    if left <= DENSE_UP_TO:
        parts = (covariance_factor(t, "posterior") for t in (row_cov, col_cov))
        inverses = [inverse_of_factor(t) for t in parts]
        root = entries_factor(inverses[0], inverses[1], ~held)
        rest = inverse_of_factor(root).diagonal()
        return first.masked_scatter(~held, rest.to(first)), True
    if count > DENSE_UP_TO or float(count) ** 2 * left > _VAR_WORK:
        return first, False
    chol = entries_factor(row_cov, col_cov, held)
    i, j = held.nonzero().unbind(1)
    rows, cols = (~held).nonzero().unbind(1)
    explained = torch.empty(left, dtype=torch.float64, device=held.device)
    for piece in torch.arange(left, device=held.device).split(1 << 14):
        cross = row_cov[i][:, rows[piece]].double() * col_cov[j][:, cols[piece]].double()
        white = torch.linalg.solve_triangular(chol, cross, upper=False)
        explained[piece] = white.square().sum(0)
    rest = first[~held].double() - explained
    return first.masked_scatter(~held, rest.clamp_min(0).to(first)), True


@dataclass(frozen=True)
class _Side:
    """The factor of the rows, or of the columns, that hold an entry, in float64: those with the
    most first, since a pivot is larger the fewer stand before it.
    """

    cov: Tensor
    chol: Tensor
    back: Tensor  # from that order to their own

    @classmethod
    def of(cls, cov: Tensor, count: Tensor, side: str) -> _Side:
        """`count`: of the held entries of each."""
        order = count.argsort(descending=True, stable=True)
        chol = covariance_factor(cov, f"{side} of the posterior", order)
        return cls(cov, chol, order.argsort())

    @cached_property
    def log_pivot(self) -> Tensor:
        return 2 * self.chol.diagonal().log()[self.back]

    @cached_property
    def log_det(self) -> float:
        return float(self.log_pivot.sum())

    @cached_property
    def precision(self) -> Tensor:
        return inverse_of_factor(self.chol.clone())[self.back][:, self.back]

    @property
    def log_var(self) -> Tensor:
        return self.cov.diagonal().double().log()

    @property
    def log_precision(self) -> Tensor:
        return self.precision.diagonal().log()


def _among(cov: Tensor, places: Tensor) -> Tensor:
    return cov if len(places) == len(cov) else cov[places][:, places]


def _exact(value: float) -> Bounds:
    return Bounds(value, value)


def _log_diagonal(chol: Tensor) -> float:
    return float(chol.diagonal().log().sum())


def _counts(where: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of each row, and of each column; some rows at a time, since a sum first
    makes integers of them all.
    """
    parts = where.split(_ROWS)
    by_column = sum((part.sum(0) for part in parts), torch.zeros_like(where[0], dtype=torch.long))
    return torch.cat([part.sum(1) for part in parts]), by_column


def _over(counts: tuple[Tensor, Tensor], rows: Tensor, cols: Tensor) -> float:
    """Σ over the entries of what their row and their column give."""
    return float((counts[0] * rows).sum() + (counts[1] * cols).sum())


def _blocks_work(held: Tensor, size: int) -> float:
    """The operations for a factor for each row of `size` entries, over those that are held or the
    others.
    """
    return float(torch.minimum(held, size - held).double().pow(3).sum()) / 3


def _blocks(mask: Tensor, other: _Side) -> float:
    """Σ over the rows of log |C_{S_i S_i}|, each distinct set once."""
    distinct, counts = mask.unique(dim=0, return_counts=True)
    total = 0.0
    for held, count in zip(distinct, counts.tolist(), strict=True):
        inner, few = other.log_det, ~held
        if int(held.sum()) <= int(few.sum()):
            inner, few = 0.0, held
        block = (other.cov if few is held else other.precision)[few][:, few]
        chol, _ = torch.linalg.cholesky_ex(block.double())
        total += count * (inner + 2 * _log_diagonal(chol))
    return total
