"""Checks of what users give, before any work: arguments, tensors, rows, class probabilities and
labels.

Each check raises an error that says "expected …, got …". Next: `formulas/ratios.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_bmr.errors import DataError, ModelError, PyroBMRError, described

# numbers of the data that are checked at once, so that the check needs no copy of them
_AT_ONCE = 1 << 16


def check_arguments(
    call: str, ok: bool, expected: str, error: type[PyroBMRError] = ModelError, /, **given: Any
) -> None:
    """Raises `error` with the arguments `given` to `call`, and what was `expected`, unless `ok`.

    Example:
        >>> check_arguments("Laplace", scale > 0, "a finite number > 0", scale=scale)
        ModelError: Laplace(scale=-1.0): expected a finite number > 0
    """
    if not ok:
        values = ", ".join(f"{name}={described(value)}" for name, value in given.items())
        raise error(f"{call}({values}): expected {expected}")


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whether `value` is a whole number, of Python or NumPy, and not below `least`; True and False
    are none.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and (least is None or int(value) >= least)


def check_shape(value: Any, name: str, shape: Sequence[int], meaning: str) -> None:
    """Raises DataError unless `value` is a tensor of the given `shape`, whose `meaning` the message
    says.
    """
    check_tensor(value, name)
    if tuple(value.shape) != tuple(shape):
        raise DataError(
            f"{name}: expected shape {tuple(shape)}, {meaning}, got shape {tuple(value.shape)}"
        )


def mend(value: Any) -> str:
    """How to make a tensor from what is often given instead of one; empty if that is not known."""
    import pandas as pd

    if isinstance(value, DataLoader):
        return "join its batches: x, y = map(torch.cat, zip(*loader))"
    if isinstance(value, Dataset):
        return (
            "join its rows: x, y = next(iter(torch.utils.data.DataLoader(dataset,"
            " batch_size=len(dataset))))"
        )
    if isinstance(value, (pd.DataFrame, pd.Series)):
        return (
            "make a tensor of its columns: torch.tensor(frame[columns].to_numpy(),"
            " dtype=torch.float32)"
        )
    if isinstance(value, Mapping):
        return "give its tensors as a pair: (data['x'], data['y'])"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return "make it one with torch.from_numpy(array)"
    if _are_texts(value):
        return (
            "make numbers of the texts; of classes:"
            " classes, codes = numpy.unique(values, return_inverse=True)"
        )
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return "make numbers of its objects: array.astype(float)"
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(part, (int, float, list, tuple)) for part in value)
    ):
        return "make it one with torch.tensor(values)"
    return ""


def _are_texts(value: Any) -> bool:
    """Whether these are texts: an array of them, or a list or an array of objects that begins with
    one.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "US":
        return True
    first = value.flat[:1] if isinstance(value, np.ndarray) else value
    return (
        isinstance(first, (list, tuple, np.ndarray))
        and len(first) > 0
        and isinstance(first[0], str)
    )


def check_tensor(value: Any, name: str) -> None:
    """Raises DataError unless `value` is a dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise DataError(
            f"{name}: expected a tensor, got {type(value).__name__};"
            f" {mend(value) or 'give the numbers of its rows as one torch.Tensor'}"
        )
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"{value.layout} on '{value.device}'"
        raise DataError(f"{name}: expected a dense tensor with values, got one that is {kind}")
    if value.is_complex():
        raise DataError(f"{name}: expected real numbers, got {value.dtype}")


def check_rows(x: Tensor, y: Tensor, where: str = "the data", missing: bool = False) -> None:
    """Raises DataError unless x and y are tensors with the same number of rows, at least one, all
    finite. With `missing`, values of y may be NaN.
    """
    check_tensor(x, f"{where}: x")
    check_tensor(y, f"{where}: y")
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"{where}: expected x and y with the same number of rows, at least one, got x of shape"
            f" {tuple(x.shape)} and y of shape {tuple(y.shape)}"
        )
    for name, value in (("x", x), ("y", y)):
        if value.is_floating_point():
            rows = max(_AT_ONCE // max(value[0].numel(), 1), 1)
            for first, part in zip(range(0, len(value), rows), value.split(rows), strict=True):
                good = part.isinf().logical_not() if missing and name == "y" else part.isfinite()
                bad = (~good.reshape(len(part), -1).all(1)).nonzero()
                if len(bad):
                    also = " or give the likelihood missing='ignore'" if name == "y" else ""
                    raise DataError(
                        f"{where}: {name} is NaN or infinite, first in row {first + int(bad[0])};"
                        f" drop or impute such rows{also}"
                    )


def check_labels(probs: Tensor, y: Tensor, name: str = "probs") -> None:
    """Raises DataError unless `probs` has the shape (rows, classes) with at least one row and no
    NaN, and y has the class of each row.
    """
    for role, value in ((name, probs), ("y", y)):
        check_tensor(value, role)
    if probs.ndim != 2 or y.shape != probs.shape[:1] or probs.numel() == 0:
        raise DataError(
            f"expected {name} of shape (rows, classes) and y of shape (rows,), at least one row,"
            f" got {name} of shape {tuple(probs.shape)} and y of shape {tuple(y.shape)}"
        )
    if bool(probs.isnan().any()):
        raise DataError(f"{name} is NaN, first in row {int(probs.isnan().any(1).nonzero()[0])}")
    wrong = (y < 0) | (y >= probs.shape[1]) | (y != y.long())
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"label {y[row].item()} in row {row} is out of range; expected whole numbers from 0"
            f" to {probs.shape[1] - 1}"
        )
