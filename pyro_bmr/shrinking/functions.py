"""The state of what each supported function or method returns.

Owns `function_state`. Next: `channels.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from pyro_bmr.shrinking.arithmetic import (
    attended,
    averaged,
    combined,
    coupled,
    elementwise,
    pooled,
)
from pyro_bmr.shrinking.refusals import unsupported
from pyro_bmr.shrinking.reshapes import (
    PERMUTES,
    RESHAPES,
    concatenated,
    expanded,
    indexed,
    permuted,
    reshaped,
    split,
)
from pyro_bmr.shrinking.states import State, states_in
from pyro_bmr.shrinking.ties import Ties

_ELEMENTWISE: set[Any] = {
    F.relu, F.relu6, F.tanh, F.sigmoid, F.gelu, F.silu, F.elu, F.celu, F.selu, F.leaky_relu,
    F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid, F.mish, F.softsign, F.logsigmoid,
    torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.abs, torch.neg, torch.square,
    torch.clone, operator.neg,
    "relu", "tanh", "sigmoid", "exp", "abs", "neg", "square", "clone", "contiguous", "detach",
}  # fmt: skip
_BINARY: set[Any] = {
    torch.add, torch.sub, torch.mul, operator.add, operator.sub, operator.mul, operator.iadd,
    operator.imul, operator.truediv,
    "add", "sub", "mul", "add_", "mul_",
}  # fmt: skip
_POOLS: set[Any] = {
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
}  # fmt: skip
_MEANS: set[Any] = {torch.mean, torch.sum, "mean", "sum"}
_SOFTMAXES: set[Any] = {
    torch.softmax, F.softmax, F.log_softmax, torch.log_softmax, "softmax", "log_softmax",
}  # fmt: skip
_CONCATENATIONS: set[Any] = {torch.cat, torch.concat, "cat"}
_SPLITS: set[Any] = {torch.chunk, torch.split, "chunk", "split"}


@dataclass(frozen=True)
class Call:
    """A call of a function or method in the graph; its arguments have states for tensors."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        """What is called. A method is a function of its object; `view` may copy."""
        target: Any = self.node.target
        if self.node.op != "call_method":
            return target
        # A state may be laid out in memory in another way than the value, so that view would fail.
        name = "reshape" if target == "view" else target
        return lambda first, *rest, **named: getattr(first, name)(*rest, **named)

    def run(self, first: Any) -> Any:
        """The result of the call with `first` as its first argument, and the others as they are."""
        return self.function(first, *self.args[1:], **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument with this position and name."""
        given = self.args[position] if len(self.args) > position else default
        return self.kwargs.get(name, given)


def function_state(ties: Ties, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state of what a function or method returns.

    Raises:
        ShrinkError: it is not a supported one.
    """
    call, target = Call(node, args, kwargs), node.target
    x = args[0] if args else None
    state = _state_from_several(ties, call)
    if state is None and isinstance(x, State) and len(states_in((args, kwargs))) == 1:
        rule = _RULES.get(target)
        state = None if rule is None else rule(ties, call, x)
    if state is None:
        raise unsupported(f"'{getattr(target, '__name__', target)}' at '{node.name}'")
    return state


def _state_from_several(ties: Ties, call: Call) -> Any:
    """The state of a call that may take several values; None if it is no such call."""
    target, args, kwargs = call.node.target, call.args, call.kwargs
    first = args[0] if args else None
    if target in _BINARY and not kwargs and all(isinstance(a, (State, int, float)) for a in args):
        return combined(ties, call.function, args)
    if target is operator.getitem and isinstance(first, (tuple, list)):
        return first[args[1]]
    if target in _CONCATENATIONS and all(isinstance(s, State) for s in args[0]):
        return concatenated(ties, args[0], call.argument(1, "dim", 0))
    if target is F.scaled_dot_product_attention:
        return attended(ties, call.node, args, kwargs)
    return None


def _dropout(ties: Ties, call: Call, x: State) -> State | None:
    return None if call.argument(2, "training", True) else x


def _pool(ties: Ties, call: Call, x: State) -> State:
    target: Any = call.node.target
    space = 1 if "1d" in target.__name__ else 2
    return pooled(ties, call.run, x, x.value.ndim - space - 1)


def _mean(ties: Ties, call: Call, x: State) -> State:
    keepdim = bool(call.argument(2, "keepdim", False))
    return averaged(ties, call.run, x, call.argument(1, "dim"), keepdim)


def _softmax(ties: Ties, call: Call, x: State) -> State | None:
    dim = call.argument(1, "dim")
    return coupled(ties, call.node, call.run, x, [dim]) if isinstance(dim, int) else None


Rule = Callable[[Ties, Call, State], Any]  # None: the call is not supported


def _rules(*rows: tuple[Iterable[Any], Rule]) -> dict[Any, Rule]:
    return {target: rule for targets, rule in rows for target in targets}


_RULES = _rules(
    ((F.dropout,), _dropout),
    (_ELEMENTWISE, lambda ties, call, x: elementwise(x, call.run)),
    (_POOLS, _pool),
    (RESHAPES, lambda ties, call, x: reshaped(ties, x, call.run)),
    (PERMUTES, lambda ties, call, x: permuted(x, call.run)),
    (("expand", "expand_as"), lambda ties, call, x: expanded(x, call.run)),
    (_MEANS, _mean),
    (_SOFTMAXES, _softmax),
    ((operator.getitem,), lambda ties, call, x: indexed(ties, x, call.args[1])),
    (_SPLITS, lambda ties, call, x: split(ties, x, call.run)),
)
