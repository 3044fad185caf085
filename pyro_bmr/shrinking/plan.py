"""From masks to a smaller network with the same function.

Pruned units, channels and heads are removed, and constants are folded into biases. Owns `shrink`,
`shrink_plan`, `shrink_each` and `compared`. How the network is read is in `exported_graph.py`,
which channels are kept in `analysis.py`. Next: `readers.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.data.given import example_of
from pyro_bmr.data.inputs import described as shapes_of
from pyro_bmr.data.inputs import has_rows, of_each, rows_in
from pyro_bmr.errors import ShrinkError, described, warn
from pyro_bmr.isolation import tensors_on_cpu
from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.cut_graph import CutGraph
from pyro_bmr.shrinking.differences import first_difference
from pyro_bmr.shrinking.exported_graph import ExportedGraph, exported, two_rows
from pyro_bmr.shrinking.home import Home, to_cpu
from pyro_bmr.shrinking.layer_calls import with_layers
from pyro_bmr.shrinking.layer_table import layer_table
from pyro_bmr.shrinking.masked_network import masked
from pyro_bmr.shrinking.own_class import own_class
from pyro_bmr.shrinking.pretrained_config import fitting_config
from pyro_bmr.shrinking.reasons import reasons_of
from pyro_bmr.shrinking.refusals import MASKED, foreign_errors
from pyro_bmr.shrinking.shrink_plan import ShrinkPlan
from pyro_bmr.shrinking.unread_inputs import unread_inputs
from pyro_bmr.shrinking.untied import Groups, tied_again, untied
from pyro_bmr.shrinking.verification import (
    Answers,
    answers,
    check_same_function,
    disagreement,
    inputs_like,
)

_ATTEMPTS = 30  # how many operations may be kept whole because they cannot be cut


def shrink(
    net: nn.Module, masks: Mapping[str, Tensor], example: Any, *, fold_padded: bool = False
) -> nn.Module:
    """The smaller network with the function of the masked one.

    It is `shrink_plan(net, masks, example).apply()`; `shrink_plan` describes the arguments.

    Example:
        >>> small = bmr.shrink(bmr.export(fit.program, reduction.posterior), reduction.masks,
        ...     data.x_test[:1])
    """
    plan = shrink_plan(net, masks, example, fold_padded=fold_padded)
    if plan.config is None:
        warn(
            f"shrink: no configuration of {type(net).__name__} has these sizes, so from_pretrained"
            " cannot load what save_pretrained writes; save the model with"
            " deploy(..., formats=['program']), or keep as many units in each layer"
        )
    return plan._small


@torch.no_grad()
def shrink_plan(
    net: nn.Module, masks: Mapping[str, Tensor], example: Any, *, fold_padded: bool = False
) -> ShrinkPlan:
    r"""What `shrink` would remove from `net`, layer by layer; nothing is changed.

    A unit is removed if no kept unit reads it with a weight other than zero. It is also removed if
    it is constant, because all its incoming weights are zero or come from constants; then
    b' ← b' + W'[:, i] act(b_i) in the layer that reads it. Both rules run to a fixed point. A
    convolution that pads with zeros does not read the same constant at the edges, so such a channel
    is kept unless its constant is zero, or `fold_padded` is given. The smaller network is compared
    with the masked one before it is returned: see `verification.py`. All of this is done on the
    CPU, on a copy; the smaller network is where `net` is.

    Args:
        net: any module that torch.export can read; it is not changed.
        masks: parameter name → bool tensor, True where the weight is kept; ``reduction.masks``, or
            your own. Zeros that are already in `net` count as pruned, so ``{}`` is enough for an
            exported network.
        example: rows of the input, at least one, or data that have them, such as a loader; of
            several inputs a tuple or a dict. Its shape and type matter, and its range, from which
            the inputs for the comparison are drawn.
        fold_padded: whether constant channels that a padded or transposed convolution reads may be
            removed as well. What they add differs at the edges of an image, so it becomes a tensor
            with a number for each pixel, where that is smaller than the weights it saves. The
            result is then a graph for images of the size of the example.

    Raises:
        ShrinkError: a mask fits no parameter, the example does not fit the network, its tensors are
            on several devices or have no values, torch.export cannot read it, or the outputs would
            differ.
    """
    example = example_of(example, net)
    copied = masked(net, masks)
    home = to_cpu(copied)
    with tensors_on_cpu():
        inputs, want = compared(copied, example, home)
    with tensors_on_cpu(), foreign_errors(f"the graph of {type(copied).__name__}"):
        separate, groups = untied(copied)
        graph = exported(separate, inputs[0])
        found = _found(graph, separate, copied, groups, want, inputs, fold_padded)
        table, flops = layer_table(found.analysis, found.cut, separate)
        unread = unread_inputs(found.analysis)
        kept = reasons_of(found.analysis)
        why, small = found.why_a_graph, found.small
        config = {} if why else _configured(small, copied, want, inputs)
    counts = tuple(sum(p.numel() for p in n.parameters()) for n in (copied, small))
    own, parameters = not why, (counts[0], counts[1])
    copied, small = home.back(copied), home.back(small)
    return ShrinkPlan(table, kept, unread, parameters, flops, own, why, config, small, copied)


@torch.no_grad()
def shrink_each(nets: Iterable[nn.Module], example: Any) -> list[nn.Module]:
    """The smaller network of each of `nets`, as `shrink` with ``{}`` for masks gives it.

    They are copies of one network with other numbers in their parameters and buffers, such as draws
    of a posterior: the graph is read from the first, and each result is compared with its own
    network.

    Raises:
        ShrinkError: as `shrink_plan`.
    """
    graph: ExportedGraph | None = None
    smaller: list[nn.Module] = []
    for net in nets:
        example = example_of(example, net)
        copied = masked(net, {})
        home = to_cpu(copied)
        with tensors_on_cpu():
            inputs, want = compared(copied, example, home)
        with tensors_on_cpu(), foreign_errors(f"the graph of {type(copied).__name__}"):
            separate, groups = untied(copied)
            graph = exported(separate, inputs[0]) if graph is None else graph.of(separate)
            small = _found(graph, separate, copied, groups, want, inputs).small
        smaller.append(home.back(small))
    return smaller


@dataclass(frozen=True)
class _Found:
    """The smaller network, and how it was found."""

    analysis: Analysis
    cut: CutGraph
    small: nn.Module
    why_a_graph: str


def _found(
    graph: ExportedGraph, separate: nn.Module, net: nn.Module, groups: Groups, want: Answers,
    inputs: list[Any], maps: bool = False,
) -> _Found:  # fmt: skip
    """The smaller network that gives the answers of the masked one: of its own class, or a graph.

    An operation that turns out not to be cut right is kept whole.

    Raises:
        ShrinkError: the graph does not give the answers even if everything is kept.
    """
    whole: dict[fx.Node, str] = {}
    for _ in range(_ATTEMPTS):
        analysis = Analysis(graph, whole, maps=maps)
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


def _configured(
    small: nn.Module, net: nn.Module, want: Answers, inputs: list[Any]
) -> dict[str, int] | None:
    """Changes the configuration of a Hugging Face model, if there is one that makes it."""
    with torch.random.fork_rng():
        entries = fitting_config(small, net, lambda model: not _differs(model, want, inputs))
    for key, value in (entries or {}).items():
        setattr(small.config, key, value)
    return entries


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


def compared(net: nn.Module, example: Any, home: Home) -> tuple[list[Any], Answers]:
    """The inputs on which the smaller network is compared with the masked one, and the answers of
    that: two rows of the example, one row, and rows like them. `home`: where `net` was.
    """
    _check_example(example)
    # of real numbers three rows are read, of whole ones the range of all
    example = of_each(lambda t: (t[:3] if t.is_floating_point() else t).cpu(), example)
    one = of_each(lambda t: t[2:3] if len(t) > 2 else t[:1], example)
    inputs = [two_rows(example), one, *inputs_like(example, net)[1:]]
    return inputs, _answers_to_keep(net, inputs, home)


def _check_example(example: Any) -> None:
    if not has_rows(example) or rows_in(example) < 1:
        raise ShrinkError(
            "example: expected rows of the network's input, as one tensor with at least one row, or"
            f" a tuple or a dict of them, got {described(example)}; pass some rows of its data"
        )


def _answers_to_keep(net: nn.Module, inputs: list[Any], home: Home) -> Answers:
    """The answers of the masked network, which the smaller one has to give."""
    want = answers(net, inputs)
    if want.outputs[0] is None:
        moved = (
            f", or net.cpu(): it was read on the CPU, not on {home.device}, and takes its device"
            " neither from its input nor from an attribute of a module"
        )
        raise ShrinkError(
            "the network does not run on two rows of the example, of"
            f" {shapes_of(inputs[0])} ({want.error}); pass rows of its input"
            f"{moved if home.device.type != 'cpu' else ''}"
        )
    return want
