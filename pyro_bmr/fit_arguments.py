"""What a fit is given, checked before any work: rows and arguments.

Owns the checks, the sizes of batches and the split of the validation rows. Next: `fit_program.py`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_bmr.errors import DataError, FitError, described, holds

Program = Callable[..., Any]
_AT_ONCE = 1 << 16  # numbers of the data that are checked at once, so that the check needs no copy of them
_LARGEST_SEED = 1 << 40  # seeds of steps are a million times as large
PROGRAM = "a plain network is made a program by BayesianNetwork(net, prior, likelihood)"
_FUNCTIONS = {
    "program": f"a Pyro program, called as program(x, y), ({PROGRAM})",
    "guide": "MeanField, another guide of this library or of Pyro, or a function from the program to a guide",
    "optimizer": "a function from parameters to an optimiser, such as adam(1e-3) or partial(torch.optim.SGD, lr=0.1),",
    "scheduler": "a function from the optimiser and the number of steps to a schedule, such as cosine, or None",
}


def rows_of(data: Any) -> tuple[Tensor, Tensor]:
    """x and y of what `fit` is given as data."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    if hasattr(data, "x_train") and hasattr(data, "y_train"):
        return data.x_train, data.y_train
    kind = type(data).__name__
    raise DataError(f"data: expected a pair (x, y) of tensors, or anything with x_train and y_train, got {kind}; {_mend(data) or 'give such a pair'}")


def _mend(value: Any) -> str:
    """How to make tensors of what is often given in their place."""
    import pandas as pd

    if isinstance(value, DataLoader):
        return "join its batches: x, y = map(torch.cat, zip(*loader))"
    if isinstance(value, Dataset):
        return "join its rows: x, y = next(iter(torch.utils.data.DataLoader(dataset, batch_size=len(dataset))))"
    if isinstance(value, (pd.DataFrame, pd.Series)):
        return "make a tensor of its columns: torch.tensor(frame[columns].to_numpy(), dtype=torch.float32)"
    if isinstance(value, Mapping):
        return "give its tensors as a pair: (data['x'], data['y'])"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return "make it one with torch.from_numpy(array)"
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, (int, float, list, tuple)) for part in value):
        return "make it one with torch.tensor(values)"
    return ""


def check_tensor(value: Any, name: str) -> None:
    """Raises DataError unless `value` is a plain tensor with numbers in it."""
    if not isinstance(value, Tensor):
        raise DataError(f"{name}: expected a tensor, got {type(value).__name__}; {_mend(value) or 'give the numbers of its rows as one torch.Tensor'}")
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"{value.layout} on '{value.device}'"
        raise DataError(f"{name}: a dense tensor with values is wanted, got one that is {kind}")
    if value.is_complex():
        raise DataError(f"{name}: real numbers are wanted, got {value.dtype}")


def check_rows(x: Tensor, y: Tensor, where: str = "the data") -> None:
    """Raises DataError unless x and y are tensors with the same number of rows, at least one, all finite."""
    check_tensor(x, f"{where}: x")
    check_tensor(y, f"{where}: y")
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y) or len(x) == 0:
        raise DataError(f"{where}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; the same number of rows, at least one, is wanted")
    for name, value in (("x", x), ("y", y)):
        if value.is_floating_point():
            rows = max(_AT_ONCE // max(value[0].numel(), 1), 1)
            for first, part in zip(range(0, len(value), rows), value.split(rows), strict=True):
                bad = (~part.reshape(len(part), -1).isfinite().all(1)).nonzero()
                if len(bad):
                    raise DataError(f"{where}: {name} is NaN or infinite, first in row {first + int(bad[0])}; drop or impute such rows")


def check_labels(probs: Tensor, y: Tensor, name: str = "probs") -> None:
    """Raises DataError unless `probs` is (rows, classes), of at least one row, without NaN, and y the class of each row."""
    for role, value in ((name, probs), ("y", y)):
        check_tensor(value, role)
    if probs.ndim != 2 or y.shape != probs.shape[:1] or probs.numel() == 0:
        raise DataError(f"{name} of shape {tuple(probs.shape)} and y {tuple(y.shape)}; (rows, classes) and (rows,) are wanted, one row at least")
    if bool(probs.isnan().any()):
        raise DataError(f"{name} is NaN, first in row {int(probs.isnan().any(1).nonzero()[0])}")
    wrong = (y < 0) | (y >= probs.shape[1]) | (y != y.long())
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(f"label {y[row].item()} in row {row} is out of range; labels are whole numbers from 0 to {probs.shape[1] - 1}")


def like_program(program: Program, values: Tensor) -> Tensor:
    """`values` on the device and, if floating, in the dtype of a module's parameters; other programs take them as they are."""
    parameter = next((p for p in program.parameters() if p.is_floating_point()), None) if isinstance(program, nn.Module) else None
    if parameter is None:
        return values
    if parameter.device.type == "meta":
        raise FitError("the program's parameters are on the device 'meta' and have no values; make the network with torch.device('cpu'), or another device")
    return values.to(parameter.device, parameter.dtype if values.is_floating_point() else values.dtype)


def check_arguments(epochs: int, batch_size: int, temperature: float, seed: int, skip_faulty: int, functions: Mapping[str, Any]) -> None:
    """Raises FitError unless each is in its range, and each of `functions` is one."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("seed", seed), ("skip_faulty", skip_faulty)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise FitError(f"{name}={described(value)}: a whole number is wanted")
    if not abs(seed) < _LARGEST_SEED:
        raise FitError(f"seed={described(seed)}: a number of size below {_LARGEST_SEED} is wanted")
    for name, value in functions.items():
        if not callable(value):
            raise FitError(f"{name}: {_FUNCTIONS[name]} is wanted, got {described(value)}")
    if epochs < 1:
        raise FitError(f"epochs={described(epochs)}: at least 1 is wanted")
    if batch_size < 1:
        raise FitError(f"batch_size={described(batch_size)}: at least 1 row is wanted")
    if skip_faulty < 0:
        raise FitError(f"skip_faulty={described(skip_faulty)}: a number of steps >= 0 is wanted")
    if not holds(lambda x: 0 < x < math.inf, temperature):
        raise FitError(f"temperature={described(temperature)}: a finite number > 0 is wanted (1 is Bayes)")


def batch_sizes(rows: int, batch_size: int, least: int = 2) -> list[int]:
    """Of the batches of an epoch. Less than `least` rows left over join the batch before: batch norm cannot take one alone."""
    full, left = divmod(rows, min(batch_size, rows))
    sizes = [min(batch_size, rows)] * full
    if left < least:
        sizes[-1] += left
        return sizes
    return [*sizes, left]


def validation_split(
    x: Tensor, y: Tensor, validation: float | tuple[Tensor, Tensor] | None, seed: int, shuffle: bool = True
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """The rows to train on and the rows held out, if any; a fraction is drawn, or without `shuffle` the last rows."""
    if validation is None:
        return (x, y), None
    if isinstance(validation, tuple):
        check_rows(*validation, "the validation rows")
        return (x, y), validation
    rows = round(validation * len(x)) if holds(lambda x: 0 < x < 1, validation) else 0
    if not 0 < rows < len(x):
        raise FitError(f"validation={described(validation)}: a fraction that leaves rows on both sides is wanted; the data have {len(x)}")
    if not shuffle:
        return (x[:-rows], y[:-rows]), (x[-rows:], y[-rows:])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu").to(x.device)
    return (x[order[rows:]], y[order[rows:]]), (x[order[:rows]], y[order[:rows]])
