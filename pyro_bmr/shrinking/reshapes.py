"""What becomes of channels when a value is reshaped, permuted, expanded, indexed or concatenated.

Owns those rules. Next: `operations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ShrinkError, described
from pyro_bmr.shrinking.graphs import MASKED
from pyro_bmr.shrinking.ties import State, Ties, fixed

RESHAPES: set[Any] = {
    torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze, torch.unflatten, "flatten",
    "reshape", "view", "unsqueeze", "squeeze", "unflatten",
}  # fmt: skip
PERMUTES: set[Any] = {
    torch.transpose,
    torch.permute,
    "transpose",
    "permute",
    "swapaxes",
    torch.swapaxes,
}


def permuted(x: State, run: Callable[[Tensor], Tensor]) -> State:
    """Axes change places."""
    order = run(torch.empty(tuple(range(2, 2 + x.value.ndim)))).shape  # axis k has the size k + 2
    return State(run(x.value), run(x.unknown), tuple(x.axes[n - 2] for n in order))


def expanded(x: State, run: Callable[[Tensor], Tensor]) -> State:
    """Axes of size 1 are repeated."""
    value, unknown = run(x.value), run(x.unknown)
    axes = (*fixed(value.shape[: value.ndim - x.value.ndim]), *x.axes)
    return State(
        value,
        unknown,
        tuple(np.broadcast_to(axis, n) for axis, n in zip(axes, value.shape, strict=True)),
    )


def reshaped(ties: Ties, x: State, run: Callable[[Tensor], Tensor]) -> State:
    """Neighbouring axes are merged or split. Merged, every position of a channel is that channel's;
    split, channels are tied in groups (heads).
    """
    value, unknown = run(x.value), run(x.unknown)
    axes: list[np.ndarray] = []
    for old, new in _factors(x.value.shape, value.shape):
        ids, sizes = [x.axes[k] for k in old], [value.shape[k] for k in new]
        moving = [k for k, axis in enumerate(ids) if ties.tracked(axis)]
        if len(old) == len(new) == 1:
            axes.append(ids[0])
        # flatten: every position of a channel is that channel's
        elif len(new) == 1 and len(moving) == 1:
            view = [1] * len(ids)
            view[moving[0]] = -1
            axes.append(
                np.broadcast_to(ids[moving[0]].reshape(view), [len(axis) for axis in ids]).reshape(
                    -1
                )
            )
        # split into heads: all channels of a head are tied
        elif len(old) == 1 and moving and max(sizes, default=1) > 1:
            first = next(k for k, size in enumerate(sizes) if size > 1)
            rows = ids[0].reshape(sizes[first], -1)
            for column in range(1, rows.shape[1]):
                ties.tie(rows[:, 0], rows[:, column])
            axes += [*fixed(sizes[:first]), rows[:, 0], *fixed(sizes[first + 1 :])]
        else:
            for axis in ids:
                ties.fix(axis)
            axes += fixed(sizes)
    return State(value, unknown, tuple(axes))


def indexed(ties: Ties, x: State, index: Any) -> State:
    """Numbers and slices; an axis that is indexed keeps its channels."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(p, (int, slice)) or p is None or p is Ellipsis for p in parts):
        raise ShrinkError(
            f"indexing by {described(index)} is not supported, only by numbers and slices; {MASKED}"
        )
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (
            x.value.ndim - sum(p is not None and p is not Ellipsis for p in parts)
        )
    axes, k = [], 0
    for part in [*parts, *[slice(None)] * (x.value.ndim - sum(p is not None for p in parts))]:
        if part is None:
            axes.append(fixed((1,))[0])
            continue
        if part != slice(None):
            ties.fix(x.axes[k])
        if isinstance(part, slice):
            axes.append(x.axes[k][part])
        k += 1
    return State(x.value[index], x.unknown[index], tuple(axes))


def concatenated(ties: Ties, states: Sequence[State], dim: int) -> State:
    """Values one after the other along `dim`; along the other axes their channels are tied."""
    dim = dim % states[0].value.ndim
    axes = []
    for k, parts in enumerate(zip(*(s.axes for s in states), strict=True)):
        if k == dim:
            axes.append(np.concatenate(parts))
        else:
            for part in parts[1:]:
                ties.tie(parts[0], part)
            axes.append(parts[0])
    return State(
        torch.cat([s.value for s in states], dim),
        torch.cat([s.unknown for s in states], dim),
        tuple(axes),
    )


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The least groups of axes of `old` and `new` with equal products, in order: (2, 3, 4) → (2,
    12) gives ([0], [0]), ([1, 2], [1]).
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = (
            ([i], [j])
            if i < len(old) and j < len(new)
            else ([i], [])
            if i < len(old)
            else ([], [j])
        )
        i, j = i + len(a), j + len(b)
        while (p := math.prod(old[k] for k in a)) != (q := math.prod(new[k] for k in b)):
            if p < q:
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        groups.append((a, b))
    return groups
