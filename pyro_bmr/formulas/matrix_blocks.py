"""Matrix-normal Gaussians between two priors, block by block.

Owns the forms of `delta_f` and `rescaled` of a `MatrixNormal`, `reduced_mean` and `reduced_var`.
Imports torch only. Next: `log_gamma.py`.

An eigen-decomposition of the factor that the prior does not touch turns the posterior into
independent blocks of the size of the other factor, so the (rows·columns)² matrix is never formed.
In general the reduced posterior is not a matrix normal: its moments are given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.dense import JointReduction, joint_reduction
from pyro_bmr.formulas.diagonal import Diagonal, positive_priors, rounded
from pyro_bmr.formulas.gaussian import delta_f, reduced_posterior, rescaled
from pyro_bmr.formulas.matrix_normal import MatrixNormal, checked, matrix_dtype
from pyro_bmr.formulas.structure import Rescaled

_SPREAD = 1e-13  # of the eigenvalues of a column covariance: below, the small ones are rounding


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
        _blocks(posterior, prior, reduced_prior).done.delta_f.sum(), matrix_dtype(posterior), "ΔF"
    )


@reduced_posterior.register
def _(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Any:
    raise ReductionError(
        "the reduced posterior of a matrix normal is in general no matrix normal;"
        " matrix_blocks.reduced_mean and reduced_var give its moments, the Dense form all of it"
    )


def reduced_mean(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""μ̃ = P̃⁻¹(Pμ + Π̃η̃ − Πη), of shape (n, m). Arguments and errors as for ΔF."""
    b = _blocks(posterior, prior, reduced_prior)
    mean = b.reduced_prior_mean + (b.basis @ b.done.mean).mT
    return rounded(mean.mT if b.turned else mean, matrix_dtype(posterior), "the reduced mean")


def reduced_var(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> Tensor:
    r"""The marginal variances under the reduced prior, of shape (n, m): Var W_ij = Σ_b U_jb²
    (P̃_b⁻¹)_ii with eigenvectors U. Arguments as for ΔF.
    """
    b = _blocks(posterior, prior, reduced_prior)
    var = (b.basis.square() @ b.done.root.square().sum(-1)).mT
    return rounded(var.mT if b.turned else var, matrix_dtype(posterior), "the reduced variance")


@rescaled.register
def _(posterior: MatrixNormal, prior: Any, target: Any) -> Rescaled | None:
    """Its marginal moments, between priors with one variance for all entries."""
    if any(bool((g.var != g.var.flatten()[0]).any()) for g in (prior, target)):
        return None
    two = [Diagonal(g.mean, g.var.flatten()[0]) for g in (prior, target)]
    mean, var = reduced_mean(posterior, *two), reduced_var(posterior, *two)
    return Rescaled(float(delta_f(posterior, *two)), mean, var, None)


def _blocks(posterior: MatrixNormal, prior: Any, reduced_prior: Any) -> _Blocks:
    mean, rows, columns = checked(posterior)
    turned = _by_column(prior, reduced_prior)
    spike = "prune_subset is the reduction of rows or columns to a point spike"
    p, p_ = positive_priors(prior, reduced_prior, posterior.mean, spike)
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
