r"""A Beta distribution over t = logit π, counted from its peak, so that no size of α and β costs
digits.

Owns `LogitBeta`. Imports torch only. Next: `spike_and_slab.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.formulas.log_gamma import stirling_rest

_SHARPEST = 1e40  # of αβ/(α + β): beyond it no data of fewer than 10¹⁰ weights move π
_NEAR = 0.5  # from the peak, where the series converges
_TERMS = 14  # of the series of φ: with |x| < 0.65 the next is below 10⁻¹⁶ of the sum


class LogitBeta(NamedTuple):
    r"""π ~ Beta(α, β) as a density over logit π, whose peak is at log(α/β).

    .. math:: p(t) = \frac{\sigma(t)^\alpha \, \sigma(-t)^\beta}{B(\alpha, \beta)}
    """

    alpha: float
    beta: float

    @classmethod
    def of(cls, alpha: float, beta: float) -> LogitBeta:
        """Beta(α, β); both divided by one number where they are so large that it makes no
        difference.
        """
        sharp = math.exp(
            min(
                math.log(alpha) + math.log(beta) - _log_sum(alpha, beta) - math.log(_SHARPEST),
                700.0,
            )
        )
        return cls(alpha / max(sharp, 1.0), beta / max(sharp, 1.0))

    @property
    def peak(self) -> float:
        """log(α/β)."""
        return math.log(self.alpha) - math.log(self.beta)

    @property
    def log_width(self) -> float:
        r"""Minus the log density at the peak: ½ log(2π(α + β)/(αβ)) + r(α) + r(β) − r(α + β).

        r is what Stirling's formula leaves of log Γ.
        """
        log_sharp = math.log(self.alpha) + math.log(self.beta) - _log_sum(self.alpha, self.beta)
        return (
            0.5 * (math.log(2 * math.pi) - log_sharp)
            + stirling_rest(self.alpha)
            + stirling_rest(self.beta)
            - stirling_rest(self.alpha + self.beta)
        )

    def log_ratio(self, away: Tensor) -> Tensor:
        r"""The log density δ `away` from the peak t̂, less that at the peak.

        .. math:: -\alpha \log\frac{\sigma(\hat t)}{\sigma(t)} -
            \beta \log\frac{\sigma(-\hat t)}{\sigma(-t)}

        Near the peak both logarithms are those of 1 + x, whose first orders cancel, and it is
        −4s sinh²(δ/2) + αφ(x) + βφ(x'), with s = αβ/(α + β), φ(x) = x − log(1 + x),
        x = σ(−t̂)(e^−δ − 1) and x' = σ(t̂)(e^δ − 1).
        """
        peak, t = away.new_tensor(self.peak), self.peak + away
        far = -self.alpha * (_softplus(-t) - _softplus(-peak)) - self.beta * (
            _softplus(t) - _softplus(peak)
        )
        delta = away.clamp(-_NEAR, _NEAR)
        sharp = math.exp(
            math.log(self.alpha) + math.log(self.beta) - _log_sum(self.alpha, self.beta)
        )
        x = torch.stack(
            [torch.sigmoid(-peak) * torch.expm1(-delta), torch.sigmoid(peak) * torch.expm1(delta)]
        )
        bends = away.new_tensor([self.alpha, self.beta]) @ _phi(x)
        return torch.where(
            away.abs() < _NEAR, bends - 4 * sharp * torch.sinh(delta / 2).square(), far
        )


def _log_sum(a: float, b: float) -> float:
    large, small = max(a, b), min(a, b)
    return math.log(large) + math.log1p(small / large)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) in all its digits; that of torch is x from x = 20 on."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


def _phi(x: Tensor) -> Tensor:
    """x − log(1 + x) for |x| < 0.65, by the series of log(1 + x) = 2 artanh u in u = x/(2 + x)."""
    u = x / (2 + x)
    powers = u.square()[..., None] ** torch.arange(1, _TERMS + 1, device=x.device)
    return u * (
        x - 2 * (powers @ (1 / torch.arange(3, 2 * _TERMS + 2, 2, dtype=x.dtype, device=x.device)))
    )
