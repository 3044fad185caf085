r"""The families of a generalised linear model: log likelihood, its derivatives, and the mean.

Owns `Family` and its kinds: `Bernoulli`, `Categorical`, `Poisson`, `NegativeBinomial`. Each row has
η of shape (predictors,). Imports numpy and scipy only. Next: `generalised_subsets.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pyro_bmr.estimators.subset_evidence import Array

_LARGEST = 30.0  # |η|; beyond it exp(η) is 1e13 counts, or a probability of 1e-13


class Family(Protocol):
    """p(y | η) of a generalised linear model with its canonical link.

    `predictors`: how many η a row has. `start`: η of the model without columns, (predictors,).
    """

    @property
    def predictors(self) -> int: ...

    def start(self, y: Array) -> Array: ...

    def log_likelihood(self, eta: Array, y: Array) -> Array:
        """Of each of the leading dimensions, summed over the rows: η (…, rows, predictors)."""
        ...

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Of the log likelihood by η: gradient (…, rows, predictors), and minus the second
        derivative, (…, rows, predictors, predictors).
        """
        ...

    def mean(self, eta: Array) -> Array:
        """E[y | η], (…, rows), or the probabilities of the classes, (…, rows, classes)."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """y in {0, 1} with logit η."""

    predictors: int = 1

    def start(self, y: Array) -> Array:
        """The logit of the share of ones."""
        share = np.clip(y.mean(), 1e-3, 1 - 1e-3)
        return np.array([np.log(share / (1 - share))])

    def log_likelihood(self, eta: Array, y: Array) -> Array:
        """Σ y η − log(1 + e^η)."""
        eta = eta[..., 0]
        return (y * eta - np.logaddexp(0.0, eta)).sum(-1)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient y − μ, curvature μ(1 − μ)."""
        mu = self.mean(eta)
        return (y - mu)[..., None], (mu * (1 - mu))[..., None, None]

    def mean(self, eta: Array) -> Array:
        """μ = 1/(1 + e^−η)."""
        return 1.0 / (1.0 + np.exp(-np.clip(eta[..., 0], -_LARGEST, _LARGEST)))


@dataclass(frozen=True)
class Poisson:
    """Counts y with log rate η."""

    predictors: int = 1

    def start(self, y: Array) -> Array:
        """The log of the mean count."""
        return np.array([np.log(max(y.mean(), 1e-3))])

    def log_likelihood(self, eta: Array, y: Array) -> Array:
        """Σ y η − e^η − log y!."""
        from scipy.special import gammaln

        eta = np.minimum(eta[..., 0], _LARGEST)
        return (y * eta - np.exp(eta) - gammaln(y + 1)).sum(-1)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient y − μ, curvature μ."""
        mu = self.mean(eta)
        return (y - mu)[..., None], mu[..., None, None]

    def mean(self, eta: Array) -> Array:
        """μ = e^η."""
        return np.exp(np.minimum(eta[..., 0], _LARGEST))


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts y with log mean η and variance μ + μ²/r for the `concentration` r."""

    concentration: float
    predictors: int = 1

    def start(self, y: Array) -> Array:
        """The log of the mean count."""
        return Poisson().start(y)

    def log_likelihood(self, eta: Array, y: Array) -> Array:
        """Σ y η − (y + r) log(r + e^η) + r log r + log Γ(y + r) − log Γ(r) − log y!."""
        from scipy.special import gammaln

        eta, r = np.minimum(eta[..., 0], _LARGEST), self.concentration
        normaliser = gammaln(y + r) - gammaln(r) - gammaln(y + 1) + r * np.log(r)
        return (y * eta - (y + r) * np.log(r + np.exp(eta)) + normaliser).sum(-1)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient r(y − μ)/(r + μ), curvature rμ(r + y)/(r + μ)²."""
        mu, r = self.mean(eta), self.concentration
        gradient, curvature = r * (y - mu) / (r + mu), r * mu * (r + y) / (r + mu) ** 2
        return gradient[..., None], curvature[..., None, None]

    def mean(self, eta: Array) -> Array:
        """μ = e^η."""
        return Poisson().mean(eta)

    def best(self, eta: Array, y: Array) -> NegativeBinomial:
        """With the concentration, between 0.01 and 10⁴, that is most likely at η."""
        from scipy.optimize import minimize_scalar

        def loss(log_r: float) -> float:
            family = NegativeBinomial(float(np.exp(log_r)))
            return -float(family.log_likelihood(eta, y))

        bounds = (np.log(1e-2), np.log(1e4))
        return NegativeBinomial(float(np.exp(minimize_scalar(loss, bounds=bounds).x)))


@dataclass(frozen=True)
class Categorical:
    """Classes 0 … C − 1; their logits are the contrasts `basis`, (C, C − 1), times η."""

    basis: Array

    @property
    def predictors(self) -> int:
        """C − 1."""
        return self.basis.shape[1]

    def start(self, y: Array) -> Array:
        """The centred log shares of the classes, as contrasts."""
        shares = np.bincount(y.astype(np.int64), minlength=len(self.basis)) / len(y)
        return np.log(np.maximum(shares, 1e-3)) @ self.basis

    def log_likelihood(self, eta: Array, y: Array) -> Array:
        """Σ log softmax."""
        chosen = self.basis[y.astype(np.int64)]
        return ((eta * chosen).sum(-1) - _log_sum(eta @ self.basis.T)).sum(-1)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient Hᵀ(e_y − p), curvature Hᵀ(diag p − ppᵀ)H for the basis H."""
        p = self.mean(eta)
        gradient = self.basis[y.astype(np.int64)] - p @ self.basis
        scaled = p[..., None] * self.basis
        turned = p @ self.basis
        return gradient, self.basis.T @ scaled - turned[..., None] * turned[..., None, :]

    def mean(self, eta: Array) -> Array:
        """The probabilities p of the classes."""
        logits = eta @ self.basis.T
        return np.exp(logits - _log_sum(logits)[..., None])


def _log_sum(logits: Array) -> Array:
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1))
