r"""Reduction of Gaussian weights to any prior whose density can be written down, per weight, by quadrature over the weight itself.

Owns `density_reduction`. Imports torch and numpy only. It is the slow and general way: a scale mixture of Gaussians is better served by
`scale_mixture.py`, a prior of several weights together by `monte_carlo.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction.gaussian import Diagonal

_CHUNK = 1 << 9  # weights at once: 900 nodes each
_NEAR = np.concatenate([np.arange(0.0, 8.5, 0.5), 2.0 ** np.arange(4, 17)])  # in posterior standard deviations from the posterior mean
_ZERO = np.concatenate([[0.0], 2.0 ** np.arange(-20, 17)])  # the same from zero, where priors have their kinks


class DensityReduction(NamedTuple):
    """Per weight: `delta_f` in nats, reduced `mean` and `var`."""

    delta_f: Tensor
    mean: Tensor
    var: Tensor


def density_reduction(posterior: Diagonal, prior: Diagonal, log_prob: Callable[[Tensor], Tensor]) -> DensityReduction:
    r"""ΔF and reduced moments when each weight's prior N(η, σ₀²) becomes the density p̃, given as `log_prob`, elementwise and normalised.

    .. math:: \Delta F = \log \int \frac{q(w)}{p(w)}\, \tilde p(w)\, dw

    Gauss–Legendre rules of six points between breakpoints that close in on zero, down to 10⁻⁶ posterior standard deviations, and surround the posterior
    mean; out to 65,000 standard deviations. A density with kinks elsewhere than at zero loses digits. A weight whose posterior is wider than its
    prior has ΔF = 0 and the moments of p̃. In float64 whatever the dtype of the moments.

    Raises:
        ReductionError: `log_prob` does not give a density for each weight.
    """
    shape = posterior.mean.shape
    columns = [t.expand(shape).reshape(-1).split(_CHUNK) for t in (posterior.mean, posterior.var, prior.mean, prior.var)]
    parts = [_chunk(m, s2, eta, v0, log_prob) for m, s2, eta, v0 in zip(*columns, strict=True)] or [(posterior.mean.reshape(-1),) * 3]
    return DensityReduction(*(torch.cat(column).view(shape).to(posterior.mean.dtype) for column in zip(*parts, strict=True)))


def _chunk(mean: Tensor, var: Tensor, prior_mean: Tensor, prior_var: Tensor, log_prob: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    mu, s2, eta, v0 = (t.double()[:, None] for t in (mean, var, prior_mean, prior_var))
    near, zero = (torch.as_tensor(np.concatenate([-side[:0:-1], side]), device=mu.device) for side in (_NEAR, _ZERO))
    breaks = torch.cat([mu + s2.sqrt() * near, s2.sqrt() * zero], 1).sort(1).values
    x, weight = (torch.as_tensor(a, device=mu.device) for a in np.polynomial.legendre.leggauss(6))
    half = (breaks[:, 1:] - breaks[:, :-1])[..., None] / 2
    w = (breaks[:, :-1, None] + half * (1 + x)).flatten(1)
    log_weight = (half * weight).log().flatten(1)
    log_density = log_prob(w.to(mean.dtype)).double()
    if log_density.shape != w.shape or bool(log_density.isnan().any()):
        raise ReductionError(f"log_prob must give one number for each weight; for shape {tuple(w.shape)} it gave {tuple(log_density.shape)} or NaN")
    said = 0.5 * (v0 / s2).log() - 0.5 * (w - mu).square() / s2 + 0.5 * (w - eta).square() / v0  # log q − log p
    terms = log_weight + log_density + said.masked_fill(s2 >= v0, 0.0)
    delta_f = terms.logsumexp(1)
    p = (terms - delta_f[:, None]).exp()
    reduced = (p * w).sum(1)
    silent = (s2 >= v0)[:, 0]
    return delta_f.masked_fill(silent, 0.0), reduced, (p * (w - reduced[:, None]).square()).sum(1)
