"""Which entries of the input the smaller network does not read.

Owns `unread_inputs`. Next: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.movement import MOVES, SPLIT_OPERATIONS
from pyro_bmr.shrinking.states import State, operation

_SAME = {"dropout", "clone", "alias", "detach", "contiguous"}


def unread_inputs(analysis: Analysis) -> Tensor:
    """Flat indices, within one row of the inputs, that no kept channel reads.

    The positions of the inputs, counted from 1, are followed through the operations that only move
    them; 0 stands for what pads add.
    """
    positions: dict[fx.Node, Tensor] = {}
    size = 0
    for node in analysis.graph.inputs:
        shape = analysis.states[node].shape
        count = torch.Size(shape[1:]).numel()
        numbers = torch.arange(size + 1, size + count + 1, dtype=torch.float64)
        positions[node] = numbers.view(1, *shape[1:]).expand(shape)
        size += count
    is_read = torch.zeros(size + 1, dtype=torch.bool)  # by position − 1; the last for pads
    for node in analysis.graph.graph.nodes:
        held = [n for n in node.all_input_nodes if n in positions]
        if not held or node.op == "placeholder":
            continue
        moved = _moved(analysis, node, positions)
        if isinstance(moved, Tensor):
            positions[node] = moved
            continue
        for source in held:
            read = _read_positions(analysis, node, source, positions[source])
            is_read[read.flatten().long() - 1] = True
    return (~is_read[:size]).nonzero().flatten()


def _moved(analysis: Analysis, node: fx.Node, positions: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """The positions at `node`, if it only moves those of one tensor; else None."""
    name = operation(node)
    pads = name == "constant_pad_nd" or (name == "pad" and len(node.args) < 3)
    if not (name in MOVES - SPLIT_OPERATIONS or name in _SAME or pads):
        return None
    if sum(isinstance(analysis.states[n], State) for n in node.all_input_nodes) != 1:
        return None

    def value(part: object) -> object:
        if isinstance(part, fx.Node):
            return positions[part] if part in positions else analysis.states[part]
        return part

    args, kwargs = tree_map(value, (node.args, node.kwargs))
    if pads:
        args, kwargs = (args[0], args[1]), {}
    moved: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return moved


def _read_positions(
    analysis: Analysis, node: fx.Node, source: fx.Node, positions: Tensor
) -> Tensor:
    """The positions that `node` reads: those of the channels that its kept outputs need."""
    state = analysis.states[source]
    for read in analysis.reads:
        if read.node is not node or node.all_input_nodes[0] is not source:
            continue
        axis = next((k for k, ids in enumerate(state.axes) if ids is read.inputs), None)
        if axis is not None:
            needed = torch.from_numpy(read.needed(analysis.kept))
            return positions.movedim(axis, 0)[needed]
    if node.op == "output" or operation(node).startswith(("sym_", "_assert")):
        return positions if node.op == "output" else positions[:0]
    result = analysis.states[node]
    unread = isinstance(result, State) and analysis.is_known(node)
    return positions[:0] if unread else positions
