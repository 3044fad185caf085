"""Which weights read the same hidden unit or channel.

Owns `reader_labels`. A unit can be removed by the weights that lead to it, or by those that read
it. The second costs less: the weights that read the other units make up for it.
Next: `exporting/finite.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_bmr.data.given import example_of
from pyro_bmr.errors import ShrinkError
from pyro_bmr.isolation import tensors_on_cpu
from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.channel_ids import Ids
from pyro_bmr.shrinking.contractions import Read
from pyro_bmr.shrinking.exported_graph import exported
from pyro_bmr.shrinking.home import to_cpu
from pyro_bmr.shrinking.masked_network import masked
from pyro_bmr.shrinking.plan import compared
from pyro_bmr.shrinking.refusals import foreign_errors
from pyro_bmr.shrinking.states import State
from pyro_bmr.shrinking.untied import untied

_TURNS = {"t", "transpose", "permute", "detach", "alias", "numpy_T", "mT"}


def reader_labels(net: nn.Module, example: Any) -> dict[str, Tensor]:
    """Weight → the number of the hidden unit or channel that each of its entries reads, in a shape
    that broadcasts to it, and −1 where it reads none that can be removed. Weights that read only
    inputs of the network, or a residual stream, are left out.

    They are labels for ``per=`` of `prune`, which then removes whole units by the weights that read
    them, in whatever layers these are, and `shrink` takes out what is no longer read. `reduce`
    takes them too; there `kept` counts all weights, and a layer may lose all of its units.

    Args:
        net: any module that torch.export can read; it is not changed.
        example: rows of the input, at least one, or data that have them, as for `shrink`.

    Raises:
        ShrinkError: as `shrink`, or the network has no hidden unit that can be removed.

    Example:
        >>> pruned = prune(net, (x, y), Categorical(), kept=0.5, per=reader_labels(net, x))
        >>> small = shrink(pruned.net, pruned.masks, x)
    """
    example = example_of(example, net)
    copied = masked(net, {})
    home = to_cpu(copied)
    with tensors_on_cpu():
        inputs, _ = compared(copied, example, home)
    with tensors_on_cpu(), foreign_errors(f"the graph of {type(copied).__name__}"), torch.no_grad():
        separate, shared = untied(copied)
        analysis = Analysis(exported(separate, inputs[0]), {})
        read = _read(analysis, {name for names in shared for name in names})
    used = [int(one) for _, ids in read.values() for one in ids if one >= 0]
    numbers = {one: k for k, one in enumerate(dict.fromkeys(used))}
    if not numbers:
        raise ShrinkError(
            f"reader_labels: {type(net).__name__} has no hidden unit that can be removed"
        )
    labels = {}
    for name, (axis, ids) in read.items():
        own = torch.tensor([numbers.get(one, -1) for one in ids.tolist()])
        dims = separate.get_parameter(name).ndim
        labels[name] = own.view([-1 if k == axis else 1 for k in range(dims)])
    return labels


def _read(analysis: Analysis, shared: Collection[str]) -> dict[str, tuple[int, Ids]]:
    """Weight → the axis along which it is multiplied and summed, and the channel that can be
    removed at each position of it, else −1.

    A channel that something else reads, such as a product of two tensors, a computed or a `shared`
    weight, stays. So does one that is all that a weight reads, such as a residual stream that a
    norm keeps together.
    """
    found: dict[str, tuple[int, Ids]] = {}
    bound = [np.array([-1])]
    for read in analysis.reads:
        axes = list(_axes(read, analysis))
        bound += [] if axes or _only_itself(read, analysis) else [analysis.free(read.inputs)]
        for name, axis, ids in axes:
            before = found.setdefault(name, (axis, ids))
            if name in shared or before[0] != axis or not np.array_equal(before[1], ids):
                bound += [before[1], ids]
            if (ids == ids[0]).all():
                bound.append(ids)
    stays = np.unique(np.concatenate(bound))
    free = {n: (axis, np.where(np.isin(ids, stays), -1, ids)) for n, (axis, ids) in found.items()}
    return {name: (axis, ids) for name, (axis, ids) in free.items() if (ids >= 0).any()}


def _only_itself(read: Read, analysis: Analysis) -> bool:
    """Whether each channel goes into one that is removed with it, as in depthwise convolutions."""
    own = analysis.roots(read.inputs)
    return all(np.array_equal(own, analysis.roots(outputs)) for _, outputs in read.tables)


def _axes(read: Read, analysis: Analysis) -> Iterator[tuple[str, int, Ids]]:
    """The parameters with which a sum is weighted, the axis of each, and its channels."""
    of = analysis.roots
    inputs = of(read.inputs).tobytes()
    sums = {(inputs, of(outputs).tobytes()) for _, outputs in read.tables}
    for node in _parameters(read.node, analysis):
        state = analysis.states[node]
        if not isinstance(state, State) or len(state.axes) < 2:
            continue
        sides = [of(axis).tobytes() for axis in state.axes[:2]]
        for axis in (1, 0):
            if (sides[axis], sides[1 - axis]) in sums:
                yield analysis.graph.tensors[node][0], axis, analysis.free(state.axes[axis])
                break


def _parameters(node: fx.Node, analysis: Analysis) -> Iterator[fx.Node]:
    """The parameters that a node multiplies by, as they are or transposed."""
    for given in node.all_input_nodes:
        while given.op == "call_function" and _name(given) in _TURNS:
            given = given.all_input_nodes[0]
        _, value = analysis.graph.tensors.get(given, ("", None))
        if isinstance(value, nn.Parameter):
            yield given


def _name(node: fx.Node) -> str:
    """Of its operation, without that of its overload."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
