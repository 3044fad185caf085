"""From masks to a smaller network with the same function: dead units, channels and heads removed,
their constants folded into biases.

Owns `shrink`, `shrink_plan` and `ShrinkPlan`. How the network is read is in `graphs.py`, what lives
in `channels.py`. Next: `exporting/finite.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.networks.plain_module import module_copy, plain_module
from pyro_bmr.shrinking.channels import Channels, has_tensor
from pyro_bmr.shrinking.graphs import foreign_errors, other_arguments, trace, values_of
from pyro_bmr.shrinking.rebuilding import Rebuilt, depends
from pyro_bmr.shrinking.reshapes import RESHAPES
from pyro_bmr.shrinking.sizes import batch_axis, size_in_rows
from pyro_bmr.shrinking.ties import State
from pyro_bmr.shrinking.verification import answers, check_same_function, inputs_like

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ShrinkPlan:
    """What would go from a network, before anything goes; print it, then `apply()`.

    `layers`: one row per layer with weights: layer, type, before and after (outputs × inputs ×
    kernel), parameters and FLOPs per row of the input, each before and after. FLOPs count a
    multiplication and an addition as two, and the weighted layers only. `kept`: layer → why
    channels of it stay that could have gone. `unread_inputs`: flat indices, within one row of the
    input, of what the smaller network does not read. `parameters`: of the whole network, before and
    after.
    """

    layers: pd.DataFrame
    kept: Mapping[str, str]
    unread_inputs: Tensor
    parameters: tuple[int, int]
    _channels: Channels
    _batch_axes: Mapping[fx.Node, int]
    _sizes: Mapping[fx.Node, Any]
    _name: str
    _sequential: bool

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            self.layers.to_string(index=False),
            f"parameters {before:,} → {after:,} ({1 - after / max(before, 1):.1%} removed)",
        ]
        lines += [f"kept: {name}: {why}" for name, why in self.kept.items()]
        if len(self.unread_inputs):
            lines.append(f"inputs no longer read: {len(self.unread_inputs)}")
        return "\n".join(lines)

    @torch.no_grad()
    def apply(self) -> nn.Module:
        """The smaller network, in evaluation mode: an `nn.Sequential` where the original was one,
        if it still is a chain, else an `fx.GraphModule`.

        Raises:
            ShrinkError: a value that has become a constant has no axis of rows of its own.
        """
        build = Rebuilt(self._channels, self._batch_axes, self._sizes)
        _tie(self._channels.graph, build.parts)
        layers = [str(n.target) for n in build.graph.nodes if n.op == "call_module"]
        chain = all(
            n.op in ("placeholder", "call_module", "output") and "." not in str(n.target)
            for n in build.graph.nodes
        )
        if self._sequential and chain and len(set(layers)) == len(layers):
            return nn.Sequential(OrderedDict((name, build.parts[name]) for name in layers)).eval()
        return fx.GraphModule(build.parts, build.graph, self._name).eval()


@torch.no_grad()
def shrink_plan(net: nn.Module, masks: Mapping[str, Tensor], example: Tensor) -> ShrinkPlan:
    r"""What `shrink` would remove from `net`, layer by layer; nothing is changed.

    A unit is dead when nothing that lives reads it with a weight other than zero, or when it is a
    constant, since all its incoming weights are zero (or come from constants); then b' ← b' + W'[:,
    i] act(b_i) in the layer that reads it. Both run to a fixed point. A convolution that pads with
    zeros sees a constant that is not zero broken at the edges, so such a channel is kept. The
    smaller network is compared with the masked one before it is given back: see `verification.py`.

    Args:
        net: any module of supported patterns (the error of any other names them); it is not
            changed.
        masks: parameter name → bool tensor, True where the weight lives; ``reduction.masks``, or
            your own. Zeros that are in `net` already count as well, so ``{}`` is enough for an
            exported network.
        example: rows of the input, at least one; its shape and type matter, and its range for the
            inputs that are tried.

    Raises:
        ShrinkError: a mask fits no parameter, the example does not fit the network, a pattern is
            not supported, by name, or the outputs would differ.
    """
    import pandas as pd

    copied = masked(net, masks)
    sequential, name = type(copied) is nn.Sequential, type(copied).__name__
    before = sum(p.numel() for p in copied.parameters())
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        got = (
            f"{example.dtype} of shape {tuple(example.shape)}"
            if isinstance(example, Tensor)
            else type(example).__name__
        )
        raise ShrinkError(
            "example: rows of the network's input are expected, as one tensor with at least one"
            f" row, got {got}; pass some rows of its data"
        )
    with foreign_errors(f"the forward of {name}"):
        other_arguments(copied)
    rows = example[:1].repeat(2, *[1] * (example.ndim - 1))
    inputs = [rows, *inputs_like(example, copied)]
    want = answers(copied, inputs)
    if want.outputs[0] is None:
        raise ShrinkError(
            f"the network does not run on two rows of the example, of shape {tuple(rows.shape)}"
            f" ({want.error}); pass rows of its input"
        )
    graph = trace(copied)
    with foreign_errors(f"the graph of {name}"):
        channels = Channels(graph, rows)
        more = values_of(graph, example[:1].repeat(3, *[1] * (example.ndim - 1)))
        batch_axes = {
            n: batch_axis(v.shape, more[n].shape)
            for n, v in channels.values.items()
            if isinstance(v, Tensor)
        }
        sizes = {
            n: size_in_rows(v, more[n])
            for n, v in channels.values.items()
            if n.op in ("call_function", "call_method") and not has_tensor(v)
        }
        plan = ShrinkPlan(
            pd.DataFrame(),
            {},
            _unread(channels),
            (before, 0),
            channels,
            batch_axes,
            sizes,
            name,
            sequential,
        )
        small = plan.apply()
        check_same_function(want, small, inputs)
        table = _table(channels)
    after = sum(p.numel() for p in small.parameters())
    kept = {
        layer: why
        for layer, why in channels.kept.items()
        if any(str(n.target) == layer and depends(channels, n) for n in graph.graph.nodes)
    }
    return dataclasses.replace(plan, layers=table, kept=kept, parameters=(before, after))


def shrink(net: nn.Module, masks: Mapping[str, Tensor], example: Tensor) -> nn.Module:
    """The smaller network with the function of the masked one: `shrink_plan(net, masks,
    example).apply()`, which see.

    Example:
        >>> small = bmr.shrink(bmr.export(fit.program, reduction.posterior), reduction.masks,
        ...     data.x_test[:1])
    """
    return shrink_plan(net, masks, example).apply()


@torch.no_grad()
def masked(net: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `net`, in evaluation mode, with exact zeros where the masks say so, and plain: what
    `torch.nn.utils.prune` has pruned is zero as well.

    Raises:
        ShrinkError: a mask is not a bool tensor in the shape of a parameter of that name.
    """
    copied = module_copy(plain_module(net).net).eval()
    parameters = dict(copied.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise ShrinkError(
                f"mask '{name}': the network has no such parameter; its parameters are:"
                f" {', '.join(parameters)}"
            )
        if (
            not isinstance(mask, Tensor)
            or mask.dtype != torch.bool
            or mask.shape != parameters[name].shape
        ):
            got = (
                f"{mask.dtype} of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise ShrinkError(
                f"mask '{name}': a bool tensor of shape {tuple(parameters[name].shape)} is wanted,"
                f" got {got}; pass the masks of this network"
            )
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    return plain_module(copied, constraints=True).net.eval()


def _tie(net: nn.Module, parts: Any) -> None:
    """Makes parameters one again that are one in `net`, as an embedding that is read out by its own
    weights, and were cut alike.
    """
    firsts: dict[int, list[nn.Parameter]] = {}
    modules = dict(parts.items())
    for name, parameter in net.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        here = getattr(modules.get(path), own, None)
        if isinstance(here, nn.Parameter):
            same = firsts.setdefault(id(parameter), [])
            first = next((p for p in same if p.shape == here.shape and torch.equal(p, here)), None)
            if first is None:
                same.append(here)
            else:
                setattr(modules[path], own, first)


def _table(channels: Channels) -> pd.DataFrame:
    import pandas as pd

    uses: dict[str, list[fx.Node]] = {}
    for node in channels.graph.graph.nodes:
        if node.op == "call_module" and isinstance(
            getattr(channels.modules[str(node.target)], "weight", None), Tensor
        ):
            uses.setdefault(str(node.target), []).append(node)
    columns = [
        "layer",
        "type",
        "before",
        "after",
        "parameters before",
        "parameters after",
        "FLOPs before",
        "FLOPs after",
    ]
    return pd.DataFrame(
        [_row(channels, name, nodes) for name, nodes in uses.items()], columns=columns
    )


def _row(channels: Channels, name: str, nodes: list[fx.Node]) -> tuple[Any, ...]:
    layer = channels.modules[name]
    weight: Any = layer.weight
    living = [n for n in nodes if isinstance(channels.states[n], State) and depends(channels, n)]
    before = list(weight.shape)
    after = _size_after(channels, layer, living[0]) if living else [0] * len(before)
    rest = {key: p for key, p in layer.named_parameters() if key != "weight"}
    counts = [
        (
            math.prod(size) + sum(math.prod([size[0], *p.shape[1:]]) for p in rest.values())
            if math.prod(size)
            else 0
        )
        for size in (before, after)
    ]
    weighs = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
    positions = [
        sum(channels.values[n].numel() // 2 // weight.shape[0] for n in ns) if weighs else 0
        for ns in (nodes, living)
    ]
    flops = [2 * math.prod(size) * n for size, n in zip((before, after), positions, strict=True)]
    return (
        name,
        type(layer).__name__,
        "×".join(map(str, before)),
        "×".join(map(str, after)),
        *counts,
        *flops,
    )


def _size_after(channels: Channels, layer: Any, node: fx.Node) -> list[int]:
    """The shape of the layer's weight, cut."""
    state, before = channels.states[node], list(layer.weight.shape)
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        axis = -1 if isinstance(layer, nn.Linear) else 1
        inputs = int(channels.living(channels.states[node.args[0]].axes[axis]).sum())  # type: ignore[index]
        return [
            int(channels.living(state.axes[axis]).sum()),
            inputs if getattr(layer, "groups", 1) == 1 else before[1],
            *before[2:],
        ]
    if isinstance(layer, nn.Embedding):
        return [before[0], int(channels.living(state.axes[-1]).sum())]
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) or (
        isinstance(layer, nn.PReLU) and layer.num_parameters > 1
    ):
        return [int(channels.living(state.axes[1]).sum())]
    return before


def _unread(channels: Channels) -> Tensor:
    """Flat indices within a row of the input that no living output reads."""
    graph = channels.graph.graph
    source = next(n for n in graph.nodes if n.op == "placeholder")
    size = channels.values[source][0].numel()
    read = torch.zeros(size + 1, dtype=torch.bool)  # the last is for what pads add
    reads = {r.node: r for r in channels.reads}
    index = {
        source: (
            torch.arange(1, size + 1, dtype=torch.float64).view(
                1, *channels.values[source].shape[1:]
            )
        )
    }
    for node in graph.nodes:
        held = [n for n in node.all_input_nodes if n in index]
        if not held or node.op == "placeholder":
            continue
        here, layer = (
            index[held[0]],
            (channels.modules.get(str(node.target)) if node.op == "call_module" else None),
        )
        if isinstance(layer, (nn.Flatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.Identity, nn.Dropout)):
            index[node] = layer(here)
        elif (
            node.target in RESHAPES
            and node.target not in ("view", "reshape", torch.reshape)
            and len(node.all_input_nodes) == 1
        ):
            args = [here if a is held[0] else a for a in node.args]
            index[node] = (
                node.target(*args, **node.kwargs)
                if callable(node.target)
                else getattr(args[0], node.target)(*args[1:], **node.kwargs)
            )
        elif node in reads:
            r = reads[node]
            needed = torch.from_numpy(r.nonzero[channels.living(r.outputs)].any(0) & ~r.foldable)
            axis = -1 if isinstance(layer, nn.Linear) else 1
            read[here.movedim(axis, 0)[needed].flatten().long() - 1] = True
        elif isinstance(channels.values[node], Tensor) and depends(channels, node):
            read[here.flatten().long() - 1] = True
    return (~read[:size]).nonzero().flatten()
