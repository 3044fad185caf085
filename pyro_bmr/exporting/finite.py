"""What of a network is no number: nothing is exported or written with a NaN in it.

Owns `check_finite` and `check_network`. Next: `plain_network.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_bmr.errors import ModelError


@torch.no_grad()
def check_network(net: nn.Module, what: str) -> None:
    """Raises ModelError if a parameter, a buffer, or a tensor that is computed from parameters is
    not finite; `what` was to be done with `net`.
    """
    computed = {
        f"{path}.{name}" if path else name: getattr(module, name)
        for path, module in net.named_modules()
        if parametrize.is_parametrized(module)
        for name in module.parametrizations  # type: ignore[union-attr]
    }
    weights = {**dict(net.named_parameters()), **computed}
    check_finite({**weights, **dict(net.named_buffers())}, what, weights)


def check_finite(
    tensors: Mapping[str, Tensor], what: str, weights: Collection[str] | None = None
) -> None:
    """Raises ModelError if one of `tensors` is not finite, with its name and the number of such
    values. One of them that is not among `weights`, by default those called so or biases, may be an
    additive mask, as that of causal attention: −∞ beside numbers that are not above 0.
    """
    weights = (
        [name for name in tensors if name.endswith(("weight", "bias"))]
        if weights is None
        else weights
    )
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_quantized:
            continue
        values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
        bad = int((~values.isfinite()).sum())
        additive = (
            bad
            and name not in weights
            and not values.is_complex()
            and "running_" not in name
            and bool((values <= 0).all())
        )
        if bad and not additive:
            raise ModelError(
                f"{what}: '{name}' of shape {tuple(tensor.shape)} has {bad} of {tensor.numel()}"
                " values that are NaN or infinite, so the network would give no numbers; nothing"
                " is written. Fit again with a lower learning rate, or reduce less"
            )
