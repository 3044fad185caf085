"""Sums over the whole vectors of a fit.

Owns `dot`. Next: `site_prior.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE, _PIECE = 1 << 16, 1 << 18


def dot(one: Tensor, other: Tensor) -> Tensor:
    """The sum of the products of two tensors of one shape."""
    one, other = one.reshape(-1), other.reshape(-1)
    if one.numel() < _LARGE:
        return torch.dot(one, other)
    # on vectors that are not in the cache, BLAS's product of a matrix with a vector takes half of
    # the time of its dot product; over longer ones than a piece it loses digits
    pieces = zip(one.split(_PIECE), other.split(_PIECE), strict=True)
    return torch.cat([torch.mv(a[None], b) for a, b in pieces]).sum()
