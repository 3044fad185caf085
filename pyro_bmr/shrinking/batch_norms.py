"""Batch norms folded into the layers before them.

After that a filter that is pruned with its bias is exactly 0, and can be removed. Before, its batch
norm makes a constant of it, which a padded convolution does not read alike everywhere. Owns
`fold_batch_norms`. Next: `layer_table.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmr.data.given import example_of
from pyro_bmr.networks.plain_module import module_copy, plain_module
from pyro_bmr.shrinking.exported_graph import exported, two_rows
from pyro_bmr.shrinking.refusals import foreign_errors
from pyro_bmr.shrinking.states import layer_of, operation
from pyro_bmr.shrinking.verification import answers, check_same_function, inputs_like


@torch.no_grad()
def fold_batch_norms(net: nn.Module, example: Any) -> nn.Module:
    r"""A copy of `net` in evaluation mode, with each batch norm that directly follows a linear
    layer or a convolution folded into it.

    `nn.Identity` takes the place of one of torch's own; one with a function of its own, such as an
    activation, stays, with mean and offset 0, variance 1 − ε and gain 1.

    .. math:: W' = \operatorname{diag}\Big(\tfrac{\gamma}{\sqrt{v + \epsilon}}\Big) W, \qquad
        b' = \tfrac{\gamma}{\sqrt{v + \epsilon}} (b - m) + \beta

    m and v are the running mean and variance, γ and β gain and offset. A layer without a bias gets
    one. A batch norm is left where its layer is used more than once or is read by another part as
    well, or its weight is shared. Prune the filters of the result, with their biases, and `shrink`
    removes them.

    Args:
        net: any module that torch.export can read; it is not changed.
        example: rows of the input, as in `shrink_plan`.

    Raises:
        ShrinkError: torch.export cannot read the network, or the outputs would differ.
    """
    example = example_of(example, net)
    folded = module_copy(plain_module(net).net).eval()
    inputs = [two_rows(example), *inputs_like(example, folded)]
    want = answers(folded, inputs)
    with foreign_errors(f"the graph of {type(folded).__name__}"):
        pairs = list(_pairs(exported(folded, inputs[0]).graph, folded))
    for path, norm in pairs:
        after = folded.get_submodule(norm)
        _fold(folded.get_submodule(path), after)
        if type(after).__module__ == _BatchNorm.__module__:
            _replace(folded, norm, nn.Identity().eval())
        else:
            _make_identity(after)
    check_same_function(want, folded, inputs)
    return folded


def _pairs(graph: fx.Graph, net: nn.Module) -> Iterator[tuple[str, str]]:
    """The paths of a layer and of the batch norm that alone reads it."""
    modules = dict(net.named_modules(remove_duplicate=False))
    held = Counter(id(m) for m in modules.values())
    uses = Counter(layer_of(n) for n in graph.nodes if operation(n) == "batch_norm" or _is_layer(n))
    weights = Counter(id(p) for m in net.modules() for p in m._parameters.values() if p is not None)
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if operation(node) != "batch_norm" or not isinstance(source, fx.Node):
            continue
        path, norm = layer_of(source), layer_of(node)
        layer, after = modules.get(path), modules.get(norm)
        if not _is_layer(source) or len(source.users) > 1 or not isinstance(after, _BatchNorm):
            continue
        alone = uses[path] == uses[norm] == held[id(layer)] == held[id(after)] == 1
        if alone and isinstance(layer, (nn.Linear, _ConvNd)) and weights[id(layer.weight)] == 1:
            yield path, norm


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        operation(node) == "linear" or operation(node).startswith("conv")
    )


def _fold(layer: Any, norm: Any) -> None:
    """Gives `layer` the weight and the bias of the formula."""
    ones = torch.ones_like(norm.running_var)
    gain, offset = (norm.weight, norm.bias) if norm.affine else (ones, 0 * ones)
    scale, weight = gain * (norm.running_var + norm.eps).rsqrt(), layer.weight
    if isinstance(layer, _ConvTransposeNd):  # inputs × outputs of a group × kernel
        groups = layer.groups
        parts = weight.view(groups, -1, *weight.shape[1:])
        factor = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        weight.copy_((parts * factor).view_as(weight))
    else:
        weight.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))
    bias = 0 if layer.bias is None else layer.bias
    layer.bias = nn.Parameter((bias - norm.running_mean) * scale + offset)


def _make_identity(norm: Any) -> None:
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.affine:
        norm.weight.fill_(1)
        norm.bias.zero_()


def _replace(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    net.get_submodule(parent)._modules[name] = module
