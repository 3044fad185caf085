"""Differences of log Γ and of its derivative ψ that keep their digits for arguments of any size.

Owns `log_rising`, `digamma_fall` and `stirling_rest`. Imports torch only. Next: `natural_form.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGE = 15.0  # from here on five terms of a series are right to the last digit


def log_rising(x: Tensor, k: Tensor) -> Tensor:
    """log Γ(x + k) − log Γ(x), by Stirling's series where both are large: without the difference of
    two large numbers.
    """
    y = x + k
    large = (x > _LARGE) & (y > _LARGE)
    a, b = x.where(large, _LARGE), y.where(large, _LARGE)
    step = k.where(large, 0.0)
    series = (a - 0.5) * (step / a).log1p() + step * (b.log() - 1) + _rest(b) - _rest(a)
    return torch.where(large, series, torch.lgamma(y) - torch.lgamma(x))


def _rest(x: Tensor) -> Tensor:
    """log Γ(x) − (x − ½) log x + x − ½ log 2π."""
    return (
        1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - (1 / 1188) / x**2) / x**2) / x**2) / x**2
    ) / x


def stirling_rest(x: float) -> float:
    """log Γ(x) − (x − ½) log x + x − ½ log 2π."""
    if x > 20:
        y = 1 / x / x
        return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x
    return math.lgamma(x) - (x - 0.5) * math.log(x) + x - 0.5 * math.log(2 * math.pi)


def digamma_fall(a: float, b: float) -> float:
    """ψ(a) − ψ(a + b): the mean of log π under Beta(a, b)."""
    if a <= _LARGE:
        return digamma(a) - digamma(a + b)
    return -math.log1p(b / a) + _digamma_rest(a) - _digamma_rest(a + b)


def _digamma_rest(x: float) -> float:
    """ψ(x) − log x."""
    y = 1 / x / x
    return -0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))


def digamma(x: float) -> float:
    """ψ(x)."""
    return float(torch.digamma(torch.tensor(x, dtype=torch.float64)))


def trigamma(x: float) -> float:
    """ψ'(x)."""
    return float(torch.polygamma(1, torch.tensor(x, dtype=torch.float64)))
