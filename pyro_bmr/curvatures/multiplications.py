r"""Which torch functions multiply a parameter by a signal, and what of such a multiplication the
Kronecker factors need: the rows of its input, and of the gradient at its output.

Owns `Multiplication` and `multiplication_of`. Next: `recurrent.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = Callable[[Tensor], Tensor]
LINEAR = F.linear  # as it is before a recorder puts its own in its place
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, operator.matmul)


@dataclass(frozen=True)
class Multiplication:
    """One use of a weight: output = W a + bias at each position of each row.

    `inputs` and `gradients` turn the signal, and the gradient at the output, into matrices of
    (groups, positions, width). `turned`: the weight is (in, out), as in ``x @ W`` and in an
    embedding. `indices`: the input is the number of a row of the weight.
    """

    weight: Tensor
    bias: Tensor | None
    signal: Tensor
    inputs: Rows
    gradients: Rows
    turned: bool = False
    indices: bool = False


def multiplication_of(
    function: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> Multiplication | None:
    """The multiplication that a call of `function` is; None for any other call."""
    if function in _CONVOLUTIONS:
        return _convolution(_CONVOLUTIONS[function], *_bound(_CONV, args, named))
    if function is LINEAR:
        signal, weight, bias = _bound(_LINEAR, args, named)
        return Multiplication(weight, bias, signal, _flat, _flat)
    if function is F.embedding:
        signal, weight = _bound(("input", "weight"), args, named)[:2]
        return Multiplication(
            weight, None, signal, lambda a: a.reshape(1, -1), _flat, turned=True, indices=True
        )
    if function in _PRODUCTS and len(args) == 2 and _is_matrix(args[1]):
        return Multiplication(args[1], None, args[0], _flat, _flat, turned=True)
    if function in (torch.addmm, Tensor.addmm) and len(args) == 3 and not named:
        bias, signal, weight = args
        if _is_matrix(weight) and isinstance(bias, Tensor) and bias.ndim == 1:
            return Multiplication(weight, bias, signal, _flat, _flat, turned=True)
    return None


_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_USUAL: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _bound(names: tuple[str, ...], args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of `names`."""
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k in names}
    return tuple(given[name] if name in given else _USUAL.get(name) for name in names)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _flat(t: Tensor) -> Tensor:
    return t.reshape(1, -1, t.shape[-1])


def _convolution(
    axes: int,
    signal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Multiplication:
    """A convolution: its input at each position is the patch under the kernel."""
    kernel = weight.shape[2:]
    steps, spread = _each(stride, axes), _each(dilation, axes)
    before, after = _padding(padding, kernel, spread)

    def inputs(a: Tensor) -> Tensor:
        a = a if a.ndim == axes + 2 else a[None]
        ends = [
            size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair
        ]
        windows = F.pad(a, ends)
        for axis, (size, step, apart) in enumerate(zip(kernel, steps, spread, strict=True)):
            windows = windows.unfold(2 + axis, (size - 1) * apart + 1, step)[..., ::apart]
        grouped = windows.unflatten(1, (groups, -1)).movedim(1, 0)  # groups, rows, in, L…, k…
        grouped = grouped.movedim(2, 2 + axes)  # groups, rows, L…, in, k…
        return grouped.flatten(1, 1 + axes).flatten(2)

    def gradients(g: Tensor) -> Tensor:
        g = g if g.ndim == axes + 2 else g[None]
        return g.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, 1 + axes)

    return Multiplication(weight, bias, signal, inputs, gradients)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return numbers * axes if len(numbers) == 1 else numbers


def _padding(
    padding: Any, kernel: torch.Size, spread: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """The zeros before and after each axis; those that "same" stands for are after, if odd."""
    if padding == "same":
        total = [(size - 1) * apart for size, apart in zip(kernel, spread, strict=True)]
        return [size // 2 for size in total], [size - size // 2 for size in total]
    sizes = _each(0 if padding == "valid" else padding, len(kernel))
    return list(sizes), list(sizes)
