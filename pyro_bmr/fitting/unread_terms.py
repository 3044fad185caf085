"""The terms of a fit on a device that computes by itself, as a GPU does: the host reads those of
several steps at once, and does not wait for the device in between.

Owns `Number`, `number_of`, which leaves a number where it is, `UnreadTerms` and
`first_not_finite`. Next: `sums.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_TOGETHER = 16  # steps whose terms are read at once

Number = float | Tensor
"""A number of the host, or a tensor of no dimension on a device that the host would wait for."""


def number_of(value: Tensor) -> Number:
    """The number that a tensor has, without its graph; on a device other than the CPU the
    tensor.
    """
    value = value.detach()
    if value.device.type == "cpu":
        return float(value)
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


class UnreadTerms:
    """Both terms of the ELBO and the sum of the gradient, of steps that were taken without a look
    at them.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Sequence[Number]]] = []

    def add(self, step: int, terms: Sequence[Number]) -> None:
        """Keeps the terms of a step until they are read."""
        self._waiting.append((step, terms))

    @property
    def due(self) -> bool:
        """Whether there are enough of them to be read."""
        return len(self._waiting) >= _TOGETHER

    def read(self) -> list[tuple[int, list[float]]]:
        """Each step with its terms, the earliest first. They are forgotten; the host waits for the
        device once.
        """
        waiting, self._waiting = self._waiting, []
        tensors = [t for _, terms in waiting for t in terms if isinstance(t, Tensor)]
        numbers = iter(_together(tensors))
        return [
            (step, [next(numbers) if isinstance(t, Tensor) else t for t in terms])
            for step, terms in waiting
        ]


def first_not_finite(read: Sequence[tuple[int, Sequence[float]]]) -> int | None:
    """The first step of which a term is not finite, if there is one."""
    return next((step for step, terms in read if not all(map(math.isfinite, terms))), None)


def _together(tensors: list[Tensor]) -> list[float]:
    """The numbers of tensors of one device, read at once."""
    if not tensors:
        return []
    dtype = max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
    return torch.stack([t.to(dtype) for t in tensors]).tolist()
