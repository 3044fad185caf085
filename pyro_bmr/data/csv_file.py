"""The reader of .csv files: features with texts and gaps, one target or several, and the columns
that a likelihood reads.

Owns `csv_table`, a file as a table, and `read_csv`. Next: `readers.py`.
"""

from __future__ import annotations

import csv
import re
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
_HEAD = 1 << 16  # bytes that tell how a file is written
_OTHERS = {";": "';'", "\t": "tabs", "|": "'|'", " ": "spaces"}
_STARTS = {
    b"\xff\xfe": "UTF-16 or UTF-32",
    b"\xfe\xff": "UTF-16",
    b"\0\0\xfe\xff": "UTF-32",
    b"PK\x03\x04": "an Excel or zip file",
    b"\xd0\xcf\x11\xe0": "an Excel file",
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "a gzip file",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")


def csv_table(path: Path) -> pd.DataFrame:
    """The table in a file of UTF-8 text with a header and commas, which pandas may unpack.

    Raises:
        DataError: it is another kind of file, or has another encoding or separator, or rows that
            are longer than the header. The message says which, and how to read it.
    """
    import pandas as pd

    fault = f"'{path}' is not a readable .csv file"
    mend = "give it a header and rows, in UTF-8 and with commas between the columns"
    packed = path.name.lower().endswith(_PACKED)
    head = b""
    if not packed and not path.is_fifo():  # what is read from a pipe is gone
        with reading(fault, DataError, mend), path.open("rb") as file:
            head = file.read(_HEAD)
    _check_head(path, head)
    with reading(fault, DataError, mend):
        table = _decoded(path)
    if isinstance(table, UnicodeDecodeError):
        raise _not_utf8(path, packed)
    if not isinstance(table.index, pd.RangeIndex):
        raise DataError(
            f"'{path}': expected as many fields in a row as in the header, got {table.shape[1]}"
            f" names and {table.shape[1] + table.index.nlevels} fields; name every column, end no"
            " row with a comma, and write decimals with a point"
        )
    return table


def _decoded(path: Path) -> Any:
    """The table, or the error of bytes that are not UTF-8."""
    import pandas as pd

    try:
        return pd.read_csv(path)
    except UnicodeDecodeError as error:
        return error


def _not_utf8(path: Path, packed: bool) -> DataError:
    where = ""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        where = f", got the byte 0x{error.object[error.start]:02x} in line {before.count(10) + 1}"
    return DataError(
        f"'{path}': expected text in UTF-8{'' if packed else where}; save it as UTF-8, or read it"
        " with its encoding, such as pandas.read_csv(path, encoding='cp1252'), and give the"
        " DataFrame"
    )


def _check_head(path: Path, head: bytes) -> None:
    """Raises a DataError if the first bytes of a file are not UTF-8 text with commas."""
    kinds = [kind for start, kind in _STARTS.items() if head.startswith(start)]
    if head.isascii() and b"\0" not in head and head.startswith(b"PAR1"):
        kinds = []  # the name of a column
    if kinds or b"\0" in head:
        got = kinds[0] if kinds else "bytes of zero, as in UTF-16 without a mark"
        raise DataError(
            f"'{path}': expected text in UTF-8 with commas, got {got}; save it as UTF-8 with"
            " commas, or read it with pandas and give the DataFrame"
        )
    text = head.decode("utf-8-sig", errors="replace")
    if len(head) == _HEAD:
        text = text[: text.rfind("\n") + 1]
    mark = _other_mark(text)
    if mark is None:
        return
    comma = re.search(rf"(^|[{mark}])[-+]?\d+,\d+([{mark}\r]|$)", text, re.MULTILINE)
    options = f"sep={mark!r}{', decimal=' + repr(',') if comma else ''}"
    options += ", encoding='cp1252'" if "\ufffd" in text else ""
    raise DataError(
        f"'{path}': expected commas between the columns, got {_OTHERS[mark]}"
        f"{' and decimals with a comma' if comma else ''}; save it in UTF-8 with commas"
        f"{' and decimal points' if comma else ''}, or read it, as with pandas.read_csv(path,"
        f" {options}), and give the DataFrame"
    )


def _other_mark(text: str) -> str | None:
    """What is between the columns in the place of commas: it divides the header, which no comma
    does, or all rows alike, which commas do not.
    """
    fields = {mark: _fields(text, mark) for mark in (",", *_OTHERS)}
    names = {mark: row[0] if row else 1 for mark, row in fields.items()}
    alike = {mark: len(set(row)) == 1 for mark, row in fields.items()}
    if names[","] > 1 and alike[","]:
        return None
    for mark in _OTHERS:
        if names[mark] > 1 and (alike[mark] or (names[","] == 1 and mark != " ")):
            return mark
    return None


def _fields(text: str, mark: str) -> list[int]:
    """How many fields each row has, header and all, with `mark` between them."""
    try:
        rows = csv.reader(text.splitlines(), delimiter=mark, skipinitialspace=mark == " ")
        return [len(row) for row in rows if row]
    except csv.Error:
        return []


def read_csv(
    path: Path, target: str | Sequence[str] | None, likelihood: str | Likelihood | None = None
) -> Data:
    """`Data` from a table with a header; `target` is the column to predict, or several, in a list
    or with commas between them.

    Texts become one column for each value, and gaps are filled in, as the training rows have it
    (`fit_encoding`). Classes and grades are numbered in their sorted order. Columns that the
    likelihood reads are its own, and no features.
    """
    table = csv_table(path)
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
