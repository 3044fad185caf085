"""What a fit is given, checked before any work: rows, arguments, and the program on a handful of rows.

Owns the checks and the split of the validation rows. Next: `fit_state.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmr.elbo import Values
from pyro_bmr.errors import DataError, FitError

Program = Callable[..., Any]
_AT_ONCE = 1 << 16  # numbers of the data that are checked at once, so that the check needs no copy of them


def check_rows(x: Tensor, y: Tensor, where: str = "the data") -> None:
    """Raises DataError unless x and y have the same number of rows, at least one, all finite."""
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y) or len(x) == 0:
        raise DataError(f"{where}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; the same number of rows, at least one, is wanted")
    for name, value in (("x", x), ("y", y)):
        if value.is_floating_point():
            rows = max(_AT_ONCE // max(value[0].numel(), 1), 1)
            for first, part in zip(range(0, len(value), rows), value.split(rows), strict=True):
                bad = (~part.reshape(len(part), -1).isfinite().all(1)).nonzero()
                if len(bad):
                    raise DataError(f"{where}: {name} is NaN or infinite, first in row {first + int(bad[0])}; drop or impute such rows")


def like_program(program: Program, values: Tensor) -> Tensor:
    """`values` on the device and, if floating, in the dtype of a module's parameters; other programs take them as they are."""
    parameter = next((p for p in program.parameters() if p.is_floating_point()), None) if isinstance(program, nn.Module) else None
    if parameter is None:
        return values
    return values.to(parameter.device, parameter.dtype if values.is_floating_point() else values.dtype)


def check_arguments(epochs: int, batch_size: int, temperature: float) -> None:
    """Raises FitError unless each is in its range."""
    if epochs < 1:
        raise FitError(f"epochs={epochs}: at least 1 is wanted")
    if batch_size < 1:
        raise FitError(f"batch_size={batch_size}: at least 1 row is wanted")
    if not 0 < temperature < math.inf:
        raise FitError(f"temperature={temperature}: a finite number > 0 is wanted (1 is Bayes)")


def check_program(program: Program, few: tuple[Tensor, Tensor], y: Tensor) -> None:
    """No pyro.param, y in the shape of the observed site, and every y in its support, such as 0 … classes − 1."""
    with torch.no_grad(), pyro.get_param_store().scope(), Values({}) as run:
        trace = poutine.trace(program).get_trace(*few)
    params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if params and not isinstance(program, nn.Module):
        raise FitError(
            f"pyro.param '{params[0]}' would not be trained; make it a pyro.sample site or an nn.Parameter of a module, "
            "or fit with Pyro's SVI and use Posterior.from_param_store"
        )
    for name, msg in run.observed.items():
        if msg["value"] is few[1]:
            shape = tuple(msg["fn"].shape())
            if shape and shape != tuple(few[1].shape):
                raise DataError(
                    f"y of shape {tuple(y.shape)} does not fit observed site '{name}': for {len(few[1])} rows the site has shape "
                    f"{shape}, y {tuple(few[1].shape)}; give y that shape"
                )
            support = msg["fn"].support
            good = support.check(y) if hasattr(support, "lower_bound") else torch.ones(len(y), dtype=torch.bool)
            if not bool(good.all()):
                row = int((~good).nonzero()[0][0])
                raise DataError(
                    f"y is outside the support of observed site '{name}' ({support}): got {y[row].item()} in row {row}; "
                    "number the classes from 0, or give the network more outputs"
                )


def validation_split(
    x: Tensor, y: Tensor, validation: float | tuple[Tensor, Tensor] | None, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """The rows to train on and the rows held out, if any."""
    if validation is None:
        return (x, y), None
    if isinstance(validation, tuple):
        check_rows(*validation, "the validation rows")
        return (x, y), validation
    rows = round(validation * len(x))
    if not 0 < rows < len(x):
        raise FitError(f"validation={validation}: a fraction that leaves rows on both sides is wanted; the data have {len(x)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (x[order[rows:]], y[order[rows:]]), (x[order[:rows]], y[order[:rows]])
