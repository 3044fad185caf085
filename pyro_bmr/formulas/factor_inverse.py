r"""The inverse of a symmetric positive definite matrix, in place.

Owns `inverse_of_factor` and `damped_inverse`. LAPACK's `potri` needs a second matrix here, and from
some thousand rows on it reaches a third of the speed of a product in float64. By blocks nearly all
operations are products (Du Croz & Higham 1992, Stability of methods for matrix inversion). Imports
torch only. Next: `conditioning.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.formulas.covariance import factor_in_place

_TILE = 256
_RESIDUAL = 1e-4  # of an inverse in float32
_PROBES = 8
_ROWS = 512  # at once


def damped_inverse(matrix: Tensor, damping: float, own: bool = False) -> Tensor | None:
    """(matrix + damping I)⁻¹ in the dtype of the matrix, which is symmetric; None unless it is
    positive definite in float64.

    Computed in float32 where the matrix has no more digits, and the residual of solutions is below
    10⁻⁴; else in float64. The rounding of the matrix in float32 changes its inverse by as much.

    Args:
        own: whether the matrix may be written over.
    """
    wide = torch.float64
    for dtype in (wide,) if matrix.dtype == wide else (torch.float32, wide):
        damped = matrix.to(dtype, copy=not (own and matrix.dtype == wide))
        damped.diagonal().add_(damping)
        chol, minor = factor_in_place(damped)
        if not minor and (dtype == wide or _solves(chol, matrix, damping)):
            return inverse_of_factor(chol).to(matrix.dtype)
        del damped, chol
    return None


def _solves(chol: Tensor, matrix: Tensor, damping: float) -> bool:
    """Whether L Lᵀ x = v is solved for some v to a residual of 10⁻⁴, in units in which the damped
    matrix has ones on its diagonal: an entry C_ij of its inverse is then as near in units of the
    root of C_ii C_jj.
    """
    generator = torch.Generator().manual_seed(0)
    units = (matrix.diagonal() + damping).sqrt()[:, None]
    drawn = torch.randn(len(matrix), _PROBES, generator=generator, device="cpu").to(chol)
    x = torch.cholesky_solve(drawn * units, chol).double()
    product = torch.cat([rows.double() @ x for rows in matrix.split(_ROWS)])
    left = (product + damping * x) / units - drawn
    return float(left.norm()) <= _RESIDUAL * float(drawn.norm())


def inverse_of_factor(chol: Tensor) -> Tensor:
    r"""(L Lᵀ)⁻¹ from the lower triangular L, written over L.

    .. math:: (L L^\top)^{-1} = Y Y^\top, \qquad Y = L^{-\top}, \qquad
        \begin{pmatrix} A & B \\ 0 & C \end{pmatrix}^{-1} =
        \begin{pmatrix} A^{-1} & -A^{-1} B C^{-1} \\ 0 & C^{-1} \end{pmatrix}

    These are 2/3 n³ operations, and 1/3 n³ for the factor before.

    Args:
        chol: (n, n), zero above its diagonal.
    """
    upper = chol.mT  # in rows, as `factor_in_place` leaves it
    _invert_triangle(upper)
    places = _tiles(len(upper))
    for k in places:  # a block of columns of YYᵀ needs none of those to its left
        upper[: k.stop, k] = upper[: k.stop, k.start :] @ upper[k, k.start :].mT
    for number, k in enumerate(places):
        for before in places[:number]:
            upper[k, before] = upper[before, k].mT
        tile = upper[k, k].triu(1)
        upper[k, k] = upper[k, k].diagonal().diag() + tile + tile.mT
    return upper if upper.is_contiguous() else chol


def _invert_triangle(upper: Tensor) -> None:
    """In place."""
    size = len(upper)
    if size <= _TILE:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    half = (size // 2 + _TILE - 1) // _TILE * _TILE
    first, right, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert_triangle(first)
    _invert_triangle(last)
    # products with triangles, half of the operations of full ones
    for k in _tiles(half):
        right[k] = first[k, k.start :] @ right[k.start :]
    for k in reversed(_tiles(size - half)):
        right[:, k] = right[:, : k.stop] @ last[: k.stop, k]
    right.neg_()


def _tiles(size: int) -> list[slice]:
    return [slice(k, min(k + _TILE, size)) for k in range(0, size, _TILE)]
