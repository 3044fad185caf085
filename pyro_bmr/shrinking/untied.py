"""Tensors that several layers share, apart while the network is read.

An embedding that is also the output layer is cut in two ways if its two uses lose different
channels. Owns `untied` and `tied_again`. Next: `functional.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pyro_bmr.networks.plain_module import module_copy

Groups = list[list[str]]


def untied(net: nn.Module) -> tuple[nn.Module, Groups]:
    """A network with a parameter for each layer, and the names of those that are one in `net`.

    A layer that is used more than once keeps its one parameter.
    """
    groups = shared_names(net)
    if not groups:
        return net, []
    net = module_copy(net)
    for names in groups:
        for name in names[1:]:
            path, _, own = name.rpartition(".")
            owner = net.get_submodule(path)
            old = owner._parameters[own]
            assert old is not None
            owner._parameters[own] = nn.Parameter(
                old.detach().clone(), requires_grad=old.requires_grad
            )
    return net, groups


def shared_names(net: nn.Module) -> Groups:
    """The names of each parameter that is in more than one layer."""
    names: dict[int, list[str]] = {}
    for path, module in net.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{own}" if path else own
                names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def tied_again(net: nn.Module, groups: Groups) -> nn.Module:
    """`net`, which is changed: parameters of one group are one again where they are equal."""
    for names in groups:
        firsts: list[nn.Parameter] = []
        for name, owner, own in _owners(net, names):
            here = owner._parameters[own]
            assert here is not None, name
            same = (p for p in firsts if p.shape == here.shape and torch.equal(p, here))
            first = next(same, None)
            if first is None:
                firsts.append(here)
            else:
                setattr(owner, own, first)
    return net


def _owners(net: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Module, str]]:
    modules = dict(net.named_modules())
    found = []
    for name in names:
        path, _, own = name.rpartition(".")
        owner = modules.get(path)
        if owner is not None and owner._parameters.get(own) is not None:
            found.append((name, owner, own))
    return found
