r"""Which channels of a network live: what is constant, what is tied to what, what is read.

Owns `Channels`, the analysis of a graph. Each operation says three things of its output.

- `unknown`, entry by entry: whether it depends on the input at all; where it does not, `value` is the constant. A unit whose incoming weights are
  all zero is known: it is its bias through the activation.
- `axes`: for each axis the identity of every position. Positions with the same identity live and die together, as the channels that a residual sum
  ties. Identity 0 (`FIXED`) never goes: rows of the batch, pixels, outputs of the network.
- a `Read`, if it weighs channels: a channel is needed when a living output reads it with a weight other than zero, unless it is constant
  and its constant can be folded into the bias.

What is not needed goes. Next: `shrinking.py`.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pyro_bmr.errors import ShrinkError
from pyro_bmr.graphs import MASKED, values_of

FIXED = 0
Axes = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class State:
    """What is known of one value of the graph; `value` is 0 where it is unknown."""

    value: Tensor
    unknown: Tensor
    axes: Axes


@dataclass(frozen=True)
class Read:
    """A layer that weighs its inputs: `nonzero` (outputs, inputs), `foldable` (inputs), the constants in `level` (inputs)."""

    node: fx.Node
    inputs: np.ndarray
    outputs: np.ndarray
    nonzero: np.ndarray
    foldable: np.ndarray
    level: Tensor


_ELEMENTWISE_LAYERS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS: set[Any] = {
    *(getattr(F, name) for name in ("relu", "relu6", "tanh", "sigmoid", "gelu", "silu", "elu", "celu", "selu", "leaky_relu", "softplus", "hardtanh",
      "hardswish", "hardsigmoid", "mish", "softsign", "logsigmoid")),
    torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.abs, torch.neg, torch.square, torch.clone, operator.neg,
    "relu", "tanh", "sigmoid", "exp", "abs", "neg", "square", "clone", "contiguous", "detach",
}  # fmt: skip
_BINARY: set[Any] = {
    torch.add, torch.sub, torch.mul, operator.add, operator.sub, operator.mul, operator.iadd, operator.imul, operator.truediv, "add", "sub", "mul", "add_", "mul_"
}  # fmt: skip
_POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip
_POOL_FUNCTIONS: set[Any] = {F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d}
RESHAPES: set[Any] = {
    torch.flatten,
    torch.reshape,
    torch.unsqueeze,
    torch.squeeze,
    torch.unflatten,
    "flatten",
    "reshape",
    "view",
    "unsqueeze",
    "squeeze",
    "unflatten",
}
_PERMUTES: set[Any] = {torch.transpose, torch.permute, "transpose", "permute", "swapaxes", torch.swapaxes}
_MEANS: set[Any] = {torch.mean, torch.sum, "mean", "sum"}
_SOFTMAXES: set[Any] = {torch.softmax, F.softmax, F.log_softmax, torch.log_softmax, "softmax", "log_softmax"}

SUPPORTED = (
    "Linear, Conv1d, Conv2d, BatchNorm, LayerNorm, GroupNorm, RMSNorm, elementwise activations, dropout, pooling, padding, flatten and other reshapes, transpose, "
    "sums and products, mean, concatenation, indexing, softmax, scaled dot-product attention, MultiheadAttention, TransformerEncoder(Layer), Embedding, LSTM, GRU"
)


class Channels:
    """The analysis of `graph` on `x` (two rows). `states`: node → `State`; `alive(axes)`: which positions stay; `kept`: node → why channels stay.

    Raises:
        ShrinkError: an operation of the graph is not among the supported ones.
    """

    def __init__(self, graph: fx.GraphModule, x: Tensor) -> None:
        self.graph, self.reads, self.kept = graph, list[Read](), dict[str, str]()
        self._parent = [FIXED]
        self.values = values_of(graph, x)
        self.modules = dict(graph.named_modules())
        self.states: dict[fx.Node, Any] = {}
        _refuse_layers_used_twice(graph, self.modules)
        with torch.no_grad():
            for node in graph.graph.nodes:
                self.states[node] = self._visit(node)
        self._living = self._mark()

    def alive(self, axes: Axes) -> tuple[np.ndarray, ...]:
        """For each axis, the positions that stay, as bools."""
        return tuple(self._living[self._roots(axis)] for axis in axes)

    def living(self, ids: np.ndarray) -> np.ndarray:
        """The identities that stay, as bools."""
        return self._living[self._roots(ids)]

    # identities

    def _new(self, count: int) -> np.ndarray:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def _roots(self, ids: np.ndarray) -> np.ndarray:
        return np.array([self._root(int(i)) for i in ids], dtype=np.int64)

    def _tie(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in {(int(i), int(j)) for i, j in zip(a, b, strict=True)}:
            low, high = sorted((self._root(i), self._root(j)))
            self._parent[high] = low  # FIXED is the lowest and wins

    def _fix(self, ids: np.ndarray) -> None:
        self._tie(ids, np.zeros_like(ids))

    def _tie_all(self, ids: np.ndarray) -> None:
        self._tie(ids[1:], ids[:-1])

    def _tracked(self, ids: np.ndarray) -> bool:
        return bool((self._roots(ids) != FIXED).any())

    def _mark(self) -> np.ndarray:
        """The least set of identities that is closed under: what a living output reads, lives."""
        living = np.zeros(len(self._parent), dtype=bool)
        living[FIXED] = True
        reads = [(self._roots(r.inputs), self._roots(r.outputs), r) for r in reversed(self.reads)]
        before = -1
        while before != (before := int(living.sum())):
            for inputs, outputs, read in reads:
                needed = read.nonzero[living[outputs]].any(0) & ~read.foldable
                living[inputs[needed]] = True
        return living

    # operations

    def _visit(self, node: fx.Node) -> Any:
        value = self.values[node]
        if node.op == "placeholder":
            if not isinstance(value, Tensor):
                raise ShrinkError(f"'{node.name}': networks of one input tensor are supported, this argument is not a tensor; {MASKED}")
            return State(torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool), _fixed(value.shape))
        if node.op == "get_attr":
            if not isinstance(value, Tensor):
                return value
            axes = tuple(self._new(n) if n > 1 else np.zeros(1, dtype=np.int64) for n in value.shape)
            return State(value, torch.zeros_like(value, dtype=torch.bool), axes)
        args: tuple[Any, ...] = fx.node.map_arg(node.args, lambda n: self.states[n])
        kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, lambda n: self.states[n])
        if node.op == "output":
            for state in _states(args):
                for axis in state.axes:
                    self._fix(axis)
            return None
        if not _states((args, kwargs)) or not _has_tensor(value):
            return value  # sizes and other numbers
        if node.op == "call_module":
            return self._layer(node, self.modules[str(node.target)], args, kwargs)
        return self._function(node, node.target, args, kwargs)

    def _layer(self, node: fx.Node, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else None
        if not isinstance(x, State):
            raise self._refusal(node)
        if isinstance(layer, nn.Linear):
            return self._linear(node, layer, x)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            return self._conv(node, layer, x)
        if isinstance(layer, nn.Embedding) and layer.max_norm is None:
            self._fix_all(x)
            values = self.values[node]
            same = (layer.weight == layer.weight[:1]).all(0)
            unknown = ~same.expand(values.shape)
            return State(layer.weight[0].expand(values.shape).masked_fill(unknown, 0), unknown, (*x.axes, self._new(layer.embedding_dim)))
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_mean is not None:
            gone = torch.zeros_like(x.unknown) if layer.weight is None else (layer.weight == 0).view(1, -1, *[1] * (x.unknown.ndim - 2)).expand_as(x.unknown)
            return _state(layer(x.value), x.unknown & ~gone, x.axes)
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            return self._coupled(node, layer, x, range(x.value.ndim - len(layer.normalized_shape), x.value.ndim))
        if isinstance(layer, nn.GroupNorm):
            self._couple(node, x.axes[1])
            unknown = x.unknown.flatten(1).any(1).view(-1, *[1] * (x.unknown.ndim - 1)).expand_as(x.unknown)
            return _state(layer(x.value), unknown, x.axes)
        if isinstance(layer, (nn.Softmax, nn.LogSoftmax)) and layer.dim is not None:
            return self._coupled(node, layer, x, [layer.dim])
        if isinstance(layer, _ELEMENTWISE_LAYERS) or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
            return _state(layer(x.value), x.unknown, x.axes)
        if isinstance(layer, _POOLS) and not getattr(layer, "return_indices", False):
            return self._pool(layer, x, _channel_axis(layer, x))
        if isinstance(layer, (nn.Flatten, nn.Unflatten)):
            return self._reshape(x, layer, ())
        if isinstance(layer, (nn.LSTM, nn.GRU)):
            for state in _states((args, kwargs)):
                self._fix_all(state)
            self.kept[str(node.target)] = f"the units of an {type(layer).__name__} are kept"
            return fx.node.map_aggregate(self.values[node], lambda t: _unknown(t) if isinstance(t, Tensor) else t)
        raise self._refusal(node)

    def _function(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run: Callable[..., Any] = (lambda first, *rest, **named: getattr(first, target)(*rest, **named)) if node.op == "call_method" else target
        x = args[0] if args else None
        if target in _BINARY and all(isinstance(a, (State, int, float)) for a in args) and not kwargs:
            return self._binary(run, args)
        if target is operator.getitem and isinstance(x, (tuple, list)):
            return x[args[1]]
        if target in (torch.cat, torch.concat, "cat") and all(isinstance(s, State) for s in args[0]):
            return self._cat(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if target is F.scaled_dot_product_attention:
            return self._attention(node, args, kwargs)
        if not isinstance(x, State) or len(_states((args, kwargs))) > 1:
            raise self._refusal(node)
        if target is F.dropout:
            return x
        if target in _ELEMENTWISE_FUNCTIONS:
            return _state(run(x.value, *args[1:], **kwargs), x.unknown, x.axes)
        if target in _POOL_FUNCTIONS:
            return self._pool(lambda t: run(t, *args[1:], **kwargs), x, x.value.ndim - (1 if "1d" in target.__name__ else 2) - 1)
        if target in RESHAPES:
            return self._reshape(x, run, args[1:], kwargs)
        if target in _PERMUTES:
            order = run(torch.empty(tuple(range(2, 2 + x.value.ndim))), *args[1:], **kwargs).shape
            return State(run(x.value, *args[1:], **kwargs), run(x.unknown, *args[1:], **kwargs), tuple(x.axes[n - 2] for n in order))
        if target in ("expand", "expand_as"):
            value, unknown = (run(t, *args[1:], **kwargs) for t in (x.value, x.unknown))
            axes = (*_fixed(value.shape[: value.ndim - x.value.ndim]), *x.axes)
            return State(value, unknown, tuple(np.broadcast_to(axis, n) for axis, n in zip(axes, value.shape, strict=True)))
        if target in _MEANS:
            return self._mean(run, x, args[1:], kwargs)
        if target in _SOFTMAXES and isinstance(dim := kwargs.get("dim", args[1] if len(args) > 1 else None), int):
            return self._coupled(node, lambda t: run(t, *args[1:], **kwargs), x, [dim])
        if target is operator.getitem:
            return self._index(x, args[1])
        if target in (torch.chunk, torch.split, "chunk", "split"):
            self._fix_all(x)
            parts = zip(run(x.value, *args[1:], **kwargs), run(x.unknown, *args[1:], **kwargs), strict=True)
            return tuple(State(value, unknown, _fixed(value.shape)) for value, unknown in parts)
        raise self._refusal(node)

    def _linear(self, node: fx.Node, layer: nn.Linear, x: State) -> State:
        nonzero = layer.weight != 0
        unknown = F.linear(x.unknown.to(layer.weight.dtype), nonzero.to(layer.weight.dtype)) > 0.5
        outputs = self._new(layer.out_features)
        self._read(node, x, -1, outputs, nonzero, padded=False)
        return _state(layer(x.value), unknown, (*x.axes[:-1], outputs))

    def _conv(self, node: fx.Node, layer: nn.Conv1d | nn.Conv2d, x: State) -> State:
        nonzero = layer.weight != 0
        probe = copy.deepcopy(layer)
        probe.weight, probe.bias = nn.Parameter(nonzero.to(layer.weight.dtype)), None
        value, unknown = layer(x.value), probe(x.unknown.to(layer.weight.dtype)) > 0.5
        channels, space = layer.out_channels, x.axes[2:]
        for axis in space:
            self._fix(axis)
        if layer.groups == 1:
            outputs = self._new(channels)
            padded = layer.padding_mode == "zeros" and layer.padding != "valid" and (layer.padding == "same" or any(layer.padding))  # type: ignore[arg-type]
            self._read(node, x, 1, outputs, nonzero.flatten(2).any(2), padded=padded)
        elif layer.groups == layer.in_channels:
            outputs = np.repeat(x.axes[1], channels // layer.groups)
        else:
            self._fix(x.axes[1])
            outputs = _fixed((channels,))[0]
            self.kept[str(node.target)] = f"a convolution in {layer.groups} groups keeps its channels"
        return _state(value, unknown, (x.axes[0], outputs, *_fixed(value.shape[2:])))

    def _read(self, node: fx.Node, x: State, axis: int, outputs: np.ndarray, nonzero: Tensor, padded: bool) -> None:
        value, unknown = (t.movedim(axis, 0).flatten(1) for t in (x.value, x.unknown))
        constant = ~unknown.any(1) & (value == value[:, :1]).all(1)
        foldable = constant & (value[:, 0] == 0) if padded else constant
        if bool((constant & ~foldable & nonzero.any(0)).any()):
            where = (constant & ~foldable & nonzero.any(0)).nonzero().flatten().tolist()
            self.kept[str(node.target)] = f"reads the constant input channels {where} through zero padding, where a constant is not a bias; they are kept"
        self.reads.append(Read(node, x.axes[axis], outputs, nonzero.cpu().numpy(), foldable.cpu().numpy(), value[:, 0]))

    def _coupled(self, node: fx.Node, run: Callable[[Tensor], Tensor], x: State, dims: Sequence[int]) -> State:
        for dim in dims:
            self._couple(node, x.axes[dim])
        unknown = x.unknown.any(dim=tuple(dims), keepdim=True).expand_as(x.unknown) if dims else x.unknown
        return _state(run(x.value), unknown, x.axes)

    def _couple(self, node: fx.Node, ids: np.ndarray) -> None:
        if self._tracked(ids):
            self.kept[str(node.target)] = "each of its outputs reads all of its channels; they are kept together"
        self._tie_all(ids)

    def _pool(self, run: Callable[[Tensor], Tensor], x: State, channel: int) -> State:
        for axis in x.axes[channel + 1 :]:
            self._fix(axis)
        value = run(x.value)
        unknown = run(x.unknown.to(value.dtype)) != run(torch.zeros_like(x.value))  # what a pad adds is known, whatever its value
        return _state(value, unknown, (*x.axes[: channel + 1], *_fixed(value.shape[channel + 1 :])))

    def _binary(self, run: Callable[..., Tensor], args: tuple[Any, ...]) -> State:
        states = [a for a in args if isinstance(a, State)]
        value = run(*(a.value if isinstance(a, State) else a for a in args))
        unknown = states[0].unknown if len(states) == 1 else states[0].unknown | states[1].unknown
        if len(states) == 1:
            return _state(value, unknown, states[0].axes)
        a, b = (((np.zeros(1, dtype=np.int64),) * (value.ndim - s.value.ndim) + s.axes) for s in states)
        axes = []
        for p, q in zip(a, b, strict=True):
            if len(p) == len(q):
                self._tie(p, q)
            else:
                self._fix(p if len(p) == 1 else q)
            axes.append(p if len(p) >= len(q) else q)
        return _state(value, unknown.expand(value.shape), tuple(axes))

    def _cat(self, states: Sequence[State], dim: int) -> State:
        dim = dim % states[0].value.ndim
        axes = []
        for k, parts in enumerate(zip(*(s.axes for s in states), strict=True)):
            if k == dim:
                axes.append(np.concatenate(parts))
            else:
                for part in parts[1:]:
                    self._tie(parts[0], part)
                axes.append(parts[0])
        return State(torch.cat([s.value for s in states], dim), torch.cat([s.unknown for s in states], dim), tuple(axes))

    def _attention(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        q, k, v = (named[name] for name in ("query", "key", "value"))
        if (
            named.get("attn_mask") is not None
            or named.get("dropout_p")
            or named.get("enable_gqa")
            or q.value.ndim < 3
            or not all(isinstance(s, State) for s in (q, k, v))
        ):
            raise ShrinkError(f"'{node.name}': scaled dot-product attention with a mask, dropout or grouped queries is not supported; {MASKED}")
        for axis in (q.axes[-1], k.axes[-1], k.axes[-2], v.axes[-2]):
            self._fix(axis)
        for p, o, r in zip(q.axes[:-2], k.axes[:-2], v.axes[:-2], strict=True):
            self._tie(p, o)
            self._tie(p, r)
        # the weights of attention sum to 1: what is the same at every position stays as it is
        moves = v.unknown.any(-2, keepdim=True) | (v.value != v.value[..., :1, :]).any(-2, keepdim=True)
        shape = (*q.value.shape[:-1], v.value.shape[-1])
        return _state(v.value[..., :1, :].expand(shape), moves.expand(shape), (*q.axes[:-1], v.axes[-1]))

    def _mean(self, run: Callable[..., Tensor], x: State, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        dim = rest[0] if rest else kwargs.get("dim")
        dims = {d % x.value.ndim for d in ((dim,) if isinstance(dim, int) else dim or range(x.value.ndim))}
        keep = bool(kwargs.get("keepdim", rest[1] if len(rest) > 1 else False))
        for d in dims:
            self._fix(x.axes[d])
        unknown = x.unknown.any(dim=tuple(dims), keepdim=keep)
        axes = tuple(_fixed((1,))[0] if d in dims else axis for d, axis in enumerate(x.axes) if keep or d not in dims)
        return _state(run(x.value, *rest, **kwargs), unknown, axes)

    def _index(self, x: State, index: Any) -> State:
        parts = list(index) if isinstance(index, tuple) else [index]
        if not all(isinstance(p, (int, slice)) or p is None or p is Ellipsis for p in parts):
            raise ShrinkError(f"indexing by {index!r} is not supported, only by numbers and slices; {MASKED}")
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (x.value.ndim - sum(p is not None and p is not Ellipsis for p in parts))
        axes, k = [], 0
        for part in [*parts, *[slice(None)] * (x.value.ndim - sum(p is not None for p in parts))]:
            if part is None:
                axes.append(_fixed((1,))[0])
                continue
            if part != slice(None):
                self._fix(x.axes[k])
            if isinstance(part, slice):
                axes.append(x.axes[k][part])
            k += 1
        return State(x.value[index], x.unknown[index], tuple(axes))

    def _reshape(self, x: State, run: Callable[..., Tensor], rest: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> State:
        value, unknown = (run(t, *rest, **(kwargs or {})) for t in (x.value, x.unknown))
        axes: list[np.ndarray] = []
        for old, new in _factors(x.value.shape, value.shape):
            ids, sizes = [x.axes[k] for k in old], [value.shape[k] for k in new]
            moving = [k for k, axis in enumerate(ids) if self._tracked(axis)]
            if len(old) == len(new) == 1:
                axes.append(ids[0])
            elif len(new) == 1 and len(moving) == 1:  # flatten: every position of a channel is that channel's
                view = [1] * len(ids)
                view[moving[0]] = -1
                axes.append(np.broadcast_to(ids[moving[0]].reshape(view), [len(axis) for axis in ids]).reshape(-1))
            elif len(old) == 1 and moving and max(sizes, default=1) > 1:  # split into heads: all channels of a head are tied
                first = next(k for k, size in enumerate(sizes) if size > 1)
                rows = ids[0].reshape(sizes[first], -1)
                for column in range(1, rows.shape[1]):
                    self._tie(rows[:, 0], rows[:, column])
                axes += [*_fixed(sizes[:first]), rows[:, 0], *_fixed(sizes[first + 1 :])]
            else:
                for axis in ids:
                    self._fix(axis)
                axes += _fixed(sizes)
        return State(value, unknown, tuple(axes))

    def _fix_all(self, x: State) -> None:
        for axis in x.axes:
            self._fix(axis)

    def _refusal(self, node: fx.Node) -> ShrinkError:
        kind = type(self.modules[str(node.target)]).__name__ if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))
        what = f"layer '{node.target}' ({kind})" if node.op == "call_module" else f"'{kind}' at '{node.name}'"
        return ShrinkError(f"{what} is not a supported pattern; supported are {SUPPORTED}; {MASKED}")


def _refuse_layers_used_twice(graph: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    used: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and any(True for _ in modules[str(node.target)].parameters()):
            used[str(node.target)] = used.get(str(node.target), 0) + 1
    twice = next((name for name, count in used.items() if count > 1), None)
    if twice is not None:
        raise ShrinkError(f"layer '{twice}' is used more than once, so its channels cannot be cut for one use; {MASKED}")


def _state(value: Tensor, unknown: Tensor, axes: Axes) -> State:
    return State(value.masked_fill(unknown, 0), unknown, axes)


def _unknown(value: Tensor) -> State:
    return State(torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool), _fixed(value.shape))


def _fixed(shape: Sequence[int]) -> Axes:
    return tuple(np.zeros(n, dtype=np.int64) for n in shape)


def _channel_axis(layer: nn.Module, x: State) -> int:
    return x.value.ndim - (1 if type(layer).__name__.endswith("1d") else 2) - 1


def _states(tree: Any) -> list[State]:
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


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(_has_tensor(part) for part in value))


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The least groups of axes of `old` and `new` with equal products, in order: (2, 3, 4) → (2, 12) gives ([0], [0]), ([1, 2], [1])."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = ([i], [j]) if i < len(old) and j < len(new) else ([i], []) if i < len(old) else ([], [j])
        i, j = i + len(a), j + len(b)
        while (p := math.prod(old[k] for k in a)) != (q := math.prod(new[k] for k in b)):
            if p < q:
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        groups.append((a, b))
    return groups
