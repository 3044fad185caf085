r"""What a family of a generalised linear model has: log density, its derivatives, predictions.

Owns the protocols `Family`, `NumberFamily`, `ClassFamily` and `Inferred`, and the grid of slabs.
Each row has η of shape (predictors,). Imports numpy only. Next: `count_families.py`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from pyro_bmr.estimators.subset_evidence import Array

SLABS = np.logspace(-1, 3, 5)
"""The grid of slab variances τ² of numbers with noise, in units of the noise variance, for columns
of variance 1."""
GENERALISED_SLABS = np.logspace(-0.5, 1.5, 3)
"""The same where η is a log rate or a logit."""
LARGEST = 30.0  # |η|; beyond it exp(η) is 1e13 counts, or a probability of 1e-13


class Family(Protocol):
    """p(y | η) of a generalised linear model.

    `predictors`: how many η a row has. `slabs`: the grid of prior variances of the coefficients of
    columns of variance 1.
    """

    @property
    def predictors(self) -> int: ...

    @property
    def slabs(self) -> Array: ...

    def start(self, y: Array) -> Array:
        """η of the model without columns, of each row or of all, (…, predictors)."""
        ...

    def log_density(self, eta: Array, y: Array) -> Array:
        """Of each row, nats: η (…, rows, predictors), result (…, rows)."""
        ...

    def derivatives(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """Of the log density by η: gradient (…, rows, predictors), and minus the second derivative
        or its expectation, (…, rows, predictors, predictors), never negative.
        """
        ...


class NumberFamily(Family, Protocol):
    """A family of numbers or counts; η has one predictor."""

    def mean(self, eta: Array) -> Array:
        """E[y | η], (…, rows)."""
        ...

    def variance(self, eta: Array) -> Array:
        """Var[y | η], (…, rows); infinite where there is none."""
        ...

    def draw(self, eta: Array, rng: np.random.Generator) -> Array:
        """One y for each η, (…, rows)."""
        ...


class ClassFamily(Family, Protocol):
    """A family of classes 0 … C − 1."""

    def probabilities(self, eta: Array) -> Array:
        """Of the classes, (…, rows, C)."""
        ...


@runtime_checkable
class Inferred(Family, Protocol):
    """A family with parameters of its own, which are set to the most probable ones."""

    @property
    def parameters(self) -> Array:
        """Those that are inferred, as real numbers; empty if all are given."""
        ...

    def at(self, parameters: Array) -> Inferred:
        """With other values of them."""
        ...

    def log_prior(self) -> float:
        """The log density of `parameters`, up to a constant, nats."""
        ...
