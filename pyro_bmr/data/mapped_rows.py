"""Rows of arrays that are mapped from a file, read as they are needed.

Owns `mapped_rows`. A mapping that is indexed keeps pages, of up to 2 MiB for a row, in the memory
of the process. So rows are read from the file itself where its layout allows. Next: `given.py`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from pyro_bmr.data.inputs import parts_of
from pyro_bmr.data.row_sources import Indexed
from pyro_bmr.data.tables import of_array
from pyro_bmr.errors import DataError


def mapped_rows(x: Any, y: Any) -> Indexed:
    """The rows of x and y, tensors, arrays or tables of which some are mapped from a file.

    Raises:
        DataError: they have not the same number of rows.
    """
    columns = {**parts_of(x), **({} if y is None else {"y": y})}
    shapes = {name: tuple(getattr(column, "shape", ())) for name, column in columns.items()}
    rows = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(rows) > 1 or rows == {0}:
        raise DataError(
            "the data: expected the same number of rows everywhere, at least one, got"
            f" {', '.join(f'{name} of shape {shape}' for name, shape in shapes.items())}"
        )

    def read(numbers: list[int]) -> Any:
        taken = {name: _rows_at(column, numbers) for name, column in columns.items()}
        target = (taken.pop("y"),) if y is not None else ()
        if isinstance(x, Mapping):
            return (dict(zip(x, taken.values(), strict=True)), *target)
        return (tuple(taken.values()) if isinstance(x, tuple) else taken["x"], *target)

    return Indexed(read, rows.pop(), "arrays in a file")


def _rows_at(column: Any, numbers: list[int]) -> Any:
    """Copies of some rows."""
    if isinstance(column, Tensor):
        return column[numbers]
    if hasattr(column, "iloc"):
        return column.iloc[numbers]
    if (start := _file_offset(column)) is not None:
        with suppress(OSError):  # the file has another name now, or none
            return of_array(_read(column, numbers, start))
    return of_array(np.array(column[numbers]))


def _file_offset(column: Any) -> int | None:
    """Where in its file a mapped array begins; None if its rows do not lie there in one piece, or
    were perhaps written to in the mapping alone.
    """
    if not isinstance(column, np.memmap) or column.mode == "c" or not hasattr(os, "preadv"):
        return None
    mapped = getattr(column, "_mmap", None)
    if mapped is None or column.filename is None or not column.flags.c_contiguous:
        return None
    first = np.frombuffer(mapped, np.uint8).ctypes.data
    into = int(column.ctypes.data) - int(first)
    return int(column.offset - column.offset % mmap.ALLOCATIONGRANULARITY + into)


def _read(column: Any, numbers: list[int], start: int) -> np.ndarray:
    """Rows of the array that begins at byte `start` of its file; stretches of rows at once."""
    rows = np.empty((len(numbers), *column.shape[1:]), column.dtype)
    size = column.strides[0]
    buffer = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    ends = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    with open(column.filename, "rb", buffering=0) as file:
        first = 0
        for end in ends:
            place, done = numbers[first] * size + start, first * size
            while done < end * size:
                got = os.preadv(file.fileno(), [buffer[done : end * size]], place)
                if got == 0:
                    raise OSError(f"'{column.filename}' is shorter than its array")
                done, place = done + got, place + got
            first = end
    return rows
