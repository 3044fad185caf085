"""From masks to a smaller network with the same function.

Pruned units, channels and heads are removed, and constants are folded into biases. Owns `shrink`,
`shrink_plan` and `ShrinkPlan`. How the network is read is in `exported_graph.py`, which channels
are kept in `analysis.py`. Next: `exporting/finite.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.data.given import example_of
from pyro_bmr.data.inputs import described as shapes_of
from pyro_bmr.data.inputs import has_rows, rows_in
from pyro_bmr.errors import ShrinkError, described
from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.differences import first_difference
from pyro_bmr.shrinking.exported_graph import ExportedGraph, exported, two_rows
from pyro_bmr.shrinking.layer_calls import with_layers
from pyro_bmr.shrinking.layer_table import layer_table
from pyro_bmr.shrinking.masked_network import masked
from pyro_bmr.shrinking.own_class import own_class
from pyro_bmr.shrinking.reasons import reasons_of
from pyro_bmr.shrinking.refusals import MASKED, foreign_errors
from pyro_bmr.shrinking.unread_inputs import unread_inputs
from pyro_bmr.shrinking.untied import Groups, tied_again, untied
from pyro_bmr.shrinking.verification import (
    Answers,
    answers,
    check_same_function,
    disagreement,
    inputs_like,
)

if TYPE_CHECKING:
    import pandas as pd

_ATTEMPTS = 30  # how many operations may be kept whole because they cannot be cut


@dataclass(frozen=True)
class ShrinkPlan:
    """What would be removed from a network, before anything is: print it, then `apply()`.

    `layers`: one row for each layer with weights: layer, type, before and after (the shape of its
    weight), parameters and FLOPs per row of the input, each before and after. FLOPs count a
    multiplication and an addition as two, and only layers that weight their inputs. `kept`: layer →
    why channels of it are kept that could otherwise be pruned. `unread_inputs`: flat indices,
    within one row of the input, that the smaller network does not read; those of several inputs
    follow one another. `parameters` and `flops`: of the whole network, before and after.
    `own_class`: whether the smaller network is of the class of the original; else it is the graph
    of its operations as an `fx.GraphModule`, for the reason `why_a_graph`.
    """

    layers: pd.DataFrame
    kept: Mapping[str, str]
    unread_inputs: Tensor
    parameters: tuple[int, int]
    flops: tuple[int, int]
    own_class: bool
    why_a_graph: str
    _small: nn.Module

    def __str__(self) -> str:
        (before, after), (flops, fewer) = self.parameters, self.flops
        form = type(self._small).__name__ if self.own_class else "a graph of operations"
        why = f" ({self.why_a_graph})" if self.why_a_graph else ""
        lines = [
            self.layers.to_string(index=False),
            f"parameters {before:,} → {after:,} ({1 - after / max(before, 1):.1%} removed)",
            f"FLOPs {flops:,} → {fewer:,} ({1 - fewer / max(flops, 1):.1%} removed)",
            f"result: {form}{why}",
        ]
        lines += [f"kept: {name}: {why}" for name, why in self.kept.items()]
        if len(self.unread_inputs):
            lines.append(f"inputs no longer read: {len(self.unread_inputs)}")
        return "\n".join(lines)

    @torch.no_grad()
    def apply(self) -> nn.Module:
        """The smaller network, in evaluation mode.

        It is of the class of the original, with smaller tensors, if that computes the same
        (`own_class`); else an `fx.GraphModule`, whose tensors have the names of the original's.
        """
        return copy.deepcopy(self._small)


def shrink(net: nn.Module, masks: Mapping[str, Tensor], example: Any) -> nn.Module:
    """The smaller network with the function of the masked one.

    It is `shrink_plan(net, masks, example).apply()`; `shrink_plan` describes the arguments.

    Example:
        >>> small = bmr.shrink(bmr.export(fit.program, reduction.posterior), reduction.masks,
        ...     data.x_test[:1])
    """
    return shrink_plan(net, masks, example)._small


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
        net: any module that torch.export can read; it is not changed.
        masks: parameter name → bool tensor, True where the weight is kept; ``reduction.masks``, or
            your own. Zeros that are already in `net` count as pruned, so ``{}`` is enough for an
            exported network.
        example: rows of the input, at least one, or data that have them, such as a loader; of
            several inputs a tuple or a dict. Its shape and type matter, and its range, from which
            the inputs for the comparison are drawn.

    Raises:
        ShrinkError: a mask fits no parameter, the example does not fit the network, torch.export
            cannot read it, or the outputs would differ.
    """
    example = example_of(example, net)
    copied = masked(net, masks)
    _check_example(example)
    inputs = [two_rows(example), *inputs_like(example, copied)]
    want = _answers_to_keep(copied, inputs)
    with foreign_errors(f"the graph of {type(copied).__name__}"):
        separate, groups = untied(copied)
        graph = exported(separate, inputs[0])
        found = _found(graph, separate, copied, groups, want, inputs)
        table, flops = layer_table(found.analysis, found.cut, separate)
        unread = unread_inputs(found.analysis)
        kept = reasons_of(found.analysis)
    counts = tuple(sum(p.numel() for p in n.parameters()) for n in (copied, found.small))
    own, parameters = not found.why_a_graph, (counts[0], counts[1])
    return ShrinkPlan(table, kept, unread, parameters, flops, own, found.why_a_graph, found.small)


@dataclass(frozen=True)
class _Found:
    """The smaller network, and how it was found."""

    analysis: Analysis
    cut: CutGraph
    small: nn.Module
    why_a_graph: str


def _found(
    graph: ExportedGraph, separate: nn.Module, net: nn.Module, groups: Groups, want: Answers,
    inputs: list[Any],
) -> _Found:  # fmt: skip
    """The smaller network that gives the answers of the masked one: of its own class, or a graph.

    An operation that turns out not to be cut right is kept whole.

    Raises:
        ShrinkError: the graph does not give the answers even if everything is kept.
    """
    whole: dict[fx.Node, str] = {}
    for _ in range(_ATTEMPTS):
        analysis = Analysis(graph, whole)
        cut = CutGraph(analysis)
        node = cut.failed
        if node is None:
            own, why = own_class(net, analysis, cut, groups)
            if own is not None and not _differs(own, want, inputs):
                return _Found(analysis, cut, own, "")
            small = _graph(separate, analysis, *_two_rows_only(graph, want, inputs))
            if small is not None:
                small = tied_again(small, groups)
                _check_rows(graph, want, small, inputs)
                why = why or "its forward computes with the sizes of its layers"
                return _Found(analysis, cut, small, why)
            node = first_difference(separate, analysis, cut, inputs, want.double)
        if node is None or node in whole:
            check_same_function(want, cut.module(type(net).__name__), inputs)
            break
        whole[node] = f"'{node.name}' cannot be cut"
    raise ShrinkError(
        f"{type(net).__name__}: operations cannot be cut ({', '.join(n.name for n in whole)});"
        f" {MASKED}"
    )


def _graph(
    net: nn.Module, analysis: Analysis, want: Answers, inputs: list[Any]
) -> nn.Module | None:
    """The smaller graph, with layers of torch where it can call them; None if it is not right."""
    cut, name = CutGraph(analysis), type(net).__name__
    layers = with_layers(net, analysis, cut)
    small = cut.module(name, layers)
    if not _differs(small, want, inputs):
        return small
    small = CutGraph(analysis).module(name)
    return small if layers and not _differs(small, want, inputs) else None


def _differs(net: nn.Module, want: Answers, inputs: list[Any]) -> str:
    return disagreement(want, answers(net, inputs, want.double))


def _two_rows_only(
    graph: ExportedGraph, want: Answers, inputs: list[Any]
) -> tuple[Answers, list[Any]]:
    """The inputs that a graph can run on, with their answers: those of two rows, if the number of
    rows has become a constant.
    """
    if graph.open_rows:
        return want, inputs
    fits = [k for k, x in enumerate(inputs) if rows_in(x) == 2]
    outputs = [want.outputs[k] for k in fits]
    return dataclasses.replace(want, outputs=outputs), [inputs[k] for k in fits]


def _check_rows(graph: ExportedGraph, want: Answers, small: nn.Module, inputs: list[Any]) -> None:
    """Raises a ShrinkError if the graph is right for two rows only."""
    if not graph.open_rows and _differs(small, want, inputs):
        raise ShrinkError(
            "the number of rows becomes a constant while torch.export reads the forward; write"
            f" `x.shape[0]` in the place of `len(x)` and of numbers of rows; or {MASKED}"
        )


def _check_example(example: Any) -> None:
    if not has_rows(example) or rows_in(example) < 1:
        raise ShrinkError(
            "example: expected rows of the network's input, as one tensor with at least one row, or"
            f" a tuple or a dict of them, got {described(example)}; pass some rows of its data"
        )


def _answers_to_keep(net: nn.Module, inputs: list[Any]) -> Answers:
    """The answers of the masked network, which the smaller one has to give."""
    want = answers(net, inputs)
    if want.outputs[0] is None:
        raise ShrinkError(
            "the network does not run on two rows of the example, of"
            f" {shapes_of(inputs[0])} ({want.error}); pass rows of its input"
        )
    return want
