r"""The densities of latent sites on the unconstrained line, with their slopes written out.

Owns the protocol `Density` and the densities of scales, of inclusion probabilities and of weights
that are not Gaussian. A site x > 0 has u = log x, a site in (0, 1) has u = logit x; the density of
u has the Jacobian in it. Next: `weight_form.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Density(Protocol):
    """A density over the entries of a site, which are independent.

    `parent`: the site with one number on which the density depends, if it depends on any.
    """

    @property
    def parent(self) -> str | None: ...

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        """Σ log p(u), nats."""

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> Tensor | None:
        """Adds `factor` · ∂/∂u Σ log p to `g`; gives ∂/∂parent Σ log p."""


@dataclass(frozen=True)
class LogGamma:
    r"""u = log x, x ~ Gamma(a, b): log p(u) = a log b − log Γ(a) + a u − b eᵘ."""

    shape: float
    rate: float
    parent: None = None

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        constant = self.shape * math.log(self.rate) - math.lgamma(self.shape)
        return (self.shape * u - self.rate * u.exp()).sum() + u.numel() * constant

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> None:
        g.add_(factor * self.shape).sub_(u.exp(), alpha=factor * self.rate)


@dataclass(frozen=True)
class LogHalfCauchy:
    r"""u = log x, x ~ C⁺(0, s): log p(u) = log(2/π) + t − log(1 + e²ᵗ), t = u − log s."""

    scale: float = 1.0
    parent: None = None

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        t = u - math.log(self.scale)
        return (t - softplus(2 * t)).sum() + u.numel() * math.log(2 / math.pi)

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> None:
        t = torch.mul(u, 2.0)
        if self.scale != 1.0:
            t.sub_(2 * math.log(self.scale))
        g.sub_(t.sigmoid_(), alpha=2 * factor).add_(factor)  # 1 − 2σ(2t)


@dataclass(frozen=True)
class LogitBeta:
    r"""u = logit x, x ~ Beta(α, β): log p(u) = α log σ(u) + β log σ(−u) − log B(α, β)."""

    alpha: float
    beta: float
    parent: None = None

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        a, b = self.alpha, self.beta
        log_b = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return (a * logsigmoid(u) + b * logsigmoid(-u)).sum() - u.numel() * log_b

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> None:
        total = self.alpha + self.beta
        g.add_(factor * self.alpha).sub_(u.sigmoid(), alpha=factor * total)


@dataclass(frozen=True)
class LogitConcrete:
    r"""u = logit z of a relaxed indicator z with temperature t (Maddison, Mnih & Teh 2017, arXiv
    1611.00712), given y = logit π, the draw of `parent`.

    .. math:: \log p(u) = \log t + d - 2 \log(1 + e^d), \qquad d = y - t u
    """

    temperature: float
    parent: str

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        assert parent is not None
        d = parent - self.temperature * u
        return (d - 2 * softplus(d)).sum() + u.numel() * math.log(self.temperature)

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> Tensor:
        assert parent is not None
        t = self.temperature
        p = torch.add(parent, u, alpha=-t).sigmoid_()  # σ(d)
        g.add_(p, alpha=2 * t * factor).sub_(t * factor)
        return u.numel() - 2 * p.sum()


@dataclass(frozen=True)
class WeightLaplace:
    r"""log p(w) = −log 2b − `|w|`/b."""

    scale: float
    parent: None = None

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        return -u.abs().sum() / self.scale - u.numel() * math.log(2 * self.scale)

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> None:
        g.sub_(u.sign(), alpha=factor / self.scale)


@dataclass(frozen=True)
class WeightStudentT:
    r"""w ~ t_ν(0, s), up to a constant log p(w) = −½ (ν + 1) log(1 + w²/(ν s²))."""

    df: float
    scale: float
    parent: None = None

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        df, width = self.df, self.df * self.scale**2  # ν, ν s²
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi * width)
        return -0.5 * (df + 1) * (u.square() / width).log1p().sum() + u.numel() * constant

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> None:
        g.addcdiv_(u, u.square().add_(self.df * self.scale**2), value=-factor * (self.df + 1))


@dataclass(frozen=True)
class WeightSpikeSlab:
    r"""w ~ π N(0, 1) + (1 − π) N(0, r²), given y = logit π, the draw of `parent`.

    With ρ = σ(y + log r + ½ w² (r⁻² − 1)), the probability of the slab,

    .. math:: \log p(w) = \log \pi - \tfrac12 w^2 - \tfrac12 \log 2\pi - \log \rho, \quad
        \partial_w \log p = -w\,(r^{-2} - \rho\,(r^{-2} - 1)), \quad
        \partial_y \log p = \rho - \pi
    """

    spike_scale: float
    parent: str

    def _log_odds(self, w: Tensor, parent: Tensor | None) -> Tensor:
        assert parent is not None
        offset = parent + math.log(self.spike_scale)
        return torch.add(offset, w.square(), alpha=0.5 * (self.spike_scale**-2 - 1))

    def log_p(self, u: Tensor, parent: Tensor | None) -> Tensor:
        odds = self._log_odds(u, parent)
        size, log_inclusion = u.numel(), logsigmoid(parent).sum()  # type: ignore[arg-type]
        each = -0.5 * u.square() - logsigmoid(odds)
        return each.sum() + size * (log_inclusion - _HALF_LOG_2PI)

    def pull(self, u: Tensor, parent: Tensor | None, g: Tensor, factor: float) -> Tensor:
        assert parent is not None
        rho, spike = self._log_odds(u, parent).sigmoid_(), self.spike_scale**-2
        total = rho.sum()
        g.addcmul_(u, rho.mul_(spike - 1).sub_(spike), value=factor)
        return total - u.numel() * parent.sigmoid().sum()
