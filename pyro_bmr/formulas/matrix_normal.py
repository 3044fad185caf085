r"""Matrix-normal Gaussians q(W) = MN(M, R, C), Cov(W_ij, W_kl) = R_ik C_jl, under priors with one
variance per row or per column.

Owns the structure `MatrixNormal` and its forms of `delta_f`, `prune_subset` and `initial_state`.
Imports torch only. Next: `log_gamma.py`.

An eigen-decomposition of the factor that the prior does not touch turns the posterior into
independent blocks of the size of the other factor, so the (rows·columns)² matrix is never formed.
In general the reduced posterior is not a matrix normal: its moments are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
from pyro_bmr.formulas.dense import JointReduction, joint_reduction
from pyro_bmr.formulas.diagonal import Diagonal, check_diagonal, moments, rounded
from pyro_bmr.formulas.gaussian import delta_f, prune_subset, reduced_posterior, rescaled
from pyro_bmr.formulas.structure import (
    Correlated,
    Noise,
    Rescaled,
    covariance_root,
    spread,
    spread_square,
)

_SPREAD = 1e-13  # of the eigenvalues of a column covariance: below, the small ones are rounding


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

    def masked(self, kept: Tensor) -> MatrixNormal | None:
        """With mean, variance and covariances 0 outside of the `kept` rows and columns; None where
        single entries are kept.
        """
        kept = kept.reshape(self.mean.shape)
        rows, columns = kept.any(1), kept.any(0)
        if not bool((kept == rows[:, None] & columns).all()):
            return None
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
        else, since the rest of single entries has no closed form.
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


class _Blocks(NamedTuple):
    """The reduction in the eigenbasis of the column factor: m independent Gaussians of dimension n,
    the block index first.
    """

    done: JointReduction  # ΔF (m,), mean (m, n) from that of the reduced prior, root (m, n, n)
    reduced_prior_mean: Tensor  # (n, m) as it was
    basis: Tensor  # columns are the eigenvectors, (m, m)
    turned: bool  # rows and columns changed places


@delta_f.register
def _(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The dense ΔF as a sum over blocks. `prior` and `reduced_prior` have `mean` that broadcasts
    to (n, m) and `var` of shape (n, 1), (1, m) or ().
    """
    return rounded(
        _blocks(posterior, prior, reduced_prior).done.delta_f.sum(), _dtype(posterior), "ΔF"
    )


@reduced_posterior.register
def _(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Any:
    raise ReductionError(
        "the reduced posterior of a matrix normal is in general no matrix normal;"
        " matrix_normal.reduced_mean and reduced_var give its moments, the Dense form all of it"
    )


def reduced_mean(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""μ̃ = P̃⁻¹(Pμ + Π̃η̃ − Πη), of shape (n, m). Arguments and errors as for ΔF."""
    b = _blocks(posterior, prior, reduced_prior)
    mean = b.reduced_prior_mean + (b.basis @ b.done.mean).mT
    return rounded(mean.mT if b.turned else mean, _dtype(posterior), "the reduced mean")


def reduced_var(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The marginal variances under the reduced prior, of shape (n, m): Var W_ij = Σ_b U_jb²
    (P̃_b⁻¹)_ii with eigenvectors U. Arguments as for ΔF.
    """
    b = _blocks(posterior, prior, reduced_prior)
    var = (b.basis.square() @ b.done.root.square().sum(-1)).mT
    return rounded(var.mT if b.turned else var, _dtype(posterior), "the reduced variance")


@prune_subset.register
def _(posterior: MatrixNormal, prior: Any, pruned: Tensor) -> tuple[Tensor, MatrixNormal]:
    r"""Whole rows, `pruned` of shape (n,) or (n, 1), or whole columns, (1, m), set to 0: the rest
    is again a matrix normal, with the other factor as it was.

    .. math:: M_R - R_{RS} R_{SS}^{-1} M_S, \qquad R_{RR} - R_{RS} R_{SS}^{-1} R_{SR}

    `prior` is diagonal, its moments broadcast to (n, m).
    """
    n, m = posterior.mean.shape if posterior.mean.ndim == 2 else (0, 0)
    if pruned.dtype != torch.bool:
        raise ReductionError(f"pruned: expected a bool tensor, got {pruned.dtype}")
    if tuple(pruned.shape) == (1, m) and (n, m) != (1, 1):
        p = moments(prior, posterior.mean)
        flipped = Diagonal(p.mean.mT, p.var.mT)
        gain, rest = prune_subset(posterior.mT, flipped, pruned[0])
        return gain, rest.mT
    if tuple(pruned.shape) not in {(n,), (n, 1)}:
        raise ReductionError(
            f"a matrix normal of shape {(n, m)} is pruned by whole rows, a mask of shape ({n},), or"
            f" whole columns, (1, {m}); got {tuple(pruned.shape)}; for single entries take the"
            " Dense form"
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
    left, dtype = chol_row[size:, size:], _dtype(posterior)
    rest, row_cov = (
        rounded(t, dtype, "the rest")
        for t in (mean[r] - chol_row[size:, :size] @ white, left @ left.mT)
    )
    return rounded(gain, dtype, "ΔF"), MatrixNormal(rest, row_cov, posterior.col_cov)


@rescaled.register
def _(posterior: MatrixNormal, prior: Any, target: Any) -> Rescaled | None:
    """Its marginal moments, between priors with one variance for all entries."""
    if any(bool((g.var != g.var.flatten()[0]).any()) for g in (prior, target)):
        return None
    two = [Diagonal(g.mean, g.var.flatten()[0]) for g in (prior, target)]
    mean, var = reduced_mean(posterior, *two), reduced_var(posterior, *two)
    return Rescaled(float(delta_f(posterior, *two)), mean, var, None)


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


def _blocks(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> _Blocks:
    mean, rows, columns = checked(posterior)
    turned = _by_column(prior, reduced_prior)
    p, p_ = moments(prior, posterior.mean), moments(reduced_prior, posterior.mean)
    check_diagonal("prior", p)
    check_diagonal("reduced prior", p_, ">= 0")
    if not bool((p_.var > 0).all()):
        raise ReductionError(
            "reduced prior: expected variances > 0, got"
            f" {int((p_.var <= 0).sum())} that are 0; prune_subset is the reduction of rows or"
            " columns to a point spike"
        )
    tensors = [mean, *(t.double() for t in (p.mean, p.var, p_.mean, p_.var))]
    col_cov = posterior.col_cov
    if turned:
        tensors, rows, col_cov = [t.mT for t in tensors], columns, posterior.row_cov
    mean, eta, var, eta_, reduced = tensors
    gamma, basis = torch.linalg.eigh((col_cov.double() + col_cov.double().mT) / 2)
    if not bool(gamma.min() > _SPREAD * gamma.max()):
        raise ReductionError(
            f"the {'rows' if turned else 'columns'} of the posterior are correlated too strongly:"
            " their covariance has no digits left"
        )
    prior_root, reduced_root = (torch.diag(v[:, 0].sqrt()) for v in (var, reduced))
    distance, shift = (((t @ basis).mT) for t in (mean - eta_, eta_ - eta))
    done = joint_reduction(
        gamma.sqrt()[:, None, None] * rows, prior_root, reduced_root, distance, shift
    )
    return _Blocks(done, eta_, basis, turned)


def _by_column(prior: Any, reduced_prior: Any) -> bool:
    shapes = [
        tuple(torch.as_tensor(g.var if hasattr(g, "var") else g.variance).shape)
        for g in (prior, reduced_prior)
    ]
    rows, cols = (any(len(s) == 2 and s[axis] > 1 for s in shapes) for axis in (0, 1))
    if (rows and cols) or any(len(s) == 1 and s[0] > 1 for s in shapes):
        raise ReductionError(
            "a matrix-normal posterior reduces between priors with one variance per row, (n, 1),"
            f" or per column, (1, m); got {shapes}; for other priors take the dense form"
        )
    return cols


def _dtype(g: MatrixNormal) -> torch.dtype:
    return torch.promote_types(torch.promote_types(g.mean.dtype, g.row_cov.dtype), g.col_cov.dtype)
