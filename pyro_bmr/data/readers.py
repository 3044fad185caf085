"""Readers of arrays: .npz files, and folders of IDX files in MNIST's format.

Next: `named.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.standardised import standardised
from pyro_bmr.errors import DataError
from pyro_bmr.files import reading
from pyro_bmr.likelihoods.likelihood import Likelihood
from pyro_bmr.likelihoods.names import as_likelihood

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def read_npz(path: Path, likelihood: str | Likelihood | None = None) -> Data:
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
            more = [key for key in ("x_val", "y_val") if key in file.files]
            arrays = {key: file[key] for key in (*IDX_FILES, *(more if len(more) == 2 else ()))}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("its members are no arrays")
    y = arrays["y_train"]
    grades = int(np.nanmax(y, initial=1)) + 1 if y.dtype.kind in "iuf" else None
    return standardised(path.stem, **arrays, likelihood=as_likelihood(likelihood, grades))


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
