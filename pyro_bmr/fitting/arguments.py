"""What a fit is given, checked before any work: rows and arguments.

Owns the checks, the sizes of batches and the split of the validation rows. Next: `program.py`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_bmr.checks import mend
from pyro_bmr.errors import DataError, FitError, described, holds

Program = Callable[..., Any]
_LARGEST_SEED = 1 << 40  # seeds of steps are a million times as large
PROGRAM = "a plain network is made a program by BayesianNetwork(net, prior, likelihood)"
_FUNCTIONS = {
    "program": f"a Pyro program, called as program(x, y), ({PROGRAM})",
    "guide": (
        "MeanField, another guide of this library or of Pyro, or a function from the program to a"
        " guide"
    ),
    "optimizer": (
        "a function from parameters to an optimiser, such as adam(1e-3) or partial(torch.optim.SGD,"
        " lr=0.1),"
    ),
    "scheduler": (
        "a function from the optimiser and the number of steps to a schedule, such as cosine, or"
        " None"
    ),
}


def rows_of(data: Any) -> tuple[Tensor, Tensor]:
    """x and y of what `fit` is given as data."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    if hasattr(data, "x_train") and hasattr(data, "y_train"):
        return data.x_train, data.y_train
    kind = type(data).__name__
    raise DataError(
        "data: expected a pair (x, y) of tensors, or anything with x_train and y_train, got"
        f" {kind}; {mend(data) or 'give such a pair'}"
    )


def like_program(program: Program, values: Tensor) -> Tensor:
    """`values` on the device and, if floating, in the dtype of a module's parameters; other
    programs take them as they are.
    """
    parameter = (
        next((p for p in program.parameters() if p.is_floating_point()), None)
        if isinstance(program, nn.Module)
        else None
    )
    if parameter is None:
        return values
    if parameter.device.type == "meta":
        raise FitError(
            "the program's parameters are on the device 'meta' and have no values; make the network"
            " with torch.device('cpu'), or another device"
        )
    return values.to(
        parameter.device, parameter.dtype if values.is_floating_point() else values.dtype
    )


def check_arguments(
    epochs: int,
    batch_size: int,
    temperature: float,
    seed: int,
    skip_faulty: int,
    functions: Mapping[str, Any],
) -> None:
    """Raises FitError unless each is in its range, and each of `functions` is one."""
    for name, value in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("seed", seed),
        ("skip_faulty", skip_faulty),
    ):
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
        raise FitError(
            f"temperature={described(temperature)}: a finite number > 0 is wanted (1 is Bayes)"
        )


def batch_sizes(rows: int, batch_size: int, least: int = 2) -> list[int]:
    """Of the batches of an epoch. Less than `least` rows left over join the batch before: batch
    norm cannot take one alone.
    """
    full, left = divmod(rows, min(batch_size, rows))
    sizes = [min(batch_size, rows)] * full
    if left < least:
        sizes[-1] += left
        return sizes
    return [*sizes, left]
