"""The graph of the smaller network: every layer and tensor cut to its living channels, what has
become a constant put in as one.

Owns `Rebuilt`. What lives is decided in `channels.py`. Next: `verification.py`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.channels import Channels
from pyro_bmr.shrinking.graphs import MASKED, foreign_errors, linear
from pyro_bmr.shrinking.reshapes import RESHAPES
from pyro_bmr.shrinking.sizes import Rows
from pyro_bmr.shrinking.ties import State


class Rebuilt:
    """The `graph` of the smaller network, and its `parts`: layers and tensors by name.

    Raises:
        ShrinkError: a value that has become a constant, or is reshaped, has no axis of rows of its
            own.
    """

    def __init__(
        self, channels: Channels, batch_axes: Mapping[fx.Node, int], sizes: Mapping[fx.Node, Any]
    ) -> None:
        self.channels, self.batch_axes, self.sizes = channels, batch_axes, sizes
        self.parts: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}  # nodes of the smaller network, and numbers
        reads = {read.node: read for read in channels.reads}
        # what never depended on the input, such as an expanded class token, stays as it is written
        static = set[fx.Node]()
        for node in channels.graph.graph.nodes:
            sources = _from_states(channels, node)
            if node.op == "get_attr" or (
                node.op != "call_module" and sources and sources <= static
            ):
                static.add(node)
        constants = {n for n in channels.graph.graph.nodes if n not in static and self._constant(n)}
        for node in channels.graph.graph.nodes:
            if node in constants:
                if any(user not in constants and user not in sizes for user in node.users):
                    self.new[node] = self._constant_node(node)
                continue
            same = self._unchanged_sum(node, constants)
            if same is not None:
                self.new[node] = self.new[same]
            elif node in sizes:
                self.new[node] = self._size(node)
            else:
                with foreign_errors(f"'{node.name}' in a smaller size"):
                    self.new[node] = (
                        self._resized(node)
                        or self._reshape_node(node)
                        or self.graph.node_copy(node, lambda n: self.new[n])
                    )
                    self._part(node, reads)
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
            raise ShrinkError(
                f"'{node.name}' is a constant now, but none of its axes has the size of the batch;"
                f" {MASKED}"
            )
        value = cut(value, alive).narrow(axis, 0, 1).clone()
        name = f"constant_{node.name}"
        self.parts[name] = nn.Parameter(value) if value.is_floating_point() else value
        source = next(iter(self.graph.nodes))
        rows = self.graph.call_method("size", (source, 0))
        return self.graph.call_method(
            "expand",
            (
                self.graph.get_attr(name),
                *(rows if k == axis else n for k, n in enumerate(value.shape)),
            ),
        )

    def _unchanged_sum(self, node: fx.Node, constants: set[fx.Node]) -> fx.Node | None:
        """The summand that the sum equals, when the other one has become zero."""
        if (
            node.op not in ("call_function", "call_method")
            or getattr(node.target, "__name__", node.target) not in ("add", "iadd")
            or len(node.args) != 2
        ):
            return None
        for zero, other in (node.args, node.args[::-1]):
            if (
                isinstance(zero, fx.Node)
                and isinstance(other, fx.Node)
                and zero in constants
                and other not in constants
            ):
                alive = self._alive(zero)
                same = self.channels.values[other].shape == self.channels.values[node].shape
                if (
                    alive is not None
                    and same
                    and not bool(cut(self.channels.states[zero].value, alive).any())
                ):
                    return other
        return None

    def _part(self, node: fx.Node, reads: Mapping[fx.Node, Any]) -> None:
        """Enters the layer or the tensor of the node, cut; what was frozen stays frozen."""
        if node.op == "call_module":
            layer = self.channels.modules[str(node.target)]
            self.parts[str(node.target)] = small = self._layer(node, layer, reads)
            before = dict(layer.named_parameters())
            for name, parameter in small.named_parameters():
                parameter.requires_grad_(before[name].requires_grad if name in before else True)
        elif node.op == "get_attr":
            self.parts[str(node.target)] = self._attribute(node)

    def _size(self, node: fx.Node) -> Any:
        """A size, or what is computed of sizes alone: as the original network has it. It is asked
        for anew where nothing of that axis went.
        """
        source = node.args[0]
        if isinstance(source, fx.Node) and isinstance(self.channels.states[source], State):
            alive = self._alive(source)
            assert alive is not None
            whole = [source in self.new and bool(a.all()) for a in alive]
            if all(whole):
                return self.graph.node_copy(node, lambda n: self.new[n])
            size = self.sizes[node]
            if isinstance(size, tuple):  # the whole shape
                return tuple(
                    (
                        self.graph.call_method("size", (self.new[source], k))
                        if whole[k]
                        else self._number(node, n)
                    )
                    for k, n in enumerate(size)
                )
            if node.target == "size" and len(node.args) == 2 and whole[int(node.args[1])]:  # type: ignore[arg-type]
                return self.graph.node_copy(node, lambda n: self.new[n])
            return self._number(node, size)
        if (
            node.target is operator.getitem
            and isinstance(source, fx.Node)
            and isinstance(self.new[source], tuple)
        ):
            return self.new[source][node.args[1]]  # type: ignore[index]
        return self.graph.node_copy(node, lambda n: self.new[n])

    def _number(self, node: fx.Node, size: Any) -> Any:
        if size is None:
            raise ShrinkError(
                f"'{node.name}' is a size that is no multiple of the number of rows, of a value"
                f" that is cut; {MASKED}"
            )
        if not isinstance(size, Rows):
            return size
        rows = self.graph.call_method("size", (next(iter(self.graph.nodes)), 0))
        return (
            rows if size.times == 1 else self.graph.call_function(operator.mul, (rows, size.times))
        )

    def _resized(self, node: fx.Node) -> fx.Node | None:
        """A view, reshape or expand of which something was cut, with the sizes that are left."""
        alive = self._alive(node)
        if (
            node.target not in ("view", "reshape", "expand", torch.reshape)
            or alive is None
            or all(a.all() for a in alive)
        ):
            return None
        asked: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
        if isinstance(asked, fx.Node) and isinstance(self.new[asked], tuple):
            asked = self.new[asked]
        if not isinstance(asked, (tuple, list)) or len(asked) != len(alive):
            return None
        source, expand = node.all_input_nodes[0], node.target == "expand"
        shape = self.channels.values[source].shape
        sizes = []
        for k, (a, size) in enumerate(zip(alive, asked, strict=True), len(shape) - len(alive)):
            if bool(a.all()):
                sizes.append(
                    self.new[size] if isinstance(size, fx.Node) and size in self.new else size
                )
            else:
                inferred = (size == -1 if isinstance(size, int) else False) or (
                    expand and k >= 0 and shape[k] == len(a)
                )
                sizes.append(-1 if inferred else int(a.sum()))
        return self.graph.call_method("expand" if expand else "reshape", (self.new[source], *sizes))

    def _reshape_node(self, node: fx.Node) -> fx.Node | None:
        layer = self.channels.modules.get(str(node.target)) if node.op == "call_module" else None
        alive = self._alive(node)
        if (
            alive is None
            or not (node.target in RESHAPES or isinstance(layer, nn.Unflatten))
            or all(a.all() for a in alive)
        ):
            return None
        name = getattr(node.target, "__name__", node.target)
        if name in ("flatten", "squeeze", "unsqueeze"):
            return None  # these have no sizes
        sizes = [int(a.sum()) for a in alive]
        if (axis := self.batch_axes[node]) < 0:
            raise ShrinkError(
                f"'{node.name}': a reshape without an axis of rows cannot be made smaller; {MASKED}"
            )
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
            inputs, outputs = (
                torch.from_numpy(channels.living(ids)) for ids in (read.inputs, read.outputs)
            )
            weight = layer.weight.detach()  # type: ignore[union-attr, operator]
            bias: Tensor | None = None if layer.bias is None else layer.bias.detach()  # type: ignore[union-attr, operator, assignment]
            folded = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            folded = folded[:, ~inputs] @ read.level[~inputs].to(weight.dtype)
            if bool(folded.any()):
                bias = folded if bias is None else bias + folded
            weight, bias = weight[outputs][:, inputs], None if bias is None else bias[outputs]
            return (
                linear(weight, bias)
                if isinstance(layer, nn.Linear)
                else _conv(layer, weight, bias, 1)
            )  # type: ignore[arg-type]
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups == layer.in_channels:
            alive = torch.from_numpy(channels.living(state.axes[1]))
            groups = int(channels.living(channels.states[node.args[0]].axes[1]).sum())  # type: ignore[index]
            return _conv(
                layer,
                layer.weight.detach()[alive],
                None if layer.bias is None else layer.bias.detach()[alive],
                groups,
            )
        if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
            slopes = layer.weight.detach()[torch.from_numpy(channels.living(state.axes[1]))].clone()
            cut_layer = nn.PReLU(len(slopes), device="meta")
            cut_layer.weight = nn.Parameter(slopes)
            return cut_layer
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            alive = torch.from_numpy(channels.living(state.axes[1]))
            small = type(layer)(
                int(alive.sum()),
                layer.eps,
                layer.momentum,
                layer.affine,
                device=layer.running_mean.device,  # type: ignore[union-attr]
                dtype=layer.running_mean.dtype,  # type: ignore[union-attr]
            )
            small.load_state_dict(
                {k: v[alive] if v.ndim else v for k, v in layer.state_dict().items()}
            )
            return small
        if isinstance(layer, nn.Embedding):
            alive = torch.from_numpy(channels.living(state.axes[-1]))
            return nn.Embedding.from_pretrained(
                layer.weight.detach()[:, alive].clone(), freeze=False, padding_idx=layer.padding_idx
            )
        return copy.deepcopy(layer)


def _from_states(channels: Channels, node: fx.Node) -> set[fx.Node]:
    return {n for n in node.all_input_nodes if isinstance(channels.states[n], State)}


def _conv(layer: Any, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    inputs = weight.shape[1] * groups
    small = type(layer)(
        inputs,
        weight.shape[0],
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        bias is not None,
        layer.padding_mode,
        device="meta",
    )
    small.weight, small.bias = (
        nn.Parameter(weight.clone()),
        (None if bias is None else nn.Parameter(bias.clone())),
    )
    return small  # type: ignore[no-any-return]


def cut(value: Tensor, alive: tuple[np.ndarray, ...]) -> Tensor:
    """`value` at the positions of each axis that live."""
    for k, positions in enumerate(alive):
        if not positions.all():
            value = value.index_select(k, torch.from_numpy(positions.nonzero()[0]).to(value.device))
    return value


def depends(channels: Channels, node: fx.Node) -> bool:
    """Whether what lives of a value depends on the input."""
    states = [
        s
        for s in (
            channels.states[node]
            if isinstance(channels.states[node], tuple)
            else [channels.states[node]]
        )
        if isinstance(s, State)
    ]
    return any(bool(cut(s.unknown, channels.alive(s.axes)).any()) for s in states)
