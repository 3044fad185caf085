"""What users give as numbers, checked before any work: tensors, rows, class probabilities and
labels.

Next: `formulas/ratios.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_bmr.errors import DataError

# numbers of the data that are checked at once, so that the check needs no copy of them
_AT_ONCE = 1 << 16


def mend(value: Any) -> str:
    """How to make tensors of what is often given in their place."""
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
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(part, (int, float, list, tuple)) for part in value)
    ):
        return "make it one with torch.tensor(values)"
    return ""


def check_tensor(value: Any, name: str) -> None:
    """Raises DataError unless `value` is a plain tensor with numbers in it."""
    if not isinstance(value, Tensor):
        raise DataError(
            f"{name}: expected a tensor, got {type(value).__name__};"
            f" {mend(value) or 'give the numbers of its rows as one torch.Tensor'}"
        )
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"{value.layout} on '{value.device}'"
        raise DataError(f"{name}: a dense tensor with values is wanted, got one that is {kind}")
    if value.is_complex():
        raise DataError(f"{name}: real numbers are wanted, got {value.dtype}")


def check_rows(x: Tensor, y: Tensor, where: str = "the data") -> None:
    """Raises DataError unless x and y are tensors with the same number of rows, at least one, all
    finite.
    """
    check_tensor(x, f"{where}: x")
    check_tensor(y, f"{where}: y")
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"{where}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; the same number of"
            " rows, at least one, is wanted"
        )
    for name, value in (("x", x), ("y", y)):
        if value.is_floating_point():
            rows = max(_AT_ONCE // max(value[0].numel(), 1), 1)
            for first, part in zip(range(0, len(value), rows), value.split(rows), strict=True):
                bad = (~part.reshape(len(part), -1).isfinite().all(1)).nonzero()
                if len(bad):
                    raise DataError(
                        f"{where}: {name} is NaN or infinite, first in row {first + int(bad[0])};"
                        " drop or impute such rows"
                    )


def check_labels(probs: Tensor, y: Tensor, name: str = "probs") -> None:
    """Raises DataError unless `probs` is (rows, classes), of at least one row, without NaN, and y
    the class of each row.
    """
    for role, value in ((name, probs), ("y", y)):
        check_tensor(value, role)
    if probs.ndim != 2 or y.shape != probs.shape[:1] or probs.numel() == 0:
        raise DataError(
            f"{name} of shape {tuple(probs.shape)} and y {tuple(y.shape)}; (rows, classes) and"
            " (rows,) are wanted, one row at least"
        )
    if bool(probs.isnan().any()):
        raise DataError(f"{name} is NaN, first in row {int(probs.isnan().any(1).nonzero()[0])}")
    wrong = (y < 0) | (y >= probs.shape[1]) | (y != y.long())
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"label {y[row].item()} in row {row} is out of range; labels are whole numbers from 0"
            f" to {probs.shape[1] - 1}"
        )
