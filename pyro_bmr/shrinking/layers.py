"""The state of each supported layer's output: where it is constant, and what the layer reads.

Owns `layer_state`. Next: `functions.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn import functional as F

from pyro_bmr.shrinking.arithmetic import coupled, elementwise, pooled
from pyro_bmr.shrinking.refusals import unsupported
from pyro_bmr.shrinking.reshapes import reshaped
from pyro_bmr.shrinking.states import State, fixed, state_of, states_in, unknown_state
from pyro_bmr.shrinking.ties import Ties

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU,
    nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Softsign,
    nn.LogSigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity,
)  # fmt: skip
_POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip


def layer_state(
    ties: Ties, node: fx.Node, layer: nn.Module, value: Any, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """The state of a layer's output, which was `value` when the network ran.

    Raises:
        ShrinkError: the layer is not a supported one.
    """
    x = args[0] if args else None
    state = None
    if isinstance(x, State) and isinstance(layer, (nn.LSTM, nn.GRU)):
        state = _recurrent(ties, node, layer, value, states_in((args, kwargs)))
    elif isinstance(x, State):
        rule = next((rule for kinds, rule in _RULES if isinstance(layer, kinds)), None)
        state = None if rule is None else rule(ties, node, layer, x)
    if state is None:
        raise unsupported(f"layer '{node.target}' ({type(layer).__name__})")
    return state


def _linear(ties: Ties, node: fx.Node, layer: nn.Linear, x: State) -> State:
    nonzero = layer.weight != 0
    unknown = F.linear(x.unknown.to(layer.weight.dtype), nonzero.to(layer.weight.dtype)) > 0.5
    outputs = ties.shared(f"{node.target} out", ties.new(layer.out_features))
    ties.read(node, x, -1, outputs, nonzero, padded=False)
    return state_of(layer(x.value), unknown, (*x.axes[:-1], outputs))


def _convolution(ties: Ties, node: fx.Node, layer: nn.Conv1d | nn.Conv2d, x: State) -> State:
    nonzero = layer.weight != 0
    indicator = copy.deepcopy(layer)  # its weights are 1 where those of the layer are not 0
    indicator.weight, indicator.bias = nn.Parameter(nonzero.to(layer.weight.dtype)), None
    value, unknown = layer(x.value), indicator(x.unknown.to(layer.weight.dtype)) > 0.5
    for axis in x.axes[2:]:
        ties.fix(axis)
    if layer.groups == 1:
        outputs = ties.shared(f"{node.target} out", ties.new(layer.out_channels))
        weights = nonzero.flatten(2).any(2)
        ties.read(node, x, 1, outputs, weights, padded=_pads_with_zeros(layer))
    elif layer.groups == layer.in_channels:
        inputs = ties.shared(f"{node.target} in", x.axes[1])
        outputs = np.repeat(inputs, layer.out_channels // layer.groups)
    else:
        ties.fix(x.axes[1])
        outputs = fixed((layer.out_channels,))[0]
        reason = f"a convolution in {layer.groups} groups keeps its channels"
        ties.reasons[str(node.target)] = reason
    return state_of(value, unknown, (x.axes[0], outputs, *fixed(value.shape[2:])))


def _pads_with_zeros(layer: nn.Conv1d | nn.Conv2d) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return layer.padding == "same" or any(layer.padding)


def _embedding(ties: Ties, node: fx.Node, layer: nn.Embedding, x: State) -> State | None:
    if layer.max_norm is not None:  # a forward that changes the weights
        return None
    ties.fix_all(x)
    shape = (*x.value.shape, layer.embedding_dim)
    constant = (layer.weight == layer.weight[:1]).all(0)  # the same in every row
    outputs = ties.shared(f"{node.target} out", ties.new(layer.embedding_dim))
    return state_of(layer.weight[0].expand(shape), ~constant.expand(shape), (*x.axes, outputs))


def _batch_norm(
    ties: Ties, node: fx.Node, layer: nn.BatchNorm1d | nn.BatchNorm2d, x: State
) -> State | None:
    if layer.running_mean is None:
        return None
    unknown = x.unknown
    if layer.weight is not None:
        unknown = unknown & (layer.weight != 0).view(1, -1, *[1] * (unknown.ndim - 2))
    ties.shared(f"{node.target} in", x.axes[1])
    return state_of(layer(x.value), unknown, x.axes)


def _layer_norm(ties: Ties, node: fx.Node, layer: nn.LayerNorm | nn.RMSNorm, x: State) -> State:
    ndim = x.value.ndim
    return coupled(ties, node, layer, x, range(ndim - len(layer.normalized_shape), ndim))


def _group_norm(ties: Ties, node: fx.Node, layer: nn.GroupNorm, x: State) -> State:
    ties.couple(node, x.axes[1])
    unknown = x.unknown.flatten(1).any(1).view(-1, *[1] * (x.unknown.ndim - 1))
    return state_of(layer(x.value), unknown.expand_as(x.unknown), x.axes)


def _softmax(
    ties: Ties, node: fx.Node, layer: nn.Softmax | nn.LogSoftmax, x: State
) -> State | None:
    return None if layer.dim is None else coupled(ties, node, layer, x, [layer.dim])


def _prelu(ties: Ties, node: fx.Node, layer: nn.PReLU, x: State) -> State:
    if layer.num_parameters > 1:
        ties.shared(f"{node.target} in", x.axes[1])
    return elementwise(x, layer)


def _pool(ties: Ties, node: fx.Node, layer: nn.Module, x: State) -> State | None:
    if getattr(layer, "return_indices", False):
        return None
    space = 1 if type(layer).__name__.endswith("1d") else 2
    return pooled(ties, layer, x, x.value.ndim - space - 1)


def _recurrent(ties: Ties, node: fx.Node, layer: nn.Module, value: Any, inputs: list[State]) -> Any:
    for state in inputs:
        ties.fix_all(state)
    ties.reasons[str(node.target)] = f"the units of an {type(layer).__name__} are kept"
    return unknown_state(value)


Rule = Callable[[Ties, fx.Node, Any, State], State | None]  # None: the layer is not supported
_RULES: tuple[tuple[Any, Rule], ...] = (
    (nn.Linear, _linear),
    ((nn.Conv1d, nn.Conv2d), _convolution),
    (nn.Embedding, _embedding),
    ((nn.BatchNorm1d, nn.BatchNorm2d), _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Softmax, nn.LogSoftmax), _softmax),
    (nn.PReLU, _prelu),
    (_ELEMENTWISE, lambda ties, node, layer, x: elementwise(x, layer)),
    (_POOLS, _pool),
    ((nn.Flatten, nn.Unflatten), lambda ties, node, layer, x: reshaped(ties, x, layer)),
)
