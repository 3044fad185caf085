"""What rows are read from: memory, a data set read by row numbers, or a stream of batches.

Owns `Held`, `Indexed` and `Stream`, and `chunks`, which reads any of them in pieces. What users
give becomes one of them in `given.py`. Next: `loaders.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pyro_bmr.data.batch import BatchChecks
from pyro_bmr.data.inputs import Inputs, joined, parts_of, rows_in
from pyro_bmr.errors import DataError

_BLOCK = 256  # rows of a data set that are read at once
_BYTES = 1 << 26  # of the batches that `chunks` joins


@dataclass(frozen=True)
class Order:
    """How a loader makes batches of its rows."""

    batch_size: int
    shuffle: bool
    drop_last: bool


@dataclass(frozen=True)
class Held:
    """Rows in memory; `order`: of the loader that they came with."""

    x: Any
    y: Any
    order: Order | None = None


@dataclass(frozen=True)
class Indexed:
    """Rows that are read by their numbers, `size` in all. `read` gives a batch of them."""

    read: Callable[[list[int]], Any]
    size: int
    about: str


@dataclass(frozen=True)
class Stream:
    """Batches in the order in which they come. `size`: N, the number of rows, and `steps`, of
    batches in an epoch; None if that is not known. `again`: whether the batches can be read again.
    `copies`: whether each batch is new memory.
    """

    batches: Iterable[Any]
    size: int | None
    steps: int | None
    about: str
    shuffled: bool = False
    again: bool = True
    copies: bool = False


Source = Held | Indexed | Stream


def chunks(source: Source, rows: int, checks: BatchChecks, targets: bool = True) -> Iterator[Any]:
    """x and y of all rows in order, some thousands at a time: at most `rows` and 64 MiB of them,
    unless a batch of the source has more. y is None where there is none and no `targets` are
    needed.
    """
    if isinstance(source, Held):
        yield source.x, source.y
        return
    waiting: list[tuple[Inputs, Any]] = []
    for number, raw in enumerate(_raw(source), 1):
        x, y = checks.of_tensors(raw, f"batch {number}", targets)
        if waiting and not _may_join(waiting, x, rows):
            yield _together(waiting)
            waiting = []
        waiting.append((x, y))
    if not waiting:
        raise DataError(f"{source.about}: expected at least one batch, got none")
    yield _together(waiting)


def _raw(source: Indexed | Stream) -> Iterator[Any]:
    if isinstance(source, Stream):
        yield from source.batches
        return
    for first in range(0, source.size, _BLOCK):
        yield source.read(list(range(first, min(first + _BLOCK, source.size))))


def _may_join(waiting: list[tuple[Inputs, Any]], x: Inputs, rows: int) -> bool:
    """Whether the rows x fit to those that wait, in shape and in number."""
    shapes = [[t.shape[1:] for t in parts_of(part).values()] for part in (waiting[0][0], x)]
    held = [part for part, _ in waiting] + [x]
    size = sum(t.numel() * t.element_size() for part in held for t in parts_of(part).values())
    return shapes[0] == shapes[1] and sum(map(rows_in, held)) <= rows and size <= _BYTES


def _together(waiting: list[tuple[Inputs, Any]]) -> tuple[Inputs, Any]:
    x = joined([part for part, _ in waiting])
    targets = [y for _, y in waiting]
    return x, None if targets[0] is None else joined(targets)
