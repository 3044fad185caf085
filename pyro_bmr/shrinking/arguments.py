"""Arguments that are sizes or positions, for tensors with fewer channels.

A number of the forward that is part of the function, such as a scale, keeps its value. Owns
`Sizes` and `adapted`. Next: `cut_graph.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.movement import SPLIT_OPERATIONS
from pyro_bmr.shrinking.states import State, operation

ATEN = torch.ops.aten
_SIZED = {"view", "reshape", "_unsafe_view", "expand", "broadcast_to"}
_CREATED = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"}


@dataclass(frozen=True)
class Adapted:
    """A call with adapted arguments, and how its result is finished."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scale: float = 1.0
    index: tuple[int, Tensor] | None = None


@dataclass
class Sizes:
    """Copies of numbers of the old graph in the new one."""

    analysis: Analysis
    graph: fx.Graph
    new: dict[fx.Node, fx.Node]

    def of(self, part: Any, old: int, now: int) -> Any:
        """The size `part` of an axis that had `old` positions and has `now`."""
        if not isinstance(part, fx.Node):
            return part if part == -1 and isinstance(part, int) else now
        copied = self.new[part]
        if old == now:
            return copied
        times = self.graph.call_function(operator.mul, (copied, now))
        return self.graph.call_function(operator.floordiv, (times, old))


def adapted(analysis: Analysis, node: fx.Node, sizes: Sizes) -> Adapted:
    """The call at `node` for the kept channels.

    Raises:
        ValueError: it cannot be written for them.
    """

    def copy(part: Any) -> Any:
        return fx.node.map_arg(part, lambda n: sizes.new[n])

    schema: Any = getattr(node.target, "_schema", None)
    named = _by_name(node, schema)
    # a view needs the entries in the order that the whole network had them in
    target = ATEN.reshape.default if operation(node) in ("view", "_unsafe_view") else node.target
    found = _changed(analysis, node, named, sizes)
    if found is None:
        return Adapted(target, copy(node.args), copy(node.kwargs))
    target, changes, more = found
    if operation(node) in ("view", "_unsafe_view"):
        sizes_of = changes["size"]
        return Adapted(ATEN.reshape.default, (copy(node.args[0]), sizes_of), {}, **more)
    args, kwargs = list(copy(node.args)), dict(copy(node.kwargs))
    schema = getattr(target, "_schema", schema)
    if target is not node.target:
        args, kwargs = [args[0]], {}
    for name, value in changes.items():
        at = next(k for k, a in enumerate(schema.arguments) if a.name == name)
        if at < len(args):
            args[at] = value
        elif not schema.arguments[at].kwarg_only and at == len(args):
            args.append(value)
        else:
            kwargs[name] = value
    return Adapted(target, tuple(args), kwargs, **more)


def _by_name(node: fx.Node, schema: Any) -> dict[str, Any]:
    arguments = list(schema.arguments) if schema is not None else []
    named = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named |= {a.name: value for a, value in zip(arguments, node.args, strict=False)}
    return {**named, **node.kwargs}


Change = tuple[Any, dict[str, Any], dict[str, Any]]


def _changed(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], sizes: Sizes
) -> Change | None:
    """The operation, the arguments that change, and how the result is finished; None if nothing
    changes.
    """
    name, result = operation(node), analysis.states[node]
    source = node.args[0] if node.args else None
    x = analysis.states.get(source) if isinstance(source, fx.Node) else None
    if name in _SIZED | _CREATED and isinstance(result, State):
        return _sized(analysis, node, named, result, sizes)
    if not isinstance(x, State):
        return None
    rule = _RULES.get(name)
    if name in SPLIT_OPERATIONS and name != "unbind" and isinstance(result, tuple):
        rule = _split
    if "conv" in name and int(named.get("groups", 1)) > 1:
        rule = _groups
    return None if rule is None else rule(analysis, node, named, x, result)


def _sized(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], result: State, sizes: Sizes
) -> Change | None:
    key = "size" if "size" in named else "shape"
    old, kept = result.shape, [int(k.sum()) for k in analysis.kept_on(result)]
    given = list(named[key])
    if not any(isinstance(part, fx.Node) for part in given) and list(old) == kept:
        return None
    first = node.args[0] if node.args else None
    if list(old) == kept and isinstance(first, fx.Node):
        state = analysis.states[first]
        if not isinstance(state, State) or not analysis.is_cut(state):
            return None
    return (
        node.target,
        {key: [sizes.of(p, o, k) for p, o, k in zip(given, old, kept, strict=True)]},
        {},
    )


def _unflatten(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    dim = named["dim"] % x.value.ndim
    count = len(named["sizes"])
    kept = [int(k.sum()) for k in analysis.kept_on(result)][dim : dim + count]
    given = [
        part if isinstance(part, fx.Node) or part == -1 else k
        for part, k in zip(named["sizes"], kept, strict=True)
    ]
    if any(isinstance(part, fx.Node) for part in given):
        return None
    return node.target, {"sizes": given}, {}


def _slice(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    dim = named["dim"] % x.value.ndim
    kept = analysis.kept(x.axes[dim])
    if kept.all():
        return None
    start, end, step = named.get("start"), named.get("end"), named.get("step", 1)
    if operation(node) == "narrow":
        end = start + named["length"]
    old = np.arange(len(kept))[start:end:step]
    places = (np.cumsum(kept) - 1)[old[kept[old]]]
    steps = np.unique(np.diff(places))
    if len(steps) > 1:
        alias = ATEN.alias.default
        return alias, {}, {"index": (dim, torch.from_numpy(places.astype(np.int64)))}
    first = int(places[0]) if len(places) else 0
    last = int(places[-1]) + 1 if len(places) else 0
    step = int(steps[0]) if len(steps) else 1
    changes = {"dim": dim, "start": first, "end": last, "step": step}
    return ATEN.slice.Tensor, changes, {}


def _select(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    dim = named["dim"] % x.value.ndim
    kept = analysis.kept(x.axes[dim])
    if kept.all():
        return None
    index = named["index"] % len(kept)
    if not kept[index]:
        raise ValueError("what is taken out is removed")
    return node.target, {"index": int(kept[:index].sum())}, {}


def _split(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: Any
) -> Change | None:
    dim = named.get("dim", 0) % x.value.ndim
    kept = analysis.kept(x.axes[dim])
    if kept.all():
        return None
    parts = [int(analysis.kept(part.axes[dim]).sum()) for part in result]
    return ATEN.split_with_sizes.default, {"split_sizes": parts, "dim": dim}, {}


def _groups(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    weight = analysis.states[node.args[1]]  # type: ignore[index]
    groups = int(named["groups"])
    kept = analysis.kept(weight.axes[0]).reshape(groups, -1).any(1)
    return node.target, {"groups": int(kept.sum())}, {}


def _group_norm(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    kept = analysis.kept(x.axes[1]).reshape(int(named["num_groups"]), -1).any(1)
    return node.target, {"num_groups": int(kept.sum())}, {}


def _attention(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    if named.get("scale") is not None or analysis.kept(x.axes[-1]).all():
        return None
    return node.target, {"scale": 1 / math.sqrt(x.shape[-1])}, {}


def _mean(
    analysis: Analysis, node: fx.Node, named: dict[str, Any], x: State, result: State
) -> Change | None:
    dims = named.get("dim")
    axes = range(x.value.ndim) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    ratio = 1.0
    for d in axes:
        kept = analysis.kept(x.axes[d])
        ratio *= kept.sum() / len(kept)
    return None if ratio == 1 else (node.target, {}, {"scale": float(ratio)})


_RULES: dict[str, Callable[..., Change | None]] = {
    "unflatten": _unflatten,
    "slice": _slice,
    "narrow": _slice,
    "select": _select,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "mean": _mean,
}
