"""A module whose parameters are plain: wrappers taken off, masks of `torch.nn.utils.prune` and
weight norm folded into the weights they stand for.

Owns `plain_module`, `plain_copy` and `module_copy`. Next: `constraints.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from pyro_bmr.errors import ModelError


class Plain(NamedTuple):
    """A module of plain parameters, and the masks that were in force: parameter → bool tensor, True
    where the weight lives.
    """

    net: nn.Module
    masks: dict[str, Tensor]


def plain_module(net: nn.Module, *, constraints: bool = False) -> Plain:
    """`net` with the same function and plain parameters: `net` itself where it has none but these,
    else a copy.

    - `torch.compile`, and around the whole network `DataParallel`, `DistributedDataParallel` and
      `AveragedModel`, are taken off: names have no prefix.
    - A tensor under `torch.nn.utils.prune` is the pruned one, and its mask is in `masks`.
    - A tensor under weight norm, old or new, is the weight g·v/‖v‖ itself: it may have any value,
      so nothing is lost, and zero is zero.
    - With `constraints`, every other parametrization and spectral norm is folded too, as in
      evaluation. What the network computes stays as it is, the constraint goes: for a network that
      is not trained any more.

    Raises:
        ModelError: a folded tensor is tied to one that has other values, is not finite, or the
            module cannot be copied.
    """
    while (inner := _wrapped(net, whole=True)) is not None:
        net = inner
    if not any(
        _wrapped(m) or _pruned(m) or _normed(m) or (constraints and _constrained(m))
        for m in net.modules()
    ):
        return Plain(net, {})
    net = module_copy(net)
    _unwrap_children(net)
    uses = _uses(net)
    steps = (
        (_fold_pruned, _fold_normed, _fold_constrained)
        if constraints
        else (_fold_pruned, _fold_normed)
    )
    folded = [
        fold
        for step in steps
        for path, module in list(net.named_modules())
        for fold in step(path, module)
    ]
    masks = _tied_again(folded, uses)
    return Plain(net, {name: masks[id(p)] for name, p in net.named_parameters() if id(p) in masks})


def plain_copy(net: nn.Module) -> nn.Module:
    """A copy of `net` in evaluation mode with the same function, of plain parameters alone: see
    `plain_module`, constraints folded.
    """
    plain = plain_module(net, constraints=True).net
    return (module_copy(plain) if _same_parameters(plain, net) else plain).eval()


def module_copy(net: nn.Module, shared: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of `net`, also after a run has left tensors with a history in it, such as a
    hidden state: those are copied without it.

    `shared`: id → what stands for that object in the copy.

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


class Folded(NamedTuple):
    """A tensor that was folded: its module and name there, its value, the parameters that it was
    made of, and its mask.
    """

    where: str
    module: nn.Module
    name: str
    value: Tensor
    sources: tuple[nn.Parameter, ...]
    mask: Tensor | None = None


def _folded(
    path: str,
    module: nn.Module,
    name: str,
    sources: tuple[nn.Parameter, ...],
    mask: Tensor | None = None,
) -> Folded:
    return Folded(
        f"{path}.{name}" if path else name, module, name, getattr(module, name), sources, mask
    )


def _wrapped(module: nn.Module, whole: bool = False) -> nn.Module | None:
    if module._modules.get("_orig_mod") is not None:  # torch.compile; its class is slow to import
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


def _hooks(module: nn.Module, kind: type) -> Iterator[tuple[int, object]]:
    return (
        (key, hook)
        for key, hook in list(module._forward_pre_hooks.items())
        if isinstance(hook, kind)
    )


def _pruned(module: nn.Module) -> bool:
    return any(True for _ in _hooks(module, BasePruningMethod))


def _normed(module: nn.Module) -> list[str]:
    """The tensors of `module` under weight norm, gain and direction trained alike."""
    old = {
        hook.name: ("_g", "_v")
        for _, hook in _hooks(module, WeightNorm)
        if isinstance(hook, WeightNorm)
    }
    pairs = {name: [getattr(module, f"{name}{end}") for end in ends] for name, ends in old.items()}
    for name, parts in _parametrized(module).items():
        if len(parts) == 1 and isinstance(parts[0], _WeightNorm):
            pairs[name] = [parts.original0, parts.original1]
    return [name for name, (g, v) in pairs.items() if g.requires_grad == v.requires_grad]


def _constrained(module: nn.Module) -> bool:
    return bool(_parametrized(module)) or any(True for _ in _hooks(module, SpectralNorm))


def _parametrized(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    found = module.parametrizations if parametrize.is_parametrized(module) else nn.ModuleDict()
    return dict(found.items())  # type: ignore[union-attr, operator]


def _uses(net: nn.Module) -> dict[int, int]:
    """How often each parameter stands in the modules of `net`; a module that is shared counts
    once.
    """
    uses: dict[int, int] = {}
    for module in net.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


@torch.no_grad()
def _fold_pruned(path: str, module: nn.Module) -> Iterator[Folded]:
    for key, hook in _hooks(module, BasePruningMethod):
        name = cast(str, hook._tensor_name)  # type: ignore[attr-defined]
        original, mask = (
            module._parameters.pop(f"{name}_orig"),
            cast(Tensor, module._buffers.pop(f"{name}_mask")),
        )
        assert original is not None
        del module._forward_pre_hooks[key]
        vars(module).pop(name, None)  # the product, as a plain attribute
        setattr(
            module,
            name,
            nn.Parameter(original * mask.to(original.dtype), requires_grad=original.requires_grad),
        )
        yield _folded(path, module, name, (original,), mask != 0)


def _fold_normed(path: str, module: nn.Module) -> Iterator[Folded]:
    for name in _normed(module):
        old = next((key for key, hook in _hooks(module, WeightNorm) if hook.name == name), None)  # type: ignore[attr-defined]
        owner, ends = (
            (module, (f"{name}_g", f"{name}_v"))
            if old is not None
            else (_parametrized(module)[name], ("original0", "original1"))
        )
        sources = tuple(cast(nn.Parameter, getattr(owner, end)) for end in ends)
        if old is None:
            _remove(module, name)
        else:
            remove_weight_norm(module, name)
        getattr(module, name).requires_grad_(sources[0].requires_grad)
        yield _folded(path, module, name, sources)


def _fold_constrained(path: str, module: nn.Module) -> Iterator[Folded]:
    # spectral norm goes on iterating in training mode
    was, module.training = module.training, False
    for name, parts in _parametrized(module).items():
        parts.eval()
        sources = tuple(parts.parameters())
        _remove(module, name)
        yield _folded(path, module, name, sources)
    for _, hook in _hooks(module, SpectralNorm):
        name = cast(str, hook.name)  # type: ignore[attr-defined]
        original = cast(nn.Parameter, getattr(module, f"{name}_orig"))
        remove_spectral_norm(module, name)
        yield _folded(path, module, name, (original,))
    module.training = was


def _remove(module: nn.Module, name: str) -> None:
    """`remove_parametrizations` of a copy: it takes the property off the class, which a copy shares
    with its original.
    """
    kind = type(module)
    module.__class__ = type(
        kind.__name__,
        kind.__bases__,
        {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")},
    )
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _tied_again(folded: list[Folded], uses: Mapping[int, int]) -> dict[int, Tensor]:
    """Makes folded tensors of the same parameters one parameter again, and returns id of a folded
    parameter → its mask.
    """
    masks: dict[int, Tensor] = {}
    one: dict[tuple[int, ...], nn.Parameter] = {}
    for fold in folded:
        value, key = fold.value, tuple(id(p) for p in fold.sources)
        mask = next(
            (masks[i] for i in key if i in masks and masks[i].shape == value.shape), fold.mask
        )
        if mask is not None:
            masks[id(value)] = mask
        if getattr(fold.module, fold.name, None) is not value or not isinstance(
            value, nn.Parameter
        ):
            continue  # the direction of a weight norm, which is folded in its turn, or a buffer
        if not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise ModelError(
                f"'{fold.where}': {bad} of its {value.numel()} values are not finite (weight norm"
                " of a direction that is 0 is 0/0); set them anew"
            )
        parameters = fold.module._parameters
        # after the weights, as in torch's own layers
        parameters.update({k: parameters.pop(k) for k in list(parameters) if k.startswith("bias")})
        made = sum(tuple(id(p) for p in other.sources) == key for other in folded)
        first = one.setdefault(key, value)
        if any(uses.get(i, 1) != made for i in key) or not torch.equal(first, value):
            raise ModelError(
                f"'{fold.where}': it is tied to another parameter that is not pruned or normed in"
                " the same way, so that they have different values; untie them, or prune both by"
                " one mask"
            )
        if first is not value:
            setattr(fold.module, fold.name, first)
    return masks
