r"""The Laplace approximation of one weight tensor from a trained value and a curvature, in plain
tensors.

Owns `laplace_moments` and `evidence_scale`; `Posterior.from_curvature` applies them to each site of
a network. Next: `from_numbers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.formulas.covariance import factor_in_place, symmetrised
from pyro_bmr.formulas.dense import Dense
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.factor_inverse import damped_inverse, inverse_of_factor
from pyro_bmr.formulas.laplace_evidence import LaplaceEvidence
from pyro_bmr.formulas.matrix_normal import MatrixNormal

_ASYMMETRY = 1e-4  # of the largest entry: more is no rounding
_NOT_DEFINITE = (
    "its curvature with the prior is not positive definite; give a symmetric Gauss–Newton or Fisher"
    " matrix"
)
Curvature = Tensor | tuple[Tensor, Tensor]


def laplace_moments(
    name: str,
    value: Tensor,
    curvature: Sequence[Tensor],
    prior: Diagonal,
    penalised: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Dense | MatrixNormal | None]:
    r"""Mean, variance and, unless the curvature is a diagonal, correlations of N(ŵ − P⁻¹Π(ŵ − η),
    P⁻¹) with P = H/T + Π.

    With `penalised` the mean is ŵ itself. Arguments as for `Posterior.from_curvature`; `curvature`
    is one tensor, or two Kronecker factors. All inside is in float64: where the prior says far more
    than the data the mean is the small difference of ŵ and its shift. Only the inverses of factors
    in float32 are in float32, if the mean is ŵ and they have digits enough (`damped_inverse`).
    """
    wide = Diagonal(prior.mean.double(), prior.var.double())
    if len(curvature) == 2:
        rows, columns = curvature
        return _kronecker(name, value, rows, columns, wide, penalised, temperature)
    whole = curvature[0].to(torch.float64, copy=True).div_(temperature)
    mean, var, joint = _moments(name, value.double(), whole, wide, penalised)
    dtype = value.dtype
    if joint is not None:
        joint = Dense(joint.mean.to(dtype), joint.cov.to(dtype))
    return mean.to(dtype), var.to(dtype), joint


def evidence_scale(
    name: str,
    value: Tensor,
    curvature: Sequence[Tensor],
    mean: float | Tensor,
    temperature: float,
) -> float:
    """The scale of the prior N(mean, s²) of the most evidence; arguments as for `laplace_moments`.

    ŵ counts as the maximum of the likelihood: no training had the penalty of a scale that was not
    known yet. Weights that the data say nothing of do not count then. As the mode under that prior
    they would, with all of their distance from its mean, such as that of their random start.

    Raises:
        ModelError: it has no maximum.
    """
    distance = value.double() - torch.as_tensor(mean, dtype=torch.float64, device=value.device)
    size = value.numel()
    shapes = [tuple(t.shape) for t in curvature]
    if len(curvature) == 2:
        matrix = value.flatten(1) if value.ndim > 1 else value[:, None]
        _check_factors(name, matrix, shapes)
    elif shapes[0] not in (tuple(value.shape), (size, size)):
        _refuse_shape(name, value, curvature[0])
    diagonal = len(curvature) == 1 and shapes[0] == tuple(value.shape)
    parts = (
        list(curvature)
        if diagonal
        else [_symmetric(name, t, torch.empty_like(t, dtype=torch.float64)) for t in curvature]
    )
    if not all(bool(part.isfinite().all()) for part in parts):
        raise ModelError(f"site '{name}': expected a finite curvature, got infinite or NaN entries")
    columns = parts[1] if len(parts) == 2 else None
    evidence = LaplaceEvidence.of(distance, parts[0], columns, temperature, penalised=False)
    scale = evidence.best_scale()
    if not 0 < scale < math.inf:
        why = "curvature is 0 or less" if scale else "value is no better than the mean of its prior"
        raise ModelError(
            f"site '{name}': the evidence has no maximum over the scale of its prior, since its"
            f" {why}; give it a number, prior={{'{name}': Gaussian(0.1), '*': Gaussian()}}"
        )
    return scale


def _moments(
    name: str, value: Tensor, curvature: Tensor, prior: Diagonal, penalised: bool
) -> tuple[Tensor, Tensor, Dense | None]:
    prec = (1 / prior.var).expand_as(value)
    pull = 0 * value if penalised else prec * (value - prior.mean)  # Π(ŵ − η)
    size = value.numel()
    if tuple(curvature.shape) == (size, size) and size > 1:
        cov = _inverse(name, _symmetric(name, curvature) + torch.diag(prec.flatten()))
        mean = value - (cov @ pull.flatten()).view(value.shape)
        return mean, cov.diagonal().view(value.shape).clone(), Dense(mean.flatten(), cov)
    if curvature.shape != value.shape:
        _refuse_shape(name, value, curvature)
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
    name: str,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    prior: Diagonal,
    penalised: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, MatrixNormal]:
    matrix = value.flatten(1) if value.ndim > 1 else value[:, None]
    _check_factors(name, matrix, [tuple(t.shape) for t in (rows, columns)], prior.var.numel())
    single = penalised and {t.dtype for t in (value, rows, columns)} == {torch.float32}
    dtype = torch.float32 if single else torch.float64
    own = [_symmetric(name, t, torch.empty_like(t, dtype=dtype)) for t in (rows, columns)]
    traces = [float(t.diagonal().double().mean()) for t in own]
    ratio = math.sqrt(traces[0] / temperature / traces[1]) if min(traces) > 0 else math.nan
    if not 0 < ratio < math.inf:
        for factor in own:
            _check_semidefinite(name, factor)
        raise ModelError(
            f"site '{name}': expected Kronecker factors of positive trace, got mean eigenvalues of"
            f" {traces[0]:.3g} and {traces[1]:.3g}; for a site without curvature give zeros in its"
            " own shape"
        )
    root = float(prior.var.rsqrt().flatten()[0])
    # (G/T + εI)⁻¹ = T (G + TεI)⁻¹
    row_cov = _damped_inverse(name, own, temperature * ratio * root).mul_(temperature)
    col_cov = _damped_inverse(name, own, root / ratio)
    mean = matrix.clone(memory_format=torch.contiguous_format)
    if not penalised:
        pull = (matrix.double() - prior.mean.expand_as(value).reshape(matrix.shape)) * root**2
        mean = matrix - row_cov @ pull @ col_cov
    joint = MatrixNormal(*(t.to(value.dtype) for t in (mean, row_cov, col_cov)))
    var = (row_cov.diagonal().double()[:, None] * col_cov.diagonal()).to(value.dtype)
    return joint.mean.view(value.shape), var.view(value.shape), joint


def _check_factors(
    name: str, matrix: Tensor, got: list[tuple[int, ...]], variances: int = 1
) -> None:
    """ModelError unless the shapes are those of factors of the matrix, and the prior has one
    variance.
    """
    expected = [(len(matrix),) * 2, (matrix.shape[1],) * 2]
    if got != expected or variances > 1:
        raise ModelError(
            f"site '{name}': expected Kronecker factors of shapes {expected} and a prior of one"
            f" variance, got {got} and {variances} variances"
        )


def _refuse_shape(name: str, value: Tensor, curvature: Tensor) -> NoReturn:
    size = value.numel()
    raise ModelError(
        f"site '{name}': expected a curvature of shape {tuple(value.shape)}, or ({size}, {size}),"
        f" or a pair of Kronecker factors; got shape {tuple(curvature.shape)}"
    )


def _symmetric(name: str, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix without the rounding that makes it asymmetric, written to `out` or over it."""
    allowed = _ASYMMETRY * _largest(matrix)
    # NaN is refused too
    symmetric = symmetrised(matrix, lambda a, b: allowed, matrix if out is None else out)
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
        usual = 1e-30 < largest < 1e30
        shifted = matrix.to(torch.float32, copy=True) if usual else (matrix / largest).float()
        shifted.diagonal().add_(_ASYMMETRY * float(_largest(shifted)))
        if factor_in_place(shifted)[1]:
            raise ModelError(
                f"site '{name}': expected Kronecker factors without negative eigenvalues; give"
                " those of the Gauss–Newton or Fisher matrix"
            )


def _damped_inverse(name: str, factors: list[Tensor], damping: float) -> Tensor:
    """(F + damping I)⁻¹ for the first of the factors, which is taken from the list and is written
    over.
    """
    factor = factors.pop(0)
    # less damping than a factor may lack: its Cholesky factor is the check
    if damping > _ASYMMETRY * float(_largest(factor)):
        _check_semidefinite(name, factor)
    found = damped_inverse(factor, damping, own=True)
    if found is None:
        raise ModelError(f"site '{name}': {_NOT_DEFINITE}")
    return found


def _inverse(name: str, matrix: Tensor) -> Tensor:
    chol, minor = factor_in_place(matrix)
    if minor:
        raise ModelError(f"site '{name}': {_NOT_DEFINITE}")
    return inverse_of_factor(chol)
