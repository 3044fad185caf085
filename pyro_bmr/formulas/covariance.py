"""What a covariance and a mean must be, and their energy under a diagonal prior.

Owns `covariance_factor`, `factor_in_place`, `symmetrised`, `symmetric_covariance`, `check_mean` and
`half_log_and_energy`. Imports torch only. Next: `factor_inverse.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.diagonal import Diagonal, check_diagonal, moments, number

# roundings of float64: a conditional variance that small in a marginal one has few digits left
_PIVOT = 1e3
_TILE = 128  # with its transpose in the cache


def covariance_factor(cov: Tensor, role: str, order: Tensor | None = None) -> Tensor:
    """The Cholesky factor of a covariance in float64, its rows and columns in `order`.

    Raises:
        ReductionError: the matrix has NaN or infinities, is not symmetric, not positive definite,
            or so near to singular that float64 cannot tell.
    """
    scale, wide = _scale(cov), None
    if order is not None:
        scale, wide = scale[order], _ordered(cov, order)
    symmetric = symmetrised(
        cov if wide is None else wide, lambda a, b: scale[a, None] * scale[b], wide
    )
    if symmetric is None or not cov.is_floating_point():
        raise ReductionError(_fault(cov, role, 0))
    variances = symmetric.diagonal().clone()
    factor, minor = factor_in_place(symmetric)
    pivots = factor.diagonal().square()
    clear = pivots >= _PIVOT * torch.finfo(torch.float64).eps * variances
    if minor or not bool(clear.all()):
        raise ReductionError(_fault(cov, role, minor))
    return factor


def _ordered(cov: Tensor, order: Tensor) -> Tensor:
    """With rows and columns in another order, in float64; without a copy in its own dtype."""
    out = torch.empty_like(cov, dtype=torch.float64, memory_format=torch.contiguous_format)
    for rows, places in zip(out.split(_TILE), order.split(_TILE), strict=True):
        rows.copy_(cov.index_select(0, places).index_select(1, order))
    return out


def factor_in_place(symmetric: Tensor) -> tuple[Tensor, int]:
    """The Cholesky factor of a symmetric matrix, in its memory; and the order of the leading minor
    that is not positive, 0 if all are.
    """
    columns = symmetric.contiguous().mT  # LAPACK's order, else torch copies
    info = torch.empty((), dtype=torch.int32, device=columns.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    return columns, int(info)


def symmetrised(
    matrix: Tensor, allowed: Callable[[slice, slice], Tensor], out: Tensor | None = None
) -> Tensor | None:
    """The average of a matrix and its transpose in float64; None unless they differ by no more
    than `allowed` of these rows and columns, which NaN and infinities never do. `out`: where to put
    it, which may be the matrix itself.

    By tiles, since a transpose that leaves the cache takes longer than a product.
    """
    if out is None:
        out = torch.empty_like(matrix, dtype=torch.float64, memory_format=torch.contiguous_format)
    places = [slice(first, first + _TILE) for first in range(0, len(matrix), _TILE)]
    for k, a in enumerate(places):
        for b in places[k:]:
            tile, other = matrix[a, b].double(), matrix[b, a].mT.double()
            if not bool(((tile - other).abs() <= allowed(a, b)).all()):
                return None
            out[a, b] = mean = (tile + other) / 2
            out[b, a] = mean.mT
    return out


def _scale(cov: Tensor) -> Tensor:
    """Whose products two entries may differ by that ought to be one: what products and inverses
    leave.
    """
    return cov.diagonal().double().clamp(min=0).sqrt() * torch.finfo(_floating(cov)).eps ** 0.25


def _floating(cov: Tensor) -> torch.dtype:
    return cov.dtype if cov.is_floating_point() else torch.float64


def _even(cov: Tensor) -> Tensor:
    """Where an entry is that of the transpose, but for what products and inverses leave; False for
    NaN and infinities.
    """
    matrix, scale = cov.double(), _scale(cov)
    return (matrix - matrix.mT).abs() <= scale[:, None] * scale


def _fault(cov: Tensor, role: str, minor: int) -> str:
    """What is wrong with a matrix that is no covariance."""
    if not cov.is_floating_point():
        return (
            f"covariance of the {role}: expected floating-point numbers, got {cov.dtype}; give"
            " tensor.float()"
        )
    if bad := int((~cov.isfinite()).sum()):
        return f"the covariance of the {role} has {bad} entries that are not finite"
    if bool((cov.diagonal() <= 0).any()):
        return (
            f"the {role} is not positive definite: {int((cov.diagonal() <= 0).sum())} of {len(cov)}"
            " variances are not positive"
        )
    if uneven := int((~_even(cov)).sum()):
        return (
            f"the covariance of the {role} is not symmetric: {uneven // 2} pairs of entries differ"
            " by more than rounding; if their average is what is meant, give (cov + cov.mT) / 2"
        )
    if minor:
        return (
            f"the {role} is not positive definite (leading minor {minor} of {len(cov)}); give a"
            " symmetric positive definite covariance"
            + (", and one near to singular in torch.float64" if cov.dtype != torch.float64 else "")
        )
    return (
        f"the {role} is not positive definite to the precision of float64: an entry is a linear"
        " combination of others; leave one of them out"
    )


def check_mean(role: str, mean: Tensor) -> None:
    """ReductionError unless the mean is finite."""
    if not mean.is_floating_point() or not bool(mean.isfinite().all()):
        raise ReductionError(
            f"mean of the {role}: expected finite floating-point numbers, got {mean.dtype} with"
            f" {int((~mean.isfinite()).sum())} not finite"
        )


def half_log_and_energy(prior: Any, like: Tensor, where: Tensor) -> Tensor:
    """Σ ½ log σ₀² + ½ η²/σ₀² of a diagonal prior over the entries `where`, in float64."""
    p = moments(prior, like)
    mean, var = number(p.mean), number(p.var)
    if mean.ndim == 0 and var.ndim == 0:  # the same for all entries
        check_diagonal("prior", Diagonal(mean, var))
        mean, var = mean.double(), var.double()
        return 0.5 * (var.log() + mean * (mean / var)) * where.count_nonzero()
    check_diagonal("prior", p)
    mean, var = p.mean[where].double(), p.var[where].double()
    return 0.5 * (var.log() + mean * (mean / var)).sum()


def symmetric_covariance(cov: Tensor, role: str) -> Tensor:
    """A covariance that has been checked, in float64."""
    covariance_factor(cov, role)
    return (cov.double() + cov.double().mT) / 2
