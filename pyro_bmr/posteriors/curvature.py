r"""The Laplace approximation of one weight tensor from a trained value and a curvature, in plain
tensors.

Owns `laplace_moments`; `Posterior.from_curvature` applies it to each site of a network. Next:
`from_numbers.py`.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.formulas.covariance import factor_in_place, symmetrised
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.factor_inverse import inverse_of_factor
from pyro_bmr.formulas.matrix_normal import MatrixNormal

_ASYMMETRY = 1e-4  # of the largest entry: more is no rounding
Curvature = Tensor | tuple[Tensor, Tensor]


def laplace_moments(
    name: str, value: Tensor, curvature: Curvature, prior: Diagonal, penalised: bool
) -> tuple[Tensor, Tensor, Dense | MatrixNormal | None]:
    r"""Mean, variance and, unless the curvature is a diagonal, correlations of N(ŵ − P⁻¹Π(ŵ − η),
    P⁻¹) with P = H + Π.

    With `penalised` the mean is ŵ itself. Arguments as for `Posterior.from_curvature`; the
    curvature in float64, as is all inside, and written over. Where the prior says far more than the
    data the mean is the small difference of ŵ and its shift, and an inverse loses as many digits as
    the eigenvalues are apart.
    """
    dtype, value, prior = (
        value.dtype,
        value.double(),
        Diagonal(prior.mean.double(), prior.var.double()),
    )
    mean, var, joint = _moments(name, value, curvature, prior, penalised)
    rounded = (
        None
        if joint is None
        else type(joint)(*(getattr(joint, field.name).to(dtype) for field in fields(joint)))
    )
    return mean.to(dtype), var.to(dtype), rounded


def _moments(
    name: str, value: Tensor, curvature: Curvature, prior: Diagonal, penalised: bool
) -> tuple[Tensor, Tensor, Dense | MatrixNormal | None]:
    prec = (1 / prior.var).expand_as(value)
    pull = 0 * value if penalised else prec * (value - prior.mean)  # Π(ŵ − η)
    size = value.numel()
    if isinstance(curvature, tuple):
        return _kronecker(name, value, curvature, prior, pull)
    if tuple(curvature.shape) == (size, size) and size > 1:
        cov = _inverse(name, _symmetric(name, curvature) + torch.diag(prec.flatten()))
        mean = value - (cov @ pull.flatten()).view(value.shape)
        return mean, cov.diagonal().view(value.shape).clone(), Dense(mean.flatten(), cov)
    if curvature.shape != value.shape:
        raise ModelError(
            f"site '{name}': expected a curvature of shape {tuple(value.shape)}, or ({size},"
            f" {size}), or a pair of Kronecker factors; got shape {tuple(curvature.shape)}"
        )
    total = curvature + prec
    if bad := int((~((total > 0) & total.isfinite())).sum()):
        raise ModelError(
            f"site '{name}': expected curvature + prior precision > 0 and finite, got {bad} of"
            f" {size} entries that are not; Gauss–Newton and Fisher matrices are never negative,"
            " and IVON's Hessian only as far as the prior allows: curvature λh, prior"
            " Gaussian((λδ) ** -0.5)"
        )
    var = 1 / total
    return value - var * pull, var, None


def _kronecker(
    name: str, value: Tensor, factors: tuple[Tensor, Tensor], prior: Diagonal, pull: Tensor
) -> tuple[Tensor, Tensor, MatrixNormal]:
    matrix = value.flatten(1) if value.ndim > 1 else value[:, None]
    expected, got = (
        [(len(matrix),) * 2, (matrix.shape[1],) * 2],
        [tuple(factor.shape) for factor in factors],
    )
    if got != expected or prior.var.numel() > 1:
        raise ModelError(
            f"site '{name}': expected Kronecker factors of shapes {expected} and a prior of one"
            f" variance, got {got} and {prior.var.numel()} variances"
        )
    rows, columns = (_symmetric(name, factor) for factor in factors)
    ratio = ((rows.trace() / len(rows)) / (columns.trace() / len(columns))).sqrt()
    if not bool(ratio.isfinite() & (ratio > 0)):
        for factor in (rows, columns):
            _check_semidefinite(name, factor)
        raise ModelError(
            f"site '{name}': expected Kronecker factors of positive trace, got traces of"
            f" {float(rows.trace()):.3g} and {float(columns.trace()):.3g}; for a site without"
            " curvature give zeros in its own shape"
        )
    root = prior.var.rsqrt().flatten()[0]
    row_cov, col_cov = (
        _damped_inverse(name, factor, float(damping))
        for factor, damping in ((rows, ratio * root), (columns, root / ratio))
    )
    mean = matrix
    if bool(pull.any()):
        mean = matrix - row_cov @ pull.view(matrix.shape) @ col_cov
    var = row_cov.diagonal()[:, None] * col_cov.diagonal()
    return mean.view(value.shape), var.view(value.shape), MatrixNormal(mean, row_cov, col_cov)


def _symmetric(name: str, matrix: Tensor) -> Tensor:
    """The matrix without the rounding that makes it asymmetric; in place, where it is in
    float64.
    """
    allowed = _ASYMMETRY * _largest(matrix)
    # NaN is refused too
    symmetric = symmetrised(
        matrix, lambda a, b: allowed, matrix if matrix.dtype == torch.float64 else None
    )
    if symmetric is None:
        raise ModelError(
            f"site '{name}': its curvature, or a factor of it, is not symmetric, or not finite;"
            " give a symmetric Gauss–Newton or Fisher matrix"
        )
    return symmetric


def _largest(matrix: Tensor) -> Tensor:
    """The largest absolute value."""
    ends = matrix.aminmax() if matrix.numel() else None
    return matrix.new_zeros(()) if ends is None else torch.maximum(-ends.min, ends.max)


def _check_semidefinite(name: str, matrix: Tensor) -> None:
    """ModelError for an eigenvalue below −10⁻⁴ of the largest entry."""
    largest = float(_largest(matrix))
    if largest:
        # a Cholesky factor of the matrix and so much more has no such eigenvalue; its rounding in
        # float32 is a hundredth of that
        shifted = matrix.float() if 1e-30 < largest < 1e30 else (matrix / largest).float()
        shifted.diagonal().add_(_ASYMMETRY * float(_largest(shifted)))
        if factor_in_place(shifted)[1]:
            raise ModelError(
                f"site '{name}': expected Kronecker factors without negative eigenvalues; give"
                " those of the Gauss–Newton or Fisher matrix"
            )


def _damped_inverse(name: str, factor: Tensor, damping: float) -> Tensor:
    """(factor + damping I)⁻¹, in the memory of the factor."""
    # less damping than a factor may lack: its Cholesky factor is the check
    if damping > _ASYMMETRY * float(_largest(factor)):
        _check_semidefinite(name, factor)
    factor.diagonal().add_(damping)
    return _inverse(name, factor)


def _inverse(name: str, matrix: Tensor) -> Tensor:
    chol, minor = factor_in_place(matrix)
    if minor:
        raise ModelError(
            f"site '{name}': its curvature with the prior is not positive definite; give a"
            " symmetric Gauss–Newton or Fisher matrix"
        )
    return inverse_of_factor(chol)
