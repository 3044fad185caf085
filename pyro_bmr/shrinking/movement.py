"""Operations that only move entries: views, permutations, slices, repeats, splits, concatenations.

Where each entry comes from is found by moving the entries' numbers. From that follow the channels:
an axis of the result inherits those of the axis that it runs along; where an axis is split, such as
units into heads, each unit is the channel of its head and of its place in the head. Owns `moved`,
`indexed`, `joined` and `padded`. Next: `elementwise.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_bmr.shrinking.channel_ids import FIXED, ChannelIds, Ids
from pyro_bmr.shrinking.states import Axes, Call, State, fixed, is_open, state_of

SPLIT_OPERATIONS = {
    "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "split_copy", "unsafe_split",
    "unsafe_chunk", "hsplit", "vsplit", "dsplit",
}  # fmt: skip
MOVES = SPLIT_OPERATIONS | {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "mT",
    "numpy_T", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "reshape_as", "slice",
    "select", "narrow", "roll", "flip", "fliplr", "flipud", "repeat", "tile", "repeat_interleave",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold",
    "im2col", "diagonal", "movedim", "moveaxis", "swapaxes", "swapdims", "rot90", "broadcast_to",
    "adjoint", "mH", "squeeze_", "ravel", "matrix_H", "as_strided",
}  # fmt: skip
_MASKS = (torch.bool, torch.uint8)


def moved(ids: ChannelIds, call: Call) -> Any:
    """The states of the results of an operation that moves the entries of one tensor."""
    x = call.states[0]
    value, unknown = call.values(), call.run(lambda state: state.unknown)
    if not any(ids.prunable(axis) for axis in x.axes):
        axes: Any = (
            tuple(fixed(part.shape) for part in value)
            if isinstance(value, (tuple, list))
            else fixed(value.shape)
        )
    else:
        axes = _moved_axes(ids, call, x, value)
    if isinstance(value, (tuple, list)):
        return tuple(state_of(*part) for part in zip(value, unknown, axes, strict=True))
    state = state_of(value, unknown, axes)
    # only the leading axes of a distribution are moved
    ones = x.sums_to_one and value.ndim and value.shape[-1] == x.shape[-1]
    return State(*vars(state).values()) if not ones else _still_one(state, x, call)


def _still_one(state: State, x: State, call: Call) -> State:
    totals = call.run(lambda s: torch.arange(math.prod(s.shape)).reshape(s.shape) % s.shape[-1])
    places = torch.arange(x.shape[-1]).expand(totals.shape)
    same = bool(torch.equal(totals, places))
    return State(state.value, state.unknown, state.axes, sums_to_one=same)


def _moved_axes(ids: ChannelIds, call: Call, x: State, value: Any) -> Any:
    order = _order_of_axes(call, x)
    if order is not None:
        return tuple(x.axes[k] if k >= 0 else fixed((1,))[0] for k in order)
    numbers = torch.arange(math.prod(x.shape), dtype=torch.float64).view(x.shape)
    sources = call.run(lambda state: numbers)
    dynamic = call.node.meta.get("val")
    if isinstance(sources, (tuple, list)):
        return tuple(
            _axes_of(ids, x, part.long().numpy(), getattr(whole, "shape", ()), call.layer)
            for part, whole in zip(sources, dynamic or sources, strict=True)
        )
    return _axes_of(ids, x, sources.long().numpy(), getattr(dynamic, "shape", ()), call.layer)


def _order_of_axes(call: Call, x: State) -> list[int] | None:
    """For each axis of the result the axis of `x`, −1 for a new one; None for other moves."""
    if call.name not in ("permute", "transpose", "t", "unsqueeze", "swapaxes", "movedim", "mT"):
        return None
    order: Tensor = call.run(lambda state: torch.empty([2 + k for k in range(len(state.shape))]))
    return [n - 2 for n in order.shape]


def _axes_of(ids: ChannelIds, x: State, source: Any, sizes: Any, layer: str) -> Axes:
    """The channels of a tensor whose entries are those of `x` with the numbers `source`."""
    parts: list[list[list[int]]] = [[[] for _ in range(n)] for n in source.shape]
    if not source.size:
        return fixed(source.shape)
    step = 1
    for axis in reversed(x.axes):
        place = (source // step) % len(axis)
        step *= len(axis)
        if (axis == FIXED).all():
            continue
        along = [p for p in range(source.ndim) if _varies(place, p)]
        if not along:
            ids.fix(
                axis[place.reshape(-1)[:1]], f"a part of it is taken out in {layer or 'forward'}"
            )
        elif len(along) == 1:
            line = np.moveaxis(place, along[0], 0).reshape(source.shape[along[0]], -1)[:, 0]
            for j, k in enumerate(line.tolist()):
                parts[along[0]][j].insert(0, int(axis[k]))
        else:
            _split(ids, axis, place, along, parts, sizes)
    return tuple(
        np.array([ids.joined(position) for position in axis], dtype=np.int64) for axis in parts
    )


def _varies(place: Any, axis: int) -> bool:
    if place.shape[axis] < 2:
        return False
    lines = np.moveaxis(place, axis, 0)
    return bool((lines[1:] != lines[:1]).any())


def _split(
    ids: ChannelIds, axis: Ids, place: Any, along: list[int], parts: Any, sizes: Any
) -> None:
    """Channels for the axes `along` into which `axis` is split: each of its positions is kept if
    all the positions are that it goes to.
    """
    index = [slice(None) if p in along else 0 for p in range(place.ndim)]
    grid = place[tuple(index)]
    made = []
    for k, (p, n) in enumerate(zip(along, grid.shape, strict=True)):
        # positions with the same sources are one channel: heads in an axis of rows × heads
        _, group = np.unique(np.moveaxis(grid, k, 0).reshape(n, -1), axis=0, return_inverse=True)
        group = group.reshape(-1)
        count = int(group.max()) + 1
        dynamic = p < len(sizes) and is_open(sizes[p]) and count == n
        new = fixed((n,))[0] if dynamic else ids.new(count)[group]
        for j in range(n):
            if new[j] != FIXED:
                parts[p][j].insert(0, int(new[j]))
        made.append(new)
    where = np.stack([k.ravel() for k in np.indices(grid.shape)])
    old = axis[grid.ravel()]
    joined = [
        ids.joined(int(made[k][where[k, e]]) for k in range(len(along)))
        for e in range(where.shape[1])
    ]
    ids.tie(old, np.array(joined, dtype=np.int64))


def indexed(ids: ChannelIds, call: Call) -> State | None:
    """The state of entries that numbers pick along some axes, such as the last step of each
    sequence; the other axes keep their channels. None for masks, which pick as many as they have.
    """
    x = call.args[0]
    if call.name == "index_select":
        picks = {call.argument("dim") % x.value.ndim: call.argument("index")}
    else:
        picks = {k: i for k, i in enumerate(call.argument("indices")) if i is not None}
    if any(not isinstance(i, State) or i.value.dtype in _MASKS for i in picks.values()):
        return None
    why = f"entries of it are picked by their numbers in {call.layer or 'forward'}"
    for k, index in picks.items():
        for axis in (x.axes[k], *index.axes):
            ids.fix(axis, why)
    value, unknown = call.values(), x.unknown
    if any(bool(index.unknown.any()) for index in picks.values()):
        first = x.value[
            tuple(slice(0, 1) if k in picks else slice(None) for k in range(len(x.axes)))
        ]
        unknown = (unknown | (x.value != first)).any(tuple(picks), keepdim=True).expand(x.shape)
    rest = [axis for k, axis in enumerate(x.axes) if k not in picks]
    together = max(picks) - min(picks) < len(picks)
    place = min(picks) if together else 0
    new = fixed(value.shape[place : value.ndim - len(rest) + place])
    unknown = call.run(lambda state: unknown if state is x else state.value)
    return state_of(value, unknown, (*rest[:place], *new, *rest[place:]))


def joined(ids: ChannelIds, call: Call) -> State:
    """The state of tensors that are concatenated, or stacked along a new axis."""
    parts = [part for part in call.args[0] if isinstance(part, State)]
    value, unknown = call.values(), call.run(lambda state: state.unknown)
    parts = [part for part in parts if part.value.ndim == parts[-1].value.ndim]
    dim = call.argument("dim", 0) % value.ndim
    if call.name == "stack":
        axes = list(_tied(ids, [part.axes for part in parts]))
        axes.insert(dim, fixed((len(parts),))[0])
        return state_of(value, unknown, tuple(axes))
    lines = [part.axes[dim] for part in parts]
    rest = _tied(ids, [(*part.axes[:dim], *part.axes[dim + 1 :]) for part in parts])
    whole = np.concatenate(lines)
    if dim < len(call.dynamic) and call.dynamic[dim]:
        ids.fix(whole, "it is joined to rows of the data")
    return state_of(value, unknown, (*rest[:dim], whole, *rest[dim:]))


def _tied(ids: ChannelIds, several: list[Axes]) -> Axes:
    for axes in several[1:]:
        for one, other in zip(several[0], axes, strict=True):
            ids.tie(one, other)
    return several[0]


def padded(ids: ChannelIds, call: Call) -> State:
    """The state of a tensor whose last axes are padded; what is padded keeps its positions."""
    x = call.states[0]
    value = call.values()
    pad = list(call.argument("pad"))
    if call.name == "constant_pad_nd" or call.argument("mode", "constant") == "constant":
        unknown = nn.functional.pad(x.unknown, pad)
    else:
        unknown = call.run(lambda state: state.unknown.to(x.value.dtype)) != 0
    axes = []
    for k, axis in enumerate(x.axes):
        same = value.shape[k] == x.shape[k] and k < value.ndim - len(pad) // 2
        if not same:
            ids.fix(axis, f"it is padded in {call.layer or 'forward'}")
        axes.append(axis if same else fixed((value.shape[k],))[0])
    return state_of(value, unknown, tuple(axes))
