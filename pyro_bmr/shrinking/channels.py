r"""Which channels of a network are kept: what is constant, what is tied, and what reads them.

Owns `Channels`, the analysis of a graph. For each operation it finds three things.

- `unknown`, for each entry: whether it depends on the input. Where it does not, `value` is the
  constant. A unit whose incoming weights are all zero is constant: its bias through the activation.
- `axes`: for each axis, the channel of every position. Positions of one channel are kept or pruned
  together, such as the channels that a residual sum ties. Channel 0 (`FIXED`) is always kept: rows
  of the batch, pixels, outputs of the network.
- a `Read`, if the operation weights channels. A channel is needed when a kept output reads it with
  a weight other than zero, unless it is a constant that can be folded into the bias.

Channels that are not needed are pruned. Next: `sizes.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.functions import function_state
from pyro_bmr.shrinking.graphs import values_of
from pyro_bmr.shrinking.layers import layer_state
from pyro_bmr.shrinking.refusals import MASKED, foreign_errors
from pyro_bmr.shrinking.states import Axes, State, fixed, states_in, unknown_state
from pyro_bmr.shrinking.ties import Ties


class Channels:
    """The analysis of `graph` on `x` (two rows).

    `states`: node → `State`. `values`: node → what it was on `x`. `reads`: every layer that weights
    channels. `reasons`: layer → why channels are kept that could otherwise be pruned.

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
                    self.states[node] = self._state(node)
        self._ties.agree()
        self.reads, self.reasons = self._ties.reads, self._ties.reasons
        self._kept = self._ties.kept()

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """For each of these channels, whether it is kept."""
        return self._kept[self._ties.roots(ids)]

    def kept_on(self, axes: Axes) -> tuple[np.ndarray, ...]:
        """For each axis and each of its positions, whether it is kept."""
        return tuple(self.kept(ids) for ids in axes)

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that `node` calls; None if it calls none."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def sources(self, node: fx.Node) -> set[fx.Node]:
        """The tensors that `node` is computed from."""
        return {n for n in node.all_input_nodes if isinstance(self.states[n], State)}

    def depends(self, node: fx.Node) -> bool:
        """Whether the kept part of a value depends on the input."""
        states = states_in(self.states[node])
        return any(bool(cut(s.unknown, self.kept_on(s.axes)).any()) for s in states)

    def _state(self, node: fx.Node) -> Any:
        value = self.values[node]
        if node.op == "placeholder":
            if not isinstance(value, Tensor):
                raise ShrinkError(
                    f"'{node.name}': expected one input tensor, got another argument,"
                    f" {type(value).__name__}; {MASKED}"
                )
            return unknown_state(value)
        if node.op == "get_attr":
            return self._attribute_state(node, value) if isinstance(value, Tensor) else value
        args: tuple[Any, ...] = fx.node.map_arg(node.args, lambda n: self.states[n])
        kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, lambda n: self.states[n])
        if node.op == "output":
            for state in states_in(args):
                self._ties.fix_all(state)
            return None
        if not states_in((args, kwargs)) or not has_tensor(value):
            return value  # sizes and other numbers
        layer = self.layer(node)
        if layer is not None:
            return layer_state(self._ties, node, layer, value, args, kwargs)
        return function_state(self._ties, node, args, kwargs)

    def _attribute_state(self, node: fx.Node, value: Tensor) -> State:
        """The state of a parameter or buffer; each of its axes longer than 1 has new channels."""
        new = [self._ties.new(n) if n > 1 else fixed((n,))[0] for n in value.shape]
        axes = tuple(self._ties.shared(f"{node.target} {k}", ids) for k, ids in enumerate(new))
        return State(value, torch.zeros_like(value, dtype=torch.bool), axes)


def cut(value: Tensor, kept: tuple[np.ndarray, ...]) -> Tensor:
    """`value` at the kept positions of each axis."""
    for k, positions in enumerate(kept):
        if not positions.all():
            value = value.index_select(k, torch.from_numpy(positions.nonzero()[0]).to(value.device))
    return value


def has_tensor(value: Any) -> bool:
    """Whether a value is a tensor or a tuple with one; else it is a size or another number."""
    if isinstance(value, (tuple, list)):
        return any(has_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _title(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    return str(getattr(node.target, "__name__", node.target))
