"""Operations that map each entry by itself, with broadcasting, and those that nothing is known of.

Owns `elementwise`, `prelu`, `batch_norm` and `opaque`. Next: `contractions.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_bmr.shrinking.channel_ids import FIXED, ChannelIds, Ids
from pyro_bmr.shrinking.states import Axes, Call, State, fixed, state_of

_PRODUCTS = {"mul", "multiply", "logical_and", "bitwise_and", "mul_", "__and__"}


def elementwise(ids: ChannelIds, call: Call) -> State:
    """The state of a function of entries, one by one. A product with a known 0 is known."""
    states = call.states
    value = call.values()
    axes = broadcast(ids, [state.axes for state in states], call.layer)
    unknown = torch.zeros(value.shape, dtype=torch.bool)
    for state in states:
        unknown |= state.unknown.expand(value.shape)
    if call.name in _PRODUCTS and len(states) > 1:
        for state in states:
            unknown &= state.nonzero().expand(value.shape)
    if call.name == "masked_fill" and len(states) > 1:
        known = ~states[1].unknown & states[1].value.bool()
        unknown &= ~known.expand(value.shape)
    if call.sized:  # a number of rows; only 0 stays 0
        unknown |= value != 0 if call.name in ("mul", "div") else True
    ones = call.name in ("dropout", "clone", "alias", "detach", "to", "_to_copy", "contiguous")
    state = state_of(value, unknown, axes)
    if ones and states[0].sums_to_one:
        return State(state.value, state.unknown, state.axes, sums_to_one=True)
    return state


def broadcast(ids: ChannelIds, several: list[Axes], layer: str) -> Axes:
    """The axes of tensors that are broadcast together: positions that meet are tied."""
    result: list[Ids] = []
    for k in range(max(map(len, several))):
        lines = [axes[len(axes) - 1 - k] for axes in several if k < len(axes)]
        size = max((len(line) for line in lines), default=1)
        if any(len(line) == 0 for line in lines):
            size = 0
        wide = [line for line in lines if len(line) == size]
        for line in wide[1:]:
            ids.tie(wide[0], line)
        for line in lines:
            if len(line) != size and line.size and line[0] != FIXED:
                ids.fix(line, f"one number for a whole axis in {layer or 'forward'}")
        result.insert(0, wide[0])
    return tuple(result)


def prelu(ids: ChannelIds, call: Call) -> State:
    """The state after slopes for negative entries, one for all channels or one each."""
    x, slopes = call.states
    axis = min(1, x.value.ndim - 1)
    if len(slopes.axes[0]) > 1:
        ids.tie(x.axes[axis], slopes.axes[0])
    moved = slopes.unknown.view(-1, *[1] * (x.value.ndim - 1 - axis)) & (x.value != 0)
    return state_of(call.values(), x.unknown | moved, x.axes)


def batch_norm(ids: ChannelIds, call: Call) -> Any:
    """The state after a batch norm in evaluation mode; None if it norms by the batch."""
    if call.argument("training", False) or call.argument("running_mean") is None:
        return None
    x, *others = call.states
    for other in others:
        ids.tie(x.axes[1], other.axes[0])
    unknown, value = x.unknown, call.values()
    several = isinstance(value, (tuple, list))
    gain, shape = call.argument("weight"), (1, -1, *[1] * (x.value.ndim - 2))
    for statistic in (call.argument("running_mean"), call.argument("running_var")):
        unknown = unknown | statistic.unknown.view(shape)
    unknown = normed(unknown, gain, call.argument("bias"), shape)
    state = state_of(value[0] if several else value, unknown, x.axes)
    if not several:
        return state
    return (state, *(nothing_known(part) for part in value[1:]))


def normed(unknown: Tensor, gain: Any, offset: Any, shape: tuple[int, ...]) -> Tensor:
    """What is unknown after a norm of something that is `unknown` in places. A gain that is known
    to be 0 leaves the offset, and what a fit moves is not known. `shape`: of gain and offset beside
    the result.
    """
    if isinstance(gain, State):
        unknown = (unknown & gain.nonzero().view(shape)) | gain.unknown.view(shape)
    return unknown | offset.unknown.view(shape) if isinstance(offset, State) else unknown


def nothing_known(value: Any) -> Any:
    """The states of tensors with nothing constant and nothing to remove."""

    def state(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        unknown = torch.ones_like(part, dtype=torch.bool)
        return State(torch.zeros_like(part), unknown, fixed(part.shape))

    return tree_map(state, value)


def opaque(ids: ChannelIds, call: Call, why: str) -> Any:
    """The states after an operation of which nothing is known: its inputs are kept whole."""
    for state in call.states:
        for axis in state.axes:
            ids.fix(axis, why)
    value = call.run(lambda state: torch.where(state.unknown, _ordinary(state), state.value))
    return nothing_known(value)


def _ordinary(state: State) -> Tensor:
    """Numbers with which any operation can be run."""
    return torch.zeros_like(state.value)
