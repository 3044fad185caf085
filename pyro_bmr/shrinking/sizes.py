"""Sizes of the original network, as numbers for the smaller one.

A scale such as 1/√(number of units) is part of the function, so it keeps its value. Owns `Rows`,
`size_in_rows` and `batch_axis`. Next: `resized_layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rows:
    """A number that is `times` the number of rows."""

    times: int


def size_in_rows(two: Any, three: Any) -> Any:
    """A size at any number of rows, from its values at two and at three rows.

    It is a number, `Rows` or a tuple of these; None where it is neither.
    """
    if isinstance(two, (tuple, list)):
        return tuple(size_in_rows(a, b) for a, b in zip(two, three, strict=True))
    if two == three:
        return two
    return Rows(two // 2) if isinstance(two, int) and 3 * two == 2 * three else None


def batch_axis(two: torch.Size, three: torch.Size) -> int:
    """The axis with the size of the batch; −1 if there is none, or if it is merged with another."""
    axes = [k for k, (a, b) in enumerate(zip(two, three, strict=True)) if (a, b) == (2, 3)]
    return axes[0] if len(axes) == 1 else -1
