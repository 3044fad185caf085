"""The graph of the smaller network: every layer and tensor cut to its living channels, what has become a constant put in as one.

Owns `Rebuilt`. What lives is decided in `channels.py`. Next: `plan.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.channels import Channels
from pyro_bmr.shrinking.graphs import MASKED, linear
from pyro_bmr.shrinking.reshapes import RESHAPES
from pyro_bmr.shrinking.ties import State


class Rebuilt:
    """The `graph` of the smaller network, and its `parts`: layers and tensors by name.

    Raises:
        ShrinkError: a value that has become a constant, or is reshaped, has no axis of rows of its own.
    """

    def __init__(self, channels: Channels, batch_axes: Mapping[fx.Node, int]) -> None:
        self.channels, self.batch_axes = channels, batch_axes
        self.parts: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        reads = {read.node: read for read in channels.reads}
        static = set[fx.Node]()  # what never depended on the input, such as an expanded class token, stays as it is written
        for node in channels.graph.graph.nodes:
            sources = _from_states(channels, node)
            if node.op == "get_attr" or (node.op != "call_module" and sources and sources <= static):
                static.add(node)
        constants = {n for n in channels.graph.graph.nodes if n not in static and self._constant(n)}
        for node in channels.graph.graph.nodes:
            if node in constants:
                if any(user not in constants for user in node.users):
                    self.new[node] = self._constant_node(node)
                continue
            same = self._unchanged_sum(node, constants)
            if same is not None:
                self.new[node] = self.new[same]
                continue
            if any(arg in constants and arg not in self.new for arg in node.all_input_nodes):  # a size of something that is a constant now
                raise ShrinkError(f"'{node.name}' asks a value that has become a constant for its size; {MASKED}")
            self.new[node] = self._reshape_node(node) or self.graph.node_copy(node, lambda n: self.new[n])
            if node.op == "call_module":
                self.parts[str(node.target)] = self._layer(node, channels.modules[str(node.target)], reads)
            elif node.op == "get_attr":
                self.parts[str(node.target)] = self._attribute(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        used = {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr")}
        self.parts = {name: part for name, part in self.parts.items() if name in used}

    def _alive(self, node: fx.Node) -> tuple[np.ndarray, ...] | None:
        state = self.channels.states[node]
        return self.channels.alive(state.axes) if isinstance(state, State) else None

    def _constant(self, node: fx.Node) -> bool:
        alive = self._alive(node)
        if alive is None or node.op in ("placeholder", "get_attr", "output"):
            return False
        return not bool(cut(self.channels.states[node].unknown, alive).any())

    def _constant_node(self, node: fx.Node) -> fx.Node:
        axis, alive = self.batch_axes[node], self._alive(node)
        value = self.channels.states[node].value
        if axis < 0 or alive is None:
            raise ShrinkError(f"'{node.name}' is a constant now, but none of its axes has the size of the batch; {MASKED}")
        value = cut(value, alive).narrow(axis, 0, 1).clone()
        name = f"constant_{node.name}"
        self.parts[name] = nn.Parameter(value) if value.is_floating_point() else value
        source = next(iter(self.graph.nodes))
        rows = self.graph.call_method("size", (source, 0))
        return self.graph.call_method("expand", (self.graph.get_attr(name), *(rows if k == axis else n for k, n in enumerate(value.shape))))

    def _unchanged_sum(self, node: fx.Node, constants: set[fx.Node]) -> fx.Node | None:
        """The summand that the sum equals, when the other one has become zero."""
        if node.op not in ("call_function", "call_method") or getattr(node.target, "__name__", node.target) not in ("add", "iadd") or len(node.args) != 2:
            return None
        for zero, other in (node.args, node.args[::-1]):
            if isinstance(zero, fx.Node) and isinstance(other, fx.Node) and zero in constants and other not in constants:
                alive = self._alive(zero)
                same = self.channels.values[other].shape == self.channels.values[node].shape
                if alive is not None and same and not bool(cut(self.channels.states[zero].value, alive).any()):
                    return other
        return None

    def _reshape_node(self, node: fx.Node) -> fx.Node | None:
        layer = self.channels.modules.get(str(node.target)) if node.op == "call_module" else None
        alive = self._alive(node)
        if alive is None or not (node.target in RESHAPES or isinstance(layer, nn.Unflatten)) or all(a.all() for a in alive):
            return None
        name = getattr(node.target, "__name__", node.target)
        if name in ("flatten", "squeeze", "unsqueeze"):
            return None  # these have no sizes
        sizes = [int(a.sum()) for a in alive]
        if (axis := self.batch_axes[node]) < 0:
            raise ShrinkError(f"'{node.name}': a reshape without an axis of rows cannot be made smaller; {MASKED}")
        sizes[axis] = -1
        return self.graph.call_method("reshape", (self.new[node.all_input_nodes[0]], *sizes))

    def _attribute(self, node: fx.Node) -> Any:
        alive, value = self._alive(node), self.channels.values[node]
        if alive is None:
            return value
        small = cut(value.detach(), alive).clone()
        return nn.Parameter(small) if isinstance(value, nn.Parameter) else small

    def _layer(self, node: fx.Node, layer: nn.Module, reads: Mapping[fx.Node, Any]) -> nn.Module:
        channels, state = self.channels, self.channels.states[node]
        if node in reads:
            read = reads[node]
            inputs, outputs = (torch.from_numpy(channels.living(ids)) for ids in (read.inputs, read.outputs))
            weight = layer.weight.detach()  # type: ignore[union-attr, operator]
            bias: Tensor | None = None if layer.bias is None else layer.bias.detach()  # type: ignore[union-attr, operator, assignment]
            folded = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            folded = folded[:, ~inputs] @ read.level[~inputs].to(weight.dtype)
            if bool(folded.any()):
                bias = folded if bias is None else bias + folded
            weight, bias = weight[outputs][:, inputs], None if bias is None else bias[outputs]
            return linear(weight, bias) if isinstance(layer, nn.Linear) else _conv(layer, weight, bias, 1)  # type: ignore[arg-type]
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups == layer.in_channels:
            alive = torch.from_numpy(channels.living(state.axes[1]))
            groups = int(channels.living(channels.states[node.args[0]].axes[1]).sum())  # type: ignore[index]
            return _conv(layer, layer.weight.detach()[alive], None if layer.bias is None else layer.bias.detach()[alive], groups)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            alive = torch.from_numpy(channels.living(state.axes[1]))
            small = type(layer)(int(alive.sum()), layer.eps, layer.momentum, layer.affine, device=layer.running_mean.device, dtype=layer.running_mean.dtype)  # type: ignore[union-attr]
            small.load_state_dict({k: v[alive] if v.ndim else v for k, v in layer.state_dict().items()})
            return small
        if isinstance(layer, nn.Embedding):
            alive = torch.from_numpy(channels.living(state.axes[-1]))
            return nn.Embedding.from_pretrained(layer.weight.detach()[:, alive].clone(), freeze=False, padding_idx=layer.padding_idx)
        return copy.deepcopy(layer)


def _from_states(channels: Channels, node: fx.Node) -> set[fx.Node]:
    return {n for n in node.all_input_nodes if isinstance(channels.states[n], State)}


def _conv(layer: Any, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    inputs = weight.shape[1] * groups
    small = type(layer)(
        inputs, weight.shape[0], layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, bias is not None, layer.padding_mode, device="meta"
    )
    small.weight, small.bias = nn.Parameter(weight.clone()), None if bias is None else nn.Parameter(bias.clone())
    return small  # type: ignore[no-any-return]


def cut(value: Tensor, alive: tuple[np.ndarray, ...]) -> Tensor:
    """`value` at the positions of each axis that live."""
    for k, positions in enumerate(alive):
        if not positions.all():
            value = value.index_select(k, torch.from_numpy(positions.nonzero()[0]).to(value.device))
    return value


def batch_axis(two: torch.Size, three: torch.Size) -> int:
    """The axis that has the size of the batch; −1 if there is none, or it is merged with another."""
    axes = [k for k, (a, b) in enumerate(zip(two, three, strict=True)) if (a, b) == (2, 3)]
    return axes[0] if len(axes) == 1 else -1


def depends(channels: Channels, node: fx.Node) -> bool:
    """Whether what lives of a value depends on the input."""
    states = [s for s in (channels.states[node] if isinstance(channels.states[node], tuple) else [channels.states[node]]) if isinstance(s, State)]
    return any(bool(cut(s.unknown, channels.alive(s.axes)).any()) for s in states)
