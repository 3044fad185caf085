"""Which operation of the smaller graph is the first that is not the one of the whole graph.

Owns `first_difference`. Next: `own_class.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from pyro_bmr.data.inputs import Inputs, call_arguments
from pyro_bmr.isolation import seed_generator
from pyro_bmr.shrinking.analysis import Analysis, cut
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.exported_graph import ExportedGraph
from pyro_bmr.shrinking.states import State
from pyro_bmr.shrinking.verification import difference, in_double

_RELATIVE = 1e-4  # an operation that is cut wrongly is wrong by more than rounding


@torch.no_grad()
def first_difference(
    net: nn.Module, analysis: Analysis, small: CutGraph, inputs: Sequence[Inputs], double: bool
) -> fx.Node | None:
    """The first node of the whole graph whose kept entries the smaller graph does not give, or at
    which it does not run; None if there is none.
    """
    for x in inputs:
        found = _difference_on(net, analysis, small, x, double)
        if found is not None:
            return found
    return None


def _difference_on(
    net: nn.Module, analysis: Analysis, small: CutGraph, x: Inputs, double: bool
) -> fx.Node | None:
    given, named = call_arguments(net, x)
    values = dict(zip(analysis.graph.arguments, (*given, *named.values()), strict=True))
    values = tree_map(lambda t: _number(t, double), values)
    graph = analysis.graph
    whole, _ = _run(graph.graph, lambda n: _whole_value(graph, n, values, double), double)
    cut_values, stopped = _run(small.graph, lambda n: _cut_value(small, n, values, double), double)
    for old, new in small.new.items():
        if new is stopped:
            return old
        state = analysis.states[old]
        compared = old.op == "call_function" and new in cut_values and old in whole
        if not compared or not isinstance(state, State):
            continue
        if not _same(cut(whole[old], analysis.kept_on(state)), cut_values[new]):
            return old
    return None if stopped is None else _next_old(small, stopped)


def _number(t: Any, double: bool) -> Any:
    if isinstance(t, Tensor) and t.is_floating_point() and double:
        return t.double()
    return t


def _whole_value(graph: ExportedGraph, node: fx.Node, values: Any, double: bool) -> Any:
    if node in graph.tensors:
        return _number(graph.tensors[node][1].detach(), double)
    argument, keys = graph.inputs[node]
    here = values[argument]
    for key in keys:
        here = here[key]
    return here


def _cut_value(small: CutGraph, node: fx.Node, values: Any, double: bool) -> Any:
    if node.op == "get_attr":
        return _number(small.tensors[str(node.target)].detach(), double)
    return values[str(node.target)]


def _run(
    graph: fx.Graph, given: Callable[[fx.Node], Any], double: bool
) -> tuple[dict[fx.Node, Any], fx.Node | None]:
    """The value of each node, and the node at which the run stopped; None if it did not."""
    seen: dict[fx.Node, Any] = {}
    with torch.random.fork_rng(devices=[]):
        seed_generator(torch.device("cpu"), 0)
        for node in graph.nodes:
            if node.op == "output":
                break
            try:
                if node.op == "call_function":
                    args = fx.node.map_arg(node.args, lambda n: seen[n])
                    kwargs = fx.node.map_arg(node.kwargs, lambda n: seen[n])
                    if double:
                        args, kwargs = in_double(args), in_double(kwargs)
                    seen[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                else:
                    seen[node] = given(node)
            # An operation may raise anything for sizes that do not fit.
            except Exception:
                return seen, node
    return seen, None


def _same(want: Any, got: Any) -> bool:
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return True
    if want.dtype == torch.bool:
        return torch.equal(want, got)
    error, size = difference([want], [got])
    return error <= _RELATIVE * max(size, _RELATIVE)


def _next_old(small: CutGraph, stopped: fx.Node) -> fx.Node | None:
    """The old node of which `stopped`, or what comes after it, is the new one."""
    order = {node: k for k, node in enumerate(small.graph.nodes)}
    after = [
        (order[new], old)
        for old, new in small.new.items()
        if new in order and (order[new] >= order[stopped])
    ]
    return min(after, key=lambda pair: pair[0])[1] if after else None
