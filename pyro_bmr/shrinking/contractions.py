"""Operations that weight channels and add them up: linear layers, convolutions, sums.

A channel is needed if a kept output reads it with a weight other than 0. What a constant channel
adds to the outputs is a constant, and goes into the bias. Owns `Read` and a function for each
operation. Next: `products.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pyro_bmr.shrinking.channel_ids import FIXED, ChannelIds, Ids
from pyro_bmr.shrinking.states import Axes, Call, State, dynamic_axes, fixed, state_of

Bools = NDArray[np.bool_]
Reads = list["Read"]


@dataclass(frozen=True)
class Read:
    """A sum over the channels `inputs` at a node.

    `tables`: pairs of (inputs, outputs) bool matrices, which output reads which input, and of the
    channels of those outputs; an input is needed if kept outputs of every table read it.
    `foldable` (inputs): constants that can be added to the outputs instead, as `effect(removed)`
    says. `level` (inputs): the constant, and `shared`: the bias that takes it up, if one does.
    """

    node: fx.Node
    layer: str
    inputs: Ids
    tables: list[tuple[Bools, Ids]]
    foldable: Bools
    level: Tensor | None = None
    shared: str = ""
    effect: Callable[[Tensor], Tensor] | None = None
    broken: Bools | None = None

    def needed(self, kept: Callable[[Ids], Bools]) -> Bools:
        """Which inputs are needed by the outputs that are kept."""
        needed = ~self.foldable
        for reads, outputs in self.tables:
            needed = needed & reads[:, kept(outputs)].any(1)
        return needed


def array(flags: Tensor) -> Bools:
    """Flags as an array."""
    return np.asarray(flags.numpy(), dtype=bool)


def linear(ids: ChannelIds, call: Call, reads: Reads) -> State:
    """The state of x Wᵀ + b, and what it reads."""
    x, weight = call.states[:2]
    bias = call.argument("bias")
    outputs = weight.axes[0]
    ids.tie(x.axes[-1], weight.axes[1])
    number = x.value.dtype
    unknown = _linear(x.unknown.to(number), weight.nonzero().to(number))
    if bool(weight.unknown.any()):
        unknown = unknown + _linear(x.nonzero().to(number), weight.unknown.to(number))
    unknown = unknown > 0.5
    if isinstance(bias, State):
        ids.tie(outputs, bias.axes[0])
        unknown = unknown | bias.unknown
    lines = x.value.flatten(0, -2), x.unknown.flatten(0, -2)
    matrix = weight.value if not bool(weight.unknown.any()) else None
    reads.append(_read(call, x.axes[-1], lines, weight, outputs, matrix, padded=False))
    return state_of(call.values(), unknown, (*x.axes[:-1], outputs))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _read(
    call: Call, inputs: Ids, lines: tuple[Tensor, Tensor], weight: State, outputs: Ids,
    matrix: Tensor | None, padded: bool,
) -> Read:  # fmt: skip
    """What is read of `lines` (places, inputs), values and unknown, with a weight (outputs,
    inputs); `matrix`: its sums over a kernel, None if it is not known.
    """
    value, unknown = lines
    level = value[0] if len(value) else value.new_zeros(value.shape[1])
    constant = ~unknown.any(0) & (value == level).all(0)
    foldable = constant & (level == 0) if padded else constant
    if matrix is None:
        foldable &= level == 0
    nonzero = weight.nonzero().flatten(2).any(2) if weight.value.ndim > 2 else weight.nonzero()
    broken = constant & ~foldable & nonzero.any(0)

    def effect(removed: Tensor) -> Tensor:
        assert matrix is not None
        return matrix[:, removed] @ level[removed].to(matrix.dtype)

    named = next((a for a in (call.node.args[2:3]) if isinstance(a, fx.Node)), None)
    named = named or next(iter(call.node.all_input_nodes[1:2]), None)
    return Read(
        call.node, call.layer, inputs, [(array(nonzero.T), outputs)], array(foldable), level,
        str(named), effect if matrix is not None else None, array(broken) if padded else None,
    )  # fmt: skip


def convolution(ids: ChannelIds, call: Call, reads: Reads) -> State:
    """The state of a convolution, in groups or not, transposed or not, and what it reads."""
    x, weight = call.states[:2]
    bias, groups = call.argument("bias"), int(call.argument("groups", 1))
    transposed = "transpose" in call.name or bool(call.argument("transposed", False))
    space = weight.value.ndim - 2
    channels = x.value.ndim - space - 1
    for axis in x.axes[:channels] + x.axes[channels + 1 :]:
        ids.fix(axis, f"rows and pixels of {call.layer}")
    for axis in weight.axes[2:]:
        ids.fix(axis, "a kernel")
    value = call.values()
    unknown = _indicator(call, x, weight)
    if isinstance(bias, State):
        unknown = unknown | bias.unknown.view(-1, *[1] * space)
    inputs = x.axes[channels]
    outputs = _channels_of_groups(ids, inputs, weight, groups, transposed, value.shape[channels])
    if isinstance(bias, State):
        ids.tie(outputs, bias.axes[0])
    matrix = _by_channel(weight, groups, transposed)
    lines = tuple(t.movedim(channels, -1).flatten(0, -2) for t in (x.value, x.unknown))
    known = matrix.value if not bool(weight.unknown.any()) else None
    padded = transposed or _pads(call.argument("padding", 0))
    whole = _read(call, inputs, lines, matrix, outputs, known, padded)  # type: ignore[arg-type]
    reads.append(whole)
    axes = (*fixed(value.shape[:channels]), outputs, *fixed(value.shape[channels + 1 :]))
    return state_of(value, unknown, axes)


def _pads(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding == "same"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _indicator(call: Call, x: State, weight: State) -> Tensor:
    """Where a product of something unknown and something that is not 0 is added."""
    number = x.value.dtype if x.value.is_floating_point() else torch.float32

    def pick(state: State, first: Tensor, second: Tensor) -> Tensor:
        if state is x:
            return first.to(number)
        return second.to(number) if state is weight else torch.zeros_like(state.value)

    total: Tensor = call.run(lambda s: pick(s, x.unknown, weight.nonzero()))
    if bool(weight.unknown.any()):
        total = total + call.run(lambda s: pick(s, x.nonzero(), weight.unknown))
    return total > 0.5


def _channels_of_groups(
    ids: ChannelIds, inputs: Ids, weight: State, groups: int, transposed: bool, count: int
) -> Ids:
    """The output channels, after the ties between the weight and the input channels.

    In a grouped convolution every channel is one of its group; all groups keep the same size. On
    the side where the weight has a position for each channel, groups may keep other places; on the
    other side, a position of the weight is the same place of all groups.
    """
    into, out = (0, 1) if transposed else (1, 0)
    if groups == 1:
        ids.tie(inputs, weight.axes[into])
        return weight.axes[out]
    whole = weight.axes[0]  # one position for each channel, over all groups
    each = weight.axes[1]  # one for each channel of a group
    group = ids.new(groups)
    many = len(whole) > groups
    places = [ids.new(len(whole) // groups) if many else np.array([FIXED]) for _ in range(groups)]
    by_group = [
        ids.joined((g, p))
        for g, own in zip(group.tolist(), places, strict=True)
        for p in own.tolist()
    ]
    ids.tie(whole, np.array(by_group, dtype=np.int64))
    if many:
        ids.keep_as_many(places)
    others = each.tolist() if len(each) > 1 else [FIXED]
    grouped = np.array([ids.joined((g, p)) for g in group.tolist() for p in others], dtype=np.int64)
    ids.tie(inputs, whole if transposed else grouped)
    return grouped if transposed else whole


def _by_channel(weight: State, groups: int, transposed: bool) -> State:
    """The weight (outputs, inputs), summed over the kernel, with all groups written out."""
    nonzero, value = weight.nonzero().flatten(2).any(2), weight.value.flatten(2).sum(2)
    if transposed and groups == 1:
        nonzero, value = nonzero.T, value.T
    elif groups > 1:
        blocks = [
            torch.block_diag(*(b.T if transposed else b for b in t.to(value.dtype).chunk(groups)))
            for t in (nonzero, value)
        ]
        nonzero, value = blocks[0] > 0.5, blocks[1]
    # a kernel whose weights add up to 0 is still read
    return State(value, nonzero & (value == 0), fixed(value.shape))


def reduced_sum(ids: ChannelIds, call: Call, reads: Reads) -> State:
    """The state of a sum or a mean over axes; an entry that is 0 adds nothing."""
    x, value = call.states[0], call.values()
    dims = call.argument("dim")
    axes = (
        range(x.value.ndim)
        if dims in (None, [])
        else ([dims] if isinstance(dims, int) else list(dims))
    )
    gone = {d % x.value.ndim for d in axes} if x.value.ndim else set()
    keepdim = bool(call.argument("keepdim", False))
    rest: Axes = tuple(
        fixed((1,))[0] if k in gone else axis
        for k, axis in enumerate(x.axes)
        if k not in gone or keepdim
    )
    nonzero = x.nonzero()
    for k in sorted(gone):
        if not ids.prunable(x.axes[k]):
            continue
        columns = [j for j in range(x.value.ndim) if j not in gone and ids.prunable(x.axes[j])]
        tables = [(array(_any_but(nonzero, (k, j))), x.axes[j]) for j in columns[:1]]
        tables = tables or [(array(_any_but(nonzero, (k,)))[:, None], np.array([FIXED]))]
        none = np.zeros(x.shape[k], dtype=bool)
        reads.append(Read(call.node, call.layer, x.axes[k], tables, none))
    unknown = x.unknown
    for k in sorted(gone):
        unknown = unknown.any(k, keepdim=True)
    if call.name == "sum" and any(is_open_axis(call, k) for k in gone):
        unknown = unknown | (value != 0).reshape(unknown.shape)
    return state_of(value, unknown.reshape(value.shape), rest)


def _any_but(flags: Tensor, kept: tuple[int, ...]) -> Tensor:
    others = [k for k in range(flags.ndim) if k not in kept]
    found = flags.any(dim=others) if others else flags
    return found.T if len(kept) == 2 and kept[0] > kept[1] else found


def is_open_axis(call: Call, axis: int) -> bool:
    """Whether the size of this axis of the first argument follows the sizes of the data."""
    first = call.node.args[0]
    sizes = dynamic_axes(first.meta.get("val")) if isinstance(first, fx.Node) else ()
    return axis < len(sizes) and sizes[axis]
