r"""Reduction of Gaussian weights to any prior whose density can be written down, per weight, by
quadrature over the weight itself.

Owns `density_reduction`. Imports torch and numpy only. It is the slow and general way: a scale
mixture of Gaussians is better served by `scale_mixture.py`, a Laplace by `laplace.py`, a prior of
several weights together by `monte_carlo.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.formulas.adaptive import LogFunction, Panels, integrals, summits
from pyro_bmr.formulas.diagonal import Diagonal

_CHUNK = 1 << 9  # weights at once: some 1,000 points each
# in posterior standard deviations from the posterior mean
_NEAR = np.concatenate([np.arange(0.0, 9.0), 2.0 ** np.arange(4, 17)])
# the same from zero, where priors have their kinks
_ZERO = np.concatenate([[0.0], 2.0 ** np.arange(-20, 17)])
_AROUND = 2.0 ** np.arange(-2, 9)  # from a summit, in its own width
_SCAN = 2.0 ** np.arange(-100, 100.5, 0.5)  # where a density is looked for, on both sides of zero
_EVEN = 16_385  # points over the posterior means
_MOST_SUMMITS = 64
_HALVINGS = 60  # of an interval that a bound is in: to the last digit
_OFF = 1e-5  # how far from 1 the integral of a density may come out
_RESOLVED = 8 * np.finfo(np.float64).eps  # the least width that moments have digits for


class DensityReduction(NamedTuple):
    """Per weight: `delta_f` in nats, reduced `mean` and `var`."""

    delta_f: Tensor
    mean: Tensor
    var: Tensor


def density_reduction(
    posterior: Diagonal, prior: Diagonal, log_prob: Callable[[Tensor], Tensor]
) -> DensityReduction:
    r"""ΔF and reduced moments when each weight's prior N(η, σ₀²) becomes the density p̃, given as
    `log_prob`, elementwise and normalised.

    .. math:: \Delta F = \log \int \frac{q(w)}{p(w)}\, \tilde p(w)\, dw

    The summits of p̃ are looked for first, on a grid of half octaves from zero and an even one over
    the posterior means, and its integral must come out as 1: a density too narrow or too far away
    to be seen is refused, and so is one that is not normalised. Then Gauss–Legendre rules of six
    points between breakpoints that close in on zero, on the summits and on the posterior mean of
    each weight, halved until they settle: kinks, jumps and bounds are found. A weight whose
    posterior is wider than its prior has ΔF = 0 and the moments of p̃. In float64 whatever the
    dtype of the moments, if `log_prob` takes it.

    Raises:
        ReductionError: `log_prob` does not give a density for each weight, of integral 1; or a
            reduced posterior is as narrow as the rounding of its mean.
    """
    shape, dtype = posterior.mean.shape, posterior.mean.dtype
    columns = [
        t.expand(shape).reshape(-1).double()
        for t in (posterior.mean, posterior.var, prior.mean, prior.var)
    ]
    if not len(columns[0]):
        return DensityReduction(*(posterior.mean.clone() for _ in range(3)))
    density = _Density(log_prob, dtype)
    edges = _edges_of(density, columns[0], columns[1])
    parts = [
        _chunk(m, s2, eta, v0, density, edges)
        for m, s2, eta, v0 in zip(*(c.split(_CHUNK) for c in columns), strict=True)
    ]
    delta_f, mean, var = (torch.cat(column) for column in zip(*parts, strict=True))
    _check_width(mean, var)
    return DensityReduction(*(t.view(shape).to(dtype) for t in (delta_f, mean, var)))


def _check_width(mean: Tensor, var: Tensor) -> None:
    """ReductionError for a reduced posterior that float64 cannot tell from a point."""
    narrow = var.sqrt() < _RESOLVED * mean.abs()
    if bool(narrow.any()):
        worst = int(torch.where(narrow, mean.abs(), 0).argmax())
        raise ReductionError(
            f"log_prob: expected a reduced posterior wider than {_RESOLVED:.1g} of its mean, got"
            f" {int(narrow.sum())} of {len(mean)} weights with less, one with mean"
            f" {float(mean[worst]):.4g} and standard deviation {float(var[worst].sqrt()):.2g}: the"
            " density allows nothing near the posterior; give one that does"
        )


class _Density:
    """`log_prob` with its answers checked, in float64; in `dtype` if it takes no other."""

    def __init__(self, log_prob: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self.log_prob, self.dtype = log_prob, dtype
        self.takes: torch.dtype | None = None

    def __call__(self, owner: Any, w: Tensor) -> Tensor:
        value = self._value(w)
        if value.shape == w.shape and bool((value < torch.inf).all()):
            return value.double()
        if value.shape != w.shape or bool(value.isnan().any()):
            raise ReductionError(
                f"log_prob: expected one number for each weight, got {tuple(value.shape)} or NaN"
                f" for weights of shape {tuple(w.shape)}"
            )
        return value.double().masked_fill(value == torch.inf, -torch.inf)  # a pole, at one point

    def _value(self, w: Tensor) -> Tensor:
        try:
            if self.takes is None:
                try:
                    value, self.takes = self.log_prob(w), w.dtype
                except (RuntimeError, TypeError):
                    value, self.takes = self.log_prob(w.to(self.dtype)), self.dtype
                return value
            return self.log_prob(w.to(self.takes))
        except ValueError as error:
            raise ReductionError(
                f"log_prob: expected a value for any real number, got {str(error).splitlines()[0]};"
                " outside of its support a density is -inf, as that of a torch distribution with"
                " validate_args=False"
            ) from error


def _edges_of(density: _Density, mean: Tensor, var: Tensor) -> Tensor:
    """Breakpoints around the summits of p̃ and at the bounds of its support.

    Raises:
        ReductionError: its integral over all octaves does not come out as 1.
    """
    far, wide = mean.abs().max(), var.max().sqrt()
    side = torch.as_tensor(_SCAN, device=mean.device)
    ends = float(mean.min() - 8 * wide), float(mean.max() + 8 * wide)
    even = torch.linspace(*ends, _EVEN, dtype=torch.float64, device=mean.device)
    x = torch.cat([-side, side.new_zeros(1), side, even]).unique()
    value = density(None, x[None])[0]
    inner = value[1:-1]
    # and no rounding
    lower = torch.minimum(value[:-2], value[2:]) < inner - 1e-6 * (1 + inner.abs())
    local = ((inner >= value[:-2]) & (inner >= value[2:]) & (inner > -torch.inf) & lower).nonzero()[
        :, 0
    ]
    local = local[inner[local].argsort(descending=True)[:_MOST_SUMMITS]]
    owner = torch.zeros_like(local)
    at, best, width = summits(density, owner, x[local].clone(), x[local + 2].clone())
    around = torch.as_tensor(np.concatenate([-_AROUND[::-1], [0.0], _AROUND]), device=mean.device)
    edges = torch.cat(
        [(at[:, None] + width[:, None] * around).flatten(), _bounds(density, x, value)]
    )
    octaves = side[::2]
    every = torch.cat([edges, -octaves, octaves.new_zeros(1), octaves, even[[0, -1]]]).unique()
    whole = _integral(density, every, float(torch.cat([value, best]).max()))
    if not abs(whole - 1) <= _OFF:
        raise ReductionError(
            f"log_prob: expected the log of a density of integral 1, got integral {whole:.6g};"
            " normalise it, and if it is so already, it is too narrow to be found between"
            f" {float(-far - 8 * wide):.3g} and {float(far + 8 * wide):.3g}: make it wider than a"
            " thousandth of that, or a Gaussian by mean and var"
        )
    return edges


def _bounds(density: _Density, x: Tensor, value: Tensor) -> Tensor:
    """The numbers on both sides of each bound of the support of p̃, of whose logarithm `value` is
    that at the sorted points `x`.
    """
    held = value > -torch.inf
    after = (held[1:] != held[:-1]).nonzero()[:_MOST_SUMMITS, 0]
    low, high = x[after], x[after + 1]
    for _ in range(_HALVINGS if len(after) else 0):
        middle = (low + high) / 2
        same = (density(None, middle[None])[0] > -torch.inf) == held[after]
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return torch.cat([low, high])


def _integral(density: _Density, edges: Tensor, peak: float) -> float:
    """∫ p̃ between the sorted edges; `peak`: the largest log p̃ that was seen."""
    if peak == -math.inf:
        return 0.0
    zero = edges.new_zeros(1)
    found = integrals(density, Panels.between(edges[None]), zero + peak, zero)
    return float(found[0, 0]) * math.exp(peak)


def _chunk(
    mean: Tensor,
    var: Tensor,
    prior_mean: Tensor,
    prior_var: Tensor,
    density: _Density,
    edges: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    silent = var >= prior_var
    message = _message(mean, var, prior_mean, prior_var, silent)

    def log_f(owner: Tensor, w: Tensor) -> Tensor:
        """log q − log p + log p̃ in nats."""
        about, constant, slope, bend = message[:, owner, None]
        away = w - about
        return (bend * away).add_(slope).mul_(away).add_(constant).add_(density(owner, w))

    own, at, best = _breakpoints(log_f, mean, var, edges)
    mass, first, second = integrals(log_f, Panels.between(own), best, at).unbind(1)
    away = first / mass
    return (
        (best + mass.log()).masked_fill(silent, 0.0),
        at + away,
        (second / mass - away.square()).clamp(min=0),
    )


def _breakpoints(
    log_f: LogFunction, mean: Tensor, var: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted breakpoints of each weight, NaN where the integrand is too low to count; the summit of
    the integrand and its value there.
    """
    mu, sigma = mean[:, None], var.sqrt()[:, None]
    near, zero, around = (
        torch.as_tensor(np.concatenate([-side[::-1], side]), device=mu.device)
        for side in (_NEAR, _ZERO, _AROUND)
    )
    own = (
        torch.cat([mu + sigma * near, sigma * zero, edges.expand(len(mean), -1)], 1).sort(1).values
    )
    index = torch.arange(len(mean), device=mean.device)
    values = log_f(index, own)
    top = own.gather(1, values.argmax(1, keepdim=True))
    # the next breakpoints that differ: two of them may be the same number
    left = own.where(own < top, own[:, :1]).amax(1)
    right = own.where(own > top, own[:, -1:]).amin(1)
    at, best, width = summits(log_f, index, left, right)
    # between two places as low as this the message, which bends by 1/σ², cannot rise to anything
    far = torch.maximum(values[:, 1:], values[:, :-1]) < best[:, None] - 60 - (
        own[:, 1:] - own[:, :-1]
    ).square() / (8 * var[:, None])
    parts = [
        own[:, 1:-1].masked_fill(far[:, 1:] & far[:, :-1], torch.nan),
        own[:, :1],
        own[:, -1:],
        at[:, None],
        at[:, None] + width[:, None] * around,
    ]
    return torch.cat(parts, 1).sort(1).values, at, best


def _message(
    mean: Tensor, var: Tensor, prior_mean: Tensor, prior_var: Tensor, silent: Tensor
) -> Tensor:
    """log q(w) − log p(w) = a + b(w − c) − ½L(w − c)²: c, a, b and −½L of each weight, (4,
    weights); 0 where the data say nothing.

    c is the posterior's mean; where q and p are nearly the same the prior's, so that no difference
    of their exponents is taken.
    """
    alike, shift = 2 * var > prior_var, mean - prior_mean
    energy = torch.where(alike, -0.5 * shift.square() / var, 0.5 * shift.square() / prior_var)
    constant = 0.5 * (prior_var / var).log() + energy
    slope = shift / torch.where(alike, var, prior_var)
    bend = -0.5 * (prior_var - var) / var / prior_var
    about = torch.where(alike, prior_mean, mean)
    return torch.stack([about, constant, slope, bend]).masked_fill(silent, 0.0)
