r"""Classes: `Bernoulli`, `Categorical`, and `Ordinal` for classes in an order. Next:
`declared_family.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pyro_bmr.estimators.families import GENERALISED_SLABS, LARGEST
from pyro_bmr.estimators.subset_evidence import Array


@dataclass(frozen=True)
class Bernoulli:
    """y in {0, 1} with logit η."""

    predictors: int = 1
    slabs: Array = field(default_factory=lambda: GENERALISED_SLABS, repr=False)

    def start(self, y: Array) -> Array:
        """The logit of the share of ones."""
        share = np.clip(y.mean(), 1e-3, 1 - 1e-3)
        return np.array([np.log(share / (1 - share))])

    def log_density(self, eta: Array, y: Array) -> Array:
        """Y η − log(1 + e^η)."""
        eta = eta[..., 0]
        return y * eta - np.logaddexp(0.0, eta)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient y − μ, curvature μ(1 − μ)."""
        mu = _sigmoid(eta[..., 0])
        return (y - mu)[..., None], (mu * (1 - mu))[..., None, None]

    def probabilities(self, eta: Array) -> Array:
        """1 − μ and μ = 1/(1 + e^−η)."""
        high = _sigmoid(eta[..., 0])
        return np.stack([1 - high, high], -1)


@dataclass(frozen=True)
class Categorical:
    """Classes 0 … C − 1; their logits are the contrasts `basis`, (C, C − 1), times η."""

    basis: Array
    slabs: Array = field(default_factory=lambda: GENERALISED_SLABS, repr=False)

    @property
    def predictors(self) -> int:
        """C − 1."""
        return self.basis.shape[1]

    def start(self, y: Array) -> Array:
        """The centred log shares of the classes, as contrasts."""
        shares = np.bincount(y.astype(np.int64), minlength=len(self.basis)) / len(y)
        return np.log(np.maximum(shares, 1e-3)) @ self.basis

    def log_density(self, eta: Array, y: Array) -> Array:
        """Log softmax."""
        chosen = self.basis[y.astype(np.int64)]
        return (eta * chosen).sum(-1) - _log_sum(eta @ self.basis.T)

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient Hᵀ(e_y − p), curvature Hᵀ(diag p − ppᵀ)H for the basis H."""
        p = self.probabilities(eta)
        gradient = self.basis[y.astype(np.int64)] - p @ self.basis
        scaled = p[..., None] * self.basis
        turned = p @ self.basis
        return gradient, self.basis.T @ scaled - turned[..., None] * turned[..., None, :]

    def probabilities(self, eta: Array) -> Array:
        """Softmax."""
        logits = eta @ self.basis.T
        return np.exp(logits - _log_sum(logits)[..., None])


@dataclass(frozen=True)
class Ordinal:
    r"""P(y ≤ k) = sigmoid(c_k − η) with c_0 = 0 and c_k = c_{k−1} + `gaps`_{k−1}: the larger η, the
    higher the class (cumulative logit; McCullagh 1980). The intercept takes the place of c_0.

    The gaps are inferred; their logs have the standard deviation 1 around those of equally probable
    classes, as in `pyro_bmr.Ordinal`.
    """

    gaps: Array
    predictors: int = 1
    slabs: Array = field(default_factory=lambda: GENERALISED_SLABS, repr=False)

    @property
    def _cuts(self) -> Array:
        return np.concatenate([[0.0], self.gaps.cumsum()])

    @property
    def parameters(self) -> Array:
        """The logs of the gaps."""
        return np.log(self.gaps)

    def at(self, parameters: Array) -> Ordinal:
        """With other gaps."""
        return replace(self, gaps=np.exp(np.clip(parameters, -LARGEST, LARGEST)))

    def log_prior(self) -> float:
        """−½ Σ (log gap − log gap of equal classes)²."""
        equal = equal_gaps(len(self.gaps) + 2)
        return -0.5 * float((np.log(self.gaps / equal) ** 2).sum())

    def start(self, y: Array) -> Array:
        """Minus the logit of the share of class 0."""
        share = np.clip((y == 0).mean(), 1e-3, 1 - 1e-3)
        return np.array([-np.log(share / (1 - share))])

    def log_density(self, eta: Array, y: Array) -> Array:
        """Log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − e^(b − a)), a = c_y − η, b = c_{y−1} −
        η.
        """
        a, b = self._ends(eta, y)
        gaps = np.concatenate([[np.inf], self.gaps, [np.inf]])[y.astype(np.int64)]
        between = np.log(-np.expm1(-gaps))
        return -np.logaddexp(0.0, -a) - np.logaddexp(0.0, b) + between

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Gradient σ(b) − σ(−a), curvature σ(a)σ(−a) + σ(b)σ(−b)."""
        a, b = self._ends(eta, y)
        above, below = _sigmoid(-a), _sigmoid(b)
        curvature = above * (1 - above) + below * (1 - below)
        return (below - above)[..., None], curvature[..., None, None]

    def probabilities(self, eta: Array) -> Array:
        """Of the classes, from those of y ≤ k."""
        up_to = _sigmoid(self._cuts - eta)
        ends = np.zeros((*up_to.shape[:-1], 1))
        return np.maximum(np.diff(np.concatenate([ends, up_to, ends + 1], -1), axis=-1), 0.0)

    def _ends(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """The cut points above and below each class, less η."""
        cuts = np.concatenate([[-np.inf], self._cuts, [np.inf]])
        labels = y.astype(np.int64)
        return cuts[labels + 1] - eta[..., 0], cuts[labels] - eta[..., 0]


def equal_gaps(classes: int) -> Array:
    """(classes − 2,) the distances between cut points under which all are as probable."""
    below = np.arange(1, classes) / classes
    return np.diff(np.log(below / (1 - below)))


def _sigmoid(eta: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-np.clip(eta, -LARGEST, LARGEST)))


def _log_sum(logits: Array) -> Array:
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1))
