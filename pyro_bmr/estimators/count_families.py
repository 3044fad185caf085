r"""Counts with a log link: `Poisson` and `NegativeBinomial`. Next: `real_families.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pyro_bmr.estimators.families import GENERALISED_SLABS, LARGEST
from pyro_bmr.estimators.subset_evidence import Array

_DECADES = 2.0  # standard deviation of the log of a concentration
_BOUND = np.log(1e4)  # its largest and least log


@dataclass(frozen=True)
class Poisson:
    """Counts y with mean e^(η + `log_exposure`), which is a number or has one for each row."""

    log_exposure: Array | float = 0.0
    predictors: int = 1
    slabs: Array = field(default_factory=lambda: GENERALISED_SLABS, repr=False)

    def start(self, y: Array) -> Array:
        """The log of the counts per exposure."""
        exposure = np.broadcast_to(np.exp(self.log_exposure), y.shape)
        return np.array([np.log(max(y.sum(), 1e-3 * len(y)) / exposure.sum())])

    def log_density(self, eta: Array, y: Array) -> Array:
        """Y log μ − μ − log y!."""
        from scipy.special import gammaln

        mu = self.mean(eta)
        return y * np.log(mu) - mu - gammaln(y + 1)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient y − μ, curvature μ."""
        mu = self.mean(eta)
        return (y - mu)[..., None], mu[..., None, None]

    def mean(self, eta: Array) -> Array:
        """μ = e^(η + log exposure)."""
        return np.exp(np.clip(eta[..., 0] + self.log_exposure, -20 * LARGEST, LARGEST))

    def variance(self, eta: Array) -> Array:
        """μ."""
        return self.mean(eta)

    def draw(self, eta: Array, rng: np.random.Generator) -> Array:
        return rng.poisson(self.mean(eta)).astype(np.float64)


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts y with mean μ = e^(η + `log_exposure`) and variance μ + μ²/r, r the `concentration`.

    `learned`: r is inferred, with log r ~ N(0, 2²).
    """

    concentration: float = 1.0
    learned: bool = True
    log_exposure: Array | float = 0.0
    predictors: int = 1
    slabs: Array = field(default_factory=lambda: GENERALISED_SLABS, repr=False)

    @property
    def _poisson(self) -> Poisson:
        return Poisson(self.log_exposure)

    @property
    def parameters(self) -> Array:
        """Log r."""
        return np.log([self.concentration]) if self.learned else np.empty(0)

    def at(self, parameters: Array) -> NegativeBinomial:
        """With r = e^parameter, from 10⁻⁴ to 10⁴."""
        log_r = np.clip(parameters[0], -_BOUND, _BOUND)
        return replace(self, concentration=float(np.exp(log_r)))

    def log_prior(self) -> float:
        """−(log r)²/8."""
        return -0.5 * float((np.log(self.concentration) / _DECADES) ** 2)

    def start(self, y: Array) -> Array:
        """The log of the counts per exposure."""
        return self._poisson.start(y)

    def log_density(self, eta: Array, y: Array) -> Array:
        """Y log μ − (y + r) log(r + μ) + r log r + log Γ(y + r) − log Γ(r) − log y!."""
        from scipy.special import gammaln

        mu, r = self.mean(eta), self.concentration
        normaliser = gammaln(y + r) - gammaln(r) - gammaln(y + 1) + r * np.log(r)
        return y * np.log(mu) - (y + r) * np.log(r + mu) + normaliser

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient r(y − μ)/(r + μ), curvature rμ(r + y)/(r + μ)²."""
        mu, r = self.mean(eta), self.concentration
        gradient, curvature = r * (y - mu) / (r + mu), r * mu * (r + y) / (r + mu) ** 2
        return gradient[..., None], curvature[..., None, None]

    def mean(self, eta: Array) -> Array:
        """μ."""
        return self._poisson.mean(eta)

    def variance(self, eta: Array) -> Array:
        """μ + μ²/r."""
        mu = self.mean(eta)
        return mu + mu**2 / self.concentration

    def draw(self, eta: Array, rng: np.random.Generator) -> Array:
        """A Poisson count whose rate has a gamma distribution."""
        r = self.concentration
        return rng.poisson(rng.gamma(r, self.mean(eta) / r)).astype(np.float64)
