"""What each supported operation means for channels: what of its output is constant, which channels
it ties, which it reads.

Owns `layer_state`, `function_state` and `SUPPORTED`. Next: `channels.py`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.graphs import MASKED
from pyro_bmr.shrinking.reshapes import (
    PERMUTES,
    RESHAPES,
    concatenated,
    expanded,
    indexed,
    permuted,
    reshaped,
)
from pyro_bmr.shrinking.ties import Axes, State, Ties, fixed

_ELEMENTWISE_LAYERS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU,
    nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Identity,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS: set[Any] = {
    *(getattr(F, name) for name in ("relu", "relu6", "tanh", "sigmoid", "gelu", "silu", "elu",
    "celu", "selu", "leaky_relu", "softplus", "hardtanh",
      "hardswish", "hardsigmoid", "mish", "softsign", "logsigmoid")),
    torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.abs, torch.neg, torch.square,
    torch.clone, operator.neg,
    "relu", "tanh", "sigmoid", "exp", "abs", "neg", "square", "clone", "contiguous", "detach",
}  # fmt: skip
_BINARY: set[Any] = {
    torch.add, torch.sub, torch.mul, operator.add, operator.sub, operator.mul, operator.iadd,
    operator.imul, operator.truediv,
    "add", "sub", "mul", "add_", "mul_",
}  # fmt: skip
_POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip
_POOL_FUNCTIONS: set[Any] = {
    F.max_pool1d,
    F.max_pool2d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
}
_MEANS: set[Any] = {torch.mean, torch.sum, "mean", "sum"}
_SOFTMAXES: set[Any] = {
    torch.softmax,
    F.softmax,
    F.log_softmax,
    torch.log_softmax,
    "softmax",
    "log_softmax",
}

SUPPORTED = (
    "Linear, Conv1d, Conv2d, BatchNorm, LayerNorm, GroupNorm, RMSNorm, elementwise activations,"
    " dropout, pooling, padding, flatten and other reshapes, transpose, sums and products, mean,"
    " concatenation, indexing, softmax, scaled dot-product attention, MultiheadAttention,"
    " TransformerEncoder(Layer), Embedding, LSTM, GRU"
)


def layer_state(
    ties: Ties,
    node: fx.Node,
    layer: nn.Module,
    value: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The state of a layer's output; `value`: what it gave when run. Raises ShrinkError if it is
    not a supported one.
    """
    x = args[0] if args else None
    refusal = _refusal(f"layer '{node.target}' ({type(layer).__name__})")
    if not isinstance(x, State):
        raise refusal
    if isinstance(layer, nn.Linear):
        return _linear(ties, node, layer, x)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return _conv(ties, node, layer, x)
    if isinstance(layer, nn.Embedding) and layer.max_norm is None:
        ties.fix_all(x)
        same = (layer.weight == layer.weight[:1]).all(0)
        unknown = ~same.expand(value.shape)
        outputs = ties.shared(f"{node.target} out", ties.new(layer.embedding_dim))
        return State(
            layer.weight[0].expand(value.shape).masked_fill(unknown, 0), unknown, (*x.axes, outputs)
        )
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_mean is not None:
        gone = (
            torch.zeros_like(x.unknown)
            if layer.weight is None
            else (layer.weight == 0).view(1, -1, *[1] * (x.unknown.ndim - 2)).expand_as(x.unknown)
        )
        ties.shared(f"{node.target} in", x.axes[1])
        return _state(layer(x.value), x.unknown & ~gone, x.axes)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return _coupled(
            ties, node, layer, x, range(x.value.ndim - len(layer.normalized_shape), x.value.ndim)
        )
    if isinstance(layer, nn.GroupNorm):
        ties.couple(node, x.axes[1])
        unknown = (
            x.unknown.flatten(1).any(1).view(-1, *[1] * (x.unknown.ndim - 1)).expand_as(x.unknown)
        )
        return _state(layer(x.value), unknown, x.axes)
    if isinstance(layer, (nn.Softmax, nn.LogSoftmax)) and layer.dim is not None:
        return _coupled(ties, node, layer, x, [layer.dim])
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        ties.shared(f"{node.target} in", x.axes[1])
    if isinstance(layer, (*_ELEMENTWISE_LAYERS, nn.PReLU)):
        return _state(layer(x.value), x.unknown, x.axes)
    if isinstance(layer, _POOLS) and not getattr(layer, "return_indices", False):
        return _pool(ties, layer, x, _channel_axis(layer, x))
    if isinstance(layer, (nn.Flatten, nn.Unflatten)):
        return reshaped(ties, x, layer)
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        for state in states_in((args, kwargs)):
            ties.fix_all(state)
        ties.kept[str(node.target)] = f"the units of an {type(layer).__name__} are kept"
        return _all_unknown(value)
    raise refusal


def function_state(ties: Ties, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state of what a function or method gives. Raises ShrinkError if it is not a supported
    one.
    """
    target: Any = node.target
    refusal = _refusal(f"'{getattr(target, '__name__', target)}' at '{node.name}'")
    # what is known of a value need not lie in memory as the value does
    name = "reshape" if target == "view" else target
    run: Callable[..., Any] = (
        (lambda first, *rest, **named: getattr(first, name)(*rest, **named))
        if node.op == "call_method"
        else target
    )
    x = args[0] if args else None
    if target in _BINARY and all(isinstance(a, (State, int, float)) for a in args) and not kwargs:
        return _binary(ties, run, args)
    if target is operator.getitem and isinstance(x, (tuple, list)):
        return x[args[1]]
    if target in (torch.cat, torch.concat, "cat") and all(isinstance(s, State) for s in args[0]):
        return concatenated(ties, args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
    if target is F.scaled_dot_product_attention:
        return _attention(ties, node, args, kwargs)
    if not isinstance(x, State) or len(states_in((args, kwargs))) > 1:
        raise refusal
    if target is F.dropout and not kwargs.get("training", args[2] if len(args) > 2 else True):
        return x
    if target in _ELEMENTWISE_FUNCTIONS:
        return _state(run(x.value, *args[1:], **kwargs), x.unknown, x.axes)
    if target in _POOL_FUNCTIONS:
        return _pool(
            ties,
            lambda t: run(t, *args[1:], **kwargs),
            x,
            x.value.ndim - (1 if "1d" in target.__name__ else 2) - 1,
        )
    if target in RESHAPES:
        return reshaped(ties, x, lambda t: run(t, *args[1:], **kwargs))
    if target in PERMUTES:
        return permuted(x, lambda t: run(t, *args[1:], **kwargs))
    if target in ("expand", "expand_as"):
        return expanded(x, lambda t: run(t, *args[1:], **kwargs))
    if target in _MEANS:
        return _mean(ties, run, x, args[1:], kwargs)
    if target in _SOFTMAXES and isinstance(
        dim := kwargs.get("dim", args[1] if len(args) > 1 else None), int
    ):
        return _coupled(ties, node, lambda t: run(t, *args[1:], **kwargs), x, [dim])
    if target is operator.getitem:
        return indexed(ties, x, args[1])
    if target in (torch.chunk, torch.split, "chunk", "split"):
        ties.fix_all(x)
        parts = zip(
            run(x.value, *args[1:], **kwargs), run(x.unknown, *args[1:], **kwargs), strict=True
        )
        return tuple(State(value, unknown, fixed(value.shape)) for value, unknown in parts)
    raise refusal


def _linear(ties: Ties, node: fx.Node, layer: nn.Linear, x: State) -> State:
    nonzero = layer.weight != 0
    unknown = F.linear(x.unknown.to(layer.weight.dtype), nonzero.to(layer.weight.dtype)) > 0.5
    outputs = ties.shared(f"{node.target} out", ties.new(layer.out_features))
    ties.read(node, x, -1, outputs, nonzero, padded=False)
    return _state(layer(x.value), unknown, (*x.axes[:-1], outputs))


def _conv(ties: Ties, node: fx.Node, layer: nn.Conv1d | nn.Conv2d, x: State) -> State:
    nonzero = layer.weight != 0
    probe = copy.deepcopy(layer)
    probe.weight, probe.bias = nn.Parameter(nonzero.to(layer.weight.dtype)), None
    value, unknown = layer(x.value), probe(x.unknown.to(layer.weight.dtype)) > 0.5
    channels, space = layer.out_channels, x.axes[2:]
    for axis in space:
        ties.fix(axis)
    if layer.groups == 1:
        outputs = ties.shared(f"{node.target} out", ties.new(channels))
        padded = (
            layer.padding_mode == "zeros"
            and layer.padding != "valid"
            and (layer.padding == "same" or any(layer.padding))
        )  # type: ignore[arg-type]
        ties.read(node, x, 1, outputs, nonzero.flatten(2).any(2), padded=padded)
    elif layer.groups == layer.in_channels:
        outputs = np.repeat(ties.shared(f"{node.target} in", x.axes[1]), channels // layer.groups)
    else:
        ties.fix(x.axes[1])
        outputs = fixed((channels,))[0]
        ties.kept[str(node.target)] = f"a convolution in {layer.groups} groups keeps its channels"
    return _state(value, unknown, (x.axes[0], outputs, *fixed(value.shape[2:])))


def _coupled(
    ties: Ties, node: fx.Node, run: Callable[[Tensor], Tensor], x: State, dims: Sequence[int]
) -> State:
    for dim in dims:
        ties.couple(node, x.axes[dim])
    unknown = (
        x.unknown.any(dim=tuple(dims), keepdim=True).expand_as(x.unknown) if dims else x.unknown
    )
    return _state(run(x.value), unknown, x.axes)


def _pool(ties: Ties, run: Callable[[Tensor], Tensor], x: State, channel: int) -> State:
    for axis in x.axes[channel + 1 :]:
        ties.fix(axis)
    value = run(x.value)
    # what a pad adds is known, whatever its value
    unknown = run(x.unknown.to(value.dtype)) != run(torch.zeros_like(x.value))
    return _state(value, unknown, (*x.axes[: channel + 1], *fixed(value.shape[channel + 1 :])))


def _binary(ties: Ties, run: Callable[..., Tensor], args: tuple[Any, ...]) -> State:
    states = [a for a in args if isinstance(a, State)]
    value = run(*(a.value if isinstance(a, State) else a for a in args))
    unknown = states[0].unknown if len(states) == 1 else states[0].unknown | states[1].unknown
    if len(states) == 1:
        return _state(value, unknown, states[0].axes)
    a, b = (((np.zeros(1, dtype=np.int64),) * (value.ndim - s.value.ndim) + s.axes) for s in states)
    axes = []
    for p, q in zip(a, b, strict=True):
        if len(p) == len(q):
            ties.tie(p, q)
        else:
            ties.fix(p if len(p) == 1 else q)
        axes.append(p if len(p) >= len(q) else q)
    return _state(value, unknown.expand(value.shape), tuple(axes))


def _attention(ties: Ties, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
    named = (
        dict(
            zip(
                ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False
            )
        )
        | kwargs
    )
    q, k, v = (named[name] for name in ("query", "key", "value"))
    if (
        named.get("attn_mask") is not None
        or named.get("dropout_p")
        or named.get("enable_gqa")
        or q.value.ndim < 3
        or not all(isinstance(s, State) for s in (q, k, v))
    ):
        raise ShrinkError(
            f"'{node.name}': scaled dot-product attention with a mask, dropout or grouped queries"
            f" is not supported; {MASKED}"
        )
    for axis in (q.axes[-1], k.axes[-1], k.axes[-2], v.axes[-2]):
        ties.fix(axis)
    for p, o, r in zip(q.axes[:-2], k.axes[:-2], v.axes[:-2], strict=True):
        ties.tie(p, o)
        ties.tie(p, r)
    # the weights of attention sum to 1: what is the same at every position stays as it is
    moves = v.unknown.any(-2, keepdim=True) | (v.value != v.value[..., :1, :]).any(-2, keepdim=True)
    shape = (*q.value.shape[:-1], v.value.shape[-1])
    return _state(
        v.value[..., :1, :].expand(shape), moves.expand(shape), (*q.axes[:-1], v.axes[-1])
    )


def _mean(
    ties: Ties, run: Callable[..., Tensor], x: State, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> State:
    dim = rest[0] if rest else kwargs.get("dim")
    dims = {
        d % x.value.ndim for d in ((dim,) if isinstance(dim, int) else dim or range(x.value.ndim))
    }
    keep = bool(kwargs.get("keepdim", rest[1] if len(rest) > 1 else False))
    for d in dims:
        ties.fix(x.axes[d])
    unknown = x.unknown.any(dim=tuple(dims), keepdim=keep)
    axes = tuple(
        fixed((1,))[0] if d in dims else axis
        for d, axis in enumerate(x.axes)
        if keep or d not in dims
    )
    return _state(run(x.value, *rest, **kwargs), unknown, axes)


def _refusal(what: str) -> ShrinkError:
    return ShrinkError(f"{what} is not a supported pattern; supported are {SUPPORTED}; {MASKED}")


def _state(value: Tensor, unknown: Tensor, axes: Axes) -> State:
    return State(value.masked_fill(unknown, 0), unknown, axes)


def _all_unknown(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_all_unknown(part) for part in value)
    return State(
        torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool), fixed(value.shape)
    )


def _channel_axis(layer: nn.Module, x: State) -> int:
    return x.value.ndim - (1 if type(layer).__name__.endswith("1d") else 2) - 1


def states_in(tree: Any) -> list[State]:
    """The states among the arguments of an operation."""
    found: list[State] = []

    def visit(item: Any) -> None:
        if isinstance(item, State):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            for part in item:
                visit(part)
        elif isinstance(item, dict):
            for part in item.values():
                visit(part)

    visit(tree)
    return found
