r"""The exact evidence of every subset of the columns of a linear model, and of all its neighbours.

Owns `Regression`, the sufficient statistics of a linear model whose noise and slab are integrated
out, and `Subset`, the conditional posterior on the columns of one model. Imports numpy only. Next:
`columns.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
_FLOOR = 1e-12  # of yᵀy: what rounding leaves of the residual sum of squares of an exact fit


@dataclass(frozen=True)
class Regression:
    r"""y = Xb + ε with b | γ, τ ~ N(0, σ²τ²) on the columns of the groups γ and 0 elsewhere.

    Integrated over b and over p(σ²) ∝ 1/σ²,

    .. math:: \log p(y \mid \gamma, \tau) = -\tfrac12 \log|I + \tau^2 X_\gamma^\top X_\gamma|
        - \tfrac{\nu}{2} \log S_\gamma, \quad
        S_\gamma = y^\top y - y^\top X_\gamma (X_\gamma^\top X_\gamma + \tau^{-2})^{-1}
        X_\gamma^\top y,

    up to a constant; with a known σ² = 1 (`freedom` None) the last term is −½S. The slab variance
    τ² is integrated over a grid. Source: George & McCulloch 1997, section 3.

    `x`: (rows, columns), intercept projected out. `y`: (rows,). `groups`: the columns of each
    group. `slabs`: (slabs,) values of τ². `log_slab_prior`: (slabs,), normalised. `freedom`: ν, the
    rows less the columns that were projected out.
    """

    x: Array
    y: Array
    groups: Sequence[Index]
    slabs: Array
    log_slab_prior: Array
    freedom: float | None
    _rows: dict[int, Array] = field(default_factory=dict, repr=False)

    @cached_property
    def xy(self) -> Array:
        """Xᵀy."""
        return self.x.T @ self.y

    @cached_property
    def yy(self) -> float:
        """Yᵀy."""
        return float(self.y @ self.y)

    @cached_property
    def gram(self) -> Array:
        """XᵀX."""
        return self.x.T @ self.x

    @cached_property
    def by_size(self) -> Mapping[int, tuple[Index, Index, Array]]:
        """Columns of a group → the groups of that size, their columns, their Gram blocks."""
        sizes = np.array([len(columns) for columns in self.groups])
        found = {}
        for size in np.unique(sizes):
            chosen = np.nonzero(sizes == size)[0]
            columns = np.stack([self.groups[g] for g in chosen.tolist()])
            part = self.x[:, columns]
            found[int(size)] = (chosen, columns, np.einsum("ngi,ngj->gij", part, part))
        return found

    def gram_rows(self, columns: Index) -> Array:
        """The rows of XᵀX of some columns, each computed once."""
        for j in columns.tolist():
            if j not in self._rows:
                self._rows[j] = self.x[:, j] @ self.x
        if not len(columns):
            return np.empty((0, self.x.shape[1]))
        return np.stack([self._rows[j] for j in columns.tolist()])

    def fit_term(self, residual: Array) -> Array:
        """The log evidence of a residual sum of squares S, without the determinant."""
        if self.freedom is None:
            return -0.5 * residual
        return -0.5 * self.freedom * np.log(np.maximum(residual, _FLOOR * self.yy + 1e-300))

    def subset(self, kept: NDArray[np.bool_]) -> Subset:
        """The model of the groups `kept`."""
        members = [self.groups[g] for g in np.nonzero(kept)[0].tolist()]
        columns = np.concatenate(members) if members else np.empty(0, dtype=np.int64)
        return Subset(self, kept.copy(), columns)


@dataclass(frozen=True)
class Subset:
    """One model: the groups `kept` (groups,) and their `columns`."""

    of: Regression
    kept: NDArray[np.bool_]
    columns: Index

    @cached_property
    def _rows(self) -> Array:
        return self.of.gram_rows(self.columns)

    @cached_property
    def _spectrum(self) -> tuple[Array, Array, Array, Array]:
        """Eigenvalues λ and vectors U of X_γᵀX_γ; Uᵀ X_γᵀy; 1/(λ + τ⁻²), (slabs, columns)."""
        values, vectors = np.linalg.eigh(self._rows[:, self.columns])
        values = np.maximum(values, 0.0)
        shrunk = 1.0 / (values + 1.0 / self.of.slabs[:, None])
        return values, vectors, vectors.T @ self.of.xy[self.columns], shrunk

    @cached_property
    def residual(self) -> Array:
        """S for each slab, (slabs,)."""
        _, _, turned, shrunk = self._spectrum
        return self.of.yy - shrunk @ turned**2

    @cached_property
    def _half_log_det(self) -> Array:
        values = self._spectrum[0]
        return 0.5 * np.log1p(values * self.of.slabs[:, None]).sum(1)

    @cached_property
    def log_evidence_by_slab(self) -> Array:
        """log p(y, τ | γ), (slabs,), up to a constant that all models share."""
        fit = self.of.fit_term(self.residual)
        return self.of.log_slab_prior + fit - self._half_log_det

    @cached_property
    def log_evidence(self) -> float:
        """log p(y | γ), up to a constant that all models share, nats."""
        return float(_log_sum(self.log_evidence_by_slab))

    @cached_property
    def slab_weights(self) -> Array:
        """p(τ | y, γ), (slabs,)."""
        return np.exp(self.log_evidence_by_slab - self.log_evidence)

    def neighbours(self) -> Array:
        """The log evidence of every model that differs from this one by one group, (groups,)."""
        evidence = np.empty(len(self.of.groups))
        for size, (chosen, columns, blocks) in self.of.by_size.items():
            inside = self.kept[chosen]
            for side, change in ((~inside, self._added), (inside, self._removed)):
                if side.any():
                    fit, half_log_det = change(size, columns[side], blocks[side])
                    by_slab = self.of.fit_term(fit) - half_log_det
                    evidence[chosen[side]] = _log_sum(by_slab + self.of.log_slab_prior[:, None])
        return evidence

    def _added(self, size: int, columns: Index, blocks: Array) -> tuple[Array, Array]:
        """S and ½ log|I + τ²XᵀX| with one group more, (slabs, groups)."""
        _, vectors, turned, shrunk = self._spectrum
        slabs = self.of.slabs[:, None]
        seen = vectors.T @ self._rows[:, columns.ravel()]  # Uᵀ X_γᵀ X_g
        left = self.of.xy[columns.ravel()] - (shrunk * turned) @ seen
        if size == 1:
            own = blocks[:, 0, 0] + 1.0 / slabs - shrunk @ seen**2
            own = np.maximum(own, 1.0 / slabs)  # rounding
            return self.residual[:, None] - left**2 / own, (
                self._half_log_det[:, None] + 0.5 * np.log(own * slabs)
            )
        seen = seen.reshape(len(self.columns), *columns.shape)
        left = left.reshape(len(slabs), *columns.shape)
        own = blocks + np.eye(size) / slabs[..., None, None]
        for at, row in enumerate(shrunk):
            own[at] -= np.einsum("kgi,kgj->gij", row[:, None, None] * seen, seen)
        gained = (left * np.linalg.solve(own, left[..., None])[..., 0]).sum(-1)
        log_det = np.linalg.slogdet(own)[1] + size * np.log(slabs)
        return self.residual[:, None] - gained, self._half_log_det[:, None] + 0.5 * log_det

    def _removed(self, size: int, columns: Index, blocks: Array) -> tuple[Array, Array]:
        """S and ½ log|I + τ²XᵀX| with one group less, (slabs, groups)."""
        _, vectors, turned, shrunk = self._spectrum
        slabs = self.of.slabs[:, None]
        place = np.searchsorted(self.columns, columns.ravel(), sorter=np.argsort(self.columns))
        part = vectors[np.argsort(self.columns)[place]]
        mean = (shrunk * turned) @ part.T
        if size == 1:
            var = shrunk @ part.T**2
            return self.residual[:, None] + mean**2 / var, (
                self._half_log_det[:, None] + 0.5 * np.log(var / slabs)
            )
        mean = mean.reshape(len(slabs), *columns.shape)
        part = part.reshape(*columns.shape, len(self.columns))
        var = np.stack([np.einsum("gik,gjk->gij", part * row, part) for row in shrunk])
        lost = (mean * np.linalg.solve(var, mean[..., None])[..., 0]).sum(-1)
        log_det = np.linalg.slogdet(var)[1] - size * np.log(slabs)
        return self.residual[:, None] + lost, self._half_log_det[:, None] + 0.5 * log_det

    def mean(self) -> Array:
        """E[b | y] on `columns`, the noise and the slab integrated out."""
        _, vectors, turned, shrunk = self._spectrum
        return (self.slab_weights @ (shrunk * turned)) @ vectors.T

    def gaussian(self) -> tuple[Array, Array, float]:
        """Mean and covariance of b on `columns`, and the variance of its prior, at the most
        probable slab and, if the noise is inferred, at its variance S/ν.
        """
        _, vectors, turned, shrunk = self._spectrum
        slab = int(self.log_evidence_by_slab.argmax())
        known = self.of.freedom is None
        noise = 1.0 if known else float(self.residual[slab]) / float(self.of.freedom or 1.0)
        mean = vectors @ (shrunk[slab] * turned)
        return mean, noise * (vectors * shrunk[slab]) @ vectors.T, noise * self.of.slabs[slab]

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws of b on `columns`, (count, columns), and of σ², (count,)."""
        _, vectors, turned, shrunk = self._spectrum
        slab = rng.choice(len(self.of.slabs), count, p=self.slab_weights / self.slab_weights.sum())
        noise = np.ones(count)
        if self.of.freedom is not None:
            scale = np.maximum(self.residual[slab], _FLOOR * self.of.yy)
            noise = scale / rng.chisquare(self.of.freedom, count)
        white = rng.standard_normal((count, len(self.columns)))
        turned_draws = shrunk[slab] * turned + np.sqrt(noise[:, None] * shrunk[slab]) * white
        return turned_draws @ vectors.T, noise


def _log_sum(values: Array) -> Array:
    """log Σ exp over the first axis."""
    top = values.max(0)
    return top + np.log(np.exp(values - top).sum(0))
