r"""The evidence that whole rows or columns of a layer are zero, with all of their correlations.

Owns `grouped_delta_f`, `rows_delta_f` and `columns_delta_f`. For the rows I of W ~ MN(M, R, C)
under N(0, s²), with |S| entries in all,

.. math:: \Delta F_I = \tfrac12 \Big( |S| \log s^2 - m \log |R_{II}| - |I| \log |C_{ww}| -
    \mathrm{tr}\, R_{II}^{-1} M_I C_{ww}^{-1} M_I^\top \Big)

where w are the m columns of the weight. The bias is free, so that C_ww⁻¹ is a Schur complement of
C⁻¹, and M_i C_ww⁻¹ M_iᵀ is the variance of what the row adds up, but for the prior. R is that given
the rows that are held already, the inverse of the block of the others of R⁻¹. A sum over single
entries (`Layer.delta_f`) has none of this: inputs that are alike count many times there.
Next: `masks.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.factor_inverse import damped_inverse
from pyro_bmr.post_training.layer import Layer, Precisions


def grouped_delta_f(layer: Layer, inverse: Precisions, labels: Tensor, count: int) -> Tensor | None:
    """ΔF of each group from 0 to `count` − 1, nats, where all groups are of whole rows, or all are
    of whole columns; else None. `labels`: the group of each entry in the shape of the parameter.
    """
    matrix = layer.as_matrix(labels)
    if _is_constant(matrix, 1):
        return rows_delta_f(layer, inverse, matrix[:, 0], count)
    if _is_constant(matrix, 0):
        return columns_delta_f(layer, inverse, matrix[0], count)
    return None


def _is_constant(labels: Tensor, axis: int) -> bool:
    """Along that axis."""
    return bool((labels == labels.narrow(axis, 0, 1)).all())


def rows_delta_f(layer: Layer, inverse: Precisions, groups: Tensor, count: int) -> Tensor:
    """ΔF of each group of rows that are not held, (count,), nats. `groups`: the group of each row,
    −1: in none.
    """
    width, weight = layer.columns, layer.mean[:, : layer.columns].double()
    columns = inverse.columns.double()
    inner = columns[:width, :width]
    log_det = -_log_det(columns)
    power = weight @ inner @ weight.mT
    if layer.bias is not None:
        log_det += math.log(float(columns[-1, -1]))
        with_bias = weight @ columns[:width, -1]
        power -= torch.outer(with_bias, with_bias) / columns[-1, -1]
    prior = width * math.log(layer.scale**2)
    held = layer.held[:, :width].all(1)
    cov = _given(held, layer.row_cov, inverse.rows)
    groups = groups.to(held.device).masked_fill(held, -1)
    return _of_groups(cov, power, width, prior - log_det, groups, count)


def columns_delta_f(layer: Layer, inverse: Precisions, groups: Tensor, count: int) -> Tensor:
    """The same for columns, with Mᵀ ~ MN(Mᵀ, C, R) in the place of M; the bias is in no group."""
    width, weight = layer.columns, layer.mean[:, : layer.columns].double()
    rows = inverse.rows.double()
    power = weight.mT @ rows @ weight
    height, held = len(rows), layer.held[:, :width].all(0)
    whole = torch.cat([held, held.new_zeros(layer.mean.shape[1] - width)])  # the bias is free
    cov = _given(whole, layer.col_cov, inverse.columns)[:width, :width]
    groups = groups.to(held.device).masked_fill(held, -1)
    constant = height * math.log(layer.scale**2) + _log_det(rows)
    return _of_groups(cov, power, height, constant, groups, count)


def _given(held: Tensor, cov: Tensor, precision: Tensor) -> Tensor:
    """The covariance given that the rows `held` are zero, which have 1 on their diagonal."""
    if not bool(held.any()):
        return cov.double()
    free = (~held).nonzero()[:, 0]
    found = torch.eye(len(held), dtype=torch.float64, device=cov.device)
    if len(free):
        block = damped_inverse(precision[free][:, free].to(cov.dtype), 0.0)
        if block is None:
            raise ReductionError("the covariance of a layer given its zeros is not positive")
        found[free[:, None], free] = block.double()
    return found


def _of_groups(
    cov: Tensor, power: Tensor, length: int, constant: float, groups: Tensor, count: int
) -> Tensor:
    """½ Σ (constant − length log |cov_II| / |I| − tr cov_II⁻¹ power_II / |I|) of each group."""
    out = torch.zeros(count, dtype=torch.float64)
    groups = groups.cpu()
    sizes = torch.bincount(groups[groups >= 0], minlength=count)
    single = (groups >= 0) & (sizes[groups.clamp_min(0)] == 1)
    diagonal = cov.diagonal().cpu()
    alone = constant - length * diagonal.log() - power.diagonal().cpu() / diagonal
    out[groups[single]] = 0.5 * alone[single]
    for group in (sizes > 1).nonzero()[:, 0].tolist():
        inside = (groups == group).nonzero()[:, 0].to(cov.device)
        chol = torch.linalg.cholesky(cov[inside][:, inside])
        energy = torch.cholesky_solve(power[inside][:, inside], chol).diagonal().sum()
        log_det = 2 * chol.diagonal().log().sum()
        out[group] = 0.5 * float(len(inside) * constant - length * log_det - energy)
    return out


def _log_det(precision: Tensor) -> float:
    return float(torch.linalg.cholesky(precision).diagonal().log().sum()) * 2
