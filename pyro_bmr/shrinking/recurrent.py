"""Recurrent layers: which of their units are always 0, and what reads the others.

A unit starts at 0. It stays there if nothing reaches its candidate, the row n of a GRU and g of an
LSTM: h = z h + (1 − z) tanh(0) = 0, and c = f c + i tanh(0) = 0. The rows of its other gates do not
matter then. Owns `recurrent` and `one_state`. Next: `rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.shrinking.channel_ids import ChannelIds, Ids
from pyro_bmr.shrinking.contractions import Read, Reads, array
from pyro_bmr.shrinking.states import Call, State, fixed

GATES = {"lstm": (4, 2), "gru": (3, 2), "rnn_tanh": (1, 0), "rnn_relu": (1, 0)}
"""Operation → how many gates a unit has, and which of them is its candidate."""


@dataclass(frozen=True)
class _Cell:
    """One direction of one layer. `units`: their channels; `live`: which may differ from 0."""

    weights: list[State]
    units: Ids
    live: Tensor


def recurrent(ids: ChannelIds, call: Call, reads: Reads) -> Any:
    """The states of what a recurrent layer returns; None if it is of another form: with packed
    sequences, projected outputs or dropout.

    All layers and directions keep the same number of units, not the same ones.
    """
    gates, _ = GATES[call.name]
    weights, starts = call.argument("params"), call.argument("hx")
    directions = 2 if call.argument("bidirectional") else 1
    each = len(weights or []) // (directions * int(call.argument("num_layers") or 1))
    projected = each != (4 if call.argument("has_biases") else 2)
    if call.node.target._overloadname != "input" or projected or call.argument("train"):  # type: ignore[union-attr]
        return None
    x = call.args[0]
    starts = [starts] if isinstance(starts, State) else list(starts)
    for axis in x.axes[:-1]:
        ids.fix(axis, "rows and steps of a sequence")
    cells: list[_Cell] = []
    inputs, live = x.axes[-1], x.nonzero().flatten(0, -2).any(0)
    for first in range(0, len(weights), each * directions):
        layer = [
            _cell(call, weights[k : k + each], live, starts, len(cells) + direction, ids)
            for direction, k in enumerate(range(first, first + each * directions, each))
        ]
        _read(ids, call, reads, inputs, live, layer, gates)
        cells += layer
        inputs, live = np.concatenate([c.units for c in layer]), torch.cat([c.live for c in layer])
    _tie_starts(ids, starts, cells)
    # units that are 0 first: to keep those keeps no others
    ids.keep_as_many([cell.units[cell.live.argsort(stable=True).numpy()] for cell in cells])
    y, *last = call.values()
    unknown = live.expand(y.shape)
    outputs = State(torch.zeros_like(y), unknown, (*fixed(y.shape[:-1]), inputs))
    return (outputs, *(_last(value, cells) for value in last))


def _cell(
    call: Call, weights: list[State], reached: Tensor, starts: list[State], place: int,
    ids: ChannelIds,
) -> _Cell:  # fmt: skip
    """A cell with channels of its own, whose inputs may differ from 0 where `reached` says so."""
    gates, candidate = GATES[call.name]
    into, across, *biases = weights
    count = into.shape[0] // gates
    units = ids.new(count)
    for weight in weights:
        ids.tie(weight.axes[0], np.tile(units, gates))
    ids.tie(across.axes[1], units)
    rows = slice(candidate * count, (candidate + 1) * count)
    live = (into.nonzero()[rows] & reached).any(1)
    for bias in biases:
        live = live | bias.nonzero()[rows]
    for start in starts:
        live = live | start.nonzero()[place].any(0)
    for _ in range(count):
        live = live | (across.nonzero()[rows] & live).any(1)
    return _Cell(weights, units, live)


def _read(
    ids: ChannelIds, call: Call, reads: Reads, inputs: Ids, live: Tensor, layer: list[_Cell],
    gates: int,
) -> None:  # fmt: skip
    """Enters what the cells of a layer read of its inputs, and of their own units."""
    tables = []
    for cell in layer:
        into, across = cell.weights[:2]
        ids.tie(inputs, into.axes[1])
        tables.append(_by_unit(into, gates))
        own = [(_by_unit(across, gates), cell.units)]
        reads.append(Read(call.node, call.layer, cell.units, own, array(~cell.live)))
    outputs = np.concatenate([cell.units for cell in layer])
    both = [(np.concatenate(tables, 1), outputs)]
    reads.append(Read(call.node, call.layer, inputs, both, array(~live)))


def _by_unit(weight: State, gates: int) -> Any:
    """(columns, units) of a weight, whether any gate of the unit reads the column."""
    return array(weight.nonzero().unflatten(0, (gates, -1)).any(0).T)


def _tie_starts(ids: ChannelIds, starts: Iterable[State], cells: list[_Cell]) -> None:
    """Ties the channels of the initial states to the units; zeros have the size of any of them."""
    for start in starts:
        for axis in start.axes[:-1]:
            ids.fix(axis, "layers and rows of a state")
        ids.tie(start.axes[-1], cells[0].units)
        if bool(start.nonzero().any()):
            for cell in cells[1:]:
                ids.tie(start.axes[-1], cell.units)


def _last(value: Tensor, cells: list[_Cell]) -> State:
    """The last states of all cells, one after the other along the first axis."""
    unknown = torch.stack([cell.live for cell in cells]).unsqueeze(1).expand(value.shape)
    axes = (*fixed(value.shape[:-1]), cells[0].units)
    if len(cells) == 1:
        return State(torch.zeros_like(value), unknown, axes)
    parts = tuple(cell.units for cell in cells)
    return State(torch.zeros_like(value), unknown, axes, parts=parts)


def one_state(ids: ChannelIds, call: Call) -> Any:
    """The state of one cell, if the operation takes it out of the last states of several; else
    None. Other operations make the units of the cells the same ones.
    """
    x, dim = call.args[0] if call.args else None, call.argument("dim")
    if call.name == "select" and isinstance(x, State) and x.parts and dim == 0:
        cell = int(call.argument("index")) % len(x.parts)
        value = call.values()
        return State(value, x.unknown[cell], (*x.axes[1:-1], x.parts[cell]))
    for state in call.states:
        merge_parts(ids, state)
    return None


def merge_parts(ids: ChannelIds, state: State) -> None:
    """Ties the channels that a state has at different places of its first axis."""
    for part in state.parts:
        ids.tie(part, state.axes[-1])
