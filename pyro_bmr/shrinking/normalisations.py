"""Operations of which each output reads all positions of an axis: norms, softmax, sorts, Fourier.

Owns a function for each kind. Next: `rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.shrinking.channel_ids import FIXED, ChannelIds
from pyro_bmr.shrinking.contractions import Read, Reads, is_open_axis
from pyro_bmr.shrinking.elementwise import normed, nothing_known
from pyro_bmr.shrinking.states import Call, State, fixed, state_of

# of one constant, however often, these give the same number
_OF_ANY_LENGTH = re.compile("amax|amin|max|min|std|var|std_mean|var_mean")
# of zeros, however many, these give zeros
_ZEROS_TO_ZEROS = re.compile(r"_?fft_\w+|cumsum|nansum|norm|linalg_vector_norm")
TOGETHER = "each of its outputs reads all of its channels; they are kept together"


def coupled(ids: ChannelIds, call: Call, dims: Iterable[int], reasons: dict[str, str]) -> Any:
    """The state after a function of all positions along `dims`, which are kept together."""
    x = call.states[0]
    gone = {d % x.value.ndim for d in dims} if x.value.ndim else set()
    value = call.values()
    unknown, nonzero = x.unknown, x.nonzero()
    for k in sorted(gone):
        tie_whole(ids, x, k, call, reasons)
        unknown, nonzero = unknown.any(k, keepdim=True), nonzero.any(k, keepdim=True)
        if is_open_axis(call, k) and not _OF_ANY_LENGTH.fullmatch(call.name):
            unknown = nonzero if _ZEROS_TO_ZEROS.fullmatch(call.name) else torch.ones_like(unknown)
    if isinstance(value, (tuple, list)):
        return tuple(_after(x, part, unknown, gone) for part in value)
    state = _after(x, value, unknown, gone)
    if call.name in ("softmax", "_softmax", "_safe_softmax") and gone == {x.value.ndim - 1}:
        return State(state.value, state.unknown, state.axes, sums_to_one=True)
    return state


def _after(x: State, value: Tensor, unknown: Tensor, gone: set[int]) -> State:
    if value.ndim == x.value.ndim:
        axes = tuple(
            axis if len(axis) == n else fixed((n,))[0]
            for axis, n in zip(x.axes, value.shape, strict=True)
        )
        if any(
            len(axis) != n and k not in gone
            for k, (axis, n) in enumerate(zip(x.axes, value.shape, strict=True))
        ):
            return nothing_known(value)  # type: ignore[no-any-return]
        wide = all(len(x.axes[k]) == value.shape[k] for k in gone)
        if not wide and not all(value.shape[k] == 1 for k in gone):
            unknown = unknown.expand(
                [
                    n if k in gone else m
                    for k, (n, m) in enumerate(zip(value.shape, unknown.shape, strict=True))
                ]
            )
        return state_of(value, unknown, axes)
    axes = tuple(axis for k, axis in enumerate(x.axes) if k not in gone)
    return state_of(value, unknown.reshape(value.shape), axes)


def tie_whole(ids: ChannelIds, x: State, axis: int, call: Call, reasons: dict[str, str]) -> None:
    """Ties all positions of an axis, and enters the reason."""
    if ids.prunable(x.axes[axis]) and call.layer:
        reasons.setdefault(call.layer, TOGETHER)
    ids.tie_all(x.axes[axis])


def layer_norm(ids: ChannelIds, call: Call, reasons: dict[str, str]) -> Any:
    """The state after a LayerNorm or an RMSNorm, whose channels are kept together."""
    x = call.states[0]
    shape = tuple(call.argument("normalized_shape"))
    dims = range(x.value.ndim - len(shape), x.value.ndim)
    unknown = x.unknown
    for k in dims:
        tie_whole(ids, x, k, call, reasons)
        unknown = unknown.any(k, keepdim=True)
    for other in call.states[1:]:
        for k, axis in zip(dims, other.axes, strict=True):
            ids.tie(x.axes[k], axis)
    gain, offset = call.argument("weight"), call.argument("bias")
    unknown = normed(unknown.expand(x.shape), gain, offset, shape)
    value = call.values()
    if isinstance(value, (tuple, list)):
        first = state_of(value[0], unknown, x.axes)
        return (first, *nothing_known(tuple(value[1:])))
    return state_of(value, unknown, x.axes)


def group_norm(ids: ChannelIds, call: Call, reasons: dict[str, str]) -> Any:
    """The state after a GroupNorm, whose groups are kept or removed whole, or an InstanceNorm,
    which has one channel in each group.
    """
    x = call.states[0]
    channels = len(x.axes[1])
    instance = call.name == "instance_norm"
    groups = channels if instance else int(call.argument("num_groups"))
    if instance and call.argument("running_mean") is not None:
        return None
    for axis in x.axes[2:]:
        ids.fix(axis, f"pixels of {call.layer}")
    rows = x.axes[1].reshape(groups, -1)
    for other in call.states[1:]:
        ids.tie(x.axes[1], other.axes[0])
    if rows.shape[1] > 1:
        if ids.prunable(x.axes[1]) and call.layer:
            reasons.setdefault(call.layer, TOGETHER)
        for row in rows:
            ids.tie_all(row)
    flat = x.unknown.reshape(len(x.unknown), groups, -1).any(2)
    unknown = flat.repeat_interleave(rows.shape[1], 1).view(*flat.shape[:1], -1, *[1] * (
        x.value.ndim - 2
    )).expand(x.shape)  # fmt: skip
    shape = (-1, *[1] * (x.value.ndim - 2))
    unknown = normed(unknown, call.argument("weight"), call.argument("bias"), shape)
    value = call.values()
    if isinstance(value, (tuple, list)):
        return None
    return state_of(value, unknown, x.axes)


def pooled(ids: ChannelIds, call: Call, space: int) -> Any:
    """The state after a function of the last `space` axes, channel by channel."""
    x = call.states[0]
    value = call.values()
    for axis in x.axes[x.value.ndim - space :]:
        ids.fix(axis, f"pixels of {call.layer}")
    known = x.unknown.to(x.value.dtype)
    unknown = call.run(lambda state: known if state is x else state.value)
    if isinstance(value, (tuple, list)):
        first = _after_pool(x, value[0], unknown[0] != 0, space)
        return (first, *nothing_known(tuple(value[1:])))
    return _after_pool(x, value, unknown != 0, space)


def _after_pool(x: State, value: Tensor, unknown: Tensor, space: int) -> State:
    lead = x.value.ndim - space
    return state_of(value, unknown, (*x.axes[:lead], *fixed(value.shape[lead:])))


def embedding(ids: ChannelIds, call: Call) -> Any:
    """The state after rows of a table are taken out; a column with one number is constant."""
    table, index = call.states[:2]
    if call.name == "embedding_bag" or call.name == "_embedding_bag":
        return _bags(ids, call, table)
    ids.fix(table.axes[0], "rows of a table")
    for axis in index.axes:
        ids.fix(axis, "numbers of rows of a table")
    value = call.values()
    same = (table.value == table.value[:1]).all(0) & ~table.unknown.any(0)
    unknown = ~same.expand(value.shape)
    if not bool(index.unknown.any()):
        unknown = call.run(lambda s: table.unknown if s is table else s.value)
    return state_of(value, unknown, (*fixed(index.shape), table.axes[1]))


def _bags(ids: ChannelIds, call: Call, table: State) -> Any:
    ids.fix(table.axes[0], "rows of a table")
    for state in call.states[1:]:
        for axis in state.axes:
            ids.fix(axis, "numbers of rows of a table")
    value = call.run(lambda s: s.value)
    zero = (table.value == 0).all(0) & ~table.unknown.any(0)
    first = value[0] if isinstance(value, (tuple, list)) else value
    unknown = ~zero.expand(first.shape)
    state = state_of(torch.zeros_like(first), unknown, (*fixed(first.shape[:1]), table.axes[1]))
    if isinstance(value, (tuple, list)):
        return (state, *nothing_known(tuple(value[1:])))
    return state


def attention(ids: ChannelIds, call: Call, reads: Reads) -> Any:
    """The state after scaled_dot_product_attention: heads, and the dimensions of keys and of
    values, are removed whole; tokens are kept.
    """
    query, key, value = call.states[:3]
    mask = call.argument("attn_mask")
    for state in (query, key, value):
        ids.fix(state.axes[-2], f"tokens of {call.layer}")
    ids.tie(query.axes[-1], key.axes[-1])
    for k in range(value.value.ndim - 2):
        a, b, c = query.axes[k], key.axes[k], value.axes[k]
        ids.tie(b, c)
        if len(a) == len(b):
            ids.tie(a, b)
        elif len(b) == 1:
            ids.fix(b, "one head of keys for all queries")
        else:  # grouped queries
            places = ids.new(len(a) // len(b))
            grouped = [ids.joined((h, p)) for h in b.tolist() for p in places.tolist()]
            ids.tie(a, np.array(grouped, dtype=np.int64))
    if isinstance(mask, State):
        for k, axis in enumerate(reversed(mask.axes)):
            if k > 1 and len(axis) > 1:
                ids.tie(axis, query.axes[query.value.ndim - 1 - k])
            else:
                ids.fix(axis, "tokens of a mask")
    reads.append(_scores(ids, call, query, key))
    result = call.values()
    first = value.value.narrow(-2, 0, 1)
    same = (value.value == first).all(-2, keepdim=True) & ~value.unknown.any(-2, keepdim=True)
    if mask is not None:
        same = same & (first == 0)  # a row without a token is 0 or not a number
    if len(query.axes[-3:-2]) and query.shape[-3] != value.shape[-3]:
        same = same.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    unknown = ~same.expand(result.shape)
    return state_of(result, unknown, (*query.axes[:-1], value.axes[-1]))


def _scores(ids: ChannelIds, call: Call, query: State, key: State) -> Read:
    """What the products of queries and keys read: dimensions in which neither is 0."""
    sides = [state.nonzero().any(-2) for state in (query, key)]
    if query.value.ndim > 2 and query.shape[-3] != key.shape[-3]:
        sides[1] = sides[1].repeat_interleave(query.shape[-3] // key.shape[-3], -2)
    both = sides[0] & sides[1]
    outputs = np.array([FIXED])
    if query.value.ndim > 2:
        heads = both.flatten(0, -3).any(0) if both.ndim > 2 else both
        outputs, table = query.axes[-3], heads.T
    else:
        table = both[:, None]
    none = np.zeros(query.shape[-1], dtype=bool)
    return Read(call.node, call.layer, query.axes[-1], [(table.numpy(), outputs)], none)
