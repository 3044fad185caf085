"""What is known of a tensor of the graph: where it is constant, and the channel of each position.

Owns `State`, `Call` and what makes them. Next: `movement.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bmr.shrinking.channel_ids import FIXED, Ids

Axes = tuple[Ids, ...]


@dataclass(frozen=True)
class State:
    """What is known of one tensor: the constant `value`, 0 where it is `unknown`.

    `axes`: for each axis, the channel of every position. `sums_to_one`: whether the last axis
    does, as after a softmax. `parts`: the channels of the last axis at each position of the first,
    where they are not the same, as in the last states of several recurrent layers.
    """

    value: Tensor
    unknown: Tensor
    axes: Axes
    sums_to_one: bool = False
    parts: Axes = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def nonzero(self) -> Tensor:
        """Where it is not known to be 0."""
        return self.unknown | (self.value != 0)


def state_of(value: Tensor, unknown: Tensor, axes: Axes) -> State:
    """The state of a tensor that was computed from constants; entries that are unknown become 0."""
    unknown = unknown.expand(value.shape)
    return State(value.masked_fill(unknown, 0), unknown, axes)


def fixed(shape: Sequence[int]) -> Axes:
    """Axes of this shape of which nothing can be removed."""
    return tuple(np.full(n, FIXED, dtype=np.int64) for n in shape)


def states_in(tree: Any) -> list[State]:
    """The states among the arguments of an operation, in order."""
    leaves = tree_leaves(tree, is_leaf=lambda part: isinstance(part, State))
    return [part for part in leaves if isinstance(part, State)]


@dataclass(frozen=True)
class Call:
    """An operation at a node of the graph, with states in the place of its tensors.

    `dynamic`: for each axis of its result, whether the size follows the number of rows. `layer`:
    the path of the module that calls it. `sized`: whether a size of the data is among its numbers.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layer: str
    sized: bool

    @property
    def states(self) -> list[State]:
        return states_in((self.args, self.kwargs))

    def run(self, pick: Callable[[State], Tensor]) -> Any:
        """What the operation gives for a tensor in the place of each state."""
        # a view needs the entries in order, which the tensors of the network may have had
        args, kwargs = tree_map(
            lambda part: pick(part).contiguous() if isinstance(part, State) else part,
            (self.args, self.kwargs),
            is_leaf=lambda part: isinstance(part, State),
        )
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def values(self) -> Any:
        """What the operation gives for the known values."""
        return self.run(lambda state: state.value)

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of this name in the schema of the operation."""
        schema = getattr(self.node.target, "_schema", None)
        for k, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.name == name:
                if name in self.kwargs:
                    return self.kwargs[name]
                if k < len(self.args):
                    return self.args[k]
                return argument.default_value if argument.has_default_value() else default
        return default

    @property
    def name(self) -> str:
        """The operation without its overload: "add" for aten.add.Tensor."""
        return operation(self.node)

    @property
    def dynamic(self) -> tuple[bool, ...]:
        return dynamic_axes(self.node.meta.get("val"))


def operation(node: fx.Node) -> str:
    """The operation of a node without its overload: "add" for aten.add.Tensor."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(target, "__name__", target))


def dynamic_axes(value: Any) -> tuple[bool, ...]:
    """For each axis of a traced value, whether its size follows the number of rows."""
    return tuple(is_open(n) for n in getattr(value, "shape", ()))


def is_open(size: Any) -> bool:
    """Whether a traced size follows the sizes of the data; else it is a number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def layer_of(node: fx.Node) -> str:
    """The path of the module whose forward calls the operation."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    path = re.sub(r"@\d+$", "", str(paths[-1])) if paths else ""
    return re.sub(r"^L__self__\.?", "", path)
