r"""Reduction of a matrix-normal posterior q(W) = MN(M, R, C), Cov(W_ij, W_kl) = R_ik C_jl, under priors with one variance per row or per column.

Owns the structure `MatrixNormal`; adds it to `gaussian.delta_f`. Imports torch only.

An eigen-decomposition of the factor that the prior does not touch turns the posterior into independent blocks of the size of the other
factor, so the (rows·columns)² matrix is never formed. The reduced posterior is in general no longer a matrix normal: its mean is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction.gaussian import delta_f, reduced_posterior


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
    raise ReductionError("the reduced posterior of a matrix normal is in general none; matrix_normal.reduced_mean gives its mean, the Dense form all of it")


def reduced_mean(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""μ̃ = P̃⁻¹(Pμ + Π̃η̃ − Πη), of shape (n, m). Arguments and errors as for ΔF."""
    b = _blocks(posterior, prior, reduced_prior)
    mean = (b.basis @ b.reduced_mean).mT
    return mean.mT if _by_column(prior, reduced_prior) else mean


def _blocks(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> _Blocks:
    means = [torch.as_tensor(g.mean).to(posterior.mean).expand_as(posterior.mean) for g in (posterior, prior, reduced_prior)]
    row_cov, col_cov = posterior.row_cov, posterior.col_cov
    if _by_column(prior, reduced_prior):
        means, row_cov, col_cov = [mean.mT for mean in means], col_cov, row_cov
    prec, reduced_prec = (1 / torch.as_tensor(g.var).to(row_cov).flatten().expand(row_cov.shape[0]) for g in (prior, reduced_prior))
    if not bool(reduced_prec.isfinite().all()):
        raise ReductionError("the reduced prior must have variance > 0 here; for a point spike take the Dense form and prune_subset")
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
