r"""Matrix-normal Gaussians q(W) = MN(M, R, C), Cov(W_ij, W_kl) = R_ik C_jl, under priors with one
variance per row or per column.

Owns the structure `MatrixNormal` and its forms of `prune_subset` and `initial_state`. Imports torch
only. Next: `matrix_blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.conditioning import State, SweptState, initial_state, log_prior_at_zero
from pyro_bmr.formulas.covariance import (
    check_mean,
    covariance_factor,
    half_log_and_energy,
    symmetric_covariance,
)
from pyro_bmr.formulas.diagonal import Diagonal, moments, rounded
from pyro_bmr.formulas.gaussian import prune_subset
from pyro_bmr.formulas.held_matrix_normal import HeldMatrixNormal
from pyro_bmr.formulas.structure import (
    Correlated,
    Noise,
    covariance_root,
    spread,
    spread_square,
)


@dataclass(frozen=True)
class MatrixNormal:
    """MN(mean, row_cov, col_cov): `mean` of shape (n, m), `row_cov` (n, n), `col_cov` (m, m), both
    positive definite.
    """

    mean: Tensor
    row_cov: Tensor
    col_cov: Tensor

    @property
    def mT(self) -> MatrixNormal:  # as of a tensor
        """The transpose."""
        return MatrixNormal(self.mean.mT, self.col_cov, self.row_cov)

    @property
    def marginal_var(self) -> Tensor:
        """R_ii C_jj."""
        return self.row_cov.diagonal()[:, None] * self.col_cov.diagonal()

    @property
    def unit_count(self) -> int:
        """The number of rows."""
        return len(self.mean)

    def fits(self) -> bool:
        """Whether the shapes are (n, m), (n, n) and (m, m)."""
        d = self.mean.shape
        square = [(size, size) for size in d]
        return len(d) == 2 and [self.row_cov.shape, self.col_cov.shape] == square

    def scaled(self, factor: float) -> MatrixNormal:
        """With `factor` times the covariance."""
        return MatrixNormal(self.mean, self.row_cov * factor, self.col_cov)

    def masked(self, kept: Tensor) -> MatrixNormal | HeldMatrixNormal:
        """With mean, variance and covariances 0 for the entries that are not `kept`."""
        kept = kept.reshape(self.mean.shape)
        rows, columns = kept.any(1), kept.any(0)
        if not bool((kept == rows[:, None] & columns).all()):
            return HeldMatrixNormal.of(self.mean, self.row_cov, self.col_cov).masked(kept)
        return MatrixNormal(
            self.mean.where(kept, 0),
            self.row_cov * (rows[:, None] & rows),
            self.col_cov * (columns[:, None] & columns),
        )

    def embedded(self, kept: Tensor) -> MatrixNormal:
        """As the `kept` rows among pruned ones."""
        return MatrixNormal(
            spread(self.mean, kept), spread_square(self.row_cov, kept), self.col_cov
        )

    def whole(self, kept: Tensor, turned: bool) -> MatrixNormal:
        """As the `kept` rows and columns of a site; `turned`: its own rows are their columns."""
        kept = _as_matrix(kept)
        upright = self.mT if turned else self
        return upright.embedded(kept.any(1)).mT.embedded(kept.any(0)).mT

    def correlated(self, prior: Any, kept: Tensor, labels: Tensor | None) -> Correlated | None:
        """The `kept` rows and columns, if the groups are of whole rows or of whole columns; None
        else: single entries take a `HeldMatrixNormal`.
        """
        shape, matrix = kept.shape, _as_matrix(kept)
        rows, columns = matrix.any(1), matrix.any(0)
        if labels is None or not torch.equal(matrix, rows[:, None] & columns):
            return None
        inner = labels.to(kept.device).reshape(matrix.shape)[rows][:, columns]
        by_row = bool((inner == inner[:, :1]).all())
        if not by_row and not bool((inner == inner[:1]).all()):
            return None
        number = (rows.cumsum(0) - 1)[:, None] if by_row else columns.cumsum(0) - 1
        units = torch.where(matrix, number.expand(matrix.shape), -1).view(shape)
        part = MatrixNormal(
            self.mean[rows][:, columns],
            self.row_cov[rows][:, rows],
            self.col_cov[columns][:, columns],
        )
        mean, var = (_as_matrix(t)[rows][:, columns] for t in (prior.mean, prior.var))
        if by_row:
            return Correlated(part, Diagonal(mean, var), inner[:, 0], units)
        return Correlated(part.mT, Diagonal(mean.mT, var.mT), inner[0], units, turned=True)

    def roots(self) -> tuple[Tensor, ...]:
        """T of the covariance TTᵀ of the rows, and of the columns."""
        return covariance_root(self.row_cov), covariance_root(self.col_cov)

    def draw(self, roots: tuple[Tensor, ...], noise: Noise) -> Tensor:
        """M + T_R ε T_Cᵀ."""
        return self.mean + roots[0] @ noise(*self.mean.shape) @ roots[1].mT


def _as_matrix(t: Tensor) -> Tensor:
    """Of a site, over its first dimension and the others."""
    return t.flatten(1) if t.ndim > 1 else t[:, None]


@prune_subset.register
def _(
    posterior: MatrixNormal, prior: Any, pruned: Tensor
) -> tuple[Tensor, MatrixNormal | HeldMatrixNormal]:
    r"""Whole rows, `pruned` of shape (n,) or (n, 1), or whole columns, (1, m), set to 0: the rest
    is again a matrix normal, with the other factor as it was.

    .. math:: M_R - R_{RS} R_{SS}^{-1} M_S, \qquad R_{RR} - R_{RS} R_{SS}^{-1} R_{SR}

    Single entries, (n, m): a `HeldMatrixNormal` of all entries, and the lower bound of ΔF. `prior`
    is diagonal, its moments broadcast to (n, m).
    """
    n, m = posterior.mean.shape if posterior.mean.ndim == 2 else (0, 0)
    if pruned.dtype != torch.bool:
        raise ReductionError(f"pruned: expected a bool tensor, got {pruned.dtype}")
    if tuple(pruned.shape) == (1, m) and (n, m) != (1, 1):
        p = moments(prior, posterior.mean)
        flipped = Diagonal(p.mean.mT, p.var.mT)
        gain, rest = prune_subset(posterior.mT, flipped, pruned[0])
        return gain, rest.mT
    if tuple(pruned.shape) == (n, m) and (n, m) != (n, 1):
        checked(posterior)
        free = HeldMatrixNormal.of(posterior.mean, posterior.row_cov, posterior.col_cov)
        return prune_subset(free, prior, pruned)
    if tuple(pruned.shape) not in {(n,), (n, 1)}:
        raise ReductionError(
            f"a matrix normal of shape {(n, m)} is pruned by whole rows, a mask of shape ({n},), by"
            f" whole columns, (1, {m}), or by single entries, ({n}, {m}); got {tuple(pruned.shape)}"
        )
    mean, _, col = checked(posterior)
    s, r = pruned.flatten().nonzero()[:, 0], (~pruned.flatten()).nonzero()[:, 0]
    size = len(s)
    chol_row = covariance_factor(posterior.row_cov, "rows of the posterior", torch.cat([s, r]))
    white = torch.linalg.solve_triangular(chol_row[:size, :size], mean[s], upper=False)
    energy = torch.linalg.solve_triangular(col, white.mT, upper=False).square().sum()
    log_q = (
        -m * chol_row[:size, :size].diagonal().log().sum()
        - size * col.diagonal().log().sum()
        - 0.5 * energy
    )
    gain = log_q + half_log_and_energy(prior, posterior.mean, pruned.view(n, 1).expand(n, m))
    left, dtype = chol_row[size:, size:], matrix_dtype(posterior)
    rest, row_cov = (
        rounded(t, dtype, "the rest")
        for t in (mean[r] - chol_row[size:, :size] @ white, left @ left.mT)
    )
    return rounded(gain, dtype, "ΔF"), MatrixNormal(rest, row_cov, posterior.col_cov)


@initial_state.register
def _(posterior: MatrixNormal, prior: Any) -> State:
    mean, _, chol = checked(posterior)
    # columns independent, with the covariance of the rows
    white = torch.linalg.solve_triangular(chol, mean.mT, upper=False).mT
    row_cov = symmetric_covariance(posterior.row_cov, "rows of the posterior")
    held = torch.zeros(len(white), dtype=torch.bool, device=white.device)
    log_p, constant = log_prior_at_zero(prior, mean).sum(1), -float(chol.diagonal().log().sum())
    return SweptState(row_cov, white, held, log_p, None, constant, row_cov.diagonal())


def checked(posterior: MatrixNormal) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, and the Cholesky factors of the row and the column covariance, in float64.

    Raises:
        ReductionError: shapes do not fit, the mean is not finite, or a covariance is not symmetric
            positive definite.
    """
    if not posterior.fits():
        shapes = ", ".join(
            str(tuple(t.shape)) for t in (posterior.mean, posterior.row_cov, posterior.col_cov)
        )
        raise ReductionError(
            f"MatrixNormal: expected mean (n, m), row_cov (n, n) and col_cov (m, m), got {shapes}"
        )
    check_mean("posterior", posterior.mean)
    rows, columns = (
        covariance_factor(cov, f"{side} of the posterior")
        for side, cov in (("rows", posterior.row_cov), ("columns", posterior.col_cov))
    )
    return posterior.mean.double(), rows, columns


def matrix_dtype(g: MatrixNormal) -> torch.dtype:
    """The dtype of the answers about it."""
    return torch.promote_types(torch.promote_types(g.mean.dtype, g.row_cov.dtype), g.col_cov.dtype)
