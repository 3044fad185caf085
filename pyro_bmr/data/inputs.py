"""The inputs x of a program: one tensor, or a tuple or a dict of tensors, all with the rows first.

Owns `Inputs`, what can be done to all its tensors at once, and how a network is called with them.
Next: `tables.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def parts_of(x: Any, name: str = "x") -> dict[str, Tensor]:
    """The tensors of x, each with its name in messages."""
    if isinstance(x, Mapping):
        return {f"{name}['{key}']": part for key, part in x.items()}
    if isinstance(x, (tuple, list)):
        return {f"{name}[{k}]": part for k, part in enumerate(x)}
    return {name: x}


def of_each(function: Callable[[Tensor], Tensor], x: Inputs) -> Inputs:
    """x with `function` applied to each of its tensors."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: function(part) for key, part in x.items()}
    return tuple(function(part) for part in x)


def has_rows(value: Any) -> bool:
    """Whether `value` is a tensor with rows, or a tuple or a dict of such."""
    parts = parts_of(value).values()
    return bool(parts) and all(isinstance(part, Tensor) and part.ndim > 0 for part in parts)


def rows_in(x: Any) -> int:
    """How many rows x has; the first of its tensors tells."""
    return len(x) if isinstance(x, Tensor) else len(next(iter(parts_of(x).values())))


def pieces(x: Inputs, rows: int) -> Iterator[Inputs]:
    """x in pieces of at most so many rows, in order; no copies."""
    if isinstance(x, Tensor):
        yield from x.split(rows)
        return
    for first in range(0, rows_in(x), rows):
        yield of_each(lambda part, first=first: part[first : first + rows], x)  # type: ignore[misc]


def joined(parts: Sequence[Inputs]) -> Inputs:
    """The rows of all `parts`, one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    columns: list[Any] = [dict(parts_of(part)) for part in parts]
    names = list(columns[0])
    tensors = [torch.cat([column[name] for column in columns]) for name in names]
    if isinstance(first, Mapping):
        return dict(zip(first, tensors, strict=True))
    return tuple(tensors)


def arguments(x: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The arguments with which a network is called: ``net(x)``, ``net(*x)`` or ``net(**x)``."""
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, Mapping):
        return (), dict(x)
    return tuple(x), {}


def call_arguments(net: Callable[..., Any], x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which `net` is called: those of `arguments`, or one dict, if x is a dict
    and the forward has one argument for it that is not among its keys.
    """
    given, named = arguments(x)
    if named:
        parameters = inspect.signature(getattr(net, "forward", net)).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not open_ended and not parameters.keys() & named.keys():
            return (named,), {}
    return given, named


def called(net: Callable[..., Any], x: Inputs) -> Any:
    """What a network returns for x."""
    given, named = call_arguments(net, x)
    return net(*given, **named)


def device_of(x: Inputs) -> torch.device:
    """Where x is; the first of its tensors tells."""
    return next(iter(parts_of(x).values())).device


def in_dtype_of(net: nn.Module, x: Inputs) -> Inputs:
    """x with its floating-point numbers in the dtype of the network; other numbers as they are."""
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    dtype = next(dtypes, torch.get_default_dtype())
    return of_each(lambda part: part.to(dtype) if part.is_floating_point() else part, x)


def described(x: Any) -> str:
    """The shapes and dtypes of x in a message."""
    if isinstance(x, Tensor):
        return f"shape {tuple(x.shape)} and {x.dtype}"
    return ", ".join(
        f"{name} {tuple(part.shape)} {part.dtype}" for name, part in parts_of(x, "").items()
    )
