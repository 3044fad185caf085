"""Whether targets fit the observed site that has them: its shape, and its support.

Owns `is_target` and `check_observed`. Next: `whole_data.py`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.errors import DataError, holds

_BOUNDS = ("lower_bound", "upper_bound")  # of a support


def is_target(value: Tensor, y: Tensor) -> bool:
    """Whether the value of an observed site is y, or y in another dtype."""
    if value is y or value.shape != y.shape:
        return value is y
    return bool(((value == y) | (value.isnan() & y.isnan())).all())


def check_observed(name: str, fn: Any, few: Tensor, y: Tensor) -> None:
    """Raises DataError unless y, of which the program was given the first `few`, fits its site."""
    shape = tuple(fn.shape())
    if shape and shape != tuple(few.shape):
        raise DataError(
            f"y of shape {tuple(y.shape)} does not fit observed site '{name}': for {len(few)} rows"
            f" the site has shape {shape}, y {tuple(few.shape)}; give y that shape"
        )
    support = _with_numbers(fn.support)
    if not (hasattr(support, "lower_bound") or holds(lambda: support.is_discrete)):
        return
    if any(isinstance(getattr(support, bound, None), Tensor) for bound in _BOUNDS):
        y = few  # bounds of each row are known for the first few alone
    try:
        good = support.check(y)
    except RuntimeError:
        y = few
        good = support.check(y)
    if not bool(good.all()):
        at = (~good).nonzero()[0].tolist()
        classes = isinstance(support, constraints.integer_interval) and not hasattr(
            _base(fn), "total_count"
        )
        mend = (
            "; number the classes from 0, or give the network more outputs; labels that are not"
            " observed, such as -100, are named by ignore_index="
        )
        raise DataError(
            f"y is outside the support of observed site '{name}' ({_in_words(support)}): got"
            f" {y[tuple(at)].tolist()} in row {at[0]}{mend if classes else ''}"
        )


def _with_numbers(support: Any) -> Any:
    """The constraint of each entry, with a number for a bound that is one number spread over all
    rows; bounds of each row that are equal in a few may differ in others.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    support = copy.copy(support)
    for name in _BOUNDS:
        bound = getattr(support, name, None)
        if isinstance(bound, Tensor) and bound.numel() and not any(_steps(bound)):
            setattr(support, name, bound.flatten()[0].item())
    return support


def _steps(t: Tensor) -> list[int]:
    """The strides of the axes with several entries."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _in_words(support: Any) -> str:
    """A constraint in a message: by its name alone, where its bounds differ between the rows."""
    several = any(isinstance(getattr(support, name, None), Tensor) for name in _BOUNDS)
    return type(support).__name__.strip("_") if several else str(support)


def _base(fn: Any) -> Any:
    """The distribution inside of others, such as that of ignored labels."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
