"""Which entries of the input the smaller network does not read.

Owns `unread_inputs`. Next: `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.shrinking.channels import Channels
from pyro_bmr.shrinking.reshapes import RESHAPES
from pyro_bmr.shrinking.ties import Read

_MOVING_LAYERS = (nn.Flatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.Identity, nn.Dropout)


def unread_inputs(channels: Channels) -> Tensor:
    """Flat indices, within one row of the input, that no kept channel reads.

    The positions of the input, counted from 1, are followed through the operations that only move
    them; 0 stands for what pads add.
    """
    nodes = channels.graph.graph.nodes
    source = next(n for n in nodes if n.op == "placeholder")
    shape = channels.values[source].shape[1:]
    size = shape.numel()
    is_read = torch.zeros(size + 1, dtype=torch.bool)  # by position − 1; the last for pads
    reads = {r.node: r for r in channels.reads}
    positions = {source: torch.arange(1, size + 1, dtype=torch.float64).view(1, *shape)}
    for node in nodes:
        held = [n for n in node.all_input_nodes if n in positions]
        if not held or node.op == "placeholder":
            continue
        moved = _moved(channels, node, held[0], positions)
        if moved is not None:
            positions[node] = moved
        else:
            read = _read_positions(channels, node, positions[held[0]], reads.get(node))
            is_read[read.flatten().long() - 1] = True
    return (~is_read[:size]).nonzero().flatten()


def _moved(
    channels: Channels, node: fx.Node, source: fx.Node, positions: Mapping[fx.Node, Tensor]
) -> Tensor | None:
    """The positions at `node`, if it only moves those at `source`; else None."""
    layer = channels.layer(node)
    if isinstance(layer, _MOVING_LAYERS):
        moved: Tensor = layer(positions[source])
        return moved
    with_sizes = ("view", "reshape", torch.reshape)
    if node.target not in RESHAPES or node.target in with_sizes or len(node.all_input_nodes) != 1:
        return None
    first, *others = (positions[source] if a is source else a for a in node.args)
    target: Any = node.target
    if callable(target):
        return target(first, *others, **node.kwargs)
    return getattr(first, target)(*others, **node.kwargs)


def _read_positions(
    channels: Channels, node: fx.Node, positions: Tensor, read: Read | None
) -> Tensor:
    """The positions that `node` reads: those of the channels that its kept outputs need."""
    if read is not None:
        nonzero = read.nonzero[channels.kept(read.outputs)].any(0)
        axis = -1 if isinstance(channels.layer(node), nn.Linear) else 1
        return positions.movedim(axis, 0)[torch.from_numpy(nonzero & ~read.foldable)]
    is_tensor = isinstance(channels.values[node], Tensor)
    return positions if is_tensor and channels.depends(node) else positions[:0]
