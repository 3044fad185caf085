"""The reader of .csv files: features with texts and gaps, one target or several, and the columns
that a likelihood reads.

Owns `read_csv`. Next: `readers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.data.data_set import Data, split_of
from pyro_bmr.data.standardised import split
from pyro_bmr.data.table_encoding import fit_encoding
from pyro_bmr.data.targets import kind_of, may_miss
from pyro_bmr.errors import DataError, described
from pyro_bmr.files import reading
from pyro_bmr.likelihoods.likelihood import Likelihood
from pyro_bmr.likelihoods.names import as_likelihood
from pyro_bmr.likelihoods.weighted import reading_from, unweighted

if TYPE_CHECKING:
    import pandas as pd

Numbers = NDArray[Any]


def read_csv(
    path: Path, target: str | Sequence[str] | None, likelihood: str | Likelihood | None = None
) -> Data:
    """`Data` from a table with a header; `target` is the column to predict, or several, in a list
    or with commas between them.

    Texts become one column for each value, and gaps are filled in, as the training rows have it
    (`fit_encoding`). Classes and grades are numbered in their sorted order. Columns that the
    likelihood reads are its own, and no features.
    """
    import pandas as pd

    with reading(
        f"'{path}' is not a readable .csv file",
        DataError,
        "give it a header and rows of numbers",
    ):
        table = pd.read_csv(path)
    names = _targets(path, table, target)
    given = as_likelihood(likelihood, classes=3)  # to know its kind and its columns
    read = _read_columns(path, table, given, names)
    x = table.drop(columns=[*names, *read])
    if len(table) < 5 or not x.shape[1]:
        raise DataError(
            f"'{path}': expected at least 5 rows and one feature beside the target, got"
            f" {table.shape[0]} rows and {table.shape[1]} columns"
        )
    y = np.stack([_numbers(path, table[name], given) for name in names], 1)
    y, classes = _numbered(path, y, given)
    given = as_likelihood(likelihood, classes)
    _refuse_infinite(path, x)
    features = _features(path, x)
    if read:
        places = {name: features.shape[1] + k for k, name in enumerate(read)}
        given = reading_from(given, places)
        features = np.concatenate([features, table[read].to_numpy(dtype=np.float64)], 1)
    return split(path.stem, features, y[:, 0] if len(names) == 1 else y, given)


def _targets(path: Path, table: pd.DataFrame, target: str | Sequence[str] | None) -> list[str]:
    """The names of the columns to predict."""
    known = list(map(str, table.columns))
    if isinstance(target, str):
        parts = target.split(",")
        target = parts if target not in known and set(parts) <= set(known) else [target]
    names = list(target or ())
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        got = "" if not names else f"; got '{', '.join(map(_line, names))}'"
        raise DataError(
            f"'{path}': name the column to predict with --target; its columns are:"
            f" {', '.join(map(_line, known))}{got}"
        )
    return names


def _read_columns(
    path: Path, table: pd.DataFrame, likelihood: Likelihood | None, targets: Sequence[str]
) -> list[str]:
    """The columns that the likelihood reads, which are numbers without gaps."""
    found = []
    for option, name in getattr(likelihood, "reads", {}).items():
        if name not in table.columns or name in targets:
            others = ", ".join(_line(c) for c in table.columns if c not in targets)
            raise DataError(
                f"'{path}': {option}: expected a column beside the target, of {others}, got"
                f" {described(name)}"
            )
        column = table[name]
        if _kind(column.dtype) not in "iuf" or column.isna().any():
            raise DataError(
                f"'{path}': {option}: expected a number in every row of column '{_line(name)}', got"
                f" {column.dtype} with {int(column.isna().sum())} gaps"
            )
        found.append(str(name))
    return found


def _numbers(path: Path, column: pd.Series, likelihood: Likelihood | None) -> Numbers:
    """A target as numbers: of texts the number of each among the sorted ones; NaN where it is
    missing.
    """
    kind = None if likelihood is None else kind_of(likelihood)
    where = f"'{path}': target '{_line(column.name)}'"
    missing = column.isna().to_numpy()
    if missing.any() and not may_miss(likelihood):
        also = "" if likelihood is None else ", or give the likelihood missing=ignore"
        raise DataError(
            f"{where}: expected a value in every row, got none in row"
            f" {int(missing.nonzero()[0][0]) + 2} of the file; leave such rows out{also}"
        )
    if _kind(column.dtype) in "iufb":
        return column.to_numpy()
    if kind not in (None, "classes", "bits"):
        raise DataError(
            f"{where}: expected numbers for the likelihood {type(unweighted(likelihood)).__name__},"
            " got texts; number them in a column of their own, or choose categorical"
        )
    texts = [str(value) for value in column]
    classes = sorted({text for text, gap in zip(texts, missing, strict=True) if not gap})
    if len(classes) > max(2, len(column) // 2):
        raise _too_many(where, len(classes), len(column), "texts")
    if kind == "bits" and len(classes) != 2:
        raise DataError(f"{where}: expected two different texts, got {len(classes)}")
    found = np.searchsorted(np.array(classes), texts)
    return np.where(missing, np.nan, found) if missing.any() else found


def _numbered(path: Path, y: Numbers, likelihood: Likelihood | None) -> tuple[Numbers, int | None]:
    """Classes and grades of a likelihood as 0, 1, … in the order of their values, and how many."""
    if likelihood is None or kind_of(likelihood) not in ("classes", "grades"):
        return y, None
    ignored = getattr(likelihood, "ignore_index", None)
    gap = np.isnan(y) | (y == ignored) if ignored is not None else np.isnan(y)
    # in their own type: two large whole numbers may be one as a float
    values = np.unique(y[~gap])
    if len(values) > max(2, len(y) // 2):
        raise _too_many(f"'{path}': target", len(values), len(y), "numbers")
    numbers = np.searchsorted(values, y).astype(np.float64)
    return np.where(gap, np.nan, numbers), len(values)


def _too_many(where: str, found: int, rows: int, what: str) -> DataError:
    return DataError(
        f"{where}: expected numbers or classes, got {found} different {what} in {rows} rows"
    )


def _features(path: Path, x: pd.DataFrame) -> Numbers:
    """The features as numbers, encoded as the training rows say."""
    if all(kind in "iufb" for kind in map(_kind, x.dtypes.values)) and not x.isna().any(axis=None):
        return x.to_numpy(dtype=np.float64)
    encoding = fit_encoding(x.iloc[split_of(len(x))[0]])
    if not encoding.places:
        raise DataError(f"'{path}': no column is left to predict from; give numbers or categories")
    return encoding.encoded(x)


def _refuse_infinite(path: Path, table: pd.DataFrame) -> None:
    for name, column in table.items():
        if _kind(column.dtype) == "f" and np.isinf(column.to_numpy()).any():
            raise DataError(
                f"'{path}': column '{_line(name)}': expected finite numbers, got infinity; leave"
                " such rows out, or empty the cell to have it filled in"
            )


def _kind(dtype: Any) -> str:
    return str(getattr(dtype, "kind", "O"))


def _line(text: object) -> str:
    return " ".join(str(text).split())
