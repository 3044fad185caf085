r"""Reduction of a matrix-normal posterior q(W) = MN(M, R, C), Cov(W_ij, W_kl) = R_ik C_jl, under priors with one variance per row or per column.

Owns the structure `MatrixNormal`; adds it to `gaussian.delta_f` and `gaussian.prune_subset`. Imports torch only.

An eigen-decomposition of the factor that the prior does not touch turns the posterior into independent blocks of the size of the other
factor, so the (rows·columns)² matrix is never formed. The reduced posterior is in general no longer a matrix normal: its moments are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction.gaussian import delta_f, moments, prune_subset, reduced_posterior


@dataclass(frozen=True)
class MatrixNormal:
    """MN(mean, row_cov, col_cov): `mean` of shape (n, m), `row_cov` (n, n), `col_cov` (m, m), both positive definite."""

    mean: Tensor
    row_cov: Tensor
    col_cov: Tensor


class _Blocks(NamedTuple):
    """The problem in the eigenbasis of the column factor: m independent Gaussians of dimension n, the block index first."""

    chol_prec: Tensor  # P, (m, n, n)
    chol_reduced: Tensor  # P̃, (m, n, n)
    mean: Tensor  # μ, (m, n)
    reduced_mean: Tensor  # μ̃
    prior_mean: Tensor  # η
    reduced_prior_mean: Tensor  # η̃
    prior_prec: Tensor  # Π, (n,)
    reduced_prior_prec: Tensor  # Π̃
    basis: Tensor  # columns are the eigenvectors, (m, m)


@delta_f.register
def _(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The dense ΔF as a sum over blocks. `prior` and `reduced_prior` have `mean` that broadcasts to (n, m) and `var` of shape (n, 1), (1, m) or ()."""
    b = _blocks(posterior, prior, reduced_prior)
    half_log_dets = _half_log_det(b.chol_prec) - _half_log_det(b.chol_reduced) + 0.5 * (b.reduced_prior_prec.log() - b.prior_prec.log()).sum() * b.mean.shape[0]
    quadratic = (
        _quadratic(b.chol_prec, b.mean)
        + (b.reduced_prior_prec * b.reduced_prior_mean.square()).sum()
        - (b.prior_prec * b.prior_mean.square()).sum()
        - _quadratic(b.chol_reduced, b.reduced_mean)
    )
    return half_log_dets - 0.5 * quadratic


@reduced_posterior.register
def _(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Any:
    raise ReductionError(
        "the reduced posterior of a matrix normal is in general none; matrix_normal.reduced_mean and reduced_var give its moments, the Dense form all of it"
    )


def reduced_mean(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""μ̃ = P̃⁻¹(Pμ + Π̃η̃ − Πη), of shape (n, m). Arguments and errors as for ΔF."""
    b = _blocks(posterior, prior, reduced_prior)
    mean = (b.basis @ b.reduced_mean).mT
    return mean.mT if _by_column(prior, reduced_prior) else mean


def reduced_var(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The marginal variances under the reduced prior, of shape (n, m): Var W_ij = Σ_b U_jb² (P̃_b⁻¹)_ii with eigenvectors U. Arguments as for ΔF."""
    b = _blocks(posterior, prior, reduced_prior)
    var = (b.basis.square() @ torch.cholesky_inverse(b.chol_reduced).diagonal(dim1=-2, dim2=-1)).mT
    return var.mT if _by_column(prior, reduced_prior) else var


@prune_subset.register
def _(posterior: MatrixNormal, prior: Any, pruned: Tensor) -> tuple[Tensor, MatrixNormal]:
    r"""Whole rows, `pruned` of shape (n,) or (n, 1), or whole columns, (1, m), set to 0: the rest is again a matrix normal, with the other factor as it was.

    .. math:: M_R - R_{RS} R_{SS}^{-1} M_S, \qquad R_{RR} - R_{RS} R_{SS}^{-1} R_{SR}

    `prior` is diagonal, its moments broadcast to (n, m).
    """
    n, m = posterior.mean.shape
    if tuple(pruned.shape) == (1, m) and (n, m) != (1, 1):
        p = moments(prior, posterior.mean)
        flipped = type(p)(p.mean.mT, p.var.mT)
        gain, rest = prune_subset(MatrixNormal(posterior.mean.mT, posterior.col_cov, posterior.row_cov), flipped, pruned[0])
        return gain, MatrixNormal(rest.mean.mT, rest.col_cov, rest.row_cov)
    if tuple(pruned.shape) not in {(n,), (n, 1)}:
        raise ReductionError(
            f"a matrix normal of shape {(n, m)} is pruned by whole rows, a mask of shape ({n},), or whole columns, (1, {m}); got {tuple(pruned.shape)}; "
            "for single entries take the Dense form"
        )
    s = pruned.flatten()
    p = moments(prior, posterior.mean)
    mean = posterior.mean
    chol_row, chol_col = torch.linalg.cholesky(posterior.row_cov[s][:, s]), torch.linalg.cholesky(posterior.col_cov)
    white = torch.linalg.solve_triangular(chol_col, torch.linalg.solve_triangular(chol_row, mean[s], upper=False).mT, upper=False)
    log_q = -m * chol_row.diagonal().log().sum() - s.sum() * chol_col.diagonal().log().sum() - 0.5 * white.square().sum()
    log_p = -0.5 * (p.var[s].log() + p.mean[s].square() / p.var[s]).sum()
    cross = posterior.row_cov[~s][:, s]
    solved = torch.cholesky_solve(cross.mT, chol_row).mT  # R_RS R_SS⁻¹
    return log_q - log_p, MatrixNormal(mean[~s] - solved @ mean[s], posterior.row_cov[~s][:, ~s] - solved @ cross.mT, posterior.col_cov)


def _blocks(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> _Blocks:
    means = [torch.as_tensor(g.mean).to(posterior.mean).expand_as(posterior.mean) for g in (posterior, prior, reduced_prior)]
    row_cov, col_cov = posterior.row_cov, posterior.col_cov
    if _by_column(prior, reduced_prior):
        means, row_cov, col_cov = [mean.mT for mean in means], col_cov, row_cov
    prec, reduced_prec = (1 / torch.as_tensor(g.var).to(row_cov).flatten().expand(row_cov.shape[0]) for g in (prior, reduced_prior))
    if not bool(reduced_prec.isfinite().all()):
        raise ReductionError("the reduced prior must have variance > 0 here; prune_subset is the reduction of rows or columns to a point spike")
    gamma, basis = torch.linalg.eigh(col_cov)
    mean, eta, eta_ = ((m @ basis).mT for m in means)
    p = torch.cholesky_inverse(torch.linalg.cholesky(row_cov)) / gamma[:, None, None]
    p_ = p + torch.diag(reduced_prec - prec)
    chol_reduced, info = torch.linalg.cholesky_ex(p_)
    if bool(info.any()):
        raise ReductionError(
            "the reduced posterior precision P + Π̃ − Π is not positive definite: the posterior is wider than its prior in some direction; "
            "fit longer, or reduce to a narrower prior"
        )
    weighted = (p @ mean[..., None])[..., 0] + reduced_prec * eta_ - prec * eta
    solved = torch.cholesky_solve(weighted[..., None], chol_reduced)[..., 0]
    return _Blocks(torch.linalg.cholesky(p), chol_reduced, mean, solved, eta, eta_, prec, reduced_prec, basis)


def _by_column(prior: Any, reduced_prior: Any) -> bool:
    shapes = [tuple(torch.as_tensor(g.var).shape) for g in (prior, reduced_prior)]
    rows, cols = (any(len(s) == 2 and s[axis] > 1 for s in shapes) for axis in (0, 1))
    if rows and cols:
        raise ReductionError(
            f"a matrix-normal posterior reduces between priors with one variance per row, (n, 1), or per column, (1, m); got {shapes}; "
            "for other priors take the dense form"
        )
    return cols


def _half_log_det(chol: Tensor) -> Tensor:
    return chol.diagonal(dim1=-2, dim2=-1).log().sum()


def _quadratic(chol_prec: Tensor, vectors: Tensor) -> Tensor:
    return (chol_prec.mT @ vectors[..., None]).square().sum()
