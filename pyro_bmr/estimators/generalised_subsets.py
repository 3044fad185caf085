r"""Generalised linear models: the Laplace evidence of a subset of the columns, and of its
neighbours.

Owns `GeneralisedLinear` and `GeneralisedSubset`, with the methods that `subset_chain.py` asks of
`Regression` and `Subset`. Imports numpy only. Next: `model_average.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.estimators.families import Family
from pyro_bmr.estimators.subset_evidence import Array, Index, Regression

_NEWTON = 100  # steps; 5 is usual
_DECREMENT = 1e-6  # nats that a further step could gain
_RIDGE = 1e-9  # of the curvature of a row, where a probability is 0 or 1
_WORTH = 1.0  # nats
_REFITTED = 3  # of the neighbours with one group more, those with the largest evidence


@dataclass(frozen=True)
class GeneralisedLinear:
    """y ~ family(α + Xb), b ~ N(0, τ²) on the columns of the kept groups, α flat.

    `x`: (rows, columns), centred. `x_groups`: the columns of each group. `slabs`,
    `log_slab_prior`: the grid of τ². Column j has a coefficient for each predictor k, at
    j · predictors + k of b.
    """

    family: Family
    x: Array
    y: Array
    x_groups: Sequence[Index]
    slabs: Array
    log_slab_prior: Array
    _known: dict[bytes, GeneralisedSubset] = field(default_factory=dict, repr=False)

    @cached_property
    def groups(self) -> list[Index]:
        """The coefficients of each group."""
        k = self.family.predictors
        return [(columns[:, None] * k + np.arange(k)).ravel() for columns in self.x_groups]

    def subset(
        self, kept: NDArray[np.bool_], near: GeneralisedSubset | None = None
    ) -> GeneralisedSubset:
        """The model of the groups `kept`, each fitted once; Newton's method begins `near`."""
        key = kept.tobytes()
        if key not in self._known:
            members = [g for g, keep in zip(self.x_groups, kept, strict=True) if keep]
            columns = np.concatenate(members) if members else np.empty(0, dtype=np.int64)
            self._known[key] = GeneralisedSubset(self, kept.copy(), columns, near)
        return self._known[key]

    def start(self) -> Array:
        """η of the model without columns, (rows, predictors)."""
        shape = (len(self.y), self.family.predictors)
        return np.broadcast_to(self.family.start(self.y), shape)

    def expansion(self, eta: Array) -> Regression:
        r"""The linear model whose log likelihood is the second-order expansion at η, (rows,
        predictors), up to a constant; the intercepts are projected out.
        """
        wide, turned, target = self.expanded_rows(eta)
        intercepts = np.linalg.qr(turned)[0]
        return Regression(
            wide - intercepts @ (intercepts.T @ wide),
            target - intercepts @ (intercepts.T @ target),
            self.groups,
            self.slabs,
            self.log_slab_prior,
            None,
        )

    def expanded_rows(self, eta: Array) -> tuple[Array, Array, Array]:
        r"""Columns, intercepts and targets of that linear model, whose noise has variance 1.

        With minus the second derivative W = LLᵀ and the gradient g of each row, it has the rows Lᵀx
        and the targets Lᵀη + L⁻¹g.
        """
        gradient, curvature = self.family.derivatives(eta, self.y)
        rows, k = eta.shape
        mean = float(np.trace(curvature, axis1=1, axis2=2).mean()) / k
        root = np.linalg.cholesky(curvature + _RIDGE * max(mean, 1e-12) * np.eye(k))
        target = np.einsum("nij,ni->nj", root, eta)
        target += np.linalg.solve(root, gradient[..., None])[..., 0]
        turned = root.transpose(0, 2, 1)
        # row (n, m), coefficient (j, k): L_n[k, m] x_nj
        wide = (self.x[:, None, :, None] * turned[:, :, None, :]).reshape(rows * k, -1)
        return wide, turned.reshape(rows * k, k), target.reshape(-1)


@dataclass(frozen=True)
class GeneralisedSubset:
    """The Laplace approximation of one model: for each slab the mode, the factor of minus the
    Hessian, and the evidence. Newton's method begins at the mode of the model `near`, if given.
    What has a number for each row is computed anew when it is needed: a search keeps many models.
    """

    of: GeneralisedLinear
    kept: NDArray[np.bool_]
    x_columns: Index
    near: GeneralisedSubset | None

    @cached_property
    def columns(self) -> Index:
        """The coefficients of the model."""
        k = self.of.family.predictors
        return (self.x_columns[:, None] * k + np.arange(k)).ravel()

    def _design(self) -> Array:
        return np.concatenate([np.ones((len(self.of.y), 1)), self.of.x[:, self.x_columns]], 1)

    @cached_property
    def _modes(self) -> tuple[Array, Array, Array]:
        """For each slab: the coefficients at the mode, (slabs, 1 + columns, predictors); the factor
        of minus the Hessian; the log of the posterior density.
        """
        x = self._design()
        eta = self.of.start() if self.near is None else self.near.eta()
        start = np.linalg.lstsq(x, eta, rcond=None)[0]
        value = np.broadcast_to(start, (len(self.of.slabs), *start.shape)).copy()
        height = self._height(x, value)
        for _ in range(_NEWTON):
            slope, hessian = self._slope(x, value)
            step = np.linalg.solve(hessian, slope[..., None])[..., 0]
            decrement = (slope * step).sum(-1)
            if decrement.max() < _DECREMENT:
                break
            length = np.ones(len(value))
            while True:
                moved = value + length[:, None, None] * step.reshape(value.shape)
                higher = self._height(x, moved)
                low = (higher < height + 1e-4 * length * decrement) & (length > 1e-6)
                low &= decrement >= _DECREMENT
                if not low.any():
                    break
                length = np.where(low, length / 2, length)
            better = higher >= height
            value[better], height = moved[better], np.where(better, higher, height)
        return value, np.asarray(np.linalg.cholesky(hessian), dtype=np.float64), height

    @cached_property
    def _penalty(self) -> Array:
        penalty = 1.0 / np.broadcast_to(
            self.of.slabs[:, None, None],
            (len(self.of.slabs), 1 + len(self.x_columns), self.of.family.predictors),
        )
        penalty[:, 0] = 0.0
        return penalty

    def _height(self, x: Array, value: Array) -> Array:
        likelihood = self.of.family.log_density(x @ value, self.of.y).sum(-1)
        return likelihood - 0.5 * (self._penalty * value**2).sum((1, 2))

    def _slope(self, x: Array, value: Array) -> tuple[Array, Array]:
        """Gradient and minus the Hessian of the log posterior, for each slab."""
        penalty = self._penalty
        gradient, curvature = self.of.family.derivatives(x @ value, self.of.y)
        slabs, size, k = value.shape
        slope = (x.T @ gradient - penalty * value).reshape(slabs, -1)
        whole = np.empty((slabs, size, k, size, k))
        for i in range(k):
            for j in range(k):
                whole[:, :, i, :, j] = (x.T * curvature[:, None, :, i, j]) @ x
        hessian = whole.reshape(slabs, size * k, size * k)
        own = penalty.reshape(slabs, -1)
        own = own + np.where(own == 0, _RIDGE, 0.0)
        hessian[:, np.arange(size * k), np.arange(size * k)] += own
        return slope, hessian

    @cached_property
    def log_evidence_by_slab(self) -> Array:
        """log p(y, τ | γ) by Laplace's method, (slabs,), up to a constant that models share."""
        _, factor, height = self._modes
        half_log_det = np.log(factor.diagonal(axis1=1, axis2=2)).sum(1)
        free = len(self.columns)
        return height - 0.5 * free * np.log(self.of.slabs) - half_log_det + self.of.log_slab_prior

    @cached_property
    def log_evidence(self) -> float:
        """log p(y | γ), nats, up to a constant that all models share."""
        return float(np.logaddexp.reduce(self.log_evidence_by_slab))

    @cached_property
    def slab_weights(self) -> Array:
        """p(τ | y, γ), (slabs,)."""
        return np.exp(self.log_evidence_by_slab - self.log_evidence)

    def eta(self) -> Array:
        """η at the mode of the most probable slab, (rows, predictors)."""
        return self._design() @ self._modes[0][int(self.log_evidence_by_slab.argmax())]

    def neighbours(self) -> Array:
        """The log evidence of every model that differs from this one by one group, (groups,): by
        the expansion at the mode, and by a fit of its own without each kept group and with each of
        those that gain most.
        """
        around = self.of.expansion(self.eta()).subset(self.kept)
        change = around.neighbours() - around.log_evidence
        outside = np.where(self.kept, -np.inf, change)
        most = np.argsort(-outside)[:_REFITTED]
        for g in [*np.nonzero(self.kept)[0], *most[outside[most] > _WORTH]]:
            other = self.kept.copy()
            other[g] = ~other[g]
            change[g] = self.of.subset(other, self).log_evidence - self.log_evidence
        return self.log_evidence + change

    def mean(self) -> Array:
        """Of the intercepts and b, the slab integrated out."""
        value = self._modes[0]
        return self.slab_weights @ value.reshape(len(value), -1)

    def gaussian(self) -> tuple[Array, Array, float]:
        """Mean and covariance of b on `columns`, and the variance of its prior, at the most
        probable slab.
        """
        value, factor, _ = self._modes
        slab = int(self.log_evidence_by_slab.argmax())
        inverse = np.linalg.inv(factor[slab])
        k = self.of.family.predictors
        mean, cov = value[slab].ravel(), inverse.T @ inverse
        return mean[k:], cov[k:, k:], float(self.of.slabs[slab])

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws of the intercepts and b, (count, predictors + columns), and ones for the noise."""
        value, factor, _ = self._modes
        weights = self.slab_weights / self.slab_weights.sum()
        slab = rng.choice(len(weights), count, p=weights)
        means = value.reshape(len(value), -1)
        white = rng.standard_normal((count, means.shape[1]))
        draws = np.empty_like(white)
        for at in np.unique(slab):
            here = slab == at
            draws[here] = means[at] + np.linalg.solve(factor[at].T, white[here].T).T
        return draws, np.ones(count)
