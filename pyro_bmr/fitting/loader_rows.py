"""The rows of a fit that come as batches from a loader or another iterable.

Owns `LoaderRows`. Next: `rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.data.batch import Batch, first_rows, rows_at
from pyro_bmr.data.inputs import of_each, parts_of, rows_in
from pyro_bmr.data.row_sources import Stream
from pyro_bmr.errors import DataError, FitError, warn
from pyro_bmr.fitting.batches import Batches, HeldOut, digest_of
from pyro_bmr.fitting.processes import Processes

_END = object()
_DEVIATION = 0.01  # of N; a first epoch of other rows warns


class LoaderRows:
    """The rows that a fit reads as batches from `stream`; as `rows.Rows`, with the same attributes.

    An epoch has as many batches as the stream has, or, for one without a length, N divided by the
    rows of its first batch. An iterator goes on from epoch to epoch. `sure`: whether N was given,
    and need not be compared with the rows of an epoch. What the loader draws from torch's default
    generator, such as the order of its rows, is a function of (seed, epoch).
    """

    split, in_memory = False, False

    def __init__(
        self, stream: Stream, reader: Batches, held_out: HeldOut | None, sure: bool
    ) -> None:
        self.stream, self.reader, self.held_out, self.sure = stream, reader, held_out, sure
        self.checks, self.device, self.shuffled = reader.checks, reader.device, stream.shuffled
        self.processes = Processes()
        if stream.size is None:
            raise DataError(
                f"data: {stream.about} does not tell the number of rows of the data, which is N of"
                " the posterior; give it, size=N"
            )
        self.size = stream.size
        self._opened: Iterator[Any] | None = None
        self._taken = 0  # batches of an iterator
        raw = next(self._open(1), _END)
        if raw is _END:
            raise DataError(f"data: {stream.about}: expected at least one batch, got none")
        self._first_raw: Any = raw
        self._example = reader.batch(raw, 1, 1)
        self.batch_size = rows_in(self._example[0])
        self.processes.check_rows(self.size, self.batch_size)
        steps = stream.steps or max(math.ceil(self.size / self.batch_size), 1)
        self.sizes = [min(self.batch_size, self.size)] * steps
        self._first_rows = ""

    def first(self, count: int) -> Batch:
        """The first rows that were read, `count` or as many as the first batch has; copies."""
        return first_rows(self._example, count)

    def targets(self) -> Tensor:
        """The targets that are known before the first step: those of the first batch."""
        return self._example[1]

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """This process's rows of each batch of an epoch after the first `skip`, and what fraction
        of the batch they are. The batches before are read, and left.

        Raises:
            DataError: a batch is not like the first, or the stream ends before the epoch.
        """
        if skip >= len(self.sizes):
            return
        opened, rows = self._of_epoch(epoch), 0
        if not self.stream.again:
            skip_before = (epoch - 1) * len(self.sizes) - self._taken
            for _ in range(skip_before):
                self._next(opened, epoch, 1)
        for number in range(1, len(self.sizes) + 1):
            raw = self._next(opened, epoch, number)
            if 1 < number <= skip:
                continue
            batch = self.reader.batch(raw, epoch, number)
            if number == 1:
                self._note_order(batch, epoch, skip)
            if number > skip:
                rows += len(batch[1])
                yield self._own(batch)
        if self.stream.again:
            self._opened = None  # ends the workers of a loader
        if epoch == 1 and skip == 0 and not self.sure:
            self._check_size(rows)

    def _of_epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch. Those of the first were begun when the fit was, and an iterator
        goes on.
        """
        begun = epoch == 1 and self._first_raw is not _END
        if self._opened is not None and (begun or not self.stream.again):
            return self._opened
        return self._open(epoch)

    def _open(self, epoch: int) -> Iterator[Any]:
        self.reader.seeded(epoch, 0)
        self._opened, self._first_raw = iter(self.stream.batches), _END
        return self._opened

    def _next(self, opened: Iterator[Any], epoch: int, number: int) -> Any:
        self._taken += 1
        if self._first_raw is not _END:
            raw, self._first_raw = self._first_raw, _END
            return raw
        self.reader.seeded(epoch, number)
        raw = next(opened, _END)
        if raw is _END:
            hint = (
                "give the number of rows that an epoch has as size="
                if self.stream.again
                else "an iterator is read once: give a list, a loader or another iterable, or fewer"
                " epochs"
            )
            raise DataError(
                f"data: {self.stream.about} ended after {number - 1} of {len(self.sizes)} batches"
                f" of epoch {epoch}; {hint}"
            )
        return raw

    def _own(self, batch: Batch) -> tuple[Batch, float]:
        """This process's part of a batch; a copy, since a program may write into its rows."""
        if self.processes.size == 1:
            x, y = batch
            if self.stream.copies:
                return batch, 1.0
            return (of_each(Tensor.clone, x), y.clone()), 1.0
        index, share = self.processes.rows(torch.arange(len(batch[1]), device=self.device))
        if not len(index):
            raise FitError(
                f"a batch of {len(batch[1])} rows: {self.processes.size} processes need at least"
                " one row each; leave out small batches with drop_last=True"
            )
        return rows_at(batch, index), share

    def _note_order(self, batch: Batch, epoch: int, skip: int) -> None:
        """Notes the first rows of an epoch. Where a fit continues within it, they show whether the
        loader gives the same again.
        """
        before, self._first_rows = self._first_rows, digest_of(batch)
        self.processes.check_equal(
            {**parts_of(batch[0]), "y": batch[1]},
            self.device,
            "reads other rows than process 0; give the loader no generator of its own, or fit from"
            " a Dataset or tensors",
        )
        if skip and before and before != self._first_rows:
            warn(
                f"data: {self.stream.about} gives other rows than before the stop, so epoch {epoch}"
                " continues with rows in a new order; the result is not that of a fit without a"
                " stop. A loader without a generator of its own, or a Dataset, has the same order"
            )

    def _check_size(self, rows: int) -> None:
        """Warns if the first epoch had other rows than N, which nobody gave."""
        short = self.size - rows
        if abs(short) > max(self.batch_size - 1, _DEVIATION * self.size):
            warn(
                f"data: {self.stream.about} had {rows:,} rows in the first epoch, and the posterior"
                f" counts {self.size:,}; give the number of rows of the data as size="
            )

    def described(self) -> dict[str, Any]:
        """What tells these data from others, for a checkpoint."""
        kinds = {name: f"{shape} {dtype}" for name, (shape, dtype) in self.checks.kinds.items()}
        return {"source": self.stream.about, "rows": self.size, "steps": len(self.sizes), **kinds}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the rows with which programs are read, and what the epoch began
        with.
        """
        return {"example": self.first(8), "first_rows": self._first_rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        x, y = state["example"]
        self._example = of_each(lambda part: part.to(self.device), x), y.to(self.device)
        self._first_rows = state["first_rows"]
