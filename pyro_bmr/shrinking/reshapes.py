"""The state of a value that is reshaped, permuted, expanded, indexed, split or concatenated.

Owns a function for each of these operations. Next: `arithmetic.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.errors import ShrinkError, described
from pyro_bmr.shrinking.refusals import MASKED
from pyro_bmr.shrinking.states import State, fixed
from pyro_bmr.shrinking.ties import Ties

RESHAPES: set[Any] = {
    torch.flatten, torch.reshape, torch.unsqueeze, torch.squeeze, torch.unflatten, "flatten",
    "reshape", "view", "unsqueeze", "squeeze", "unflatten",
}  # fmt: skip
PERMUTES: set[Any] = {
    torch.transpose, torch.permute, torch.swapaxes, "transpose", "permute", "swapaxes",
}  # fmt: skip


def permuted(x: State, run: Callable[[Tensor], Tensor]) -> State:
    """The state after `run` has changed the order of the axes."""
    order = run(torch.empty(tuple(range(2, 2 + x.value.ndim)))).shape  # axis k has the size k + 2
    return State(run(x.value), run(x.unknown), tuple(x.axes[n - 2] for n in order))


def expanded(x: State, run: Callable[[Tensor], Tensor]) -> State:
    """The state after `run` has repeated axes of size 1."""
    value, unknown = run(x.value), run(x.unknown)
    axes = (*fixed(value.shape[: value.ndim - x.value.ndim]), *x.axes)
    repeated = (np.broadcast_to(axis, n) for axis, n in zip(axes, value.shape, strict=True))
    return State(value, unknown, tuple(repeated))


def reshaped(ties: Ties, x: State, run: Callable[[Tensor], Tensor]) -> State:
    """The state after `run` has merged or split neighbouring axes.

    In a merged axis every position of a channel belongs to that channel. An axis that is split ties
    its channels in groups, such as the channels of an attention head.
    """
    value, unknown = run(x.value), run(x.unknown)
    axes: list[np.ndarray] = []
    for old, new in _factors(x.value.shape, value.shape):
        axes += _regrouped(ties, [x.axes[k] for k in old], [value.shape[k] for k in new])
    return State(value, unknown, tuple(axes))


def _regrouped(ties: Ties, ids: list[np.ndarray], sizes: list[int]) -> list[np.ndarray]:
    """The channels `ids` of some axes, as axes of these `sizes`, which have the same product."""
    if len(ids) == len(sizes) == 1:
        return ids
    prunable = [k for k, axis in enumerate(ids) if ties.prunable(axis)]
    if len(sizes) == 1 and len(prunable) == 1:  # merged
        view = [1] * len(ids)
        view[prunable[0]] = -1
        channels = ids[prunable[0]].reshape(view)
        return [np.broadcast_to(channels, [len(axis) for axis in ids]).reshape(-1)]
    if len(ids) == 1 and prunable and max(sizes, default=1) > 1:  # split into groups
        first = next(k for k, size in enumerate(sizes) if size > 1)
        groups = ids[0].reshape(sizes[first], -1)
        for column in range(1, groups.shape[1]):
            ties.tie(groups[:, 0], groups[:, column])
        return [*fixed(sizes[:first]), groups[:, 0], *fixed(sizes[first + 1 :])]
    for axis in ids:
        ties.fix(axis)
    return [*fixed(sizes)]


def indexed(ties: Ties, x: State, index: Any) -> State:
    """The state of `x[index]`, for numbers, slices, None and `...`; what is indexed is kept.

    Raises:
        ShrinkError: the index is of another kind.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(p, (int, slice)) or p is None or p is Ellipsis for p in parts):
        raise ShrinkError(
            f"indexing: expected numbers and slices, got {described(index)}; {MASKED}"
        )
    axes, k = [], 0
    for part in _part_for_each_axis(parts, x.value.ndim):
        if part is None:
            axes.append(fixed((1,))[0])
            continue
        if part != slice(None):
            ties.fix(x.axes[k])
        if isinstance(part, slice):
            axes.append(x.axes[k][part])
        k += 1
    return State(x.value[index], x.unknown[index], tuple(axes))


def _part_for_each_axis(parts: list[Any], ndim: int) -> list[Any]:
    """The parts of an index, with `...` and the axes that it leaves out written as full slices."""
    missing = [slice(None)] * (ndim - sum(p is not None and p is not Ellipsis for p in parts))
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    return [*parts[:at], *missing, *parts[at + 1 :]]


def split(ties: Ties, x: State, run: Callable[[Tensor], Any]) -> tuple[State, ...]:
    """The states of the parts into which `run` splits a value; all its channels are kept."""
    ties.fix_all(x)
    parts = zip(run(x.value), run(x.unknown), strict=True)
    return tuple(State(value, unknown, fixed(value.shape)) for value, unknown in parts)


def concatenated(ties: Ties, states: Sequence[State], dim: int) -> State:
    """The state of values joined along `dim`; along the other axes their channels are tied."""
    dim = dim % states[0].value.ndim
    axes = []
    for k, parts in enumerate(zip(*(s.axes for s in states), strict=True)):
        if k == dim:
            axes.append(np.concatenate(parts))
        else:
            for part in parts[1:]:
                ties.tie(parts[0], part)
            axes.append(parts[0])
    value = torch.cat([s.value for s in states], dim)
    return State(value, torch.cat([s.unknown for s in states], dim), tuple(axes))


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes of `old` and `new` with equal products, in order.

    For example (2, 3, 4) → (2, 12) gives ([0], [0]), ([1, 2], [1]).
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a = [i] if i < len(old) else []
        b = [j] if j < len(new) else []
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
