"""Readers of data files: .npz, .csv, and folders of IDX files in MNIST's format.

Next: `named.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.data.data_set import Data, split, split_of, standardised
from pyro_bmr.data.table_encoding import fit_encoding
from pyro_bmr.errors import DataError
from pyro_bmr.files import reading

if TYPE_CHECKING:
    import pandas as pd

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def read_npz(path: Path) -> Data:
    """`Data` from the arrays x_train, y_train, x_test, y_test, and x_val, y_val if there are."""
    with reading(
        f"'{path}' is not a readable .npz file without pickles",
        DataError,
        "write x_train, y_train, x_test and y_test with numpy.savez",
    ):
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            if missing := [key for key in IDX_FILES if key not in file.files]:
                raise ValueError(
                    f"it has no {' and no '.join(missing)}; found:"
                    f" {', '.join(file.files) or 'nothing'}"
                )
            keys = [
                *IDX_FILES,
                *(("x_val", "y_val") if "x_val" in file.files and "y_val" in file.files else ()),
            ]
            arrays = [file[key] for key in keys]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("its members are no arrays")
    return standardised(path.stem, *arrays)


def read_csv(path: Path, target: str | None) -> Data:
    """`Data` from a table with a header; `target` is the column to predict.

    Texts become one column for each value, and gaps are filled in, as the training rows have it
    (`fit_encoding`). The classes of a target of texts are numbered in their sorted order.
    """
    import pandas as pd

    with reading(
        f"'{path}' is not a readable .csv file",
        DataError,
        "give it a header and rows of numbers",
    ):
        table = pd.read_csv(path)
    columns = ", ".join(_line(c) for c in table.columns)
    if target is None or target not in table.columns:
        raise DataError(
            f"'{path}': name the column to predict with --target; its columns are: {columns}"
            + ("" if target is None else f"; got '{target}'")
        )
    if len(table) < 5 or table.shape[1] < 2:
        raise DataError(
            f"'{path}': expected at least 5 rows and one feature beside the target, got"
            f" {table.shape[0]} rows and {table.shape[1]} columns"
        )
    x, y = table.drop(columns=target), _target(path, table[target])
    _refuse_infinite(path, x)
    if all(kind in "iufb" for kind in map(_kind, x.dtypes.values)) and not x.isna().any(axis=None):
        return split(path.stem, x.to_numpy(dtype=np.float64), y)
    train, test = split_of(len(table))
    encoding = fit_encoding(x.iloc[train])
    if not encoding.places:
        raise DataError(f"'{path}': no column is left to predict from; give numbers or categories")
    parts = [part for rows in (train, test) for part in (encoding.encoded(x.iloc[rows]), y[rows])]
    return standardised(path.stem, *parts)


def _target(path: Path, column: pd.Series) -> np.ndarray:
    """The target as numbers: of texts the number of each among the sorted ones."""
    if column.isna().any():
        row = int(column.isna().to_numpy().nonzero()[0][0])
        raise DataError(
            f"'{path}': target '{_line(column.name)}': expected a value in every row, got none in"
            f" row {row + 2} of the file; leave such rows out"
        )
    if _kind(column.dtype) in "iufb":
        return column.to_numpy()
    classes = sorted({str(value) for value in column})
    if len(classes) > max(2, len(column) // 2):
        raise DataError(
            f"'{path}': target '{_line(column.name)}': expected numbers or classes, got"
            f" {len(classes)} different texts in {len(column)} rows"
        )
    return np.searchsorted(np.array(classes), [str(value) for value in column])


def _refuse_infinite(path: Path, table: pd.DataFrame) -> None:
    for name, column in table.items():
        if _kind(column.dtype) == "f" and np.isinf(column.to_numpy()).any():
            raise DataError(
                f"'{path}': column '{_line(name)}': expected finite numbers, got infinity; leave"
                " such rows out, or empty the cell to have it filled in"
            )


def _kind(dtype: Any) -> str:
    return str(getattr(dtype, "kind", "O"))


def idx_path(folder: Path, stem: str) -> Path | None:
    """The file of a folder that holds the array `stem`, gzipped or not."""
    return next(
        (
            p
            for p in (folder / stem, folder / f"{stem}.gz", folder / stem.replace("-idx", ".idx"))
            if p.is_file()
        ),
        None,
    )


def read_idx_folder(folder: Path, name: str, sha256: Mapping[str, str]) -> Data:
    """`Data` from four IDX files, whose contents must have the hashes that are given."""
    arrays = []
    for key, stem in IDX_FILES.items():
        path = idx_path(folder, stem)
        if path is None:
            raise DataError(
                f"'{folder}': no file {stem} (or {stem}.gz); a folder of data has"
                f" {', '.join(IDX_FILES.values())}"
            )
        arrays.append(read_idx(path, sha256.get(key)))
    return standardised(
        name, arrays[0], arrays[1].astype(np.int64), arrays[2], arrays[3].astype(np.int64)
    )


def read_idx(path: Path, sha256: str | None = None) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not; refused unless its header, its
    length and, if given, its hash fit.

    Raises:
        DataError: it is something else, truncated, or altered.
    """
    with reading(f"'{path}' is not readable", DataError, "install it again"):
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(
            f"'{path}': expected an IDX file of unsigned bytes, got one that begins with"
            f" {raw[:4].hex() or 'nothing'}; install it again"
        )
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    if len(raw) - 4 - 4 * raw[3] != math.prod(shape):
        raise DataError(
            f"'{path}': its header says {' × '.join(map(str, shape))} bytes, it has"
            f" {len(raw) - 4 - 4 * raw[3]}; it is truncated, install it again"
        )
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(
            f"'{path}': its contents differ from the published file (sha256"
            f" {hashlib.sha256(raw).hexdigest()[:12]}…, expected {sha256[:12]}…); install it again"
        )
    try:
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except ValueError:  # more axes than NumPy has, or a length of 0 beside lengths beyond its range
        raise DataError(
            f"'{path}': an array of {' × '.join(map(str, shape))} cannot be held; install it again"
        ) from None


def _line(text: object) -> str:
    return " ".join(str(text).split())
