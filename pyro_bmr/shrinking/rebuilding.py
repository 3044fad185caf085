"""The graph of the smaller network: every layer and tensor cut to the channels that are kept, and
every value that has become constant put in as a constant.

Owns `Rebuilt`. Which channels are kept is decided in `channels.py`. Next: `verification.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.channels import Channels, cut
from pyro_bmr.shrinking.refusals import MASKED, foreign_errors
from pyro_bmr.shrinking.reshapes import RESHAPES
from pyro_bmr.shrinking.resized_layers import resized_layer
from pyro_bmr.shrinking.sizes import Rows
from pyro_bmr.shrinking.states import State


class Rebuilt:
    """The `graph` of the smaller network, and its `parts`: layers and tensors by name.

    Raises:
        ShrinkError: a value that has become constant, or is reshaped, has no axis of rows of its
            own.
    """

    def __init__(
        self, channels: Channels, batch_axes: Mapping[fx.Node, int], sizes: Mapping[fx.Node, Any]
    ) -> None:
        self.channels, self.batch_axes, self.sizes = channels, batch_axes, sizes
        self.reads = {read.node: read for read in channels.reads}
        self.parts: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}  # nodes of the smaller network, and numbers
        nodes = channels.graph.graph.nodes
        static = self._static_nodes()
        constants = {node for node in nodes if node not in static and self._is_constant(node)}
        for node in nodes:
            if node not in constants:
                self.new[node] = self._new_node(node, constants)
            elif any(user not in constants and user not in sizes for user in node.users):
                self.new[node] = self._constant_node(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        used = {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr")}
        self.parts = {name: part for name, part in self.parts.items() if name in used}

    def _static_nodes(self) -> set[fx.Node]:
        """Tensors computed from parameters alone, such as an expanded class token.

        They did not depend on the input before either, so they are copied as they are written.
        """
        static = set[fx.Node]()
        for node in self.channels.graph.graph.nodes:
            sources = self.channels.sources(node)
            computed = node.op != "call_module" and sources and sources <= static
            if node.op == "get_attr" or computed:
                static.add(node)
        return static

    def _kept(self, node: fx.Node) -> tuple[np.ndarray, ...] | None:
        state = self.channels.states[node]
        return self.channels.kept_on(state.axes) if isinstance(state, State) else None

    def _is_cut(self, node: fx.Node) -> bool:
        kept = self._kept(node)
        return kept is not None and not all(k.all() for k in kept)

    def _is_constant(self, node: fx.Node) -> bool:
        kept = self._kept(node)
        if kept is None or node.op in ("placeholder", "get_attr", "output"):
            return False
        return not bool(cut(self.channels.states[node].unknown, kept).any())

    def _copied(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, lambda n: self.new[n])

    def _new_node(self, node: fx.Node, constants: set[fx.Node]) -> Any:
        """What replaces `node`: a node of the smaller graph, or a number; its part is entered."""
        summand = self._only_summand(node, constants)
        if summand is not None:
            return self.new[summand]
        if node in self.sizes:
            return self._size(node)
        with foreign_errors(f"'{node.name}' in a smaller size"):
            new = self._with_cut_sizes(node) or self._as_reshape(node) or self._copied(node)
            self._enter_part(node)
        return new

    def _constant_node(self, node: fx.Node) -> fx.Node:
        """A node for a value that has become constant: one row of it, expanded to all rows."""
        axis, kept = self.batch_axes[node], self._kept(node)
        if axis < 0 or kept is None:
            raise ShrinkError(
                f"'{node.name}' is a constant now, but none of its axes has the size of the batch;"
                f" {MASKED}"
            )
        value = cut(self.channels.states[node].value, kept).narrow(axis, 0, 1).clone()
        name = f"constant_{node.name}"
        self.parts[name] = nn.Parameter(value) if value.is_floating_point() else value
        rows = self._rows()
        shape = (rows if k == axis else n for k, n in enumerate(value.shape))
        return self.graph.call_method("expand", (self.graph.get_attr(name), *shape))

    def _rows(self) -> fx.Node:
        """A node for the number of rows of the input."""
        return self.graph.call_method("size", (next(iter(self.graph.nodes)), 0))

    def _only_summand(self, node: fx.Node, constants: set[fx.Node]) -> fx.Node | None:
        """The summand that a sum is equal to, if the other one has become zero."""
        name = getattr(node.target, "__name__", node.target)
        called = node.op in ("call_function", "call_method")
        if not called or name not in ("add", "iadd") or len(node.args) != 2:
            return None
        values = self.channels.values
        for zero, other in (node.args, node.args[::-1]):
            if not (isinstance(zero, fx.Node) and isinstance(other, fx.Node)):
                continue
            if zero not in constants or other in constants:
                continue
            kept = self._kept(zero)
            is_zero = kept is not None and not bool(
                cut(self.channels.states[zero].value, kept).any()
            )
            if is_zero and values[other].shape == values[node].shape:
                return other
        return None

    def _enter_part(self, node: fx.Node) -> None:
        """Enters the layer or tensor that `node` names, cut."""
        name, layer = str(node.target), self.channels.layer(node)
        if layer is not None:
            self.parts[name] = resized_layer(self.channels, node, layer, self.reads.get(node))
        elif node.op == "get_attr":
            value, kept = self.channels.values[node], self._kept(node)
            if kept is not None:
                small = cut(value.detach(), kept).clone()
                value = nn.Parameter(small) if isinstance(value, nn.Parameter) else small
            self.parts[name] = value

    def _size(self, node: fx.Node) -> Any:
        """A size, or a number computed from sizes, as in the original network.

        A size is still asked for at run time where nothing of its axis was cut.
        """
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return self._copied(node)
        kept = self._kept(source)
        if kept is not None:
            return self._size_of(node, source, [source in self.new and bool(k.all()) for k in kept])
        if node.target is operator.getitem and isinstance(self.new[source], tuple):
            index: Any = node.args[1]
            return self.new[source][index]
        return self._copied(node)

    def _size_of(self, node: fx.Node, source: fx.Node, whole: list[bool]) -> Any:
        """The size that `node` asks of the tensor `source`; `whole`: which axes are not cut."""
        size = self.sizes[node]
        if all(whole):
            return self._copied(node)
        if isinstance(size, tuple):  # of all axes
            return tuple(
                self.graph.call_method("size", (self.new[source], k))
                if whole[k]
                else self._number(node, n)
                for k, n in enumerate(size)
            )
        if node.target == "size" and len(node.args) == 2:
            axis: Any = node.args[1]
            if whole[int(axis)]:
                return self._copied(node)
        return self._number(node, size)

    def _number(self, node: fx.Node, size: Any) -> Any:
        """A size as a number, or as a multiple of the number of rows."""
        if size is None:
            raise ShrinkError(
                f"'{node.name}' is a size that is no multiple of the number of rows, of a value"
                f" that is cut; {MASKED}"
            )
        if not isinstance(size, Rows):
            return size
        rows = self._rows()
        if size.times == 1:
            return rows
        return self.graph.call_function(operator.mul, (rows, size.times))

    def _with_cut_sizes(self, node: fx.Node) -> fx.Node | None:
        """A view, reshape or expand whose result is cut, with the sizes of the cut result.

        None if `node` is another operation, or does not name a size for every axis.
        """
        kept = self._kept(node)
        reshapes = ("view", "reshape", "expand", torch.reshape)
        if node.target not in reshapes or kept is None or not self._is_cut(node):
            return None
        asked: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
        if isinstance(asked, fx.Node) and isinstance(self.new[asked], tuple):
            asked = self.new[asked]
        if not isinstance(asked, (tuple, list)) or len(asked) != len(kept):
            return None
        source, expand = node.all_input_nodes[0], node.target == "expand"
        shape = self.channels.values[source].shape
        sizes = []
        for k, (positions, size) in enumerate(
            zip(kept, asked, strict=True), len(shape) - len(kept)
        ):
            if bool(positions.all()):
                is_node = isinstance(size, fx.Node) and size in self.new
                sizes.append(self.new[size] if is_node else size)
            else:
                is_inferred = isinstance(size, int) and size == -1
                is_copied = expand and k >= 0 and shape[k] == len(positions)
                sizes.append(-1 if is_inferred or is_copied else int(positions.sum()))
        return self.graph.call_method("expand" if expand else "reshape", (self.new[source], *sizes))

    def _as_reshape(self, node: fx.Node) -> fx.Node | None:
        """A reshape to the sizes of the cut result, for a reshape of another kind; None otherwise.

        Raises:
            ShrinkError: none of its axes has the size of the batch.
        """
        kept = self._kept(node)
        splits = isinstance(self.channels.layer(node), nn.Unflatten)
        if kept is None or not self._is_cut(node) or not (node.target in RESHAPES or splits):
            return None
        name = getattr(node.target, "__name__", node.target)
        if name in ("flatten", "squeeze", "unsqueeze"):
            return None  # these name no sizes
        sizes = [int(k.sum()) for k in kept]
        if (axis := self.batch_axes[node]) < 0:
            raise ShrinkError(
                f"'{node.name}': a reshape without an axis of rows cannot be made smaller; {MASKED}"
            )
        sizes[axis] = -1
        return self.graph.call_method("reshape", (self.new[node.all_input_nodes[0]], *sizes))
