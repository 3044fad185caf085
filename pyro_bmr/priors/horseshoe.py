"""The (regularised) horseshoe prior.

Owns `Horseshoe`. Its exact reduction is in `reduction/scale_mixture.py`. Next: `spike_and_slab.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bmr.errors import ModelError
from pyro_bmr.priors.gaussian import fan_in, sample_normal


@dataclass(frozen=True)
class Horseshoe:
    r"""w = γ w̄, w̄ ~ N(0, 1): a few weights free, all others pulled to zero.

    .. math:: \psi = \tau\lambda/\sqrt{\text{fan in}}, \quad \gamma^2 = \frac{c^2\psi^2}{c^2 + \psi^2}, \quad
        \tau \sim C^+(0, \tau_0), \; \lambda \sim C^+(0, 1)

    The site is w̄, so pruning w̄ prunes w; τ and λ are the sites `<name>_tau` and `<name>_lambda`. Sources: Carvalho, Polson & Scott 2010,
    Biometrika 97(2); Piironen & Vehtari 2017, EJS 11(2) (the slab).

    As the target of a reduction, scales are counted in the units of the site: v = c²τ²λ²/(c² + τ²λ²) with τ found by its evidence.

    Args:
        tau0: the scale of τ: small when few weights are expected to matter. Default 1, which leaves τ to the data.
        slab_scale: c, how large a weight that escapes the shrinkage may become, in units of the site; None for no slab. Default 2.
        per: what has a λ of its own: each ``"weight"`` (default) or each output ``"unit"`` (row), which shrinks rows together.
        tau_per: what has a τ of its own: the ``"layer"`` (default) or each output ``"unit"``; with λ per weight.
    """

    tau0: float = 1.0
    slab_scale: float | None = 2.0
    per: Literal["weight", "unit"] = "weight"
    tau_per: Literal["layer", "unit"] = "layer"
    shrinkage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.tau0 < math.inf:
            raise ModelError(f"Horseshoe(tau0={self.tau0}): tau0 is a finite number > 0")
        if self.slab_scale is not None and not 0 < self.slab_scale < math.inf:
            raise ModelError(f"Horseshoe(slab_scale={self.slab_scale}): slab_scale is a finite number > 0, or None for no slab")
        if self.per not in ("weight", "unit"):
            raise ModelError(f'Horseshoe(per={self.per!r}): per is "weight" or "unit"')
        if self.tau_per not in ("layer", "unit") or (self.tau_per == self.per):
            raise ModelError(f'Horseshoe(per={self.per!r}, tau_per={self.tau_per!r}): tau_per is "layer", or "unit" with per="weight"')

    def sample(self, name: str, shape: tuple[int, ...], init: Tensor | None = None) -> Tensor:
        like = torch.zeros(shape) if init is None else init
        rows = shape[:1] + (1,) * (len(shape) - 1) if self.per == "unit" else shape
        units = shape[:1] + (1,) * (len(shape) - 1) if self.tau_per == "unit" else ()
        tau = pyro.sample(f"{name}_tau", dist.HalfCauchy(like.new_tensor(self.tau0)).expand(units).to_event(len(units)))
        lam = pyro.sample(f"{name}_lambda", dist.HalfCauchy(like.new_ones(())).expand(rows).to_event(len(rows)))
        unit = 1 / math.sqrt(fan_in(shape))
        psi = tau * lam
        gamma = psi if self.slab_scale is None else psi / (1 + (psi / self.slab_scale).square()).sqrt()
        start = None if init is None else init / unit
        return unit * gamma * sample_normal(name, shape, like.new_zeros(()), like.new_ones(()), start, self)

    def mixture(self, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        r"""Variances and log weights of p(w) ≈ Σ_k w_k N(w; 0, v_k) at the global scale τ = `scale` (default `tau0`).

        With t = log λ the half-Cauchy has the density sech(t)/π, smooth and with exponential tails, so the trapezoid rule over |t| ≤ 24 converges
        exponentially, down to τ far below the weights it has to let escape.
        """
        t = np.linspace(-24.0, 24.0, 208)
        psi = (self.tau0 if scale is None else scale) ** 2 * np.exp(2 * t)
        log_weights = -np.logaddexp(t, -t)
        return psi if self.slab_scale is None else psi / (1 + psi / self.slab_scale**2), log_weights - np.logaddexp.reduce(log_weights)

    def log_hyper(self, scale: float) -> float:
        """log C⁺(τ; 0, τ₀) up to a constant."""
        return -math.log1p((scale / self.tau0) ** 2)
