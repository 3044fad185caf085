"""The k-th least of numbers that are shared out over processes, without gathering them.

Owns `kth_value` and `lowest`. Next: `sharded_posterior.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_bmr.sharding.layout import Layout

_BITS = 16  # of a number, that one message decides
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_value(own: Tensor, k: int, layout: Layout) -> Tensor:
    """The k-th least number, from 1, of those that all parts have in flat `own`, exactly; -0 counts
    as below 0. A call of all processes, in two messages of 512 KB for float32, four for float64.

    In the order of floats the sign bit and the others are those of an integer, of which each pass
    finds the next sixteen bits by counting.
    """
    keys = _keys(own)
    width = torch.iinfo(keys.dtype).bits
    found, left = 0, k
    for shift in range(width - _BITS, -1, -_BITS):
        digits = (keys >> shift) & ((1 << _BITS) - 1)
        if shift == width - _BITS:
            digits = digits ^ (1 << (_BITS - 1))  # the sign: negative numbers come first
        counts = layout.sum(torch.bincount(digits, minlength=1 << _BITS))
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, left))
        left -= int(below[digit] - counts[digit])
        found = (found << _BITS) | digit
        keys = keys[digits == digit]
    key = found ^ (1 << (width - 1))
    key -= (1 << width) if key >= 1 << (width - 1) else 0
    return _values(torch.tensor(key, dtype=keys.dtype, device=own.device), own.dtype)


def lowest(scores: Mapping[str, Tensor], count: int, layout: Layout) -> dict[str, Tensor]:
    """Where the `count` least of all sites' scores are, in this process's parts; of equal ones the
    first, in the order of the sites and of their entries. A call of all processes.
    """
    pooled = torch.cat([each.reshape(-1) for each in scores.values()])
    if count == 0:
        return {name: torch.zeros_like(each, dtype=torch.bool) for name, each in scores.items()}
    limit = kth_value(pooled, count, layout)
    chosen = {name: each < limit for name, each in scores.items()}
    equal = {name: each == limit for name, each in scores.items()}
    below = layout.sum(torch.stack([mask.sum() for mask in chosen.values()]).sum())
    # entries of a site lie in the order of the processes: where each part of them begins to count
    ties = layout.of_each(torch.stack([mask.sum() for mask in equal.values()])).T.reshape(-1)
    before = (ties.cumsum(0) - ties).view(len(scores), -1)[:, layout.part]
    spare = count - int(below)
    for (name, mask), passed in zip(equal.items(), before.tolist(), strict=True):
        places = mask.reshape(-1).nonzero()[: max(spare - passed, 0), 0]
        chosen[name].view(-1)[places] = True
    return chosen


def _keys(values: Tensor) -> Tensor:
    """Integers in the order of the values."""
    bits = values.contiguous().view(_INTEGERS[values.dtype])
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `_keys`."""
    bits = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return bits.view(dtype)
