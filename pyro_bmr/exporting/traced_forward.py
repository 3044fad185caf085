"""A network as a graph of torch operations. Control flow that depends on the data is refused.

Owns `trace`, for the class that `network_source.py` writes. Next: `loaders_source.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.exporting.traceable_attention import with_traceable_attention
from pyro_bmr.shrinking.refusals import MASKED, first_line


def trace(net: nn.Module) -> fx.GraphModule:
    """The graph of `net`, which is changed: its attention layers are replaced by traceable ones.

    Raises:
        ShrinkError: the control flow of the network depends on the data, or a part has no traceable
            form.
    """
    root = with_traceable_attention(net)
    if type(root).__module__.startswith("torch.nn") and not isinstance(root, nn.Sequential):
        root = nn.Sequential(root)  # a single layer
    name = type(root).__name__
    try:
        argument = _reduce_to_one_input(root)
        graph = fx.symbolic_trace(root.eval())
    except ShrinkError:
        raise
    except Exception as error:  # a user's forward may raise anything when it gets a proxy
        raise ShrinkError(
            f"{name} cannot be traced, its control flow depends on the data or on shapes"
            f" ({first_line(error)}); {MASKED}"
        ) from None
    for node in graph.graph.nodes:
        node.type = None  # an annotation may name a type that the graph cannot import
        if node.op == "placeholder" and argument is not None:
            node.target = argument
    graph.recompile()
    return graph


def _other_arguments(net: nn.Module) -> tuple[str, bool]:
    """The name of the input argument of `net`, and whether there are others, all with defaults.

    Raises:
        ShrinkError: the network needs more than one argument.
    """
    _, first, *others = inspect.signature(type(net).forward).parameters.values()
    needed = [
        p.name
        for p in others
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ShrinkError(
            f"{type(net).__name__}.forward: expected one input tensor, got the arguments"
            f" {', '.join([first.name, *needed])}; {MASKED}"
        )
    return first.name, bool(others)


def _reduce_to_one_input(root: nn.Module) -> str | None:
    """The name of the input argument, if `root` had others; its forward then takes the input alone.

    A flag at its default does not depend on the data.
    """
    name, others = _other_arguments(root)
    if not others:
        return None
    original = type(root)

    def forward(self: nn.Module, x: Tensor) -> Any:
        return original.forward(self, x)

    root.__class__ = type(original.__name__, (original,), {"forward": forward})
    return name
