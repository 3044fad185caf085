"""A data set as tensors ready to fit: inputs standardised with the training rows' moments.

Owns `Data`, `standardised` and `split`, which make it of raw arrays, and `validation_data`, which
hides the test rows. Next: `readers.py`.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Data:
    """A data set split into training and test rows.

    x: float32, (n, features), (n, channels, height, width) or (n, length); standardised. y: int64
    classes from 0, or float32 standardised targets, whose `target_mean` and `target_scale` are in
    the original units: what is predicted times `target_scale` plus `target_mean` is in them. Scores
    of the command line, of `compare` and of `study` are in the original units (rmse · target_scale,
    nll + log target_scale); an ELBO, and the `validation_nll` of a fit's history, are of the y that
    the fit was given. `x_val` and `y_val`: validation rows, if the data came with some.
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


def standardised(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    x_val: np.ndarray | None = None,
    y_val: np.ndarray | None = None,
) -> Data:
    """`Data` from raw arrays: images by one mean and scale, columns each by its own (constant ones
    are only centred); real targets standardised.

    Raises:
        DataError: shapes or types do not fit together, values are not finite, or a label is out of
            the range of the training labels.
    """
    parts = {"train": (x_train, y_train), "test": (x_test, y_test)}
    if x_val is not None and y_val is not None:
        parts["val"] = (x_val, y_val)
    for split, raw in parts.items():
        for key, array in zip((f"x_{split}", f"y_{split}"), raw, strict=True):
            if array.dtype.kind not in "iufb":
                raise DataError(f"{name}: {key} has type {array.dtype}; numbers are wanted")
        if raw[0].ndim < 2 or raw[0].shape[1:] != x_train.shape[1:]:
            raise DataError(
                f"{name}: x_train has shape {x_train.shape} and x_{split} {raw[0].shape}; (rows,"
                " ...) with equal rest is wanted"
            )
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
                raise DataError(
                    f"{name}: {words[split]} label {bad} is out of range; labels run from 0 to the"
                    f" largest training label, {classes - 1}"
                )
        if classes < 2:
            raise DataError(
                f"{name}: the training labels have one class only; two at least are wanted"
            )
    else:
        y_mean, y_scale = float(ys["train"].mean()), float(ys["train"].std(correction=0))
        if bool((ys["train"] == ys["train"][0]).all()):
            raise DataError(
                f"{name}: the target is constant ({y_mean:g}) in the training rows; there is"
                " nothing to predict"
            )
        ys = {split: ((y - y_mean) / y_scale).float() for split, y in ys.items()}
    return Data(
        name,
        xs["train"],
        ys["train"],
        xs["test"],
        ys["test"],
        classes,
        xs.get("val"),
        ys.get("val"),
        y_mean,
        y_scale,
    )


def _tensor(array: np.ndarray, integer: bool = False) -> Tensor:
    """int64, or a float type that holds the array's numbers: an offset must not cost the digits
    before it is taken off.
    """
    real = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64 if integer else real))


def split(name: str, x: np.ndarray, y: np.ndarray) -> Data:
    """`Data` of which a fifth of the rows, drawn once and for all, is the test split."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(x))
    test = max(len(x) // 5, 1)
    return standardised(name, x[order[test:]], y[order[test:]], x[order[:test]], y[order[:test]])


def validation_data(data: Data, fraction: float) -> Data:
    """`Data` whose test rows are its validation rows, the test rows being out of sight; without
    any, the held-out `fraction` of the training rows.

    Raises:
        FitError: no row is left on one of the sides.
    """
    if data.x_val is not None and data.y_val is not None:
        return replace(data, name=f"{data.name} (validation)", x_test=data.x_val, y_test=data.y_val)
    (x, y), held = validation_split(data.x_train, data.y_train, float(fraction), _SPLIT_SEED)
    assert held is not None
    return replace(
        data, name=f"{data.name} (validation)", x_train=x, y_train=y, x_test=held[0], y_test=held[1]
    )


def validation_split(
    x: Tensor,
    y: Tensor,
    validation: float | tuple[Tensor, Tensor] | None,
    seed: int,
    shuffle: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """The rows to train on and the rows held out, if any; a fraction is drawn, or without `shuffle`
    the last rows.
    """
    if validation is None:
        return (x, y), None
    if isinstance(validation, tuple):
        check_rows(*validation, "the validation rows")
        return (x, y), validation
    rows = round(validation * len(x)) if holds(lambda x: 0 < x < 1, validation) else 0
    if not 0 < rows < len(x):
        raise FitError(
            f"validation={described(validation)}: a fraction that leaves rows on both sides is"
            f" wanted; the data have {len(x)}"
        )
    if not shuffle:
        return (x[:-rows], y[:-rows]), (x[-rows:], y[-rows:])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu").to(
        x.device
    )
    return (x[order[rows:]], y[order[rows:]]), (x[order[:rows]], y[order[:rows]])
