"""A network with zeros where the masks say so: the network that the smaller one has to equal.

Owns `masked`. Next: `layer_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.errors import ShrinkError, described
from pyro_bmr.networks.bayesian_network import BayesianNetwork
from pyro_bmr.networks.plain_module import module_copy, plain_module


@torch.no_grad()
def masked(net: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A plain copy of `net`, in evaluation mode, with exact zeros where the masks are False.

    What `torch.nn.utils.prune` has pruned is zero as well.

    Raises:
        ShrinkError: `net` is no plain module, or a mask is not a bool tensor in the shape of a
            parameter of that name.
    """
    if not isinstance(net, nn.Module) or isinstance(net, BayesianNetwork):
        raise ShrinkError(
            f"net: expected a plain torch.nn.Module, got {described(net)}; of a Bayesian network"
            " give what `export` returns, or its .net"
        )
    copied = module_copy(plain_module(net).net).eval()
    parameters = dict(copied.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        _check_mask(name, mask, parameters)
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    return plain_module(copied, constraints=True).net.eval()


def _check_mask(name: str, mask: Any, parameters: Mapping[str, Tensor]) -> None:
    if name not in parameters:
        raise ShrinkError(
            f"mask '{name}': expected the name of a parameter of the network, which are:"
            f" {', '.join(parameters)}"
        )
    shape = parameters[name].shape
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        raise ShrinkError(
            f"mask '{name}': expected a bool tensor of shape {tuple(shape)}, got"
            f" {described(mask)}; pass the masks of this network"
        )
