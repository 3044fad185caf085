"""The columns of a table as the columns of a regression: missing values filled in and marked,
categories as contrasts, everything centred and scaled, and the way back to the original units.

Owns `Columns`, fitted by `fit_columns`; `Term`, what is kept or pruned as one; `TableError`. Next:
`subset_chain.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.errors import DataError, described, warn

if TYPE_CHECKING:
    import pandas as pd

    from pyro_bmr.estimators.subset_evidence import Array, Index


class TableError(DataError, ValueError):
    """A table, a target or an option that an estimator cannot use; scikit-learn expects a
    ValueError.
    """


def refused(argument: str, rule: str, value: object) -> TableError:
    """The error of an argument that breaks a rule."""
    return TableError(f"{argument}: expected {rule}, got {described(value)}")


_MISSING = "missing"
_DISTINCT = 0.5  # of the rows: a text that differs in more of them is a name, not a category


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
    """How a table becomes the columns of a regression. `encoder`: scikit-learn's
    `ColumnTransformer`. `center`, `encoded_sd`: (encoded columns,) their means and standard
    deviations. `levels`: of each column with categories, those seen. `numeric`: the names of the
    others.
    """

    encoder: Any
    terms: tuple[Term, ...]
    center: Array
    encoded_sd: Array
    numeric: tuple[Any, ...]
    levels: dict[Any, tuple[str, ...]]

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
        self._warn_of_new(table)
        plain = _plain(table, self.numeric, self.levels)
        return np.asarray(self.encoder.transform(plain), dtype=np.float64)[:, self.places]

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

    def _warn_of_new(self, table: pd.DataFrame) -> None:
        for name, known in self.levels.items():
            values = {str(value) for value in table[name].dropna().unique()}
            if table[name].isna().any():
                values.add(_MISSING)
            if new := sorted(values - set(known)):
                shown = ", ".join(repr(value) for value in new[:3])
                warn(
                    f"column {name!r}: {len(new)} categories that training did not have, as"
                    f" {shown}; their rows are predicted with the mean of its categories"
                )


def fit_columns(table: pd.DataFrame) -> Columns:
    """What a training table needs to become a regression.

    Columns that are numbers are filled in with their median, and a column of 0 and 1 marks what was
    missing; texts, categories and objects get one column for each value, and "missing" is a value.
    Constant columns, and texts that differ in most rows, are left out with a warning.

    Raises:
        TableError: a column has values that are neither numbers nor texts, or no column is left.
    """
    numeric, levels = _kinds(table)
    encoder = _encoder(list(numeric), list(levels))
    encoded = np.asarray(encoder.fit_transform(_plain(table, numeric, levels)), dtype=np.float64)
    center = encoded.mean(0)
    varies = np.ptp(encoded, axis=0) > 0
    terms = _terms(encoder, numeric, levels, encoded - center, varies)
    return Columns(encoder, tuple(terms), center, encoded.std(0), tuple(numeric), levels)


def _kinds(table: pd.DataFrame) -> tuple[list[Any], dict[Any, tuple[str, ...]]]:
    """The names of the columns that are numbers, and the categories of the others."""
    numeric: list[Any] = []
    levels: dict[Any, tuple[str, ...]] = {}
    dropped: list[str] = []
    for name in table.columns:
        column = table[name]
        kind = getattr(column.dtype, "kind", "O")
        is_number = kind in "iufb" and not hasattr(column.dtype, "categories")
        if not is_number and kind not in "OSUTb":
            raise TableError(
                f"column {name!r}: expected numbers, texts or categories, got {column.dtype};"
                " turn dates into numbers (days since the first) or leave the column out"
            )
        present = column.dropna()
        if is_number and column.isna().all():
            dropped.append(f"{name!r} (nothing but missing values)")
        elif is_number:
            numeric.append(name)
        else:
            seen = sorted({str(value) for value in present})
            if len(seen) > max(2, _DISTINCT * len(present)) and len(present):
                dropped.append(f"{name!r} ({len(seen)} different texts in {len(present)} rows)")
                continue
            levels[name] = (*seen, *([_MISSING] if column.isna().any() else []))
    if dropped:
        warn(f"columns left out: {', '.join(dropped)}")
    return numeric, levels


def _plain(table: pd.DataFrame, numeric: Sequence[Any], levels: Any) -> pd.DataFrame:
    """The table with float64 for numbers and str for categories."""
    import pandas as pd

    columns: dict[Any, Any] = {
        name: pd.to_numeric(table[name]).to_numpy(dtype=np.float64, na_value=np.nan)
        for name in numeric
    }
    for name in levels:
        column = table[name]
        absent = column.isna().to_numpy()
        texts = np.array([str(value) for value in column], dtype=object)
        texts[absent] = _MISSING
        columns[name] = texts
    return pd.DataFrame(columns, index=table.index)


def _encoder(numeric: list[Any], categories: list[Any]) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OneHotEncoder

    fill = SimpleImputer(strategy="median", add_indicator=True)
    one_hot = OneHotEncoder(sparse_output=False, handle_unknown="ignore")
    return ColumnTransformer([("numbers", fill, numeric), ("categories", one_hot, categories)])


def _terms(
    encoder: Any,
    numeric: list[Any],
    levels: dict[Any, tuple[str, ...]],
    centred: Array,
    varies: NDArray[np.bool_],
) -> list[Term]:
    """The terms that vary, in the order of the encoded columns."""
    found: list[tuple[tuple[str, ...], int]] = []
    place = 0
    if numeric:
        marked = encoder.named_transformers_["numbers"].indicator_.features_
        names = [str(name) for name in numeric] + [f"{numeric[k]} missing" for k in marked]
        found += [((name,), place + k) for k, name in enumerate(names)]
        place += len(names)
    if levels:
        for name, seen in zip(
            levels, encoder.named_transformers_["categories"].categories_, strict=True
        ):
            found.append((tuple(f"{name}={value}" for value in seen), place))
            place += len(seen)
    terms, constant = [], []
    for labels, at in found:
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
