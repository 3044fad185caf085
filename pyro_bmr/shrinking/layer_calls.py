"""The layers of torch in a smaller graph: calls of modules in the place of calls with tensors.

A graph whose linear layers are `nn.Linear` can be read, hooked and pruned further like any network.
Owns `with_layers`. Next: `own_class.py`.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pyro_bmr.networks.plain_module import module_copy
from pyro_bmr.shrinking.analysis import Analysis, is_random
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.resized import kept_groups, resize_layer
from pyro_bmr.shrinking.states import layer_of, operation

_LAYERS: dict[str, tuple[type[nn.Module], int]] = {  # the module, and where its input is
    "linear": (nn.Linear, 0),
    "batch_norm": (_BatchNorm, 0),
    "layer_norm": (nn.LayerNorm, 0),
    "rms_norm": (nn.RMSNorm, 0),
    "group_norm": (nn.GroupNorm, 0),
    "embedding": (nn.Embedding, 1),
    "prelu": (nn.PReLU, 0),
}

_RECURRENT: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU}


def with_layers(net: nn.Module, analysis: Analysis, cut: CutGraph) -> dict[str, nn.Module]:
    """Changes the smaller graph to call layers of torch, and returns them by their paths.

    A layer is called where all that its module does is the one operation, with its own tensors.
    """
    old = {new: node for node, new in cut.new.items()}
    modules = dict(net.named_modules())
    made: dict[str, nn.Module] = {}
    for node in list(cut.graph.nodes):
        source = old.get(node)
        if node.op != "call_function" or source is None or source.op != "call_function":
            continue
        path = layer_of(source)
        layer = modules.get(path)
        if operation(node) in _RECURRENT and isinstance(layer, _RECURRENT[operation(node)]):
            _call_recurrent(cut, node, source, path, layer, made)
            continue
        kind = _kind(operation(node))
        if kind is None or layer is None or not path or not _is_plain(layer, kind[0]):
            continue
        tensors = [n for n in node.all_input_nodes if n.op == "get_attr"]
        names = {str(n.target) for n in tensors}
        own = {f"{path}.{name}" for name in (*layer._parameters, *layer._buffers)}
        x = node.args[kind[1]]
        if not names or not names <= own or not isinstance(x, fx.Node) or x in tensors:
            continue
        if path not in made:
            made[path] = _cut_layer(layer, path, cut, kept_groups(analysis, source))
        with cut.graph.inserting_before(node):
            call = cut.graph.call_module(path, (x,))
        node.replace_all_uses_with(call)
        cut.graph.erase_node(node)
        cut.new[source] = call
    cut.graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or (n.op == "call_function" and is_random(n))
    )
    return made


def _call_recurrent(
    cut: CutGraph, node: fx.Node, source: fx.Node, path: str, layer: nn.Module,
    made: dict[str, nn.Module],
) -> None:  # fmt: skip
    """A call of the LSTM or GRU at `path`, if it starts from the state that is 0."""
    old_x, states = source.args[0], source.args[1]
    states = states if isinstance(states, (tuple, list)) else [states]
    zeros = all(
        isinstance(s, fx.Node) and operation(s) == "zeros" and layer_of(s) == path for s in states
    )
    packed = not isinstance(old_x, fx.Node) or layer_of(old_x) == path
    if not zeros or packed or not _is_plain(layer, type(layer)):
        return
    made.setdefault(path, _cut_layer(layer, path, cut, None))
    with cut.graph.inserting_before(node):
        call = cut.graph.call_module(path, (node.args[0],))
        last = cut.graph.call_function(operator.getitem, (call, 1))
    for user in list(node.users):
        number = user.args[1]
        with cut.graph.inserting_before(user):
            whole = number == 0 or isinstance(layer, nn.GRU)
            args = (call, number) if whole else (last, int(str(number)) - 1)
            part = cut.graph.call_function(operator.getitem, args)
        user.replace_all_uses_with(part)
        cut.graph.erase_node(user)
    cut.graph.erase_node(node)


def _kind(name: str) -> tuple[type[nn.Module], int] | None:
    return (_ConvNd, 0) if name.startswith("conv") else _LAYERS.get(name)


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is a layer of torch itself, without hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    known = isinstance(layer, kind) and type(layer).__module__.startswith("torch.nn.modules")
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    return known and zeros and not any(hooks)


def _cut_layer(layer: nn.Module, path: str, cut: CutGraph, groups: int | None) -> nn.Module:
    small: Any = module_copy(layer)
    for held in (small._parameters, small._buffers):
        for own in list(held):
            value = cut.tensors.get(f"{path}.{own}")
            if isinstance(value, Tensor):
                held[own] = value
    resize_layer(small, groups)
    return small  # type: ignore[no-any-return]
