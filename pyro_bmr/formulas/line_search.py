"""The maximum of a function of one number, for many groups at once: a scan, then golden-section
search.

Owns `line_maximum`. Used where a scale is found by its evidence, `scale_mixture.py` and
`relevance.py`, or by held-out rows, `calibration.py`. Imports torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError

_GOLDEN = (math.sqrt(5) - 1) / 2


def line_maximum(
    objective: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    points: int = 16,
    tolerance: float = 1e-3,
) -> Tensor:
    """The x of the largest objective(x) in [low, high], element by element, to within `tolerance`.

    `objective` takes and gives tensors of the shape of `low`. It may have several maxima if each is
    wider than the spacing of the scan, (high − low)/(points − 1); the highest is taken. Source of
    the search: Kiefer 1953, Proc. AMS 4(3).

    Raises:
        ReductionError: the objective is NaN somewhere, or nowhere above −∞.
    """
    step = (high - low) / (points - 1)
    values = torch.stack([objective(low + k * step) for k in range(points)])
    if bool(values.isnan().any() | (values.amax(0) == -torch.inf).any()):
        raise ReductionError(
            f"a maximum is looked for where the objective is NaN at {int(values.isnan().sum())} of"
            f" {values.numel()} places, or nowhere above -inf"
        )
    best = values.argmax(0)
    left, right = (
        low + (best - 1).clamp(min=0) * step,
        low + (best + 1).clamp(max=points - 1) * step,
    )
    a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_a, at_b = objective(a), objective(b)
    while bool((right - left > tolerance).any()):
        to_left = at_a > at_b
        right, left = torch.where(to_left, b, right), torch.where(to_left, left, a)
        new = torch.where(
            to_left, right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        )
        at_new = objective(new)
        a, b = torch.where(to_left, new, b), torch.where(to_left, a, new)
        at_a, at_b = torch.where(to_left, at_new, at_b), torch.where(to_left, at_a, at_new)
    return (left + right) / 2
