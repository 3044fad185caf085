"""What each layer with weights has before and after: sizes, parameters and FLOPs.

Owns `layer_table`. Next: `unread_inputs.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from pyro_bmr.shrinking.channels import Channels
from pyro_bmr.shrinking.resized_layers import weight_shape
from pyro_bmr.shrinking.states import State

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = [
    "layer", "type", "before", "after", "parameters before", "parameters after", "FLOPs before",
    "FLOPs after",
]  # fmt: skip


def layer_table(channels: Channels) -> pd.DataFrame:
    """One row for each layer with weights; see `ShrinkPlan`."""
    import pandas as pd

    uses: dict[str, list[fx.Node]] = {}
    for node in channels.graph.graph.nodes:
        if isinstance(getattr(channels.layer(node), "weight", None), Tensor):
            uses.setdefault(str(node.target), []).append(node)
    rows = [_row(channels, name, nodes) for name, nodes in uses.items()]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _row(channels: Channels, name: str, nodes: list[fx.Node]) -> tuple[Any, ...]:
    """The row of a layer, which is used at each of `nodes`."""
    layer = channels.modules[name]
    weight: Any = layer.weight
    kept = [n for n in nodes if isinstance(channels.states[n], State) and channels.depends(n)]
    before = list(weight.shape)
    after = weight_shape(channels, layer, kept[0]) if kept else [0] * len(before)
    shapes = ("×".join(map(str, shape)) for shape in (before, after))
    counts = (_parameters(layer, shape) for shape in (before, after))
    flops = _flops(channels, layer, nodes, before), _flops(channels, layer, kept, after)
    return (name, type(layer).__name__, *shapes, *counts, *flops)


def _parameters(layer: nn.Module, shape: list[int]) -> int:
    """The number of parameters of `layer` with a weight of this shape."""
    if not math.prod(shape):
        return 0
    others = [p for name, p in layer.named_parameters() if name != "weight"]
    return math.prod(shape) + sum(math.prod([shape[0], *p.shape[1:]]) for p in others)


def _flops(channels: Channels, layer: Any, nodes: list[fx.Node], shape: list[int]) -> int:
    """FLOPs for one row of the input, over all uses of `layer`; 0 for a norm or an embedding."""
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return 0
    # The analysis ran on two rows.
    positions = sum(channels.values[n].numel() // 2 // layer.weight.shape[0] for n in nodes)
    return 2 * math.prod(shape) * positions
