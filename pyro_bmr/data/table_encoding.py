"""A table with texts, categories and missing values as a matrix of numbers.

Owns `TableEncoding`, fitted by `fit_encoding`, and `TableError`. Next: `readers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.errors import DataError, described, warn

if TYPE_CHECKING:
    import pandas as pd


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
class TableEncoding:
    """How a table becomes a matrix. `encoder`: scikit-learn's `ColumnTransformer`. `numeric`: the
    names of the columns that are numbers. `levels`: of each other column, the categories seen.
    """

    encoder: Any
    numeric: tuple[Any, ...]
    levels: dict[Any, tuple[str, ...]]

    @property
    def places(self) -> list[tuple[tuple[str, ...], int]]:
        """The names of what a column of the table, or the mark of its missing values, is encoded
        by, and the first of these columns of the matrix.
        """
        found: list[tuple[tuple[str, ...], int]] = []
        place = 0
        if self.numeric:
            marked = self.encoder.named_transformers_["numbers"].indicator_.features_
            names = [str(name) for name in self.numeric]
            names += [f"{self.numeric[k]} missing" for k in marked]
            found += [((name,), place + k) for k, name in enumerate(names)]
            place += len(names)
        if self.levels:
            seen = self.encoder.named_transformers_["categories"].categories_
            for name, values in zip(self.levels, seen, strict=True):
                found.append((tuple(f"{name}={value}" for value in values), place))
                place += len(values)
        return found

    def encoded(self, table: pd.DataFrame) -> NDArray[np.float64]:
        """The matrix (rows, encoded columns), in the units of the table. Categories that were not
        there in training have zeros, with a warning.
        """
        self._warn_of_new(table)
        plain = _plain(table, self.numeric, self.levels)
        return np.asarray(self.encoder.transform(plain), dtype=np.float64)

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


def fit_encoding(table: pd.DataFrame) -> TableEncoding:
    """The encoding of a training table.

    Columns that are numbers are filled in with their median, and a column of 0 and 1 marks what was
    missing; texts, categories and objects get one column for each value, and "missing" is a value.
    Texts that differ in most rows, and columns without a value, are left out with a warning.

    Raises:
        TableError: a column has values that are neither numbers nor texts.
    """
    numeric, levels = _kinds(table)
    encoder = _encoder(list(numeric), list(levels))
    encoder.fit(_plain(table, numeric, levels))
    return TableEncoding(encoder, tuple(numeric), levels)


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
