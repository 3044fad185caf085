"""From masks to a smaller network with the same function.

Pruned units, channels and heads are removed, and constants are folded into biases. Owns `shrink`,
`shrink_plan` and `ShrinkPlan`. How the network is read is in `graphs.py`, which channels are kept
in `channels.py`. Next: `exporting/finite.py`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.data.given import example_of
from pyro_bmr.errors import ShrinkError, described
from pyro_bmr.shrinking.channels import Channels, has_tensor
from pyro_bmr.shrinking.graphs import other_arguments, trace, values_of
from pyro_bmr.shrinking.layer_table import layer_table
from pyro_bmr.shrinking.masked_network import masked
from pyro_bmr.shrinking.rebuilding import Rebuilt
from pyro_bmr.shrinking.refusals import foreign_errors
from pyro_bmr.shrinking.sizes import batch_axis, size_in_rows
from pyro_bmr.shrinking.unread_inputs import unread_inputs
from pyro_bmr.shrinking.verification import Answers, answers, check_same_function, inputs_like

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ShrinkPlan:
    """What would be removed from a network, before anything is: print it, then `apply()`.

    `layers`: one row for each layer with weights: layer, type, before and after (outputs × inputs ×
    kernel), parameters and FLOPs per row of the input, each before and after. FLOPs count a
    multiplication and an addition as two, and only layers that weight their inputs. `kept`: layer →
    why channels of it are kept that could otherwise be pruned. `unread_inputs`: flat indices,
    within one row of the input, that the smaller network does not read. `parameters`: of the whole
    network, before and after.
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
        """The smaller network, in evaluation mode.

        It is an `nn.Sequential` if the original was one and it is still a chain of layers, else an
        `fx.GraphModule`.

        Raises:
            ShrinkError: a value that has become constant has no axis of rows of its own.
        """
        built = Rebuilt(self._channels, self._batch_axes, self._sizes)
        _share_tied_parameters(self._channels.graph, built.parts)
        layers = [str(n.target) for n in built.graph.nodes if n.op == "call_module"]
        chain = all(
            n.op in ("placeholder", "call_module", "output") and "." not in str(n.target)
            for n in built.graph.nodes
        )
        if self._sequential and chain and len(set(layers)) == len(layers):
            return nn.Sequential(OrderedDict((name, built.parts[name]) for name in layers)).eval()
        return fx.GraphModule(built.parts, built.graph, self._name).eval()


def shrink(net: nn.Module, masks: Mapping[str, Tensor], example: Any) -> nn.Module:
    """The smaller network with the function of the masked one.

    It is `shrink_plan(net, masks, example).apply()`; `shrink_plan` describes the arguments.

    Example:
        >>> small = bmr.shrink(bmr.export(fit.program, reduction.posterior), reduction.masks,
        ...     data.x_test[:1])
    """
    return shrink_plan(net, masks, example).apply()


@torch.no_grad()
def shrink_plan(net: nn.Module, masks: Mapping[str, Tensor], example: Any) -> ShrinkPlan:
    r"""What `shrink` would remove from `net`, layer by layer; nothing is changed.

    A unit is removed if no kept unit reads it with a weight other than zero. It is also removed if
    it is constant, because all its incoming weights are zero or come from constants; then
    b' ← b' + W'[:, i] act(b_i) in the layer that reads it. Both rules run to a fixed point. A
    convolution that pads with zeros does not read the same constant at the edges, so such a channel
    is kept unless its constant is zero. The smaller network is compared with the masked one before
    it is returned: see `verification.py`.

    Args:
        net: any module of supported patterns (the error for any other lists them); it is not
            changed.
        masks: parameter name → bool tensor, True where the weight is kept; ``reduction.masks``, or
            your own. Zeros that are already in `net` count as pruned, so ``{}`` is enough for an
            exported network.
        example: rows of the input, at least one, or data that have them, such as a loader. Its
            shape and type matter, and its range, from which the inputs for the comparison are
            drawn.

    Raises:
        ShrinkError: a mask fits no parameter, the example does not fit the network, a pattern is
            not supported, or the outputs would differ.
    """
    example = example_of(example, net)
    copied = masked(net, masks)
    before = sum(p.numel() for p in copied.parameters())
    _check_example(example)
    with foreign_errors(f"the forward of {type(copied).__name__}"):
        other_arguments(copied)
    inputs = [_repeated(example, 2), *inputs_like(example, copied)]
    want = _answers_to_keep(copied, inputs)
    plan = _plan_without_figures(copied, example)
    with foreign_errors(f"the graph of {type(copied).__name__}"):
        small = plan.apply()
        check_same_function(want, small, inputs)
        table = layer_table(plan._channels)
    after = sum(p.numel() for p in small.parameters())
    return dataclasses.replace(plan, layers=table, parameters=(before, after))


def _check_example(example: Any) -> None:
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        raise ShrinkError(
            "example: expected rows of the network's input, as one tensor with at least one row,"
            f" got {described(example)}; pass some rows of its data"
        )


def _answers_to_keep(net: nn.Module, inputs: Sequence[Tensor]) -> Answers:
    """The answers of the masked network, which the smaller one has to give."""
    want = answers(net, inputs)
    if want.outputs[0] is None:
        raise ShrinkError(
            "the network does not run on two rows of the example, of shape"
            f" {tuple(inputs[0].shape)} ({want.error}); pass rows of its input"
        )
    return want


def _repeated(example: Tensor, rows: int) -> Tensor:
    """The first row of the example, this many times."""
    return example[:1].repeat(rows, *[1] * (example.ndim - 1))


def _plan_without_figures(net: nn.Module, example: Tensor) -> ShrinkPlan:
    """The plan for a network with zeros in it, before the table and the number of parameters."""
    import pandas as pd

    sequential, name = type(net) is nn.Sequential, type(net).__name__
    graph = trace(net)
    with foreign_errors(f"the graph of {name}"):
        channels = Channels(graph, _repeated(example, 2))
        # A size that grows with the number of rows is seen by a run on three rows.
        three = values_of(graph, _repeated(example, 3))
        values = channels.values.items()
        batch_axes = {
            n: batch_axis(v.shape, three[n].shape) for n, v in values if isinstance(v, Tensor)
        }
        sizes = {
            n: size_in_rows(v, three[n])
            for n, v in values
            if n.op in ("call_function", "call_method") and not has_tensor(v)
        }
        unread = unread_inputs(channels)
        named = [n for n in graph.graph.nodes if str(n.target) in channels.reasons]
        used = {str(n.target) for n in named if channels.depends(n)}
    kept = {layer: why for layer, why in channels.reasons.items() if layer in used}
    return ShrinkPlan(
        pd.DataFrame(), kept, unread, (0, 0), channels, batch_axes, sizes, name, sequential
    )


def _share_tied_parameters(net: nn.Module, parts: Any) -> None:
    """Shares the parameters of `parts` that were one in `net` and were cut in the same way.

    An example is an embedding whose weights are also those of the last layer.
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
