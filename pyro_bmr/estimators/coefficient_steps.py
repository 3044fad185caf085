r"""Draws of the coefficients given the scales of their prior.

Owns `conditional`, of a linear model, and `FamilySteps`, which leave the conditional distribution
of any other family as it is. Imports numpy only. Next: `horseshoe_chain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pyro_bmr.estimators.engines import log_prior
from pyro_bmr.estimators.generalised_subsets import GeneralisedLinear
from pyro_bmr.estimators.subset_chain import greedy_start
from pyro_bmr.estimators.subset_evidence import Array, Regression

_ACCEPTED = 0.4  # of the steps
_SHORTEST = 0.02  # step


def conditional(
    of: Regression, var: Array, noise: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """The mean A⁻¹Xᵀy, and a draw of N(0, σ²A⁻¹), A = XᵀX + diag(1/var), by a factor of the smaller
    of A and XXᵀ. Source: Rue 2001; Bhattacharya, Chakraborty & Mallick 2016.
    """
    rows, size = of.x.shape
    if size <= rows:
        root = np.sqrt(var)  # A = R⁻¹(RXᵀXR + I)R⁻¹ for R = diag(root)
        factor = np.linalg.cholesky(of.gram * root[:, None] * root + np.eye(size))
        white = np.sqrt(noise) * rng.standard_normal(size)
        right = np.stack([np.linalg.solve(factor, root * of.xy), white], 1)
        mean, deviation = root * np.linalg.solve(factor.T, right).T
        return mean, deviation
    prior = np.sqrt(var) * rng.standard_normal(size)
    scaled = of.x * var
    right = np.stack([of.y, -of.x @ prior - rng.standard_normal(rows)], 1)
    mean, change = (scaled.T @ np.linalg.solve(scaled @ of.x.T + np.eye(rows), right)).T
    return mean, np.sqrt(noise) * (prior + change)


def information(of: Regression | GeneralisedLinear) -> float:
    """What the rows say on a coefficient, in units of the inverse noise: their number in a linear
    model, and the mean over columns in another.
    """
    if isinstance(of, Regression):
        return float(len(of.y))
    unit = float(getattr(of.family, "scale", 1.0)) ** 2
    return unit * float((FamilySteps(of).expansion.x ** 2).sum(0).mean())


@dataclass(frozen=True)
class Place:
    """Where a chain is: the intercepts, b, and the length of its steps, from 0 to 1."""

    intercepts: Array
    b: Array
    length: float = 1.0


@dataclass(frozen=True)
class FamilySteps:
    r"""Steps of the intercepts and b given the variances of the prior of b.

    A step goes from θ to m + √(1 − δ²) (θ − m) + δξ with ξ ~ N(0, Σ). Here N(m, Σ) is the
    conditional distribution under the second-order expansion of the log likelihood at a model that
    a greedy search finds. It is accepted with the probability min(1, w'/w) for w = likelihood / its
    expansion. Source: Gamerman 1997; Cotter, Roberts, Stuart & White 2013.
    """

    of: GeneralisedLinear

    @cached_property
    def _eta(self) -> Array:
        of = self.of
        empty = np.zeros(len(of.groups), dtype=np.bool_)
        return of.subset(greedy_start(of, log_prior(of), empty)).eta()

    @cached_property
    def _rows(self) -> tuple[Array, Array, Array]:
        return self.of.expanded_rows(self._eta)

    @cached_property
    def expansion(self) -> Regression:
        """The linear model."""
        return self.of.expansion(self._eta)

    @cached_property
    def _own(self) -> tuple[Array, Array]:
        """The inverse of the expansion's columns of the intercepts, and a root of its covariance:
        given b, they are N(A⁺(t − Wb), (AᵀA)⁻¹).
        """
        inverse = np.asarray(np.linalg.pinv(self._rows[1]), dtype=np.float64)
        root = np.asarray(np.linalg.cholesky(inverse @ inverse.T), dtype=np.float64)
        return inverse, root

    def first(self) -> Place:
        """The model without coefficients."""
        zero = np.zeros(self._rows[0].shape[1])
        return Place(self._intercepts(zero), zero)

    def step(
        self, here: Place, var: Array, adapting: int | None, rng: np.random.Generator
    ) -> Place:
        """The next place. `adapting`: the number of the step while the length adapts, from 0."""
        inverse, root = self._own
        mean, deviation = conditional(self.expansion, var, 1.0, rng)
        white = root @ rng.standard_normal(len(root))
        change = -inverse @ (self._rows[0] @ deviation) + white
        center, length = self._intercepts(mean), here.length
        rest = np.sqrt(1 - length**2)
        there = Place(
            center + rest * (here.intercepts - center) + length * change,
            mean + rest * (here.b - mean) + length * deviation,
            length,
        )
        gain = self._log_weight(there) - self._log_weight(here)
        accepted = np.exp(min(gain, 0.0)) if np.isfinite(gain) else 0.0
        found = there if rng.random() < accepted else here
        if adapting is not None:
            length *= np.exp((accepted - _ACCEPTED) / (1 + adapting) ** 0.6)
        return Place(found.intercepts, found.b, float(min(max(length, _SHORTEST), 1.0)))

    def _intercepts(self, b: Array) -> Array:
        wide, _, target = self._rows
        return self._own[0] @ (target - wide @ b)

    def _log_weight(self, at: Place) -> float:
        """Log likelihood less its expansion, up to a constant."""
        wide, own, target = self._rows
        k = self.of.family.predictors
        eta = at.intercepts + self.of.x @ at.b.reshape(-1, k)
        exact = float(self.of.family.log_density(eta, self.of.y).sum())
        return exact + 0.5 * float(((target - own @ at.intercepts - wide @ at.b) ** 2).sum())
