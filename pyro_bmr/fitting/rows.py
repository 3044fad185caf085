"""The rows of a fit: those it trains on, in the batches of each epoch, and those held out.

Owns `Rows`, `rows_of` and `batch_sizes`. Next: `program_run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_bmr.checks import check_rows, mend
from pyro_bmr.data.data_set import validation_split
from pyro_bmr.errors import DataError, FitError
from pyro_bmr.fitting.arguments import Arguments, Program
from pyro_bmr.fitting.processes import Processes
from pyro_bmr.isolation import plain
from pyro_bmr.prediction.predict import check_callable_without_y

Batch = tuple[Tensor, Tensor]


class HasTrainingData(Protocol):
    """Anything with `x_train` and `y_train`, such as a `data.Data`."""

    @property
    def x_train(self) -> Tensor: ...
    @property
    def y_train(self) -> Tensor: ...


class Rows:
    """The rows `x` and `y` that a fit trains on, and those it holds out, if any.

    `size`: N, how many there are, on the `device`. `sizes`: of the batches of an epoch. `in_order`:
    whether they are not shuffled. `split`: whether the held-out rows were a fraction of the data.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        held_out: Batch | None = None,
        split: bool = False,
    ) -> None:
        self.x, self.y, self.held_out, self.split, self.seed = x, y, held_out, split, seed
        self.size, self.device = len(x), x.device
        self.processes = Processes()
        self.processes.check_rows(len(x), batch_size)
        self.batch_size = min(batch_size, len(x))
        # two rows a process at least: batch norm cannot take one alone
        self.sizes = batch_sizes(len(x), self.batch_size, 2 * self.processes.size)
        self.in_order = not shuffle or len(self.sizes) == 1

    def first(self, count: int) -> Batch:
        """The first `count` rows; copies, since a program may write into its rows."""
        return self.x[:count].clone(), self.y[:count].clone()

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """This process's rows of each batch of an epoch after the first `skip`, and what fraction
        of the batch they are.

        Their order is a function of (seed, epoch), or their own. They are copies, since a program
        may write into its rows.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = (
            torch.arange(len(self.x), device="cpu")
            if self.in_order
            else torch.randperm(len(self.x), generator=generator, device="cpu").to(self.x.device)
        )
        for index in order.split(self.sizes)[skip:]:
            own, share = self.processes.rows(index)
            if self.in_order:
                stretch = slice(int(own[0]), int(own[-1]) + 1)
                yield (self.x[stretch].clone(), self.y[stretch].clone()), share
            else:
                yield (self.x[own], self.y[own]), share

    def named(self) -> dict[str, Tensor]:
        """All of them, each with its name."""
        if self.held_out is None:
            return {"x": self.x, "y": self.y}
        x, y = self.held_out
        return {"x": self.x, "y": self.y, "validation x": x, "validation y": y}


def rows_of(
    given: Arguments, data: Batch | HasTrainingData, validation: float | Batch | None
) -> Rows:
    """The rows that `fit` is given, on the device and in the dtype of the program.

    Raises:
        DataError: they disagree, or values are not finite.
        FitError: `validation` leaves no rows, or the program cannot predict.
    """
    x, y = map(plain, _pair(data))
    program = given.program
    missing = getattr(program, "missing_targets", False)
    check_rows(x, y, missing=missing)
    x, y = _like_program(program, x), _like_program(program, y)
    (x, y), held_out = validation_split(x, y, validation, given.seed, given.shuffle, missing)
    if held_out is not None:
        held_out = _like_program(program, held_out[0]), _like_program(program, held_out[1])
        check_callable_without_y(program, x)
    split = isinstance(validation, float)
    return Rows(x, y, given.batch_size, given.seed, given.shuffle, held_out, split)


def batch_sizes(rows: int, batch_size: int, least: int = 2) -> list[int]:
    """The sizes of the batches of an epoch. If fewer than `least` rows are left over, they join the
    batch before: batch norm cannot take one row alone.
    """
    full, left = divmod(rows, min(batch_size, rows))
    sizes = [min(batch_size, rows)] * full
    if left < least:
        sizes[-1] += left
        return sizes
    return [*sizes, left]


def _pair(data: Any) -> Batch:
    """x and y of what `fit` is given as data."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    if hasattr(data, "x_train") and hasattr(data, "y_train"):
        return data.x_train, data.y_train
    raise DataError(
        "data: expected a pair (x, y) of tensors, or anything with x_train and y_train, got"
        f" {type(data).__name__}; {mend(data) or 'give such a pair'}"
    )


def _like_program(program: Program, values: Tensor) -> Tensor:
    """`values` on the device and, if floating, in the dtype of a module's parameters; other
    programs take them as they are.
    """
    if not isinstance(program, nn.Module):
        return values
    parameter = next((p for p in program.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return values
    if parameter.device.type == "meta":
        raise FitError(
            "the program's parameters are on the device 'meta' and have no values; make the network"
            " with torch.device('cpu'), or another device"
        )
    dtype = parameter.dtype if values.is_floating_point() else values.dtype
    return values.to(parameter.device, dtype)
