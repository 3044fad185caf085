"""Sums over the whole vectors of a fit.

Owns `dot`. Next: `site_prior.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 1 << 16


def dot(one: Tensor, other: Tensor) -> Tensor:
    """The sum of the products of two tensors of one shape."""
    one, other = one.reshape(-1), other.reshape(-1)
    if one.numel() < _LARGE:
        return torch.dot(one, other)
    # on vectors that are not in the cache, BLAS's product of a matrix with a vector takes half of
    # the time of its dot product
    return torch.mv(one[None], other)[0]
