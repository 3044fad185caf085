"""A module whose parameters are plain: wrappers taken off, and masks of `torch.nn.utils.prune` and
weight norm folded into the weights they stand for.

Owns `plain_module`, `plain_copy` and `module_copy`. Next: `constraints.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from pyro_bmr.errors import ModelError
from pyro_bmr.networks.folding import (
    fold_constrained,
    fold_normed,
    fold_pruned,
    needs_folding,
    tied_again,
    uses_of,
)


class Plain(NamedTuple):
    """A module of plain parameters, and the masks that were in force: parameter → bool tensor, True
    where the weight is kept.
    """

    net: nn.Module
    masks: dict[str, Tensor]


def plain_module(net: nn.Module, *, constraints: bool = False) -> Plain:
    """A module of plain parameters that computes what `net` does: `net` itself if its parameters
    are plain, else a copy.

    - `torch.compile`, and around the whole network `DataParallel`, `DistributedDataParallel` and
      `AveragedModel`, are taken off: names have no prefix.
    - A tensor under `torch.nn.utils.prune` is the pruned one, and its mask is in `masks`.
    - A tensor under weight norm, old or new, is the weight g·v/‖v‖ itself. It may have any value,
      so nothing is lost, and zero is zero.
    - With `constraints`, every other parametrization and spectral norm is folded too, as in
      evaluation mode. The network computes the same without the constraint: use it if the network
      is not trained any more.

    Raises:
        ModelError: a folded tensor is tied to one that has other values, is not finite, or the
            module cannot be copied.
    """
    while (inner := _wrapped(net, whole=True)) is not None:
        net = inner
    if not any(_wrapped(module) or needs_folding(module, constraints) for module in net.modules()):
        return Plain(net, {})
    net = module_copy(net)
    _unwrap_children(net)
    uses = uses_of(net)
    steps = [fold_pruned, fold_normed, *([fold_constrained] if constraints else [])]
    folded = [
        fold
        for step in steps
        for path, module in list(net.named_modules())
        for fold in step(path, module)
    ]
    masks = tied_again(folded, uses)
    return Plain(net, {name: masks[id(p)] for name, p in net.named_parameters() if id(p) in masks})


def plain_copy(net: nn.Module) -> nn.Module:
    """A copy of `net` in evaluation mode that computes the same with plain parameters alone; as
    `plain_module` with `constraints`.
    """
    plain = plain_module(net, constraints=True).net
    return (module_copy(plain) if _same_parameters(plain, net) else plain).eval()


def module_copy(net: nn.Module, shared: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of `net`. Tensors with a history that a run has left in it, such as a hidden
    state, are copied without their history.

    `shared`: id of an object → what the copy has in its place.

    Raises:
        ModelError: a part of it cannot be copied.
    """
    held = [
        value
        for module in net.modules()
        for value in tree_leaves(vars(module))
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo = {**{id(value): value.detach().clone() for value in held}, **(shared or {})}
    try:
        return copy.deepcopy(net, memo)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{type(net).__name__} cannot be copied ({str(error).splitlines()[0]}); take that part"
            " out of the module"
        ) from error


def _wrapped(module: nn.Module, whole: bool = False) -> nn.Module | None:
    """The module inside a wrapper, if `module` is one; with `whole` also inside those that only go
    around a whole network.
    """
    # torch.compile, known by its attribute since its class is slow to import
    if module._modules.get("_orig_mod") is not None:
        return module._modules["_orig_mod"]
    if whole and isinstance(module, (nn.DataParallel, DistributedDataParallel, AveragedModel)):
        return cast(nn.Module, module.module)
    return None


def _unwrap_children(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, child in module._modules.items():
            while child is not None and (inner := _wrapped(child)) is not None:
                module._modules[name] = child = inner


def _same_parameters(one: nn.Module, other: nn.Module) -> bool:
    ids = {id(p) for p in (*other.parameters(), *other.buffers())}
    tensors = (*one.parameters(), *one.buffers())
    return not tensors or any(id(p) in ids for p in tensors)
