"""Whether targets are values that their observed site can have.

Owns `check_targets`. Next: `whole_data.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.errors import DataError, holds


def check_targets(name: str, fn: Any, few: Tensor, y: Tensor) -> None:
    """Raises DataError unless y, of which the program was given the first `few`, fits its site."""
    shape = tuple(fn.shape())
    if shape and shape != tuple(few.shape):
        raise DataError(
            f"y of shape {tuple(y.shape)} does not fit observed site '{name}': for {len(few)} rows"
            f" the site has shape {shape}, y {tuple(few.shape)}; give y that shape"
        )
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if not (hasattr(support, "lower_bound") or holds(lambda: support.is_discrete)):
        return
    good = support.check(y)
    if not bool(good.all()):
        at = (~good).nonzero()[0].tolist()
        mend = (
            "number the classes from 0, or give the network more outputs; labels that are not"
            " observed, such as -100, are named by ignore_index="
        )
        raise DataError(
            f"y is outside the support of observed site '{name}' ({support}): got"
            f" {y[tuple(at)].item()} in row {at[0]}"
            + (f"; {mend}" if isinstance(support, constraints.integer_interval) else "")
        )
