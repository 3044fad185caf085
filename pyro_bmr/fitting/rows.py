"""The rows of a fit: those it trains on, in the batches of each epoch, and those held out.

Owns `Rows`, for rows that can be read by their numbers, `rows_of` and `batch_sizes`. Next:
`program_error.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.data.batch import Batch, first_rows, rows_at
from pyro_bmr.data.data_set import split_rows
from pyro_bmr.data.given import source_of
from pyro_bmr.data.inputs import of_each, parts_of, rows_in
from pyro_bmr.data.row_sources import Held, Indexed, Order, Stream
from pyro_bmr.errors import DataError, FitError
from pyro_bmr.fitting.arguments import BATCH_SIZE, Arguments
from pyro_bmr.fitting.batches import Batches, HeldOut, check_held, placed
from pyro_bmr.fitting.loader_rows import LoaderRows
from pyro_bmr.fitting.processes import Processes
from pyro_bmr.likelihoods.likelihood import check_read
from pyro_bmr.prediction.predict import check_callable_without_y

__all__ = ["Batch", "LoaderRows", "Rows", "batch_sizes", "rows_of"]


class Rows:
    """The rows that a fit trains on, in memory or read by their numbers, and those it holds out.

    `size`: N, how many there are, on the `device`. `sizes`: of the batches of an epoch. `in_order`:
    whether they are not shuffled. `split`: whether the held-out rows were a fraction of the data.
    """

    def __init__(
        self,
        source: Held | Indexed,
        order: Order,
        reader: Batches,
        held_out: HeldOut | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        self.source, self.reader, self.held_out, self.seed = source, reader, held_out, reader.seed
        self.numbers, self.split = numbers, held_out is not None and held_out.split
        self.size = _size_of(source) if numbers is None else len(numbers)
        self.device = (
            next(iter(parts_of(source.x).values())).device
            if isinstance(source, Held)
            else reader.device
        )
        self.checks, self._example = reader.checks, dict[int, Batch]()
        self.processes = Processes()
        self.processes.check_rows(self.size, order.batch_size)
        self.batch_size = min(order.batch_size, self.size)
        # two rows a process at least: batch norm cannot take one alone
        self.sizes = batch_sizes(self.size, self.batch_size, 2 * self.processes.size)
        if order.drop_last:
            self.sizes = [self.batch_size] * (self.size // order.batch_size)
        if not self.sizes:
            raise DataError(
                f"data: expected a loader with at least one batch, got {self.size} rows for batches"
                f" of {order.batch_size}; leave out drop_last=True"
            )
        self.shuffled = order.shuffle
        self.in_order = not order.shuffle or (len(self.sizes) == 1 and not order.drop_last)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, Held)

    def first(self, count: int) -> Batch:
        """The first `count` rows; copies, since a program may write into its rows."""
        if isinstance(self.source, Held):
            return first_rows((self.source.x, self.source.y), count)
        if count not in self._example:
            self._example = {count: self._read(torch.arange(min(count, self.size)), 1, 1)}
        return first_rows(self._example[count], count)

    def targets(self) -> Tensor:
        """The targets that are known before the first step: all, or those of the first rows."""
        return self.source.y if isinstance(self.source, Held) else self.first(self.sizes[0])[1]

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """This process's rows of each batch of an epoch after the first `skip`, and what fraction
        of the batch they are.

        Their order is a function of (seed, epoch), or their own. They are copies, since a program
        may write into its rows.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = (
            torch.arange(self.size, device="cpu")
            if self.in_order
            else torch.randperm(self.size, generator=generator, device="cpu")
        )
        held = isinstance(self.source, Held)
        order = order.to(self.device) if held and not self.in_order else order
        for number, index in enumerate(order[: sum(self.sizes)].split(self.sizes)[skip:], skip + 1):
            own, share = self.processes.rows(index)
            yield (self._held(own) if held else self._read(own, epoch, number)), share

    def _held(self, own: Tensor) -> Batch:
        """Rows in memory."""
        x, y = self.source.x, self.source.y  # type: ignore[union-attr]
        if self.in_order:
            stretch = slice(int(own[0]), int(own[-1]) + 1)
            return of_each(lambda part: part[stretch].clone(), x), y[stretch].clone()
        return of_each(lambda part: part[own], x), y[own]

    def _read(self, own: Tensor, epoch: int, number: int) -> Batch:
        """Rows that are read, and checked."""
        numbers = (own if self.numbers is None else self.numbers[own]).tolist()
        self.reader.seeded(epoch, number)
        raw = self.source.read(numbers)  # type: ignore[union-attr]
        return self.reader.batch(raw, epoch, number, lambda k: f"row {numbers[k]} of the data")

    def described(self) -> dict[str, Any]:
        """What tells these data from others, for a checkpoint: all tensors, or of data that are
        read their kind and number.
        """
        if isinstance(self.source, Indexed):
            kinds = {name: f"{shape} {dtype}" for name, (shape, dtype) in self.checks.kinds.items()}
            return {"source": self.source.about, "rows": self.size, **kinds}
        found: dict[str, Any] = {**parts_of(self.source.x), "y": self.source.y}
        if self.held_out is not None and isinstance(self.held_out.source, Held):
            x, y = self.held_out.source.x, self.held_out.source.y
            found |= {**parts_of(x, "validation x"), "validation y": y}
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of rows that are read: those with which programs are read."""
        return {} if isinstance(self.source, Held) else {"example": list(self._example.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        for count, (x, y) in state.get("example", []):
            batch = of_each(lambda part: part.to(self.device), x), y.to(self.device)
            self._example = {count: batch}


def rows_of(
    given: Arguments, data: Any, validation: Any, size: int | None = None
) -> Rows | LoaderRows:
    """The rows that `fit` is given, on the device and in the dtype of the program.

    Raises:
        DataError: they disagree, or values are not finite.
        FitError: `validation` leaves no rows, or the program cannot predict.
    """
    source, reader = source_of(data, size=size), Batches(given.program, given.seed)
    missing = reader.checks.missing
    if isinstance(source, Stream):
        _check_order(given, None, source.shuffled)
        return LoaderRows(source, reader, _held_out(given, validation, None), size is not None)
    order = Order(given.batch_size, given.shuffle, False)
    if isinstance(source, Held):
        if source.order is not None:
            _check_order(given, source.order.batch_size, source.order.shuffle)
            order = source.order
        check_held(source.x, source.y, "the data", missing)
        check_read(reader.checks.likelihood, source.x, "the data")
        source = Held(*placed(given.program, (source.x, source.y)))
    elif source.size < 1:
        raise DataError(f"data: {source.about}: expected at least one row, got none")
    if isinstance(validation, Real):
        train, held = split_rows(_size_of(source), float(validation), given.seed, order.shuffle)
        return _split(given, source, order, reader, train, held)
    return Rows(source, order, reader, _held_out(given, validation, source))


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


def _size_of(source: Held | Indexed) -> int:
    return source.size if isinstance(source, Indexed) else rows_in(source.x)


def _check_order(given: Arguments, batch_size: int | None, shuffled: bool) -> None:
    """Raises FitError where arguments of the fit say otherwise than the loader."""
    if given.batch_size not in (BATCH_SIZE, batch_size):
        own = "" if batch_size is None else f" of {batch_size} rows"
        raise FitError(
            f"batch_size={given.batch_size}: a loader makes its own batches{own}; leave batch_size"
            " out, or make the loader with it"
        )
    if not given.shuffle and shuffled:
        raise FitError(
            "shuffle=False: the loader mixes its rows; make it with shuffle=False, or leave shuffle"
            " out"
        )


def _split(
    given: Arguments,
    source: Held | Indexed,
    order: Order,
    reader: Batches,
    train: Tensor | slice,
    held: Tensor | slice,
) -> Rows:
    """The rows of `train`, with those of `held` held out."""
    if isinstance(source, Held):
        trained, out = (Held(*rows_at((source.x, source.y), rows)) for rows in (train, held))
        return Rows(trained, order, reader, _tried(given, HeldOut(out, given.program, True)))
    every = torch.arange(source.size)
    numbers = every[held]

    def read(some: list[int]) -> Any:
        return source.read(numbers[some].tolist())

    rest = HeldOut(Indexed(read, len(numbers), source.about), given.program, True)
    return Rows(source, order, reader, _tried(given, rest), every[train])


def _held_out(given: Arguments, validation: Any, source: Held | Indexed | None) -> HeldOut | None:
    """The rows to hold out that are given by themselves, if any.

    Raises:
        FitError: it is a fraction, of rows that have no numbers.
    """
    if validation is None:
        return None
    if source is None and isinstance(validation, Real):
        raise FitError(
            f"validation={validation}: a fraction of a loader cannot be held out; give a pair"
            " (x, y), a Dataset or a loader of other rows"
        )
    return _tried(given, HeldOut(source_of(validation, name="validation"), given.program))


def _tried(given: Arguments, held_out: HeldOut) -> HeldOut:
    check_callable_without_y(given.program, held_out.first[0])
    return held_out
