"""The user's own module with smaller tensors.

Parameters and buffers are cut, numbers of torch's layers follow their tensors, and a number of a
user's module follows if it is a size that the forward uses, such as the number of heads. Whether it
then computes the same is for the caller to check. Owns `own_class`. Next: `layer_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from pyro_bmr.errors import PyroBMRError
from pyro_bmr.networks.plain_module import module_copy
from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.resized import kept_groups, resize_layer
from pyro_bmr.shrinking.states import State, layer_of, operation
from pyro_bmr.shrinking.untied import Groups, tied_again, untied

_SIZED = ("view", "reshape", "_unsafe_view", "expand", "unflatten", "split_with_sizes", "split")


def own_class(
    net: nn.Module, analysis: Analysis, cut: CutGraph, groups: Groups
) -> tuple[nn.Module | None, str]:
    """A copy of `net` with the tensors of the smaller graph, and why there is none."""
    if not cut.plain:
        return None, "a part of the network has become a constant, or is added to"
    left = {
        str(n.target): cut.tensors[str(n.target)] for n in cut.graph.nodes if n.op == "get_attr"
    }
    if any(t.numel() == 0 for t in left.values()):
        return None, "a layer has no units left"
    try:
        small, _ = untied(module_copy(net))
    except PyroBMRError as error:
        return None, str(error)
    if small is net:
        small = module_copy(net)
    _fill(small, left)
    _without_unused(small, left)
    _resize(small, analysis)
    return tied_again(small.eval(), groups), ""


def _fill(net: nn.Module, left: Mapping[str, Tensor]) -> None:
    """Puts the cut tensors in the place of the old ones."""
    for name, tensor in left.items():
        path, _, own = name.rpartition(".")
        try:
            owner = net.get_submodule(path)
        except AttributeError:
            continue  # a constant of the forward
        if own in owner._parameters or isinstance(tensor, nn.Parameter):
            value = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            owner._parameters[own] = value
        elif own in owner._buffers:
            owner._buffers[own] = tensor.detach().clone()


def _without_unused(net: nn.Module, left: Mapping[str, Tensor]) -> None:
    """Removes the parameters that the smaller network does not use, with layers that have no
    others.
    """
    for name, _ in list(net.named_parameters(remove_duplicate=False)):
        if name not in left:
            path, _, own = name.rpartition(".")
            net.get_submodule(path)._parameters[own] = None
    for path, module in list(net.named_modules()):
        had = any(value is None for value in module._parameters.values())
        if path and had and not list(module.parameters()):
            parent, _, last = path.rpartition(".")
            if not isinstance(net.get_submodule(parent), nn.Sequential):
                net.get_submodule(parent)._modules[last] = nn.Identity()


def _resize(net: nn.Module, analysis: Analysis) -> None:
    groups = {
        layer_of(n): kept_groups(analysis, n) for n in analysis.states if n.op == "call_function"
    }
    for path, module in net.named_modules():
        resize_layer(module, groups.get(path))
    for path, numbers in _numbers(analysis).items():
        try:
            module = net.get_submodule(path)
        except AttributeError:
            continue
        if type(module).__module__.startswith("torch.nn.modules"):
            continue
        for key, value in list(vars(module).items()):
            if type(value) is int and value in numbers:
                setattr(module, key, numbers[value])


def _numbers(analysis: Analysis) -> dict[str, dict[int, int]]:
    """Path of a module → size in its forward → that size now; those with one meaning only."""
    found: dict[str, dict[int, set[int]]] = {}
    for node, state in analysis.states.items():
        if node.op != "call_function" or operation(node) not in _SIZED:
            continue
        here = found.setdefault(layer_of(node), {})
        states = state if isinstance(state, tuple) else (state,)
        for part in states:
            if not isinstance(part, State):
                continue
            for n, kept in zip(part.shape, analysis.kept_on(part), strict=True):
                here.setdefault(n, set()).add(int(kept.sum()))
        _heads(analysis, node, states, here)
    return {
        path: {old: next(iter(new)) for old, new in sizes.items() if len(new) == 1 and {old} != new}
        for path, sizes in found.items()
    }


def _heads(analysis: Analysis, node: fx.Node, states: Any, here: dict[int, set[int]]) -> None:
    """Enters products of sizes that are merged, such as all heads together."""
    first = node.args[0] if node.args else None
    source = analysis.states[first] if isinstance(first, fx.Node) else None
    if isinstance(source, State):
        for n, kept in zip(source.shape, analysis.kept_on(source), strict=True):
            here.setdefault(n, set()).add(int(kept.sum()))
