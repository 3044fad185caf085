"""The state of sums and products, means, pools, norms and attention.

Owns a function for each of these operations. Next: `layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx, zeros_like

from pyro_bmr.errors import ShrinkError
from pyro_bmr.shrinking.refusals import MASKED
from pyro_bmr.shrinking.states import State, fixed, state_of
from pyro_bmr.shrinking.ties import Ties


def elementwise(x: State, run: Callable[[Tensor], Tensor]) -> State:
    """The state after `run`, which maps each entry by itself."""
    return state_of(run(x.value), x.unknown, x.axes)


def coupled(
    ties: Ties, node: fx.Node, run: Callable[[Tensor], Tensor], x: State, dims: Sequence[int]
) -> State:
    """The state after `run`, such as a norm or a softmax, where each output reads all of `dims`."""
    for dim in dims:
        ties.couple(node, x.axes[dim])
    unknown = x.unknown
    if dims:
        unknown = unknown.any(dim=tuple(dims), keepdim=True).expand_as(unknown)
    return state_of(run(x.value), unknown, x.axes)


def pooled(ties: Ties, run: Callable[[Tensor], Tensor], x: State, channel: int) -> State:
    """The state after `run` has pooled or padded the axes behind the axis `channel`."""
    for axis in x.axes[channel + 1 :]:
        ties.fix(axis)
    value = run(x.value)
    # What a pad adds is known, whatever its value: the same is added to zeros.
    unknown = run(x.unknown.to(value.dtype)) != run(zeros_like(x.value))
    return state_of(value, unknown, (*x.axes[: channel + 1], *fixed(value.shape[channel + 1 :])))


def combined(ties: Ties, run: Callable[..., Tensor], operands: Sequence[Any]) -> State:
    """The state of a sum, product or quotient of one or two values and numbers.

    The channels of two values are tied, where they are not broadcast.
    """
    states = [a for a in operands if isinstance(a, State)]
    value = run(*(a.value if isinstance(a, State) else a for a in operands))
    if len(states) == 1:
        return state_of(value, states[0].unknown, states[0].axes)
    unknown = (states[0].unknown | states[1].unknown).expand(value.shape)
    a, b = (fixed((1,) * (value.ndim - s.value.ndim)) + s.axes for s in states)
    axes = []
    for p, q in zip(a, b, strict=True):
        if len(p) == len(q):
            ties.tie(p, q)
        else:
            ties.fix(p if len(p) == 1 else q)
        axes.append(p if len(p) >= len(q) else q)
    return state_of(value, unknown, tuple(axes))


def averaged(
    ties: Ties,
    run: Callable[[Tensor], Tensor],
    x: State,
    dim: int | Iterable[int] | None,
    keepdim: bool,
) -> State:
    """The state of a mean or sum over `dim`, by default over all axes, whose channels are kept."""
    chosen = (dim,) if isinstance(dim, int) else dim or range(x.value.ndim)
    dims = {d % x.value.ndim for d in chosen}
    for d in dims:
        ties.fix(x.axes[d])
    axes = tuple(
        fixed((1,))[0] if d in dims else axis
        for d, axis in enumerate(x.axes)
        if keepdim or d not in dims
    )
    return state_of(run(x.value), x.unknown.any(dim=tuple(dims), keepdim=keepdim), axes)


_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def attended(ties: Ties, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> State:
    """The state of scaled dot-product attention.

    Raises:
        ShrinkError: it has a mask, dropout or grouped queries.
    """
    named = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
    q, k, v = (named[name] for name in ("query", "key", "value"))
    if (
        not all(isinstance(s, State) for s in (q, k, v))
        or q.value.ndim < 3
        or named.get("attn_mask") is not None
        or named.get("dropout_p")
        or named.get("enable_gqa")
    ):
        raise ShrinkError(
            f"'{node.name}': scaled dot-product attention with a mask, dropout or grouped queries"
            f" is not supported; {MASKED}"
        )
    for axis in (q.axes[-1], k.axes[-1], k.axes[-2], v.axes[-2]):
        ties.fix(axis)
    for of_q, of_k, of_v in zip(q.axes[:-2], k.axes[:-2], v.axes[:-2], strict=True):
        ties.tie(of_q, of_k)
        ties.tie(of_q, of_v)
    # Attention weights sum to 1, so a value that is the same at every position is unchanged.
    varies = (v.value != v.value[..., :1, :]).any(-2, keepdim=True)
    unknown = v.unknown.any(-2, keepdim=True) | varies
    shape = (*q.value.shape[:-1], v.value.shape[-1])
    value = v.value[..., :1, :].expand(shape)
    return state_of(value, unknown.expand(shape), (*q.axes[:-1], v.axes[-1]))
