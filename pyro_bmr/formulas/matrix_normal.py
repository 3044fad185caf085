r"""Reduction of a matrix-normal posterior q(W) = MN(M, R, C), Cov(W_ij, W_kl) = R_ik C_jl, under
priors with one variance per row or per column.

Owns the structure `MatrixNormal`; adds it to `gaussian.delta_f` and `gaussian.prune_subset`.
Imports torch only.

An eigen-decomposition of the factor that the prior does not touch turns the posterior into
independent blocks of the size of the other factor, so the (rows·columns)² matrix is never formed.
The reduced posterior is in general no longer a matrix normal: its moments are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.dense import (
    JointReduction,
    check_mean,
    covariance_factor,
    half_log_and_energy,
    joint_reduction,
)
from pyro_bmr.formulas.gaussian import (
    Diagonal,
    check_diagonal,
    delta_f,
    moments,
    prune_subset,
    reduced_posterior,
    rounded,
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
        "the reduced posterior of a matrix normal is in general none; matrix_normal.reduced_mean"
        " and reduced_var give its moments, the Dense form all of it"
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
        raise ReductionError(f"pruned: a bool tensor is wanted, got {pruned.dtype}")
    if tuple(pruned.shape) == (1, m) and (n, m) != (1, 1):
        p = moments(prior, posterior.mean)
        flipped = Diagonal(p.mean.mT, p.var.mT)
        gain, rest = prune_subset(
            MatrixNormal(posterior.mean.mT, posterior.col_cov, posterior.row_cov),
            flipped,
            pruned[0],
        )
        return gain, MatrixNormal(rest.mean.mT, rest.col_cov, rest.row_cov)
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


def checked(posterior: MatrixNormal) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, and the Cholesky factors of the row and the column covariance, in float64.

    Raises:
        ReductionError: shapes do not fit, the mean is not finite, or a covariance is not symmetric
            positive definite.
    """
    shape = posterior.mean.shape
    if (
        len(shape) != 2
        or posterior.row_cov.shape != (shape[0], shape[0])
        or posterior.col_cov.shape != (shape[1], shape[1])
    ):
        shapes = ", ".join(
            str(tuple(t.shape)) for t in (posterior.mean, posterior.row_cov, posterior.col_cov)
        )
        raise ReductionError(
            f"MatrixNormal: mean (n, m), row_cov (n, n) and col_cov (m, m) are wanted, got {shapes}"
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
            "the reduced prior must have variance > 0 here; prune_subset is the reduction of rows"
            " or columns to a point spike"
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
