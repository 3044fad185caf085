"""The columns of a table as the columns of a regression: missing values filled in and marked,
categories as contrasts, everything centred and scaled, and the way back to the original units.

Owns `Columns`, fitted by `fit_columns`, and `Term`, what is kept or pruned as one. Next:
`subset_chain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.data.table_encoding import TableEncoding, fit_encoding
from pyro_bmr.errors import warn

if TYPE_CHECKING:
    import pandas as pd

    from pyro_bmr.estimators.subset_evidence import Array, Index


@dataclass(frozen=True)
class Term:
    """One column of the table, or the mark of its missing values: kept or pruned as one.

    `names`: of its reported coefficients, one, or one for each category. `place`: its first column
    among those of the encoded table. `contrast`: (names, columns), from the columns of the
    regression to the coefficients, an orthonormal basis of the contrasts of the categories.
    `scale`: of the columns, their root mean square after centring.
    """

    names: tuple[str, ...]
    place: int
    contrast: Array
    scale: float


@dataclass(frozen=True)
class Columns:
    """How a table becomes the columns of a regression. `center`, `encoded_sd`: (encoded columns,)
    their means and standard deviations.
    """

    encoding: TableEncoding
    terms: tuple[Term, ...]
    center: Array
    encoded_sd: Array

    @property
    def names(self) -> list[str]:
        """Of all coefficients, in order."""
        return [name for term in self.terms for name in term.names]

    @property
    def groups(self) -> list[Index]:
        """The columns of the regression that belong to each term."""
        ends = np.cumsum([0, *(term.contrast.shape[1] for term in self.terms)])
        return [np.arange(a, b) for a, b in pairwise(ends)]

    @property
    def term_of_name(self) -> Index:
        """The number of the term of each coefficient."""
        return np.repeat(np.arange(len(self.terms)), [len(term.names) for term in self.terms])

    @property
    def places(self) -> Index:
        """The column of the encoded table that each coefficient belongs to."""
        places = [np.arange(term.place, term.place + len(term.names)) for term in self.terms]
        return np.concatenate([np.empty(0, dtype=np.int64), *places])

    @property
    def spread(self) -> Array:
        """The standard deviation of the column that each coefficient belongs to."""
        return self.encoded_sd[self.places]

    def encoded(self, table: pd.DataFrame) -> Array:
        """The columns that the coefficients belong to, (rows, coefficients), in the units of the
        table.
        """
        return self.encoding.encoded(table)[:, self.places]

    def matrix(self, table: pd.DataFrame) -> Array:
        """The columns of the regression, (rows, columns), centred and scaled as in training."""
        centred = self.encoded(table) - self.center[self.places]
        ends = pairwise(np.cumsum([0, *(len(term.names) for term in self.terms)]))
        parts = [
            centred[:, a:b] @ term.contrast / term.scale
            for term, (a, b) in zip(self.terms, ends, strict=True)
        ]
        return np.concatenate(parts, 1) if parts else np.empty((len(table), 0))

    def coefficients(self, b: Array) -> Array:
        """The coefficients of the table's own columns from those of the regression, over the
        last axis.
        """
        parts = [
            b[..., columns] @ term.contrast.T / term.scale
            for term, columns in zip(self.terms, self.groups, strict=True)
        ]
        return np.concatenate(parts, -1) if parts else b[..., :0]

    def offset(self, coefficients: Array) -> Array:
        """What centring took from the intercept, Σ mean · coefficient, over the last axis."""
        return coefficients @ self.center[self.places]


def fit_columns(table: pd.DataFrame) -> Columns:
    """What a training table needs to become a regression.

    Columns that are numbers are filled in with their median, and a column of 0 and 1 marks what was
    missing; texts, categories and objects get one column for each value, and "missing" is a value.
    Constant columns, and texts that differ in most rows, are left out with a warning.

    Raises:
        TableError: a column has values that are neither numbers nor texts, or no column is left.
    """
    encoding = fit_encoding(table)
    encoded = encoding.encoded(table)
    center = encoded.mean(0)
    terms = _terms(encoding, encoded - center, np.ptp(encoded, axis=0) > 0)
    return Columns(encoding, tuple(terms), center, encoded.std(0))


def _terms(encoding: TableEncoding, centred: Array, varies: NDArray[np.bool_]) -> list[Term]:
    """The terms that vary, in the order of the encoded columns."""
    terms, constant = [], []
    for labels, at in encoding.places:
        contrast = contrasts(len(labels))
        part = centred[:, at : at + len(labels)] @ contrast
        scale = float(np.sqrt((part**2).mean())) if part.size else 0.0
        if varies[at : at + len(labels)].any() and 0 < scale < np.inf:
            terms.append(Term(labels, at, contrast, scale))
        else:
            constant.append(labels[0].partition("=")[0])
    if constant:
        warn(f"constant columns left out: {', '.join(constant)}")
    return terms


def contrasts(count: int) -> Array:
    """(count, count − 1) orthonormal columns that sum to zero; 1 for a single number."""
    if count == 1:
        return np.ones((1, 1))
    return np.linalg.qr(np.eye(count) - 1.0 / count)[0][:, : count - 1]
