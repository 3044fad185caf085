r"""The exact diagonal of a curvature: squared gradients, one per row, summed over the rows.

Owns `row_squares`. Next: `scores.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_bmr.data.inputs import Inputs, call_arguments, of_each, pieces

_BYTES = 1 << 27  # of the gradients that are held at once
Run = Callable[[Any], Tensor]


def row_squares(
    net: nn.Module,
    parameters: Mapping[str, Tensor],
    x: Inputs,
    gradients: Tensor,
    output_of: Run,
) -> dict[str, Tensor]:
    r"""Name → Σ over rows of (∂⟨g, f(x)⟩/∂θ)², in the shape of each of the `parameters`.

    Args:
        gradients: g, one for each row of x, in the shape of the output.
        output_of: the tensor in what the network returns.

    The rows of a piece are differentiated together by `torch.func.vmap`. A network that cannot be,
    such as one with an LSTM, is differentiated row by row.
    """
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    step = max(1, _BYTES // max(size, 1))
    values = {name: p.detach() for name, p in parameters.items()}

    def product(theta: dict[str, Tensor], row: Inputs, g: Tensor) -> Tensor:
        args, named = call_arguments(net, of_each(lambda part: part[None], row))
        return (output_of(functional_call(net, theta, args, named)) * g[None]).sum()

    total = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in values.items()}
    for part, g in zip(pieces(x, step), gradients.split(step), strict=True):
        for name, gradient in _gradients(product, values, part, g).items():
            total[name] += gradient.to(total[name].dtype).square().sum(0)
    return total


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _gradients(
    product: Callable[..., Tensor], values: dict[str, Tensor], x: Inputs, g: Tensor
) -> dict[str, Tensor]:
    """Name → one gradient per row, stacked."""
    rows_of = vmap(grad(product), in_dims=(None, 0, 0), randomness="different")
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the only one with a rule for vmap
            found: dict[str, Tensor] = rows_of(values, x, g)
        return found
    except (RuntimeError, NotImplementedError, ValueError):
        rows = [
            _gradient(product, values, of_each(lambda part, k=k: part[k], x), g[k])  # type: ignore[misc]
            for k in range(len(g))
        ]
        return dict(zip(values, map(torch.stack, zip(*rows, strict=True)), strict=True))


def _gradient(
    product: Callable[..., Tensor], values: dict[str, Tensor], row: Inputs, g: Tensor
) -> list[Tensor]:
    """Of one row by each parameter, 0 for those that it does not use."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    found = product(leaves, row, g)
    if not found.requires_grad:
        return [torch.zeros_like(value) for value in values.values()]
    return list(
        torch.autograd.grad(found, list(leaves.values()), allow_unused=True, materialize_grads=True)
    )
