"""Tensors from the arrays of NumPy and the tables of pandas.

Owns `tensors_of`, for inputs and targets, `check_index` and `columns_of`. Next: `batch.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import DataError, warn


def tensors_of(value: Any, name: str) -> Any:
    """`value` with tensors in the place of arrays and tables, also in tuples, lists and mappings,
    which become tuples and dicts. Anything else is as it was. Tensors are cut off from the graph
    that they were made in.

    An array keeps its numbers and their type, and where it can its memory. The columns of a
    DataFrame become the columns of one float64 tensor; a Series of whole numbers or truth values
    becomes int64.

    Raises:
        DataError: columns of a table are not numbers; the message names them.
    """
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, np.ndarray):
        return of_array(value) if value.dtype.kind in "biuf" else value
    if _is_table(value):
        return _of_table(value, name)
    if isinstance(value, Mapping):
        return {
            key: tensors_of(part, f"{name}['{key}']")
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, (tuple, list)) and any(_holds_rows(part) for part in value):
        return tuple(tensors_of(part, f"{name}[{k}]") for k, part in enumerate(value))
    return value


def of_array(array: np.ndarray) -> Tensor:
    """The numbers of an array as a tensor, which shares its memory where torch can."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    plain = array.flags.writeable and array.dtype.isnative and min(array.strides, default=0) >= 0
    if not plain:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(np.asarray(array))


def _holds_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) or _is_table(value)


def _is_table(value: Any) -> bool:
    """Whether it is a DataFrame or a Series. Pandas is not imported for the question."""
    pd = sys.modules.get("pandas")
    return pd is not None and isinstance(value, (pd.DataFrame, pd.Series))


def _of_table(table: Any, name: str) -> Tensor:
    """The numbers of a DataFrame, (rows, columns), or of a Series, (rows,)."""
    import pandas as pd

    single = isinstance(table, pd.Series)
    columns = [(table.name, table)] if single else list(table.items())
    if not columns:
        raise DataError(f"{name}: expected a DataFrame with columns, got one without")
    text = [
        (column, values.dtype)
        for column, values in columns
        if not pd.api.types.is_numeric_dtype(values) or values.dtype.kind == "c"
    ]
    if text:
        raise DataError(f"{name}: {_not_numbers(text)}; {_encoded(text, single)}")
    if single and table.dtype.kind in "biu" and not table.isna().any():
        return torch.from_numpy(table.to_numpy(dtype=np.int64, copy=True))
    return torch.from_numpy(table.to_numpy(dtype=np.float64, na_value=np.nan, copy=True))


def _not_numbers(text: list[tuple[Any, Any]]) -> str:
    """Which columns are not numbers, and what they are."""
    named = ", ".join(f"'{column}' ({dtype})" for column, dtype in text[:5])
    more = f" and {len(text) - 5} more" if len(text) > 5 else ""
    one = len(text) == 1
    return f"column{'' if one else 's'} {named}{more} {'is' if one else 'are'} not numbers"


def check_index(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> None:
    """Raises DataError if the rows of two tables have the same labels in another order, and warns
    if they have other labels: rows are matched by their place. `names`: of both in messages.
    """
    if not _is_table(y) or not _is_table(x) or x.index.equals(y.index) or len(x) != len(y):
        return
    first, second = names
    if set(x.index) == set(y.index):
        once = x.index.is_unique and y.index.is_unique
        mend = (
            f"{second}.loc[{first}.index]" if once else "both in one order, with labels that differ"
        )
        raise DataError(
            f"{first} and {second}: expected the same rows in the same order, got tables whose"
            f" indexes differ in their order; give {mend}"
        )
    warn(
        f"{first} and {second} are tables with different indexes; their rows are matched by their"
        f" place, the first of one with the first of the other. Give"
        f" {second}.reset_index(drop=True) and {first}.reset_index(drop=True) if that is right"
    )


def columns_of(x: Any) -> tuple[str, ...] | None:
    """The names of the columns of a table; None for anything else."""
    return tuple(map(str, x.columns)) if _is_table(x) and hasattr(x, "columns") else None


def _encoded(text: list[tuple[Any, Any]], single: bool) -> str:
    """How to make numbers of such columns."""
    if all(getattr(dtype, "kind", "") in "mM" for _, dtype in text):
        return "turn dates into numbers, (column - column.min()).dt.days, or drop them"
    if all(dtype is np.dtype(object) for _, dtype in text) and not single:
        kinds = {str(column): "float" for column, _ in text}
        return (
            f"if they hold numbers, convert them, frame.astype({kinds}); else encode or drop them"
        )
    if single:
        return "number the classes: codes, classes = pandas.factorize(column)"
    names = [str(column) for column, _ in text]
    return f"encode them, pandas.get_dummies(frame, columns={names}), or drop them"
