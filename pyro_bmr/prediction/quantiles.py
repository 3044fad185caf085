"""Quantiles of mixtures, by bisection of their distribution function.

Owns `quantiles`, `probabilities` and `central`. Next: `predictive.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_bmr.errors import DataError, described, holds

_STEPS = 60  # halvings: enough for the digits of a double
_DOUBLINGS = 200

Probabilities = float | Sequence[float]


def probabilities(q: Probabilities) -> list[float]:
    """The numbers of `q`.

    Raises:
        DataError: they are not all above 0 and below 1.
    """
    values = list(q) if isinstance(q, Sequence) else [q]
    if not values or not all(holds(lambda p: 0 < p < 1, p) for p in values):
        raise DataError(f"q={described(q)}: expected numbers above 0 and below 1")
    return [float(p) for p in values]


def central(level: float) -> tuple[float, float]:
    """The probabilities below both ends of a central interval.

    Raises:
        DataError: `level` is not above 0 and below 1.
    """
    if not holds(lambda p: 0 < p < 1, level):
        raise DataError(f"level={described(level)}: expected a number above 0 and below 1")
    return (1 - level) / 2, (1 + level) / 2


def quantiles(
    q: Sequence[float],
    cdf: Callable[[Tensor], Tensor],
    mean: Tensor,
    variance: Tensor,
    discrete: bool,
) -> Tensor:
    r"""The least y with P(Y ≤ y) ≥ q of each entry, (len(q), ...).

    Found by bisection between

    .. math:: \mu - \sigma \sqrt{(1 - q)/q} \quad\text{and}\quad \mu + \sigma \sqrt{q/(1 - q)}

    which hold every quantile of a distribution with these moments (Cantelli's inequality). Without
    finite moments the ends are moved out until they hold it.
    """
    finite = mean.isfinite() & variance.isfinite()
    mean, sd = mean.where(finite, 0.0), variance.where(finite, 1.0).clamp_min(0).sqrt()
    # rounding must not leave a point mass outside
    slack = 1e-4 * sd + 1e-4 * mean.abs() + torch.finfo(mean.dtype).tiny
    found = []
    for p in q:
        low = mean - sd * math.sqrt((1 - p) / p) - slack
        high = mean + sd * math.sqrt(p / (1 - p)) + slack
        if discrete:
            low, high = low.floor() - 1, high.ceil()
        low = _moved(low, high - low, -1, lambda y, p=p: cdf(y) < p)  # type: ignore[misc]
        high = _moved(high, high - low, 1, lambda y, p=p: cdf(y) >= p)  # type: ignore[misc]
        found.append(_bisected(cdf, p, low, high, discrete))
    return torch.stack(found)


def _moved(end: Tensor, width: Tensor, sign: int, holds_at: Callable[[Tensor], Tensor]) -> Tensor:
    """An end of the interval, moved out until it is on its side of the quantile."""
    for _ in range(_DOUBLINGS):
        good = holds_at(end)
        if bool(good.all()):
            break
        end = end.where(good, end + sign * width)
        width = width * 2
    return end


def _bisected(
    cdf: Callable[[Tensor], Tensor], p: float, low: Tensor, high: Tensor, discrete: bool
) -> Tensor:
    """The quantile between `low`, where cdf < p, and `high`, where cdf ≥ p."""
    for _ in range(_STEPS):
        middle = low + (high - low) / 2
        if discrete:
            middle = middle.floor()
        done = (middle <= low) | (middle >= high)
        if bool(done.all()):
            break
        above = cdf(middle) >= p
        high = high.where(done | ~above, middle)
        low = low.where(done | above, middle)
    return high
