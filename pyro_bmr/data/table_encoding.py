"""A table with texts, categories and missing values as a matrix of numbers.

Owns `TableEncoding`, fitted by `fit_encoding`, and `TableError`. Next: `csv_file.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from numbers import Real
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
        for name in (*self.numeric, *self.levels):
            _check_cells(name, table[name])
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
        TableError: a column has values that are neither numbers nor texts, or whole numbers that
            float64 cannot tell apart.
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
        _check_cells(name, column)
        kind = getattr(column.dtype, "kind", "O")
        is_number = kind in "iufb" and not hasattr(column.dtype, "categories")
        is_number = is_number or (kind == "O" and _are_numbers(column.dropna()))
        if not is_number and kind not in "OSUTb":
            raise _no_category(name, str(column.dtype))
        present = column.dropna()
        if is_number and column.isna().all():
            dropped.append(f"{name!r} (nothing but missing values)")
        elif is_number:
            check_told_apart(name, present)
            numeric.append(name)
        else:
            seen = sorted({str(value) for value in present})
            if len(seen) > max(2, _DISTINCT * len(present)) and len(present):
                like = _number_words(seen)
                dropped.append(
                    f"{name!r} ({len(seen)} different texts in {len(present)} rows{like})"
                )
                continue
            levels[name] = (*seen, *([_MISSING] if column.isna().any() else []))
    if dropped:
        warn(f"columns left out: {', '.join(dropped)}")
    return numeric, levels


def _check_cells(name: Any, column: pd.Series) -> None:
    """Raises a TableError if a cell of a column of objects is no number, text or category."""
    import pandas as pd

    if getattr(column.dtype, "kind", "O") != "O" or hasattr(column.dtype, "categories"):
        return
    known = (str, bytes, bool, np.bool_, Real, Decimal, Enum, pd.Interval)
    wrong = {kind for kind in set(map(type, column.dropna())) if not issubclass(kind, known)}
    if wrong:
        row, cell = next((k, cell) for k, cell in enumerate(column) if type(cell) in wrong)
        raise _no_category(name, f"{described(cell)} in row {row}")


def _no_category(name: Any, got: str) -> TableError:
    return TableError(
        f"column {name!r}: expected numbers, texts or categories, got {got}; turn dates into"
        " numbers (days since the first), give each part of a list a column of its own, or leave"
        " the column out"
    )


def check_told_apart(name: Any, present: pd.Series) -> None:
    """Raises a TableError if whole numbers that differ are the same as float64."""
    if getattr(present.dtype, "kind", "O") in "fb" or not len(present):
        return
    as_floats = present.map(_as_float)
    if as_floats.abs().max() >= 2.0**53 and as_floats.nunique() < present.nunique():
        raise TableError(
            f"column {name!r}: expected numbers that differ as float64 too, got whole numbers"
            f" from 2**53 on, of whose {present.nunique()} values {as_floats.nunique()} are left;"
            " subtract the smallest, or make it text if it names things"
        )


def _as_float(number: Any) -> float:
    """The float64 of a number, infinite beyond the largest."""
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number > 0 or -1)


def _are_numbers(present: pd.Series) -> bool:
    """Whether objects are real numbers, such as `Decimal`; truth values are none."""
    kinds = set(map(type, present))
    return bool(kinds) and all(
        issubclass(kind, Real | Decimal) and not issubclass(kind, bool | np.bool_) for kind in kinds
    )


def _number_words(texts: Sequence[str]) -> str:
    """What to do with texts that are numbers with commas."""
    if all(re.fullmatch(r"[-+]?\d{1,3}(,\d{3})*(\.\d+)?", text) for text in texts):
        return ", numbers with commas: take those out"
    decimal = all(re.fullmatch(r"[-+]?\d{1,3}(\.?\d{3})*(,\d+)?|\d+,\d+", text) for text in texts)
    return ", numbers with decimal commas: make them points" if decimal else ""


def _as_numbers(name: Any, column: pd.Series) -> NDArray[np.float64]:
    """A column that was numbers in training.

    Raises:
        TableError: a value is none now, or infinite.
    """
    import pandas as pd

    if getattr(column.dtype, "kind", "O") == "O":
        if _are_numbers(column.dropna()):
            column = column.map(_as_float, na_action="ignore")
        found = pd.to_numeric(column, errors="coerce")
        wrong = (found.isna() & column.notna()).to_numpy()
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise TableError(
                f"column {name!r}: expected numbers, as in training, got"
                f" {described(column.iloc[row])} in row {row}"
            )
        column = found
    numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
    if (infinite := np.isinf(numbers)).any():
        raise TableError(
            f"column {name!r}: expected finite numbers, got infinity in row"
            f" {int(infinite.nonzero()[0][0])}; leave such rows out, or empty the cell to have it"
            " filled in"
        )
    return numbers


def _plain(table: pd.DataFrame, numeric: Sequence[Any], levels: Any) -> pd.DataFrame:
    """The table with float64 for numbers and str for categories."""
    import pandas as pd

    columns: dict[Any, Any] = {name: _as_numbers(name, table[name]) for name in numeric}
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
