"""Values that are not finite: no network with a NaN in it is exported or written.

Owns `check_finite` and `check_network`. Next: `plain_network.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_bmr.errors import ModelError


@torch.no_grad()
def check_network(net: nn.Module, what: str) -> None:
    """Checks the parameters, the buffers, and the tensors that are computed from parameters.

    Raises:
        ModelError: one is not finite; the message says that `what` was to be done with `net`.
    """
    computed: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        if parametrize.is_parametrized(module):
            names: Any = module.parametrizations
            prefix = f"{path}." if path else ""
            computed |= {f"{prefix}{name}": getattr(module, name) for name in names}
    weights = {**dict(net.named_parameters()), **computed}
    check_finite({**weights, **dict(net.named_buffers())}, what, weights)


def check_finite(
    tensors: Mapping[str, Tensor], what: str, weights: Collection[str] | None = None
) -> None:
    """Checks `tensors`; `weights`: which of them are weights, by default those named so or bias.

    A tensor that is not a weight may be an additive mask, such as the mask of causal attention: −∞,
    and other numbers that are not above 0.

    Raises:
        ModelError: a tensor has values that are not finite.
    """
    if weights is None:
        weights = [name for name in tensors if name.endswith(("weight", "bias"))]
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_quantized:
            continue
        values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
        bad = int((~values.isfinite()).sum())
        if bad and (name in weights or not _is_additive_mask(name, values)):
            raise ModelError(
                f"{what}: '{name}' of shape {tuple(tensor.shape)} has {bad} of {tensor.numel()}"
                " values that are NaN or infinite, so the network would give no numbers; nothing"
                " is written. Fit again with a lower learning rate, or reduce less"
            )


def _is_additive_mask(name: str, values: Tensor) -> bool:
    return not values.is_complex() and "running_" not in name and bool((values <= 0).all())
