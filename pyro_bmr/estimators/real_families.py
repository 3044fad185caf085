r"""Real numbers: `Normal`, and `StudentT`, for which rows far away count little. Next:
`class_families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pyro_bmr.estimators.families import SLABS
from pyro_bmr.estimators.subset_evidence import Array

_TYPICAL_DF = np.log(10.0)  # log df ~ N(log 10, 1)
_DF = (0.5, 300.0)  # the least and the most


@dataclass(frozen=True)
class Normal:
    """Y ~ N(η, `var`), whose variance may differ between draws, (draws, 1)."""

    var: Array | float
    predictors: int = 1

    @property
    def slabs(self) -> Array:
        """In units of the noise."""
        return SLABS * np.mean(self.var)

    def start(self, y: Array) -> Array:
        """The mean."""
        return np.array([y.mean()])

    def log_density(self, eta: Array, y: Array) -> Array:
        """−½(y − η)²/var − ½ log 2π var."""
        return -0.5 * ((y - eta[..., 0]) ** 2 / self.var + np.log(2 * np.pi * self.var))

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient (y − η)/var, curvature 1/var."""
        left = (y - eta[..., 0]) / self.var
        curvature = np.ones_like(left) / self.var
        return left[..., None], curvature[..., None, None]

    def mean(self, eta: Array) -> Array:
        """η."""
        return eta[..., 0]

    def variance(self, eta: Array) -> Array:
        """The noise."""
        return np.broadcast_to(self.var, eta.shape[:-1])

    def draw(self, eta: Array, rng: np.random.Generator) -> Array:
        return eta[..., 0] + np.sqrt(self.var) * rng.standard_normal(eta.shape[:-1])


@dataclass(frozen=True)
class StudentT:
    r"""y = η + scale · t with `df` degrees of freedom. `learned`: which of "scale" and "df" are
    inferred: the scale without a prior, log df ~ N(log 10, 1).

    Its curvature is the expected one, which is positive where minus the second derivative is not
    (Lange, Little & Taylor 1989).
    """

    scale: float = 1.0
    df: float = 10.0
    learned: tuple[str, ...] = ("scale", "df")
    predictors: int = 1

    @property
    def slabs(self) -> Array:
        """In units of the scale."""
        return SLABS * self.scale**2

    @property
    def parameters(self) -> Array:
        """The logs of what is inferred."""
        return np.log([getattr(self, name) for name in self.learned])

    def at(self, parameters: Array) -> StudentT:
        """With other values of what is inferred."""
        values = dict(zip(self.learned, np.exp(parameters).tolist(), strict=True))
        if "df" in values:
            values["df"] = min(max(values["df"], _DF[0]), _DF[1])
        if "scale" in values:
            values["scale"] = max(values["scale"], 1e-8)
        return replace(self, **values)

    def log_prior(self) -> float:
        """−½(log df − log 10)², if df is inferred."""
        return -0.5 * float((np.log(self.df) - _TYPICAL_DF) ** 2) if "df" in self.learned else 0.0

    def start(self, y: Array) -> Array:
        """The median."""
        return np.array([np.median(y)])

    def log_density(self, eta: Array, y: Array) -> Array:
        """Log Γ((ν + 1)/2) − log Γ(ν/2) − ½ log(πν s²) − ½(ν + 1) log(1 + (y − η)²/νs²)."""
        from scipy.special import gammaln

        df, square = self.df, ((y - eta[..., 0]) / self.scale) ** 2
        height = gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(np.pi * df)
        return height - np.log(self.scale) - 0.5 * (df + 1) * np.log1p(square / df)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient (ν + 1)(y − η)/(νs² + (y − η)²), expected curvature (ν + 1)/((ν + 3)s²)."""
        df, var = self.df, self.scale**2
        left = y - eta[..., 0]
        gradient = (df + 1) * left / (df * var + left**2)
        curvature = np.full_like(gradient, (df + 1) / ((df + 3) * var))
        return gradient[..., None], curvature[..., None, None]

    def mean(self, eta: Array) -> Array:
        """η, the median where there is no mean."""
        return eta[..., 0]

    def variance(self, eta: Array) -> Array:
        """s²ν/(ν − 2), infinite for ν ≤ 2."""
        df = self.df
        var = self.scale**2 * df / (df - 2) if df > 2 else np.inf
        return np.full(eta.shape[:-1], var)

    def draw(self, eta: Array, rng: np.random.Generator) -> Array:
        return eta[..., 0] + self.scale * rng.standard_t(self.df, eta.shape[:-1])
