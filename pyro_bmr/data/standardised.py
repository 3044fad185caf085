"""Raw arrays as a data set: inputs and real targets standardised by the moments of the training
rows, targets checked.

Owns `standardised` and `split`. Next: `table_encoding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.checks import check_rows
from pyro_bmr.data.data_set import Data, split_of
from pyro_bmr.data.targets import PARTS, Targets, default_likelihood, targets_of
from pyro_bmr.errors import DataError
from pyro_bmr.likelihoods.likelihood import Likelihood, check_read, read_inputs


def standardised(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    x_val: np.ndarray | None = None,
    y_val: np.ndarray | None = None,
    likelihood: Likelihood | None = None,
) -> Data:
    """`Data` from raw arrays. Images are standardised by one mean and scale, tables column by
    column (constant columns are only centred), and real targets too.

    Args:
        likelihood: of the targets, which may then be missing or several; what it reads from x
            keeps its values. By default whole numbers are classes and others real targets.

    Raises:
        DataError: shapes or types do not fit together, values are not finite, or a label is out of
            the range of the training labels.
    """
    parts = {"train": (x_train, y_train), "test": (x_test, y_test)}
    if x_val is not None and y_val is not None:
        parts["val"] = (x_val, y_val)
    _check_arrays(name, parts)
    integer = all(y.dtype.kind in "iub" for _, y in parts.values())
    if likelihood is not None:
        return _under(name, likelihood, *_tensors(name, parts, integer, given=True))
    xs, ys = _tensors(name, parts, integer)
    kinds = {f"y_{part}": y.dtype for part, (_, y) in parts.items()}
    if not integer and any(kind.kind in "iub" for kind in kinds.values()):
        got = ", ".join(f"{key} {kind}" for key, kind in kinds.items())
        raise DataError(
            f"{name}: expected targets of one kind, whole numbers for classes or floats, got {got};"
            " convert them, or give the likelihood"
        )
    classes, mean, scale = None, 0.0, 1.0
    if integer:
        classes = _class_count(name, ys)
    else:
        ys, mean, scale = _standardised_targets(name, ys)
    return _data(name, _standardised_inputs(xs), Targets(ys, None, classes, mean, scale))


def _under(
    name: str, likelihood: Likelihood, xs: Mapping[str, Tensor], ys: Mapping[str, Tensor]
) -> Data:
    """The data under a likelihood that is given."""
    reads = getattr(likelihood, "reads", {})
    for part, x in xs.items():
        if reads and x.ndim != 2:
            raise DataError(f"{name}: {', '.join(reads)}: expected a table, got {tuple(x.shape)}")
        check_read(likelihood, x, f"{name}, {PARTS[part]} rows")
        weights = read_inputs(likelihood, x)[1].get("weights")
        if part == "train" and isinstance(weights, Tensor) and not bool(weights.any()):
            raise DataError(
                f"{name}, training rows: weights: expected a number > 0 in a row at least, got"
                " zeros; give rows that count"
            )
    targets = targets_of(name, ys, likelihood)
    raw = [int(where) for where in reads.values()]
    if default_likelihood(likelihood, targets.ys):
        targets = replace(targets, likelihood=None)
    return _data(name, _standardised_inputs(xs, raw), targets)


def _data(name: str, xs: Mapping[str, Tensor], targets: Targets) -> Data:
    ys = targets.ys
    return Data(
        name,
        xs["train"],
        ys["train"],
        xs["test"],
        ys["test"],
        targets.classes,
        xs.get("val"),
        ys.get("val"),
        targets.mean,
        targets.scale,
        targets.likelihood,
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
    name: str,
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
    integer: bool,
    given: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The x and the y of each part; a y of one column is a vector. Where the likelihood is `given`,
    it says later which targets it takes.

    Raises:
        DataError: a row is not finite, or y has not one number for each row.
    """
    xs, ys = {}, {}
    for part, (x, y) in parts.items():
        xs[part], target = _tensor(x), _tensor(y, integer)
        ys[part] = target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target
    for part, target in ys.items():
        check_rows(xs[part], target, f"{name}, {PARTS[part]} rows", missing=given)
        if target.ndim != 1 and not given:
            shape = tuple(target.shape)
            raise DataError(
                f"{name}: y: expected one number per row, got shape {shape}; for several targets"
                " give a likelihood"
            )
    return xs, ys


def _tensor(array: np.ndarray, integer: bool = False) -> Tensor:
    """The array as int64, or as a float type that holds its numbers exactly: a large offset must
    not cost digits before it is subtracted.
    """
    real = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64 if integer else real))


def _standardised_inputs(xs: Mapping[str, Tensor], raw: Sequence[int] = ()) -> dict[str, Tensor]:
    """All inputs with the mean and scale of the training rows taken off, float32: one mean and
    scale for images, which get a channel if they have none, and one per column for tables, except
    the columns that are to stay `raw`.
    """
    if xs["train"].ndim == 3:  # (n, height, width)
        xs = {part: x[:, None] for part, x in xs.items()}
    train = xs["train"]
    dims = tuple(range(train.ndim)) if train.ndim > 2 else (0,)
    mean, scale = train.mean(dims, keepdim=True), train.std(dims, keepdim=True, correction=0)
    mean[..., list(raw)] = 0.0
    scale = torch.where(train.amax(dims, keepdim=True) > train.amin(dims, keepdim=True), scale, 1.0)
    scale[..., list(raw)] = 1.0
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
                f"{name}: {PARTS[part]} label {bad} is out of range; labels run from 0 to the"
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


def split(name: str, x: np.ndarray, y: np.ndarray, likelihood: Likelihood | None = None) -> Data:
    """`Data` whose test split is a fifth of the rows, the same ones at every call."""
    train, test = split_of(len(x))
    return standardised(name, x[train], y[train], x[test], y[test], likelihood=likelihood)
