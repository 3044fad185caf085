"""The smaller graph: its operations, its cut tensors, and the constants that are added.

Owns `CutGraph`. Next: `own_class.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from pyro_bmr.shrinking.analysis import Analysis, cut, is_random
from pyro_bmr.shrinking.arguments import ATEN, Sizes, adapted
from pyro_bmr.shrinking.contractions import Read
from pyro_bmr.shrinking.graph_names import beside, names_of_graphs
from pyro_bmr.shrinking.states import State, dynamic_axes, is_open, operation


class CutGraph:
    """A graph for the kept channels.

    `new`: node of the old graph → node of this one. `tensors`: name → parameter or buffer.
    `biases`: the names of parameters that the old network did not have, where a layer has got a
    bias. `plain`: whether nothing but sizes differs from the old graph, apart from those.
    `failed`: the node whose operation could not be written, if one could not.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis, self.graph = analysis, fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.tensors: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.plain = True
        self.failed: fx.Node | None = None
        self._sizes = Sizes(analysis, self.graph, self.new)
        self._reads: dict[fx.Node, list[Read]] = {}
        self._symbols: dict[str, tuple[fx.Node, int]] = {}
        for read in analysis.reads:
            self._reads.setdefault(read.node, []).append(read)
        self._inputs()
        self._parameters()
        for node in analysis.graph.graph.nodes:
            if node.op in ("call_function", "output"):
                try:
                    self._add(node)
                except (ValueError, IndexError, TypeError, ZeroDivisionError):
                    self.failed = node
                    return
        random = {
            new for old, new in self.new.items() if old.op == "call_function" and is_random(old)
        }
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n in random)
        self.graph.lint()

    def module(self, name: str, layers: Mapping[str, nn.Module] | None = None) -> fx.GraphModule:
        """The graph as a module of this class name, with the names of the original tensors.

        `layers`: path → a layer that the graph calls.
        """
        root, taken = nn.Module(), names_of_graphs()
        named = [node for node in self.graph.nodes if node.op in ("get_attr", "call_module")]
        present = {str(node.target).partition(".")[0] for node in named}
        for node in named:
            old = str(node.target)
            node.target = beside(old, taken, present)
            if node.op == "get_attr":
                _put(root, node.target, self.tensors.setdefault(node.target, self.tensors[old]))
            elif layers:
                _owner(root, node.target).add_module(node.target.split(".")[-1], layers[old])
        return fx.GraphModule(root, self.graph, name).eval()

    def _inputs(self) -> None:
        """The arguments of the forward, and the tensors in them."""
        graph = self.analysis.graph
        made: dict[str, fx.Node] = {}
        for argument in graph.arguments:
            made[argument] = self.graph.placeholder(argument)
        for node, (argument, keys) in graph.inputs.items():
            here = made[argument]
            for key in keys:
                here = self.graph.call_function(operator.getitem, (here, key))
            self.new[node] = here
            for axis, size in enumerate(node.meta["val"].shape):
                if is_open(size):
                    self._symbols.setdefault(str(size.node.expr), (node, axis))

    def _parameters(self) -> None:
        """The cut tensors, with what constants add to the biases."""
        for node, (name, tensor) in self.analysis.graph.tensors.items():
            kept = self.analysis.kept_on(self.analysis.states[node])
            self.tensors[name] = _like(tensor, cut(tensor.detach(), kept).clone())
            self.new[node] = self.graph.get_attr(name)
        for reads in self._reads.values():
            for read in reads:
                self._fold_into_bias(read)

    def _bias_of(self, node: fx.Node) -> fx.Node | None:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return bias if isinstance(bias, fx.Node) else None

    def _removed(self, read: Read) -> Tensor | None:
        """What the removed constants of a read add to its outputs; None if that is nothing."""
        removed = ~self.analysis.kept(read.inputs) & read.foldable
        if not removed.any() or read.effect is None:
            return None
        added = read.effect(torch.from_numpy(removed))
        return added if bool((added != 0).any()) else None

    def _fold_into_bias(self, read: Read) -> None:
        if not read.shared:
            return
        bias = self._bias_of(read.node)
        if bias is None or bias not in self.analysis.graph.tensors:
            return
        name, tensor = self.analysis.graph.tensors[bias]
        added = self._removed(read)
        if added is None or f"{name} folded" in self.biases:
            return
        kept = self.analysis.kept_on(self.analysis.states[bias])
        number = tensor.detach().to(added.dtype) + added
        self.tensors[name] = _like(tensor, cut(number, kept).to(tensor.dtype).clone())
        self.biases[f"{name} folded"] = self.tensors[name]

    def _add(self, node: fx.Node) -> None:
        if node.op == "output":
            leaves = [self.new[n] if isinstance(n, fx.Node) else n for n in node.args[0]]  # type: ignore[union-attr]
            self.graph.output(_plain(tree_unflatten(leaves, self.analysis.graph.outputs)))
            return
        constant = self._constant(node)
        if constant is not None:
            self.new[node] = constant
            return
        call = adapted(self.analysis, node, self._sizes)
        if operation(node) == "add" and (other := self._without_zero(node)) is not None:
            self.new[node] = other
            return
        made = self.graph.call_function(call.target, call.args, call.kwargs)
        if call.index is not None:
            dim, places = call.index
            numbers = self._entered(f"{node.name}_index", places)
            made = self.graph.call_function(ATEN.index_select.default, (made, dim, numbers))
        if call.scale != 1:
            made = self.graph.call_function(ATEN.mul.Tensor, (made, call.scale))
        self.plain &= call.index is None and call.scale == 1
        self.new[node] = self._with_constants(node, made)

    def _with_constants(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """`made`, plus what the removed constants add where no bias takes it up."""
        for read in self._reads.get(node, []):
            bias = self._bias_of(node)
            if read.shared and bias is not None and bias in self.analysis.graph.tensors:
                continue
            added = self._removed(read)
            if added is None:
                continue
            result = self.analysis.states[node]
            if read.shared:
                made = self._new_bias(node, made, added, result)
                continue
            kept = [
                k if n > 1 else np.ones(1, dtype=bool)
                for k, n in zip(self.analysis.kept_on(result), added.shape, strict=True)
            ]
            number = cut(added, kept).to(result.value.dtype)
            constant = self._entered(f"{node.name}_constant", nn.Parameter(number))
            made = self.graph.call_function(ATEN.add.Tensor, (made, constant))
            self.plain = False
        return made

    def _new_bias(self, node: fx.Node, made: fx.Node, added: Tensor, result: State) -> fx.Node:
        """The layer at `node` with a bias that it did not have."""
        weight = node.args[1]
        name = self.analysis.graph.tensors.get(weight, ("", None))[0]  # type: ignore[arg-type]
        axis = -1 if operation(node) == "linear" else 1
        kept = self.analysis.kept(result.axes[axis])
        number = nn.Parameter(cut(added, (kept,)).to(result.value.dtype))
        own = f"{name.removesuffix('weight')}bias"
        if (
            self._bias_of(node) is None
            and name.endswith("weight")
            and (own not in self.tensors or own in self.biases)
        ):
            number = self.biases.setdefault(own, number)  # type: ignore[assignment]
            self.tensors[own] = number
            bias = self.graph.get_attr(own)
            made.update_arg(2, bias) if len(made.args) > 2 else None
            if len(made.args) == 2:
                made.args = (*made.args, bias)
            made.prepend(bias)
            return made
        shape = [-1, *[1] * (result.value.ndim - 1 - axis % result.value.ndim)]
        constant = self._entered(f"{node.name}_constant", nn.Parameter(number.detach().view(shape)))
        self.plain = False
        return self.graph.call_function(ATEN.add.Tensor, (made, constant))

    def _entered(self, name: str, tensor: Tensor) -> fx.Node:
        while name in self.tensors:
            name += "_"
        self.tensors[name] = tensor
        return self.graph.get_attr(name)

    def _without_zero(self, node: fx.Node) -> fx.Node | None:
        """The other summand of a sum with a constant that is 0."""
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            return None
        states, total = self.analysis.states, self.analysis.states[node].value
        for one, other in (node.args, node.args[::-1]):
            assert isinstance(one, fx.Node) and isinstance(other, fx.Node)
            a, b = states[one], states[other]
            if not isinstance(a, State) or not isinstance(b, State):
                continue
            same = b.shape == tuple(total.shape) and b.value.dtype == total.dtype
            known = one in self.analysis.depends and self.analysis.is_known(one)
            if same and known and not bool((cut(a.value, self.analysis.kept_on(a)) != 0).any()):
                self.plain = False
                return self.new[other]
        return None

    def _constant(self, node: fx.Node) -> fx.Node | None:
        """What a node is replaced by, if all that is kept of it is constant."""
        analysis, state = self.analysis, self.analysis.states[node]
        if not isinstance(state, State):
            return None
        kept = analysis.kept_on(state)
        if node in analysis.static:
            if all(k.all() for k in kept):
                return None
            self.plain = False
            return self._entered(f"{node.name}_constant", cut(state.value, kept).clone())
        if node not in analysis.depends or not analysis.is_known(node):
            return None
        value = cut(state.value, kept)
        sizes: list[Any] = []
        dynamic = dynamic_axes(node.meta.get("val"))
        for axis, open_ended in enumerate(dynamic):
            if not open_ended or not value.shape[axis]:
                sizes.append(-1 if value.shape[axis] else 0)
                continue
            first = value.narrow(axis, 0, 1)
            size = self._symbol(node.meta["val"].shape[axis])
            if size is None or not bool((value == first).all()):
                return None
            value = first
            sizes.append(size)
        if not value.is_floating_point():
            return None
        self.plain = False
        number = value.clone()
        held = nn.Parameter(number) if bool((number != 0).any()) else number
        constant = self._entered(f"{node.name}_constant", held)
        if not any(dynamic):
            return constant
        return self.graph.call_function(ATEN.expand.default, (constant, sizes))

    def _symbol(self, size: Any) -> fx.Node | None:
        """The number of rows as a node; None if the size is another function of it."""
        found = self._symbols.get(str(size.node.expr))
        if found is None:
            return None
        node, axis = found
        return self.graph.call_function(ATEN.sym_size.int, (self.new[node], axis))


def _plain(tree: Any) -> Any:
    """Outputs in tuples, lists and dicts."""
    if isinstance(tree, dict):
        return {key: _plain(part) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_plain(part) for part in tree)
    return tree


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value` as a parameter if `tensor` is one."""
    if not isinstance(tensor, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=tensor.requires_grad)


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Enters a parameter or buffer under its dotted name."""
    owner, own = _owner(root, name), name.rpartition(".")[2]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(own, tensor)
    else:
        owner.register_buffer(own, tensor)


def _owner(root: nn.Module, name: str) -> nn.Module:
    """The module that holds what has this dotted name; made if it is not there."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root
