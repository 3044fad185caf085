"""What each layer with weights has before and after: sizes, parameters and FLOPs.

Owns `layer_table`. Next: `unread_inputs.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.states import State, operation

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = [
    "layer", "type", "before", "after", "parameters before", "parameters after", "FLOPs before",
    "FLOPs after",
]  # fmt: skip


def layer_table(
    analysis: Analysis, cut: CutGraph, net: nn.Module
) -> tuple[pd.DataFrame, tuple[int, int]]:
    """One row for each layer with weights, see `ShrinkPlan`; and all FLOPs, before and after."""
    import pandas as pd

    left = {str(n.target) for n in cut.graph.nodes if n.op == "get_attr"}
    layers: dict[str, list[fx.Node]] = {}
    for node, (name, tensor) in analysis.graph.tensors.items():
        if isinstance(tensor, nn.Parameter):
            layers.setdefault(name.rpartition(".")[0], []).append(node)
    counted = {node: _flops(analysis, node) for node in analysis.states if _weight(analysis, node)}
    live = {old for old, new in cut.new.items() if new in set(cut.graph.nodes)}
    rows = [
        _row(analysis, cut, net, layer, nodes, left, counted, live)
        for layer, nodes in layers.items()
    ]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return table, (int(table["FLOPs before"].sum()), int(table["FLOPs after"].sum()))


def _weight(analysis: Analysis, node: fx.Node) -> str:
    """The layer whose weight is multiplied at a node; empty if none is."""
    name = operation(node)
    if node.op != "call_function" or not (name in _PRODUCTS or "conv" in name):
        return ""
    held = [n for n in node.all_input_nodes if n in analysis.graph.tensors]
    weights = [n for n in held if n.meta["val"].ndim > 1]
    return analysis.graph.tensors[weights[0]][0].rpartition(".")[0] or "." if weights else ""


_PRODUCTS = ("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "bilinear")


def _flops(analysis: Analysis, node: fx.Node) -> tuple[int, int]:
    """FLOPs for one row of the input, before and after. The analysis ran on two rows."""
    weight = next(
        n for n in node.all_input_nodes if n in analysis.graph.tensors and n.meta["val"].ndim > 1
    )
    state, result = analysis.states[weight], analysis.states[node]
    first = analysis.states[node.all_input_nodes[0]]
    if not isinstance(result, State) or not isinstance(first, State):
        return 0, 0
    transposed = "transpose" in operation(node)
    counted = first if transposed else result
    channel = -1 if "conv" not in operation(node) else 1
    places = counted.value.numel() // max(counted.shape[channel], 1) // 2
    before = 2 * state.value.numel() * places
    after = 2 * math.prod(int(k.sum()) for k in analysis.kept_on(state)) * places
    return before, after


def _row(
    analysis: Analysis, cut: CutGraph, net: nn.Module, layer: str, nodes: list[fx.Node],
    left: set[str], counted: dict[fx.Node, tuple[int, int]], live: set[fx.Node],
) -> tuple[Any, ...]:  # fmt: skip
    names = [analysis.graph.tensors[n][0] for n in nodes]
    weights = [n for n in nodes if analysis.graph.tensors[n][0].endswith("weight")]
    main = max(weights or nodes, key=lambda n: n.meta["val"].ndim)
    before = list(analysis.graph.tensors[main][1].shape)
    name = analysis.graph.tensors[main][0]
    after = list(cut.tensors[name].shape) if name in left else [0] * len(before)
    own = f"{layer}.bias" if layer else "bias"
    added = [own] if own in cut.biases and own not in names else []
    parameters = [
        sum(analysis.graph.tensors[n][1].numel() for n in nodes),
        sum(cut.tensors[n].numel() for n in [*names, *added] if n in left),
    ]
    uses = [n for n in counted if _weight(analysis, n) == (layer or ".")]
    flops = sum(counted[n][0] for n in uses), sum(counted[n][1] for n in uses if n in live)
    shapes = ("×".join(map(str, shape)) for shape in (before, after))
    return (layer, type(net.get_submodule(layer)).__name__, *shapes, *parameters, *flops)
