r"""Which channels of a network live: what is constant, what is tied to what, what is read.

Owns `Channels`, the analysis of a graph. Each operation says three things of its output.

- `unknown`, entry by entry: whether it depends on the input at all; where it does not, `value` is
  the constant. A unit whose incoming weights are all zero is known: it is its bias through the
  activation.
- `axes`: for each axis the identity of every position. Positions with the same identity live and
  die together, as the channels that a residual sum ties. Identity 0 (`FIXED`) never goes: rows of
  the batch, pixels, outputs of the network.
- a `Read`, if it weighs channels: a channel is needed when a living output reads it with a weight
  other than zero, unless it is constant and its constant can be folded into the bias.

What is not needed goes. Next: `sizes.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.graphs import MASKED, foreign_errors, values_of
from pyro_bmr.shrinking.operations import function_state, layer_state, states_in
from pyro_bmr.shrinking.ties import Axes, State, Ties, fixed


class Channels:
    """The analysis of `graph` on `x` (two rows). `states`: node → `State`; `alive(axes)`: which
    positions stay; `kept`: node → why channels stay.

    Raises:
        ShrinkError: an operation of the graph is not among the supported ones.
    """

    def __init__(self, graph: fx.GraphModule, x: Tensor) -> None:
        self.graph, self._ties = graph, Ties()
        self.values = values_of(graph, x)
        self.modules = dict(graph.named_modules())
        self.states: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in graph.graph.nodes:
                with foreign_errors(f"'{node.name}' ({_title(node, self.modules)})"):
                    self.states[node] = self._visit(node)
        self._ties.agree()
        self.reads, self.kept = self._ties.reads, self._ties.kept
        self._living = self._ties.living()

    def alive(self, axes: Axes) -> tuple[np.ndarray, ...]:
        """For each axis, the positions that stay, as bools."""
        return tuple(self._living[self._ties.roots(axis)] for axis in axes)

    def living(self, ids: np.ndarray) -> np.ndarray:
        """The identities that stay, as bools."""
        return self._living[self._ties.roots(ids)]

    def _visit(self, node: fx.Node) -> Any:
        value = self.values[node]
        if node.op == "placeholder":
            if not isinstance(value, Tensor):
                raise ShrinkError(
                    f"'{node.name}': networks of one input tensor are supported, this argument is"
                    f" not a tensor; {MASKED}"
                )
            return State(
                torch.zeros_like(value),
                torch.ones_like(value, dtype=torch.bool),
                fixed(value.shape),
            )
        if node.op == "get_attr":
            if not isinstance(value, Tensor):
                return value
            new = (self._ties.new(n) if n > 1 else np.zeros(n, dtype=np.int64) for n in value.shape)
            axes = tuple(
                self._ties.shared(f"{node.target} {k}", axis) for k, axis in enumerate(new)
            )
            return State(value, torch.zeros_like(value, dtype=torch.bool), axes)
        args: tuple[Any, ...] = fx.node.map_arg(node.args, lambda n: self.states[n])
        kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, lambda n: self.states[n])
        if node.op == "output":
            for state in states_in(args):
                self._ties.fix_all(state)
            return None
        if not states_in((args, kwargs)) or not has_tensor(value):
            return value  # sizes and other numbers
        if node.op == "call_module":
            return layer_state(
                self._ties, node, self.modules[str(node.target)], value, args, kwargs
            )
        return function_state(self._ties, node, args, kwargs)


def has_tensor(value: Any) -> bool:
    """Whether a value of the graph is a tensor or holds one; else it is a size or another
    number.
    """
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(has_tensor(part) for part in value)
    )


def _title(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    return (
        type(modules[str(node.target)]).__name__
        if node.op == "call_module"
        else str(getattr(node.target, "__name__", node.target))
    )
