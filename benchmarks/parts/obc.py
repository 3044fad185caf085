"""Optimal brain compression (Frantar & Alistarh 2022, arXiv 2208.11580), in plain torch: in each
row of a weight the entry goes that the others of the row can make up for best, one after another.

Owns `removal_order` and `obc_layer`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 1 << 27  # numbers in the inverses of the rows that are taken at once


def damped(inputs: Tensor, damping: float = 0.01) -> Tensor:
    """H of a layer: inputs that are always 0 have the curvature 1."""
    h = inputs.double()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


def removal_order(weight: Tensor, inputs: Tensor) -> Tensor:
    """(n, m): what the loss of its row has risen by when the entry goes, summed over those that
    went before it; so the entries below a limit are the first ones of each row.
    """
    h = damped(inputs)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).to(weight.dtype)
    at_once = max(_MOST // inverse.numel(), 1)
    return torch.cat([_of_rows(part, inverse) for part in weight.split(at_once)])


def _of_rows(weight: Tensor, inverse: Tensor) -> Tensor:
    w, h = weight.clone(), inverse.expand(len(weight), -1, -1).clone()
    rows, rises = torch.arange(len(w)), torch.zeros_like(w)
    gone, risen = torch.zeros_like(w, dtype=torch.bool), torch.zeros(len(w)).to(w)
    for _ in range(w.shape[1]):
        diagonal = h.diagonal(dim1=1, dim2=2)
        score = (0.5 * w.square() / diagonal.clamp(min=1e-20)).masked_fill(gone, torch.inf)
        rise, least = score.min(1)
        column, pivot = h[rows, :, least], diagonal[rows, least].clamp(min=1e-20)
        w -= (w[rows, least] / pivot)[:, None] * column
        h.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
        gone[rows, least] = True
        risen += rise
        rises[rows, least] = risen
    return rises


def obc_layer(weight: Tensor, inputs: Tensor, order: Tensor, kept: float) -> Tensor:
    """The layer with that fraction: one limit for all rows, and in each row the others make up for
    what is gone: w − H⁻¹_:S (H⁻¹_SS)⁻¹ w_S.
    """
    count = round((1 - kept) * order.numel())
    gone = torch.zeros_like(order, dtype=torch.bool)
    if count:
        gone = order <= order.flatten().kthvalue(count).values
    h = damped(inputs)
    out = torch.zeros_like(weight)
    for k, row in enumerate(weight.double()):
        stay = ~gone[k]
        # the same by what stays: w_K + H_KK⁻¹ H_KS w_S
        back = h[stay][:, gone[k]] @ row[gone[k]]
        solved = torch.linalg.solve(h[stay][:, stay], back)
        out[k, stay] = (row[stay] + solved).to(out.dtype)
    return out
