"""From masks to a smaller network with the same function: dead units, channels and heads removed, their constants folded into biases.

Owns `shrink`, `shrink_plan` and `ShrinkPlan`. How the network is read is in `graphs.py`, what lives in `channels.py`. Next: `exporting/finite.py`.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, fx, nn

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.channels import Channels
from pyro_bmr.shrinking.graphs import trace, values_of
from pyro_bmr.shrinking.rebuilding import Rebuilt, batch_axis, depends
from pyro_bmr.shrinking.reshapes import RESHAPES
from pyro_bmr.shrinking.ties import State


@dataclass(frozen=True)
class ShrinkPlan:
    """What would go from a network, before anything goes; print it, then `apply()`.

    `layers`: one row per layer with weights: layer, type, before and after (outputs × inputs × kernel), parameters and FLOPs per row of the input,
    each before and after. FLOPs count a multiplication and an addition as two, and the weighted layers only.
    `kept`: layer → why channels of it stay that could have gone. `unread_inputs`: flat indices, within one row of the input, of what the smaller
    network does not read. `parameters`: of the whole network, before and after.
    """

    layers: pd.DataFrame
    kept: Mapping[str, str]
    unread_inputs: Tensor
    parameters: tuple[int, int]
    _channels: Channels
    _batch_axes: Mapping[fx.Node, int]
    _name: str
    _sequential: bool

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [self.layers.to_string(index=False), f"parameters {before:,} → {after:,} ({1 - after / max(before, 1):.1%} removed)"]
        lines += [f"kept: {name}: {why}" for name, why in self.kept.items()]
        if len(self.unread_inputs):
            lines.append(f"inputs no longer read: {len(self.unread_inputs)}")
        return "\n".join(lines)

    @torch.no_grad()
    def apply(self) -> nn.Module:
        """The smaller network, in evaluation mode: an `nn.Sequential` where the original was one, if it still is a chain, else an `fx.GraphModule`.

        Raises:
            ShrinkError: a value that has become a constant has no axis of rows of its own.
        """
        build = Rebuilt(self._channels, self._batch_axes)
        if self._sequential and all(node.op in ("placeholder", "call_module", "output") and "." not in str(node.target) for node in build.graph.nodes):
            return nn.Sequential(OrderedDict((str(n.target), build.parts[str(n.target)]) for n in build.graph.nodes if n.op == "call_module")).eval()
        return fx.GraphModule(build.parts, build.graph, self._name).eval()


@torch.no_grad()
def shrink_plan(net: nn.Module, masks: Mapping[str, Tensor], example: Tensor) -> ShrinkPlan:
    r"""What `shrink` would remove from `net`, layer by layer; nothing is changed.

    A unit is dead when nothing that lives reads it with a weight other than zero, or when it is a constant, since all its incoming weights are zero (or
    come from constants); then b' ← b' + W'[:, i] act(b_i) in the layer that reads it. Both run to a fixed point. A convolution
    that pads with zeros sees a constant that is not zero broken at the edges, so such a channel is kept.

    Args:
        net: any module of supported patterns (the error of any other names them); it is not changed.
        masks: parameter name → bool tensor, True where the weight lives; ``reduction.masks``, or your own. Zeros that are in `net` already count
            as well, so ``{}`` is enough for an exported network.
        example: rows of the input, at least one; only its shape and type matter.

    Raises:
        ShrinkError: a mask fits no parameter, the example does not fit the network, or a pattern is not supported, by name.
    """
    copied = masked(net, masks)
    sequential = type(net) is nn.Sequential
    before = sum(p.numel() for p in copied.parameters())
    graph = trace(copied)
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        raise ShrinkError(f"example: rows of the network's input are wanted, as one tensor; got {example!r}")
    rows = example[:1].expand(2, *example.shape[1:])
    try:
        values_of(graph, rows)
    except Exception as error:  # whatever a user's forward raises on rows that are not its own
        reason = str(error).split("\n")[0]
        raise ShrinkError(f"the network does not run on two rows of the example, of shape {tuple(rows.shape)} ({reason}); pass rows of its input") from None
    channels = Channels(graph, rows)
    more = values_of(graph, rows[:1].expand(3, *rows.shape[1:]))
    batch_axes = {n: batch_axis(v.shape, more[n].shape) for n, v in channels.values.items() if isinstance(v, Tensor)}
    plan = ShrinkPlan(pd.DataFrame(), {}, _unread(channels), (before, 0), channels, batch_axes, type(net).__name__, sequential)
    small = plan.apply()
    table = _table(channels)
    after = sum(p.numel() for p in small.parameters())
    kept = {name: why for name, why in channels.kept.items() if any(str(n.target) == name and depends(channels, n) for n in graph.graph.nodes)}
    return ShrinkPlan(table, kept, plan.unread_inputs, (before, after), channels, batch_axes, type(net).__name__, sequential)


def shrink(net: nn.Module, masks: Mapping[str, Tensor], example: Tensor) -> nn.Module:
    """The smaller network with the function of the masked one: `shrink_plan(net, masks, example).apply()`, which see.

    Example:
        >>> small = bmr.shrink(bmr.export(fit.program, reduction.posterior), reduction.masks, data.x_test[:1])
    """
    return shrink_plan(net, masks, example).apply()


@torch.no_grad()
def masked(net: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `net`, in evaluation mode, with exact zeros where the masks say so.

    Raises:
        ShrinkError: a mask is not a bool tensor in the shape of a parameter of that name.
    """
    copied = copy.deepcopy(net).eval()
    parameters = dict(copied.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise ShrinkError(f"mask '{name}': the network has no such parameter; its parameters are: {', '.join(parameters)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ShrinkError(f"mask '{name}': a bool tensor of shape {tuple(parameters[name].shape)} is wanted, got {got}; pass the masks of this network")
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    return copied


def _table(channels: Channels) -> pd.DataFrame:
    rows = []
    for node in channels.graph.graph.nodes:
        layer = channels.modules.get(str(node.target)) if node.op == "call_module" else None
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        state = channels.states[node]
        gone = not isinstance(state, State) or not depends(channels, node)
        positions = state.value.numel() // 2 // weight.shape[0] if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) else 0
        before = list(weight.shape)
        after = before
        if gone:
            after = [0] * len(before)
        elif isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            out = state.axes[-1] if isinstance(layer, nn.Linear) else state.axes[1]
            source = channels.states[node.args[0]]
            inputs = int(channels.living(source.axes[-1] if isinstance(layer, nn.Linear) else source.axes[1]).sum())
            after = (
                [int(channels.living(out).sum()), inputs if layer.groups == 1 else 1, *before[2:]]
                if not isinstance(layer, nn.Linear)
                else [int(channels.living(out).sum()), inputs]
            )
        elif isinstance(layer, nn.Embedding):
            after = [before[0], int(channels.living(state.axes[-1]).sum())]
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            after = [int(channels.living(state.axes[1]).sum())]
        rest = {name: p for name, p in layer.named_parameters() if name != "weight"}  # type: ignore[union-attr]
        counts = [math.prod(size) + sum(math.prod([size[0], *p.shape[1:]]) for p in rest.values()) if math.prod(size) else 0 for size in (before, after)]
        flops = [2 * math.prod(size) * positions for size in (before, after)]
        rows.append((node.target, type(layer).__name__, "×".join(map(str, before)), "×".join(map(str, after)), *counts, *flops))
    columns = ["layer", "type", "before", "after", "parameters before", "parameters after", "FLOPs before", "FLOPs after"]
    return pd.DataFrame(rows, columns=columns)


def _unread(channels: Channels) -> Tensor:
    """Flat indices within a row of the input that no living output reads."""
    graph = channels.graph.graph
    source = next(n for n in graph.nodes if n.op == "placeholder")
    size = channels.values[source][0].numel()
    read = torch.zeros(size + 1, dtype=torch.bool)  # the last is for what pads add
    reads = {r.node: r for r in channels.reads}
    index = {source: torch.arange(1, size + 1, dtype=torch.float64).view(1, *channels.values[source].shape[1:])}
    for node in graph.nodes:
        held = [n for n in node.all_input_nodes if n in index]
        if not held or node.op == "placeholder":
            continue
        here, layer = index[held[0]], channels.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (nn.Flatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.Identity, nn.Dropout)):
            index[node] = layer(here)
        elif node.target in RESHAPES and node.target not in ("view", "reshape", torch.reshape) and len(node.all_input_nodes) == 1:
            args = [here if a is held[0] else a for a in node.args]
            index[node] = node.target(*args, **node.kwargs) if callable(node.target) else getattr(args[0], node.target)(*args[1:], **node.kwargs)
        elif node in reads:
            r = reads[node]
            needed = torch.from_numpy(r.nonzero[channels.living(r.outputs)].any(0) & ~r.foldable)
            axis = -1 if isinstance(layer, nn.Linear) else 1
            read[here.movedim(axis, 0)[needed].flatten().long() - 1] = True
        elif isinstance(channels.values[node], Tensor) and depends(channels, node):
            read[here.flatten().long() - 1] = True
    return (~read[:size]).nonzero().flatten()
