"""What users give as data: tensors, arrays, tables, data sets, loaders, iterables of batches.

Owns `source_of`, `example_of` and `columns_in`. Next: `data_set.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pyro_bmr.checks import is_whole, mend
from pyro_bmr.data.batch import BatchChecks, pair_in
from pyro_bmr.data.inputs import in_dtype_of, of_each, parts_of
from pyro_bmr.data.loaders import of_loader
from pyro_bmr.data.mapped_rows import mapped_rows
from pyro_bmr.data.row_sources import Held, Indexed, Source, Stream, chunks
from pyro_bmr.data.tables import check_index, columns_of, tensors_of
from pyro_bmr.errors import DataError, described

_EXAMPLE = 16  # rows on which a network is tried


def source_of(
    data: Any, targets: bool = True, size: int | None = None, name: str = "data"
) -> Source:
    """What the rows of `data` are read from.

    Args:
        targets: whether the rows have targets, as in a fit; else they may be inputs alone.
        size: N, for batches that come without it.
        name: of the argument in messages.

    Raises:
        DataError: it is nothing that rows can be read from.
    """
    if size is not None and not is_whole(size, 1):
        raise DataError(f"size={described(size)}: expected a whole number of rows > 0")
    found = _found(data, targets, size)
    if found is not None and (size is None or isinstance(found, Stream)):
        return found
    if found is not None:
        raise DataError(
            f"size={size}: the number of rows of {_named(data)} is known; give size for a loader or"
            " an iterable of batches alone"
        )
    raise _no_source(data, targets, name)


def example_of(value: Any, net: nn.Module) -> Any:
    """Some first rows of inputs that are given in any form, as tensors in the dtype of the network.
    A tensor is all of the example; what is no data is as it was.
    """
    if not isinstance(net, nn.Module):
        return value  # what takes the example refuses it
    if isinstance(value, Tensor):
        return in_dtype_of(net, value)
    try:
        source = source_of(value, targets=False)
    except DataError:
        return value
    x, _ = next(chunks(source, _EXAMPLE, BatchChecks(), targets=False))
    x = in_dtype_of(net, of_each(lambda part: part[:_EXAMPLE], x))
    return x[0] if isinstance(x, tuple) and len(x) == 1 else x


def columns_in(data: Any) -> tuple[str, ...] | None:
    """The names of the columns of x, if `data` are a table, a pair whose x is a table, or batches
    of such pairs.
    """
    if _are_pairs(data):
        return columns_in(data[0])
    x = data[0] if isinstance(data, (tuple, list)) and len(data) == 2 else data
    return columns_of(x)


def _found(data: Any, targets: bool, size: int | None) -> Source | None:
    """The source of the rows of `data`; None if it is none."""
    if targets and hasattr(data, "x_train") and hasattr(data, "y_train"):
        return Held(data.x_train, data.y_train)
    if isinstance(data, DataLoader):
        return of_loader(data, size)
    if not targets and (isinstance(data, (Tensor, np.ndarray)) or _are_inputs(data)):
        return _of_columns(data, None)
    if isinstance(data, Mapping):
        return _of_columns(*pair_in(data, "the data", targets))
    if isinstance(data, (tuple, list)):
        if targets and len(data) == 2 and not _are_pairs(data, size):
            return _of_pair(*data)
        if targets and size is None and not _are_pairs(data):
            return None
        named = f"a {type(data).__name__} of batches"
        return Stream(data, size, len(data), named) if _are_batches(data) else None
    return None if _is_array(data) else _of_other(data, size)


def _named(data: Any) -> str:
    return f"a {type(data).__name__}"


def _no_source(data: Any, targets: bool, name: str) -> DataError:
    """The error of data that are none."""
    kind, tables = type(data).__name__, hasattr(data, "iloc")
    if not targets:
        hint = mend(data) or "give the numbers of its rows as one torch.Tensor"
        return DataError(f"x: expected a tensor, got {kind}; {hint}")
    hint = "give (table[features], table[target])" if tables else mend(data)
    return DataError(
        f"{name}: expected a pair (x, y) of tensors, arrays or tables, a Dataset, a DataLoader,"
        f" batches with size=, or anything with x_train and y_train, got {kind};"
        f" {hint or 'give such a pair; x may be a tuple or a dict'}"
    )


def _are_inputs(data: Any) -> bool:
    """Whether these are the inputs themselves: a table, or several inputs in a tuple or a dict."""
    return hasattr(data, "iloc") or (
        isinstance(data, tuple) and len(data) > 0 and all(_is_array(part) for part in data)
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, str, bytes)) or hasattr(value, "iloc")


def _are_batches(data: Any) -> bool:
    """Whether it is a list of batches, and not numbers in nested lists."""
    return len(data) > 0 and all(
        isinstance(part, (Tensor, np.ndarray, Mapping)) or _is_pair(part) for part in data
    )


def _are_pairs(data: Any, size: int | None = None) -> bool:
    """Whether these are batches of x and y each, and no pair (x, y): each part has columns of its
    own, which y never has.
    """
    if not isinstance(data, (tuple, list)) or not data:
        return False
    if isinstance(data, tuple) and len(data) == 2 and size is None:
        return False  # ((a, b), (c, d)) may be meant as several inputs and several targets
    return all(map(_is_pair, data)) or all(isinstance(part, Mapping) for part in data)


def _is_pair(part: Any) -> bool:
    """Whether it is a tuple or a list of columns; the first may be several inputs."""
    return isinstance(part, (tuple, list)) and len(part) > 0 and all(map(_is_column, part[:2]))


def _is_column(part: Any) -> bool:
    """Whether it is an array or a table, or a tuple, a list or a dict of such."""
    if isinstance(part, (tuple, list, Mapping)):
        parts = list(part.values() if isinstance(part, Mapping) else part)
    else:
        parts = [part]
    return bool(parts) and all(_is_array(p) and not isinstance(p, (str, bytes)) for p in parts)


def _of_other(data: Any, size: int | None) -> Source | None:
    """A data set of one's own, or an iterable of batches; None if it is neither."""
    about, sized = type(data).__name__, hasattr(data, "__len__")
    by_number = hasattr(data, "__getitem__") and sized and not isinstance(data, IterableDataset)
    if by_number and (size is None or isinstance(data, Dataset)):
        return Indexed(_reader(data), len(data), about)
    if not hasattr(data, "__iter__"):
        return None
    steps = len(data) if sized else None
    return Stream(data, size, steps, about, again=not hasattr(data, "__next__"))


def _of_columns(x: Any, y: Any) -> Source:
    """Rows whose columns are given: in memory, or read by their numbers if one is mapped from a
    file.
    """
    if any(isinstance(column, np.memmap) for column in (*parts_of(x).values(), y)):
        return mapped_rows(x, y)
    parts: dict[str, Any] = parts_of(x) if isinstance(x, (Mapping, tuple)) else {"x": x}
    first = next(iter(parts), "x")
    for name, part in {**parts, "y": y}.items():
        check_index(parts.get(first), part, (first, name))
    return Held(tensors_of(x, "x"), tensors_of(y, "y"))


def _of_pair(x: Any, y: Any) -> Source:
    """Rows of a pair (x, y).

    Raises:
        DataError: y has several columns of its own, as x may have.
    """
    if not _is_array(y) and (_is_column(y) or _is_pair(y)):
        raise DataError(
            f"y: expected one tensor of targets, got {described(y)}; join several targets in one"
            " tensor, and give batches (x, y) as a list"
        )
    return _of_columns(x, y)


def _reader(data: Any) -> Callable[[list[int]], Any]:
    """Reads rows of a data set by their numbers, as one batch."""

    def read(numbers: list[int]) -> Any:
        if hasattr(data, "__getitems__"):
            rows = data.__getitems__(numbers)
        else:
            rows = [data[number] for number in numbers]
        try:
            return default_collate(rows)
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"rows {numbers[0]} … of the data set do not make a batch"
                f" ({' '.join(str(error).split())[:160]}); give a DataLoader with a collate_fn"
            ) from error

    return read
