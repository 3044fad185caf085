"""The columns of a table as the columns of a regression: missing values filled in and marked,
categories as contrasts, everything centred and scaled, and the way back to the original units.

Owns `Columns`, fitted by `fit_columns`, `Term`, what is kept or pruned as one, and `alike`, which
terms are nearly the same. Next: `subset_chain.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

_ALIKE = 0.99  # a correlation
_AT_ONCE = 1024  # columns whose correlations with all others are in memory
_MOST_ALIKE = 20_000  # terms that are compared


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

    @property
    def name(self) -> str:
        """Of its column."""
        return self.names[0].partition("=")[0] if len(self.names) > 1 else self.names[0]


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


def alike(x: Array, groups: Sequence[Index], inclusion: Array) -> list[list[int]]:
    """The terms of the regression that are nearly the same, in lists of two and more.

    Of two single columns |r| > 0.99. Of two terms of d columns each tr(PQ)/d > 0.99², P and Q
    projecting on their columns: the mean square of their canonical correlations. Of more than
    20,000 terms those with the largest inclusion are compared.
    """
    order = np.sort(np.argsort(-inclusion, kind="stable")[:_MOST_ALIKE])
    sizes = np.array([len(groups[g]) for g in order], dtype=np.int64)
    label = np.arange(len(groups))
    for size in np.unique(sizes):
        terms = order[sizes == size]
        for some in _rows_alike(x, [groups[g] for g in terms]):
            joined = np.unique(label[terms[some]])
            if len(joined) > 1:
                label[np.isin(label, joined)] = joined[0]
    found, counts = np.unique(label, return_counts=True)
    return [np.flatnonzero(label == each).tolist() for each in found[counts > 1]]


def _rows_alike(x: Array, groups: Sequence[Index]) -> Iterator[Index]:
    """Each term with the later ones that are nearly the same; all have as many columns."""
    size, count = len(groups[0]), len(groups)
    basis = x[:, np.concatenate(groups)]
    if size == 1:
        basis = (basis / np.sqrt((basis**2).sum(0))).astype(np.float32)
    else:
        parts = np.swapaxes(basis.reshape(len(x), count, size), 0, 1)
        basis = np.concatenate(list(np.linalg.qr(parts)[0]), 1).astype(np.float32)
    step = max(1, _AT_ONCE // size)
    for start in range(0, count, step):
        squares = (basis[:, start * size : (start + step) * size].T @ basis[:, start * size :]) ** 2
        if size > 1:
            squares = squares.reshape(-1, size, squares.shape[1] // size, size).sum((1, 3)) / size
        same = np.triu(squares > _ALIKE**2)  # a term with itself, too
        for row in np.flatnonzero(same.sum(1) > 1):
            yield start + np.flatnonzero(same[row])


def alike_names(groups: Sequence[Sequence[str]]) -> str:
    """Groups of names in a line, the first few of them."""
    said = [
        f"{', '.join(group[:5])}{f' and {len(group) - 5} more' if len(group) > 5 else ''}"
        for group in groups[:5]
    ]
    return "; ".join([*said, *([f"{len(groups) - 5} more groups"] if len(groups) > 5 else [])])
