"""A data set as tensors ready to fit, its inputs standardised by the moments of the training rows.

Owns `Data`; `standardised` and `split`, which make it from raw arrays; and `validation_data`, which
replaces the test rows by validation rows. Next: `readers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.checks import check_rows
from pyro_bmr.errors import DataError, FitError, described, holds
from pyro_bmr.likelihoods import Categorical, Normal
from pyro_bmr.likelihoods.likelihood import Likelihood

_SPLIT_SEED = 0
_WORDS = {"train": "training", "test": "test", "val": "validation"}


@dataclass(frozen=True)
class Data:
    """A data set split into training and test rows.

    x: float32, (n, features), (n, channels, height, width) or (n, length); standardised.

    y: int64 classes from 0, or float32 standardised targets. A prediction times `target_scale` plus
    `target_mean` is in the original units. The command line, `compare` and `study` score in the
    original units (rmse · target_scale, nll + log target_scale). An ELBO, and the `validation_nll`
    of a fit's history, refer to the y that the fit was given.

    `x_val` and `y_val`: validation rows, if the data came with some.
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
        """The number of outputs of a network for these data."""
        return 1 if self.classes is None else self.classes

    def likelihood(self) -> Likelihood:
        """The likelihood of the task."""
        return Normal() if self.classes is None else Categorical()


def standardised(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    x_val: np.ndarray | None = None,
    y_val: np.ndarray | None = None,
) -> Data:
    """`Data` from raw arrays. Images are standardised by one mean and scale, tables column by
    column (constant columns are only centred), and real targets too.

    Raises:
        DataError: shapes or types do not fit together, values are not finite, or a label is out of
            the range of the training labels.
    """
    parts = {"train": (x_train, y_train), "test": (x_test, y_test)}
    if x_val is not None and y_val is not None:
        parts["val"] = (x_val, y_val)
    _check_arrays(name, parts)
    integer = all(y.dtype.kind in "iub" for _, y in parts.values())
    xs, ys = _tensors(name, parts, integer)
    xs = _standardised_inputs(xs)
    classes, mean, scale = None, 0.0, 1.0
    if integer:
        classes = _class_count(name, ys)
    else:
        ys, mean, scale = _standardised_targets(name, ys)
    return Data(
        name,
        xs["train"],
        ys["train"],
        xs["test"],
        ys["test"],
        classes,
        xs.get("val"),
        ys.get("val"),
        mean,
        scale,
    )


def _check_arrays(name: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Raises DataError unless all arrays are numbers, and all x have rows of one shape."""
    x_train = parts["train"][0]
    for part, raw in parts.items():
        for key, array in zip((f"x_{part}", f"y_{part}"), raw, strict=True):
            if array.dtype.kind not in "iufb":
                raise DataError(f"{name}: {key}: expected numbers, got type {array.dtype}")
        if raw[0].ndim < 2 or raw[0].shape[1:] != x_train.shape[1:]:
            raise DataError(
                f"{name}: expected x_train and x_{part} of shape (rows, ...), alike but for the"
                f" rows, got {x_train.shape} and {raw[0].shape}"
            )


def _tensors(
    name: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray]], integer: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The x and the y of each part; a y of one column is a vector.

    Raises:
        DataError: a row is not finite, or y has not one number for each row.
    """
    xs, ys = {}, {}
    for part, (x, y) in parts.items():
        xs[part], target = _tensor(x), _tensor(y, integer)
        ys[part] = target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target
    for part, target in ys.items():
        check_rows(xs[part], target, f"{name}, {_WORDS[part]} rows")
        if target.ndim != 1:
            shape = tuple(target.shape)
            raise DataError(f"{name}: y: expected one number per row, got shape {shape}")
    return xs, ys


def _tensor(array: np.ndarray, integer: bool = False) -> Tensor:
    """The array as int64, or as a float type that holds its numbers exactly: a large offset must
    not cost digits before it is subtracted.
    """
    real = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64 if integer else real))


def _standardised_inputs(xs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All inputs with the mean and scale of the training rows taken off, float32: one mean and
    scale for images, which get a channel if they have none, and one per column for tables.
    """
    if xs["train"].ndim == 3:  # (n, height, width)
        xs = {part: x[:, None] for part, x in xs.items()}
    train = xs["train"]
    dims = tuple(range(train.ndim)) if train.ndim > 2 else (0,)
    mean, scale = train.mean(dims, keepdim=True), train.std(dims, keepdim=True, correction=0)
    scale = torch.where(train.amax(dims, keepdim=True) > train.amin(dims, keepdim=True), scale, 1.0)
    return {part: ((x - mean) / scale).float() for part, x in xs.items()}


def _class_count(name: str, ys: Mapping[str, Tensor]) -> int:
    """The number of classes: one more than the largest training label.

    Raises:
        DataError: a label is out of range, or there is one class only.
    """
    classes = int(ys["train"].max()) + 1
    for part, y in ys.items():
        if int(y.min()) < 0 or int(y.max()) >= classes:
            bad = int(y.min()) if int(y.min()) < 0 else int(y.max())
            raise DataError(
                f"{name}: {_WORDS[part]} label {bad} is out of range; labels run from 0 to the"
                f" largest training label, {classes - 1}"
            )
    if classes < 2:
        raise DataError(f"{name}: expected at least two classes in the training labels, got one")
    return classes


def _standardised_targets(
    name: str, ys: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float, float]:
    """The targets standardised with the training rows, float32, and the mean and scale of these.

    Raises:
        DataError: the training targets are all equal.
    """
    train = ys["train"]
    mean, scale = float(train.mean()), float(train.std(correction=0))
    if bool((train == train[0]).all()):
        raise DataError(
            f"{name}: the target is constant ({mean:g}) in the training rows; there is"
            " nothing to predict"
        )
    return {part: ((y - mean) / scale).float() for part, y in ys.items()}, mean, scale


def split(name: str, x: np.ndarray, y: np.ndarray) -> Data:
    """`Data` whose test split is a fifth of the rows, the same ones at every call."""
    train, test = split_of(len(x))
    return standardised(name, x[train], y[train], x[test], y[test])


def split_of(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training rows and of the test rows, a fifth of all."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    test = max(rows // 5, 1)
    return order[test:], order[:test]


def validation_data(data: Data, fraction: float) -> Data:
    """`Data` with its validation rows in the place of the test rows; without validation rows, with
    a held-out `fraction` of the training rows.

    Raises:
        FitError: no row is left on one of the sides.
    """
    if data.x_val is not None and data.y_val is not None:
        return replace(data, name=f"{data.name} (validation)", x_test=data.x_val, y_test=data.y_val)
    x, y = data.x_train, data.y_train
    train, held = split_rows(len(x), float(fraction), _SPLIT_SEED)
    name = f"{data.name} (validation)"
    return replace(
        data, name=name, x_train=x[train], y_train=y[train], x_test=x[held], y_test=y[held]
    )


def split_rows(
    rows: int, fraction: float, seed: int, shuffle: bool = True
) -> tuple[Tensor | slice, Tensor | slice]:
    """The rows to train on and those to hold out, a `fraction` drawn at random, or, without
    `shuffle`, the last ones.

    Raises:
        FitError: no row is left on one of the sides.
    """
    held = round(fraction * rows) if holds(lambda x: 0 < x < 1, fraction) else 0
    if not 0 < held < rows:
        raise FitError(
            f"validation={described(fraction)}: expected a fraction that leaves at least one of"
            f" the {rows} rows on each side"
        )
    if not shuffle:
        return slice(None, -held), slice(-held, None)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu")
    return order[held:], order[:held]
